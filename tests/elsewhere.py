"""A device called "elsewhere": not the host's memory, and slow to answer. No GPU is needed, and none is used.

torch can have a backend written in Python; this one runs every operation on the CPU, but is as strict as CUDA:
tensors of two devices do not mix (but for numbers and copies), and numpy cannot look into one. What would make the
host wait on CUDA is noted with its place: reading a value, a mask as an index, and every copy but those from pinned
memory that were told to queue (``non_blocking``).

Importing this file makes the device, for the whole process, and replaces some of torch's functions: it is for a
process of its own, ``cases_elsewhere.py``.
"""

import copy
import traceback
from pathlib import Path

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers.pytorch_utils import move_to_device

NAME = "elsewhere"
SOURCE = Path(__file__).resolve().parent.parent / "src" / "specdec"
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default, aten._copy_from.default)
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
READS = (
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.is_nonzero.default, aten._unique2.default, aten.repeat_interleave.Tensor,
)  # fmt: skip

waits: list[str] = []


class MixedDevices(RuntimeError):
    """Tensors of two devices in one operation."""


class Module:
    """What torch asks of the module of a device."""

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def device_count(self):
        return 2

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass


_setup_privateuseone_for_python_backend(rename=NAME, backend_module=Module())
DEVICE = torch.device(NAME, 0)


def wait(what):
    """Note that the host waits, and for whom."""
    ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(SOURCE))]
    at = f"{Path(ours[-1].filename).relative_to(SOURCE).as_posix()} {ours[-1].name}" if ours else "outside"
    waits.append(f"{at}: {what}")


class There(torch.Tensor):
    """A tensor on the device; its numbers are those of a tensor on the host that nobody else sees."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, device=DEVICE):
        there = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=device,
        )  # fmt: skip
        there.inner = inner
        return there

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})

    def tolist(self):
        wait("tolist")
        return self.inner.tolist()

    def numpy(self, **_):
        raise TypeError(f"numpy cannot look into {NAME}")

    def __array__(self, *_, **__):
        raise TypeError(f"numpy cannot look into {NAME}")

    def new_tensor(self, data, **options):
        return made({"dtype": self.dtype, "device": self.device} | options, torch.tensor, data)

    def __getitem__(self, index):
        return super().__getitem__(_with_tensors(index, self.device))

    def __setitem__(self, index, value):
        super().__setitem__(_with_tensors(index, self.device), value)

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), like(self, self.inner.clone(), self.device))


def put_there(tensor, device=DEVICE):
    """``tensor`` on the device."""
    return There(tensor, device)


def like(one, inner, device):
    """A parameter if ``one`` is, with the numbers of ``inner`` on ``device``."""
    there = There(inner, device)
    return torch.nn.Parameter(there, requires_grad=False) if isinstance(one, torch.nn.Parameter) else there


def pinned(tensor):
    """A copy of ``tensor`` in memory that stays where it is."""
    copied = tensor.clone()
    copied.pinned = True
    return copied


def moved(model):
    """A copy of ``model`` on the device."""
    return _put(copy.deepcopy(model), DEVICE)


def split(model):
    """A copy of ``model``, its last layer on a second device, where hooks like accelerate's take its inputs."""
    model = moved(model)
    second, last = torch.device(NAME, 1), model.model.layers[-1]
    _put(last, second)
    for module, device in ((last, second), (model.model.norm, DEVICE)):
        module.register_forward_pre_hook(
            lambda _, args, kwargs, device=device: move_to_device((args, kwargs), device), with_kwargs=True
        )
    return model


def _put(model, device):
    known = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    inner = tensor.inner if isinstance(tensor, There) else tensor.detach()
                    tensors[name] = known.setdefault(id(tensor), like(tensor, inner, device))
    return model


def run(operation, args, kwargs):
    """Run ``operation`` on the host, and say what is wrong with it on a device."""
    tensors = list(_tensors((*args, *kwargs.values())))
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    here = [tensor for tensor in tensors if not isinstance(tensor, There)]
    device = there[0].device if there else torch.device("cpu")
    if kwargs.get("device") is not None:
        device = _indexed(kwargs["device"])
    if operation in COPIES:
        if operation is aten.copy_.default:
            device = args[0].device
        crosses = (there and here) or bool(there) != (device.type == NAME)  # between two devices nobody waits
        asks = kwargs.get("non_blocking") or True in args[2:3]
        queues = asks and all(hasattr(tensor, "pinned") for tensor in here)
        if crosses and not queues:
            wait(f"a copy to {'the device' if device.type == NAME else 'the host'}")
    elif there:
        mixes = [args[0], *there] if operation in INDEXED else tensors
        mixes = [tensor for tensor in mixes if isinstance(tensor, There) or tensor.ndim]
        if any(tensor.device != device for tensor in mixes):
            raise MixedDevices(f"{operation} {[(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]}")
        indices = [one for one in args[1] or () if one is not None] if operation in INDEXED else []
        if operation in READS:
            wait(str(operation))
        if any(one.dtype == torch.bool or not isinstance(one, There) for one in indices):
            wait("an index that is a mask, or on the host")
    args = [_on_host(value) for value in args]
    kwargs = {name: _on_host(value) for name, value in kwargs.items()}
    if operation is aten.histc.default and not args[0].is_floating_point():  # which the CPU does not count
        result = operation(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    else:
        result = operation(*args, **kwargs)
    return result if device.type != NAME else _there(result, {id(one.inner): one for one in there}, device)


def _indexed(device):
    device = torch.device(device)
    return torch.device(NAME, device.index or 0) if device.type == NAME else device


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _on_host(value):
    if isinstance(value, There):
        return value.inner
    if isinstance(value, list | tuple):
        return [_on_host(one) for one in value]
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _there(value, known, device):
    """The result on the device: the same tensors where an operation changed what it was given."""
    if isinstance(value, list | tuple):
        return type(value)(_there(one, known, device) for one in value)
    if not isinstance(value, torch.Tensor) or isinstance(value, There):
        return value
    before = known.get(id(value))
    return before if before is not None and before.device == device else There(value, device)


def made(options, factory, *args):
    """What ``factory`` makes of a list, of numbers or of tensors."""
    asked = options.pop("device", None)
    result = factory(*_numbers(args), **options)
    if asked is None or torch.device(asked).type != NAME:
        return result
    wait("a tensor of numbers")
    return There(result, _indexed(asked))


def _numbers(value):
    if isinstance(value, There):
        return value.item()
    return [_numbers(one) for one in value] if isinstance(value, list | tuple) else value


def _with_tensors(index, device):
    """Lists in an index become tensors on the device, which the C++ of a real one would see to."""
    one = lambda item: torch.tensor(item, device=device) if isinstance(item, list) else item  # noqa: E731
    return tuple(map(one, index)) if isinstance(index, tuple) else one(index)


class _Kind(type):
    def __instancecheck__(cls, instance):
        return isinstance(instance, HostGenerator)


class Generator(metaclass=_Kind):
    """The host's generator stands in for the device's."""

    def __new__(cls, device="cpu"):
        return HostGenerator("cpu" if torch.device(device).type == NAME else device)


HostGenerator = torch.Generator
library = torch.library.Library("_", "IMPL")
factories = torch.library.Library("aten", "IMPL")


def install():
    """Make the device; torch's own ways to make a tensor of Python's numbers go past a Python backend."""
    library.fallback(lambda operation, *args, **kwargs: run(operation, args, kwargs), "PrivateUse1")
    for name in ("arange", "arange.start", "arange.start_step", "full"):
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(aten, packet), overload or "default")
        kernel = lambda *args, _operation=operation, **kwargs: run(_operation, args, kwargs)  # noqa: E731
        factories.impl(name, kernel, "PrivateUse1")
    tensor, as_tensor = torch.tensor, torch.as_tensor
    torch.tensor = lambda *args, **options: made(options, tensor, *args)
    torch.as_tensor = lambda data, **options: (
        data.to(**options) if isinstance(data, torch.Tensor) else made(options, as_tensor, data)
    )
    torch.Generator = Generator
    torch.Tensor.pin_memory = pinned


install()
