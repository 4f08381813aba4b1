"""Drawing a token from rows of scores, with noise handed in: this room owns no generator.

Targets and draft models sample with the same functions, so that the distribution a guess was
drawn from is softmax of the row that was handed to `sample`, and nothing else. A row without a
distribution gives -1, because an exception would need to look at the device; whoever copies the
tokens to the host raises then. Read next: `coupled.py`.
"""

import torch
from torch import Tensor

_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # the bits of infinity in numbers of 16


def choose(logits: Tensor, gumbel: Tensor | None = None) -> Tensor:
    """The highest score of each row, with the noise added if there is any; the lowest id wins ties.

    With standard Gumbel noise this is one draw from softmax(logits); without, it is greedy.

    Args:
        logits: (..., V) unnormalised log-probabilities, -inf for a forbidden token.
        gumbel: noise of the same shape.

    Returns:
        (...) int64, -1 for a row that has a NaN or is -inf throughout.
    """
    scores = logits if gumbel is None else logits + gumbel
    token = _by_bits(scores, heeds_nan=True)
    if token is not None:
        return token
    token = _by_value(scores)
    best = scores.gather(-1, token[..., None]).squeeze(-1)
    # false for a NaN as well, which is the highest of its row
    return torch.where(best > -torch.inf, token, -1)


def highest(scores: Tensor) -> Tensor:
    """`choose` for a guess, which is judged anyway: (...) any id for a row (..., V) without a distribution.

    Of several highest entries the lowest id.
    """
    token = _by_bits(scores, heeds_nan=False)
    return _by_value(scores) if token is None else token


def _by_value(scores: Tensor) -> Tensor:
    """The first of the highest entries of each row, a NaN if there is one."""
    if scores.device.type != "cpu" or torch.compiler.is_compiling():
        return scores.argmax(dim=-1)
    # torch goes entry by entry on a CPU, numpy many at a time; a NaN is highest to both
    scores = scores.detach()
    token = (scores.float() if scores.dtype in _INFINITY else scores).numpy().argmax(axis=-1)
    return torch.as_tensor(token, device="cpu")


def _by_bits(scores: Tensor, *, heeds_nan: bool) -> Tensor | None:
    """The same for numbers of 16 bits on a CPU, None where it cannot be told from their bits.

    numpy does not know them, but positive numbers are ordered as their bits are, and nearly always the highest is
    positive. A NaN with the sign of a negative number is looked for only if ``heeds_nan``.
    """
    infinity = _INFINITY.get(scores.dtype)
    if infinity is None or not scores.is_cpu or torch.compiler.is_compiling():
        return None
    bits = (scores.detach() if scores.requires_grad else scores).view(torch.int16).numpy()
    tokens = bits.argmax(axis=-1)
    vocabulary = bits.shape[-1]
    for row, token in enumerate(tokens.reshape(-1).tolist()):
        if not 0 < bits.item(row * vocabulary + token) <= infinity:
            return None
    # a NaN with a sign, as it comes out of arithmetic, is above all other bits
    if heeds_nan:
        unsigned = bits.view("uint16")
        if unsigned.item(unsigned.argmax()) > 0x8000 + infinity:
            return None
    return torch.from_numpy(tokens) if scores.ndim > 1 else torch.tensor(int(tokens), device="cpu")


def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One draw from softmax(logits) per row (..., V), by one uniform (...) each; see `draw`."""
    return draw(probabilities(logits), uniforms)


def probabilities(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """Softmax of rows (..., V), in float32 at least; in the memory of ``out`` if there is any."""
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32), out=out)


def draw(weights: Tensor, uniforms: Tensor, sums: Tensor | None = None) -> Tensor:
    """One draw per row, in proportion to weights: the token whose share of [0, total) holds the noise.

    Token v is drawn for noise in [W(v - 1), W(v)) / W(V - 1), with W the running sums, so that nothing needs to be
    normalised and a token of weight 0, whose share is empty, is never drawn. Sums are taken in float64, where
    the device has it: the error of a share is far below what float32 weights can tell apart.

    Args:
        weights: (..., V), none negative.
        uniforms: (...) noise in [0, 1), in float64 where small shares shall be met.
        sums: (..., V) memory for the running sums, in `widest`.

    Returns:
        (...) int64, -1 for a row that has a NaN or an infinity, or nothing but zeros.
    """
    wide = widest(weights.device)
    sums = torch.cumsum(weights, dim=-1, dtype=wide, out=sums)
    total = sums[..., -1:] + 0  # entries side by side, which searchsorted wants
    token = torch.searchsorted(sums, uniforms.to(wide)[..., None] * total, right=True)
    # noise just below 1 may round to the total: then it is the last token that has a share
    token = torch.minimum(token, torch.searchsorted(sums, total))
    return torch.where((total > 0) & (total < torch.inf), token, -1).squeeze(-1)


def widest(device: torch.device) -> torch.dtype:
    """The widest floating point type of ``device``; Apple's has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
