"""One call of ``generate()``, measured: seconds, when tokens came, which forwards ran and how long, memory, energy.

Every contestant is measured by the same means: a streamer that notes the time, and a hook before and behind every
forward of the two models (two readings of the clock each). Knows no contestant. Read next: ``costs.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from machine import Meter
from torch import Tensor
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True, slots=True)
class Forward:
    """One pass of a model: rows, tokens a row, and seconds from the start of the call to its begin and end."""

    rows: int
    width: int
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Run:
    """What one call gave.

    Args:
        sequences: (B, L) prompts and new tokens.
        prompt: tokens a row of the prompt, padding included.
        texts: new tokens of each row, up to its end.
        seconds: of the call.
        steps: (seconds from the start, tokens a row) for each time that tokens came.
        target, draft: the forwards of the two models; ``draft`` is empty where there is none.
        memory: bytes by which the peak exceeded what was in use before, or None.
        joules: energy, or None.
        stats: ``gen.stats.as_dict()``, or None for contestants that are not ours.
    """

    sequences: Tensor
    prompt: int
    texts: list[list[int]]
    seconds: float
    steps: list[tuple[float, int]]
    target: list[Forward]
    draft: list[Forward]
    memory: int | None
    joules: float | None
    stats: dict[str, Any] | None

    @property
    def emitted(self) -> int:
        """New tokens of all rows, padding excluded."""
        return sum(map(len, self.texts))

    @property
    def per_token(self) -> float:
        """Seconds a new token."""
        return self.seconds / max(self.emitted, 1)

    @property
    def first_token(self) -> float | None:
        """Seconds to the first token."""
        return self.steps[0][0] if self.steps else None

    @property
    def after_first(self) -> float | None:
        """Seconds a step of all rows, from the first tokens on: the prompt left out."""
        steps = sum(count for _, count in self.steps[1:])
        return (self.steps[-1][0] - self.steps[0][0]) / steps if steps else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens; those that came together are 0 apart."""
        out: list[float] = []
        for (before, _), (now, count) in pairwise(self.steps):
            out += [now - before] + [0.0] * (count - 1)
        return out

    @property
    def in_models(self) -> float:
        """Seconds inside the forwards of the two models."""
        return sum(forward.seconds for forward in self.target + self.draft)


class Clock:
    """Marks in time; on CUDA they are events of the stream, so that nothing waits while it is measured."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Now."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self._cuda:
            torch.cuda.synchronize()

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another that is past."""
        return start.elapsed_time(end) / 1000 if self._cuda else end - start


class Stamps(BaseStreamer):
    """A streamer that notes when tokens come. The first thing that any contestant puts is the prompt."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, int]] = []
        self._begun = False

    def put(self, value: Tensor) -> None:
        """Take (B,) tokens, one a row, or (1, n) tokens of one row."""
        if self._begun:
            self.steps.append((time.perf_counter(), value.shape[1] if value.ndim == 2 else 1))
        self._begun = True

    def end(self) -> None:
        """Nothing is left to do."""


@contextmanager
def noted_forwards(model: Any, clock: Clock) -> Iterator[list[tuple[int, int, Any, Any]]]:
    """Rows, width, and marks before and behind every forward of ``model`` while the block runs.

    Those of graphs are not seen: a call may make one at any time, and what takes the time cannot be traced.
    """
    noted: list[tuple[int, int, Any, Any]] = []
    begun: list[Any] = []

    def before(module: Any, arguments: Any, named: Any) -> None:
        if not torch.compiler.is_compiling():
            begun.append(clock.mark())

    def behind(module: Any, arguments: Any, named: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        ids = named.get("input_ids", arguments[0] if arguments else None)
        ids = named["inputs_embeds"] if ids is None else ids
        noted.append((ids.shape[0], ids.shape[1], begun.pop(), clock.mark()))

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(behind, with_kwargs=True),
    ]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


def measured(
    call: Callable[[Any], Tensor],
    *,
    inputs: dict[str, Tensor],
    target: Any,
    draft: Any = None,
    stats: Callable[[], Any] = lambda: None,
    streams: bool = True,
) -> Run:
    """Run ``call`` (it is given a streamer, or None) and measure it.

    Args:
        call: calls ``generate()``.
        inputs: what it is asked.
        target: the model whose text it is.
        draft: the model that drafts, if there is one.
        stats: tells the statistics of the call, or None.
        streams: False leaves the streamer out: then nothing is known of single tokens.
    """
    device = inputs["input_ids"].device
    clock, meter, streamer = Clock(device), Meter(device), Stamps() if streams else None
    with ExitStack() as stack:
        models = [target] if draft is None else [target, draft]
        noted = [stack.enter_context(noted_forwards(model, clock)) for model in models]
        meter.start()
        clock.wait()
        begin, start = time.perf_counter(), clock.mark()
        sequences = call(streamer)
        end = clock.mark()
        clock.wait()
        memory, joules = meter.stop()
    forwards = [
        [Forward(rows, width, clock.between(start, a), clock.between(start, b)) for rows, width, a, b in of_model]
        for of_model in noted
    ]
    prompt = inputs["input_ids"].shape[1]
    found = stats()
    return Run(
        sequences=sequences.cpu(),
        prompt=prompt,
        texts=new_tokens(sequences[:, prompt:], target.generation_config.eos_token_id),
        seconds=clock.between(start, end),
        steps=[(at - begin, count) for at, count in streamer.steps] if streamer else [],
        target=forwards[0],
        draft=forwards[1] if draft is not None else [],
        memory=memory,
        joules=joules,
        stats=None if found is None else found.as_dict(),
    )


def new_tokens(new: Tensor, end_ids: Any) -> list[list[int]]:
    """Each row of ``new`` (B, N) up to its first end-of-sequence token, that one included."""
    ends = set(torch.tensor([] if end_ids is None else end_ids).flatten().tolist())
    rows = []
    for row in new.tolist():
        last = next((place for place, token in enumerate(row) if token in ends), len(row))
        rows.append(row[: last + 1])
    return rows
