"""Models in wrappers (PEFT's adapters, torch.compile): which model writes in the end, and it without adapters.

PEFT puts its layers into the very model that it is given and wraps it; a wrapper with LoRA and its like generates
with that inner model, one with learnt prompts prepares every step itself. PEFT is not imported: its classes are
known by what they have. And where a model wants its inputs. Knows no rounds. Read next: ``layers.py``.
"""

from __future__ import annotations

from typing import Any

import torch

from specdec.errors import UnsupportedModel
from specdec.weights.share import shared_copy


def is_model(thing: Any) -> bool:
    """Whether ``thing`` passes for a Hugging Face model."""
    return hasattr(thing, "generate") and hasattr(thing, "config")


def uncompiled(model: Any) -> Any:
    """What ``torch.compile(model)`` wraps: it has the attributes, and ``generate()`` runs it, eagerly."""
    return getattr(model, "_orig_mod", model)


def is_wrapped(model: Any) -> bool:
    """Whether ``model`` is PEFT's wrapper of another."""
    return hasattr(type(model), "get_base_model") and hasattr(model, "peft_config")


def inner_model(model: Any) -> Any:
    """The model whose ``generate()`` runs in the end, adapters and all; ``model`` itself if nothing wraps it."""
    model = uncompiled(model)
    return model.get_base_model() if is_wrapped(model) else model


def needs_its_wrapper(model: Any, given: dict[str, Any]) -> str:
    """Why a call of ``model`` with ``given`` cannot do without the wrapper's own ``generate()``, or "".

    What the wrapper sets for the time of its ``generate()`` is gone when a stream's rounds run.
    """
    model = uncompiled(model)
    if not is_wrapped(model):
        return ""
    config = model.active_peft_config
    if config.is_prompt_learning:
        return "learnt prompts are put in by the wrapper at every step"
    if given.get("adapter_names") is not None:
        return "adapter_names hold while the wrapper's generate() runs"
    if getattr(config, "alora_invocation_tokens", None) is not None:
        return "an activated LoRA is placed while the wrapper's generate() runs"
    return ""


def without_adapters(model: Any) -> Any:
    """The model as it was before PEFT: a copy that shares every tensor of ``model``, which is left as it is.

    For a draft: ``quantize_draft`` takes it of a model with adapters. Adapters that were merged into the weights
    stay in them. A model without any is returned as it is.

    Raises:
        UnsupportedModel: adapters around adapters, or patched forward passes.
    """
    inner = inner_model(model)
    layers: dict[torch.nn.Module, torch.nn.Module] = {}
    for module in inner.modules():
        if not hasattr(module, "active_adapters") or not isinstance(module, torch.nn.Module):
            continue
        for name in ("base_layer", "original_module"):  # of an adapted layer; of one that is trained whole
            plain = module._modules.get(name)
            if plain is None:
                continue
            if any(hasattr(part, "active_adapters") for part in plain.modules()):
                raise UnsupportedModel("adapters around adapters cannot be left out; give another draft")
            layers[module] = shared_copy(plain, {})
    return shared_copy(inner, layers) if layers else inner


def device_of(model: Any, given: torch.device) -> torch.device:
    """Where ``model`` takes its inputs; ``given`` where its first weights are offloaded and hooks move inputs."""
    device: torch.device = model.device
    return given if device.type == "meta" else device
