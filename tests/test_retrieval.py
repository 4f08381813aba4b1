"""Drafts without a model, piece by piece: automaton, store and its walls, alignment, table of successors.

What they guess is never wrong (guesses cannot change a text), so these tests ask what no law can: is it
what the method says, is memory bounded, and does no text cross from one tenant to another.
"""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import InvalidInput, Recycling, SpeculativeGenerator, Store, Suffix
from specdec.proposers import Call, recycling
from specdec.proposers.automaton import NOTHING, SuffixAutomaton
from specdec.proposers.prediction import NEAR, Alignment, read_predictions
from specdec.proposers.store import Reader
from specdec.state import State
from specdec.testing import noisy_copy, ragged_prompt, tiny_llama

from .contract import llama, plain, prompts, speculative, t5

TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=30)


# --- the automaton ----------------------------------------------------------------------------------


def longest_repeated(text):
    """Length of the longest end that stood before, and the places behind it, by trying all."""
    for length in range(len(text) - 1, 0, -1):
        places = [p for p in range(length, len(text)) if text[p - length : p] == text[len(text) - length :]]
        if places:
            return length, places
    return 0, []


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_automaton_finds_the_longest_end_that_stood_before(text):
    automaton = SuffixAutomaton()
    for count, token in enumerate(text, 1):
        automaton.extend([token])
        length, places = longest_repeated(text[:count])
        assert automaton.matched == length
        if length:
            assert automaton.place in places
            copied = automaton.repetition(5)
            lag = count - automaton.place
            assert copied == [(text[:count] + copied)[count + i - lag] for i in range(5)]
        else:
            assert automaton.repetition(5) == []


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS, TEXTS)
def test_another_text_is_followed_while_the_automaton_grows(first, second, other):
    automaton = SuffixAutomaton(first)
    place = (0, 0)
    for count, token in enumerate(other, 1):
        if count == len(other) // 2:
            automaton.extend(second)
        place = automaton.advance(*place, token)
        state, matched = place
        behind = automaton.continuation(state, 3)
        end = other[count - matched : count]
        where = [p for p in range(len(automaton.text) + 1) if automaton.text[max(p - matched, 0) : p] == end]
        assert not matched or behind in [automaton.text[p : p + 3] for p in where]
        if count < len(other) // 2:  # nothing was added since: exactly the longest
            longest = max(
                length
                for length in range(count + 1)
                if any(
                    first[p - length : p] == other[count - length : count] for p in range(length, len(first) + 1)
                )
            )
            assert matched == longest


def test_a_repetition_does_not_stop_where_the_copy_meets_itself():
    assert SuffixAutomaton([7, 1, 2, 1, 2]).repetition(5) == [1, 2, 1, 2, 1]


def test_the_latest_of_two_occurrences_is_copied():
    assert SuffixAutomaton([1, 2, 3, 8, 1, 2, 4, 9, 1, 2]).repetition(2) == [4, 9]


def test_nothing_is_guessed_across_the_end_of_a_text():
    assert SuffixAutomaton([5, 1, 2, NOTHING, 5]).repetition(8) == [1, 2]


def test_work_for_a_token_stays_the_same_in_a_long_text():
    """Counted, not timed: states and links touched by 4,000 tokens of the worst kind of text."""

    class Counting(list):
        touched = 0

        def __getitem__(self, index):
            Counting.touched += 1
            return super().__getitem__(index)

    automaton = SuffixAutomaton()
    automaton._links = Counting(automaton._links)
    automaton.extend([1] * 2000 + [2, 1] * 1000)
    assert Counting.touched < 15 * len(automaton.text)


# --- the suffix proposer ----------------------------------------------------------------------------


def proposals(draft, inputs, target=None, **options):
    """What ``draft`` proposed in every round of a greedy call: guesses a row."""
    seen = []

    class Watched:
        def begin(self, call):
            run = draft.begin(call)
            propose = run.propose

            def watched(state, limits):
                proposal = propose(state, limits)
                seen.append(
                    [t[:n].tolist() for t, n in zip(proposal.tokens, proposal.lengths.tolist(), strict=True)]
                )
                return proposal

            run.propose = watched
            return run

    gen = SpeculativeGenerator(target or llama(), Watched(), num_draft_tokens=12)
    gen.generate(**inputs, max_new_tokens=14, do_sample=False, **options)
    return seen, gen.stats


@pytest.mark.parametrize(("matched", "guesses"), [(1, 6), (2, 8), (3, 10), (6, 12)])
def test_guesses_follow_the_length_of_the_match(matched, guesses):
    class Oracle:
        """As much of a State as Suffix looks at."""

        device = torch.device("cpu")
        host_tokens = np.array([[*range(20, 40), 50, *range(20, 20 + matched)]])
        lengths = settled = np.array([host_tokens.shape[1]])
        starts = np.array([0])
        vocabulary = 64

    run = Suffix().begin(call_for(torch.tensor(Oracle.host_tokens)))
    proposal = run.propose(Oracle, np.array([12]))
    assert proposal.lengths.tolist() == [guesses]
    wanted = [*range(20 + matched, 40), 50][:guesses]
    assert proposal.tokens[0].tolist() == wanted


def call_for(prompt, target=None):
    from specdec.processing import Processing
    from specdec.sampling import Greedy

    return Call(target or llama(), prompt, {}, 64, Processing([]), Greedy())


def test_a_row_is_guessed_for_from_its_own_text_only():
    """Row 0 repeats row 1's beginning; without a store nothing of row 1 may be guessed."""
    first, second = [30, 31, 32, 33, 34, 35], [3, 4, 5, 30, 31, 32]
    ids = torch.tensor([second, first])
    run = Suffix().begin(call_for(ids))

    class State:
        device = torch.device("cpu")
        host_tokens = ids.numpy()
        lengths = settled = np.array([6, 6])
        starts = np.array([0, 0])
        vocabulary = 64

    assert run.propose(State, np.array([4, 4])).lengths.tolist() == [0, 0]


@pytest.mark.parametrize(("mask", "guess"), [([1] * 6, [13, 14, 15]), ([1, 1, 1, 1, 0, 0], [13, 14])])
def test_a_decoder_may_copy_what_its_encoder_read(mask, guess):
    ids = torch.tensor([[11, 12, 13, 14, 15, 1]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([mask])}
    run = Suffix().begin(Call(t5(), torch.tensor([[0]]), inputs, 64, call_for(ids).processing, None))

    class State:
        device = torch.device("cpu")
        host_tokens = np.array([[0, 12]])
        lengths = settled = np.array([2])
        starts = np.array([0])
        vocabulary = 64

    assert run.propose(State, np.array([3])).tokens.tolist() == [guess]


def test_padding_is_no_text_to_copy_from():
    ids = torch.tensor([[0, 0, 7, 5, 0]])
    run = Suffix().begin(call_for(ids))

    class State:
        device = torch.device("cpu")
        host_tokens = ids.numpy()
        lengths = settled = np.array([5])
        starts = np.array([2])
        vocabulary = 64

    assert run.propose(State, np.array([4])).lengths.tolist() == [0]


# --- the store: walls ---------------------------------------------------------------------------------

SECRET = list(range(20, 40))


def crosses(store):
    """Whether what one tenant wrote is guessed for another, or for a tenant that has been forgotten."""
    store.add("one", SECRET)
    store.add("two", [5, 6, 7, 8])
    leaked = False
    for reader in (store.read("two"), store.read("three"), store.read("ONE"), store.read("")):
        reader.follow(SECRET[:8])
        leaked |= bool(set(reader.guess(10)) & set(SECRET))
    store.forget("one")
    again = store.read("one")
    again.follow(SECRET[:8])
    return leaked or bool(again.guess(10))


def grows(store):
    """Whether memory follows what was ever written."""
    for number in range(40):
        for tenant in range(6):
            store.add(f"tenant {tenant}", [number] * 9)
        store.add("tenant 5", list(range(500)))
    return len(store.tenants) > 3 or any(store.tokens(tenant) > 40 for tenant in store.tenants)


def test_no_text_crosses_from_one_tenant_to_another():
    assert not crosses(Store())
    own = Store()
    own.add("one", SECRET)
    reader = own.read("one")
    reader.follow(SECRET[:8])
    assert reader.matched == 8
    assert reader.guess(4) == SECRET[8:12]  # the instrument works: the owner is guessed for


def test_memory_is_bounded():
    assert not grows(Store(tokens=40, tenants=3))


class OneForAll(Store):
    """A mutant: all tenants share a shelf."""

    def _shelf(self, tenant):
        return super()._shelf("all")

    def read(self, tenant):
        return super().read("all")


class CaseBlind(Store):
    """A mutant: names are tidied up."""

    def add(self, tenant, tokens):
        super().add(tenant.lower(), tokens)

    def read(self, tenant):
        return super().read(tenant.lower())


class LooksEverywhere(Store):
    """A mutant: an unknown tenant is shown everybody's texts."""

    def read(self, tenant):
        if tenant in self.tenants:
            return super().read(tenant)
        halves = [half for shelf in self._shelves.values() for half in shelf.halves]
        return Reader(halves, self._lock)


class NeverForgets(Store):
    """A mutant: to forget is only to look away."""

    def forget(self, tenant):
        pass


class NeverDrops(Store):
    """A mutant: the older half is kept."""

    def add(self, tenant, tokens):
        self._half = 10**9
        super().add(tenant, tokens)


class KeepsAllTenants(Store):
    """A mutant: tenants come and stay."""

    def _shelf(self, tenant):
        self._tenants += 1
        return super()._shelf(tenant)


@pytest.mark.parametrize("mutant", [OneForAll, CaseBlind, LooksEverywhere, NeverForgets])
def test_a_store_with_a_hole_in_the_wall_is_found(mutant):
    assert crosses(mutant())


@pytest.mark.parametrize("mutant", [NeverDrops, KeepsAllTenants])
def test_a_store_that_grows_is_found(mutant):
    assert grows(mutant(tokens=40, tenants=3))


def test_rows_of_different_tenants_in_one_batch():
    """Each row reads and writes its own shelf; prompts are not kept."""
    store = Store()
    gen = SpeculativeGenerator(llama(), Suffix(store=store))
    out = gen.generate(**prompts(3), max_new_tokens=9, do_sample=False, tenant=["a", "b", "a"])
    assert store.tenants == ["b", "a"]
    assert store.tokens("a") == 2 * (9 + 1)
    assert store.tokens("b") == 9 + 1
    reader = store.read("b")
    reader.follow(out[1, 9:12].tolist())
    assert reader.guess(20) == out[1, 12:].tolist()
    seen, _ = proposals(Suffix(store=store), prompts(3), tenant=["b", "a", "c"])
    theirs = set(out[:, 9:].flatten().tolist())
    for guesses in seen:
        # row 2 is nobody's yet: it knows its own text only
        own = set(prompts(3)["input_ids"][2].tolist())
        assert set(guesses[2]) & theirs <= own | set(plain(llama(), prompts(3))[2, 9:].tolist())


def test_padding_behind_rows_that_have_ended_is_not_kept():
    eos = int(plain(llama(), prompts(3))[0, 11])
    store = Store()
    gen = SpeculativeGenerator(llama(), Suffix(store=store))
    gen.generate(**prompts(3), max_new_tokens=9, do_sample=False, eos_token_id=eos, tenant=["a", "b", "c"])
    kept = [store.tokens(tenant) - 1 for tenant in "abc"]
    assert kept == gen.stats.row_emitted.tolist()
    assert kept[0] < max(kept)


@pytest.mark.parametrize("draft", ["ngram", None])
@pytest.mark.parametrize("new", [1, 9])
def test_as_many_tenants_as_rows_with_and_without_a_store(draft, new):
    gen = SpeculativeGenerator(llama(), draft)
    for tenant in (["a", "b"], []):
        with pytest.raises(InvalidInput, match=f"{len(tenant)} of `tenant` for 3 rows"):
            gen.generate(**prompts(3), max_new_tokens=new, do_sample=False, tenant=tenant)
    gen.generate(**prompts(3), max_new_tokens=new, do_sample=True, num_return_sequences=2, tenant=["a", "b", "a"])


def test_a_call_that_fails_leaves_the_store_alone():
    store = Store()
    gen = SpeculativeGenerator(llama(), Suffix(store=store, tenant="me"))

    def fails(ids, scores):
        if ids.shape[1] > 13:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        gen.generate(**prompts(1), max_new_tokens=9, do_sample=False, stopping_criteria=[fails])
    assert store.tenants == []


def test_what_a_condition_took_back_is_not_kept():
    store = Store()
    gen = SpeculativeGenerator(llama(), Suffix(store=store, tenant="me"), num_draft_tokens=3)
    stop = [lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= 13)]
    out = gen.generate(**prompts(1), max_new_tokens=9, do_sample=False, stopping_criteria=stop)
    assert store.tokens("me") == out.shape[1] - 9 + 1


def test_a_text_that_was_predicted_is_kept_as_well():
    """The store is looked into behind the prediction, and told all the same."""
    store = Store()
    gen = SpeculativeGenerator(llama(), Suffix(store=store, tenant="me"), num_draft_tokens=3)
    gen.generate(**prompts(1), max_new_tokens=9, do_sample=False, prediction=[3, 4, 5])
    assert store.tokens("me") == 9 + 1


def guessed(draft, text, limit=3):
    """What ``draft`` guesses behind ``text``."""
    ids = torch.tensor([text])
    state = State(ids, max_length=64, max_guesses=16, eos_ids=None, pad_id=0, starts=np.zeros(1, dtype=np.int64))
    state.vocabulary = 64
    proposal = draft.begin(call_for(ids)).propose(state, np.array([limit]))
    return proposal.tokens[0, : proposal.lengths[0]].tolist()


def test_a_match_at_the_end_of_a_stored_text_makes_no_shorter_one_count():
    store = Store()
    store.add("me", [31, 6])
    for shortest, guess in (1, [30, 31, 6]), (2, []):
        draft = Suffix(shortest=shortest, store=store, tenant="me")
        assert guessed(draft, [6, 30, 31, 6]) == guess


def test_the_longer_of_two_matches_is_copied_and_the_rows_own_at_a_tie():
    store = Store()
    store.add("me", [*range(20, 40), 5, 6, 41])
    draft = Suffix(store=store, tenant="me")
    assert guessed(draft, [20, 21, 22, 23, 24], 12) == list(range(25, 37))  # as many as such a match is worth
    assert guessed(draft, [5, 6, 42, 43, 5, 6], 1) == [42]
    assert guessed(draft, [6, 42, 43, 5, 6], 1) == [41]


def test_who_reads_is_not_idle():
    store = Store(tenants=2)
    store.add("a", [5, 6])
    store.add("b", [5, 6])
    store.read("a")
    store.add("c", [5, 6])
    assert store.tenants == ["a", "c"]


def test_long_texts_one_after_another_stay_within_a_shelf():
    store = Store(tokens=20)
    for first in (10, 30):
        store.add("me", list(range(first, first + 15)))
    assert store.tokens("me") == 20
    reader = store.read("me")
    reader.follow([43])
    assert reader.guess(3) == [44]  # the end is what is kept


def test_the_younger_of_two_texts_is_copied():
    store = Store(tokens=8)
    store.add("me", [5, 6, 7])
    store.add("me", [5, 6, 8])  # goes into the other half
    reader = store.read("me")
    reader.follow([5, 6])
    assert reader.guess(2) == [8]


def test_who_reads_goes_on_in_texts_that_are_dropped_meanwhile():
    store = Store(tokens=40)
    store.add("me", list(range(10, 25)))
    reader = store.read("me")
    reader.follow(list(range(10, 20)))
    for _ in range(3):
        store.add("me", [5] * 15)
    assert reader.guess(3) == [20, 21, 22]
    reader.follow([20])
    assert reader.guess(3) == [21, 22, 23]


def test_a_copy_of_a_store_goes_its_own_way():
    store = Store()
    store.add("me", [5, 6, 7])
    for other in (copy.copy(store), copy.deepcopy(store)):
        other.add("me", [8])
        assert (store.tokens("me"), other.tokens("me")) == (4, 6)


def test_a_second_call_is_guessed_from_the_first():
    store = Store()
    rounds = []
    for _ in range(2):
        gen = SpeculativeGenerator(llama(), Suffix(store=store, tenant="me"), num_draft_tokens=8)
        gen.generate(**prompts(1), max_new_tokens=30, do_sample=False)
        rounds.append(gen.stats.rounds)
    assert rounds[1] <= 8 < rounds[0]


def test_a_store_on_disk(tmp_path):
    store = Store()
    store.add("a", [1, 2, 3, 4])
    store.add("über", [7, 8, 9])
    store.add("a", [5, 6])
    store.save(tmp_path / "store.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["store.safetensors"]
    again = Store.load(tmp_path / "store.safetensors")
    assert again.tenants == store.tenants
    for tenant, text in (("a", [1, 2, 3, 4]), ("über", [7, 8, 9])):
        reader = again.read(tenant)
        reader.follow(text[:2])
        assert reader.guess(5) == text[2:]
    assert Store.load(tmp_path / "store.safetensors", tokens=8).tokens("a") <= 8
    assert not crosses(again)


def test_a_file_that_is_no_store(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "text").write_text("hello, this is no safetensors file")
    save_file({"0": np.zeros(3)}, tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(InvalidInput, match=f"{name}.*store"):
            Store.load(tmp_path / name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Store(tokens=3), "tokens=3"),
        (lambda: Store(tenants=0), "tenants=0"),
        (lambda: Store(tokens=1e5), "100000.0"),
        (lambda: Store().add(7, [1]), "int; give a string"),
        (lambda: Suffix(shortest=0), "shortest=0"),
        (lambda: Suffix(per_match=-1.0), "per_match=-1"),
        (lambda: Suffix(per_match="2"), "per_match='2'; give a number"),
        (lambda: Suffix(per_match=float("inf")), "per_match=inf; give a number"),
        (lambda: Suffix(tenant="me"), r"without a store"),
        (lambda: Suffix(store=True, tenant="me"), r"store is a bool; give store=Store\(\)"),
        (lambda: generated(Suffix(store=Store())), r"whose text.*tenant="),
        (lambda: generated(Suffix(store=Store()), tenant=["a", "b"]), r"2 of `tenant` for 3 rows"),
        (lambda: generated(Suffix(store=Store()), tenant=5), "tenant=5"),
        (lambda: generated("ngram", prediction="text"), r"tokenizer="),
        (lambda: generated("ngram", prediction=7), r"prediction is a int"),
        (lambda: generated("ngram", prediction=[[1.5, 2.5]] * 3), r"shape \(2,\).*float64"),
        (lambda: generated("ngram", prediction=[[1], [2]]), r"2 of `prediction` for 3 rows"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(make, message):
    with pytest.raises(InvalidInput, match=message):
        make()


def generated(draft, **options):
    return speculative(llama(), draft).generate(**prompts(3), max_new_tokens=9, do_sample=False, **options)


# --- predictions --------------------------------------------------------------------------------------


def walked(expected, text):
    """What is guessed behind every beginning of ``text``."""
    aligned = Alignment(np.array(expected, dtype=np.int64))
    found = [aligned.guess(3).tolist()]
    for count in range(1, len(text) + 1):
        aligned.follow(np.array(text[:count]))
        found.append(aligned.guess(3).tolist())
    return found, aligned.appeared


def test_a_prediction_is_guessed_from_its_beginning():
    found, appeared = walked([5, 6, 7, 8], [5, 6])
    assert found == [[5, 6, 7], [6, 7, 8], [7, 8]]
    assert appeared.tolist() == [True, True, False, False]


def test_a_changed_token_costs_one_step():
    found, appeared = walked([5, 6, 7, 8, 9], [5, 1, 7])
    assert found[2:] == [[], [8, 9]]
    assert appeared.tolist() == [True, False, True, False, False]


def test_an_insertion_and_a_deletion():
    found, _ = walked([5, 6, 7, 8, 9], [5, 1, 2, 6])
    assert found[-1] == [7, 8, 9]
    found, appeared = walked([5, 6, 7, 8, 9], [5, 8])
    assert found[-1] == [9]
    assert appeared.tolist() == [True, False, False, True, False]


def test_places_ahead_come_before_places_behind():
    expected = [1, 2, 9, 1, 2, 8, 1, 2, 7]
    found, _ = walked(expected, [1, 2, 9, 5, 1, 2])
    assert found[-1] == [8, 1, 2]


def test_a_longer_match_behind_wins_over_a_shorter_one_ahead():
    found, _ = walked([1, 2, 3, 4, 5, 6, 9, 3, 8], [1, 2, 3, 4, 5, 0, 2, 3])
    assert found[-1] == [4, 5, 6]


def test_a_single_token_far_away_is_no_match():
    expected = [5, *range(100, 130), 7, 8]
    assert walked(expected, [5, 7])[0][-1] == []
    assert walked(expected, [5, 129, 7])[0][-1] == [8]


@settings(max_examples=100, deadline=None)
@given(TEXTS, TEXTS, st.data())
def test_alignment_sees_the_text_only_as_far_as_it_is_written(expected, text, data):
    """The same guesses however the text was cut into rounds, and whatever comes after."""
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text)))))
    aligned = Alignment(np.array(expected))
    for cut in cuts:
        aligned.follow(np.array(text[:cut]))
        at_once = Alignment(np.array(expected))
        at_once.follow(np.array(text[:cut]))
        assert aligned.guess(4).tolist() == at_once.guess(4).tolist()
        assert aligned.appeared.tolist() == at_once.appeared.tolist()


def test_counts_of_a_right_and_a_wrong_prediction():
    text = plain(llama(), prompts(3))[:, 9:]
    wrong = text.clone()
    wrong[1] = 63
    for tokens in (1, 4):
        gen = speculative(llama(), None, tokens=tokens)
        gen.generate(**prompts(3), max_new_tokens=9, do_sample=False, prediction=wrong)
        assert gen.stats.prediction_accepted + gen.stats.prediction_rejected == 27
        assert gen.stats.prediction_accepted == 18 + int((text[1] == 63).sum())
    assert gen.stats.as_dict()["prediction_accepted"] == gen.stats.prediction_accepted
    gen.generate(**prompts(3), max_new_tokens=9, do_sample=False)
    assert gen.stats.prediction_accepted == gen.stats.prediction_rejected == 0


def test_counts_are_of_the_text_that_came_out():
    """A condition cut the text; what was guessed beyond it does not count."""
    text = plain(llama(), prompts(1))[:, 9:]
    gen = speculative(llama(), None, tokens=8)
    stop = [lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= 12)]
    gen.generate(**prompts(1), max_new_tokens=9, do_sample=False, prediction=text, stopping_criteria=stop)
    assert (gen.stats.prediction_accepted, gen.stats.prediction_rejected) == (3, 6)


def test_a_token_of_the_text_stands_for_one_of_the_prediction():
    aligned = Alignment(np.array([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3, 7]))
    for text in ([1, 2, 3], [1, 2, 3, 8], [1, 2, 3, 8, 1, 2, 3], [1, 2, 3, 8, 1, 2, 3, 7, 7, 7]):
        aligned.follow(np.array(text))
        assert aligned.appeared.sum() <= len(text)
    assert aligned.appeared.tolist() == [True] * 3 + [False] * 4 + [True] * 5


def test_a_right_prediction_takes_few_rounds():
    text = plain(llama(), prompts(3), max_new_tokens=30)[:, 9:]
    gen = speculative(llama(), None, tokens=14)
    gen.generate(**prompts(3), max_new_tokens=30, do_sample=False, prediction=text)
    assert gen.stats.rounds == 1 + 2  # the prefill, then 15 tokens a round


def test_several_texts_of_one_prompt_share_its_prediction():
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 9, "seed": 3}
    gen = speculative(llama(), None, verification="coupled")
    wanted = gen.generate(**prompts(3), **options)
    got = gen.generate(**prompts(3), **options, prediction=[wanted[0, 9:].tolist(), None, wanted[4, 9:]])
    assert got.tolist() == wanted.tolist()
    assert gen.stats.row_accepted[[0, 4]].min() > 0


def test_ids_that_do_not_exist_end_a_prediction():
    text = plain(llama(), prompts(1))[0, 9:].tolist()
    gen = speculative(llama(), noisy_copy(llama(), 0.05), tokens=6)
    expected = [*text[:3], 1000, *text[4:7], -5]
    got = gen.generate(**prompts(1), max_new_tokens=9, do_sample=False, prediction=expected)
    assert got[0, 9:].tolist() == text


def test_ids_that_do_not_exist_are_never_submitted():
    """By sampling the verifier has no answer to them but an error."""
    gen = speculative(llama(), None, tokens=6, layout="slots")
    options = {"max_new_tokens": 9, "do_sample": True, "seed": 1}
    text = gen.generate(**prompts(1), **options)[0, 9:].tolist()
    for wrong in (1000, -5):
        got = gen.generate(**prompts(1), **options, prediction=[text[0], wrong])
        assert got.shape == (1, 9 + 9)


def test_how_far_ahead_a_single_token_counts():
    for between, guess in (NEAR - 1, [41]), (NEAR, []):
        expected = [5, *range(10, 10 + between), 40, 41]
        found, _ = walked(expected, [5, 40])
        assert found[-1] == guess


def test_of_places_behind_the_nearest_comes_first():
    found, _ = walked([7, 8, 30, 7, 8, 31, 40], [7, 8, 30, 7, 8, 31, 40, 7, 8])
    assert found[-1][:1] == [31]


def test_a_token_that_was_found_stands_for_no_second_one():
    """The 4 is found alone, and once more as a part of a longer match at another place."""
    _, appeared = walked([4, 4, 2], [3, 4, 2])
    assert appeared.tolist() == [True, False, True]


def test_forms_of_a_prediction():
    class Words:
        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [len(word) for word in text.split()]}

    forms = {
        "text": ("a bb ccc", [[1, 2, 3]]),
        "texts": (["a bb", None, "ccc"], [[1, 2], None, [3]]),
        "ids": ([4, 5, 6], [[4, 5, 6]]),
        "ids a row": ([[4, 5], [6]], [[4, 5], [6]]),
        "one tensor": (torch.tensor([4, 5]), [[4, 5]]),
        "padded": (torch.tensor([[0, 4, 0, 5], [6, 0, 0, 0], [0, 0, 0, 0]]), [[4, 0, 5], [6], []]),
        "tensors": ([torch.tensor([4]), None], [[4], None]),
        "nothing": ([], []),
        "an empty text": ("", [[]]),
    }
    for given_, wanted in forms.values():
        read = read_predictions(given_, Words(), 0)
        assert [None if one is None else one.tolist() for one in read] == wanted


def test_a_text_needs_a_tokenizer_of_the_call_or_of_the_generator():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def words(ids):
        words = {**{f"w{i}": one for i, one in enumerate(ids)}, "[UNK]": 64}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")))

    tokenizer, other = words(range(64)), words(range(63, -1, -1))
    text = plain(llama(), prompts(1))[0, 9:].tolist()
    first = f"w{text[0]}"
    for of_generator, of_call in ((None, tokenizer), (tokenizer, None), (other, tokenizer)):
        gen = speculative(llama(), None, tokenizer=of_generator)
        given_ = {"tokenizer": of_call} if of_call is not None else {}
        gen.generate(**prompts(1), max_new_tokens=9, do_sample=False, prediction=first, **given_)
        assert gen.stats.prediction_accepted == 1


# --- recycling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stateful", [False, True])
def test_successors_are_what_the_target_scored_best_last(stateful):
    """The table after a call, against every position that was scored, refused guesses included."""
    wanted, runs = {}, []

    class Watched(Recycling):
        def begin(self, call):
            run = super().begin(call)
            observe = run.observe
            prompt = call.prompt[0].tolist()
            wanted.update(pairwise(prompt))

            def watched(round_):
                observe(round_)
                # in lockstep nothing is scored behind the first refused guess
                scored = int(round_.accepted[0] if stateful else round_.lengths[0])
                before = [(prompt + written)[-1], *round_.drafted[0, :scored].tolist()]
                wanted.update(zip(before, round_.scores[0].argmax(-1).tolist(), strict=False))
                written.extend(round_.emitted[0, : round_.counts[0]].tolist())

            written = []
            run.observe = watched
            runs.append(run)
            return run

    gen = SpeculativeGenerator(tiny_llama(), Watched(), num_draft_tokens=4)
    options = {"logits_processor": [lambda ids, scores: scores]} if stateful else {}  # may hold a state, who knows
    gen.generate(**ragged_prompt((9,)), max_new_tokens=40, do_sample=False, **options)
    assert gen.stats.accepted > 0
    table = runs[0]._table
    assert table.shape == (1, 64)  # bounded: rows x vocabulary
    assert {int(token): int(table[0, token]) % 64 for token in np.flatnonzero(table[0] >= 0)} == wanted


def test_before_anything_was_scored_the_prompt_is_followed():
    ids = torch.tensor([[5, 6, 7, 5, 8, 5]])
    run = Recycling().begin(call_for(ids))
    run._from_prompt(64)
    assert int(run._table[0, 5]) % 64 == 8  # the latest
    assert int(run._table[0, 6]) % 64 == 7
    assert int(run._table[0, 7]) % 64 == 5
    assert int(run._table[0, 9]) == -1


def test_the_newest_successor_wins_in_any_order():
    run = recycling._Run(call_for(torch.tensor([[1, 2]])))
    run._table = torch.full((1, 10), -1)
    for _ in range(2):
        run._learn(torch.tensor([[3, 3, 4]]), torch.tensor([[5, 6, 7]]), torch.tensor([[True, True, False]]))
    assert int(run._table[0, 3]) % 10 == 6
    assert int(run._table[0, 4]) == -1
    run._learn(torch.tensor([[3, 11]]), torch.tensor([[2, 1]]), torch.tensor([[True, True]]))
    assert int(run._table[0, 3]) % 10 == 2


def test_rows_do_not_teach_each_other():
    run = recycling._Run(call_for(torch.tensor([[1, 2, 3], [1, 9, 3]])))
    run._from_prompt(16)
    assert (run._table[:, 1] % 16).tolist() == [2, 9]
    assert int(run._table[0, 9]) == int(run._table[1, 2]) == -1
