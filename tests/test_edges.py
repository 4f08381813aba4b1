"""Edges: nothing or everything accepted, more guesses than room, one token, layouts, an early close.

Every layout writes the text of plain generate(), past the edge of a sliding window as well.
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from specdec import InvalidInput, InvalidScores, Mixture, NGram, Proposal, SpeculativeGenerator
from specdec.length.fixed import Fixed
from specdec.loop import decode
from specdec.processing import Processing
from specdec.proposers.mixture import Record
from specdec.records import Stats
from specdec.sampling import Greedy
from specdec.scorer import Scorer
from specdec.state import State, in_common

from .contract import (
    NEW,
    Counted,
    Guesses,
    assert_agrees,
    bart,
    gemma,
    llama,
    mamba2,
    mistral,
    noisy,
    oracle,
    plain,
    prompts,
    qwen3_next,
    speculative,
    t5,
)

BATCHES = (1, 3)
START = 9
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
NEVER = Guesses(lambda row, column, state: 0)


def never(text):
    """Guesses that are wrong every time."""
    return oracle(text, wrong=range(text.shape[1]))


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("layout", ["slots", "columns", "snapshot", "plain"])
@pytest.mark.parametrize("make", [llama, mistral, gemma])
def test_layouts_write_the_same_text(make, layout, batch):
    """The windows of eight tokens are crossed by the prompt already, and by the text."""
    model, inputs = make(), prompts(batch)
    wanted = plain(model, inputs, max_new_tokens=16)
    for draft in (noisy(model), oracle(wanted, wrong={12, 13, 18})):
        gen = speculative(model, draft, layout=layout)
        got = gen.generate(**inputs, max_new_tokens=16, do_sample=False)
        assert got.tolist() == wanted.tolist()
        assert gen.stats.layout == {"snapshot": "columns+snapshot"}.get(layout, layout)
        assert (gen.stats.accepted > 0) == (layout != "plain")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("make", [mistral, gemma])
def test_a_short_prompt_grows_past_the_window(make, batch):
    inputs = {k: v[:, -4:] for k, v in prompts(batch).items()}
    wanted = plain(make(), inputs, max_new_tokens=16)
    for layout in ("slots", "columns", "snapshot"):
        gen = speculative(make(), oracle(wanted, wrong={6, 9, 14}), layout=layout)
        got = gen.generate(**inputs, max_new_tokens=16, do_sample=False)
        assert got.tolist() == wanted.tolist(), layout


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("make", [qwen3_next, mamba2])
def test_recurrent_models(make, batch):
    model, inputs = make(), prompts(batch)
    wanted = plain(model, inputs, max_new_tokens=16)
    for draft in ("noisy", "ngram", oracle(wanted, wrong={11, 12, 17})):
        gen = speculative(model, draft)
        got = gen.generate(**inputs, max_new_tokens=16, do_sample=False)
        assert got.tolist() == wanted.tolist()
        assert gen.stats.layout == "columns+snapshot"


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("make", [t5, bart, gemma, mistral])
def test_other_kinds_in_auto(make, batch):
    assert_agrees(make(), prompts(batch))


@pytest.mark.parametrize(
    ("make", "layout"), [(bart, "slots"), (t5, "slots"), (mamba2, "columns"), (mamba2, "slots")]
)
def test_a_named_layout_that_would_change_the_text_is_refused(make, layout):
    gen = speculative(make(), NGram(), layout=layout)
    with pytest.raises(InvalidInput, match=f"'{layout}' would not be exact.*auto"):
        gen.generate(**prompts(3), max_new_tokens=NEW, do_sample=False)


def test_what_fits_one_cache_need_not_fit_another():
    """Static layers with a window cannot be cropped; that dynamic ones can is no verdict on them."""
    model = copy.deepcopy(mistral())
    options = {"max_new_tokens": NEW, "do_sample": False}
    gen = speculative(model, NGram(), layout="columns")
    for _ in range(2):
        assert gen.generate(**prompts(1), **options).equal(model.generate(**prompts(1), **options))
        with pytest.raises(InvalidInput, match="'columns'"):
            gen.generate(**prompts(1), **options, cache_implementation="static")


@pytest.mark.parametrize("layout", ["slots", "columns", "snapshot"])
def test_rows_that_run_apart(layout):
    """One row accepts everything, another nothing: they come apart as far as the layout lets them."""
    inputs = prompts(3)
    text = plain(llama(), inputs, max_new_tokens=40)

    def choose(row, column, state):
        token = int(text[row, min(column, 48)])
        return token if row == 0 or (row == 1 and column % 3) else (token + 1) % 64

    gen = speculative(llama(), Guesses(choose), tokens=4, layout=layout)
    got = gen.generate(**inputs, max_new_tokens=40, do_sample=False)
    assert got.tolist() == text.tolist()
    assert gen.stats.row_accepted[0] >= gen.stats.row_accepted[1] > gen.stats.row_accepted[2] == 0


@pytest.mark.parametrize("layout", ["slots", "columns", "snapshot"])
def test_a_row_that_ends_far_ahead_of_the_others(layout):
    inputs = prompts(3)
    text = plain(llama(), inputs, max_new_tokens=24)
    column = next(c for c in range(14, 30) if text[0, c] not in text[:, 9:14] and text[0, c] != text[0, c - 1])
    eos = int(text[0, column])
    wanted = plain(llama(), inputs, max_new_tokens=24, eos_token_id=eos)

    def choose(row, at, state):
        return (int(text[row, min(at, 32)]) + (row > 0)) % 64

    gen = speculative(llama(), Guesses(choose), tokens=4, layout=layout)
    got = gen.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=eos)
    assert got.tolist() == wanted.tolist()


def test_a_long_text_in_slots_that_grow():
    wanted = plain(llama(), prompts(3), max_new_tokens=90)
    gen = speculative(llama(), oracle(wanted, wrong={20, 63, 64, 65}), tokens=7, layout="slots")
    got = gen.generate(**prompts(3), max_new_tokens=90, do_sample=False)
    assert got.tolist() == wanted.tolist()


# --- how much is accepted -------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("tokens", [1, 3, 5, 13, 40])
def test_everything_accepted(tokens, batch):
    text = plain(llama(), prompts(batch))
    gen = speculative(llama(), oracle(text), tokens=tokens, layout="slots")  # named: tried at once, not in rounds
    assert gen.generate(**prompts(batch), **GREEDY).tolist() == text.tolist()
    stats = gen.stats
    # the prefill writes one token, a round up to tokens + 1; the last is as wide as there is room
    assert stats.rounds == 1 + -(-(NEW - 1) // (tokens + 1))
    assert stats.acceptance_rate == 1.0
    assert stats.drafted == batch * (NEW - stats.rounds)
    assert (stats.row_emitted == NEW).all()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_nothing_accepted(tokens, batch):
    text = plain(llama(), prompts(batch))
    gen = speculative(llama(), never(text), tokens=tokens, layout="slots")
    assert gen.generate(**prompts(batch), **GREEDY).tolist() == text.tolist()
    assert gen.stats.rounds == NEW
    assert gen.stats.accepted == 0
    assert gen.stats.drafted == batch * sum(min(tokens, NEW - 2 - i) for i in range(NEW - 1))


@pytest.mark.parametrize("tokens", [3, 20, 200])
def test_more_guesses_than_there_is_room_for(tokens):
    text = plain(llama(), prompts(3), max_new_tokens=4)
    for draft in (noisy(llama()), "ngram", oracle(text)):
        gen = speculative(llama(), draft, tokens=tokens)
        got = gen.generate(**prompts(3), max_new_tokens=4, do_sample=False)
        assert got.tolist() == text.tolist()
        assert len(gen.stats.drafted_at) <= 2


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("draft", ["noisy", "ngram", None])
def test_no_guesses_at_all(draft, batch):
    gen = speculative(llama(), draft, tokens=0)
    got = gen.generate(**prompts(batch), **GREEDY)
    assert got.tolist() == plain(llama(), prompts(batch)).tolist()
    assert gen.stats.rounds == gen.stats.target_forwards == NEW
    assert gen.stats.drafted == gen.stats.draft_forwards == 0


def test_a_proposer_that_guesses_nothing():
    class Silent:
        def propose(self, state, limits):
            return Proposal.empty(state.batch, state.device)

    gen = speculative(llama(), Silent())
    assert gen.generate(**prompts(3), **GREEDY).tolist() == plain(llama(), prompts(3)).tolist()
    assert gen.stats.rounds == NEW


def test_a_proposer_that_guesses_for_some_rows_and_now_and_then():
    text = plain(llama(), prompts(3))

    class Moody:
        def propose(self, state, limits):
            proposal = oracle(text).propose(state, limits)
            lengths = np.minimum(limits, [int(state.lengths[0]) % 3, 0, 2])
            return Proposal(proposal.tokens, lengths)

    gen = speculative(llama(), Moody())
    assert gen.generate(**prompts(3), **GREEDY).tolist() == text.tolist()
    assert gen.stats.row_drafted[1] == 0
    assert gen.stats.acceptance_rate == 1.0


@pytest.mark.parametrize("draft", ["noisy", "ngram", None])
@pytest.mark.parametrize("do_sample", [False, True])
def test_one_new_token(do_sample, draft):
    gen = speculative(llama(), draft)
    got = gen.generate(**prompts(3), max_new_tokens=1, do_sample=do_sample, top_k=1)
    assert got.tolist() == plain(llama(), prompts(3), max_new_tokens=1).tolist()
    assert gen.stats.rounds == 1
    assert gen.stats.drafted == gen.stats.draft_forwards == 0


@pytest.mark.parametrize("make", [llama, mistral, qwen3_next, mamba2])
def test_a_prompt_of_one_token(make):
    inputs = {"input_ids": torch.tensor([[5], [9], [60]]), "attention_mask": torch.ones(3, 1).long()}
    assert_agrees(make(), inputs, drafts=("noisy", "ngram"))


def test_the_first_token_ends_every_row():
    inputs = {k: v[:1] for k, v in prompts(3).items()}
    eos = int(plain(llama(), inputs)[0, START])
    gen = speculative(llama(), "noisy")
    got = gen.generate(**inputs, **GREEDY, eos_token_id=eos)
    assert got.shape == (1, START + 1)
    assert gen.stats.rounds == 1


@pytest.mark.parametrize("rule", ["block", "token", "coupled"])
def test_sampling_with_all_and_with_none_accepted(rule):
    options = {"do_sample": True, "top_k": 1, "max_new_tokens": NEW}
    text = plain(llama(), prompts(3))
    for draft, rate in ((oracle(text), 1.0), (never(text), 0.0)):
        gen = speculative(llama(), draft, verification=rule, seed=2)
        assert gen.generate(**prompts(3), **options).tolist() == text.tolist()
        assert gen.stats.acceptance_rate == rate


def test_a_large_batch():
    ids = torch.randint(3, 64, (33, 5), generator=torch.Generator().manual_seed(4))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert_agrees(llama(), inputs, drafts=("noisy",))


# --- the loop as a generator ----------------------------------------------------------------------


def rounds_of(draft, seen):
    """Run the loop by hand, as far as `seen(rounds, state)` goes; returns the state."""
    text = []

    @torch.no_grad()
    def by_hand(model, input_ids, *, logits_processor, stopping_criteria, generation_config, **kwargs):
        state = State(
            input_ids, max_length=START + NEW, max_guesses=3, eos_ids=None, pad_id=0,
            starts=np.array([0, 3, 6]),
        )  # fmt: skip
        rounds = decode(
            state,
            Scorer(model, kwargs, generation_config, max_length=START + NEW),
            draft,
            Fixed(3),
            Processing(logits_processor),
            Greedy(),
            Stats(),
        )
        seen(rounds, state)
        text.append(state)
        return input_ids

    llama().generate(**prompts(3), **GREEDY, custom_generate=by_hand)
    return text[0]


def test_the_loop_closed_in_the_middle():
    wanted = plain(llama(), prompts(3))

    def two_rounds(rounds, state):
        next(rounds)
        next(rounds)
        rounds.close()
        assert next(rounds, "closed") == "closed"

    state = rounds_of(oracle(wanted, wrong={11}), two_rounds)
    assert (state.lengths == START + 3).all()
    assert torch.equal(state.tokens[:, : START + 3], wanted[:, : START + 3])
    gen = speculative(llama(), "noisy")
    assert gen.generate(**prompts(3), **GREEDY).tolist() == wanted.tolist()
    assert torch.equal(plain(llama(), prompts(3)), wanted)


def test_every_round_keeps_the_invariants():
    """Committed tokens are plain's text at that step, on the device and on the host alike."""
    wanted = plain(llama(), prompts(3))

    def watch(rounds, state):
        before = state.lengths.copy()
        for round_ in rounds:
            assert (round_.before == before).all()
            assert (round_.counts <= round_.accepted + 1).all()
            assert (round_.accepted <= round_.lengths).all()
            assert (state.lengths == before + round_.counts).all()
            assert state.device_lengths.tolist() == state.lengths.tolist()
            assert state.device_live.tolist() == state.live.tolist()
            for row, length in enumerate(state.lengths):
                assert state.tokens[row, :length].tolist() == wanted[row, :length].tolist()
                assert state.host_tokens[row, :length].tolist() == wanted[row, :length].tolist()
            before = state.lengths.copy()
        assert state.done

    rounds_of(oracle(wanted, wrong={11, 14, 15}), watch)


def test_rows_ended_from_outside():
    """Whoever consumes the rounds may end rows between them; the others go on as they were."""
    wanted = plain(llama(), prompts(3))

    def end_one(rounds, state):
        for number, _ in enumerate(rounds):
            if number == 1:
                state.end_rows(np.array([False, True, False]), START + 2)

    state = rounds_of(oracle(wanted, wrong={13}), end_one)
    assert state.lengths.tolist() == [START + NEW, START + 2, START + NEW]
    for row in (0, 2):
        assert state.tokens[row, : START + NEW].tolist() == wanted[row].tolist()
    assert (state.tokens[1, START + 2 :] == 0).all()


def test_rows_that_have_ended_do_not_hold_back_what_nobody_looks_at_again():
    ids = torch.ones(3, 4, dtype=torch.int64)
    state = State(ids, max_length=20, max_guesses=3, eos_ids=None, pad_id=0, starts=np.zeros(3, dtype=np.int64))
    state.lengths = np.array([5, 9, 7])
    for ended, foundation in (((), 5), ((0,), 7), ((0, 2), 9)):
        state.only(~np.isin(np.arange(3), ended))
        assert state.foundation == foundation


@pytest.mark.parametrize("apart", [False, True])
def test_a_row_that_ended_before_keeps_its_length_when_all_are_cut(apart):
    """Where the host has a copy of the text, in both."""
    ids = torch.ones(4, 4, dtype=torch.int64)
    state = State(ids, max_length=20, max_guesses=3, eos_ids=None, pad_id=0, starts=np.zeros(4, dtype=np.int64))
    state.tokens[:, 4:12] = 5
    state.tokens[0, 6:] = 0
    if apart:
        state.host_tokens = state.host_tokens.copy()
    state.lengths, state.live = np.array([6, 9, 12, 12]), np.array([False, True, True, True])
    state.end_rows(np.array([True, True, True, False]), 9)
    assert state.lengths.tolist() == [6, 9, 9, 12]
    assert state.live.tolist() == [False, False, False, True]
    assert state.text(7).tolist() == [
        [1] * 4 + [5] * 2 + [7] * 6, [1] * 4 + [5] * 5 + [7] * 3, [1] * 4 + [5] * 5 + [7] * 3, [1] * 4 + [5] * 8
    ]  # fmt: skip
    assert (state.text(None)[:3, 9:] == 0).all()
    assert state.host_tokens.tolist() == state.tokens.tolist()
    state.text(None)[:] = 3
    assert not (state.tokens == 3).any()


def test_a_row_without_a_distribution_waits_for_rows_behind_it_and_for_no_row_that_has_ended():
    ids = torch.ones(2, 4, dtype=torch.int64)
    for live, waits in (([True, True], True), ([False, True], False)):
        state = State(ids, max_length=20, max_guesses=3, eos_ids=None, pad_id=0, starts=np.zeros(2, dtype=np.int64))
        state.lengths, state.live = np.array([5, 9]), np.array(live)
        nothing, none = Proposal.empty(2, ids.device), torch.zeros(2, dtype=torch.int64)
        outcome = (nothing, none, torch.tensor([6, -1]), torch.zeros(2, 1, 8), None)
        if waits:
            assert state.commit(*outcome).counts.tolist() == [1, 0]
        else:
            with pytest.raises(InvalidScores, match="row 1 at column 9"):
                state.commit(*outcome)


def test_an_empty_prompt_is_refused():
    with Counted(llama()) as counted, pytest.raises(InvalidInput, match="at least one token"):
        SpeculativeGenerator(llama()).generate(torch.zeros(2, 0, dtype=torch.int64), max_new_tokens=2)
    assert counted.calls == 0


def test_a_proposer_made_of_functions():
    """Any object with `propose` will do; `begin` and `observe` are used where they are."""
    told = SimpleNamespace(call=None, rounds=0)

    def begin(call):
        told.call = call

        def observe(round_):
            told.rounds += 1

        return SimpleNamespace(propose=lambda state, limits: NEVER.propose(state, limits), observe=observe)

    gen = speculative(llama(), SimpleNamespace(begin=begin))
    got = gen.generate(**prompts(3), **GREEDY)
    assert got.tolist() == plain(llama(), prompts(3)).tolist()
    assert told.rounds == gen.stats.rounds
    assert told.call.target is llama()
    assert told.call.prompt.tolist() == prompts(3)["input_ids"].tolist()
    assert told.call.max_length == START + NEW
    assert told.call.inputs["attention_mask"].tolist() == prompts(3)["attention_mask"].tolist()


@pytest.mark.parametrize(("rows", "columns"), [(1, 0), (1, 4), (3, 2), (1, 50), (4, 50)])
def test_what_rows_have_in_common(rows, columns):
    one = np.arange(rows * columns).reshape(rows, columns)
    for place in range(columns + 1):
        other = one.copy()
        other[0, place:] = -1
        found = in_common(one, other)
        assert found.dtype == np.int64
        assert found.tolist() == [place] + [columns] * (rows - 1)


class InOnePlace:
    """Shows the guesses of another in the same memory in every round."""

    def __init__(self, inner, columns):
        self.inner, self.memory = inner, torch.zeros(3, columns, dtype=torch.int64)
        self.rounds, self.shown = [], []

    def propose(self, state, limits):
        proposal = self.inner.propose(state, limits)
        memory = self.memory[: state.batch, : proposal.tokens.shape[1]]
        memory.copy_(proposal.tokens)
        return Proposal(memory, proposal.lengths)

    def observe(self, round_):
        self.rounds.append(round_)
        self.shown.append(round_.drafted.tolist())


@pytest.mark.parametrize("batch", BATCHES)
def test_a_round_stays_as_it_was_though_a_proposer_uses_its_memory_again(batch):
    model = llama()
    proposer = InOnePlace(oracle(plain(model, prompts(batch), **GREEDY), wrong=range(0, 90, 4)), 3)
    speculative(model, proposer).generate(**prompts(batch), **GREEDY)
    assert [round_.drafted.tolist() for round_ in proposer.rounds] == proposer.shown
    assert len(set(map(str, proposer.shown))) > 2


def test_a_mixture_judges_the_guesses_that_were_made(monkeypatch):
    """Not what a proposer has written into their memory since."""
    model, added = llama(), []
    text = plain(model, prompts(1), **GREEDY)
    add = Record.add
    monkeypatch.setattr(Record, "add", lambda self, *what: added[-1].append(what) or add(self, *what))
    for wrap in (lambda part: part, lambda part: InOnePlace(part, 3)):
        added.append([])
        parts = oracle(text, wrong=range(0, 90, 2)), wrap(oracle(text, wrong=range(0, 90, 3)))
        speculative(model, Mixture(*parts)).generate(**prompts(1), **GREEDY)
    assert added[0] == added[1]
    assert {part for part, *_ in added[0]} == {0, 1}
