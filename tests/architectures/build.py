"""A tiny random float32 model of every model type that transformers generates text with.

``cases()`` lists them; ``build(case)`` makes one: the default config of the architecture is shrunk by the names
of its fields, sub configs too, so that a new architecture needs a line only where its fields constrain each
other (``corrections.py``). Windows and chunks become 8, so that a text of 36 tokens crosses them, and every kind
of layer that the default config has is kept. Read next: ``identity.py``.
"""

import dataclasses
import re
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModel, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from specdec.testing import lively

from .corrections import CORRECTIONS, NOT_TEXT

VOCABULARY, PAD, BOS, EOS = 128, 0, 1, 2
PROMPT_IDS = (3, 112)  # prompts stay below the ids that stand for images and sounds
WINDOW = 8
LAYERS = 4

GROUPS = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "multimodal": {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES},
}

# (names, value): the first pattern that matches the whole name of a number (or of a list of numbers) wins
TEXT = [
    (r"type_vocab_size|task_type_vocab_size", 2),
    (r".*vocab_size.*|encoder_hash_byte_group_vocab", VOCABULARY),
    (r"(max|n)_(.*_)?(positions?|position_embeddings|seq_len)|n_ctx|context_length|model_max_length", 256),
    (r"(num_|n_|decoder_|encoder_)(hidden_|encoder_|decoder_)?layers?|layers", LAYERS),
    (r"first_k_dense_replace|num_dense_layers|index_local_blocks|(mtp|nextn).*|n_group|topk_group", 1),
    (r"num_layers_per_stack|max_window_layers|layer_group_size|num_sparse_.*", 2),
    # a head's width
    (r"(global|index|qk)_head_dim", 16),
    (r".*head_dim|kv_channels|dim_head|d_head|mamba_d_head|attention_head_size|d_kv|query_pre_attn_scalar", 8),
    (r"rotary_dim|d_rel|.*cross_attn_k", 4),
    # heads
    (r".*(kv_heads|key_value_heads|kv_n_heads)", 2),
    (r"linear_num_key_heads", 2),
    (r"index_n_heads", 16),
    (r"(n_)?mamba_(n_|num_)?heads", 8),
    (r".*heads?|num_attention_heads_per_layer", 4),
    (r"(kv|q)_lora_rank", 16),
    (r"o_lora_rank|hc_lowrank", 8),
    (r"o_groups|hc_mult|hc_count|n_kpool|num_codebooks", 2),
    (r"laurel_rank|adapter_rank|gated_norm_rank", 4),
    # experts
    (r".*experts_per_tok|moe_(k|topk|top_k)|top_k_experts|zero_expert_num", 2),
    (r".*shared_experts", 1),
    (r".*(num|routed|local)_experts|centroid_intermediate_top_k", 4),
    (r".*(moe|expert|shared).*(intermediate_size|hidden_size|expert_dim)|router_hidden_size", 16),
    # widths
    (r".*intermediate_size.*|.*ffn_dim|d_ff|dff|dim_ff|d_inner|feed_forward_size|ffn_hidden_size|mamba_d_ssm", 64),
    (r"hidden_size_per_layer_input|(pronunciation|shape)_embed_dim", 8),
    (r"(.*_)?hidden_size|d_model|n_embd|emb_dim|(dim_model|embedding_dim|embedding_size).*|embed_dim", 32),
    (r".*_embedding_size|word_embed_proj_dim|lru_width|projection_dim|ple_embed_dim", 32),
    # what looks back only so far
    (r"index_topk_blocks", 2),
    (r"(ssm_)?state_size|mamba_d_state|(mamba_)?chunk_size|block_size|index_topk|floor_scale", 8),
    (r"sliding_window(_size)?|.*window_size|local_attention(_window_len)?|attention_window", WINDOW),
    (r"attention_chunk_size|.*attn_chunk_length", WINDOW),
    (r"index_block_size|prompt_length|(prompt|segment)_types", 4),
    (r"rel_extent|num_mel_bins", 16),
    (r"max_source_positions", 32),
    (r"num_(buckets|centroids)", 8),
    (r"position_bias_max_distance", 64),
    (r"mem_len|num_kv_shared_layers|.*dropout.*|.*_pdrop|layerdrop", 0),
]

# towers that see or hear are built but never run on text: one small layer will do
TOWER = [
    (r"(num_|n_|encoder_|conf_num_)?(hidden_|global_)?layers?|depth|num_res_blocks", 1),
    (r".*heads", 4),
    (r"image_size", 28),
    (r"patch_size", 14),
    (r"num_position_embeddings|position_embedding_size", 16),
    (r"fullatt_block_indexes|intermediate_layers_indices|deepstack_visual_indexes|global_attn_indexes", 0),
    (r"num_conv_pos_embeddings", 4),
    (r"num_conv_pos_embedding_groups|num_filters", 2),
    (r"n_window", 8),
    (r"mlp_ratio", 1),
    (r".*(hidden_size|hidden_dim|ffn_dim|mlp_dim|intermediate_size|output_dim|input_dim|output_channels)", 32),
    (r"base_channels|pooler_output_size|mm_hidden_size", 32),
]
TOWERS = (
    "vision|visual|image|audio|speech|protein|vq|q_?former|codec|tokenizer|perceiver|encoder_config$"
    "|detokenizer|gen_|depth_decoder|vocoder|sam_"
)
TOKEN_IDS = {
    "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "decoder_start_token_id": BOS,
    "sep_token_id": EOS, "cls_token_id": BOS, "eod_token_id": EOS, "mask_token_id": 3, "unk_index": 3,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "is_decoder": True, "tie_word_embeddings": False, "num_beams": 1,
}  # fmt: skip
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
# None here is no way to leave something out, only a value that a checkpoint brings
REQUIRED = {
    "head_dim", "num_key_value_heads", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group",
    "topk_group",
}  # fmt: skip
BASE = {field.name for field in dataclasses.fields(PreTrainedConfig)}


class Case(NamedTuple):
    """One entry of transformers' mappings."""

    group: str
    name: str

    def __str__(self) -> str:
        return f"{self.group}/{self.name}"


class NotBuilt(Exception):
    """Why there is no tiny model of an architecture."""


def cases() -> list[Case]:
    """Every entry; a class that two mappings name for a model type is listed once."""
    found: dict[tuple[str, str], Case] = {}
    for group, names in GROUPS.items():
        for name in names:
            case = Case(group, name)
            found.setdefault((name, class_name(case)), case)
    return list(found.values())


def class_name(case: Case) -> str:
    name: Any = GROUPS[case.group][case.name]
    return name if isinstance(name, str) else name[0]


def build(case: Case, seed: int = 0, gain: float = 1.6) -> Any:
    """The tiny model of ``case``, the same for the same arguments; raises ``NotBuilt`` saying why not."""
    if case.name in NOT_TEXT:
        raise NotBuilt(NOT_TEXT[case.name])
    torch.manual_seed(seed)
    model = make_model(case).float().eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
                tensor.normal_(0, 0.1)  # allocated and left to a checkpoint to fill
    untie(model)
    lively(model, seed, gain)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)
    if model.config.is_encoder_decoder:
        model.generation_config.decoder_start_token_id = BOS
    return model


def untie(model: Any) -> None:
    """Give the head weights of its own: tied ones make a random model repeat its last token."""
    head = model.get_output_embeddings()
    tied = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    if isinstance(head, torch.nn.Linear) and id(head.weight) in tied:
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))


def make_model(case: Case) -> Any:
    """The model with transformers' own initialisation; towers of missing libraries are left out."""
    original = AutoModel.from_config

    def from_config(config: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(config, *args, **kwargs)
        except ImportError:  # a tower that needs a library of its own, and that text never reaches
            return torch.nn.Identity()

    AutoModel.from_config = from_config
    try:
        return getattr(transformers, class_name(case))(make_config(case))
    finally:
        AutoModel.from_config = original


def make_config(case: Case) -> Any:
    """The tiny config that the class of ``case`` takes."""
    cls = CONFIG_MAPPING[case.name]
    config = shrink(cls, CORRECTIONS.get(str(case), CORRECTIONS.get(case.name)))
    wanted = getattr(transformers, class_name(case)).config_class
    if wanted is not None and not isinstance(config, wanted):
        # the text model of a composite, registered under the composite's name
        subs = [getattr(config, name) for name in cls.sub_configs]
        config = next((sub for sub in subs if isinstance(sub, wanted)), config)
    return config


def shrink(given: Any, changes: dict[str, Any] | None = None, tower: bool = False) -> Any:
    """A config like ``given`` (a config or its class), small, with ``changes`` (nested for sub configs)."""
    changes = dict(changes or {})
    cls = given if isinstance(given, type) else type(given)
    default = _default(cls) if isinstance(given, type) else given
    values = {field.name: _get(default, field) for field in dataclasses.fields(cls)}
    depth = next((name for name in DEPTHS if values.get(name)), "")
    was, layers = _layers(values, depth, changes, tower)
    if "qk_nope_head_dim" in values:  # compressed keys and values: all heads have their own
        derived = {"num_key_value_heads": 4, "head_dim": values.get("head_dim") and 8}
        changes = {**{name: n for name, n in derived.items() if name in values}, **changes}
    kwargs: dict[str, Any] = {}
    placeholders = 0
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            kwargs[name] = shrink(value, changes.get(name), tower or bool(re.search(TOWERS, name)))
        elif name in changes:
            kwargs[name] = changes[name]
        elif name in TOKEN_IDS:
            kwargs[name] = TOKEN_IDS[name]
        elif name in BASE:
            continue
        elif re.fullmatch(r".*(token|_start|_end|patch)_(id|index)", name) and type(value) is int:
            kwargs[name] = VOCABULARY - 1 - placeholders % 12
            placeholders += 1
        elif name == depth:
            kwargs[name] = layers
        elif isinstance(value, (list, tuple)) and value and len(value) == was:
            distinct = list(dict.fromkeys(value))
            kwargs[name] = [distinct[i % len(distinct)] for i in range(layers)]
        elif name == "rope_parameters":
            kwargs[name] = _rope(value)
        else:
            kwargs[name] = _small(name, value, tower)
    return cls(**kwargs, **{name: value for name, value in changes.items() if name not in values})


def _layers(values: dict[str, Any], depth: str, changes: dict[str, Any], tower: bool) -> tuple[int, int]:
    """Layers before and after: enough for one of every kind, or what a correction says."""
    was = values.get(depth) or 0
    if tower:
        return was, 1
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and v and len(v) == was]
    kinds = [len(set(v)) for v in lists if isinstance(v[0], str)]
    told = [len(v) for v in changes.values() if isinstance(v, list) and v and isinstance(v[0], str)]
    return was, changes.get(depth) or max(told or [LAYERS, *kinds])


def _default(cls: Any) -> Any:
    try:
        return cls()
    except Exception as error:
        raise NotBuilt(f"its config has no default: {error}") from error


def _get(config: Any, field: Any) -> Any:
    try:
        return getattr(config, field.name, None)
    except Exception:  # an attribute that varies by layer: what the class says stands for all
        return field.default


def _small(name: str, value: Any, tower: bool) -> Any:
    """``value`` by the tables; words, switches, None and 0 stay."""
    if value is None and name in REQUIRED:
        value = 1
    numbers = [value] if not isinstance(value, (list, tuple)) else value
    if not numbers or not all(type(n) in (int, float) for n in numbers):
        return value
    for pattern, size in [*TOWER, *TEXT] if tower else TEXT:
        if re.fullmatch(pattern, name):
            if isinstance(value, (list, tuple)):
                return type(value)([size] * (len(value) if size else 1))
            return type(value)(size) if value else value
    return value


def _rope(value: Any) -> Any:
    """Rotary parameters for heads of 8: sections of positions in three dimensions must sum to 4."""
    if not isinstance(value, dict):
        return value
    if any(isinstance(v, dict) for v in value.values()):
        return {kind: _rope(v) for kind, v in value.items()}
    if "mrope_section" in value:
        sections = {3: [2, 1, 1], 4: [1, 1, 1, 1]}[len(value["mrope_section"])]
        return {**value, "mrope_section": sections, "partial_rotary_factor": 1.0}
    return value
