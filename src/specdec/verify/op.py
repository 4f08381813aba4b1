"""`verify`, the door of this room: one operator of torch, to be compiled and captured whole.

`specdec::verify` has four implementations: the reference for every device, a lean one for the CPU, a
fused one for CUDA where Triton is installed, and a fake one that knows only shapes. It does not know
the rules. Read next: `lean.py`.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from specdec.verify.lean import verify_lean
from specdec.verify.reference import verify_reference

Rule = Literal["token", "block"]


def verify(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_lengths: Tensor,
    draft_logits: Tensor | None = None,
    *,
    rule: Rule,
    uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    """Decide how many guesses of each row to keep, and draw the token that follows them.

    The kept guesses and the next token together are distributed as plain sampling from the target,
    provided that every guess was drawn from its row of `draft_logits`, or made in any way at all if
    that is None; that neither guesses nor lengths looked at the noise given here; and that a guess,
    once drawn, was submitted.

    Args:
        target_logits: (B, K + 1, V) processed scores of the target, unnormalised log-probabilities,
            -inf for a forbidden token. Row i follows guess i. K may be 0.
        draft_tokens: (B, K) int64 guesses.
        draft_lengths: (B,) int64, 0 .. K: how many guesses of each row are real. What stands past
            them, in any argument, is ignored.
        draft_logits: (B, K, V) processed scores that the guesses were drawn from, or None if they
            have none.
        rule: "token" or "block"; block keeps at least as many in expectation.
        uniforms: (B, K + 1) uniform noise in [0, 1), float64 if it can be had: one for each guess, and the
            last one draws the token.

    Returns:
        accepted (B,) int64, and next_token (B,) int64. Where a row that is needed has no
        distribution (a NaN, a +inf, or -inf throughout), or a guess is outside the vocabulary or
        impossible under its own row of draft_logits, accepted is 0 and next_token -1: an exception
        would have to wait for the device.

    Raises:
        ValueError: the rule is unknown, or a shape is not the one above. Nothing is broadcast.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(get_args(Rule))}.")
    batch, positions, vocabulary = target_logits.shape
    width = positions - 1
    _require("draft_tokens", draft_tokens, (batch, width))
    _require("draft_lengths", draft_lengths, (batch,))
    _require("uniforms", uniforms, (batch, positions))
    if draft_logits is not None:
        _require("draft_logits", draft_logits, (batch, width, vocabulary))
    accepted, next_token = _verify(target_logits, draft_tokens, draft_lengths, draft_logits, rule, uniforms)
    return accepted, next_token


def _require(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; beside target_logits "
            f"(batch, guesses + 1, vocabulary) it must have {shape}."
        )


@torch.library.custom_op("specdec::verify", mutates_args=())
def _verify(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_lengths: Tensor,
    draft_logits: Tensor | None,
    rule: str,
    uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    return verify_reference(target_logits, draft_tokens, draft_lengths, draft_logits, rule, uniforms)


_verify.register_kernel("cpu")(verify_lean)


@_verify.register_kernel("cuda")
def _verify_cuda(target_logits: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    if not _has_triton():
        return verify_reference(target_logits, *others)

    from specdec.verify.triton import verify_fused

    # Triton launches on the current device, which need not be the one that holds the rows.
    with torch.cuda.device(target_logits.device):
        return verify_fused(target_logits, *others)


@_verify.register_fake
def _verify_fake(target_logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    accepted = target_logits.new_empty(target_logits.shape[0], dtype=torch.int64)
    return accepted, torch.empty_like(accepted)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
