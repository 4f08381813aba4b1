"""Tokenizers trained in the process, and a model that recites texts: what tests of unlike tokenizers need.

A ``Parrot`` reads its history back from its cache, says it in bytes, and goes on with the text that begins so.
A draft and a target that recite the same text in different tokens agree in everything but the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from specdec.layouts.facts import CACHE
from specdec.proposers.vocabulary import Vocabulary
from specdec.testing import TableConfig

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all. The fox jumps again.",
    "def total(numbers):\n    result = 0\n    for number in numbers:\n        result += number\n    return result",
    "Ein Käfer läuft über die Straße; 東京は日本の首都です。 It costs 12345 € — naïve café 🌊🌊 and 👩‍🚀!   Done.",
)
LEARNT = (
    "The quick brown fox jumps over lazy dogs. It does not mind. The dog and the fox jump again and again.",
    "def f(numbers): return sum(number for number in numbers)\n    result += 1\n",
    "Der Käfer läuft über Straßen. 日本の東京。 costs 123 € naïve café 🌊 👩‍🚀 done",
)


def _wrapped(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def byte_level(size: int, texts: tuple[str, ...] = LEARNT) -> Any:
    """Byte-level BPE, as GPT-2 and its many heirs have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>", "<|turn|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer)


def metaspace(size: int, texts: tuple[str, ...] = LEARNT) -> Any:
    """BPE with spaces written as a letter, a space before each text, and bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, show_progress=False, limit_alphabet=60, max_token_length=8
    )
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in texts], trainer)
    tokenizer = Tokenizer.from_str(_without_special_bytes(tokenizer))
    return _wrapped(tokenizer)


def _without_special_bytes(tokenizer: Tokenizer) -> str:
    """The byte tokens are ordinary ones; the trainer only had to give them ids."""
    import json

    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(state)


def characters(letters: str) -> Any:
    """One id a letter, in this order; nothing else exists."""
    model = models.BPE(vocab={letter: one for one, letter in enumerate(letters)}, merges=[])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), padding_side="left")


class Parrot(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Recites ``texts`` in the ids of ``tokenizer``."""

    config_class = TableConfig
    _supports_cache_class = True

    def __init__(self, tokenizer: Any, texts: tuple[str, ...] = TEXTS) -> None:
        size = len(tokenizer)
        super().__init__(TableConfig(vocab_size=size))
        self.embedding = torch.nn.Embedding(size, 1)
        self.head = torch.nn.Linear(1, size, bias=False)
        self.vocabulary = Vocabulary(tokenizer)
        pieces = self.vocabulary.pieces
        self.texts = []
        for text, ids in zip(texts, self.vocabulary.encode(list(texts)), strict=True):
            ends = [len(pieces.join(ids[: n + 1])) for n in range(len(ids))]
            assert pieces.join(ids) == text.encode()
            self.texts.append((text.encode(), dict(zip([0, *ends], [*ids, tokenizer.eos_token_id], strict=True))))
        self.generation_config = GenerationConfig(
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
        )
        self.all_tied_weights_keys: dict[str, str] = {}

    def get_input_embeddings(self) -> Any:
        return self.embedding

    def get_output_embeddings(self) -> Any:
        return self.head

    def following(self, history: bytes) -> int:
        """The id that goes on after ``history``."""
        for text, ids in self.texts:
            if text.startswith(history):
                if len(history) in ids:
                    return ids[len(history)]
                rest = text[len(history) :]
                fitting = (
                    i for i, piece in enumerate(self.vocabulary.pieces.of) if piece and rest.startswith(piece)
                )
                return max(fitting, key=lambda i: len(self.vocabulary.pieces.of[i]))
        return self.vocabulary.pieces.roles["eos_token_id"]

    def forward(self, input_ids: Tensor, cache: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        cache = past_key_values if cache is None else cache
        cache = DynamicCache() if cache is None else cache
        states = input_ids[:, None, :, None].float()
        keys, _ = cache.update(states, states, 0)
        seen = keys[:, 0, :, 0].long()
        special = self.vocabulary.pieces.special
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        before = seen.shape[1] - input_ids.shape[1]
        for row, ids in enumerate(seen.tolist()):
            for place in range(input_ids.shape[1]):
                history = [one for one in ids[: before + place + 1] if one not in special]
                said = self.vocabulary.pieces.join(history)
                if self.vocabulary.pieces.starts_with_space:
                    said = said.removeprefix(b" ")
                logits[row, place, self.following(said)] = 10.0
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})
