"""What the contract tests share: tiny models, drafts, and "plain generate() and ours agree".

Plain `generate()` runs once, ours with every draft; texts must be equal token for token, scores
close until a row ends and zeros after.
"""

import copy
from functools import cache
from types import SimpleNamespace

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from specdec import Proposal, SpeculativeGenerator
from specdec.testing import lively, noisy_copy, ragged_prompt, tiny_llama

DRAFTS = ("noisy", "ngram", None)
NEW = 9
TOLERANCE = 1e-4


@cache
def llama(seed=0, dtype=torch.float32):
    return tiny_llama(seed, num_hidden_layers=1, dtype=dtype)


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
WINDOWED = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8,
    "max_position_embeddings": 128, "tie_word_embeddings": False, **SPECIAL,
}  # fmt: skip


@cache
def mistral():
    return lively(MistralForCausalLM(MistralConfig(**WINDOWED)).eval())


@cache
def gemma():
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**WINDOWED, layer_types=kinds)
    return lively(Gemma3ForCausalLM(config).eval())


@cache
def qwen3_next():
    config = Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"], **SPECIAL,
    )  # fmt: skip
    return lively(Qwen3NextForCausalLM(config).eval())


@cache
def mamba2():
    config = Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_heads=8, head_dim=8, state_size=8,
        n_groups=1, expand=2, chunk_size=8, **SPECIAL,
    )  # fmt: skip
    return lively(Mamba2ForCausalLM(config).eval())


@cache
def t5():
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1,
        num_heads=4, pad_token_id=0, eos_token_id=None, decoder_start_token_id=0,
    )  # fmt: skip
    model = lively(T5ForConditionalGeneration(config).eval())
    model.generation_config.decoder_start_token_id = 0
    return model


@cache
def bart():
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_position_embeddings=64, decoder_start_token_id=2, forced_eos_token_id=None, **SPECIAL,
    )  # fmt: skip
    model = lively(BartForConditionalGeneration(config).eval())
    model.generation_config.decoder_start_token_id = 2
    return model


@cache
def whisper():
    config = WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8,
        max_source_positions=20, max_target_positions=64, decoder_start_token_id=2,
        suppress_tokens=None, begin_suppress_tokens=None, **SPECIAL,
    )  # fmt: skip
    model = lively(WhisperForConditionalGeneration(config).eval())
    model.generation_config.decoder_start_token_id = 2
    return model


@cache
def noisy(model, scale=0.05):
    """One noisy copy a model and scale, made once."""
    return noisy_copy(model, scale)


def prompts(batch):
    """One unpadded row, or three padded on the left."""
    return ragged_prompt() if batch == 3 else {k: v[:1] for k, v in ragged_prompt().items()}


def speculative(target, draft, *, tokens=3, **options):
    """A generator whose draft is a word of DRAFTS, a model or a proposer."""
    draft = noisy(target) if isinstance(draft, str) and draft == "noisy" else draft
    return SpeculativeGenerator(target, draft, num_draft_tokens=tokens, **options)


def plain(target, inputs, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return target.generate(**inputs, **options)


def ends(sequences, start, eos=None):
    """(B,) columns at which each row has ended: behind its first end-of-sequence token."""
    length = sequences.shape[1]
    if eos is None:
        return [length] * len(sequences)
    stops = {eos} if isinstance(eos, int) else set(torch.as_tensor(eos).tolist())
    found = []
    for row in sequences.tolist():
        at = [i for i in range(start, length) if row[i] in stops]
        found.append(at[0] + 1 if at else length)
    return found


def assert_scores_agree(ours, theirs, lengths, start):
    """Scores of two runs, step by step: close while a row lives, zeros (ours) once it has ended."""
    assert len(ours) == len(theirs)
    for step, (mine, wanted) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.shape == wanted.shape
        assert mine.dtype == wanted.dtype
        for row, length in enumerate(lengths):
            if start + step < length:
                torch.testing.assert_close(mine[row], wanted[row], atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True)
            else:
                assert not mine[row].any(), f"scores of row {row} go on at step {step}"


def assert_agrees(target, inputs, *, drafts=DRAFTS, make=dict, **options):
    """Greedy: ours is plain's, text and scores, for every draft.

    Args:
        target: the model.
        inputs: its inputs.
        drafts: words, models or proposers.
        make: makes further options, anew for every call (for objects that hold state).
        options: for both calls.

    Returns:
        plain's output, with scores.
    """
    asked = {"return_dict_in_generate": True, "output_scores": True, **options}
    wanted = plain(target, inputs, **asked, **make())
    start = wanted.sequences.shape[1] - len(wanted.scores)
    for draft in drafts:
        gen = speculative(target, draft)
        got = gen.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **asked}, **make())
        assert got.sequences.tolist() == wanted.sequences.tolist(), f"text differs, draft {draft}"
        lengths = ends(wanted.sequences, start, options.get("eos_token_id"))
        assert_scores_agree(got.scores, wanted.scores, lengths, start)
        if draft == "noisy":
            assert gen.stats.drafted > 0, "nothing was drafted: this test shows nothing"
    return wanted


class Guesses:
    """A proposer that guesses what `choose(row, position, state)` says, as far as it may."""

    def __init__(self, choose):
        self.choose = choose

    def propose(self, state, limits):
        tokens = torch.zeros(state.batch, int(limits.max(initial=0)), dtype=torch.int64)
        for row, limit in enumerate(limits):
            for i in range(int(limit)):
                tokens[row, i] = self.choose(row, int(state.lengths[row]) + i, state)
        return Proposal(tokens, limits.copy())


def oracle(sequences, wrong=()):
    """A proposer that knows the text (B, L); columns in `wrong` it guesses wrongly on purpose."""

    def choose(row, column, state):
        token = int(sequences[row, min(column, sequences.shape[1] - 1)])
        return (token + 1) % 64 if column in wrong else token

    return Guesses(choose)


class Counted:
    """Counts the forward passes of models while the block runs."""

    def __init__(self, *models):
        self.models, self.calls = models, 0

    def __enter__(self):
        self.hooks = [m.register_forward_pre_hook(self.count) for m in self.models]
        return self

    def count(self, *_):
        self.calls += 1

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def fingerprint(model):
    """Everything of a model that a call must leave as it was."""
    return SimpleNamespace(
        config=copy.deepcopy(model.config.to_dict()),
        generation=copy.deepcopy(model.generation_config.to_dict()),
        generation_object=id(model.generation_config),
        training=[m.training for m in model.modules()],
        attributes={k: id(v) for k, v in vars(model).items()},
        weights=[w.clone() for w in model.state_dict().values()],
    )


def assert_untouched(model, before):
    now = fingerprint(model)
    for name in ("config", "generation", "generation_object", "training", "attributes"):
        assert getattr(now, name) == getattr(before, name), f"{name} was changed"
    for a, b in zip(now.weights, before.weights, strict=True):
        assert torch.equal(a, b)
