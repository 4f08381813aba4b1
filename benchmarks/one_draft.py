"""One draft for many targets: how much of it is kept when the target is changed, as a fine-tune or adapter would.

    python benchmarks/one_draft.py TARGET DRAFT [--sizes 0,0.1,0.2,0.4,0.8] [--rank 16] [--prompts 1] [--new 48]

A random matrix of low rank is added to every linear layer of the target's blocks, of a size given as its Frobenius
norm over that of the layer's weight, and taken off again afterwards. The same draft object serves all of them. What
an adapter learns is not random, so this says how fast a draft loses hold of a target that moves, not where
a given adapter stands. Greedy, a fixed number of guesses; nothing is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from models import load
from run import words
from workload import classes, encode, prompts_of

from specdec import DraftModel, SpeculativeGenerator


@contextmanager
def changed(model: Any, size: float, rank: int, seed: int = 0) -> Iterator[None]:
    """``model`` with a random change of ``rank`` and relative ``size`` in all linear layers but the head."""
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head] if size else []
    before = [layer.weight.detach().clone() for layer in layers]
    try:
        for layer in layers:
            weight = layer.weight
            out = torch.randn(weight.shape[0], rank, generator=generator)
            into = torch.randn(rank, weight.shape[1], generator=generator)
            change = out @ into
            change *= size * weight.float().norm().cpu() / change.norm()
            with torch.no_grad():
                weight.add_(change.to(weight.device, weight.dtype))
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            with torch.no_grad():
                layer.weight.copy_(weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("target")
    add("draft")
    add("--sizes", type=words, default=["0", "0.1", "0.2", "0.4", "0.8"])
    add("--rank", type=int, default=16)
    add("--classes", type=words, default=["code"], help=f"of {', '.join(classes())}")
    add("--prompts", type=int, default=1, help="the first N of each class")
    add("--new", type=int, default=48)
    add("--k", type=int, default=4)
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    options.device, options.noise, options.useless_draft = "cpu", False, False
    pair = load(options)
    draft = DraftModel(pair.draft)
    generator = SpeculativeGenerator(pair.target, draft, num_draft_tokens=options.k)
    work = [prompt for kind in options.classes for prompt in prompts_of(kind, options.prompts)]
    texts: dict[int, list[int]] = {}
    # a model's first call tries its layout in plain rounds
    generator.generate(**encode(pair.tokenizer, work[:1], pair.target.device), max_new_tokens=6, do_sample=False)
    print(
        "size     accepted   first guess   a round   tokens before the text parts from that of size 0", flush=True
    )
    for size in map(float, options.sizes):
        drafted = accepted = first = rounds = emitted = tried = 0
        same = []
        with changed(pair.target, size, options.rank):
            for number, prompt in enumerate(work):
                inputs = encode(pair.tokenizer, [prompt], pair.target.device)
                out = generator.generate(**inputs, max_new_tokens=options.new, do_sample=False)
                text = out[0, inputs["input_ids"].shape[1] :].tolist()
                original = texts.setdefault(number, text)
                parts = (i for i, (a, b) in enumerate(zip(text, original, strict=False)) if a != b)
                same.append(next(parts, min(len(text), len(original))))
                stats = generator.stats
                drafted, accepted = drafted + stats.drafted, accepted + stats.accepted
                rounds, emitted = rounds + stats.rounds, emitted + stats.emitted
                first, tried = first + sum(stats.accepted_at[:1]), tried + sum(stats.drafted_at[:1])
        shown = f"{accepted / max(drafted, 1):8.2f} {first / max(tried, 1):13.2f} {emitted / rounds:9.2f}"
        print(f"{size:<8g} {shown}   {', '.join(map(str, same))}", flush=True)


if __name__ == "__main__":
    main()
