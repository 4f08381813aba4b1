"""`verify` for a CPU, where time is memory: the reference's decisions in fewer passes over the rows.

Rows of probabilities are made once, by softmax (which on a CPU takes half of logsumexp's time), and
are then worked on in place; the block rule computes only rows that decide something. A few sequences are
judged at a time, in memory that all of them share: the rows of a whole batch are tens of megabytes, which the
system would hand out page by page, and take back. Values are looked at, which costs nothing on a CPU. It can
part from the reference where noise is tied to rounding.

The scales of a block are those of `block.py`; what else there is of the rules is written here once more, for
rows worked on in place, and the laws are proved of both. Read next: `triton.py`.
"""

import torch
from torch import Tensor

from specdec.verify.block import block_scales
from specdec.verify.draw import draw, probabilities, widest
from specdec.verify.residual import usable
from specdec.verify.token import leading_successes, token_acceptance

AT_ONCE = 1 << 20  # numbers of the target's rows for each thread


def verify_lean(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_lengths: Tensor,
    draft_logits: Tensor | None,
    rule: str,
    uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    """Judge the guesses and draw one more token; arguments and results as for `op.verify`."""
    batch, positions, vocabulary = target_logits.shape
    most = max(AT_ONCE * torch.get_num_threads() // max(positions * vocabulary, 1), 1)
    ours, theirs = _memory(target_logits, most), None if draft_logits is None else _memory(draft_logits, most)
    sums = ours.new_empty(len(ours), vocabulary, dtype=widest(ours.device))
    judged = []
    for begin in range(0, max(batch, 1), most):
        part = slice(begin, min(begin + most, batch))
        here = slice(0, part.stop - begin)
        rows = (
            probabilities(target_logits[part], out=ours[here]),
            draft_tokens[part],
            draft_lengths[part],
            None if draft_logits is None or theirs is None else probabilities(draft_logits[part], out=theirs[here]),
        )
        judged.append(_judge(*rows, rule, uniforms[part], sums[here]))
    accepted, next_token = map(torch.cat, zip(*judged, strict=True))
    return accepted, next_token


def _memory(logits: Tensor, most: int) -> Tensor:
    """Room for the probabilities of ``most`` sequences of ``logits`` (B, N, V), or of all there are."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(min(most, len(logits)), *logits.shape[1:], dtype=wide)


def _judge(
    target_probs: Tensor,
    draft_tokens: Tensor,
    draft_lengths: Tensor,
    draft_probs: Tensor | None,
    rule: str,
    uniforms: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """What `verify_lean` does with a few sequences (B, ...); ``sums`` (B, V) is memory for running sums."""
    rows = target_probs, draft_tokens, draft_lengths, draft_probs
    if rule == "block" and draft_probs is not None:
        scales = block_scales(target_probs, draft_tokens, draft_lengths, draft_probs)
        accepted, weights = _by_block(target_probs, draft_probs, draft_lengths, scales, uniforms)
    else:
        accepted = leading_successes(uniforms[:, :-1] < token_acceptance(*rows))
        weights = _residual(*rows, accepted)
    next_token = draw(weights, uniforms[:, -1], sums)
    judged = usable(*rows)
    return torch.where(judged, accepted, 0), torch.where(judged, next_token, -1)


def _by_block(
    target_probs: Tensor, draft_probs: Tensor, draft_lengths: Tensor, scales: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """The last success of the block rule (B,), looked for from the end, and the weights (B, V) that follow it.

    Only what decides is computed: h_i <= c_i, because S_i <= c_i, so noise above the scale is a failure whatever
    the rows hold; and the rows of a success are its residual already.
    """
    batch, vocabulary = len(target_probs), target_probs.shape[-1]
    weights = target_probs.new_empty(
        batch, vocabulary, dtype=torch.promote_types(target_probs.dtype, draft_probs.dtype)
    )
    accepted = torch.zeros_like(draft_lengths)
    noise, chances, lengths = uniforms.tolist(), scales.tolist(), draft_lengths.tolist()
    for row, length in enumerate(lengths):
        for kept in range(length, -1, -1):
            scale = chances[row][kept]
            if kept and not noise[row][kept - 1] < scale:
                continue
            ours, out = target_probs[row, kept], weights[row]
            if kept == length:
                out.copy_(ours)
                break
            torch.mul(ours, scale, out=out).sub_(draft_probs[row, kept]).clamp_(min=0)
            mass = float(out.sum())
            room = mass + 1 - scale
            if kept and not noise[row][kept - 1] < (mass / room if room > 0 else 1):
                continue
            if not mass > 0:  # p = q up to rounding
                out.copy_(ours)
            break
        accepted[row] = kept
    return accepted, weights


def _residual(
    target_probs: Tensor, draft_tokens: Tensor, draft_lengths: Tensor, draft_probs: Tensor | None, accepted: Tensor
) -> Tensor:
    """`residual.residual_weights` of the token rule in place, on a copy of one row a sequence."""
    weights = _row_at(target_probs, accepted)
    refused = accepted < draft_lengths
    if not refused.any():
        return weights
    at = accepted.clamp(max=draft_tokens.shape[1] - 1)
    if draft_probs is None:
        guess = draft_tokens.gather(1, at[:, None]).clamp(0, weights.shape[1] - 1)
        weights.scatter_(1, guess, weights.gather(1, guess).masked_fill(refused[:, None], 0))
    else:
        theirs = _row_at(draft_probs, at)
        # a row that refused nothing loses nothing; what stands there may be no number
        theirs[~refused] = 0
        weights = weights.sub_(theirs) if weights.dtype == theirs.dtype else weights - theirs
        weights.clamp_(min=0)
    empty = refused & ~(weights.amax(dim=1) > 0)
    if empty.any():
        weights[empty] = _row_at(target_probs, accepted)[empty].to(weights.dtype)
    return weights


def _row_at(rows: Tensor, positions: Tensor) -> Tensor:
    """`rows.at_position`, copied row by row instead of entry by entry."""
    batch, count, vocabulary = rows.shape
    first = torch.arange(0, batch * count, count, device="cpu")
    return rows.reshape(batch * count, vocabulary).index_select(0, first + positions)
