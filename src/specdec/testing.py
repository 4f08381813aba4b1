"""Helpers for tests, ours and yours: tiny models made in the process, and the proof that a proposer is lossless.

``assert_lossless(proposer)`` runs a proposer of your own against exact references: greedy text must equal plain
``generate()``, text with shared noise must equal plain decoding with that noise, and what comes out of sampling
must follow the target's law. Nothing is downloaded. Read next: ``demo/__init__.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from specdec.layouts.facts import CACHE


def tiny_llama(seed: int = 0, *, vocabulary: int = 64, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A random Llama of two layers whose text varies; the same for the same ``seed``."""
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **config})).to(dtype).eval()
    return lively(model, seed)


def lively(model: Any, seed: int = 0, gain: float = 1.6) -> Any:
    """Draw the weights of ``model`` anew so that its greedy text depends on the context and does not stall."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            if weight.ndim >= 2:
                scale = 1.0 if "embed" in name else gain / weight.shape[-1] ** 0.5
                weight.copy_(noise * scale)
            else:
                weight.add_(noise.to(weight.device) * 0.1)
            weight.requires_grad_(False)
    ids = {n: getattr(model.config, n, None) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model.generation_config = GenerationConfig(**ids)
    return model


def noisy_copy(model: Any, scale: float = 0.1, seed: int = 1) -> Any:
    """A draft for ``model``: the same weights with noise of ``scale`` standard deviations; agrees now and then."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in draft.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.add_(noise.to(weight.device) * float(weight.float().std()) * scale if weight.numel() > 1 else 0)
    return draft


def ragged_prompt(lengths: tuple[int, ...] = (9, 6, 3), vocabulary: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of random rows, padded with 0 on the left."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, vocabulary, (length,), generator=generator)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def byte_tokenizer(*words: str, specials: tuple[str, str] = ("<pad>", "<eos>")) -> Any:
    """A tokenizer made in the process: every byte is a token, and so is every beginning of ``words``.

    Args:
        words: such as ``'"name": '``; of two pieces or more in UTF-8.
        specials: padding, id 0, and end-of-sequence, id 1.
    """
    pieces = {special: place for place, special in enumerate(specials)}
    for piece in sorted(pre_tokenizers.ByteLevel.alphabet()):
        pieces[piece] = len(pieces)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        [(shown, _)] = split.pre_tokenize_str(word)
        for end in range(1, len(shown)):
            merges[shown[:end], shown[end]] = None
            pieces.setdefault(shown[: end + 1], len(pieces))
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=list(merges)))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    pad, eos = specials
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=eos)


class TableConfig(PretrainedConfig):  # type: ignore[misc]
    """Configuration of ``TableModel``."""

    model_type = "specdec_table"

    def __init__(self, vocab_size: int = 4, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = 1
        self.num_hidden_layers = 1
        super().__init__(**kwargs)


class TableModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Scores are looked up by the last two tokens, and the tokens are read back from the cache.

    So the law of its text is known exactly, and a cache that was rolled back wrongly changes it.
    """

    config_class = TableConfig

    def __init__(self, table: Tensor) -> None:
        """Look scores up in ``table`` (V, V, V): [token before last, last token] -> scores."""
        super().__init__(TableConfig(vocab_size=table.shape[-1]))
        self.embedding = torch.nn.Embedding(table.shape[-1], 1)
        self.head = torch.nn.Linear(1, table.shape[-1], bias=False)
        self.table = torch.nn.Parameter(table, requires_grad=False)
        self.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=None, eos_token_id=None)
        self.all_tied_weights_keys: dict[str, str] = {}

    def get_input_embeddings(self) -> Any:
        """Only its size is read."""
        return self.embedding

    def get_output_embeddings(self) -> Any:
        """Only its size is read."""
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Scores (B, Q, V) for ids (B, Q), history read from the cache, by either of its names."""
        cache = past_key_values if cache is None else cache
        cache = DynamicCache() if cache is None else cache
        states = input_ids[:, None, :, None].to(self.table.dtype)
        keys, _ = cache.update(states, states, 0)
        seen = keys[:, 0, :, 0].long()
        before = torch.nn.functional.pad(seen, (1, 0))[:, :-1]
        logits = self.table[before, seen][:, -input_ids.shape[1] :]
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})


def assert_lossless(
    proposer: Any, *, make: Callable[[], Any] | None = None, samples: int = 4000, seed: int = 0
) -> None:
    """Prove that ``proposer`` leaves the target's output as it is.

    Args:
        proposer: an object with ``propose(state, limits)``, or with ``begin(call)``.
        make: makes a fresh proposer for every check, if one cannot be used twice.
        samples: rows drawn for the test of the sampling law.
        seed: for the random models and prompts.

    Raises:
        AssertionError: saying what differed. The sampling test lets a lossless proposer fail less than once
            in a million runs; a law that is off by 0.1 in total variation fails it practically always.
    """
    from specdec.generator import SpeculativeGenerator

    def fresh() -> Any:
        return make() if make is not None else proposer

    for width in ((7,), (9, 6, 3)):
        target = tiny_llama(seed, vocabulary=24)
        prompt: dict[str, Any] = ragged_prompt(width, 24, seed)
        plain = target.generate(**prompt, max_new_tokens=24, do_sample=False)
        for tokens in (1, 4):
            gen = SpeculativeGenerator(target, fresh(), num_draft_tokens=tokens)
            ours = gen.generate(**prompt, max_new_tokens=24, do_sample=False)
            assert torch.equal(ours, plain), f"greedy text differs, batch {len(width)}, k = {tokens}"
            options: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "max_new_tokens": 16, "seed": seed}
            want = SpeculativeGenerator(target, None, verification="coupled").generate(**prompt, **options)
            gen = SpeculativeGenerator(target, fresh(), num_draft_tokens=tokens, verification="coupled")
            got = gen.generate(**prompt, **options)
            assert torch.equal(got, want), f"text with shared noise differs, batch {len(width)}, k = {tokens}"
    _assert_law(fresh, samples, seed)


def _assert_law(fresh: Callable[[], Any], samples: int, seed: int) -> None:
    """Pairs of sampled tokens against the target's exact law, for both rules."""
    from specdec.generator import SpeculativeGenerator

    vocabulary = 5
    target = tiny_llama(seed, vocabulary=vocabulary)
    prompt = torch.randint(1, vocabulary, (1, 6), generator=torch.Generator().manual_seed(seed))
    exact = _law_of_pairs(target, prompt, vocabulary)
    for rule in ("token", "block"):
        # three tokens are too few for the self-check of a new model: name the layout
        gen = SpeculativeGenerator(
            target, fresh(), num_draft_tokens=3, verification=rule, seed=seed, layout="slots"
        )
        ids = prompt.expand(samples, -1)
        out = gen.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=True, top_k=0)[
            :, -3:-1
        ]
        counts = torch.bincount(out[:, 0] * vocabulary + out[:, 1], minlength=vocabulary**2)
        distance = 0.5 * float((counts / samples - exact).abs().sum())
        # McDiarmid: the distance exceeds its mean by t with probability at most exp(-2 n t^2)
        mean = 0.5 * float((2 * exact * (1 - exact) / (torch.pi * samples)).sqrt().sum())
        bound = mean + (14 / (2 * samples)) ** 0.5
        assert distance < bound, (
            f"the law of sampled tokens is off by {distance:.3f} in total variation with rule {rule!r}; "
            f"chance explains less than {bound:.3f}"
        )


@torch.no_grad()
def _law_of_pairs(target: Any, prompt: Tensor, vocabulary: int) -> Tensor:
    """(V * V,) probability of the first two tokens after ``prompt`` (1, P)."""
    every = torch.arange(vocabulary)[:, None]
    logits = target(torch.cat([prompt.expand(vocabulary, -1), every], dim=1)).logits.double()
    first = logits[0, -2].softmax(dim=-1)
    second = logits[:, -1].softmax(dim=-1)
    law: Tensor = (first[:, None] * second).flatten()
    return law
