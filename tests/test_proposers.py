"""Every proposer against plain generate(): batches, processors, ends inside a block, shared noise, copies."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

import specdec.state as state_room
import specdec.transfer as transfer_room
from specdec import EarlyExit, Fallback, LayerSkip, Proposal, Recycling, SpeculativeGenerator, Store, Suffix
from specdec.length.fixed import Fixed
from specdec.proposers import draft_model as draft_model_room
from specdec.proposers import drafting
from specdec.proposers import suffix as suffix_room
from specdec.proposers.prediction import Prediction
from specdec.sampling import Greedy
from specdec.testing import assert_lossless, tiny_llama

from .contract import NEW, bart, mistral, noisy, plain, prompts, t5
from .proposers import OWN_LAYERS, PROPOSERS, Printed

BATCHES = (1, 3)
START = 9
MODEL_FREE = [name for name in PROPOSERS if name not in ("none", "model")]

OPTIONS = {
    "plainly": lambda text: {},
    "penalties": lambda text: {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
    "bad words": lambda text: {"bad_words_ids": [[text[1], text[2]], [text[4]]], "suppress_tokens": [text[0]]},
    "an end inside a block": lambda text: {"eos_token_id": text[3]},
    "a criterion": lambda text: {"stopping_criteria": [lambda ids, _: ids[:, -1] == text[4]]},
    "one position after the other": lambda text: {
        "prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) * 5 + row + i) % 64 for i in range(1, 9)]
    },
}  # fmt: skip


@cache
def llama(seed=0, dtype=torch.float32):
    """Two layers, so that one of them can draft."""
    return tiny_llama(seed, dtype=dtype)


@cache
def expected(target, batch):
    """Plain text of every row with two tokens changed: guesses that are right, wrong and right again."""
    text = plain(target, prompts(batch))[:, START:].clone()
    text[:, 2] = 5
    text[:, 6] = 7
    return text.tolist()


def built(name, target, batch, **options):
    draft, given = PROPOSERS[name](noisy(target), expected(target, batch))
    return SpeculativeGenerator(target, draft, **{"num_draft_tokens": 3, **options}), given


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", PROPOSERS)
def test_greedy_text_is_that_of_plain(name, option, batch):
    text = plain(llama(), prompts(batch))[-1, START:].tolist()
    options = OPTIONS[option](text)
    gen, given = built(name, llama(), batch)
    got = gen.generate(**prompts(batch), max_new_tokens=NEW, do_sample=False, **options, **given)
    assert got.tolist() == plain(llama(), prompts(batch), **options).tolist()
    if name in ("model", "store", "prediction") and option == "plainly":
        assert gen.stats.accepted > 0


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODEL_FREE)
def test_windows_and_a_long_draft(name, batch):
    gen, given = built(name, mistral(), batch, num_draft_tokens=12)
    got = gen.generate(**prompts(batch), max_new_tokens=24, do_sample=False, **given)
    assert got.tolist() == plain(mistral(), prompts(batch), max_new_tokens=24).tolist()


@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize("name", [name for name in MODEL_FREE if name not in OWN_LAYERS])
def test_encoder_decoder(name, make):
    draft, given = PROPOSERS[name](noisy(make()), [[5, 9, 9, 3]] * 3)
    gen = SpeculativeGenerator(make(), draft)
    got = gen.generate(**prompts(3), max_new_tokens=NEW, do_sample=False, **given)
    assert got.tolist() == plain(make(), prompts(3)).tolist()


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", PROPOSERS)
def test_a_prompt_with_ids_that_the_target_cannot_write(name, do_sample):
    """It reads more ids than it has scores for, as models do that have some for pictures."""
    target = tiny_llama()
    more = torch.nn.Embedding(72, 32)
    with torch.no_grad():
        more.weight[:64] = target.model.embed_tokens.weight
    target.model.embed_tokens = more
    ids = torch.tensor([[column for i in range(3, 63) for column in (i, i + 1, 70)]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    draft, given = PROPOSERS[name](noisy(target), [[5, 9, 70, 3]])
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=3, seed=0)
    options = {"max_new_tokens": NEW, "do_sample": do_sample, "top_k": 0 if do_sample else None}
    got = gen.generate(**inputs, **options, **given)
    assert got[0, ids.shape[1] :].max() < 64
    if not do_sample:
        assert got.tolist() == plain(target, inputs).tolist()
    if name == "ngram":
        assert gen.stats.drafted > 0


@pytest.mark.parametrize("where", ["the prompt", "the text"])
def test_a_row_with_an_id_that_the_draft_does_not_embed_takes_nothing_from_the_others(where):
    target, draft = tiny_llama(vocab_size=200), tiny_llama(vocab_size=199)
    inputs, forced = prompts(3), {}
    if where == "the prompt":  # of a target that reads more ids than it has scores for; fed again without a cache
        draft = OpenAIGPTLMHeadModel(
            OpenAIGPTConfig(vocab_size=200, n_embd=32, n_layer=1, n_head=2, n_positions=64)
        )
        target.model.embed_tokens = torch.nn.Embedding(201, 32)
        inputs["input_ids"][1, -2] = 200
    else:
        width = inputs["input_ids"].shape[1]
        every = list(range(198))
        forced["prefix_allowed_tokens_fn"] = lambda row, ids: [199] if row == 1 and len(ids) == width + 4 else every
    gen = SpeculativeGenerator(target, draft.eval(), num_draft_tokens=3)
    got = gen.generate(**inputs, max_new_tokens=NEW, do_sample=False, **forced)
    assert got.tolist() == target.generate(**inputs, max_new_tokens=NEW, do_sample=False, **forced).tolist()
    assert gen.stats.row_drafted[0] > gen.stats.row_drafted[1]


def test_rounds_keep_the_lengths_that_were_submitted():
    """A proposer may use its memory again."""
    lengths, kept = np.zeros(3, dtype=np.int64), []

    class Same:
        def propose(self, state, limits):
            lengths[:] = np.minimum(limits, len(kept) % 3)
            return Proposal(torch.full((3, max(int(lengths.max()), 0)), 5), lengths)

        def observe(self, round_):
            kept.append(round_)

    SpeculativeGenerator(llama(), Same(), num_draft_tokens=3).generate(
        **prompts(3), max_new_tokens=NEW, do_sample=False
    )
    assert len({round_.lengths.max() for round_ in kept}) > 1


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", PROPOSERS)
def test_a_text_that_outgrows_the_room_made_for_it(name, batch, monkeypatch):
    monkeypatch.setattr("specdec.state.ROOM", 5)
    gen, given = built(name, llama(), batch)
    got = gen.generate(**prompts(batch), max_new_tokens=24, do_sample=False, **given)
    assert got.tolist() == plain(llama(), prompts(batch), max_new_tokens=24).tolist()


@pytest.mark.parametrize("name", ["model", "cascade", "early exit"])
def test_a_text_that_outgrows_its_room_where_the_host_has_a_copy_of_it(name, monkeypatch):
    """As on an accelerator."""
    made, begun = state_room.State.__init__, draft_model_room._Run.__init__

    def apart(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self._is_host, self.host_tokens = False, self.host_tokens.copy()

    def elsewhere(self, *args, **kwargs):
        begun(self, *args, **kwargs)
        self._on_cpu = False

    monkeypatch.setattr(state_room, "ROOM", 5)
    monkeypatch.setattr(state_room.State, "__init__", apart)
    monkeypatch.setattr(draft_model_room._Run, "__init__", elsewhere)
    gen, given = built(name, llama(), 3)
    got = gen.generate(**prompts(3), max_new_tokens=24, do_sample=False, **given)
    assert got.tolist() == plain(llama(), prompts(3), max_new_tokens=24).tolist()
    assert gen.stats.accepted > 0


@pytest.mark.parametrize("name", ["model", "cascade", "layer skip", "mixture, model"])
def test_a_draft_that_begins_when_the_text_has_outgrown_the_room_made_for_it(name, monkeypatch):
    asked = []
    monkeypatch.setattr("specdec.state.ROOM", 5)
    monkeypatch.setattr(Fixed, "begins", lambda *_: asked.append(1) or len(asked) > 14)
    gen, given = built(name, llama(), 3)
    got = gen.generate(**prompts(3), max_new_tokens=36, do_sample=False, **given)
    assert got.tolist() == plain(llama(), prompts(3), max_new_tokens=36).tolist()
    assert gen.stats.draft_forwards > 0
    assert len(asked) > 15


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", PROPOSERS)
def test_text_with_shared_noise_is_the_same_for_every_proposer(name, batch, tokens):
    target = llama(0, torch.float64)
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 12}
    wanted = SpeculativeGenerator(target, None, verification="coupled", seed=7).generate(
        **prompts(batch), **options
    )
    # what is expected is right for some rows here, so that guesses are kept as well
    draft, given = PROPOSERS[name](noisy(target), wanted[:, START:].tolist())
    gen = SpeculativeGenerator(target, draft, verification="coupled", seed=7, num_draft_tokens=tokens)
    assert gen.generate(**prompts(batch), **options, **given).tolist() == wanted.tolist()
    if name.startswith("prediction") or name == "store":
        assert gen.stats.accepted > 0


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", PROPOSERS)
def test_one_copy_to_the_host_a_round(name, batch, monkeypatch):
    calls = []
    original, together = transfer_room.to_host, transfer_room.together_to_host
    for room in (draft_model_room, suffix_room):
        monkeypatch.setattr(room, "to_host", lambda tensor: calls.append(1) or original(tensor))
    monkeypatch.setattr(state_room, "together_to_host", lambda *columns: calls.append(1) or together(*columns))
    commits = []
    commit = state_room.State.commit
    monkeypatch.setattr(state_room.State, "commit", lambda *args: commits.append(1) or commit(*args))
    gen, given = built(name, llama(), batch)
    gen.generate(**prompts(batch), max_new_tokens=NEW, do_sample=False, **given)
    assert gen.stats.host_copies == gen.stats.rounds
    # a cascade has rounds of its own, and a copy in each
    assert len(calls) == len(commits)
    assert (len(commits) > gen.stats.rounds) == name.startswith("cascade")


@pytest.mark.parametrize("name", PROPOSERS)
def test_a_call_leaves_nothing_behind(name, monkeypatch):
    """The second call of a generator does what the first did."""
    monkeypatch.setattr("specdec.call.clock", None)  # a mixture goes by prices
    gen, given = built(name, llama(), 3)
    seen = []
    for _ in range(2):
        gen.generate(**prompts(3), max_new_tokens=NEW, do_sample=False, **given)
        seen.append((gen.stats.rounds, gen.stats.drafted, gen.stats.accepted))
    assert seen[0] == seen[1]


TEXT = [3, 4, 1, 2, 3, 1, 4, 4]
LOSSLESS = {
    "suffix": lambda: Suffix(),
    "store": lambda: Suffix(store=Printed([TEXT]), tenant="reader"),
    "a store that fills up": lambda: Suffix(store=Store(tokens=30), tenant="me"),
    "recycling": lambda: Recycling(),
    "fallback": lambda: Fallback(Suffix(shortest=3), Recycling()),
    "early exit": lambda: EarlyExit(layers=1),
    "layer skip": lambda: LayerSkip(skip=[0]),
    "prediction": lambda: Prediction([np.array(TEXT)]),
    "prediction, suffix": lambda: Fallback(Prediction([np.array(TEXT)]), Suffix()),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless(name):
    assert_lossless(LOSSLESS[name](), samples=1000)


def test_rows_that_make_no_guess_tell_no_chance(monkeypatch):
    """A row that has ended is fed beside the others; what the draft says there is no guess."""
    text = plain(llama(), prompts(3))
    eos, told = int(text[0, START + 1]), []
    monkeypatch.setattr(Fixed, "goes_on", lambda self, chances: told.append(chances) or True)
    gen = SpeculativeGenerator(llama(), noisy(llama()), num_draft_tokens=3, layout="slots")
    got = gen.generate(**prompts(3), max_new_tokens=NEW, do_sample=False, eos_token_id=eos)
    assert (got[0, START + 2 :] == 0).all()
    assert (got[1:, -1] != 0).all()
    assert all((chances[1:] > 0).any() for chances in told)
    assert told[-1][0] == 0
    assert told[0].min() > 0


class Steps:
    """Guesses 4, 5, 6 and 7 for four rows, asked for in a way that is written down."""

    def __init__(self):
        self.scored, self.written, self.positions = [], [], []
        self.state = SimpleNamespace(
            lengths=np.array([4, 6, 5, 4]), prompt_length=4, device=torch.device("cpu"), vocabulary=10
        )

    def next_scores(self, state, step, guessing):
        self.scored.append((step, guessing.tolist()))
        return 9 * torch.eye(10)[[4, 5, 6, 7]][:, None]

    history = None

    def write(self, state, guess, columns):
        self.written.append((guess[:, 0].tolist(), columns.tolist()))

    def guesses(self, limits, confidence, goes_on, foresight):
        def guess(scores, positions):
            self.positions.append(positions.tolist())
            return Greedy().guess(scores, positions)

        call = SimpleNamespace(
            sampling=SimpleNamespace(guess=guess, keeps_logits=False), length=SimpleNamespace(goes_on=goes_on)
        )
        return drafting.draft(self, self.state, np.array(limits), call, confidence, foresight)


def test_once_no_more_pays_only_what_is_foreseen_is_guessed():
    """One row is foreseen, one ends with its first guess and one may make a single guess."""
    foreseen = np.array([[-1, -1, 0, -1], [-1, -1, 8, -1], [-1, -1, 9, -1], [-1, -1, -1, -1]])
    foresight = SimpleNamespace(
        at=lambda step, *_: foreseen[step],
        cut=lambda step, limits, guess: np.where(guess[:, 0].numpy() == 5, np.minimum(limits, step + 1), limits),
        more=True,
    )
    steps, told = Steps(), []
    goes_on = lambda chances: told.append(chances) or len(told) < 2  # noqa: E731
    proposal = steps.guesses([5, 5, 5, 1], None, goes_on, foresight)
    assert proposal.lengths.tolist() == [2, 1, 3, 1]
    assert proposal.tokens[:, 0].tolist() == [4, 5, 0, 7]
    assert proposal.tokens[0, 1] == 4
    assert proposal.tokens[2].tolist() == [0, 8, 9]
    assert (proposal.tokens >= 0).all()  # models may be fed all of them
    assert steps.scored == [(0, [True, True, False, True]), (1, [True, False, False, False])]
    assert steps.positions == [[0, 2, 1, 0], [1, 3, 2, 1]]
    assert [columns for _, columns in steps.written] == [[4, 6, 5, 4], [5, 7, 6, 5], [6, 8, 7, 6]]
    assert [np.flatnonzero(chances).tolist() for chances in told] == [[0, 1, 2, 3], [0, 2], [2]]


NOTHING = SimpleNamespace(at=lambda *_: None, cut=lambda step, limits, guess: limits, more=False)


def test_a_draft_with_a_confidence_of_its_own_does_not_ask_whether_one_more_guess_pays():
    for confidence, lengths in ((None, [1, 1, 1, 1]), (0.0, [3, 1, 2, 0]), (1.0, [1, 1, 1, 0])):
        steps = Steps()
        limits = [3, 3, 3, 3] if confidence is None else [3, 1, 2, 0]
        proposal = steps.guesses(limits, confidence, lambda chances: False, NOTHING)
        assert proposal.lengths.tolist() == lengths
        assert len(steps.scored) == proposal.tokens.shape[1] == max(lengths)
        assert steps.scored[0][1] == [limit > 0 for limit in limits]
