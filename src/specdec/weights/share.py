"""A second model out of a first: other layers where wanted, all other tensors shared, the first left as it is.

Read next: ``adapters.py``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from specdec.errors import UnsupportedModel
from specdec.weights.packed import PackedWeight
from specdec.weights.thin import is_as_made


def shared_copy(model: Any, layers: dict[torch.nn.Module, torch.nn.Module]) -> Any:
    """A copy of ``model`` with ``layers`` exchanged (old: new), wherever the model refers to them.

    Parameters are new objects over the same memory: moving or converting the copy leaves ``model`` alone,
    and training ``model`` in place reaches the copy.

    Raises:
        UnsupportedModel: the model's forward passes are patched and would run the old layers.
    """
    for module in model.modules():
        if not is_as_made(module):
            raise UnsupportedModel(
                f"the forward of {type(module).__name__} is patched (as accelerate does to spread a model over "
                "devices), and a copy would run the old layers; load the draft on one device"
            )
    memo: dict[int, Any] = {id(old): new for old, new in layers.items()}
    for parameter in model.parameters():
        if id(parameter) not in memo:
            packed = isinstance(parameter, PackedWeight)
            view = parameter if packed else torch.nn.Parameter(parameter.detach(), requires_grad=False)
            memo[id(parameter)] = view
    memo.update({id(buffer): buffer for buffer in model.buffers()})
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        vars(module).pop("forward", None)  # of a pass that was under way
    if layers and hasattr(copied, "save_pretrained"):
        copied.save_pretrained = _refuse_to_save
    return copied


def _refuse_to_save(*_: Any, **__: Any) -> None:
    """What was written would be read back as a plain model, its own layers drawn at random."""
    raise UnsupportedModel(
        "save_pretrained would lose the layers that were exchanged; make the draft anew from the model, or save "
        "it with torch.save"
    )
