"""What the generic rule of ``build.py`` cannot know: fields that constrain each other, a line an architecture.

Keys of ``CORRECTIONS`` are a model type, or "group/model type" where groups differ; values are changed fields,
nested for sub configs. Facts only; read next: ``build.py``.
"""

from collections.abc import Callable
from typing import Any

import torch

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"


def rope(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary parameters whose ``sections`` of a head (time, height, width ...) sum to half its width."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}


MROPE = {"text_config": {"rope_parameters": rope(2, 1, 1)}}
MROPE_WHOLE = {"text_config": {"rope_parameters": rope(2, 1, 1, partial_rotary_factor=1.0)}}

NOT_TEXT = {
    "diffusion_gemma": "diffusion: generates blocks with a generate() of its own",
    "gemma4_assistant": "a draft head: reads the target's hidden states and cache",
    "gemma4_unified_assistant": "a draft head: reads the target's hidden states and cache",
    "kyutai_speech_to_text": "needs audio codes at every step",
    "musicgen": "audio codebooks, with a generate() of its own",
    "musicgen_melody": "audio codebooks, with a generate() of its own",
    "pi0": "a robot's policy, without generate()",
    "qwen2_5_omni": "a text and a speech model in one generate() of its own; the text model is another entry",
    "qwen3_omni_moe": "a text and a speech model in one generate() of its own; the text model is another entry",
    "blip-2": "the text goes through an inner model, by a generate() of its own that needs an image",
    "instructblip": "the text goes through an inner model, by a generate() of its own that needs an image",
    "instructblipvideo": "the text goes through an inner model, by a generate() of its own that needs a video",
    "voxtral_realtime": "needs audio at every step",
}

COMPASS = {
    "layer_types": [SLIDING, FULL] * 2,
    "rope_parameters": {FULL: rope(2, 1, 1), SLIDING: rope(2, 1, 1)},
}
DOTS3 = {
    "num_key_value_heads": 4, "sliding_window": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8,
    "swa_qk_rope_head_dim": 8, "swa_v_head_dim": 8,
}  # fmt: skip
QWEN4 = {
    "layer_types": [LINEAR, "indexed_attention"] * 2, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4, "ple_layer_ids": [1],
    "ple_embed_dim": 32, "heads_per_ngram": 2, "ngram_vocab_size_base": 64, "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 8,
}  # fmt: skip
VQ = {
    "vocabulary_map": {"<image>": 120, "<|extra_200|>": 121},
    "vq_config": {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "attn_resolutions": []},
}

CORRECTIONS: dict[str, Any] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "num_hidden_layers": 8, "encoder_hash_byte_group_size": [3], "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 32}, "decoder_config": {"hidden_size_global": 32},
    },
    "multimodal/chameleon": VQ,
    "cohere_compass": {"text_config": COMPASS},
    "cohere_compass_text": COMPASS,
    "cosmos3_edge": MROPE,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "layer_types": [SLIDING, "heavily_compressed_attention", "compressed_sparse_attention", SLIDING],
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"], "head_dim": 16, "partial_rotary_factor": 0.5,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}, "index_topk": 2,
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"] * 2}},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {
            "adapter_in_dim": 32, "adapter_out_dim": 32, "num_local_experts": 4, "mlp_layer_types": ["dense"]
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    },
    "dots3_note_text": DOTS3,
    "multimodal/emu3": VQ,
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [16, 16], "rope_parameters": rope(1, 1, 2)}},
    "fast_vlm": {"vision_config": {"hidden_size": 32}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "glm46v": MROPE_WHOLE,
    "glm4v": MROPE_WHOLE,
    "glm4v_moe": MROPE_WHOLE,
    "glm5_next": {
        "text_config": {"num_key_value_heads": 4, "index_kpool": 4, "qk_rope_head_dim": 0, "qk_nope_head_dim": 16}
    },
    "glm_ocr": MROPE_WHOLE,
    "glmga": MROPE_WHOLE,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {
        "deepstack_layer_map": [], "spatial_target_layers": [], "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": {"layer_types": [LINEAR, FULL] * 2},
    "hrm_text": {"num_hidden_layers": 1, "num_layers_per_stack": None},
    "hunyuan_vl": {"text_config": {"rope_parameters": rope(1, 1, 1, 1)}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", FULL] * 2},
    "lfm2_moe": {"layer_types": ["conv", FULL] * 2},
    "mamba2": {"num_heads": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0]}},
    "nemo_speechlm": {
        "audio_config": {
            "asr_config": {"blank_token_id": 5}, "diarization_config": {"head_config": {"audio_hidden_size": 32}}
        }
    },
    "nemotron_h": {"layers_block_type": [LINEAR, FULL, LINEAR, "moe", LINEAR, "mlp"]},
    "paddleocr_vl": MROPE,
    "perception_lm": {"vision_config": {"model_args": {"embed_dim": 32}}},
    "pp_formulanet": {"vision_config": {"post_conv_in_channels": 32}},
    "qwen2_5_omni_thinker": {**MROPE, "vision_start_token_id": 120, "vision_end_token_id": 121},
    "qwen2_5_vl": MROPE,
    "qwen2_vl": MROPE,
    "qwen3_omni_moe_thinker": {**MROPE, "vision_start_token_id": 120, "vision_end_token_id": 121},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "attn_layers": ["local", "lsh", "local", "lsh"], "num_buckets": 2, "hash_seed": 0, "axial_pos_embds": False
    },
    "step3p7": {"text_config": {"sliding_window": 8}},
    "vision-encoder-decoder": {"encoder": {"image_size": 28, "patch_size": 14}},
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "v_dim_factor": 1.0, "num_blocks": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "n_mamba_heads": 2,
        "layers_block_type": [LINEAR, "hybrid"] * 2,
    },
    "zamba2": {"layers_block_type": [LINEAR, "hybrid"] * 2, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def _pixels(inputs: dict[str, Any], *shape: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {**inputs, "pixel_values": torch.randn(len(inputs["input_ids"]), *shape, generator=generator)}


def _only_pixels(inputs: dict[str, Any], *shape: int) -> dict[str, Any]:
    return {"pixel_values": _pixels(inputs, *shape)["pixel_values"]}


# what a model needs beside the prompt, or instead of it
INPUTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "multimodal/blip": lambda inputs: _pixels(inputs, 3, 28, 28),
    "multimodal/idefics": lambda inputs: {
        **_pixels(inputs, 1, 3, 28, 28), "image_attention_mask": inputs["attention_mask"][..., None]
    },
    "multimodal/kosmos-2": lambda inputs: {
        **inputs,
        "image_embeds": torch.zeros(len(inputs["input_ids"]), 0, 32),
        "image_embeds_position_mask": torch.zeros_like(inputs["input_ids"]),
    },
    "multimodal/pix2struct": lambda inputs: {
        "flattened_patches": _only_pixels(inputs, 6, 2 + 32)["pixel_values"].abs()
    },
    "multimodal/pp_formulanet": lambda inputs: _only_pixels(inputs, 3, 28, 28),
    "multimodal/udop": lambda inputs: {**inputs, "bbox": torch.zeros(*inputs["input_ids"].shape, 4)},
    "multimodal/vision-encoder-decoder": lambda inputs: _only_pixels(inputs, 3, 28, 28),
}  # fmt: skip
