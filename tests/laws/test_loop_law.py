"""The law of whole texts through the front door: every path of the loop, walked, not sampled.

The models are look-up tables whose history is read back from their caches, so a wrong rollback changes the
law. All random decisions of a call are taken from a script; walking all scripts gives every text with its
exact probability. Processing, draft model, layout, stop condition, rollback and commit are the shipped ones;
the decisions themselves go through the shipped verifier, with noise that forces them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteriaList

import specdec.loop
import specdec.scorer
from specdec import DraftModel, InvalidScores, Mixture, Proposal, SpeculativeGenerator
from specdec.layouts.slot_cache import SlotLayer
from specdec.layouts.slots import Slots
from specdec.length.adaptive import Adaptive
from specdec.length.cost import Assumed
from specdec.proposers import cascade, combined, draft_model, layers, mixture
from specdec.state import State
from specdec.testing import TableModel
from specdec.verify import (
    block_acceptance,
    choose,
    match,
    residual_weights,
    token_acceptance,
    verify,
)

from ..proposers import OWN_LAYERS, PROPOSERS
from .layered import LayeredTable

# guesses -> (vocabulary, new tokens): the first token takes no guess, and a bonus must fit
SIZES = {1: (3, 3), 2: (2, 4), 3: (2, 5)}
PROMPT = torch.tensor([[1, 0]])
EXPECTED = [1, 1, 0, 1, 0]  # what a user might predict


class Script:
    """Answers every random question of a call from a list, and remembers what else was possible."""

    def __init__(self, answers: list[int]) -> None:
        self.answers = answers
        self.asked: list[np.ndarray] = []

    def decide(self, chances: torch.Tensor) -> int:
        chances = chances.double().numpy()
        self.asked.append(chances / chances.sum())
        place = len(self.asked) - 1
        if place == len(self.answers):
            self.answers.append(int(np.flatnonzero(chances)[0]))
        return self.answers[place]

    @property
    def chance(self) -> float:
        pairs = zip(self.asked, self.answers, strict=True)
        return float(np.prod([chances[answer] for chances, answer in pairs]))


def walk(run: Callable[[Script], tuple[int, ...]]) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Every possible outcome of ``run`` with its probability."""
    waiting: list[list[int]] = [[]]
    while waiting:
        script = Script(waiting.pop())
        given = len(script.answers)
        outcome = run(script)
        yield script.chance, outcome
        for place in range(given, len(script.asked)):
            others = np.flatnonzero(script.asked[place])
            for other in others[others > script.answers[place]]:
                waiting.append([*script.answers[:place], int(other)])


class Scripted:
    """``Sampling`` whose noise is chosen by a script; the rule is the shipped one."""

    keeps_logits = True

    def __init__(self, rule: str, script: Script) -> None:
        self.rule, self.script = rule, script

    def guess(self, scores, positions):
        # like ``sample``: nothing can be drawn from a row that holds nothing
        rows = [row.softmax(-1) for row in scores[:, 0]]
        return torch.tensor([[-1] if row.isnan().any() else [self.script.decide(row)] for row in rows])

    def noise(self, accept: torch.Tensor, width: int, *, longest: bool) -> torch.Tensor:
        """Uniforms that keep as many guesses as the script says.

        Token: up to the first failure. Block, where guesses have probabilities: up to the last success.
        """
        fails = 1 - accept
        one = accept.new_ones(1)
        if self.rule == "block" and longest:
            chances = torch.cat([one, accept]) * torch.cat([fails, one]).flip(0).cumprod(0).flip(0)
        else:
            chances = torch.cat([one, accept.cumprod(0)]) * torch.cat([fails, one])
        kept = self.script.decide(chances)
        passes = torch.arange(len(accept)) < kept
        uniforms = torch.where(passes, accept / 2, (1 + accept) / 2)
        return torch.nn.functional.pad(uniforms, (0, width - len(accept)))

    def verify(self, scores, tokens, lengths, logits, positions):
        target, tokens = scores.double().softmax(-1), tokens.clone()
        draft = None if logits is None else logits.double().softmax(-1)
        if self.rule == "block" and draft is not None:
            accept, scales = block_acceptance(target, tokens, lengths, draft)
        else:
            accept = token_acceptance(target, tokens, lengths, draft)
            scales = torch.ones_like(target[..., 0])
        # a row that waits for another has nothing to draw from, and nothing to be asked
        waits = scores[:, 0].isneginf().all(dim=-1)
        judged = (lengths * ~waits).tolist()
        kept = [row[:length].clamp(0, 1) for row, length in zip(accept, judged, strict=True)]
        uniforms = torch.stack([self.noise(row, tokens.shape[1], longest=draft is not None) for row in kept])
        draft_logits = None if logits is None else logits.double()
        arguments = (scores.double(), tokens, lengths, draft_logits)
        calm = target.new_full((len(target), 1), 0.5)
        accepted, _ = verify(*arguments, rule=self.rule, uniforms=torch.cat([uniforms, calm], dim=1))
        weights = residual_weights(target, tokens, lengths, draft, accepted, scales)
        forced = torch.zeros_like(calm)
        for row, chances in enumerate(weights):
            if waits[row]:
                continue
            token = self.script.decide(chances)  # the middle of its share
            forced[row] = (chances[: token + 1].sum() - chances[token] / 2) / chances.sum()
        return verify(*arguments, rule=self.rule, uniforms=torch.cat([uniforms, forced], dim=1))


def tables(seed: int, vocabulary: int) -> tuple[TableModel, TableModel]:
    generator = torch.Generator().manual_seed(seed)
    shape = (vocabulary,) * 3
    rows = [torch.randn(shape, generator=generator) * 1.5 for _ in range(2)]
    return TableModel(rows[0]), TableModel(rows[1])


def layered(seed: int, vocabulary: int) -> LayeredTable:
    generator = torch.Generator().manual_seed(seed)
    return LayeredTable([torch.randn((vocabulary,) * 3, generator=generator) for _ in range(2)])


def without_token(table: torch.Tensor, token: int) -> torch.Tensor:
    """A look-up table whose head lacks one token."""
    return table.index_fill(-1, torch.tensor([token]), -torch.inf)


class NoneBehindAFault(LogitsProcessor):
    """No token twice running; behind a text that breaks this, or that has ended, nothing is allowed at all."""

    specdec_pure = True

    def __init__(self, eos: int) -> None:
        self._eos = eos

    def __call__(self, ids, scores):
        new = ids[:, PROMPT.shape[1] :]
        dead = (ids[:, PROMPT.shape[1] - 1 : -1] == new).any(dim=1) | (new == self._eos).any(dim=1)
        return scores.scatter(1, ids[:, -1:], -torch.inf).masked_fill(dead[:, None], -torch.inf)


class NothingFrom(LogitsProcessor):
    """Allows nothing behind texts of ``new`` tokens."""

    specdec_pure = True

    def __init__(self, new: int) -> None:
        self.columns = PROMPT.shape[1] + new

    def __call__(self, ids, scores):
        return scores if ids.shape[1] < self.columns else torch.full_like(scores, -torch.inf)


def exact(target: TableModel, new: int, eos: int | None, processor: Any = None) -> dict[tuple[int, ...], float]:
    """The law of plain sampling, from the table; texts end at ``eos`` and are padded with 0."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(new):
        longer: dict[tuple[int, ...], float] = defaultdict(float)
        for text, chance in law.items():
            if eos is not None and eos in text:
                longer[(*text, 0)] += chance
                continue
            history = [*PROMPT[0].tolist(), *text]
            scores = target.table[history[-2], history[-1]].double()[None]
            if processor is not None:
                scores = processor(torch.tensor([history]), scores)
            row = scores[0].softmax(-1)
            for token in row.nonzero().flatten().tolist():
                longer[(*text, token)] += chance * float(row[token])
        law = longer
    return law


class Stubborn:
    """A proposer of one's own: draws from fixed rows, says so, and stops after a drawn last token.

    Whether it goes on is settled by tokens it has kept in its block: a non-anticipating rule.
    """

    def __init__(self, script_of: Callable[[], Script], vocabulary: int) -> None:
        self.script_of = script_of
        self.rows = [torch.arange(1.0, 1 + vocabulary), torch.arange(1.0, 1 + vocabulary).flip(0)]

    def propose(self, state, limits):
        tokens, rows = [], []
        for step in range(int(limits.max(initial=0))):
            row = self.rows[step % 2]
            tokens.append(self.script_of().decide(row))
            rows.append(row.log())
            if tokens[-1] == len(row) - 1:
                break
        if not tokens:
            return Proposal.empty(1, state.device)
        lengths = np.array([len(tokens)])
        return Proposal(torch.tensor([tokens]), lengths, torch.stack(rows)[None])


class AlwaysOne:
    """A proposer of one's own: guesses token 1, once a round."""

    def propose(self, state, limits):
        return Proposal.certain([[1][:limit] for limit in limits], state.device)


def law_error(
    rule: str,
    kind: str,
    guesses: int,
    seed: int = 0,
    eos: int | None = None,
    *,
    controlled: type[Adaptive] | None = None,
    processor: Any = None,
    size: tuple[int, int] | None = None,
) -> float:
    """Largest difference, over all texts, between the walked law and the exact one."""
    vocabulary, new = size or SIZES[guesses]
    target, draft = tables(seed, vocabulary)
    current: list[Script] = []
    pruned = TableModel(without_token(draft.table, vocabulary - 1))
    own = Stubborn(lambda: current[-1], vocabulary)
    drafts = {
        "self": target,
        "pruned": pruned,
        "sure": DraftModel(draft, confidence=0.5),
        "own": own,
        "mixture, own": Mixture(AlwaysOne(), own),
    }
    options: dict[str, Any] = {}
    if kind in PROPOSERS:
        drafts[kind], options = PROPOSERS[kind](draft, [EXPECTED[:new]])
    if processor is not None:
        options["logits_processor"] = [processor]
    layout = "columns"
    if kind in OWN_LAYERS:  # what they share with the target is its slots
        target, layout = layered(seed, vocabulary), "slots"
    # with a seed given no decision depends on the clock, so every walk meets the same ones
    gen = SpeculativeGenerator(
        target, drafts[kind], num_draft_tokens=guesses, verification=rule, layout=layout, seed=0
    )

    if controlled:  # with assumed costs, for the same reason
        gen._length = lambda *_: lambda *_: controlled(Assumed(0.15))

    def run(script: Script) -> tuple[int, ...]:
        current.append(script)
        gen._sampling = lambda *_: Scripted(rule, script)
        out = gen.generate(
            PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=new, do_sample=True, top_k=0,
            eos_token_id=eos, pad_token_id=0, **options,
        )  # fmt: skip
        text = out[0, PROMPT.shape[1] :].tolist()
        return tuple(text + [0] * (new - len(text)))

    law: dict[tuple[int, ...], float] = defaultdict(float)
    for chance, text in walk(run):
        law[text] += chance
    want = exact(target, new, eos, processor)
    assert gen.stats.draft_layout == "shared slots" or kind not in OWN_LAYERS
    return max(abs(law[text] - want.get(text, 0.0)) for text in law.keys() | want.keys())


# float32 rows come out of the models' processing, so the sum of many products is exact to about 1e-7
TOLERANCE = 1e-6


OURS = ("self", "pruned", "sure", "own", "mixture, own")
SEVERAL = ("cascade of three", "cascade of models")  # each level asks questions of its own


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(
    ("kind", "guesses"),
    [(k, n) for k in (*OURS, *PROPOSERS) for n in SIZES if n < 3 or k not in SEVERAL],
)
def test_law_of_whole_texts(rule, kind, guesses):
    assert law_error(rule, kind, guesses) < TOLERANCE


@pytest.mark.parametrize("rule", ["token", "block"])
def test_law_when_a_text_may_end_inside_a_block(rule):
    assert law_error(rule, "model", 2, seed=3, eos=2) < TOLERANCE


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("kind", ["model", "self", "own", "fallback"])
def test_law_when_nothing_is_allowed_behind_a_guess_that_does_not_count(rule, kind):
    assert law_error(rule, kind, 2, seed=3, eos=2, processor=NoneBehindAFault(2), size=(3, 4)) < TOLERANCE


def rows_behind_an_end_judged(monkeypatch):
    """What follows the end of a text must have a law as well."""
    monkeypatch.setattr(specdec.loop, "_void", lambda scores: None)


def test_a_round_that_asks_too_much_raises(monkeypatch):
    rows_behind_an_end_judged(monkeypatch)
    with pytest.raises(InvalidScores):
        law_error("block", "own", 2, seed=3, eos=2, processor=NoneBehindAFault(2), size=(3, 4))


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(
    "kind", ["model", "ngram", "own", "fallback", "layer skip", "mixture, model", "prediction, model"]
)
def test_law_with_the_controller(rule, kind):
    assert law_error(rule, kind, 3, controlled=Adaptive) < TOLERANCE


def test_law_of_a_cascade_with_the_controller():
    # one rule alone: a level asks many questions
    assert law_error("block", "cascade", 3, controlled=Adaptive) < TOLERANCE


class Reluctant(Adaptive):
    """Lets a draft begin in every second round only, and be fed the prompt where the text has got longer."""

    said: ClassVar[list[bool]] = []

    def begins(self, opening=None):
        super().begins(opening)
        self.asked = getattr(self, "asked", 0) + 1
        self.said.append(self.asked % 2 == 0)
        return self.said[-1]


@pytest.mark.parametrize(
    ("rule", "kind"),
    [*product(("token", "block"), ("model", "self", "layer skip", "mixture, model")), ("block", "cascade")],
)
def test_law_when_a_draft_may_not_begin_in_every_round(rule, kind):
    Reluctant.said.clear()
    assert law_error(rule, kind, 3, controlled=Reluctant) < TOLERANCE
    assert {True, False} <= set(Reluctant.said)


def error_of_two_rows(rule: str, *, cascaded: bool = False, stopped: bool = False) -> float:
    """The joint law of two rows: one guessed from a prediction and one by a draft model, or both by a cascade.

    The model of the cascade may begin in every second round. Where the texts are ``stopped`` by a criterion, a
    processor allows nothing behind it, so that a row that is ahead waits for the other one.
    """
    vocabulary, new = 2, 4 if cascaded else 3
    target, draft = tables(1, vocabulary)
    options = {"prediction": [EXPECTED[:new], None]}
    if cascaded:
        draft, options = PROPOSERS["cascade"](draft, [EXPECTED[:new]])
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=1, verification=rule, layout="columns", seed=0)
    if cascaded:
        gen._length = lambda *_: lambda *_: Reluctant(Assumed(0.15))
    ids = PROMPT.repeat(2, 1)
    options["max_new_tokens"] = new
    if stopped:
        nothing = NothingFrom(new)
        full = StoppingCriteriaList([lambda ids, _: torch.full((len(ids),), ids.shape[1] >= nothing.columns)])
        options |= {"max_new_tokens": new + 3, "logits_processor": [nothing], "stopping_criteria": full}

    def run(script: Script) -> tuple[int, ...]:
        gen._sampling = lambda *_: Scripted(rule, script)
        out = gen.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=0, **options
        )
        return tuple(out[:, PROMPT.shape[1] :].flatten().tolist())

    law: dict[tuple[int, ...], float] = defaultdict(float)
    for chance, texts in walk(run):
        law[texts] += chance
    row = exact(target, new, None)
    want = {(*one, *other): row[one] * row[other] for one in row for other in row}
    return max(abs(law[texts] - want.get(texts, 0.0)) for texts in law.keys() | want.keys())


@pytest.mark.parametrize("rule", ["token", "block"])
def test_joint_law_of_rows_with_guesses_of_two_kinds(rule):
    assert error_of_two_rows(rule) < TOLERANCE


@pytest.mark.parametrize("rule", ["token", "block"])
def test_joint_law_of_rows_behind_whose_end_nothing_is_allowed(rule):
    assert error_of_two_rows(rule, stopped=True) < TOLERANCE


def up_to_the_void_whatever_was_kept(monkeypatch):
    """Every text comes to the first place without a law, kept or not."""
    right = specdec.loop._up_to

    def all_the_way(void, guesses, accepted, next_token):
        return right(void, guesses, torch.full_like(accepted, guesses.shape[1]), next_token)

    monkeypatch.setattr(specdec.loop, "_up_to", all_the_way)


def drawn_instead_of_the_guess_before_the_void(monkeypatch):
    right = specdec.loop._up_to

    def last(void, guesses, accepted, next_token):
        kept, token = right(void, guesses, accepted, next_token)
        return kept, torch.where(kept < accepted, next_token.clamp(min=0), token)

    monkeypatch.setattr(specdec.loop, "_up_to", last)


@pytest.mark.parametrize(
    "mutant",
    [up_to_the_void_whatever_was_kept, drawn_instead_of_the_guess_before_the_void],
    ids=lambda mutant: mutant.__name__,
)
def test_a_wrong_end_before_a_place_without_a_law_breaks_the_law(mutant, monkeypatch):
    mutant(monkeypatch)
    assert error_of_two_rows("block", stopped=True) > 1e-3


def test_joint_law_of_rows_of_a_cascade_whose_model_may_not_begin_in_every_round():
    Reluctant.said.clear()
    assert error_of_two_rows("block", cascaded=True) < TOLERANCE
    assert {True, False} <= set(Reluctant.said)


def test_certain_guesses_shown_with_the_draft_rows_break_the_law(monkeypatch):
    """Two kinds of guesses in one proposal: the certain ones must not pass for drawn from the other's rows."""
    right = combined._rows

    def blurred(part, tokens, vocabulary):
        rows = right(part, tokens, vocabulary)
        return rows.clamp(min=-1.0) if part.logits is None else rows

    monkeypatch.setattr(combined, "_rows", blurred)
    assert error_of_two_rows("token") > 1e-3


# --- mutants: wrong loops that the walk must reject ---------------------------------------------


def rollback_skipped(monkeypatch):
    monkeypatch.setattr(specdec.scorer.Scorer, "rollback", lambda *_: None)


def rollback_one_short(monkeypatch):
    right = specdec.scorer.Scorer.rollback
    monkeypatch.setattr(
        specdec.scorer.Scorer,
        "rollback",
        lambda self, tokens, kept, live, final=None: right(self, tokens, kept + 1, live, final),
    )


def first_token_lost(monkeypatch):
    right = specdec.state.State.__init__

    def late(self, prompt, **kwargs):
        right(self, prompt, **kwargs)
        self.max_length -= 1

    monkeypatch.setattr(specdec.state.State, "__init__", late)


def draft_rows_shifted(monkeypatch):
    right = draft_model._Run.propose

    def shifted(self, state, limits):
        proposal = right(self, state, limits)
        if proposal.logits is None or proposal.logits.shape[1] < 2:
            return proposal
        return Proposal(proposal.tokens, proposal.lengths, proposal.logits.roll(1, dims=1))

    monkeypatch.setattr(draft_model._Run, "propose", shifted)


def draft_warped_after_drawing(monkeypatch):
    right = draft_model._Run.propose

    def warped(self, state, limits):
        proposal = right(self, state, limits)
        logits = None if proposal.logits is None else proposal.logits / 0.5
        return Proposal(proposal.tokens, proposal.lengths, logits)

    monkeypatch.setattr(draft_model._Run, "propose", warped)


def unsure_guess_dropped(monkeypatch):
    """The anticipating rule: a guess already drawn is not submitted because its own chance was low."""
    right = draft_model._Run.propose

    def dropped(self, state, limits):
        proposal = right(self, state, limits)
        if proposal.logits is None:
            return proposal
        chance = proposal.logits[0].softmax(-1).gather(-1, proposal.tokens[0, :, None])[:, 0]
        kept = int((chance >= 0.4).long().cumprod(0).sum())
        return Proposal(proposal.tokens, np.minimum(proposal.lengths, kept), proposal.logits)

    monkeypatch.setattr(draft_model._Run, "propose", dropped)


def stops_before_the_guess_it_looked_at(monkeypatch):
    """The anticipating controller: the guess whose chance ended the drafting is not submitted."""
    right = draft_model._Run.propose
    stopped = []
    goes_on = Adaptive.goes_on

    def noted(self, chances):
        stopped[:] = [not goes_on(self, chances) or float(chances[0]) < 0.5]
        return not stopped[0]

    def dropped(self, state, limits):
        stopped[:] = [False]
        proposal = right(self, state, limits)
        lengths = proposal.lengths - (stopped[0] and proposal.lengths > 0)
        return Proposal(proposal.tokens, lengths, proposal.logits)

    monkeypatch.setattr(Adaptive, "goes_on", noted)
    monkeypatch.setattr(draft_model._Run, "propose", dropped)


def cascade_rows_shifted(monkeypatch):
    """The target is shown the rows of the guesses before."""
    right = cascade._rows
    monkeypatch.setattr(cascade, "_rows", lambda *args: right(*args).roll(1, dims=1))


def cascade_residuals_for_rows(monkeypatch):
    """The target is shown what a replaced token was drawn from after the rejection, not the model's row."""
    right = State.commit

    def residual(self, proposal, accepted, next_token, scores, logits, states=None):
        round_ = right(self, proposal, accepted, next_token, scores, logits, states)
        if logits is not None or states is not None or self._settled is None or not proposal.tokens.shape[1]:
            return round_
        rows = scores.clone()
        for row, (kept, submitted) in enumerate(zip(accepted.tolist(), proposal.lengths, strict=True)):
            if kept < submitted:
                rows[row, kept, proposal.tokens[row, kept]] = -torch.inf
        return replace(round_, scores=rows)

    monkeypatch.setattr(State, "commit", residual)


def cascade_drops_what_was_replaced(monkeypatch):
    """The anticipating level: a token that had to be replaced is not submitted."""
    right = cascade._Level._round

    def dropped(self, text, left, state):
        round_, ended = right(self, text, left, state)
        refused = round_.accepted < round_.lengths
        return replace(round_, counts=round_.counts - refused), ended | refused

    monkeypatch.setattr(cascade._Level, "_round", dropped)


def cascade_keeps_every_guess(monkeypatch):
    """Lenience between the levels, with the rows of the model all the same."""
    right = Scripted.verify

    def lenient(self, scores, tokens, lengths, logits, positions):
        if logits is None and tokens.shape[1]:
            return lengths, right(self, scores, tokens, lengths, logits, positions)[1].clamp(min=0)
        return right(self, scores, tokens, lengths, logits, positions)

    monkeypatch.setattr(Scripted, "verify", lenient)


CASCADE_MUTANTS = [
    cascade_rows_shifted,
    cascade_residuals_for_rows,
    cascade_drops_what_was_replaced,
    cascade_keeps_every_guess,
]


@pytest.mark.parametrize("mutant", CASCADE_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_wrong_cascade_breaks_the_law(mutant, monkeypatch):
    mutant(monkeypatch)
    assert max(law_error("token", "cascade", 2, seed) for seed in range(3)) > 1e-3


def hands_down_with_rows_of_the_model(monkeypatch):
    """What is below guesses for the target, and the target is shown the model's distribution."""
    right = cascade._Level.propose

    def blurred(self, state, limits):
        proposal = right(self, state, limits)
        if not self._hands_down or not proposal.tokens.shape[1]:
            return proposal
        rows = torch.zeros((*proposal.tokens.shape, state.vocabulary))
        rows.scatter_(-1, proposal.tokens[..., None], 1.0)
        return Proposal(proposal.tokens, proposal.lengths, rows)

    monkeypatch.setattr(cascade._Level, "propose", blurred)


def hands_down_where_the_model_drew_otherwise(monkeypatch):
    """The anticipating choice: the model draws first, and where it did not draw token 1 what is below guesses."""
    right = cascade._Level.propose

    def looking(self, state, limits):
        proposal = right(self, state, limits)
        if self._hands_down or not proposal.lengths.any() or int(proposal.tokens[0, 0]) == 1:
            return proposal
        self._hands_down = True
        return self._below.propose(state, limits)

    monkeypatch.setattr(cascade._Level, "propose", looking)


@pytest.mark.parametrize(
    "mutant",
    [hands_down_with_rows_of_the_model, hands_down_where_the_model_drew_otherwise],
    ids=lambda mutant: mutant.__name__,
)
def test_a_cascade_that_hands_down_wrongly_breaks_the_law(mutant, monkeypatch):
    mutant(monkeypatch)
    assert law_error("block", "cascade", 3, controlled=Reluctant) > 1e-3


def mixture_looks_at_what_was_drawn(monkeypatch):
    """Takes the model's guess where it likes the token that was drawn, else the other proposer's."""

    def liked(self, state, drawn):
        return int(drawn.tokens[0, 0]) == 1

    monkeypatch.setattr(mixture._Run, "propose", _picking(liked))


def mixture_foresees_the_target(monkeypatch):
    """Takes the model's guess where the target will like it, in the same round."""
    target, _ = tables(0, SIZES[2][0])

    def liked(self, state, drawn):
        last = state.host_tokens[0, state.lengths[0] - 2 : state.lengths[0]]
        row = target.table[int(last[0]), int(last[1])].softmax(-1)
        return float(row[drawn.tokens[0, 0]]) > 0.5

    monkeypatch.setattr(mixture._Run, "propose", _picking(liked))


def mixture_shows_rows_of_another(monkeypatch):
    """A guess that was not drawn, shown with the rows of the model that was not chosen."""
    right = mixture._Run.propose

    def blurred(self, state, limits):
        proposal = right(self, state, limits)
        rows = self._parts[1].propose(state, limits).logits if proposal.logits is None else proposal.logits
        if rows is None or rows.shape[1] < proposal.tokens.shape[1]:
            return proposal
        return Proposal(proposal.tokens, proposal.lengths, rows[:, : proposal.tokens.shape[1]])

    monkeypatch.setattr(mixture._Run, "propose", blurred)


def _picking(liked):
    def propose(self, state, limits):
        other, model = self._parts[:2]
        certain, drawn = self._proposals[:2] = other.propose(state, limits), model.propose(state, limits)
        taken = int(not drawn.lengths.any() or liked(self, state, drawn))
        self._choice = np.full(len(limits), taken)
        return (certain, drawn)[taken]

    return propose


@pytest.mark.parametrize(
    "mutant",
    [mixture_looks_at_what_was_drawn, mixture_foresees_the_target, mixture_shows_rows_of_another],
    ids=lambda mutant: mutant.__name__,
)
def test_a_wrong_mixture_breaks_the_law(mutant, monkeypatch):
    mutant(monkeypatch)
    assert law_error("token", "mixture, model", 2) > 1e-3


def argmax_with_softmax_rows(monkeypatch):
    right = Scripted.guess
    monkeypatch.setattr(Scripted, "guess", lambda self, scores, _: scores.argmax(-1))
    assert right is not Scripted.guess


def bonus_from_the_row_before(monkeypatch):
    right = Scripted.verify

    def stale(self, scores, tokens, lengths, logits, positions):
        scores = scores.clone()
        scores[:, -1] = scores[:, 0]
        return right(self, scores, tokens, lengths, logits, positions)

    monkeypatch.setattr(Scripted, "verify", stale)


LOOP_MUTANTS = [
    rollback_skipped,
    rollback_one_short,
    first_token_lost,
    draft_rows_shifted,
    draft_warped_after_drawing,
    unsure_guess_dropped,
    argmax_with_softmax_rows,
    bonus_from_the_row_before,
]


def test_a_controller_that_anticipates_breaks_the_law(monkeypatch):
    stops_before_the_guess_it_looked_at(monkeypatch)
    assert law_error("token", "model", 3, controlled=Adaptive) > 1e-3


@pytest.mark.parametrize("mutant", LOOP_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_wrong_loop_breaks_the_law(mutant, monkeypatch):
    mutant(monkeypatch)
    try:
        error = law_error("token", "model", 2)
    except RuntimeError as fault:  # it breaks something sooner than the law
        if "not forgotten" in str(fault):
            return
        raise
    assert error > 1e-3


def shared_one_column_too_early(monkeypatch):
    """The draft begins at a column that the target does not write again."""
    right = Slots.stand_at
    monkeypatch.setattr(Slots, "stand_at", lambda self, columns, live: right(self, columns - 1, live))


def drafted_columns_taken_for_scored_ones(monkeypatch):
    """The target goes on behind what the draft wrote, instead of writing there itself."""
    right = layers._InSlots.propose

    def propose(self, state, limits):
        proposal = right(self, state, limits)
        self._scorer.layout._starts = self._slots._starts.copy()
        return proposal

    monkeypatch.setattr(layers._InSlots, "propose", propose)


def left_out_layers_only(monkeypatch):
    """Only the layers that the draft lacks go through the target's pass; the others keep what the draft left."""
    right = SlotLayer.update
    drafting = []
    propose = layers._InSlots.propose

    def proposing(self, state, limits):
        drafting.append(self._slots._cache.layers)
        return propose(self, state, limits)

    def update(self, keys, values, *args, **kwargs):
        held = self.keys.clone(), self.values.clone()
        right(self, keys, values)
        if drafting and self in drafting[-1] and keys.shape[-2] > 1:
            self.keys, self.values = held
        return self.keys, self.values

    monkeypatch.setattr(layers._InSlots, "propose", proposing)
    monkeypatch.setattr(SlotLayer, "update", update)


@pytest.mark.parametrize(
    "mutant", [shared_one_column_too_early, drafted_columns_taken_for_scored_ones, left_out_layers_only]
)
def test_a_draft_that_shares_the_wrong_slots_breaks_the_law(mutant, monkeypatch):
    mutant(monkeypatch)
    assert law_error("token", "layer skip", 2) > 1e-3


# --- shared noise --------------------------------------------------------------------------------


def test_coupled_equals_the_plain_loop_for_ten_thousand_noise_draws():
    """Index form on random rows: what coupled verification emits is what plain decoding draws."""
    generator = torch.Generator().manual_seed(0)
    rows, guesses, vocabulary = 10_000, 3, 7
    from specdec.verify import keyed_gumbel

    scores = torch.randn(rows, guesses + 1, vocabulary, generator=generator, dtype=torch.float64)
    draft = scores[:, :-1] + torch.randn(rows, guesses, vocabulary, generator=generator, dtype=torch.float64)
    noise = keyed_gumbel(torch.arange(rows), torch.arange(guesses + 1).expand(rows, -1), vocabulary, torch.float64)
    own = choose(scores, noise)
    tokens = choose(draft, noise[:, :-1])
    accepted, next_token = match(own, tokens, torch.full((rows,), guesses))
    assert 0.2 < float(accepted.float().mean()) / guesses < 0.9  # both outcomes are met
    for row in range(guesses + 1):
        emitted = torch.where(row < accepted, torch.nn.functional.pad(tokens, (0, 1))[:, row], next_token)
        assert torch.equal(emitted[row <= accepted], own[row <= accepted, row])
