"""Compiled steps: a model's forward pass over slots as one graph for each width (torch.compile, CUDA graphs).

A graph is made for one shape. In slots nothing has to change shape: the buffer is given its whole room at the
start of a call, every row writes at columns that are data, and a pass is filled up on the right to one of a few
``WIDTHS``. The columns that fill it up are overwritten by later passes like rejected guesses, their scores are not
looked at. So a draft step and a verify step of any length run through at most six graphs, without graph breaks
and without recompilation between rounds.

A graph must earn its trust: before its first use the same pass is made eagerly, and scores that do not agree,
or a model that cannot be compiled, send the model back to eager passes, with one warning. Passes may be made
twice because writing a slot again changes nothing.

On CUDA the graphs are captured (mode "reduce-overhead"). What they write in place must not move between two
replays: the buffers of a call are marked as static and lent to the next call of the same shape. *This part has
not been run on a GPU.* Knows nothing of proposals. Read next: ``choices.py``.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specdec.clock import happens_once
from specdec.errors import FAULTS, InvalidInput
from specdec.layouts.check import close
from specdec.layouts.facts import CACHE
from specdec.layouts.grouped import in_graphs
from specdec.layouts.handover import cached_columns
from specdec.layouts.slot_cache import SlotCache

MOST_ENCODED = 3  # lengths of an encoder's input: Whisper has one, a translator any number
# one token; one or two for a draft that has not seen its own last guess; guesses + 1 for a verify step
WIDTHS = (1, 2, 3, 5, 9, 17)
# room is rounded up to this many columns, so that calls of similar length share their graphs
ROOM = 256
# a buffer of more columns is not made at once, unless the model has so many positions
MOST_ROOM = 1 << 15
BACKEND = "inductor"  # of torch.compile; tests take others, which need no compiler


class CompiledSteps:
    """The graphs of one model, made when first needed and kept as long as this object.

    Attributes:
        graphs: how many there are.
        refused: why the model runs eagerly after all, or "".
    """

    def __init__(self) -> None:
        """Nothing is compiled yet."""
        self.refused = ""
        self._graphs: dict[tuple[int, ...], Callable[..., Tensor]] = {}
        self._encoded: set[int] = set()  # columns that encoders gave, a part of a graph's shape
        self._free: dict[Any, list[Tensor]] = {}
        self._said = False  # that a call may be too long

    @property
    def graphs(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def width(self, needed: int) -> int:
        """The width of a pass over ``needed`` tokens a row; wider passes than the widest graph run eagerly."""
        return next((width for width in WIDTHS if width >= needed and not self.refused), needed)

    def room(self, columns: int) -> int:
        """Room of the buffer for a call whose rows may reach ``columns``: filled up columns need some, too."""
        return -(-(columns + WIDTHS[-1]) // ROOM) * ROOM

    def fits(self, model: Any, columns: int) -> bool:
        """Whether rows that may reach ``columns`` can have their whole room at once; says so the first time not."""
        config = model.config.get_text_config(decoder=True)
        most = max(MOST_ROOM, getattr(config, "max_position_embeddings", None) or 0)
        if columns > most and not self._said:
            self._said = True
            warnings.warn(
                f"specdec runs {type(model).__name__} eagerly in a call whose text may have {columns} tokens: "
                f"graphs need room for all of them from the start, and have it for {most}; give the max_new_tokens "
                "that you need",
                stacklevel=2,
            )
        return columns <= most

    def run(self, model: Any, inputs: dict[str, Any], cache: SlotCache, needed: int) -> Tensor | None:
        """Scores (B, W, V) of ``model`` for ``inputs``, or None where this pass has to run eagerly.

        A graph gives scores and nothing else, so a pass that is asked for states is not one.

        Args:
            model: the model.
            inputs: its prepared inputs, for W tokens a row.
            cache: the slots in them, placed for an eager pass.
            needed: columns of the pass whose scores mean something.
        """
        shape = _shape(inputs, cache)
        asked = any(inputs.get(name) for name in ("output_hidden_states", "output_attentions"))
        if self.refused or cache.eager or asked or cache.shape[1] not in WIDTHS:
            return None
        self._encoded.add(shape[-1])
        if len(self._encoded) > MOST_ENCODED:
            self.refuse(
                model, "its encoder's inputs have many lengths, and every one of them needs graphs of its own"
            )
            return None
        try:
            graph = self._graphs.get(shape)
            if graph is None:
                return self._first(model, inputs, cache, needed)
            return _replay(graph, model, inputs, cache)
        except FAULTS as error:
            # whatever the compiler met: an eager pass writes the same slots again; an interruption is the caller's
            if _is_full_memory(error):  # it says nothing of the next call, and this one shall not compile again
                cache.eager = True
                return None
            self.refuse(model, f"{type(error).__name__}: {_short(error)}")
            return None

    def lend(self, cache: SlotCache) -> None:
        """Move ``cache`` to buffers that captured graphs know, if some of its shape are free.

        They come back when the cache is gone.
        """
        buffers = cache.buffers()
        if not buffers or not captures(buffers[0].device):
            return
        key = tuple((tuple(one.shape), one.dtype, one.device) for one in buffers)
        kept = self._free.pop(key, None)
        if kept is None:
            kept = buffers
            for one in kept:
                torch._dynamo.mark_static_address(one, guard=False)
        else:
            for one, new in zip(kept, buffers, strict=True):
                one.copy_(new)
            cache.move(kept)
        weakref.finalize(cache, _keep, self._free, key, kept)

    def _first(self, model: Any, inputs: dict[str, Any], cache: SlotCache, needed: int) -> Tensor | None:
        """Make the graph for a shape and compare its scores with those of an eager pass."""
        with happens_once():
            eager = _step(model, inputs)[:, :needed].clone()
            captured = BACKEND == "inductor" and captures(eager.device)
            settings: dict[str, Any] = {
                "fullgraph": True,
                "dynamic": False,
                "backend": BACKEND,
                "mode": "reduce-overhead" if captured else None,
                "isolate_recompiles": True,  # every shape has a cache of its own: no search, no limit
            }
            graph = torch.compile(_step, **settings)
            if not close(_replay(graph, model, inputs, cache)[:, :needed], eager):
                self.refuse(model, "a compiled pass did not give the scores of an eager one")
                return None
            self._graphs[_shape(inputs, cache)] = graph
        return _replay(graph, model, inputs, cache)  # once more, for the clock: a pass as all others will be

    def refuse(self, model: Any, reason: str) -> None:
        """Run ``model`` eagerly from now on, and say why."""
        self.refused = reason
        self._graphs.clear()
        warnings.warn(
            f"specdec runs {type(model).__name__} eagerly, compile=True has no effect on it: {reason}",
            stacklevel=2,
        )


def compiled_steps(model: Any) -> CompiledSteps:
    """No graphs yet, and the certainty that a compiler for them is there; raises ``InvalidInput`` if not."""
    check_compiler(model)
    return CompiledSteps()


def check_compiler(model: Any) -> None:
    """Refuse early what torch.compile could only fail at, with many lines: no compiler for the model's device.

    Raises:
        InvalidInput: saying what to install.
    """
    device = getattr(model, "device", torch.device("cpu")).type
    if device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise InvalidInput(
                "compile=True needs a C++ compiler on the CPU and none was found; install g++ or clang++, or name "
                "one in the environment variable CXX, or leave compile=False"
            ) from None
    elif device == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise InvalidInput(
                "compile=True needs Triton on CUDA and it is not usable here; install triton, or leave "
                "compile=False"
            )


def _shape(inputs: dict[str, Any], cache: SlotCache) -> tuple[int, ...]:
    """What a graph is made for: rows, tokens, room, and columns that an encoder gave (0 without one)."""
    return (*cache.shape, cached_columns(getattr(inputs[CACHE], "cross_attention_cache", None)))


def captures(device: torch.device) -> bool:
    """Whether graphs are captured and replayed on ``device``, from fixed addresses."""
    return device.type == "cuda"


def _step(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What is compiled: one forward pass, masks and cache included."""
    scores: Tensor = model(**inputs, return_dict=True).logits
    return scores


def _replay(graph: Callable[..., Tensor], model: Any, inputs: dict[str, Any], cache: SlotCache) -> Tensor:
    cache.place_by_data()
    with in_graphs():
        if not captures(cache.device):
            return graph(model, inputs)
        # a captured graph writes its scores to one place: take them away before the next replay
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return graph(model, inputs).clone()


def _keep(free: dict[Any, list[Tensor]], key: Any, buffers: list[Tensor]) -> None:
    """Keep ``buffers`` for the next call; one set only, the last one."""
    free.clear()
    free[key] = buffers


def _is_full_memory(error: BaseException) -> bool:
    """Whether memory ran out, also where the compiler has put the error into one of its own."""
    inner = getattr(error, "inner_exception", None)
    return isinstance(error, torch.OutOfMemoryError) or (inner is not None and _is_full_memory(inner))


def _short(error: Exception) -> str:
    """What an error says, without the pages that compilers add."""
    return " ".join(str(error).split())[:200]
