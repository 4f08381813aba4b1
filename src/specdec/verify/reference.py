"""`verify` from start to finish, in plain torch: the definition every faster form must meet.

It holds the probabilities of all rows, (B, K + 1, V) and (B, K, V), which is what the fused form
(`triton.py`) avoids. No data-dependent shapes and no look at the device. Read next: `token.py`.
"""

import torch
from torch import Tensor

from specdec.verify.block import block_acceptance, longest_success
from specdec.verify.draw import draw, probabilities
from specdec.verify.residual import residual_weights, usable
from specdec.verify.token import leading_successes, token_acceptance


def verify_reference(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_lengths: Tensor,
    draft_logits: Tensor | None,
    rule: str,
    uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    """Judge the guesses and draw one more token; arguments and results as for `op.verify`."""
    target_probs = probabilities(target_logits)
    draft_probs = None if draft_logits is None else probabilities(draft_logits)
    rows = target_probs, draft_tokens, draft_lengths, draft_probs

    chances, last = uniforms[:, :-1], uniforms[:, -1]
    # Strictly less: uniforms include 0, and a token that the target forbids has acceptance 0.
    if rule == "block" and draft_probs is not None:
        acceptance, scales = block_acceptance(target_probs, draft_tokens, draft_lengths, draft_probs)
        accepted = longest_success(chances < acceptance)
    else:
        acceptance = token_acceptance(*rows)
        scales = target_probs.new_ones(target_probs.shape[:2])
        accepted = leading_successes(chances < acceptance)

    next_token = draw(residual_weights(*rows, accepted, scales), last)
    judged = usable(*rows)
    return torch.where(judged, accepted, 0), torch.where(judged, next_token, -1)
