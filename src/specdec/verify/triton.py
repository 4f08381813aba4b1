# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Triton compiles its kernels from their source; pointers and blocks have no Python types to
# annotate.
"""`verify` fused for CUDA: `reference.py` from the same noise, without rows of probabilities.

Four small kernels. Each row of scores is read once for its maximum and total, once more (block
rule) for the residual mass after a guess, and one row per sequence twice more for the draw.
What is stored in between is (B, K + 1). Sums are taken in another order than in the reference, so
the two can part where a comparison is tied to rounding.

It needs Triton, which comes with the CUDA builds of torch, and it is imported only where the rows
are on CUDA. The tests run the kernels in Triton's interpreter and compile them to machine code;
they have not been run on a GPU. Read next: `../sampling.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 4096  # tokens of the vocabulary that one program holds at a time
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def verify_fused(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_lengths: Tensor,
    draft_logits: Tensor | None,
    rule: str,
    uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    """Judge the guesses and draw one more token; arguments and results as for `op.verify`."""
    batch, positions, vocabulary = target_logits.shape
    width = positions - 1
    has_draft = draft_logits is not None
    by_block = rule == "block" and has_draft
    target = _packed(target_logits)
    draft = target if draft_logits is None else _packed(draft_logits)

    dtype = torch.promote_types(target.dtype, torch.float32)
    dtype = torch.promote_types(dtype, draft.dtype)
    columns = min(_COLUMNS, triton.next_power_of_2(vocabulary))
    shape = {"vocabulary": vocabulary, "WORK": _TYPES[dtype], "COLUMNS": columns}

    tokens, lengths = draft_tokens.contiguous(), draft_lengths.contiguous()
    uniforms = uniforms.to(torch.float64).contiguous()
    device = target.device
    target_peak, target_total, scales, masses = (
        torch.empty(batch, positions, dtype=dtype, device=device) for _ in range(4)
    )
    draft_peak, draft_total, acceptance = (torch.empty(batch, width, dtype=dtype, device=device) for _ in range(3))
    usable, accepted, next_token = (torch.empty(batch, dtype=torch.int64, device=device) for _ in range(3))

    target_rows = target, target.stride(0), target.stride(1), target_peak, target_total
    draft_rows = draft, draft.stride(0), draft.stride(1), draft_peak, draft_total

    _measure[(batch, positions)](*target_rows, lengths, width + 1, 1, **shape)
    if has_draft and width > 0:
        _measure[(batch, width)](*draft_rows, lengths, width, 0, **shape)
    _judge[(batch,)](
        *target_rows, *draft_rows, tokens, lengths, acceptance, scales, usable, vocabulary, width,
        WORK=_TYPES[dtype], HAS_DRAFT=has_draft, BY_BLOCK=by_block,
    )  # fmt: skip
    if by_block and width > 1:
        _weigh[(batch, width - 1)](*target_rows, *draft_rows, lengths, scales, masses, width, **shape)
    _draw[(batch,)](
        *target_rows, *draft_rows, tokens, lengths, acceptance, scales, masses, usable, uniforms, accepted,
        next_token, width, **shape, HAS_DRAFT=has_draft, BY_BLOCK=by_block,
    )  # fmt: skip
    return accepted, next_token


def _packed(rows: Tensor) -> Tensor:
    """Rows whose entries lie side by side; anything else about their layout is free."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@triton.jit
def _measure(
    rows, row_stride, position_stride, peaks, totals,
    lengths, positions, extra, vocabulary, WORK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Maximum and total of exp(score - maximum) of each row needed; NaN or 0 total if it is bad."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1)
    if position < tl.load(lengths + row) + extra:
        start = rows + row * row_stride + position * position_stride
        peak = tl.full((), float("-inf"), WORK)
        total = tl.full((), 0.0, WORK)
        for offset in range(0, vocabulary, COLUMNS):
            column = offset + tl.arange(0, COLUMNS)
            score = tl.load(start + column, mask=column < vocabulary, other=float("-inf")).to(WORK)
            higher = tl.maximum(peak, tl.max(score, axis=0))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(peak - shift) + tl.sum(tl.exp(score - shift), axis=0)
            peak = higher
        tl.store(peaks + row * positions + position, peak)
        tl.store(totals + row * positions + position, total)


@triton.jit
def _judge(
    target, target_row_stride, target_position_stride, target_peaks, target_totals,
    draft, draft_row_stride, draft_position_stride, draft_peaks, draft_totals,
    tokens, lengths, acceptance, scales, usable, vocabulary, width,
    WORK: tl.constexpr, HAS_DRAFT: tl.constexpr, BY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Acceptance of the token rule, the scales, and whether the sequence can be judged at all."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    # a row behind a guess that the target forbids is not needed, and may hold no numbers
    needed = tl.full((), 1, tl.int1)
    sound = tl.full((), 1, tl.int1)
    scale = tl.full((), 1.0, WORK)
    tl.store(scales + row * (width + 1), scale)
    for position in range(length):
        token = tl.load(tokens + row * width + position)
        inside = (token >= 0) & (token < vocabulary)
        token = tl.where(inside, token, 0)

        at = row * (width + 1) + position
        total = tl.load(target_totals + at)
        score = tl.load(target + row * target_row_stride + position * target_position_stride + token)
        good = total > 0  # false for NaN too
        ratio = tl.where(good, tl.exp(score.to(WORK) - tl.load(target_peaks + at)) / total, 0.0)
        sound = sound & inside & (good | ~needed)
        needed = needed & (ratio > 0)
        if HAS_DRAFT:
            at = row * width + position
            score = tl.load(draft + row * draft_row_stride + position * draft_position_stride + token)
            chance = tl.exp(score.to(WORK) - tl.load(draft_peaks + at)) / tl.load(draft_totals + at)
            sound = sound & (chance > 0)
            ratio = tl.where(ratio > 0, ratio / tl.where(chance > 0, chance, 1.0), 0.0)
        tl.store(acceptance + row * width + position, tl.minimum(ratio, 1.0))
        if BY_BLOCK:
            scale = tl.minimum(scale * ratio, 1.0)
        tl.store(scales + row * (width + 1) + position + 1, scale)
    last_total = tl.load(target_totals + row * (width + 1) + length)
    sound = sound & ((last_total > 0) | ~needed)
    tl.store(usable + row, sound.to(tl.int64))


@triton.jit
def _weigh(
    target, target_row_stride, target_position_stride, target_peaks, target_totals,
    draft, draft_row_stride, draft_position_stride, draft_peaks, draft_totals,
    lengths, scales, masses, width, vocabulary, WORK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The block rule's residual mass S after each guess but the last."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) + 1
    if position < tl.load(lengths + row):
        at = row * (width + 1) + position
        scale = tl.load(scales + at)
        target_peak = tl.load(target_peaks + at)
        target_total = tl.load(target_totals + at)
        draft_peak = tl.load(draft_peaks + row * width + position)
        draft_total = tl.load(draft_totals + row * width + position)
        target_start = target + row * target_row_stride + position * target_position_stride
        draft_start = draft + row * draft_row_stride + position * draft_position_stride
        mass = tl.full((), 0.0, WORK)
        for offset in range(0, vocabulary, COLUMNS):
            column = offset + tl.arange(0, COLUMNS)
            real = column < vocabulary
            ours = tl.load(target_start + column, mask=real, other=float("-inf")).to(WORK)
            theirs = tl.load(draft_start + column, mask=real, other=float("-inf")).to(WORK)
            ours = tl.exp(ours - target_peak) / target_total
            theirs = tl.exp(theirs - draft_peak) / draft_total
            mass += tl.sum(tl.maximum(scale * ours - theirs, 0.0), axis=0)
        tl.store(masses + at, mass)


@triton.jit
def _residual(
    target_start, target_peak, target_total, draft_start, draft_peak, draft_total,
    scale, guess, refused, column, vocabulary, WORK: tl.constexpr, HAS_DRAFT: tl.constexpr,
):  # fmt: skip
    """The target's probabilities of some columns, and what is left of them after a refusal."""
    real = column < vocabulary
    score = tl.load(target_start + column, mask=real, other=float("-inf")).to(WORK)
    prob = tl.exp(score - target_peak) / target_total
    if HAS_DRAFT:
        # a number chosen by the scalar, as Triton 3.9's interpreter makes no mask of a scalar truth
        shown = column < tl.where(refused, vocabulary, 0)
        score = tl.load(draft_start + column, mask=shown, other=float("-inf"))
        theirs = tl.exp(score.to(WORK) - draft_peak) / draft_total
        weight = tl.where(refused, tl.maximum(scale * prob - theirs, 0.0), prob)
    else:
        weight = tl.where(column == guess, 0.0, prob)
    return prob, weight


@triton.jit
def _draw(
    target, target_row_stride, target_position_stride, target_peaks, target_totals,
    draft, draft_row_stride, draft_position_stride, draft_peaks, draft_totals,
    tokens, lengths, acceptance, scales, masses, usable, uniforms, accepted_out, next_token_out, width, vocabulary,
    WORK: tl.constexpr, COLUMNS: tl.constexpr, HAS_DRAFT: tl.constexpr, BY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Select how many guesses are kept, then draw the token after them."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(usable + row) == 0:
        tl.store(accepted_out + row, tl.full((), 0, tl.int64))
        tl.store(next_token_out + row, tl.full((), -1, tl.int64))
    else:
        length = tl.load(lengths + row).to(tl.int32)
        accepted = tl.full((), 0, tl.int32)
        for position in range(length):
            chance = tl.load(acceptance + row * width + position)
            if BY_BLOCK:
                kept = position + 1
                scale = tl.load(scales + row * (width + 1) + kept)
                inner = kept < length
                mass = tl.load(masses + row * (width + 1) + kept, mask=inner, other=0.0)
                room = mass + 1.0 - scale
                chance = tl.where(room > 0, mass / tl.where(room > 0, room, 1.0), 1.0)
                chance = tl.where(inner & (scale > 0), chance, scale)
            success = tl.load(uniforms + row * (width + 1) + position) < chance
            if BY_BLOCK:
                accepted = tl.where(success, position + 1, accepted)
            else:
                # A count that has fallen behind its place has seen a failure, and stays.
                accepted = tl.where(success & (accepted == position), position + 1, accepted)

        refused = accepted < length
        at = row * (width + 1) + accepted
        scale = tl.load(scales + at)
        target_peak = tl.load(target_peaks + at)
        target_total = tl.load(target_totals + at)
        target_start = target + row * target_row_stride + accepted * target_position_stride
        draft_start = draft + row * draft_row_stride + accepted * draft_position_stride
        draft_peak = tl.full((), 0.0, WORK)
        draft_total = tl.full((), 1.0, WORK)
        guess = tl.full((), -1, tl.int64)
        if HAS_DRAFT:
            draft_peak = tl.load(draft_peaks + row * width + accepted, mask=refused, other=0.0)
            draft_total = tl.load(draft_totals + row * width + accepted, mask=refused, other=1.0)
        else:
            guess = tl.load(tokens + row * width + accepted, mask=refused, other=-1)

        # First the totals: of the residual, and of the target's row in case nothing of the residual is left.
        left = tl.full((), 0.0, tl.float64)
        plain = tl.full((), 0.0, tl.float64)
        for offset in range(0, vocabulary, COLUMNS):
            column = offset + tl.arange(0, COLUMNS)
            prob, weight = _residual(
                target_start, target_peak, target_total, draft_start, draft_peak, draft_total,
                scale, guess, refused, column, vocabulary, WORK, HAS_DRAFT,
            )  # fmt: skip
            left += tl.sum(weight.to(tl.float64), axis=0)
            plain += tl.sum(prob.to(tl.float64), axis=0)
        whole = left > 0
        threshold = tl.load(uniforms + row * (width + 1) + width) * tl.where(whole, left, plain)

        # Then the first token whose running sum exceeds the threshold; none does where noise just below 1 was
        # rounded up, and then it is the last one that has a weight.
        before = tl.full((), 0.0, tl.float64)
        winner = tl.full((), 0, tl.int32) + vocabulary
        last = tl.full((), 0, tl.int32)
        for offset in range(0, vocabulary, COLUMNS):
            column = offset + tl.arange(0, COLUMNS)
            prob, weight = _residual(
                target_start, target_peak, target_total, draft_start, draft_peak, draft_total,
                scale, guess, refused, column, vocabulary, WORK, HAS_DRAFT,
            )  # fmt: skip
            weight = tl.where(whole, weight, prob).to(tl.float64)
            sums = before + tl.cumsum(weight, axis=0)
            reached = (weight > 0) & (sums > threshold)
            winner = tl.minimum(winner, tl.min(tl.where(reached, column, vocabulary), axis=0))
            last = tl.maximum(last, tl.max(tl.where(weight > 0, column, 0), axis=0))
            before += tl.sum(weight, axis=0)
        winner = tl.where(winner < vocabulary, winner, last)
        tl.store(accepted_out + row, accepted.to(tl.int64))
        tl.store(next_token_out + row, winner.to(tl.int64))
