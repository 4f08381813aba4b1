"""One pass of a model over slots, eager against compiled: seconds, the compiler's seconds, difference of scores.

    python benchmarks/compiled_steps.py MODEL [--dtype bfloat16] [--widths 1 5] [--room 512] [--pack]

MODEL is a local path or hub id, or "thin": a random Llama of 30 narrow layers, of which little but the overhead of
eager passes is left. Eager and compiled passes take turns; ratios are of medians.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from specdec import pack_weights
from specdec.layouts import grouped, masks
from specdec.layouts.facts import CACHE
from specdec.layouts.slot_cache import Place, SlotCache, SlotLayer
from specdec.testing import tiny_llama
from specdec.weights.thin import ThinProducts

PROMPT, TURNS, PASSES = 200, 4, 5


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--room", type=int, default=512)
    parser.add_argument("--pack", action="store_true", help="with packed weights")
    given = parser.parse_args(arguments)
    dtype = getattr(torch, given.dtype)
    if given.model == "thin":
        model = tiny_llama(num_hidden_layers=30, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype).eval()
    if given.pack:
        pack_weights(model)
    masks.install()
    grouped.install()
    with torch.no_grad():
        compare(model, given.widths, given.room)


def compare(model: Any, widths: list[int], room: int) -> None:
    """Eager and compiled passes of every width, one row."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(3, vocabulary, (1, PROMPT + 64), generator=torch.Generator().manual_seed(0))
    # the model's own text: scores of random tokens say little of rounding
    ids[:, :PROMPT] = model.generate(ids[:, :4], max_length=PROMPT, min_length=PROMPT, do_sample=False)[:, :PROMPT]
    prompt = model(ids[:, :PROMPT], use_cache=True)[CACHE]
    where = Place()
    cache = SlotCache([SlotLayer(layer.keys, layer.values, where) for layer in prompt.layers], where)
    cache.grow(room, room)
    mask = torch.ones(1, room, dtype=torch.int64)

    def inputs(width: int, start: int, by_data: bool) -> dict[str, Any]:
        columns = torch.arange(start, start + width)[None]
        cache.place(columns, start, start)
        if by_data:
            cache.place_by_data()
        return {
            "input_ids": ids[:, start : start + width].clone(), "position_ids": columns.clone(),
            "attention_mask": mask, CACHE: cache, "use_cache": True, "logits_to_keep": width,
        }  # fmt: skip

    thin = ThinProducts(model)

    def step(model: Any, inputs: dict[str, Any]) -> Tensor:
        scores: Tensor = model(**inputs).logits
        return scores

    def eagerly(model: Any, inputs: dict[str, Any]) -> Tensor:
        width = inputs["input_ids"].shape[1]
        with thin.over(width, by_groups=width > 1):  # as the library makes it
            return step(model, inputs)

    def graphed(graph: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(model: Any, inputs: dict[str, Any]) -> Tensor:
            with grouped.in_graphs():
                return graph(model, inputs)

        return run

    def timed(run: Callable[..., Tensor], width: int, by_data: bool) -> list[float]:
        seconds = []
        for start in range(PROMPT, PROMPT + PASSES):
            given = inputs(width, start, by_data)
            began = time.perf_counter()
            run(model, given)
            seconds.append(time.perf_counter() - began)
        return seconds

    for width in widths:
        settings: dict[str, Any] = {"fullgraph": True, "dynamic": False, "isolate_recompiles": True}
        graph = graphed(torch.compile(step, **settings))
        eager = eagerly(model, inputs(width, PROMPT, False)).float()
        began = time.perf_counter()
        compiled = graph(model, inputs(width, PROMPT, True)).float()
        compiling = time.perf_counter() - began
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(TURNS):
            times[0].extend(timed(eagerly, width, False))
            times[1].extend(timed(graph, width, True))
        one, other = (1000 * float(np.median(t)) for t in times)
        off = (compiled - eager).abs().max() / eager.std()
        same = (compiled.argmax(-1) == eager.argmax(-1)).float().mean()
        print(
            f"width {width}: eager {one:.1f} ms, compiled {other:.1f} ms, {one / other:.2f} times as fast; "
            f"compiling {compiling:.0f} s; largest difference {off:.2g} standard deviations, "
            f"best token equal in {same:.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
