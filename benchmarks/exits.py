"""Drafts that are layers of the target itself: what they cost, how often they are right, and what comes of it.

    python benchmarks/exits.py TARGET --exit 8 --exit 16 --skip 3,5,7 --k 3 --k auto
    python benchmarks/exits.py TARGET --search 60 --least 0 --least 7

The first way lets plain `generate()` and every draft answer the same prompts in turn (batch 1, greedy, ends of
text ignored). For each draft and number of guesses:

- step: its one-token pass over the target's, both behind the same prompt and with a cache of their own;
- kept: how often its first guess of a round was kept, over all prompts;
- a round: tokens a round;
- ratio: plain's seconds over its own, of all prompts together; median of `--rounds` runs, lowest and highest.

The second way only searches for layers to leave out (`choose_layers`), for `--search` seconds with each `--least`.
The last line is everything as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
import transformers
from contestants import draft_length
from costs import cost_curve
from exactness import divergences
from machine import provenance
from measure import Clock
from models import load
from torch import Tensor
from workload import encode, prompts_of

from specdec import EarlyExit, LayerSkip, SpeculativeGenerator, choose_layers
from specdec.weights.layers import count_layers, with_layers


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--exit", type=int, action="append", default=[], help="draft with so many first layers")
    parser.add_argument("--skip", action="append", default=[], help="draft without these layers: 3,5,7")
    parser.add_argument("--k", type=draft_length, action="append", help="num_draft_tokens (default: 3)")
    parser.add_argument("--search", type=float, help="seconds to search for layers")
    parser.add_argument("--least", type=int, action="append", help="layers to leave out at least (default: 0)")
    parser.add_argument("--classes", default="chat,code", help="classes of prompts; one prompt of each")
    parser.add_argument("--new", type=int, default=32, help="new tokens")
    parser.add_argument("--rounds", type=int, default=1, help="how often everything is measured")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options.noise, options.draft = False, None
    pair = load(options)
    pair.target.generation_config.eos_token_id = None
    names = options.classes.split(",")
    inputs = [encode(pair.tokenizer, prompts_of(name, 1), pair.target.device) for name in names]
    out = (
        search(pair.target, inputs, options)
        if options.search is not None
        else measure(pair.target, inputs, options)
    )
    print(json.dumps({"arguments": vars(options), "provenance": provenance(torch.device(options.device)), **out}))
    return 0


def search(target: Any, inputs: list[dict[str, Tensor]], options: argparse.Namespace) -> dict[str, Any]:
    """The layers found, by how many are left out at least."""
    prompts = [one["input_ids"][0].tolist() for one in inputs]
    found = {}
    for least in options.least or [0]:
        print(f"at least {least}:")
        start = perf_counter()
        found[str(least)] = choose_layers(
            target, prompts, tokens=options.new, seconds=options.search, least=least, report=print
        )
        print(f"found in {perf_counter() - start:.0f} s: {found[str(least)]}", flush=True)
    return {"found": found}


def measure(target: Any, inputs: list[dict[str, Tensor]], options: argparse.Namespace) -> dict[str, Any]:
    """A row for every draft and number of guesses."""
    skips = [[int(layer) for layer in text.split(",")] for text in options.skip]
    drafts: dict[str, Any] = {f"exit after {layers}": EarlyExit(layers=layers) for layers in options.exit}
    drafts |= {f"without {','.join(map(str, skip))}": LayerSkip(skip=skip) for skip in skips}
    depth = count_layers(target)
    numbers = options.k or [3]
    generators = {
        (name, k): SpeculativeGenerator(target, draft, num_draft_tokens=k)
        for name, draft in drafts.items()
        for k in numbers
    }
    parts = {name: with_layers(target, draft.kept(depth)) for name, draft in drafts.items()}
    wide = 1 + max(k for k in numbers if isinstance(k, int)) if any(isinstance(k, int) for k in numbers) else 4
    whole = cost_curve(target, inputs[0], [1, wide], repeats=3)
    steps = {name: cost_curve(part, inputs[0], [1], repeats=3)[1] / whole[1] for name, part in parts.items()}
    for run in (target, *generators.values()):  # the self-check is not measured
        run.generate(**inputs[0], max_new_tokens=6, do_sample=False)
    clock = Clock(target.device)
    seconds: dict[Any, list[float]] = {key: [] for key in (None, *generators)}
    counts: dict[Any, list[Any]] = {key: [] for key in generators}
    texts: dict[Any, list[Any]] = {key: [] for key in seconds}
    for _ in range(options.rounds):
        for key in seconds:
            run = target if key is None else generators[key]
            spent = 0.0
            for one in inputs:
                clock.wait()
                start = clock.mark()
                text = run.generate(**one, max_new_tokens=options.new, do_sample=False)
                end = clock.mark()
                clock.wait()
                spent += clock.between(start, end)
                texts[key].append(text)
                if key is not None:
                    counts[key].append(generators[key].stats)
            seconds[key].append(spent)
    print(
        f"{depth} layers; a pass over {wide} tokens takes {whole[wide] / whole[1]:.2f} of one over a single token"
    )
    print(
        f"{'draft':40s} {'guesses':>7s} {'step':>5s} {'kept':>5s} {'a round':>7s} {'ratio':>5s} (lowest, highest)"
    )
    rows = []
    for (name, k), stats in counts.items():
        ratios = [plain / ours for plain, ours in zip(seconds[None], seconds[name, k], strict=True)]
        tried = sum(one.drafted_at[0] for one in stats if one.drafted_at)
        row = {
            "draft": name,
            "guesses": k,
            "step": steps[name],
            "kept": sum(one.accepted_at[0] for one in stats if one.accepted_at) / max(tried, 1),
            "tokens_per_round": sum(one.emitted for one in stats) / sum(one.rounds for one in stats),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "divergences": [
                found
                for one, plain, ours in zip(inputs, texts[None], texts[name, k], strict=False)
                for found in divergences(target, one, plain, ours)
            ],
        }
        rows.append(row)
        print(
            f"{name[:40]:40s} {k!s:>7s} {row['step']:5.2f} {row['kept']:5.2f} {row['tokens_per_round']:7.2f} "
            f"{row['ratio']:5.2f} ({row['lowest']:.2f}, {row['highest']:.2f})"
            + "".join(f"  parts from plain, gap {found['gap']:.2g}" for found in row["divergences"])
        )
    return {"depth": depth, "wide": [wide, whole[wide] / whole[1]], "drafts": rows}


if __name__ == "__main__":
    sys.exit(main())
