"""A draft with 4-bit or 8-bit weights, on the kernels that torch itself has.

int8: one scale a row of the matrix. int4: one scale and one zero for every 32 neighbours of a row. Activations stay
as they are, but on a CPU they are made bfloat16: torch's kernels there compute other dtypes number by number. Where
the processor multiplies bytes, and the weights given serve prompts, int8 has eight bits on both sides
(``integer.py``). A draft reads a quarter or half of the bytes and guesses a little worse; the target is never
quantised, so the output's law is untouched. With the target's own weights this is self-speculation without a second
checkpoint (QuantSpec, 2502.10424, without its cache). Knows nothing of rounds. Read next: ``integer.py``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec.errors import InvalidInput, UnsupportedModel
from specdec.weights import graphs, integer
from specdec.weights.adapters import without_adapters
from specdec.weights.filling import on_real
from specdec.weights.packed import PackedWeight
from specdec.weights.share import shared_copy

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUP = 32  # neighbours in a row that share scale and zero
INNER = 8  # tiles of 16 columns that the CUDA kernel packs together
ROWS = 8192  # rows quantised at a time: a head in float32 need not fit into memory beside the model
# tokens in a pass from which on the given weights are faster: the low-bit kernels are written for few and compute
# where they should read. Measured on CPUs (docs/weights.md), a guess for CUDA.
WIDE = {("int4", "cpu"): 8, ("int8", "cpu"): 5, ("int4", "cuda"): 32, ("int8", "cuda"): 32}
# where a CPU has no instructions for bfloat16, plain matrices never are, and packed ones are from here on
WIDE_PACKED = 3
# whether torch has kernels of this processor for bfloat16: asked once, and not in graphs, which cannot ask
MULTIPLIES_BFLOAT16 = bool(
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)

_here = threading.local()  # .alike: passes of all widths are computed with few bits


def quantize_draft(model: Any, kind: str = "int4", *, keep: bool = True) -> Any:
    """A draft that shares everything with ``model`` but its linear layers, the head included.

    A tied head gets a quantised matrix of its own; embeddings, norms and buffers are shared, not copied.
    Layers of sizes that the kernels do not take (columns in 32, for int4 rows in 16) stay as they are. Quantise
    after moving and converting: the result stays on its device and in its dtype.

    Args:
        model: a decoder-only model in bfloat16, float16 or float32; left as it is. Its adapters (PEFT), which
            come and go with the target's, are left out.
        kind: "int4" or "int8".
        keep: passes over many tokens (prompts, large batches) go through the weights given, which are faster
            there, and therefore stay in memory. False lets go of them: least memory, slow prompts. On a CPU
            without instructions for bfloat16 only packed weights are faster.

    Returns:
        The draft, a model of the same class.

    Raises:
        InvalidInput: no such kind.
        UnsupportedModel: an encoder-decoder, or a model without linear layers that can be quantised.
    """
    if kind not in KINDS:
        raise InvalidInput(f"kind={kind!r} does not exist; use one of {tuple(KINDS)}")
    if not hasattr(model, "config"):
        raise UnsupportedModel(f"quantize_draft was given a {type(model).__name__}; wanted is a Hugging Face model")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only models can be quantised here. "
            "Give a smaller model as draft"
        )
    model = without_adapters(model)
    layers: dict[torch.nn.Module, torch.nn.Module] = {}
    for module in model.modules():
        if type(module) is torch.nn.Linear and KINDS[kind].takes(module):
            layers[module] = KINDS[kind](module, keep)
    if not layers:
        raise UnsupportedModel(
            f"{type(model).__name__} has no linear layer that can be quantised to {kind}: wanted are "
            f"torch.nn.Linear on the CPU or on CUDA, in bfloat16, float16 or float32, with columns in {GROUP}, for "
            "int4 with rows in 16. Give a smaller model as draft"
        )
    return shared_copy(model, layers)


def has_two_weights(model: Any) -> bool:
    """Whether ``model`` computes wide passes with other weights than narrow ones, as ``keep`` has it."""
    return any(isinstance(module, _Quantized) and module._given for module in model.modules())


class all_alike:
    """While this lasts, wide passes in this thread are computed as narrow ones are, to be compared with them."""

    def __enter__(self) -> None:
        self._before = getattr(_here, "alike", False)
        _here.alike = True

    def __exit__(self, *_: object) -> None:
        _here.alike = self._before


class _Quantized(torch.nn.Module):
    """A linear layer with few bits a weight; the kernel is the subclass's."""

    kind: str
    scales: Tensor
    bias: Tensor | None

    def __init__(self, layer: Any, keep: bool) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        # in a tuple, so that it is no part of this module: the given model owns it
        self._given: tuple[Any, ...] = (layer,) if keep else ()
        self._like = layer.weight.new_empty(0)

    def forward(self, states: Tensor) -> Tensor:
        """(..., N) from hidden states (..., K)."""
        return on_real(states, self.in_features * self.out_features, self._forward)

    def _forward(self, states: Tensor) -> Tensor:
        if self._given and self._wide(states):
            given = self._given[0]
            return functional.linear(states, given.weight, given.bias)
        rows = states.reshape(-1, self.in_features).contiguous()
        out = self._multiply(rows.to(self.scales.dtype)).to(states.dtype)
        out = out if self.bias is None else out + self.bias
        return out.view(*states.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        """The matrix (N, K), for models that multiply with it on their own, as some routers do."""
        if self._given:
            weight: Tensor = self._given[0].weight
            return weight
        unit = torch.eye(self.in_features, dtype=self.scales.dtype, device=self.scales.device)
        return self._multiply(unit).t().to(self._like.dtype)

    def _wide(self, states: Tensor) -> bool:
        """Whether the given weight is faster for ``states`` (..., K)."""
        if _alike():
            return False
        weight = self._given[0].weight
        least: float = WIDE[self.kind, weight.device.type]
        if weight.device.type == "cpu" and not MULTIPLIES_BFLOAT16:
            least = WIDE_PACKED if isinstance(weight, PackedWeight) else math.inf
        return bool(states.numel() >= least * self.in_features)

    def _multiply(self, states: Tensor) -> Tensor:
        """(R, N) in the kernel's dtype, which is that of the scales, from states (R, K) in it."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        was, now = self._like, fn(self._like)
        if (now.dtype, now.device) != (was.dtype, was.device):
            raise UnsupportedModel(
                f"a quantised draft stays in {was.dtype} on {was.device}; convert or move the model first, then "
                "call quantize_draft"
            )
        return self  # and the kernel's numbers stay in the kernel's dtype

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class Int8Linear(_Quantized):
    """Eight bits a weight and one scale a row: w ≈ q · scale, q in -127 ... 127."""

    kind = "int8"
    quantized: Any

    def __init__(self, layer: torch.nn.Linear, keep: bool) -> None:
        super().__init__(layer, keep)
        weight = layer.weight.detach()
        largest = torch.cat([part.abs().amax(dim=1) for part in torch.split(weight, ROWS)]).float()
        scales = (largest / 127).clamp(min=1e-12).to(_kernel_dtype(weight))
        parts = zip(torch.split(weight, ROWS), torch.split(scales.float(), ROWS), strict=True)
        self.register_buffer("scales", scales)
        quantized = torch.cat([_int8(part, scale) for part, scale in parts])
        self.held = integer.Bytes(quantized, scales) if keep and _in_bytes(weight) else None
        self.register_buffer("quantized", quantized if self.held is None else None)
        self.kernel_bytes = 0 if self.held is None else quantized.nbytes

    @staticmethod
    def takes(layer: torch.nn.Linear) -> bool:
        """Whether the kernel takes this layer."""
        weight = layer.weight
        # torch's kernel for CPUs reads past the end of rows that its registers do not divide, and says nothing
        fits = weight.device.type == "cuda" or (weight.device.type == "cpu" and weight.shape[1] % GROUP == 0)
        return fits and weight.dtype in DTYPES

    def forward(self, states: Tensor) -> Tensor:
        """(..., N) from hidden states (..., K)."""
        # bytes are not compared with one another: a last bit moves numbers to the next byte
        if self.held is None or not integer.few(states) or _alike():
            return super().forward(states)
        return on_real(states, self.in_features * self.out_features, self._round)

    def _round(self, states: Tensor) -> Tensor:
        """The same for few tokens, rounded."""
        matrix: Any = self.held
        if torch.compiler.is_compiling():
            out = graphs.packed_linear(states, None, matrix.number, self.out_features)
        else:
            out = matrix.beside_others(states)
        return out if self.bias is None else out + self.bias

    def _wide(self, states: Tensor) -> bool:
        return self.held is not None or super()._wide(states)

    def _multiply(self, states: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(states, self.quantized, self.scales)


class Int4Linear(_Quantized):
    """Four bits a weight, scale and zero for a group of neighbours: w ≈ (q - 8) · scale + zero, q in 0 ... 15."""

    kind = "int4"
    packed: Tensor

    def __init__(self, layer: torch.nn.Linear, keep: bool) -> None:
        super().__init__(layer, keep)
        weight = layer.weight.detach()
        parts = [_int4(part, _kernel_dtype(weight)) for part in torch.split(weight, ROWS)]
        quantized = torch.cat([part[0] for part in parts])
        self.on_cpu = weight.device.type == "cpu"
        if self.on_cpu:
            packed = torch._convert_weight_to_int4pack_for_cpu(quantized.int(), 1)
        else:  # pragma: no cover
            # not run on a GPU yet: two neighbours a byte, the even one in the upper half
            pairs = (quantized[:, ::2] << 4 | quantized[:, 1::2]).to(torch.uint8)
            packed = torch._convert_weight_to_int4pack(pairs, INNER)
        self.register_buffer("packed", packed)
        # (K / 32, N, 2), as the kernels want it
        self.register_buffer("scales", torch.cat([part[1] for part in parts]).transpose(0, 1).contiguous())

    @staticmethod
    def takes(layer: torch.nn.Linear) -> bool:
        """Whether the kernel takes this layer."""
        weight = layer.weight
        rows, columns = weight.shape
        if weight.device.type == "cuda":  # pragma: no cover
            return weight.dtype == torch.bfloat16 and rows % 8 == 0 and columns % (16 * INNER) == 0
        fits = rows % 16 == 0 and columns % GROUP == 0
        return fits and weight.dtype in DTYPES and weight.device.type == "cpu"

    def _multiply(self, states: Tensor) -> Tensor:
        if self.on_cpu:
            return torch._weight_int4pack_mm_for_cpu(states, self.packed, GROUP, self.scales)
        return torch._weight_int4pack_mm(states, self.packed, GROUP, self.scales)  # pragma: no cover


KINDS: dict[str, Any] = {"int4": Int4Linear, "int8": Int8Linear}


def _alike() -> bool:
    """Passes of all widths shall be computed alike."""
    alike: bool = not torch.compiler.is_compiling() and getattr(_here, "alike", False)
    return alike


def _in_bytes(weight: Tensor) -> bool:
    """Whether activations are rounded as well."""
    return weight.device.type == "cpu" and MULTIPLIES_BFLOAT16 and integer.available()


def _kernel_dtype(weight: Tensor) -> torch.dtype:
    """What the kernels are fast in: torch's for CPUs compute other dtypes number by number."""
    return torch.bfloat16 if weight.device.type == "cpu" else weight.dtype


def _int8(weight: Tensor, scales: Tensor) -> Tensor:
    """Whole numbers (N, K) for a part of a matrix and its scales (N,)."""
    return (weight.float() / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8)


def _int4(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Whole numbers (N, K) and (N, K / 32, 2) scales and zeros for a part of a matrix.

    Scale and zero are rounded to the kernel's ``dtype`` first, so that the numbers fit what is stored.
    """
    groups = weight.float().view(len(weight), -1, GROUP)
    low, high = groups.aminmax(dim=2)
    scale = ((high - low) / 15).clamp(min=1e-6).to(dtype)
    zero = (low + 8 * scale.float()).to(dtype)
    numbers = (groups - zero.float()[..., None]).div_(scale.float()[..., None]).add_(8).round_().clamp_(0, 15)
    return numbers.flatten(1).to(torch.uint8), torch.stack([scale, zero], dim=2)
