"""The law of constrained text, through the front door: the locally masked target, every path walked.

The grammar is a state machine that remembers more than the tables see, so a state that is wrong by one guess, was
not taken back, or comes a place late, changes the law. `test_loop_law.py` says how the walk works.
"""

from collections import defaultdict

import pytest
import torch

import specdec.stepwise
from specdec import SpeculativeGenerator
from specdec.length.adaptive import Adaptive
from specdec.length.cost import Assumed
from specdec.proposers import drafting, drawn
from specdec.testing import TableModel

from ..grammars import ENDING, TOY, toy
from ..proposers import OWN_LAYERS, PROPOSERS
from .test_loop_law import (
    EXPECTED,
    PROMPT,
    SIZES,
    TOLERANCE,
    Scripted,
    Stubborn,
    layered,
    tables,
    walk,
    without_token,
)


def exact(target, new, table, eos):
    """The law of plain sampling under the grammar; texts end at `eos` and are padded with 0."""
    law = {((), "a"): 1.0}
    for _ in range(new):
        longer = defaultdict(float)
        for (text, place), chance in law.items():
            if place == "end":
                longer[(*text, 0), place] += chance
                continue
            history = [*PROMPT[0].tolist(), *text]
            row = target.table[history[-2], history[-1]].double()
            follow = {token: name for token, name in table[place].items() if token < len(row)}
            chances = row[list(follow)].softmax(-1).tolist()
            for (token, name), part in zip(follow.items(), chances, strict=True):
                longer[(*text, token), name] += chance * part
        law = longer
    texts = defaultdict(float)
    for (text, _), chance in law.items():
        texts[text] += chance
    return texts


def law_error(rule, kind, guesses, *, table=TOY, eos=None, seed=0, controlled=False, hints=None, **more):
    """Largest difference, over all texts, between the walked law and the exact one."""
    vocabulary, new = SIZES[guesses] if eos is None else (3, 4)
    target, draft = tables(seed, vocabulary)
    current = []
    pruned = TableModel(without_token(draft.table, vocabulary - 1))
    narrow = TableModel(without_token(without_token(draft.table, vocabulary - 1), vocabulary - 2))
    drafts = {"self": target, "pruned": pruned, "narrow": narrow, "own": Stubborn(lambda: current[-1], vocabulary)}
    options = {}
    if kind in PROPOSERS:
        drafts[kind], options = PROPOSERS[kind](draft, [EXPECTED[:new]])
    layout = "columns"
    if kind in OWN_LAYERS:
        target, layout = layered(seed, vocabulary), "slots"
    gen = SpeculativeGenerator(target, drafts[kind], num_draft_tokens=guesses, verification=rule, layout=layout)
    if controlled:
        gen._length = lambda *_: lambda *_: Adaptive(Assumed(0.15))
    constraint = toy(table, () if eos is None else (eos,), hints)

    def run(script):
        current.append(script)
        gen._sampling = lambda *_: Scripted(rule, script)
        out = gen.generate(
            PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=new, do_sample=True, top_k=0,
            eos_token_id=eos, pad_token_id=0, logits_processor=[constraint], **options, **more,
        )  # fmt: skip
        text = out[0, PROMPT.shape[1] :].tolist()
        return tuple(text + [0] * (new - len(text)))

    law = defaultdict(float)
    for chance, text in walk(run):
        law[text] += chance
    want = exact(target, new, table, eos)
    assert len(want) > 2, "the grammar leaves no choice: this test shows nothing"
    return max(abs(law[text] - want.get(text, 0.0)) for text in law.keys() | want.keys())


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("kind", ["self", "pruned", "own", *PROPOSERS])
@pytest.mark.parametrize("guesses", SIZES)
def test_law_of_constrained_texts(rule, kind, guesses):
    assert law_error(rule, kind, guesses) < TOLERANCE


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("kind", ["model", "own", "prediction", "prediction, model"])
def test_law_when_the_grammar_ends_inside_a_block(rule, kind):
    assert law_error(rule, kind, 2, table=ENDING, eos=2) < TOLERANCE


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("kind", ["narrow", "model", "cascade of models"])
def test_law_behind_a_warper_that_wants_distributions(rule, kind):
    """So small a cutoff removes nothing; a draft's row may hold nothing at all (the narrow one's, always)."""
    assert law_error(rule, kind, 2, eta_cutoff=1e-12) < TOLERANCE


@pytest.mark.parametrize("kind", ["none", "model", "prediction, model"])
def test_law_with_the_controller(kind):
    assert law_error("block", kind, 3, controlled=True) < TOLERANCE


# what the grammar says will probably follow: sometimes right, sometimes forbidden on the way
HINTS = {"a": [1, 0, 1], "b": [0, 0], "d": [1, 2, 1]}


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(
    "kind", ["none", "model", "own", "recycling", "fallback", "cascade of models", "a list", "layer skip"]
)
@pytest.mark.parametrize("guesses", [2, 3])
@pytest.mark.parametrize("controlled", [False, True])
def test_law_with_foreseen_guesses(rule, kind, guesses, controlled):
    assert law_error(rule, kind, guesses, hints=HINTS, controlled=controlled) < TOLERANCE


# --- mutants: wrong states, which the walk must reject ------------------------------------------


def not_advanced(monkeypatch):
    """Every guess is judged by the state behind the committed text."""
    right = specdec.stepwise._Row.follow

    def stale(self, ids, *how):
        path = right(self, ids, *how)
        return path[:1] + path[:1] * len(ids)

    monkeypatch.setattr(specdec.stepwise._Row, "follow", stale)


def not_rolled_back(monkeypatch):
    """What was worked out along a rejected guess is taken for the state of the token that replaced it."""
    right = specdec.stepwise._Row.follow

    def sticky(self, ids, *how):
        self._ids[: len(ids)] = ids[: len(self._ids)]
        return right(self, ids, *how)

    monkeypatch.setattr(specdec.stepwise._Row, "follow", sticky)


def one_place_late(monkeypatch):
    """A guess is judged by the state before the guess before it."""
    right = specdec.stepwise._Row.follow

    def late(self, ids, *how):
        path = right(self, ids, *how)
        return path[:1] + path[:-1]

    monkeypatch.setattr(specdec.stepwise._Row, "follow", late)


def one_place_early(monkeypatch):
    """A guess is judged by the state that it leads to."""
    right = specdec.stepwise._Row.follow

    def early(self, ids, *how):
        path = right(self, ids, *how)
        return [*path[1:], path[-1]]

    monkeypatch.setattr(specdec.stepwise._Row, "follow", early)


def only_the_first_position(monkeypatch):
    """The target is masked where its first guess is judged, and nowhere else."""
    right = specdec.stepwise.Seen.__init__

    def first(self, tokens, lengths, wanted, columns):
        right(self, tokens, lengths, wanted.clip(max=1), columns)

    monkeypatch.setattr(specdec.stepwise.Seen, "__init__", first)


MUTANTS = [not_advanced, not_rolled_back, one_place_late, one_place_early, only_the_first_position]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("kind", ["model", "own"])
def test_a_wrong_state_breaks_the_law(mutant, kind, monkeypatch):
    mutant(monkeypatch)
    assert law_error("token", kind, 2) > 1e-3


def test_shared_noise_gives_the_text_of_plain_decoding():
    """Coupled: with one seed the constrained text is the same whatever is guessed, in a batch of rows."""
    target, draft = tables(0, 3)
    ids = PROMPT.repeat(6, 1)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": True, "top_k": 0,
               "pad_token_id": 0, "logits_processor": [toy()], "seed": 4}  # fmt: skip
    want = SpeculativeGenerator(target, None, verification="coupled").generate(ids, **options)
    gen = SpeculativeGenerator(target, draft, verification="coupled", num_draft_tokens=3)
    assert torch.equal(gen.generate(ids, **options), want)
    assert len({tuple(row) for row in want.tolist()}) > 3
    assert 0 < gen.stats.accepted < gen.stats.drafted


def shown_with_the_rows_of_the_draft(monkeypatch):
    """A foreseen guess is handed over as if the draft had drawn it."""

    def blurred(guess, vocabulary):
        return torch.zeros(*guess.shape, vocabulary)

    monkeypatch.setattr(drawn, "certain", blurred)
    monkeypatch.setattr(drafting, "certain", blurred)


def foreseen_before_the_guess(monkeypatch):
    """What is foreseen depends on a guess that is then thrown away."""
    right = drafting._guess

    def choosy(steps, state, *more):
        guess, scores = right(steps, state, *more)
        return (guess, scores) if (guess == 0).all() else (guess, drafting.certain(guess, state.vocabulary))

    monkeypatch.setattr(drafting, "_guess", choosy)


@pytest.mark.parametrize("mutant", [shown_with_the_rows_of_the_draft, foreseen_before_the_guess])
def test_a_wrong_row_of_a_foreseen_guess_breaks_the_law(mutant, monkeypatch):
    mutant(monkeypatch)
    assert law_error("token", "model", 3, hints={"b": [0], "d": [1]}) > 1e-3
