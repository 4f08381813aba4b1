"""Drawing a token from rows of scores, with noise handed in: this room owns no generator.

Targets and draft models sample with the same two functions, so that the distribution a guess was
drawn from is softmax of the row that was handed to `race`, and nothing else. A row without a
distribution gives -1, because an exception would need to look at the device; whoever copies the
tokens to the host raises then.

Read next: `coupled.py`, which makes noise that draft and target share.
"""

import torch
from torch import Tensor

_OF_NUMPY = (torch.float32, torch.float64)


def choose(logits: Tensor, gumbel: Tensor | None = None) -> Tensor:
    """The highest score of each row, with the noise added if there is any; the lowest id wins ties.

    With standard Gumbel noise this is one draw from softmax(logits); without, it is greedy.

    Args:
        logits: (..., V) unnormalised log-probabilities, -inf for a forbidden token.
        gumbel: noise of the same shape.

    Returns:
        (...) int64, -1 for a row that has a NaN or is -inf throughout.
    """
    best, token = highest(logits if gumbel is None else logits + gumbel)
    # false for a NaN as well
    return torch.where(best > -torch.inf, token, -1)


def highest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The highest entry of each row (..., V) and its lowest id, as ``max(dim=-1)``; a NaN counts as highest."""
    if scores.device.type == "cpu" and scores.dtype in _OF_NUMPY and not torch.compiler.is_compiling():
        # torch's ``max`` with ids goes entry by entry on a CPU, numpy's argmax many at a time
        token = torch.as_tensor(scores.detach().numpy().argmax(axis=-1))
        return scores.gather(-1, token[..., None]).squeeze(-1), token
    best, token = scores.max(dim=-1)
    return best, token


def race(logits: Tensor, exponentials: Tensor) -> Tensor:
    """One draw from softmax(logits) per row, by a race.

    Token v arrives at time exponential(v) / weight(v), and the first to arrive wins: v with
    probability weight(v) / sum of weights, so nothing needs to be normalised. In logarithms no
    weight over- or underflows, and a token of weight 0 never arrives, whatever the noise.

    Args:
        logits: (..., V) unnormalised log-probabilities, -inf for a forbidden token. Computed in
            float32 at least.
        exponentials: noise of the same shape, standard exponential.

    Returns:
        (...) int64, -1 for a row that has a NaN or a +inf or is -inf throughout.
    """
    times = torch.where(exponentials > 0, exponentials, resolution(exponentials.dtype))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    times = times.to(torch.promote_types(times.dtype, dtype))  # never narrowed: it could become 0
    best, token = highest(logits.to(dtype) - times.log())
    return torch.where(torch.isfinite(best), token, -1)


def resolution(dtype: torch.dtype) -> float:
    """What an exponential of exactly 0 stands for.

    A generator of n bits gives 0 once in 2^n draws. Taken at its word, that 0 would let a token of
    any weight win, and with 100,000 tokens in a row this is not rare in float32. It stands for all
    times below one step of the generator, so half a step is put in its place.
    """
    return torch.finfo(dtype).eps / 4
