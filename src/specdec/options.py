"""Options: what is refused, by name, before any work is done; and what the door of ``generate()`` would drop.

Every argument of ``generate()`` is either honoured (then it is not named here), or refused with what to do
instead. Knows nothing of rounds. Read next: ``assistance.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from specdec.assistance import UNDERSTOOD, first_given
from specdec.attaching import having, own_settings
from specdec.errors import InvalidInput, UnsupportedOption
from specdec.layouts.facts import CACHE
from specdec.layouts.handover import cached_columns

PLAIN = "call target.generate() for it"
OURS = "drafting is what SpeculativeGenerator does; set `draft` and `num_draft_tokens` there"
# names of arguments and config fields that are refused when they hold something
REFUSED = {
    "use_mtp": OURS,
    "custom_generate": "SpeculativeGenerator is one itself; " + PLAIN,
    "synced_gpus": PLAIN,
    "cache_params": "give the whole conversation as input_ids, or " + PLAIN,
    "constraints": PLAIN,
    "force_words_ids": PLAIN,
    "penalty_alpha": PLAIN,
    "dola_layers": PLAIN,
    "compile_config": "give compile=True to SpeculativeGenerator",
}
# knobs of transformers' own assisted decoding, refused when given to a call (a config may carry them unused)
ASSISTANCE = {
    "num_assistant_tokens_schedule": "set num_draft_tokens of SpeculativeGenerator",
    "assistant_ensemble_weight": "it changes the output distribution, which this library never does",
    "speculation_type": OURS,
}
# what belongs elsewhere, and where
ELSEWHERE = {
    "release": "it belongs to stream() and astream()",
    **dict.fromkeys(
        ("draft", "num_draft_tokens", "verification", "layout", "compile", "draft_tokenizer"),
        "it is said when the generator is made: SpeculativeGenerator(target, ...)",
    ),
}
# fields that the door of generate() cannot take
HIDDEN = ("stop_strings", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit")
# "hybrid" comes with old checkpoints, and generate() itself unsets it
CACHES = (None, "dynamic", "dynamic_full", "static", "hybrid")


def check_options(target: Any, config: Any, given: dict[str, Any]) -> None:
    """Refuse what is not honoured, wherever it is set: argument, given config, the model's own config."""
    if config is not None and not isinstance(config, GenerationConfig):
        raise InvalidInput(
            f"generation_config is a {type(config).__name__}; give a transformers.GenerationConfig, or "
            "its fields to generate() one by one"
        )
    for name in ("logits_processor", "stopping_criteria"):
        found = given.get(name)
        if found is not None and not isinstance(found, Iterable):
            raise InvalidInput(f"{name} is a {type(found).__name__}; wanted is a list of such: {name}=[...]")
    sources = (given, config, own_settings(target))
    for name, instead in REFUSED.items():
        found = first_given(sources, name)
        if isinstance(found, Tensor) or found not in (None, False):
            raise UnsupportedOption(name, instead)
    for name, instead in ASSISTANCE.items():
        unused = "constant" if name == "num_assistant_tokens_schedule" else None
        if given.get(name) not in (None, unused):
            raise UnsupportedOption(name, instead)
    for name, where in ELSEWHERE.items():
        if name in given:
            raise UnsupportedOption(name, where)
    if first_given(sources, "cache_implementation") not in CACHES:
        raise UnsupportedOption(
            "cache_implementation",
            "what such a cache holds depends on how many tokens are fed at once, or it has no way back; leave it "
            "unset, or " + PLAIN,
        )
    if first_given(sources, "use_cache") is False and _given_cache(given) is not None:
        raise UnsupportedOption(
            "use_cache",
            f"False beside {CACHE} feeds the whole text in every pass, behind what the cache holds of it "
            "already; give one of the two",
        )
    if given.get("synced_gpus") is None and _is_sharded(target):
        raise UnsupportedOption("synced_gpus", "the model is sharded by FSDP or ZeRO-3; " + PLAIN)
    if (first_given(sources, "num_beams") or 1) > 1:
        raise UnsupportedOption("num_beams", "beam search is not speculative; " + PLAIN)


def _is_sharded(target: Any) -> bool:
    """Plain ``generate()`` keeps such a model's processes in step by itself; this loop does not."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not several or torch.distributed.get_world_size() < 2:
        return False
    return bool(is_deepspeed_zero3_enabled() or is_fsdp_managed_module(target))


def check_tenant(tenant: Any) -> list[str] | None:
    """Whose text it is: one for all rows or one a row, as a list; None where nobody said."""
    named = [tenant] if isinstance(tenant, str) else tenant
    if named is not None and not (isinstance(named, (list, tuple)) and all(isinstance(n, str) for n in named)):
        raise InvalidInput(f"tenant={tenant!r}; give a string, or a list with one a row")
    return None if named is None else list(named)


def check_prompt(target: Any, config: Any, inputs: Any, given: dict[str, Any]) -> None:
    """Refuse prompts that plain ``generate()`` would only warn about."""
    ids = inputs if inputs is not None else given.get("input_ids")
    if target.config.is_encoder_decoder or ids is None:
        return
    embeds, mask = given.get("inputs_embeds") is not None, given.get("attention_mask")
    _check_ids(ids, embeds)
    if mask is not None and not isinstance(mask, Tensor):
        raise InvalidInput(
            f"attention_mask is a {type(mask).__name__}; wanted is a tensor, as a tokenizer returns it with "
            "return_tensors='pt'"
        )
    past = cached_columns(_given_cache(given))
    if past and (mask is None or mask.shape == ids.shape) and not embeds and ids.shape[1] <= past:
        raise InvalidInput(
            f"{CACHE} holds {past} columns and input_ids {ids.shape[1]}; give the whole conversation "
            "as input_ids, or only what is new with an attention_mask over all of it"
        )
    if mask is not None and mask.shape not in (ids.shape, (ids.shape[0], past + ids.shape[1])) and not embeds:
        raise InvalidInput(
            f"attention_mask has shape {tuple(mask.shape)} and input_ids {tuple(ids.shape)}; wanted is "
            "one number for each token: pass both as the tokenizer returned them"
        )
    if not _is_padded_right(ids, mask, (given, config, own_settings(target))):
        return
    empty = [] if mask is None else (mask == 0).all(dim=1).nonzero().flatten().tolist()
    if empty:
        raise InvalidInput(f"the mask of row {empty[0]} leaves no token of its prompt; give at least one")
    raise InvalidInput(
        "the batch is padded on the right; a decoder-only model goes on from the last column. Set "
        "tokenizer.padding_side = 'left' and tokenise again"
    )


def _given_cache(given: dict[str, Any]) -> Any:
    """The cache among the arguments, by its name or by the one that transformers had for it before 5.24."""
    return next((given[name] for name in (CACHE, "past_key_values") if given.get(name) is not None), None)


def _check_ids(ids: Any, embeds: bool) -> None:
    """Refuse a prompt that is no batch of ids; it may be empty where ``embeds`` are given."""
    if not isinstance(ids, Tensor):
        raise InvalidInput(
            f"input_ids is a {type(ids).__name__}; wanted is a tensor: call the tokenizer with "
            "return_tensors='pt', and generate(**its_output)"
        )
    if ids.ndim != 2 or ids.shape[0] == 0:
        raise InvalidInput(
            f"input_ids has shape {tuple(ids.shape)}; wanted is (batch, length), e.g. a tokenizer's output "
            "with return_tensors='pt'"
        )
    if ids.shape[1] == 0 and not embeds:
        raise InvalidInput("the prompt is empty; give at least one token, such as the model's bos token")
    if ids.dtype not in (torch.int64, torch.int32):
        raise InvalidInput(f"input_ids has dtype {ids.dtype}; wanted are token ids (torch.int64)")


def _is_padded_right(ids: Tensor, mask: Tensor | None, sources: Sequence[Any]) -> bool:
    """Whether some row ends in padding: by the mask, or by the padding id that ``sources`` know."""
    if mask is not None:
        return bool((mask[:, -1:] == 0).any())
    pad, eos = (first_given(sources, name) for name in ("pad_token_id", "eos_token_id"))
    ends = [] if eos is None else torch.as_tensor(eos, device="cpu").flatten().tolist()
    known = isinstance(pad, int) and pad not in ends and ids.shape[0] > 1 and ids.shape[1] > 0
    return known and bool(ids[:, -1].eq(torch.tensor(pad, device=ids.device)).any())


@contextmanager
def with_stop_strings(
    target: Any, config: Any, criteria: Any, tokenizer: Any, given: dict[str, Any]
) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Turn ``stop_strings`` into a criterion of our own, and take out what ``generate()`` must not see.

    The door of ``generate()`` loses the tokenizer, and takes ``prompt_lookup_num_tokens`` for its own decoding.
    Yields the generation config, the criteria and the keyword arguments to call ``generate()`` with.
    """
    own = own_settings(target)
    strings = first_given((given, config, own), "stop_strings")
    given = {name: value for name, value in given.items() if name not in (*UNDERSTOOD, "stop_strings")}
    if strings is not None:
        if tokenizer is None:
            raise InvalidInput(
                "stop_strings needs a tokenizer: pass tokenizer=... to generate() or to SpeculativeGenerator"
            )
        criteria = StoppingCriteriaList(criteria or [])
        if not any(isinstance(c, StopStringCriteria) for c in criteria):
            criteria.insert(0, StopStringCriteria(tokenizer=tokenizer, stop_strings=strings))
    if config is not None:
        config = _without(config)
    # the model's own default would come back under the one we took out: lend it a copy without
    lent = _without(own)
    with nullcontext() if lent is own else having(target, lent):
        yield config, criteria, given


def _without(config: Any) -> Any:
    """``config``, or a copy, without what ``generate()`` must not see."""
    if all(getattr(config, name, None) is None for name in HIDDEN):
        return config
    config = copy.deepcopy(config)
    for name in HIDDEN:
        setattr(config, name, None)
    return config
