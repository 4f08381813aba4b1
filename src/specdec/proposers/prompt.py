"""A draft's prompt, prepared by the draft's own ``generate()``, which is stopped before its loop.

Draft and target may differ in positions, caches, masks and special inputs; processors and limits are the call's.
Knows nothing of guessing. Read next: ``past.py``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.pytorch_utils import move_to_device

from specdec.layouts import NEVER
from specdec.proposers import Call
from specdec.weights.adapters import device_of

KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "prefill_chunk_size")


def prepare(model: Any, call: Call, embeds: int) -> tuple[Tensor, dict[str, Any], Any, Any]:
    """The draft's own prompt, model inputs, config and inner model, as its ``generate()`` prepares them."""
    caught: list[Any] = []

    def catch(inner: Any, input_ids: Tensor, *, logits_processor: Any, stopping_criteria: Any,
              generation_config: Any, **kwargs: Any) -> Tensor:  # fmt: skip
        caught.append((input_ids, kwargs, generation_config, inner))
        return input_ids

    # processors, limits and ways to decode are the call's: of what every config has the draft's own says only KEPT;
    # what its kind of model alone has is left, for its generate() may ask for it
    config = copy.deepcopy(model.generation_config)
    vars(config).update({name: value for name, value in vars(GenerationConfig()).items() if name not in KEPT})
    device = device_of(model, call.prompt.device)
    prompt = call.prompt.clamp(max=embeds - 1).to(device)
    inputs = move_to_device(_inputs_for(model, call), device)
    read = inputs.get("inputs_embeds", prompt).shape[1]
    config.update(max_length=call.max_length + read - prompt.shape[1], use_cache=True)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = prompt
        start = call.target.generation_config.decoder_start_token_id
        if start is not None and bool((prompt[:, 0] != torch.tensor(start, device=prompt.device)).any()):
            config.decoder_start_token_id = prompt[:, 0].tolist()  # the call's own, one a row
    else:
        inputs["input_ids"] = prompt
    # what is None in a given config is filled up from the model's own: ask a double that has one without settings
    double = copy.copy(model)
    vars(double)["generation_config"] = config
    try:
        GenerationMixin.generate(double, custom_generate=catch, **inputs)
    except ValueError:
        if type(model).generate is GenerationMixin.generate:
            raise
        # a wrapper whose own generate() builds what its inner model needs (kosmos-2)
        type(model).generate(double, custom_generate=catch, **inputs)
    prompt, kwargs, config, inner = caught[0]
    return prompt, kwargs, config, model if inner is double else inner


def _inputs_for(model: Any, call: Call) -> dict[str, Any]:
    """The user's inputs that this draft can take: all behind an encoder and for a twin, else those of the text."""
    if model.config.is_encoder_decoder:
        return dict(call.inputs)
    twin = type(model) is type(call.target)
    inputs = {name: value for name, value in call.inputs.items() if twin or name == "attention_mask"}
    embeds = call.inputs.get("inputs_embeds")
    if embeds is None:
        # where the target goes on from a cache, masks and positions reach back further than the ids
        columns = call.prompt.shape[1]
        inputs = {name: _newest(name, value, columns) for name, value in inputs.items()}
        if inputs.get("attention_mask", call.prompt).shape[-1] < columns:
            inputs.pop("attention_mask")  # healed prompts may be longer than what was masked
        return inputs
    if call.prompt.shape[1]:
        return {}  # the text alone
    table = input_table(model)
    if table is None or table.weight.shape[1] != embeds.shape[-1]:
        raise ValueError("the call gives embeddings of another size and no input_ids")
    return {**inputs, "inputs_embeds": embeds}


def _newest(name: str, value: Tensor, columns: int) -> Tensor:
    along = ("attention_mask", "position_ids", "token_type_ids")
    return value[..., -columns:] if name in along and value.shape[-1] > columns else value


def embedded(model: Any) -> int:
    """How many token ids a model can embed."""
    table = input_table(model)
    if table is None:
        return int(model.config.get_text_config(decoder=True).vocab_size)
    return int(getattr(table, "num_embeddings", 0) or table.weight.shape[0])


def positions(model: Any) -> int:
    """Columns that a model was made for: beyond them a draft guesses nothing."""
    text = model.config.get_text_config(decoder=True)
    found: int | None = getattr(text, "max_position_embeddings", None)
    return found or NEVER


def input_table(model: Any) -> Any:
    """The module that embeds ids, None where transformers does not find it."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None
