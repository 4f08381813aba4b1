"""The weights of linear layers in the order that the processor's kernels read them.

``torch.nn.functional.linear`` hands a plain matrix to the kernel at every call. Reordered once beforehand
(oneDNN's blocked layouts), the same kernel reads it faster and computes the same numbers (``blocks.py`` has the one
exception). Where the processor has no instructions for the weights' dtype, FBGEMM's half-precision kernels take
their place. The layers stay ``torch.nn.Linear``; only their weight becomes a ``PackedWeight``, which computes from
the packed form in ``linear`` and is the plain matrix to everything else. CPU only. Read next: ``half.py``.
"""

from __future__ import annotations

import copy
import operator
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import TensorWeakRef

from specdec.errors import UnsupportedModel
from specdec.weights import blocks, graphs, half
from specdec.weights.filling import on_real
from specdec.weights.race import LEAST


def pack_weights(model: Any) -> Packing:
    """Pack the weight of every plain ``torch.nn.Linear`` of ``model``, in place, until it is unpacked.

    The packed form replaces the plain one, so memory stays as it is, except for weights that something else
    holds as well (a head tied to the embedding): those are held twice, and ``doubled_bytes`` says how much.
    ``state_dict()`` and everything else that reads a weight gets the plain matrix, made on the spot; writing
    to a packed weight (``load_state_dict``, an optimiser, merging an adapter) is refused. With gradients on,
    or inputs of another dtype, the plain matrix is made at every call: right, and slow. Subclasses of
    ``Linear`` are left alone, and with a warning all float32 ones of a model on processors that multiply plain ones
    as fast or faster (timed once a process, a second at most).

    Args:
        model: any module on the CPU, in float32, bfloat16 or float16 (the latter two on processors that multiply
            them, or with AVX2).

    Returns:
        A handle: ``handle.unpack()``, or use it as a context manager.

    Raises:
        UnsupportedModel: there is nothing in it that can be packed.
    """
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedModel(f"pack_weights was given a {type(model).__name__}; wanted is a model")
    layers = [part for part in model.modules() if type(part) is torch.nn.Linear and packable(part.weight)]
    left = _left_plain(model, layers)
    packed: list[PackedWeight] = []
    by_number: dict[int, PackedWeight] = {}
    weight = None
    try:
        for module in layers:
            weight = module.weight
            if weight.dtype == left:
                continue
            known = by_number.get(id(weight))
            # a plain weight that nobody else holds is gone by now, and its number may be another's
            if known is None or known.origin() is not weight:
                form = _form(weight)
                if form is None:
                    continue
                known = by_number[id(weight)] = PackedWeight(weight, form)
                packed.append(known)
            _put(module, known)
    except BaseException:
        unpack_weights(model)
        raise
    del weight
    if not packed and left is None:
        if any(isinstance(weight, PackedWeight) for weight in model.parameters()):
            raise UnsupportedModel(f"{type(model).__name__} is packed already; unpack_weights(model) undoes it")
        raise UnsupportedModel(
            f"{type(model).__name__} has no linear layer that can be packed: wanted are torch.nn.Linear on the "
            "CPU in float32, or in bfloat16 or float16 on a processor that has kernels for them (x86 with AVX2 "
            "does). Use it as it is"
        )
    return Packing(model, packed)


def unpack_weights(model: Any) -> None:
    """Give every packed layer of ``model`` its plain weight back, bit for bit; does nothing to others."""
    restored: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        packed = vars(module)["_parameters"].get("weight")
        if isinstance(packed, PackedWeight):
            if id(packed) not in restored:
                restored[id(packed)] = packed.restore()
            _put(module, restored[id(packed)])


class Packing:
    """What ``pack_weights`` did to a model; undoes it with ``unpack()`` or at the end of a ``with`` block.

    Attributes:
        layers: weights packed.
        packed_bytes: size of all of them.
        doubled_bytes: size of those that something else holds in plain form as well.
    """

    def __init__(self, model: Any, weights: list[PackedWeight]) -> None:
        self._model = model
        self.layers = len(weights)
        self.packed_bytes = sum(w.numel() * w.element_size() for w in weights)
        self.doubled_bytes = sum(w.numel() * w.element_size() for w in weights if w.origin() is not None)

    def unpack(self) -> None:
        """See ``unpack_weights``."""
        unpack_weights(self._model)

    def __enter__(self) -> Packing:
        return self

    def __exit__(self, *_: object) -> None:
        self.unpack()

    def __repr__(self) -> str:
        twice = f", {self.doubled_bytes:,} of them held twice" if self.doubled_bytes else ""
        return f"Packing({self.layers} weights, {self.packed_bytes:,} bytes{twice})"


def packable(weight: Any) -> bool:
    """Whether there are kernels for this weight."""
    is_matrix = type(weight) is torch.nn.Parameter and weight.device.type == "cpu" and weight.ndim == 2
    if not is_matrix or not weight.numel():
        return False
    if weight.dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return False  # torch's own kernels know what to do
    return _blocks(weight.dtype) or (weight.dtype in (torch.bfloat16, torch.float16) and half.available())


def _left_plain(model: torch.nn.Module, layers: list[torch.nn.Linear]) -> torch.dtype | None:
    """The dtype whose matrices are as fast or faster as they are, if ``layers`` have large ones; says so."""
    large = any(layer.weight.dtype == torch.float32 and layer.weight.numel() >= LEAST for layer in layers)
    if not large or blocks.pays(torch.float32, torch.get_num_threads()):
        return None
    warnings.warn(
        f"specdec leaves the float32 weights of {type(model).__name__} as they are: this processor multiplies "
        "plain ones as fast as packed ones, or faster. Use it as it is",
        stacklevel=3,
    )
    return torch.float32


def _blocks(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in ``dtype`` on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _form(weight: Tensor) -> blocks.Blocked | half.HalfMatrix | None:
    """The packed form of a packable weight, or None where its numbers are not fit for it."""
    return blocks.Blocked(weight) if _blocks(weight.dtype) else half.HalfMatrix.of(weight)


class PackedWeight(torch.Tensor):
    """A weight (N, K) that ``linear`` reads in packed form and everything else sees as the plain matrix."""

    form: blocks.Blocked | half.HalfMatrix
    origin: TensorWeakRef
    learns: bool
    kind: torch.dtype  # asking a tensor subclass for its dtype or size takes as long as the rest of ``_linear``
    numbers: int

    @staticmethod
    def __new__(cls, weight: Tensor, form: blocks.Blocked | half.HalfMatrix) -> PackedWeight:
        """A parameter's place taken by its packed form; the parameter is not kept alive."""
        self: PackedWeight = torch.Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=False
        )
        self.form = form
        self.origin = TensorWeakRef(weight)
        self.learns = weight.requires_grad
        self.kind, self.numbers = weight.dtype, weight.numel()
        self._is_param = True  # what makes a tensor subclass a torch.nn.Parameter
        return self

    @property
    def data(self) -> Tensor:
        """The plain matrix; giving another one, as ``model.to(dtype)`` does, is refused."""
        return self.dense()

    @data.setter
    def data(self, other: Tensor) -> None:
        if other is not self:
            raise _written(self)

    def dense(self) -> Tensor:
        """The plain matrix (N, K)."""
        return self.form.dense()

    def restore(self) -> torch.nn.Parameter:
        """The parameter this was made of, if anybody kept it, or one that is equal bit for bit."""
        kept: torch.nn.Parameter | None = self.origin()
        if kept is not None:
            return kept
        with torch.inference_mode(False):  # the model shall still learn
            return torch.nn.Parameter(self.dense(), requires_grad=self.learns)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, wanted in enumerate(func._schema.arguments):
            if wanted.alias_info is not None and wanted.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(wanted.name)
                for value in tree_leaves(given):  # one tensor, or several
                    if isinstance(value, cls):
                        raise _written(value)
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs))
        return func(*args, **kwargs)

    def __setitem__(self, *_: Any) -> None:
        """Refused: it would write to the plain matrix of the moment."""
        raise _written(self)

    def share_memory_(self) -> Tensor:
        """Refused: torch would move memory that is not there, and crash."""
        raise _written(self)

    def __dlpack__(self, **options: Any) -> Any:
        """The plain matrix for another library; torch would hand out memory that is not there."""
        return self.dense().__dlpack__(**options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        kept = self.origin()  # held by an embedding, whose copy is tied to this one
        return self.restore() if kept is None else copy.deepcopy(kept, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        kept = self.origin()
        if kept is not None:  # the very object, so that it is tied again when read
            return operator.getitem, ([kept], 0)
        return torch.nn.Parameter, (self.dense(), self.learns)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype})"


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` with packed weights, where the packed kernel can serve the call."""
    if isinstance(weight, PackedWeight) and _agree(input, bias, weight.kind):
        form = weight.form
        if torch.compiler.is_compiling():
            out: Tensor = graphs.packed_linear(input, bias, form.number, weight.shape[0])
            return out
        return on_real(input, weight.numbers, lambda states: form.linear(states, bias))
    with torch._C.DisableTorchFunctionSubclass():
        input, weight = (t.dense() if isinstance(t, PackedWeight) else t for t in (input, weight))
        return functional.linear(input, weight, bias)


def _agree(input: Tensor, bias: Tensor | None, kind: torch.dtype) -> bool:
    """Whether the call is one that the kernel computes: this dtype, the CPU, nothing to be learnt."""
    if type(input) is not Tensor or not input.numel() or input.dtype != kind:
        return False
    if input.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return not (torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)))


def _written(weight: Tensor) -> UnsupportedModel:
    return UnsupportedModel(
        f"a packed weight of shape {tuple(weight.shape)} cannot be changed, moved or converted; call "
        "specdec.unpack_weights(model) first. If all of a model was to be converted, as by model.half(), what "
        "comes before this weight has been: unpack, and convert again"
    )


def _put(module: torch.nn.Module, weight: Any) -> None:
    """Make ``weight`` the weight of a linear layer."""
    module._parameters["weight"] = weight
