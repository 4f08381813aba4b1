"""Which layers of a model can be left out of its own draft: a search on a few texts (SWIFT 2410.06916, section 4).

The model writes a continuation of every prompt. A choice of layers is judged by one pass of the part over each
continuation, behind the keys and values that the whole model left for the prompt, as when it drafts: how often
does it say what the model said? With the part's share of the weights as its cost that gives an expected speed. The
search starts from the layers that change their input least (by cosine) and goes on by small changes, as long as
there is time. Nothing is learnt of long contexts or of sampled text, and wide passes are taken to cost what narrow
ones do. Read next: ``generator.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.errors import InvalidInput, UnsupportedModel
from specdec.layouts.facts import CACHE
from specdec.length.cost import speed
from specdec.proposers.past import opening
from specdec.weights.layers import count_layers, with_layers
from specdec.whole import at_least

MOST_GUESSES = 8  # a round is expected to guess what is best of 0 to this many tokens
PATIENCE = 3  # the search ends after this many changes a layer without a better choice


@dataclass(frozen=True)
class _Text:
    """A prompt's cache, and what the model says behind it."""

    past: Any
    fed: Tensor  # (1, N) ids, the prompt's last first
    said: Tensor  # (N,) ids, each the model's answer to the one fed


@torch.no_grad()
def choose_layers(
    model: Any,
    prompts: Iterable[Any],
    tokenizer: Any = None,
    *,
    tokens: int = 32,
    seconds: float = 60.0,
    least: int = 0,
    seed: int = 0,
    report: Callable[[str], Any] | None = None,
) -> tuple[int, ...]:
    """The layers to leave out, for ``LayerSkip(skip=...)``; () where no choice is expected to pay.

    Args:
        model: the target; decoder-only.
        prompts: a few prompts as they will be used, chat template included; texts, or lists of ids.
        tokenizer: for texts.
        tokens: how many the model writes behind each prompt.
        seconds: when to stop searching; writing and the first few choices are not cut short.
        least: layers to leave out at least, below the number that there are.
        seed: of the search. With the same seed a search that is not cut short finds the same layers.
        report: told a line about every better choice, ``print`` for example.

    Raises:
        InvalidInput: no prompts, texts without a tokenizer, or a number out of range.
        UnsupportedModel: the model's layers cannot be taken apart.
    """
    depth = count_layers(model)
    if depth < 2:
        raise UnsupportedModel(f"{type(model).__name__} has {depth} layer; some must be left to draft")
    wanted = f"0 to {depth - 1}, as the model has {depth} layers"
    least, tokens = at_least(0, "least", least, wanted), at_least(1, "tokens", tokens)
    if least >= depth:
        raise InvalidInput(f"least={least}; give {wanted}")
    if isinstance(prompts, (str, Mapping)):
        raise InvalidInput(
            f"prompts is a {type(prompts).__name__}; give a list of texts or of lists of ids, such as [prompt]"
        )
    ids = [_ids(prompt, tokenizer, model.device) for prompt in prompts]
    if not ids:
        raise InvalidInput("no prompts; give a few that are like those to come")
    end = perf_counter() + seconds
    texts, change = [], np.zeros(depth)
    for prompt in ids:
        text, moved = _written(model, prompt, tokens)
        texts.append(text)
        change += moved[:depth]
    search = _Search(model, texts, depth, report)
    order = np.argsort(change)
    sizes = {max(depth * part // 8, least, 1) for part in range(1, 7)}
    for size in sorted(sizes):
        search.judge(order[:size].tolist())
        search.judge(range(depth - size, depth))
    search.climb(least, end, np.random.default_rng(seed))
    # leaving nothing out is the model itself: as good as plain, and never better
    return search.best if search.value > 1 or least else ()


class _Search:
    """The best choice so far, and all that were judged."""

    def __init__(self, model: Any, texts: list[_Text], depth: int, report: Callable[[str], Any] | None) -> None:
        self._model, self._texts, self._depth, self._report = model, texts, depth, report
        self._seen: set[tuple[int, ...]] = set()
        self.best: tuple[int, ...] = ()
        self.value = 0.0

    def judge(self, skip: Iterable[int]) -> bool:
        """Whether leaving out ``skip`` is better than all before."""
        choice = tuple(sorted(int(layer) for layer in skip))
        if choice in self._seen:
            return False
        self._seen.add(choice)
        keep = [layer for layer in range(self._depth) if layer not in choice]
        part = with_layers(self._model, keep)
        right = [float(_answers(part, text, keep).eq(text.said).float().mean()) for text in self._texts]
        acceptance, cost = float(np.mean(right)), opening(part, self._model).reading
        value = max(speed(acceptance, cost, guesses) for guesses in range(1, MOST_GUESSES + 1))
        if value <= self.value:
            return False
        self.best, self.value = choice, value
        if self._report is not None:
            self._report(
                f"{len(choice)} of {self._depth} layers left out {choice}: {acceptance:.2f} of the tokens right, "
                f"{cost:.2f} of the weights, expected speed {value:.2f} of plain"
            )
        return True

    def climb(self, least: int, end: float, chance: np.random.Generator) -> None:
        """Change the best choice by one layer, or exchange two, until nothing is better or time is over."""
        failed = 0
        while failed < PATIENCE * self._depth and perf_counter() < end:
            out = set(self.best)
            changed = chance.choice(self._depth, size=chance.integers(1, 3), replace=False)
            choice = out ^ set(changed.tolist())
            if not max(least, 1) <= len(choice) < self._depth:
                failed += 1
                continue
            failed = 0 if self.judge(choice) else failed + 1


def _ids(prompt: Any, tokenizer: Any, device: torch.device) -> Tensor:
    """(1, P) ids of a prompt."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidInput("a prompt is a text; give the tokenizer, or lists of ids")
        prompt = tokenizer(prompt)["input_ids"]
    ids = torch.as_tensor(prompt, dtype=torch.int64).reshape(1, -1).to(device)
    if ids.shape[1] < 2:
        raise InvalidInput(f"a prompt has {ids.shape[1]} tokens; give at least 2")
    return ids


def _written(model: Any, prompt: Tensor, tokens: int) -> tuple[_Text, np.ndarray]:
    """What ``model`` writes behind ``prompt`` (1, P), and (L,) how far each layer moves its input there."""
    text = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False, num_beams=1,
        return_dict_in_generate=False,
    )  # fmt: skip
    read = prompt.shape[1] - 1
    past = model(input_ids=prompt[:, :read], use_cache=True)[CACHE]
    fed = text[:, read:-1]
    out = model(input_ids=fed, use_cache=True, output_hidden_states=True, **{CACHE: copy.deepcopy(past)})
    states = [layer[0].float() for layer in out.hidden_states]
    moved = [1 - float(torch.cosine_similarity(one, two, dim=-1).mean()) for one, two in pairwise(states)]
    return _Text(past, fed, text[0, read + 1 :]), np.array(moved)


def _answers(part: Any, text: _Text, keep: Sequence[int]) -> Tensor:
    """(N,) what the part says to each token of the text, behind the whole model's past in the layers ``keep``."""
    past = copy.copy(text.past)
    past.layers = [copy.deepcopy(text.past.layers[layer]) for layer in keep]
    logits: Tensor = part(input_ids=text.fed, use_cache=True, **{CACHE: past}).logits
    return logits[0].argmax(dim=-1)
