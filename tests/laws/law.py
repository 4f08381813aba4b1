"""The law of one round, enumerated: what a verifier emits against what the target would have.

A `World` is a target and a draft that are look-up tables over a few tokens, a row for every prefix.
`examine` runs a verifier, as it is shipped, on every block of guesses and on every cell of noise,
in one batch, adds up the probabilities, and compares with the target. Three questions:

- law: is the joint distribution of the first k + 1 tokens the target's? Shorter outputs are
  continued by the target itself, so any number of rounds follows by induction.
- misdrawn: is the last token drawn with the weights that the first question took for granted? Noise just
  inside both ends of every token's share of [0, 1) must bring out that token.
- forbidden: can the worst noise (exactly 0, nearly 1, just at the end of a share) bring out a token that the
  target forbids?

It does not know how a verifier works inside. What it asks of one is `Candidate`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["sampled", "certain", "unknown"]
Rows = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""target_logits (B, K + 1, V), draft_tokens (B, K), draft_lengths (B,), draft_logits or None."""


@dataclass(frozen=True)
class Candidate:
    """A verifier, and what one must know of it to integrate over its noise."""

    verify: Callable[[Rows, Tensor, Tensor], tuple[Tensor, Tensor]]
    """rows, uniforms (B, K), noise of the draw (B,): accepted and next token. The thing under test."""
    thresholds: Callable[[Rows], Tensor]
    """(B, K): the only values at which a uniform can change the outcome."""
    weights: Callable[[Rows, Tensor], Tensor]
    """rows, accepted: (B, V), what the last token is said to be drawn from."""


@dataclass(frozen=True)
class World:
    """Look-up tables. Entry i of each holds the rows after every prefix of i tokens."""

    target: list[Tensor]  # k + 1 tables (V^i, V)
    draft: list[Tensor]  # k tables (V^i, V)
    stops: list[Tensor]  # k tables (V^i,): whether guessing stops here; it sees the prefix, not the next guess

    @property
    def guesses(self) -> int:
        return len(self.draft)

    @property
    def vocabulary(self) -> int:
        return self.target[0].shape[1]


@dataclass(frozen=True)
class Findings:
    law_error: float
    misdrawn: int
    forbidden: int
    expected_accepted: float

    @property
    def lossless(self) -> bool:
        return self.law_error < 1e-10 and self.misdrawn == 0 and self.forbidden == 0


# --- worlds ------------------------------------------------------------------------------------


def world(family: str, seed: int, *, vocabulary: int, guesses: int, ragged: bool) -> World:
    """One of the families of `FAMILIES`, with or without a random rule of when to stop guessing."""
    generator = torch.Generator().manual_seed(seed)

    def tables(count: int) -> list[Tensor]:
        sizes = [vocabulary**depth for depth in range(count)]
        return [FAMILIES[family](generator, size, vocabulary) for size in sizes]

    pairs = tables(guesses + 1)
    stops = [
        torch.rand(vocabulary**depth, generator=generator) < (0.5 if ragged and depth > 0 else 0)
        for depth in range(guesses)
    ]
    return World([pair[0] for pair in pairs], [pair[1] for pair in pairs[:guesses]], stops)


def _rows(generator: torch.Generator, size: int, vocabulary: int, holes: float) -> Tensor:
    rows = torch.rand(size, vocabulary, generator=generator, dtype=torch.float64) ** 2
    rows = rows * (torch.rand(size, vocabulary, generator=generator) >= holes)
    rows[rows.sum(-1) == 0, 0] = 1.0
    return rows / rows.sum(-1, keepdim=True)


def _free(generator: torch.Generator, size: int, vocabulary: int) -> Tensor:
    return torch.stack([_rows(generator, size, vocabulary, 0.0) for _ in range(2)])


def _holes(generator: torch.Generator, size: int, vocabulary: int) -> Tensor:
    return torch.stack([_rows(generator, size, vocabulary, 0.35) for _ in range(2)])


def _close(generator: torch.Generator, size: int, vocabulary: int) -> Tensor:
    target, other = _free(generator, size, vocabulary)
    return torch.stack([target, 0.8 * target + 0.2 * other])


def _equal(generator: torch.Generator, size: int, vocabulary: int) -> Tensor:
    return _rows(generator, size, vocabulary, 0.3).expand(2, -1, -1)


def _disjoint(generator: torch.Generator, size: int, vocabulary: int) -> Tensor:
    both = _free(generator, size, vocabulary)
    both[0, :, vocabulary // 2 :] = 0
    both[1, :, : vocabulary // 2] = 0
    return both / both.sum(-1, keepdim=True)


def _greedy(generator: torch.Generator, size: int, vocabulary: int) -> Tensor:
    """The target is certain of one token, as it is at temperature 0."""
    target, draft = _free(generator, size, vocabulary)
    return torch.stack([_one_hot(target), draft])


def _one_hot(rows: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(rows.argmax(-1), rows.shape[-1]).to(rows.dtype)


FAMILIES: dict[str, Callable[[torch.Generator, int, int], Tensor]] = {
    "free": _free,
    "holes": _holes,
    "close": _close,
    "equal": _equal,
    "disjoint": _disjoint,
    "greedy": _greedy,
}


# --- every block of guesses --------------------------------------------------------------------


def blocks(world: World, kind: Kind) -> tuple[Rows, Tensor]:
    """All blocks of guesses that can occur, as one ragged batch, with their probabilities.

    "sampled": drawn from the draft's rows, which are shown. "certain": the draft's argmax, shown as
    rows with a single 1. "unknown": drawn from the draft's rows, which are not shown.
    Everything past a row's length is spoilt, to catch a verifier that looks there.
    """
    vocabulary, guesses = world.vocabulary, world.guesses
    tokens = torch.tensor(list(product(range(vocabulary), repeat=guesses)))
    prefix = torch.zeros(len(tokens), guesses + 1, dtype=torch.int64)
    for place in range(guesses):
        prefix[:, place + 1] = prefix[:, place] * vocabulary + tokens[:, place]

    target = torch.stack([world.target[i][prefix[:, i]] for i in range(guesses + 1)], dim=1)
    draft = torch.stack([world.draft[i][prefix[:, i]] for i in range(guesses)], dim=1)
    if kind == "certain":
        draft = _one_hot(draft)
    stopped = torch.stack([world.stops[i][prefix[:, i]] for i in range(guesses)], dim=1)
    lengths = (~stopped).long().cumprod(1).sum(1)
    chance = draft.gather(-1, tokens[..., None]).squeeze(-1).prod(-1)

    past = torch.arange(guesses) >= lengths[:, None]
    tokens = tokens.where(~past, torch.tensor([-1, vocabulary + 7])[tokens % 2])
    target_logits, draft_logits = target.log(), draft.log()
    target_logits[:, 1:][past] = torch.nan
    draft_logits[past] = torch.nan

    possible = chance > 0
    shown = None if kind == "unknown" else draft_logits[possible]
    return (target_logits[possible], tokens[possible], lengths[possible], shown), chance[possible]


def repeat(rows: Rows, times: int) -> Rows:
    """Each row of the batch `times` times in succession."""
    target, tokens, lengths, draft = (None if part is None else part.repeat_interleave(times, 0) for part in rows)
    assert target is not None
    assert tokens is not None
    assert lengths is not None
    return target, tokens, lengths, draft


# --- the three questions -----------------------------------------------------------------------


def examine(candidate: Candidate, world: World, kind: Kind) -> Findings:
    rows, chance = blocks(world, kind)
    uniforms, width = cells(candidate.thresholds(rows))
    number, guesses = uniforms.shape[1:]
    many, uniforms = repeat(rows, number), uniforms.reshape(-1, guesses)
    chance = (chance[:, None] * width).reshape(-1)

    possible = chance > 0
    target, tokens, lengths, draft = many
    many = (
        target[possible],
        tokens[possible],
        lengths[possible],
        None if draft is None else draft[possible],
    )
    uniforms, chance = uniforms[possible], chance[possible]

    calm = torch.full((len(chance),), 0.5, dtype=torch.float64)
    accepted, next_token = candidate.verify(many, uniforms, calm)
    weights = candidate.weights(many, accepted)
    sane = bool((next_token >= 0).all() & (accepted <= many[2]).all() & torch.isfinite(weights).all())
    if not sane:
        return Findings(torch.inf, 0, 0, 0.0)

    emitted = _emitted(world, many[1], accepted, weights, chance)
    return Findings(
        law_error=(emitted - _conditional(world, 0)).abs().max().item(),
        misdrawn=_misdrawn(candidate, many, uniforms, accepted, weights),
        forbidden=_forbidden(candidate, rows),
        expected_accepted=(chance * accepted).sum().item(),
    )


def cells(thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Cut [0, 1)^K along all thresholds (B, K), in every direction, into C cells.

    A verifier that compares any of its uniforms with any of the thresholds is constant on a cell,
    so the sum over cells is the integral, even for one that mixes its uniforms up.
    Returns the midpoints (B, C, K) and the volumes (B, C).
    """
    batch, guesses = thresholds.shape
    inner = thresholds.clamp(0, 1).sort(dim=1).values
    edges = torch.cat([inner.new_zeros(batch, 1), inner, inner.new_ones(batch, 1)], dim=1)
    middle, width = (edges[:, 1:] + edges[:, :-1]) / 2, edges.diff(dim=1)
    picks = torch.tensor(list(product(range(guesses + 1), repeat=guesses)))  # (C, K)
    return middle[:, picks], width[:, picks].prod(-1)


def _emitted(world: World, tokens: Tensor, accepted: Tensor, weights: Tensor, chance: Tensor) -> Tensor:
    """The law (V^(k + 1),) of the kept guesses, the next token, and the target's continuation."""
    vocabulary, guesses = world.vocabulary, world.guesses
    law = torch.zeros(vocabulary ** (guesses + 1), dtype=torch.float64)
    shares = chance[:, None] * weights / weights.sum(-1, keepdim=True)
    for kept in range(guesses + 1):
        here = accepted == kept
        prefix = torch.zeros(int(here.sum()), dtype=torch.int64)
        for place in range(kept):
            prefix = prefix * vocabulary + tokens[here, place]
        mass = torch.zeros(vocabulary**kept, vocabulary, dtype=torch.float64)
        mass.index_add_(0, prefix, shares[here])
        rest = vocabulary ** (guesses - kept)
        law += mass.reshape(-1).repeat_interleave(rest) * _conditional(world, kept + 1)
    return law


def _conditional(world: World, given: int) -> Tensor:
    """For every sequence of k + 1 tokens, the target's chance of all after the first `given`."""
    length = world.guesses + 1
    chance = torch.ones(world.vocabulary**length, dtype=torch.float64)
    for place in range(given, length):
        rest = world.vocabulary ** (length - place - 1)
        chance *= world.target[place].reshape(-1).repeat_interleave(rest)
    return chance


def _misdrawn(candidate: Candidate, rows: Rows, uniforms: Tensor, accepted: Tensor, weights: Tensor) -> int:
    """How often noise inside a token's share, in the order of the ids, does not bring out that token."""
    vocabulary = weights.shape[1]
    ends = weights.cumsum(1) / weights.sum(1, keepdim=True)
    share = weights / weights.sum(1, keepdim=True)
    inside = torch.stack([ends - (1 - 1e-6) * share, ends - 1e-6 * share], dim=2)
    again, token = candidate.verify(
        repeat(rows, 2 * vocabulary), uniforms.repeat_interleave(2 * vocabulary, 0), inside.reshape(-1).clamp(0)
    )
    wanted = torch.arange(vocabulary).repeat_interleave(2).repeat(len(weights))
    agrees = (token == wanted) & (again == accepted.repeat_interleave(2 * vocabulary))
    return int(((share > 1e-9).repeat_interleave(2, dim=1).reshape(-1) & ~agrees).sum())


def _forbidden(candidate: Candidate, rows: Rows) -> int:
    """How many outputs hold a token that the target forbids, when noise is 0, nearly 1 or at the end of a share."""
    guesses = rows[1].shape[1]
    nearly_one = torch.nextafter(torch.tensor(1.0).double(), torch.tensor(0.0).double()).item()
    patterns = torch.tensor(list(product((0.0, nearly_one), repeat=guesses)), dtype=torch.float64)
    uniforms = patterns.repeat(len(rows[1]), 1)
    target, tokens, *_ = many = repeat(rows, len(patterns))
    calm = torch.full((len(target),), 0.5, dtype=torch.float64)
    weights = candidate.weights(many, candidate.verify(many, uniforms, calm)[0]).nan_to_num()
    ends = weights.cumsum(1) / weights.sum(1, keepdim=True)
    count = 0
    for noise in (
        torch.zeros_like(calm),
        torch.full_like(calm, nearly_one),
        *ends.clamp(0, nearly_one).nan_to_num().unbind(1),
    ):
        accepted, next_token = candidate.verify(many, uniforms, noise)
        output = torch.cat([tokens, tokens[:, :1]], 1).scatter(1, accepted[:, None], next_token[:, None])
        score = target.gather(-1, output.clamp(0, target.shape[-1] - 1)[..., None]).squeeze(-1)
        emitted = torch.arange(guesses + 1) <= accepted[:, None]
        count += int((emitted & (score == -torch.inf)).any(1).sum())
    return count
