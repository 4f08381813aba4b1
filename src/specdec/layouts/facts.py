"""What is known of architectures that no short check can see.

A self-check on a few tokens cannot see what begins past its own length (a window, a boundary of the
positions), nor a difference below the noise of low precision. Such cases are decided here, from the config;
each with its cause. Measured over the architectures of transformers 5.23. Read next: ``../weights/__init__.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from transformers import GenerationMixin
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specdec.layouts import NEVER

# model_type -> why several tokens in one cached forward differ from one-token steps
ONE_TOKEN_ONLY = {
    "recurrent_gemma": "its recurrent state lives in the modules and several tokens count as a prompt",
    "zamba2": "its chunked scan clamps the time step, its one-token step does not",
    "nemotron_h": "its chunked scan clamps the time step, its one-token step does not",
    "nemotron_h_omni": "its chunked scan clamps the time step, its one-token step does not",
    "voxtral_realtime": "every step consumes one piece of audio",
    "parakeet_rnnt": "every step moves the encoder's frame pointer",
    "parakeet_tdt": "every step moves the encoder's frame pointer",
    "nemotron_asr_streaming": "every step moves the encoder's frame pointer",
}
# the same, for more than one row
ONE_TOKEN_IN_BATCHES = {"unlimited_ocr": "its reference window counts the padding of a row"}
# model_type -> its window is honoured by one-token steps only, because the mask is a full causal one
UNMASKED_WINDOW = {"moshi", "moshi_depth"}
# they number the tokens of a pass without padding, and go on from the cache's length in the next
UNCOUNTED_PADDING = {
    "kosmos_2_text_model", "kosmos_2_5_text_model", "m2m_100", "nllb-moe", "seamless_m4t", "seamless_m4t_v2",
    "speech_to_text", "trocr",
}  # fmt: skip
# ALiBi: what they add to scores goes by the column of the key
BY_COLUMN = {"bloom", "mpt"}
PREPARES = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
OLD_CACHES = ("mems", "past_buckets_states")  # xlnet, reformer: grown by rules of their own
CACHE_NAMES = tuple(name for name in ALL_CACHE_NAMES if name not in OLD_CACHES)
CACHE = CACHE_NAMES[0]  # what most models call it: past_key_values, and all since transformers 5.24: cache
# model_type -> the dimension that the rows are in, of hidden states whose shapes only one-token steps have
ODD_STATES = {"gemma3n_text": 1, "rwkv": 0, "xlnet": 0}


def one_token_reason(model: Any, prompt_length: int, max_length: int, batch: int = 1) -> str:
    """Why ``model`` may only take one-token steps on this call; "" when nothing speaks against more.

    Args:
        model: the model, its config is read.
        prompt_length: columns of the prompt.
        max_length: columns that a row may reach.
        batch: rows.
    """
    for config in _configs(model.config):
        kind = getattr(config, "model_type", "")
        if kind in ONE_TOKEN_ONLY:
            return ONE_TOKEN_ONLY[kind]
        if batch > 1 and kind in ONE_TOKEN_IN_BATCHES:
            return ONE_TOKEN_IN_BATCHES[kind]
        kept = getattr(config, "keep_window_size", None)
        if kind == "doge" and kept is not None and max_length > kept:
            return f"past {kept} tokens it picks keys by scores whose ties depend on the forward's shape"
        window = getattr(config, "sliding_window", None)
        if kind in UNMASKED_WINDOW and window is not None and max_length > window:
            return f"it masks no window in a forward of several tokens, and the text may pass {window}"
        reason = _rope_reason(config, prompt_length, max_length)
        if reason:
            return reason
    return ""


def slots_reason(model: Any, max_length: int, batch: int = 1) -> str:
    """Why slots would not do for ``model`` and ``batch`` rows of up to ``max_length`` columns; "" where they may.

    llama4 scales its attention by the cache's length from ``floor_scale`` columns on.
    """
    for config in _configs(model.config):
        if getattr(config, "attn_temperature_tuning", False) and max_length >= getattr(config, "floor_scale", 0):
            return "its scores depend on one length of the cache for all rows"
    if uncounted_padding(model) is not None:
        return "it does not count padding as a position"
    if batch > 1 and _counts_by_length(model):
        return "it counts positions from one length of the cache for all rows"
    if _attends_otherwise(model):
        return "its attention or its masks are somebody's own"
    return "it prepares its inputs in a way of its own" if prepared_by_others(model) else ""


def counts_from_last_key(model: Any) -> bool:
    """Whether the window of ``model`` ends at the last key of a pass, whichever column that is (GPT-Neo)."""
    return any(getattr(config, "model_type", "") == "gpt_neo" for config in _configs(model.config))


def _counts_by_length(model: Any) -> bool:
    """Whether nobody tells ``model`` its positions: T5's relative ones, Bart's table, and others of their time.

    In float32 the self-check sees that; in 16 bits a column more or less may pass for noise.
    """
    kinds = {getattr(config, "model_type", "") for config in _configs(model.config)}
    known = any(kind.__module__.startswith("transformers.models.") for kind in type(model).__mro__)
    if kinds & BY_COLUMN or not known:
        return False
    return not any(_takes(part, "position_ids", "decoder_position_ids") for part in (model, model.get_decoder()))


def _attends_otherwise(model: Any) -> bool:
    """Whether somebody has registered functions of their own under the names that ``model`` attends and masks by.

    Slots would ask neither for rows at columns of their own, and show them keys that nobody may look at.
    """
    for config in _configs(model.config):
        name = getattr(config, "_attn_implementation", None)
        for registered in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            found = registered.get(name)
            if _home(found).startswith("specdec."):  # we wrap those that are there
                found = found._specdec_original
            if found is not None and not _home(found).startswith("transformers."):
                return True
    return False


def _home(function: Any) -> str:
    """The module that ``function`` was written in, whatever it has copied from another by ``functools.wraps``."""
    home: str = getattr(function, "__globals__", {}).get("__name__", "")
    return home


def _rope_reason(config: Any, prompt_length: int, max_length: int) -> str:
    """Rotary frequencies that depend on how long the text of the same forward is."""
    for rope in _ropes(config):
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        limit = getattr(config, "max_position_embeddings", None)
        kind = rope.get("rope_type", rope.get("type"))
        if kind == "dynamic" and limit is not None and max_length > limit:
            return f"dynamic rotary frequencies change with the length past {limit}"
        boundary = original or limit
        if kind == "longrope" and boundary is not None and prompt_length <= boundary < max_length:
            return f"longrope changes its frequencies for a whole forward at {boundary}"
    return ""


def last_position(model: Any) -> int:
    """Columns that ``model`` has positions for, where they are a table that ends; rotary ones have no end."""
    config = model.config.get_text_config(decoder=True)
    if any(_ropes(config)):
        return NEVER
    sizes = (getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions"))
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=NEVER)


def odd_states(model: Any) -> int | None:
    """The dimension of the rows in hidden states that are not (B, W, ...); None where they are."""
    kinds = (getattr(config, "model_type", "") for config in _configs(model.config))
    return next((ODD_STATES[kind] for kind in kinds if kind in ODD_STATES), None)


def feeds_all(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether every pass of ``model`` takes the whole text again: it has no cache, or ``kwargs`` forbid it."""
    return not kwargs.get("use_cache", True) or not _takes(model, *CACHE_NAMES, *OLD_CACHES)


def _takes(model: Any, *names: str) -> bool:
    return not inspect.signature(type(model).forward).parameters.keys().isdisjoint(names)


def uncounted_padding(model: Any) -> int | None:
    """The id of padding, where ``model`` numbers the tokens of a pass without it; None elsewhere.

    The next pass goes on from the cache's length, so a text that holds padding as a word has other positions in one
    pass than in several. Slots would have to look at every token for that; ``Columns`` does.
    """
    for config in _configs(model.config):
        if getattr(config, "model_type", "") in UNCOUNTED_PADDING:
            padding: int | None = config.get_text_config(decoder=True).pad_token_id
            return padding
    return None


def prepares_as_usual(model: Any) -> bool:
    """Whether ``model`` has transformers' own preparation of inputs, which looks at nothing but its arguments."""
    usual = (getattr(type(model), name) is getattr(GenerationMixin, name) for name in PREPARES)
    return all(usual) and not set(PREPARES) & vars(model).keys() and not model.is_remote_code()


def prepared_by_others(model: Any) -> bool:
    """Whether somebody else than transformers prepares its inputs, who may look at all ids of a text."""
    for name in PREPARES:
        method = vars(model).get(name, getattr(type(model), name))
        if not getattr(method, "__module__", "").startswith("transformers."):
            return True
    return False


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """The rotary parameters of a config: one set, or one set for each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        value = getattr(config, name, None)
        if isinstance(value, dict):
            yield value
            yield from (inner for inner in value.values() if isinstance(inner, dict))


def _configs(config: Any) -> Iterator[Any]:
    """A config and its parts."""
    yield config
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None:
            yield from _configs(part)
