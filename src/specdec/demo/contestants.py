"""The ways to generate, timed and counted alike.

Plain and assisted decoding are counted from outside, by what each pass of the target was fed; ours
keeps its own counts. Prints nothing.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.errors import UnsupportedModel
from specdec.weights.packed import pack_weights


@dataclass(frozen=True, slots=True)
class Run:
    """What one call of ``generate()`` gave.

    Args:
        sequences: (B, L) prompts and new tokens.
        emitted: new tokens of all rows, padding excluded.
        seconds: wall-clock time of the call.
        acceptance: accepted / drafted, or None where nothing was drafted.
        per_round: new tokens that a row got from one pass of the target.
    """

    sequences: Tensor
    emitted: int
    seconds: float
    acceptance: float | None
    per_round: float


@dataclass(frozen=True, slots=True)
class Contest:
    """The models and settings of all runs; ``draft`` is a model or the name of a proposer.

    ``guesses`` are those that assisted decoding makes a round; ``generator`` knows its own.
    """

    target: Any
    draft: Any
    generator: Any
    guesses: int

    def plain(self, inputs: Mapping[str, Tensor], **options: Any) -> Run:
        """The target's own ``generate()``."""
        return self._counted(inputs, lambda: self.target.generate(**inputs, **options))

    def assisted(self, inputs: Mapping[str, Tensor], **options: Any) -> Run:
        """Transformers' assisted decoding: by prompt lookup, or with the draft model."""
        if isinstance(self.draft, str):
            options["prompt_lookup_num_tokens"] = self.guesses
        else:
            options["assistant_model"] = self.draft
        return self._counted(inputs, lambda: self.target.generate(**inputs, **options))

    def speculative(self, inputs: Mapping[str, Tensor], **options: Any) -> Run:
        """Ours."""
        sequences, seconds = self._timed(lambda: self.generator.generate(**inputs, **options))
        stats = self.generator.stats
        acceptance = stats.acceptance_rate if stats.drafted else None
        emitted = self._emitted(sequences, inputs)
        return Run(sequences, emitted, seconds, acceptance, stats.tokens_per_round)

    def packed(self, inputs: Mapping[str, Tensor], **options: Any) -> Run:
        """Ours with packed weights; packing is not timed, as it is done once for many calls.

        Raises:
            UnsupportedModel: nothing can be packed, or would be the faster for it.
        """
        models = [model for model in (self.target, self.draft) if isinstance(model, torch.nn.Module)]
        with ExitStack() as packings:
            with warnings.catch_warnings(action="ignore"):
                made = [packings.enter_context(pack_weights(model)) for model in models]
            if not any(packing.layers for packing in made):
                raise UnsupportedModel("plain ones are as fast on this processor")
            return self.speculative(inputs, **options)

    def parting(self, run: Run, plain: Run, inputs: Mapping[str, Tensor]) -> tuple[int, int, float] | None:
        """Where ``run`` first parts from ``plain``, and how near plain's best two scores are there.

        Returns:
            row, column, and the distance of the scores (tiny: a tie that fell otherwise; large: a
            fault), or None where both are the same.
        """
        if torch.equal(run.sequences, plain.sequences):
            return None
        width = min(run.sequences.shape[1], plain.sequences.shape[1])
        unequal = run.sequences[:, :width] != plain.sequences[:, :width]
        first = torch.where(unequal.any(1), unequal.int().argmax(1), width)
        row, column = int(first.argmin()), int(first.min())
        # the row alone, without its padding: near enough to tell a tie from a fault
        padding = int((inputs["attention_mask"][row] == 0).sum())
        known = plain.sequences[row : row + 1, padding:column]
        with torch.no_grad():
            scores = self.target(input_ids=known).logits[0, -1].float()
        best = scores.topk(2).values
        return row, column, float(best[0] - best[1])

    def _counted(self, inputs: Mapping[str, Tensor], generate: Callable[[], Tensor]) -> Run:
        """Time ``generate``; a pass is fed the prompt or one known token, and the guesses."""
        with fed_tokens(self.target) as widths:
            sequences, seconds = self._timed(generate)
        rows, prompt = inputs["input_ids"].shape
        emitted = self._emitted(sequences, inputs)
        drafted = sum(widths) - prompt - (len(widths) - 1)
        accepted = sequences.shape[1] - prompt - len(widths)
        acceptance = accepted / drafted if drafted else None
        return Run(sequences, emitted, seconds, acceptance, emitted / (len(widths) * rows))

    def _timed(self, generate: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """What ``generate`` returns, and its seconds; a GPU is waited for."""
        start = self._now()
        sequences = generate()
        return sequences, self._now() - start

    def _now(self) -> float:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _emitted(self, sequences: Tensor, inputs: Mapping[str, Tensor]) -> int:
        """New tokens of all rows up to their first end-of-sequence token, that one included."""
        new = sequences[:, inputs["input_ids"].shape[1] :]
        end_ids = self.target.generation_config.eos_token_id
        if end_ids is None:
            return new.numel()
        is_end = torch.isin(new, torch.tensor(end_ids, device=new.device))
        return int((is_end.cumsum(1) - is_end.long() == 0).sum())


@contextmanager
def fed_tokens(model: Any) -> Iterator[list[int]]:
    """Note how many tokens a row each pass of ``model`` is fed, while the block runs."""
    widths: list[int] = []

    def note(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        widths.append((named["input_ids"] if "input_ids" in named else arguments[0]).shape[1])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield widths
    finally:
        hook.remove()
