"""The law of whole texts when the draft has another vocabulary: every path, walked through the front door.

Tokenizers of single letters, look-up-table models, the shipped map between the vocabularies. All chances are
taken in float64 from the rows that are handed over, so what is left of the error is rounding.
"""

from collections import defaultdict

import pytest
import torch

from specdec import InvalidScores, Proposal, SpeculativeGenerator
from specdec.length.fixed import Fixed
from specdec.proposers import translated
from specdec.proposers.translated import TranslatedDraft
from specdec.testing import TableModel

from ..parrot import characters
from .test_loop_law import PROMPT, Scripted, exact, walk

TOLERANCE = 1e-10
# target letters, draft letters, guesses, new tokens
PAIRS = {
    "draft knows more": ("ab", "cxbya", 2, 4),
    "draft knows less": ("abc", "ca", 1, 3),
    "each knows more": ("abc", "cxa", 1, 3),
    "three guesses": ("ab", "xba", 3, 5),
}


class Precise(Scripted):
    """Guesses with the chances of the very row that is handed over, in float64."""

    def guess(self, scores, positions):
        return torch.tensor([[self.script.decide(scores[0, 0].double().softmax(-1))]])


def table(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return TableModel(torch.randn((size,) * 3, generator=generator) * 1.5)


def law_error(pair, rule, method, *, eos=None, confidence=None, sampling=Precise):
    """Largest difference between the walked law and the target's, over all texts."""
    ours, theirs, guesses, new = PAIRS[pair]
    target = table(len(ours), 0)
    draft = TranslatedDraft(
        table(len(theirs), 1), characters(ours), characters(theirs), method=method, confidence=confidence
    )
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=guesses, verification=rule, layout="columns")

    def run(script):
        gen._sampling = lambda *_: sampling(rule, script)
        out = gen.generate(PROMPT, max_new_tokens=new, do_sample=True, top_k=0, eos_token_id=eos, pad_token_id=0)
        text = out[0, PROMPT.shape[1] :].tolist()
        assert gen.stats.draft_layout == "columns" or not gen.stats.drafted
        return tuple(text + [0] * (new - len(text)))

    law = defaultdict(float)
    for chance, text in walk(run):
        law[text] += chance
    want = exact(target, new, eos)
    return max(abs(law[text] - want.get(text, 0.0)) for text in law.keys() | want.keys())


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("method", ["tokens", "strings"])
@pytest.mark.parametrize("pair", PAIRS)
def test_law_of_whole_texts(pair, method, rule):
    assert law_error(pair, rule, method) < TOLERANCE


@pytest.mark.parametrize("method", ["tokens", "strings"])
def test_law_without_stopping_where_unsure(method):
    assert law_error("draft knows more", "block", method, confidence=0) < TOLERANCE


def test_law_when_a_row_stops_behind_a_guess_that_was_unlikely(monkeypatch):
    """By its confidence, or because the call's draft length has had enough."""
    assert law_error("draft knows more", "token", "tokens", confidence=0.6) < TOLERANCE
    monkeypatch.setattr(Fixed, "goes_on", lambda self, chances: float(chances.max()) >= 0.4)
    assert law_error("draft knows more", "token", "tokens") < TOLERANCE


@pytest.mark.parametrize("method", ["tokens", "strings"])
def test_law_when_a_text_may_end_inside_a_block(method):
    assert law_error("draft knows more", "block", method, eos=1) < TOLERANCE


def test_law_when_the_map_is_wrong_but_one(monkeypatch):
    """Pairs that stand for different letters cost guesses, never the law: drawn and recorded rows are one."""
    right = translated._Tokens._map

    def shifted(self, *sizes):
        right(self, *sizes)
        self._ids = (self._ids[0], self._ids[1].roll(1))

    monkeypatch.setattr(translated._Tokens, "_map", shifted)
    assert law_error("each knows more", "token", "tokens") < TOLERANCE


# --- mutants: wrong translations that the walk must reject ---------------------------------------


def spoilt(change):
    """A mutant that hands over ``change(logits)`` for rows that guesses were drawn from."""

    def mutant(monkeypatch):
        right = translated._Tokens.propose

        def wrong(self, state, limits):
            proposal = right(self, state, limits)
            if proposal.logits is None:
                return proposal
            return Proposal(proposal.tokens, proposal.lengths, change(proposal.logits, self))

        monkeypatch.setattr(translated._Tokens, "propose", wrong)

    mutant.__name__ = change.__name__
    return mutant


def rows_off_by_one(logits, _):
    """The scores written back in another order than they were taken out: a bug that was shipped elsewhere."""
    return logits.roll(1, dims=-1)


def rows_of_the_order_of_the_dictionary(logits, run):
    """The pairs in another order on the way in than on the way out."""
    ours = run._ids[1]
    out = logits.clone()
    out[..., ours] = logits[..., ours.flip(0)]
    return out


def not_renormalised(logits, run):
    """What the draft gives to ids that are not shared goes to an id of the target that it cannot guess."""
    chances = logits.softmax(-1) * 0.6
    lost = (chances == 0).to(chances.dtype)
    return (chances + 0.4 * lost / lost.sum(-1, keepdim=True)).log()


def warped_after_drawing(logits, _):
    return logits / 0.5


def argmax_with_softmax_rows(monkeypatch):
    monkeypatch.setattr(Precise, "guess", lambda self, scores, _: scores.argmax(-1))


def unsure_guess_dropped(monkeypatch):
    """The anticipating rule: a drawn guess is not submitted because its own chance was low."""
    right = translated._Tokens.propose

    def wrong(self, state, limits):
        proposal = right(self, state, limits)
        if proposal.logits is None:
            return proposal
        chance = proposal.logits[0].softmax(-1).gather(-1, proposal.tokens[0, :, None])[:, 0]
        kept = int((chance >= 0.4).long().cumprod(0).sum())
        return Proposal(proposal.tokens, proposal.lengths.clip(max=kept), proposal.logits)

    monkeypatch.setattr(translated._Tokens, "propose", wrong)


MUTANTS = [
    spoilt(rows_off_by_one),
    spoilt(rows_of_the_order_of_the_dictionary),
    spoilt(not_renormalised),
    spoilt(warped_after_drawing),
    argmax_with_softmax_rows,
    unsure_guess_dropped,
]


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_wrong_translation_breaks_the_law(mutant, rule, monkeypatch):
    mutant(monkeypatch)
    try:
        error = max(law_error(pair, rule, "tokens") for pair in ("each knows more", "draft knows more"))
    except InvalidScores:
        return  # a guess that its own row forbids is found out sooner than the law
    assert error > 1e-3
