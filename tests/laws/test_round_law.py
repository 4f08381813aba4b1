"""The shipped verifier has the target's law: every outcome of a round, error below 1e-10."""

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from specdec.verify import (
    block_acceptance,
    longest_success,
    residual_weights,
    token_acceptance,
    verify,
)
from specdec.verify.reference import verify_reference

from .law import FAMILIES, Candidate, Kind, Rows, World, blocks, cells, examine, repeat, world

RULES = ("token", "block")
KINDS = ("sampled", "certain", "unknown")


def shipped(rule: str, *, reference: bool = False) -> Candidate:
    """What users get. The pure half tells where to look; all decisions are those of `verify`.

    On a CPU that is the lean form; other devices get the fused one or the reference.
    """

    def decide(rows: Rows, uniforms: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.cat([uniforms, noise[:, None]], dim=1)
        if reference:
            return verify_reference(*rows, rule, noise)
        return verify(*rows, rule=rule, uniforms=noise)

    def chances(rows: Rows) -> tuple[Tensor, Tensor]:
        target, tokens, lengths, draft = rows
        if rule == "block" and draft is not None:
            return block_acceptance(target.softmax(-1), tokens, lengths, draft.softmax(-1))
        draft_probs = None if draft is None else draft.softmax(-1)
        acceptance = token_acceptance(target.softmax(-1), tokens, lengths, draft_probs)
        return acceptance, torch.ones(target.shape[:2], dtype=target.dtype)

    def weights(rows: Rows, accepted: Tensor) -> Tensor:
        target, tokens, lengths, draft = rows
        draft_probs = None if draft is None else draft.softmax(-1)
        scales = chances(rows)[1]
        return residual_weights(target.softmax(-1), tokens, lengths, draft_probs, accepted, scales)

    return Candidate(decide, lambda rows: chances(rows)[0], weights)


def worlds(seeds: int = 1) -> list[World]:
    sizes = ((4, 1), (4, 2), (3, 3))
    return [
        world(family, seed, vocabulary=vocabulary, guesses=guesses, ragged=ragged)
        for family, (vocabulary, guesses), ragged, seed in product(FAMILIES, sizes, (False, True), range(seeds))
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_law_of_a_round(rule: str, kind: Kind) -> None:
    for number, place in enumerate(worlds(seeds=3)):
        findings = examine(shipped(rule), place, kind)
        assert findings.lossless, (number, findings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_law_of_the_reference(rule: str, kind: Kind) -> None:
    for number, place in enumerate(worlds()):
        findings = examine(shipped(rule, reference=True), place, kind)
        assert findings.lossless, (number, findings)


@pytest.mark.parametrize("rule", RULES)
def test_law_of_a_longer_round(rule: str) -> None:
    for family in ("free", "holes"):
        place = world(family, 7, vocabulary=4, guesses=3, ragged=True)
        findings = examine(shipped(rule), place, "sampled")
        assert findings.lossless, findings


@pytest.mark.parametrize("rule", RULES)
def test_no_guesses_is_plain_sampling(rule: str) -> None:
    place = world("free", 0, vocabulary=4, guesses=1, ragged=False)
    target = place.target[0].log()[None]
    rows: Rows = (target, torch.empty(1, 0, dtype=torch.int64), torch.tensor([0]), target[:, :0])
    weights = shipped(rule).weights(rows, torch.tensor([0]))
    torch.testing.assert_close(weights, place.target[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_block_never_keeps_fewer_than_token(kind: Kind) -> None:
    gained = 0.0
    for place in worlds():
        token, block = (examine(shipped(rule), place, kind).expected_accepted for rule in RULES)
        assert block >= token - 1e-12
        gained += block - token
    assert (gained > 0.01) == (kind == "sampled")  # certain guesses leave nothing to gain


def test_block_keeps_as_many_as_its_paper_says() -> None:
    """P(at least i kept | X) = c_i, arXiv 2403.10444."""
    for place in worlds():
        rows, _ = blocks(place, "sampled")
        target, tokens, lengths, draft = rows
        assert draft is not None
        acceptance, scales = block_acceptance(target.softmax(-1), tokens, lengths, draft.softmax(-1))
        # Averaged over what is guessed after X_1 .. X_i, so compare on whole prefixes.
        _, chance = blocks(place, "sampled")
        uniforms, volume = cells(acceptance)
        accepted = longest_success((uniforms < acceptance[:, None]).flatten(0, 1))
        accepted = accepted.reshape(uniforms.shape[:2])
        for least in range(1, place.guesses + 1):
            real = lengths >= least
            kept = (volume * (accepted >= least)).sum(1)
            reached, promised = chance * kept * real, chance * scales[:, least] * real
            torch.testing.assert_close(reached.sum(), promised.sum(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_noise_is_compared_strictly(rule: str, kind: Kind) -> None:
    """A uniform equal to the acceptance refuses; the next smaller number keeps."""
    candidate = shipped(rule)
    for family in FAMILIES:
        rows, _ = blocks(world(family, 3, vocabulary=3, guesses=2, ragged=True), kind)
        acceptance = candidate.thresholds(rows)
        calm = torch.full((len(acceptance),), 0.5, dtype=torch.float64)
        nothing, _ = candidate.verify(rows, acceptance, calm)
        assert (nothing == 0).all()
        below = torch.nextafter(acceptance, torch.tensor(0.0, dtype=torch.float64))
        accepted, _ = candidate.verify(rows, below, calm)
        places = torch.arange(1, 3)
        keeps = acceptance > 0
        if rule == "token" or kind == "unknown":
            expected = keeps.long().cumprod(1).sum(1)
        else:
            expected = (keeps * places).amax(1)
        assert torch.equal(accepted, expected)


@pytest.mark.parametrize("rule", RULES)
def test_every_token_with_weight_can_be_forced_and_no_other(rule: str) -> None:
    candidate = shipped(rule)
    rows, _ = blocks(world("holes", 5, vocabulary=4, guesses=2, ragged=True), "sampled")
    uniforms, _ = cells(candidate.thresholds(rows))
    rows, uniforms = repeat(rows, uniforms.shape[1]), uniforms.flatten(0, 1)
    calm = torch.full((len(uniforms),), 0.5, dtype=torch.float64)
    accepted, _ = candidate.verify(rows, uniforms, calm)
    weights = candidate.weights(rows, accepted)
    share = weights / weights.sum(1, keepdim=True)
    ends, forced = share.cumsum(1), 0
    for token, place in product(range(4), (1e-6, 0.5, 1 - 1e-6)):
        noise = (ends[:, token] - place * share[:, token]).clamp(0, 1 - 1e-15)
        _, next_token = candidate.verify(rows, uniforms, noise)
        can = share[:, token] > 1e-9
        forced += int(can.sum())
        assert (next_token[can] == token).all()
        assert (next_token[weights[:, token] == 0] != token).all()
    assert forced >= 3 * len(rows[1])  # every row has a token at least


def test_a_second_guess_does_not_change_the_first_token() -> None:
    """The law of the first token is one row of the target, for 0, 1 and 2 guesses in one batch."""
    place = world("free", 11, vocabulary=3, guesses=2, ragged=False)
    rows, chance = blocks(place, "sampled")
    target, tokens, _, draft = rows
    for (rule, length), _ in pairwise([*product(RULES, range(3)), ("", 0)]):
        lengths = torch.full((len(tokens),), length)
        candidate = shipped(rule)
        cut: Rows = (target, tokens, lengths, draft)
        uniforms, volume = cells(candidate.thresholds(cut))
        many = repeat(cut, uniforms.shape[1])
        uniforms = uniforms.flatten(0, 1)
        accepted, _ = candidate.verify(many, uniforms, torch.full((len(uniforms),), 0.5).double())
        weights = candidate.weights(many, accepted)
        weights = weights / weights.sum(-1, keepdim=True)
        kept = torch.nn.functional.one_hot(many[1][:, 0], 3).double()
        first = torch.where((accepted > 0)[:, None], kept, weights)
        mass = (chance[:, None] * volume).reshape(-1)
        law = (mass[:, None] * first).sum(0)
        torch.testing.assert_close(law, place.target[0][0], rtol=0, atol=1e-12)
