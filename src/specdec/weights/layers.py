"""A part of a model: some of its layers, everything else the model's own, and the model left as it is.

The part is a second object over the first one's modules. Only what has to differ is copied, and shallowly: the way
from the model down to its list of layers, the configuration, and modules that know the number of their layer (it
is where they look in the cache). Copies share the tables of parameters with what they are copies of, so moving,
training or packing the model reaches its parts.

Knows nothing of drafts. Read next: ``../proposers/__init__.py``.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from specdec.errors import UnsupportedModel


def count_layers(model: Any) -> int:
    """Layers of the decoder of ``model``.

    Raises:
        UnsupportedModel: an encoder-decoder, or no list of layers can be told from the others.
    """
    return len(model.get_submodule(_place(model)))


def with_layers(model: Any, keep: Sequence[int]) -> Any:
    """``model`` with the layers ``keep`` only, in this order, numbered anew from 0.

    Raises:
        UnsupportedModel: see ``count_layers``; or layers need one another, or a forward is patched.
    """
    place = _place(model)
    layers = model.get_submodule(place)
    kept = [_renumbered(layers[old], old, new) for new, old in enumerate(keep)]
    return _rebuilt(model, place.split("."), torch.nn.ModuleList(kept), keep, len(layers))


def _place(model: Any) -> str:
    """The dotted name of the list of layers: the one list of modules as long as the model is deep."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is an encoder-decoder; only decoder-only models can be taken apart")
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "num_kv_shared_layers", None):
        raise UnsupportedModel(f"layers of {name} share keys and values, none can be left out; give another draft")
    depth = getattr(text, "num_hidden_layers", 0)
    found = [
        place
        for place, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    ]
    if len(found) > 1 and hasattr(model, "get_decoder"):
        inside = {id(module) for module in model.get_decoder().modules()}
        found = [place for place in found if id(model.get_submodule(place)) in inside]
    if len(found) != 1:
        raise UnsupportedModel(
            f"{name} has {len(found)} lists of {depth} modules where one is wanted, the layers; give another draft"
        )
    return str(found[0])


def _rebuilt(module: Any, path: list[str], layers: Any, keep: Sequence[int], depth: int) -> Any:
    """A copy of ``module`` with ``layers`` at ``path``, everything beside the way there being the same objects."""
    clone = _shallow(module)
    name, *rest = path
    clone._modules[name] = _rebuilt(module._modules[name], rest, layers, keep, depth) if rest else layers
    if "config" in vars(clone):
        clone.config = _shortened(module.config, keep, depth)
    vars(clone).pop("generate", None)  # lent to the model for a while, and bound to it
    # transformers records states by hooks that a model puts on its modules once; these belong to ``module``
    vars(clone)["_output_capturing_hooks_installed"] = True
    # and who listens to the model itself means its own passes
    vars(clone).update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
    return clone


def _renumbered(module: Any, old: int, new: int) -> Any:
    """``module`` as layer ``new`` instead of ``old``; what does not know its number stays the same object."""
    if old == new:
        return module
    children = {name: _renumbered(child, old, new) for name, child in module.named_children()}
    knows = vars(module).get("layer_idx") == old
    if not knows and all(children[name] is child for name, child in module.named_children()):
        return module
    clone = _shallow(module)
    clone._modules.update(children)
    if knows:
        clone.layer_idx = new
    return clone


def _shallow(module: Any) -> Any:
    """A copy with the parameters, buffers and hooks of ``module``, and modules that can be exchanged."""
    if "forward" in vars(module):
        raise UnsupportedModel(
            f"the forward of {type(module).__name__} is patched (as accelerate does to spread a model over "
            "devices), and a part of the model would run all layers; load it on one device, or give another draft"
        )
    clone = copy.copy(module)
    vars(clone)["_modules"] = dict(module._modules)
    return clone


def _shortened(config: Any, keep: Sequence[int], depth: int) -> Any:
    """``config`` for the layers ``keep``: fewer of them, and of every list with an entry a layer those entries."""
    short = copy.copy(config)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    # past the checks of a configuration, which want the number and the lists to change in one step
    fields = vars(short)
    if text is not config:
        names = [name for name, part in fields.items() if part is text]
        fields.update({name: _shortened(text, keep, depth) for name in names})
        return short
    for name, value in fields.items():
        if isinstance(value, (list, tuple)) and len(value) == depth:
            fields[name] = type(value)(value[layer] for layer in keep)
    fields[(getattr(config, "attribute_map", None) or {}).get("num_hidden_layers", "num_hidden_layers")] = len(keep)
    return short
