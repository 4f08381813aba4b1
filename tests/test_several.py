"""Several levels and several drafts: cascades, mixtures, lists, and one draft that serves many targets.

That no law is bent is shown in `laws`; here: is it what it says it is, and does every cache stay true.
"""

import copy
import re
import string
from itertools import accumulate, count, cycle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from specdec import (
    Cascade,
    DraftModel,
    Fallback,
    InvalidInput,
    Mixture,
    NGram,
    Proposal,
    Recycling,
    SpecdecError,
    SpeculativeGenerator,
    Store,
    Suffix,
    TranslatedDraft,
    UnsupportedModel,
    VocabularyMismatch,
)
from specdec.construction import build_proposer
from specdec.length.adaptive import MOST
from specdec.length.fixed import Fixed
from specdec.processing import Processing
from specdec.proposers import Call, cascade, draft_model, recycling
from specdec.proposers.combined import show
from specdec.proposers.mixture import Record
from specdec.records import Round
from specdec.sampling import Greedy
from specdec.state import State
from specdec.testing import assert_lossless, lively, noisy_copy, tiny_llama

from .contract import Counted, llama, mamba2, mistral, noisy, plain, prompts, qwen3_next
from .parrot import characters
from .proposers import other

LONG = 24
START = 9


def run(target, draft, inputs, *, tokens=4, **options):
    options.setdefault("layout", "slots")  # named, a layout is not tried first in plain rounds
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=tokens, **options)
    choices = {"max_new_tokens": LONG, "do_sample": False}
    return gen.generate(**inputs, **choices).tolist(), gen.stats


class Says:
    """Guesses what stands in fixed texts, by position: right or wrong, as they are."""

    def __init__(self, texts):
        self.texts = texts
        self.asked = 0

    def propose(self, state, limits):
        self.asked += bool(limits.any())
        starts = state.lengths - START
        guesses = [t[a : a + n] for t, a, n in zip(self.texts, starts.tolist(), limits.tolist(), strict=True)]
        return Proposal.certain(guesses, state.device)


# --- cascades ------------------------------------------------------------------------------------


LOWER = {
    "ngram": lambda model: "ngram",
    "suffix": lambda model: Suffix(),
    "recycling": lambda model: "recycling",
    "a list": lambda model: Fallback(Suffix(shortest=3), DraftModel(other(model))),
    "a model": lambda model: other(model),
    "its twin": lambda model: copy.deepcopy(model),
    "a cascade": lambda model: Cascade("ngram", other(model)),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("lower", LOWER)
def test_a_cascade_guesses_what_its_model_alone_would(lower, batch):
    """Greedy guesses are a function of the model: whatever lies below, and whatever was taken back."""
    model = noisy(llama(0, torch.float64))
    wanted, alone = run(llama(0, torch.float64), DraftModel(model), prompts(batch))
    got, stats = run(llama(0, torch.float64), Cascade(LOWER[lower](model), model), prompts(batch))
    assert got == wanted
    assert (stats.accepted_at, stats.drafted_at) == (alone.accepted_at, alone.drafted_at)
    assert 0 < stats.accepted < stats.drafted
    assert stats.drafting.startswith("LlamaForCausalLM kept ")


@pytest.mark.parametrize("layout", ["slots", "columns"])
@pytest.mark.parametrize("make", [llama, mistral])
def test_a_cascade_in_every_layout(make, layout):
    model = noisy(make())
    _, alone = run(make(), DraftModel(model, layout=layout), prompts(3))
    got, stats = run(make(), Cascade("suffix", DraftModel(model, layout=layout)), prompts(3))
    assert got == plain(make(), prompts(3), max_new_tokens=LONG).tolist()
    assert stats.draft_layout == layout
    if layout == "slots":  # rows far ahead wait in columns, a round sooner or later
        assert stats.accepted_at == alone.accepted_at


def test_a_level_below_in_columns_with_a_window():
    """What a window has pushed out cannot be taken back, so the layout is told what is settled."""
    model = noisy(mistral())
    lower = DraftModel(other(model), layout="columns")
    got, stats = run(mistral(), Cascade(lower, model), prompts(3), layout="auto")
    assert got == plain(mistral(), prompts(3), max_new_tokens=LONG).tolist()
    assert stats.accepted > 0


@pytest.mark.parametrize("make", [mamba2, qwen3_next])
def test_a_cascade_of_recurrent_models(make):
    got, stats = run(make(), Cascade("suffix", noisy(make())), prompts(3), layout="auto")
    assert got == plain(make(), prompts(3), max_new_tokens=LONG).tolist()
    assert stats.accepted > 0


def test_a_level_below_saves_passes_of_the_model_above():
    model = noisy(llama())
    _, alone = run(llama(), DraftModel(model), prompts(1))
    gen = SpeculativeGenerator(llama(), Cascade(copy.deepcopy(model), model), num_draft_tokens=4, layout="slots")
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    gen.generate(**prompts(1), max_new_tokens=LONG, do_sample=False)
    hook.remove()
    assert gen.stats.accepted_at == alone.accepted_at
    assert len(passes) < 0.6 * alone.draft_forwards
    assert gen.stats.draft_forwards > len(passes)  # those of the level below are counted as well


@pytest.mark.parametrize("lower", ["ngram", "suffix", "a model", "a cascade"])
def test_a_cascade_with_shared_noise_guesses_what_its_model_alone_would(lower):
    target = llama(0, torch.float64)
    model = noisy(target)
    found = []
    for draft in (DraftModel(model), Cascade(LOWER[lower](model), model)):
        gen = SpeculativeGenerator(
            target, draft, num_draft_tokens=4, verification="coupled", seed=3, layout="slots"
        )
        out = gen.generate(**prompts(3), max_new_tokens=LONG, do_sample=True, temperature=0.8)
        found.append((out.tolist(), gen.stats.accepted_at))
    assert found[0] == found[1]


def test_every_pass_of_a_level_is_fed_its_own_text(monkeypatch):
    """What is in the model's cache is always the text that it goes on from."""
    from specdec.scorer import Scorer

    seen = []
    score = Scorer.score

    def watched(self, tokens, lengths, first, count):
        scores = score(self, tokens, lengths, first, count)
        if self.model is model:
            for row in range(len(lengths)):
                ids = tokens[row : row + 1, : lengths[row]]
                mask = torch.ones_like(ids)
                mask[:, : START - (9, 6, 3)[row]] = 0
                fresh = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
                here = int(lengths[row] - first[row])
                seen.append(float((scores[row, :here] - fresh[0, first[row] : lengths[row]]).abs().max()))
        return scores

    model = noisy(llama(0, torch.float64))
    monkeypatch.setattr(Scorer, "score", watched)
    run(llama(0, torch.float64), Cascade(NGram(2), model), prompts(3))
    assert len(seen) > 60
    assert max(seen) < 1e-9


class Sometimes(Says):
    """Guesses in every second round."""

    def propose(self, state, limits):
        proposal = super().propose(state, limits)
        return proposal if self.asked % 2 else Proposal.empty(state.batch, state.device)


TWINS = {
    "a model": lambda twin, layout: DraftModel(twin, layout=layout),
    "a level": lambda twin, layout: Cascade("ngram", DraftModel(twin, layout=layout)),
    # which stop after every guess, so that they are asked again behind text that may be taken back
    "an unsure model": lambda twin, layout: DraftModel(twin, layout=layout, confidence=1),
    "an unsure level": lambda twin, layout: Cascade("ngram", DraftModel(twin, layout=layout, confidence=1)),
}


def kept_and_made(twin, make, batch, layout):
    """Guesses of a twin below, made for a model that the target often refuses; all are right if its cache is.

    In every second round another proposer guesses, so that text moves on over what was fed and taken back.
    """
    model = noisy(make(), 0.15)
    below = TWINS[twin](copy.deepcopy(model), layout)
    wanted = plain(make(), prompts(batch), max_new_tokens=2 * LONG)
    draft = Fallback(Sometimes(wanted[:, START:].tolist()), Cascade(below, model))
    gen = SpeculativeGenerator(make(), draft, num_draft_tokens=4, layout="slots")
    got = gen.generate(**prompts(batch), max_new_tokens=2 * LONG, do_sample=False)
    assert got.tolist() == wanted.tolist()
    stats = gen.stats
    assert stats.accepted < 0.95 * stats.drafted  # so text was taken back
    kept, made = map(int, re.findall(r"\d+", stats.drafting))
    return kept, made


@pytest.mark.parametrize("layout", ["slots", "columns"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize("twin", TWINS)
def test_a_twin_below_is_always_right(twin, make, batch, layout):
    kept, made = kept_and_made(twin, make, batch, layout)
    assert kept == made > 10


@pytest.mark.parametrize("twin", ["a model", "a level"])
def test_a_cache_that_keeps_what_was_taken_back_is_noticed(twin, monkeypatch):
    room = {"a model": draft_model, "a level": cascade}[twin]
    monkeypatch.setattr(room, "in_common", lambda one, other: np.full(len(one), 1000))
    kept, made = kept_and_made(twin, llama, 3, "slots")
    assert kept < made


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 1}])
def test_a_cascade_whose_model_is_out_of_order(options):
    model = copy.deepcopy(llama())
    with torch.no_grad():
        model.model.embed_tokens.weight[5:9] = torch.nan
    gen = SpeculativeGenerator(llama(), Cascade("ngram", model), num_draft_tokens=4)
    got = gen.generate(**prompts(3), max_new_tokens=LONG, **options)
    assert got.shape == (3, START + LONG)
    if not options:
        assert got.tolist() == plain(llama(), prompts(3), max_new_tokens=LONG).tolist()


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "seed": 1}])
def test_a_cascade_whose_model_overflows(options):
    """As in float16; a row with an infinite score is no distribution either."""
    model = copy.deepcopy(llama())
    model.lm_head.register_forward_hook(lambda *called: called[-1].index_fill(-1, torch.tensor([7]), torch.inf))
    gen = SpeculativeGenerator(llama(), Cascade("ngram", model), num_draft_tokens=4, layout="slots")
    got = gen.generate(**prompts(3), max_new_tokens=LONG, **options)
    assert got.shape == (3, START + LONG)
    assert gen.stats.draft_forwards > 0


def test_a_cascade_with_the_controller_and_with_confidence():
    wanted = plain(llama(), prompts(3), max_new_tokens=60).tolist()
    for draft in (Cascade("suffix", noisy(llama())), Cascade("suffix", DraftModel(noisy(llama()), confidence=0.6))):
        gen = SpeculativeGenerator(llama(), draft)
        assert gen.generate(**prompts(3), max_new_tokens=60, do_sample=False).tolist() == wanted
    gen = SpeculativeGenerator(llama(), draft, num_draft_tokens=8)
    gen.generate(**prompts(1), max_new_tokens=60, do_sample=False)
    assert max(gen.stats.drafted_at) > gen.stats.drafted_at[-1]  # some rounds ended early


def test_a_seeded_text_does_not_depend_on_how_long_a_level_takes(monkeypatch):
    target = tiny_llama()
    gen = SpeculativeGenerator(target, Cascade("ngram", noisy_copy(target, 0.1)))
    found = []
    for seconds in ([0.001], [0.001, 0.004, 0.02], [0.05, 0.001, 0.001, 0.001, 0.2]):
        now = accumulate(cycle(seconds))
        monkeypatch.setattr(cascade, "clock", lambda now=now: next(now))
        text = gen.generate(**prompts(1), max_new_tokens=120, do_sample=True, seed=7)
        found.append((text.tolist(), gen.stats.drafting))
    assert found[0] == found[1] == found[2]


def test_what_is_below_guesses_itself_where_the_model_does_not_pay(monkeypatch):
    target = llama()
    text = plain(target, prompts(1), max_new_tokens=LONG)
    right = Says([text[0, START:].tolist()])
    monkeypatch.setattr(Fixed, "begins", lambda self, opening=None: False)
    got, stats = run(target, Cascade(right, noisy(target)), prompts(1))
    assert got == text.tolist()
    assert stats.draft_forwards == 0
    assert stats.accepted == stats.drafted > LONG / 2
    # a model is no more asked than the one above it, whatever its own rule says
    asked = []
    monkeypatch.setattr(Fixed, "begins", lambda self, opening=None: asked.append(self) or self is not asked[0])
    got, stats = run(target, Cascade(copy.deepcopy(target), noisy(target)), prompts(1))
    assert got == text.tolist()
    assert stats.drafted == stats.draft_forwards == 0


@pytest.mark.parametrize("lower", ["ngram", "suffix", "recycling"])
def test_a_model_and_what_is_below_it_guess_by_turns(lower, monkeypatch):
    target = llama()
    model = noisy(target)
    wanted = plain(target, prompts(3), max_new_tokens=60).tolist()
    asked, learnt = [], []

    def begins(self, opening=None):
        asked.append(len(asked) % 3 > 0)
        return asked[-1]

    monkeypatch.setattr(Fixed, "begins", begins)
    right = recycling._Run._learn
    monkeypatch.setattr(recycling._Run, "_learn", lambda *args: learnt.append(1) or right(*args))
    gen = SpeculativeGenerator(target, Cascade(LOWER[lower](model), model), num_draft_tokens=4, layout="slots")
    assert gen.generate(**prompts(3), max_new_tokens=60, do_sample=False).tolist() == wanted
    assert {True, False} <= set(asked)
    assert 0 < gen.stats.draft_forwards < 60
    if lower == "recycling":  # it saw the model's rounds and its own
        assert len(learnt) > asked.count(True)


def test_no_level_of_a_cascade_but_the_last_is_lent_the_cache_of_the_target():
    """It holds the text of the target; that of a level goes on behind it."""
    seen = {}

    class Noted(Says):
        def begin(self, call):
            seen["below"] = call.scorer
            return self

    class Model(DraftModel):
        def open(self, call, run):
            seen["above"] = call.scorer
            return super().open(call, run)

    run(llama(), Cascade(Noted([[5] * LONG]), Model(noisy(llama()))), prompts(1))
    assert seen["below"] is None
    assert seen["above"] is not None


def test_every_level_of_a_cascade_learns_from_rounds_of_its_own(monkeypatch):
    """Each asks a rule of its own how many guesses are made for it, so each has to tell it what came of them."""
    seen = {}
    monkeypatch.setattr(Fixed, "observe", lambda self, round_, _: seen.setdefault(id(self), []).append(round_))
    run(llama(), Cascade(Says([[5] * LONG]), noisy(llama()), noisy(llama(1))), prompts(1))
    assert len(seen) == 3  # the target's, and one for each of two levels
    assert all(any(round_.lengths.any() for round_ in rounds) for rounds in seen.values())


def test_every_level_of_a_cascade_asks_the_rule_of_the_one_above_it_whether_to_begin(monkeypatch):
    calls = []

    class Model(DraftModel):
        def open(self, call, run):
            calls.append((call.length, run.keywords["length"]))
            return super().open(call, run)

    models = [Model(noisy(llama())), Model(noisy(llama(1))), Model(noisy(llama(2)))]
    run(llama(), Cascade("ngram", *models), prompts(1))
    (first, below_first), (second, below_second), (third, below_third) = calls
    assert first is below_second
    assert second is below_third
    assert len({id(rule) for rule in (below_first, first, second, third)}) == 4


def test_a_level_is_never_fed_an_id_that_it_does_not_know():
    """The target has an id more than the level, and what is below guesses it."""
    target, model = tiny_llama(vocabulary=101), noisy_copy(tiny_llama(vocabulary=100), 0.1)
    got, stats = run(target, Cascade(Says([[100] * LONG]), model), prompts(1))
    assert got == plain(target, prompts(1), max_new_tokens=LONG).tolist()
    assert stats.draft_forwards > 0


def test_a_level_stops_where_it_is_unsure_and_where_no_more_pays(monkeypatch):
    """What is below is always wrong, so a level writes token by token, as its model alone would."""
    wrong = Says([[64] * LONG] * 3)  # an id that does not exist
    model = noisy(llama())
    _, alone = run(llama(), DraftModel(model, confidence=0.3), prompts(3))
    _, stats = run(llama(), Cascade(wrong, DraftModel(model, confidence=0.3)), prompts(3))
    assert stats.drafted_at == alone.drafted_at
    assert stats.drafted_at[0] > stats.drafted_at[-1] > 0
    monkeypatch.setattr(Fixed, "goes_on", lambda self, chances: False)
    _, stats = run(llama(), Cascade(wrong, model), prompts(3))
    assert len(stats.drafted_at) == 1


def test_what_is_below_a_model_keeps_what_came_out():
    """A store learns from a call, wherever it is looked into."""
    store = Store()
    run(llama(), Cascade(Suffix(store=store, tenant="one"), noisy(llama())), prompts(1))
    assert store.tokens("one") == LONG + 1  # and a mark behind it


def test_what_is_below_sees_the_rounds_that_it_guessed_for_and_no_others(monkeypatch):
    seen = []

    class Noted(Says):
        def propose(self, state, limits):
            self.guessed = super().propose(state, limits)
            return self.guessed

        def observe(self, round_):
            seen.append(round_.proposal)
            assert round_.proposal is self.guessed

    _, stats = run(llama(), Cascade(Noted([[5] * LONG]), noisy(llama())), prompts(1))
    assert len(seen) > stats.rounds  # a level makes several for one of the target
    # where it guesses for the target itself, the last round has no room for a guess
    seen.clear()
    monkeypatch.setattr(Fixed, "begins", lambda self, opening=None: False)
    _, stats = run(llama(), Cascade(Noted([[5] * LONG]), noisy(llama())), prompts(1))
    assert 0 < len(seen) < stats.rounds


def test_a_level_writes_nothing_beyond_its_positions():
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": START + LONG // 2}
    model = lively(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval())
    got, stats = run(llama(), Cascade("ngram", model), prompts(3))
    assert got == plain(llama(), prompts(3), max_new_tokens=LONG).tolist()
    assert stats.draft_forwards > 0


def test_stopping_conditions_cut_a_cascade():
    text = plain(llama(), prompts(1), max_new_tokens=LONG)[0, START:].tolist()
    options = {"max_new_tokens": LONG, "do_sample": False, "eos_token_id": text[7]}
    wanted = llama().generate(**prompts(3), **options).tolist()
    gen = SpeculativeGenerator(llama(), Cascade("suffix", noisy(llama())), num_draft_tokens=5)
    assert gen.generate(**prompts(3), **options).tolist() == wanted


def test_a_longest_match_in_text_that_may_be_taken_back():
    """What is not settled is looked up and not taken in: after a revision the guess is that of the new text."""
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6]])
    state, text = (
        State(prompt, max_length=20, max_guesses=4, eos_ids=None, pad_id=0, starts=np.zeros(1, dtype=np.int64))
        for _ in range(2)
    )
    state.vocabulary = 64
    run = Suffix().begin(Call(llama(), prompt, {}, 20, Processing([]), Greedy()))
    text.follow(state, 0)
    for loose, guess in ([7], [8, 5, 6]), ([], [7, 8, 5]), ([7, 8], [5, 6]), ([9], []):
        text.follow(state, 0)
        text.host_tokens[0, 6 : 6 + len(loose)] = loose
        text.lengths = state.lengths + len(loose)
        proposal = run.propose(text, np.array([3]))
        assert proposal.tokens[0, : proposal.lengths[0]].tolist() == guess


def test_a_store_is_looked_into_with_text_that_may_be_taken_back():
    store = Store()
    store.add("me", [5, 6, 7, 30, 31, 32])
    prompt = torch.tensor([[9, 5, 6]])
    state, text = (
        State(prompt, max_length=20, max_guesses=4, eos_ids=None, pad_id=0, starts=np.zeros(1, dtype=np.int64))
        for _ in range(2)
    )
    state.vocabulary = 64
    run = Suffix(store=store, tenant="me").begin(Call(llama(), prompt, {}, 20, Processing([]), Greedy()))
    for loose, guess in ([7], [30, 31, 32]), ([], [7, 30, 31]), ([7, 30], [31, 32]), ([8], []):
        text.follow(state, 0)
        text.host_tokens[0, 3 : 3 + len(loose)] = loose
        text.lengths = state.lengths + len(loose)
        proposal = run.propose(text, np.array([3]))
        assert proposal.tokens[0, : proposal.lengths[0]].tolist() == guess


def test_refused_cascades():
    model = noisy(llama())
    for levels, kind, message in (
        (("ngram",), InvalidInput, "at least two"),
        ((model, "ngram"), InvalidInput, "NGram cannot judge"),
        (("eagle", model), InvalidInput, "'eagle'.*'ngram'"),
        ((NGram, model), UnsupportedModel, "cannot draft"),
        ((None, model), UnsupportedModel, "cannot draft"),
    ):
        with pytest.raises(kind, match=message):
            Cascade(*levels)
    translated = TranslatedDraft.__new__(TranslatedDraft)
    with pytest.raises(InvalidInput, match="another tokenizer"):
        Cascade(translated, model)


@pytest.mark.parametrize(
    "several",
    [
        DraftModel,
        lambda model: Cascade("ngram", model),
        lambda model: Mixture("ngram", Cascade("suffix", model)),
        lambda model: Fallback(NGram(), DraftModel(model)),
    ],
)
def test_a_model_inside_a_draft_has_the_ids_of_the_target(several):
    with pytest.raises(VocabularyMismatch, match=r"64.*90"):
        SpeculativeGenerator(llama(), several(tiny_llama(vocabulary=90)))
    SpeculativeGenerator(llama(), several(tiny_llama(vocabulary=64)))


# --- mixtures ------------------------------------------------------------------------------------


def answers(batch):
    return plain(llama(), prompts(batch), max_new_tokens=60)[:, START:].tolist()


def wrong(texts):
    return [[(token + 1) % 60 + 3 for token in text] for text in texts]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_mixture_finds_the_one_that_is_right(batch):
    right = answers(batch)
    gen = SpeculativeGenerator(
        llama(), Mixture(Says(wrong(right)), Says(right)), num_draft_tokens=4, layout="slots"
    )
    got = gen.generate(**prompts(batch), max_new_tokens=60, do_sample=False)
    assert got[:, START:].tolist() == right
    assert gen.stats.rounds <= 2 + 60 / 5 + 1  # one round is lost, and the prompt's


def test_a_mixture_decides_row_by_row():
    right = answers(3)
    ways = [[right[0], wrong(right)[1], right[2]], [wrong(right)[0], right[1], wrong(right)[2]]]
    gen = SpeculativeGenerator(llama(), Mixture(*map(Says, ways)), num_draft_tokens=4, layout="slots")
    gen.generate(**prompts(3), max_new_tokens=60, do_sample=False)
    assert gen.stats.rounds <= 2 + 60 / 5 + 1


def test_a_mixture_follows_when_the_best_one_changes():
    (right,) = answers(1)
    (bad,) = wrong([right])
    gen = SpeculativeGenerator(
        llama(), Mixture(Says([right[:30] + bad[30:]]), Says([bad[:30] + right[30:]])), num_draft_tokens=3
    )
    gen.generate(**prompts(1), max_new_tokens=60, do_sample=False)
    assert gen.stats.rounds < 60 / 4 + 14


def test_a_model_that_is_never_right_is_seldom_asked():
    (right,) = answers(1)
    unrelated = tiny_llama(seed=9)
    gen = SpeculativeGenerator(llama(), Mixture(Says([right]), unrelated), num_draft_tokens=3)
    gen.generate(**prompts(1), max_new_tokens=60, do_sample=False)
    assert gen.stats.rounds < 60 / 4 + 5
    assert gen.stats.drafting.startswith("Says ")


def test_a_model_that_is_right_is_asked_and_its_cost_counts(monkeypatch):
    twin = copy.deepcopy(llama())
    (right,) = answers(1)
    monkeypatch.setattr("specdec.call.clock", None)  # prices as assumed, whatever else the machine does
    gen = SpeculativeGenerator(llama(), Mixture(Says(wrong([right])), twin), num_draft_tokens=3, seed=1)
    gen.generate(**prompts(1), max_new_tokens=60, do_sample=False)
    assert gen.stats.accepted > 36
    # at five plain rounds a guess it cannot pay
    monkeypatch.setattr("specdec.proposers.mixture.ASSUMED_COST", 5.0)
    gen = SpeculativeGenerator(llama(), Mixture(Says(wrong([right])), twin), num_draft_tokens=3)
    gen.generate(**prompts(1), max_new_tokens=60, do_sample=False)
    assert gen.stats.draft_forwards < 30


def test_the_record_of_a_proposer():
    record = Record(2, 1)
    lengths = np.array([[2], [2]])
    before = record.kept(lengths)
    assert before[0] == before[1] > 0
    for _ in range(20):
        record.add(0, 0, 4, 4)
        record.add(1, 0, 4, 1)
    first, second = record.kept(np.array([[4], [4]]))[:, 0]
    assert 3.5 < first <= 4
    assert 0.9 < second < 1.2
    assert record.kept(np.array([[0], [1]]))[:, 0].tolist() == pytest.approx([0, 0.98], abs=0.03)
    assert record.kept(np.array([[MOST + 9], [0]])).shape == (2, 1)


def test_a_mixture_waits_for_the_text_to_answer():
    """A guess longer than what a round commits is judged when all of it was answered."""
    (right,) = answers(1)
    texts = [right[:50] + [3] * 10]
    mixture = Mixture(Says(texts), NGram(2))
    gen = SpeculativeGenerator(llama(), mixture, num_draft_tokens=6)
    judged = []
    add = Record.add

    def noted(self, part, row, length, kept):
        judged.append((part, length, kept))
        add(self, part, row, length, kept)

    Record.add = noted
    try:
        gen.generate(**prompts(1), max_new_tokens=40, do_sample=False)
    finally:
        Record.add = add
    assert all(kept == length for part, length, kept in judged if part == 0)
    assert sum(part == 0 for part, *_ in judged) >= 40 // 7 - 1


def test_how_long_a_drawn_guess_has_become_decides_nothing():
    """It may be long by its own value, so whether it is submitted must not depend on that; a certain one may."""
    prompt = torch.tensor([[5, 6, 7]])
    state = State(prompt, max_length=20, max_guesses=4, eos_ids=None, pad_id=0, starts=np.zeros(1, dtype=np.int64))
    state.vocabulary = 64

    def guess(length, drawn):
        tokens, logits = torch.full((1, length), 9), torch.zeros(1, length, 64)
        proposal = Proposal(tokens, np.array([length]), logits if drawn else None)
        return SimpleNamespace(propose=lambda state, limits: proposal)

    for length, drawn, first in ((1, True, True), (3, True, True), (1, False, False), (3, False, True)):
        mixture = Mixture(guess(length, drawn), guess(2, drawn=False))
        run = mixture.begin(Call(llama(), prompt, {}, 20, Processing([]), Greedy()))
        assert run.propose(state, np.array([3])).lengths == [length if first else 2]


def test_a_drawn_guess_beside_a_certain_one_keeps_what_it_was_drawn_from():
    """Also where its proposer has guessed for the other row as well, and is not taken there."""
    prompt = torch.tensor([[5, 6, 7], [5, 6, 7]])
    state = State(prompt, max_length=20, max_guesses=4, eos_ids=None, pad_id=0, starts=np.zeros(2, dtype=np.int64))
    state.vocabulary = 64
    logits = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(0))
    drawn = Proposal(torch.full((2, 2), 9), np.array([2, 2]), logits)
    certain = Proposal.certain([[11, 12, 10], [13, 14, 15]], prompt.device)  # wider
    for place, parts in enumerate([(drawn, certain), (certain, drawn)]):
        mixture = Mixture(*(SimpleNamespace(propose=lambda *_, one=one: one) for one in parts))
        run = mixture.begin(Call(llama(), prompt, {}, 20, Processing([]), Greedy()))
        for _ in range(9):
            run.record.add(place, 0, 2, 2)
            run.record.add(place, 1, 2, 0)
        found = run.propose(state, np.array([3, 3]))
        assert found.lengths.tolist() == [2, 3]
        assert found.tokens[0, :2].tolist() == [9, 9]
        assert found.logits[0, :2].equal(logits[0])
        assert found.tokens[1].tolist() == found.logits[1].argmax(-1).tolist() == [13, 14, 15]


@pytest.mark.parametrize("join", [Mixture, Fallback])
def test_each_of_several_sees_its_own_guesses_judged(join):
    class Noted(Says):
        judged = 0

        def propose(self, state, limits):
            self.guessed = super().propose(state, limits)
            return self.guessed

        def observe(self, round_):
            for row in round_.lengths.nonzero()[0]:
                length = round_.lengths[row]
                assert round_.drafted[row, :length].tolist() == self.guessed.tokens[row, :length].tolist()
                self.judged += length

    right = answers(3)
    ways = [[right[0], [], right[2]], [wrong(right)[0], right[1], wrong(right)[2]]]
    parts = [Noted(way) for way in ways]
    _, stats = run(llama(), join(*parts), prompts(3))
    assert stats.drafted == sum(part.judged for part in parts)
    assert all(part.judged for part in parts)


def test_a_promised_text_does_not_depend_on_the_clock():
    clocks = []

    class Curious:
        def begin(self, call):
            clocks.append(call.clock)
            return NGram(2)

    for options in ({"do_sample": False}, {"do_sample": True, "seed": 1}, {"do_sample": True}):
        SpeculativeGenerator(llama(), Curious()).generate(**prompts(1), max_new_tokens=5, **options)
    assert [clock is None for clock in clocks] == [False, True, False]


def test_refused_mixtures():
    with pytest.raises(InvalidInput, match="at least two"):
        Mixture("ngram")
    with pytest.raises(InvalidInput, match="'eagle'"):
        Mixture("ngram", "eagle")
    with pytest.raises(InvalidInput, match=r"list.*one by one"):
        Mixture(["ngram", llama()])


def test_what_is_refused_is_not_printed_whole():
    for make in (
        lambda: SpeculativeGenerator(llama(), ["suffix", None, llama()]),
        lambda: Cascade("suffix", torch.nn.Sequential(llama())),
    ):
        with pytest.raises(SpecdecError) as caught:
            make()
        assert len(str(caught.value)) < 200


def test_a_mixture_is_lossless():
    assert_lossless(Mixture("suffix", "recycling", Suffix(shortest=3)), samples=1000)


def test_a_cascade_is_lossless():
    """`assert_lossless` has targets of 24 and of 5 tokens, so the models below are made to measure."""

    class Fitting:
        def begin(self, call):
            model = noisy_copy(call.target, 0.3)
            return Cascade("ngram", noisy_copy(call.target, 0.5), model).begin(call)

    assert_lossless(Fitting(), samples=1000)


# --- lists and words -----------------------------------------------------------------------------


def test_a_list_puts_one_behind_another():
    model = noisy(llama())
    proposer = build_proposer(llama(), ["suffix", model], None, None)
    assert isinstance(proposer, Fallback)
    assert isinstance(proposer.parts[0], Suffix)
    assert proposer.parts[0]._shortest == 4
    assert proposer.parts[1].model is model
    assert isinstance(build_proposer(llama(), ("recycling",), None, None), Recycling)
    got, stats = run(llama(), [NGram(3, 2), "suffix", model], prompts(3))
    assert got == plain(llama(), prompts(3), max_new_tokens=LONG).tolist()
    assert stats.draft_forwards > 0
    for draft in ([], ["suffix", None]):
        with pytest.raises(InvalidInput, match="list"):
            SpeculativeGenerator(llama(), draft)
    with pytest.raises(VocabularyMismatch):
        SpeculativeGenerator(llama(), ["suffix", tiny_llama(vocabulary=90)])


def test_what_a_proposer_of_ones_own_calls_its_parts_is_not_looked_into():
    own = SimpleNamespace(parts=3, propose=lambda state, limits: Proposal.empty(state.batch, state.device))
    for draft in (Mixture("ngram", own), Fallback(own, Mixture("ngram", own))):
        assert build_proposer(llama(), draft, None, None) is draft


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("join", [Fallback, Mixture])
def test_what_stands_beside_another_keeps_what_came_out(join, place):
    """A store learns from a call, before another draft or behind it."""
    store, parts = Store(), [NGram(2)]
    parts.insert(place, Suffix(store=store, tenant="one"))
    run(llama(), join(*parts), prompts(1))
    assert store.tokens("one") == LONG + 1  # and a mark behind it


class Seldom:
    """A model that guesses in every other round."""

    def __init__(self, model):
        self.model = DraftModel(model)

    def begin(self, call):
        run, rounds = self.model.begin(call), count()
        propose = run.propose
        run.propose = lambda state, limits: propose(state, limits * (next(rounds) % 2))
        return run


@pytest.mark.parametrize("join", [Cascade, Mixture, lambda one, other: Fallback(Seldom(one), DraftModel(other))])
def test_passes_of_several_models_are_told_together(join, monkeypatch):
    monkeypatch.setattr("specdec.call.clock", None)  # prices as assumed: the first is left as it is never right
    models = tiny_llama(seed=9), noisy_copy(llama(), 0.1)
    with Counted(models[0]) as first, Counted(models[1]) as second:
        got, stats = run(llama(), join(*models), prompts(3))
    assert got == plain(llama(), prompts(3), max_new_tokens=LONG).tolist()
    assert stats.draft_forwards == first.calls + second.calls
    assert min(first.calls, second.calls) > 0


def test_a_round_looks_as_if_nothing_was_guessed_where_another_did():
    seen = []
    mine, other = (Proposal.certain(guesses, torch.device("cpu")) for guesses in ([[5, 6], []], [[5, 6], [7]]))
    two, rows = np.array([2, 1]), np.zeros((2, 3), dtype=np.int64)
    round_ = Round(other, other.tokens.numpy(), two, two, rows, two + 1, two, torch.zeros(2, 3, 8))
    show(SimpleNamespace(observe=seen.append), np.array([True, False]), mine, round_)
    assert seen[0].proposal is mine
    assert seen[0].drafted.tolist() == [[5, 6], [-1, -1]]
    assert seen[0].lengths.tolist() == seen[0].accepted.tolist() == [2, 0]
    assert seen[0].counts.tolist() == [3, 2]


def test_a_model_is_only_asked_where_the_text_does_not_repeat():
    """The recommended form: copy where the text matches, ask the model where it does not."""
    text = plain(llama(), prompts(1), max_new_tokens=40)[0]
    # a prompt that holds the answer to its own question
    ids = torch.cat([text, text[:START]])[None]
    answer = llama().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    inputs = {"input_ids": torch.cat([answer, ids], dim=1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    _, alone = run(llama(), DraftModel(noisy(llama())), inputs)
    _, both = run(llama(), ["suffix", noisy(llama())], inputs)
    assert both.draft_forwards <= alone.draft_forwards


class Misleads:
    """Guesses wrongly, and for the first row alone."""

    def propose(self, state, limits):
        return Proposal.certain([[7] * int(limits[0]), *[[]] * (state.batch - 1)], state.device)


@pytest.mark.parametrize("layout", ["slots", "columns"])
@pytest.mark.parametrize("join", [Fallback, lambda first, model: Mixture(first, model, other(model.model))])
def test_a_model_reads_only_real_ids_in_rows_that_others_guessed_for(join, layout):
    """What it is told of such rows holds no id; processors and passes over all rows see its tokens there too."""
    inputs, options = prompts(3), {"repetition_penalty": 1.2, "max_new_tokens": 40, "do_sample": False}
    draft = join(Misleads(), DraftModel(noisy(llama(), 0.2)))
    gen = SpeculativeGenerator(llama(), draft, num_draft_tokens=5, layout=layout)
    got = gen.generate(**inputs, **options)
    assert got.tolist() == llama().generate(**inputs, **options).tolist()
    assert gen.stats.row_drafted.all()
    assert gen.stats.draft_forwards > 0


def translated(model, **options):
    words = characters(string.ascii_letters + string.digits + " .")
    return TranslatedDraft(model, words, words, **options)


@pytest.mark.parametrize("place", ["forward", "_prepare_model_inputs"])
@pytest.mark.parametrize("fault", [ValueError, AttributeError, torch.OutOfMemoryError])
@pytest.mark.parametrize(
    "join", [DraftModel, lambda model: Cascade("ngram", model), lambda model: ["ngram", model], translated]
)
def test_a_draft_that_cannot_take_the_prompt_breaks_nothing(join, fault, place, monkeypatch):
    """A multimodal one may want a picture in every pass; its prompt is fed with its first guess."""
    draft = noisy(llama(1))
    gen = SpeculativeGenerator(llama(), join(draft), num_draft_tokens=5)

    def fails(*args, **kwargs):
        raise fault("give a picture")

    monkeypatch.setattr(draft, place, fails)
    with pytest.warns(UserWarning, match="drafts nothing with LlamaForCausalLM: .*give a picture"):
        got = gen.generate(**prompts(3), max_new_tokens=LONG, do_sample=False)
    assert got.tolist() == plain(llama(), prompts(3), max_new_tokens=LONG).tolist()
    assert gen.stats.draft_forwards == 0


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("join", [DraftModel, lambda model: Cascade("ngram", model), translated])
def test_nobody_asks_how_likely_a_fixed_number_of_guesses_is(join, asks, monkeypatch):
    computed = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda *args, **named: computed.append(1) or softmax(*args, **named)
    )
    if asks:  # then it shows
        monkeypatch.setattr(Fixed, "goes_on", lambda self, chances: True)
    got, stats = run(llama(), join(noisy(llama())), prompts(3))
    assert got == plain(llama(), prompts(3), max_new_tokens=LONG).tolist()
    assert stats.drafted > 0
    assert bool(computed) == asks


@pytest.mark.parametrize(
    "draft",
    [lambda model: DraftModel(model, layout="nonsense"), lambda model: translated(model, layout="nonsense")],
)
def test_what_we_refuse_on_purpose_is_no_fault_of_the_draft(draft):
    with pytest.raises(InvalidInput, match="layout='nonsense'"):
        run(llama(), draft(noisy(llama())), prompts(1))


def test_auto_copies_and_recycles():
    """Without any idea of a draft: the better of two that need no second model, and fast where text repeats."""
    proposer = build_proposer(llama(), "auto", None, None)
    assert isinstance(proposer, Mixture)
    text = plain(llama(), prompts(1), max_new_tokens=LONG)[0]
    repeated = {"input_ids": torch.cat([text, text])[None]}
    repeated["attention_mask"] = torch.ones_like(repeated["input_ids"])
    for inputs in (prompts(1), prompts(3), repeated):
        got, stats = run(llama(), "auto", inputs, layout="auto")
        assert got == plain(llama(), inputs, max_new_tokens=LONG).tolist()
        assert stats.draft_forwards == 0
        assert stats.drafting.startswith("Suffix ")


# --- one draft, many targets ---------------------------------------------------------------------


DRAFTS = {
    "a model": lambda model: DraftModel(model),
    "a cascade": lambda model: Cascade("suffix", model),
    "a mixture": lambda model: Mixture("suffix", model),
    "one behind another": lambda model: Fallback(Suffix(shortest=3), DraftModel(model)),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_one_draft_serves_several_targets_by_turns(name):
    """A fine-tuned model and its base: nothing of a draft is bound to the target that it met first."""
    base = llama()
    tuned = noisy_copy(base, 0.2, seed=7)
    model = noisy(base)
    shared = DRAFTS[name](model)
    options = {"num_draft_tokens": 3, "verification": "coupled", "seed": 5, "layout": "slots"}
    gens = [SpeculativeGenerator(target, shared, **options) for target in (base, tuned)]
    for inputs in (prompts(3), prompts(1)):
        for target, gen in zip((base, tuned), gens, strict=True):
            got = gen.generate(**inputs, max_new_tokens=LONG, do_sample=True)
            own = SpeculativeGenerator(target, DRAFTS[name](model), **options)
            assert got.tolist() == own.generate(**inputs, max_new_tokens=LONG, do_sample=True).tolist()
            alone = SpeculativeGenerator(target, None, verification="coupled", seed=5)
            assert got.tolist() == alone.generate(**inputs, max_new_tokens=LONG, do_sample=True).tolist()
            if name != "a mixture":  # whose choice depends on the clock
                assert gen.stats.accepted_at == own.stats.accepted_at
