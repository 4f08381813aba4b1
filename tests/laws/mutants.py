"""Wrong verifiers. Most are real bugs of published implementations; the laws must reject every one.

A verifier is taken apart into `Parts`; put together again unchanged it is lossless (a test says
so), and a mutant replaces one part. All work on probabilities, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.verify import (
    block_acceptance,
    draw,
    leading_successes,
    longest_success,
    residual_weights,
    token_acceptance,
)

from .law import Candidate, Rows

Seen = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Rows as probabilities: target (B, K + 1, V), tokens (B, K), lengths (B,), draft or None."""


def _acceptance(seen: Seen, rule: str) -> tuple[Tensor, Tensor]:
    target, tokens, lengths, draft = seen
    if rule == "block" and draft is not None:
        return block_acceptance(target, tokens, lengths, draft)
    return token_acceptance(*seen), target.new_ones(target.shape[:2])


def _keep(successes: Tensor, seen: Seen, rule: str) -> Tensor:
    block = rule == "block" and seen[3] is not None
    return longest_success(successes) if block else leading_successes(successes)


def _weights(seen: Seen, accepted: Tensor, scales: Tensor) -> Tensor:
    return residual_weights(*seen, accepted, scales)


def _same(seen: Seen) -> Seen:
    return seen


def _draw(weights: Tensor, noise: Tensor) -> Tensor:
    return draw(weights, noise)


def _compare(uniforms: Tensor, acceptance: Tensor) -> Tensor:
    return uniforms < acceptance


@dataclass(frozen=True)
class Parts:
    """A verifier in parts; the defaults are the shipped ones."""

    look: Callable[[Seen], Seen] = _same
    acceptance: Callable[[Seen, str], tuple[Tensor, Tensor]] = _acceptance
    compare: Callable[[Tensor, Tensor], Tensor] = _compare
    keep: Callable[[Tensor, Seen, str], Tensor] = _keep
    weights: Callable[[Seen, Tensor, Tensor], Tensor] = _weights
    draw: Callable[[Tensor, Tensor], Tensor] = _draw

    def assembled(self, rule: str) -> Candidate:
        def seen(rows: Rows) -> Seen:
            target, tokens, lengths, draft = rows
            return self.look((target.softmax(-1), tokens, lengths, None if draft is None else draft.softmax(-1)))

        def verify(rows: Rows, uniforms: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            view = seen(rows)
            acceptance, scales = self.acceptance(view, rule)
            accepted = self.keep(self.compare(uniforms, acceptance), view, rule)
            return accepted, self.draw(self.weights(view, accepted, scales), noise)

        def thresholds(rows: Rows) -> Tensor:
            return self.acceptance(seen(rows), rule)[0].nan_to_num()

        def weights(rows: Rows, accepted: Tensor) -> Tensor:
            view = seen(rows)
            return self.weights(view, accepted, self.acceptance(view, rule)[1])

        return Candidate(verify, thresholds, weights)


# --- what is kept ------------------------------------------------------------------------------


def always_accepts(seen: Seen, rule: str) -> tuple[Tensor, Tensor]:
    acceptance, scales = _acceptance(seen, rule)
    real = torch.arange(acceptance.shape[1]) < seen[2][:, None]
    return torch.where(real, 1.0, acceptance), scales


def swapped(seen: Seen, rule: str) -> tuple[Tensor, Tensor]:
    """Papers differ on which of p and q is the target."""
    target, tokens, lengths, draft = seen
    if draft is None:
        return _acceptance(seen, rule)
    ours = torch.cat([draft, target[:, -1:]], 1)
    return _acceptance((ours, tokens, lengths, target[:, :-1]), rule)


def lenient(seen: Seen, rule: str) -> tuple[Tensor, Tensor]:
    """The "lenience" of several code bases: guesses are kept somewhat more often than is exact."""
    acceptance, scales = _acceptance(seen, rule)
    return (acceptance / 0.8).clamp(max=1), scales


def forgets_draft(seen: Seen, rule: str) -> tuple[Tensor, Tensor]:
    """Keep with probability p(x), which is right only for a guess without probabilities."""
    target, tokens, lengths, _ = seen
    return _acceptance((target, tokens, lengths, None), rule)


def token_chances(seen: Seen, rule: str) -> tuple[Tensor, Tensor]:
    """The token rule's acceptance under the block rule's selection."""
    return token_acceptance(*seen), _acceptance(seen, rule)[1]


def token_scales(seen: Seen, rule: str) -> tuple[Tensor, Tensor]:
    """The block rule with the token rule's residual."""
    acceptance, scales = _acceptance(seen, rule)
    return acceptance, torch.ones_like(scales)


def capped_once(seen: Seen, rule: str) -> tuple[Tensor, Tensor]:
    """The block rule with the product of ratios capped at the end, not after every step."""
    target, tokens, _, draft = seen
    if draft is None or rule != "block":
        return _acceptance(seen, rule)
    inside = tokens.clamp(0, target.shape[-1] - 1)[..., None]
    ratio = (target[:, :-1].gather(-1, inside) / draft.gather(-1, inside)).squeeze(-1)
    scales = torch.cat([ratio.new_ones(len(ratio), 1), ratio.cumprod(1).clamp(max=1)], 1)
    return _acceptance_from(seen, scales)


def no_last_place(seen: Seen, rule: str) -> tuple[Tensor, Tensor]:
    """The block rule that takes the end of the padded block for the end of a row."""
    target, tokens, lengths, draft = seen
    if draft is None or rule != "block":
        return _acceptance(seen, rule)
    full, filled = torch.full_like(lengths, draft.shape[1]), draft.nan_to_num(1 / draft.shape[-1])
    scales = _acceptance(seen, rule)[1]
    acceptance, _ = _acceptance_from((target, tokens, full, filled), scales)
    return torch.where(torch.arange(draft.shape[1]) < lengths[:, None], acceptance, 0), scales


def _acceptance_from(seen: Seen, scales: Tensor) -> tuple[Tensor, Tensor]:
    target, _, lengths, draft = seen
    assert draft is not None
    mass = (scales[:, 1:-1, None] * target[:, 1:-1] - draft[:, 1:]).clamp(min=0).sum(-1)
    room = mass + 1 - scales[:, 1:-1]
    inner = torch.where(room > 0, mass / room, 1)
    place = torch.arange(draft.shape[1])
    chance = torch.where(place == lengths[:, None] - 1, scales[:, 1:], torch.cat([inner, scales[:, -1:]], 1))
    return torch.where(place < lengths[:, None], chance, 0), scales


def first_failure_ends(successes: Tensor, seen: Seen, rule: str) -> Tensor:
    """The block rule that stops at the first failure, as the token rule does."""
    return leading_successes(successes)


def longest_wins(successes: Tensor, seen: Seen, rule: str) -> Tensor:
    """The token rule that goes on after a failure."""
    return longest_success(successes)


def loses_the_bonus(successes: Tensor, seen: Seen, rule: str) -> Tensor:
    """When all are kept, the last one is given back and replaced."""
    return torch.minimum(_keep(successes, seen, rule), (seen[2] - 1).clamp(min=0))


def not_strict(uniforms: Tensor, acceptance: Tensor) -> Tensor:
    """`u <= p/q`: lets a forbidden token pass when u is exactly 0."""
    return uniforms <= acceptance


def reversed_test(uniforms: Tensor, acceptance: Tensor) -> Tensor:
    return (uniforms > acceptance) & (acceptance > 0)


def reseeded(uniforms: Tensor, acceptance: Tensor) -> Tensor:
    """The generator is seeded again for every guess, so that all of them see the same number."""
    return uniforms[:, :1] < acceptance


# --- what is drawn after it --------------------------------------------------------------------


def target_for_residual(seen: Seen, accepted: Tensor, scales: Tensor) -> Tensor:
    """After a rejection, draw from p itself."""
    target = seen[0]
    return target[torch.arange(len(target)), accepted]


def unclipped(seen: Seen, accepted: Tensor, scales: Tensor) -> Tensor:
    """|p - q| in place of (p - q)+."""
    target, _, lengths, draft = seen
    if draft is None:
        return _weights(seen, accepted, scales)
    row = torch.arange(len(target))
    bonus = target[row, accepted]
    refused = accepted.clamp(max=draft.shape[1] - 1)
    difference = (scales[row, accepted, None] * bonus - draft[row, refused]).abs()
    return torch.where((accepted < lengths)[:, None], difference, bonus)


def bonus_from_draft(seen: Seen, accepted: Tensor, scales: Tensor) -> Tensor:
    """When all are kept, the extra token comes from the draft's last row."""
    _, _, lengths, draft = seen
    weights = _weights(seen, accepted, scales)
    if draft is None:
        return weights
    last = draft[torch.arange(len(draft)), (lengths - 1).clamp(min=0)]
    return torch.where(((accepted == lengths) & (lengths > 0))[:, None], last, weights)


def residual_one_early(seen: Seen, accepted: Tensor, scales: Tensor) -> Tensor:
    """The residual of the place before the rejected guess."""
    return _weights(seen, (accepted - 1).clamp(min=0), scales)


def residual_when_all_kept(seen: Seen, accepted: Tensor, scales: Tensor) -> Tensor:
    """Takes a row that guessed fewer tokens than the batch for one with a rejection."""
    target, tokens, lengths, draft = seen
    full = torch.full_like(lengths, tokens.shape[1])
    filled = None if draft is None else draft.nan_to_num(1 / target.shape[-1])
    return _weights((target, tokens, full, filled), accepted, scales)


def argmax_of_residual(weights: Tensor, noise: Tensor) -> Tensor:
    """The replacement is the likeliest token, not a draw."""
    return weights.argmax(-1)


def draw_without_total(weights: Tensor, noise: Tensor) -> Tensor:
    """The residual taken as if it summed to 1."""
    sums = weights.cumsum(-1)
    return torch.searchsorted(sums, noise[:, None] + 0, right=True).squeeze(-1).clamp(max=weights.shape[-1] - 1)


def draw_one_late(weights: Tensor, noise: Tensor) -> Tensor:
    """The token after the one whose share holds the noise."""
    return (draw(weights, noise) + 1) % weights.shape[-1]


def draw_not_strict(weights: Tensor, noise: Tensor) -> Tensor:
    """Noise of exactly 0 falls to the first token, whatever its weight."""
    sums = weights.cumsum(-1)
    return torch.searchsorted(sums, noise[:, None] * sums[:, -1:]).squeeze(-1)


def draw_past_the_end(weights: Tensor, noise: Tensor) -> Tensor:
    """Noise that rounds up to the total falls to the last id, whatever its weight."""
    sums = weights.cumsum(-1)
    at = torch.searchsorted(sums, (noise * (1 + 1e-12))[:, None] * sums[:, -1:], right=True)
    return at.squeeze(-1).clamp(max=weights.shape[-1] - 1)


# --- what is looked at -------------------------------------------------------------------------


def softmax_for_argmax(seen: Seen) -> Seen:
    """A guess that was the draft's argmax, handed over with the draft's softmax."""
    target, tokens, lengths, draft = seen
    if draft is not None:
        draft = 0.7 * draft + 0.3 / draft.shape[-1]
    return target, tokens, lengths, draft


def warped_twice(seen: Seen) -> Seen:
    """The draft's temperature applied once in drawing and once more in the rows handed over."""
    target, tokens, lengths, draft = seen
    if draft is not None:
        draft = draft**1.5 / (draft**1.5).sum(-1, keepdim=True)
    return target, tokens, lengths, draft


def draft_row_late(seen: Seen) -> Seen:
    """Every guess judged against the draft's row after the right one."""
    target, tokens, lengths, draft = seen
    if draft is not None:
        late = torch.cat([draft[:, 1:], draft[:, -1:]], 1)
        draft = torch.where(late.isnan(), draft, late)
    return target, tokens, lengths, draft


def target_row_late(seen: Seen) -> Seen:
    """Every guess judged against the target's row after the right one."""
    target, tokens, lengths, draft = seen
    late = torch.cat([target[:, 1:], target[:, -1:]], 1)
    return torch.where(late.isnan(), target, late), tokens, lengths, draft


def ignores_lengths(seen: Seen) -> Seen:
    """Padding is judged as if it had been guessed."""
    target, tokens, lengths, draft = seen
    filled = None if draft is None else draft.nan_to_num(1 / target.shape[-1])
    target = target.nan_to_num(1 / target.shape[-1])
    inside = tokens.clamp(0, target.shape[-1] - 1)
    return target, inside, torch.full_like(lengths, tokens.shape[1]), filled


def drops_unlikely_guesses(seen: Seen) -> Seen:
    """Ends the block before a guess that the draft itself found unlikely, after having drawn it."""
    target, tokens, lengths, draft = seen
    if draft is None:
        return seen
    inside = tokens.clamp(0, draft.shape[-1] - 1)[..., None]
    sure = draft.gather(-1, inside).squeeze(-1) >= 0.35
    return target, tokens, torch.minimum(lengths, leading_successes(sure)), draft


def drops_disliked_guesses(seen: Seen) -> Seen:
    """Ends the block before a guess that the target finds unlikely."""
    target, tokens, lengths, draft = seen
    inside = tokens.clamp(0, target.shape[-1] - 1)[..., None]
    liked = target[:, :-1].gather(-1, inside).squeeze(-1) >= 0.2
    return target, tokens, torch.minimum(lengths, leading_successes(liked)), draft


SHIPPED = Parts()

# Each mutant with the rules it is a mutant of, and the question of `law.py` that exposes it.
MUTANTS: dict[str, tuple[Parts, tuple[str, ...], str]] = {}


def _mutant(expose: str = "law", rules: tuple[str, ...] = ("token", "block"), **part: object) -> None:
    (function,) = part.values()
    name = getattr(function, "__name__", "")
    MUTANTS[name] = (replace(SHIPPED, **part), rules, expose)  # type: ignore[arg-type]


for function in (always_accepts, swapped, lenient, forgets_draft):
    _mutant(acceptance=function)
for function in (token_chances, token_scales, capped_once, no_last_place):
    _mutant(acceptance=function, rules=("block",))
_mutant(keep=first_failure_ends, rules=("block",))
_mutant(keep=longest_wins, rules=("token",))
_mutant(keep=loses_the_bonus)
_mutant(compare=not_strict, expose="forbidden")
_mutant(compare=reversed_test)
_mutant(compare=reseeded)
for function in (
    target_for_residual,
    unclipped,
    bonus_from_draft,
    residual_one_early,
    residual_when_all_kept,
):
    _mutant(weights=function)
for function in (argmax_of_residual, draw_without_total, draw_one_late):
    _mutant(draw=function, expose="misdrawn")
for function in (draw_not_strict, draw_past_the_end):
    _mutant(draw=function, expose="forbidden")
for function in (
    softmax_for_argmax,
    warped_twice,
    draft_row_late,
    target_row_late,
    ignores_lengths,
    drops_unlikely_guesses,
    drops_disliked_guesses,
):
    _mutant(look=function)
