"""The models: loading, noise against twice-quantised weights, random weights, packing.

Read next: ``workload.py``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from specdec import pack_weights, prune_head, quantize_draft

GROUP = 32  # weights that share a scale in the 4-bit files that the noise imitates


@dataclass(frozen=True, slots=True)
class Pair:
    """Target, draft (or None) and their tokenizers."""

    target: Any
    draft: Any
    tokenizer: Any
    draft_tokenizer: Any


def load(options: argparse.Namespace) -> Pair:
    """Load what the command line names.

    ``options`` has target, draft, dtype, device, noise, useless_draft, and perhaps draft_head and draft_bits.
    """
    torch.manual_seed(0)
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.target, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype=dtype).to(device).eval()
    draft = draft_tokenizer = None
    if options.draft is not None:
        draft_tokenizer = AutoTokenizer.from_pretrained(options.draft, padding_side="left")
        if options.useless_draft:
            config = AutoConfig.from_pretrained(options.draft)
            draft = AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            draft = AutoModelForCausalLM.from_pretrained(options.draft, dtype=dtype)
        draft = draft.to(device).eval()
    for number, model in enumerate((target, draft)):
        if model is not None and options.noise:
            add_noise(model, seed=number)
    head, bits = (getattr(options, name, None) for name in ("draft_head", "draft_bits"))
    if draft is not None and head:
        draft = prune_head(draft, [], head)
    if draft is not None and bits:
        draft = quantize_draft(draft, bits)
    return Pair(target, draft, tokenizer, draft_tokenizer)


@torch.no_grad()
def add_noise(model: Any, seed: int = 0) -> None:
    """Add to every linear weight uniform noise of up to half a 4-bit step, either way.

    A step is the range of 32 neighbouring weights of a row over 15. Weights that came out of a 4-bit file are
    given back to a second quantisation almost unharmed; with the noise they lose about what trained weights lose.
    """
    generator = torch.Generator().manual_seed(seed)
    seen = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.data_ptr() not in seen:
            seen.add(module.weight.data_ptr())
            for rows in module.weight.split(4096):  # a head of 150,000 rows at once would take gigabytes
                noise = torch.rand(rows.shape, generator=generator).sub_(0.5).to(rows.device)
                rows.add_((noise * steps(rows)).to(rows.dtype))


def steps(weight: Tensor) -> Tensor:
    """(rows, columns) size of a 4-bit step at each entry of ``weight`` (rows, columns)."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % GROUP), mode="replicate")
    groups = padded.unflatten(1, (-1, GROUP))
    step = (groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)) / 15
    return step.expand_as(groups).reshape(rows, -1)[:, :columns]


class Dress:
    """Models whose weights are packed for some contestants and plain for others; changed outside the timing.

    Both forms are kept, in twice the memory: graphs know the very matrices that they were made with.
    """

    def __init__(self, models: list[Any]) -> None:
        """Pack all models; what cannot be packed is said now."""
        layers = [part for model in models for part in model.modules() if type(part) is torch.nn.Linear]
        plain = [layer.weight for layer in layers]
        for model in models:
            pack_weights(model)
        self._forms = [(layer, weight, layer.weight) for layer, weight in zip(layers, plain, strict=True)]

    def wear(self, packed: bool) -> None:
        """Give all layers the one form or the other."""
        for layer, *forms in self._forms:
            layer.weight = forms[packed]


@dataclass(frozen=True, slots=True)
class Weights:
    """What one forward works through.

    Args:
        parameters: that every token is multiplied with, or None where the weights are packed in small integers.
            All experts of a mixture are counted, though a token wakes only some.
        bytes: of weights that a forward reads: all but an embedding table that is only looked up in.
    """

    parameters: int | None
    bytes: int


def weights_of(model: Any) -> Weights:
    """Count the weights of ``model``, before they are packed."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head._parameters.get("weight") is table
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.ndim > 1)]
    read = [t for t in tensors if tied or t is not table]
    quantised = any(not t.is_floating_point() for t in read)
    return Weights(None if quantised else sum(t.numel() for t in read), sum(t.nbytes for t in read))


def last_only(model: Any) -> dict[str, int]:
    """The argument that asks ``model`` for the scores of the last position alone, if it has one."""
    return {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
