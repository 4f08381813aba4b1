"""What a round costs beside the models, and what a verification costs beside the least that it must do.

    python benchmarks/overhead.py TARGET [DRAFT] [--k 4] [--new 96]

First: the milliseconds that a round spends outside the two models' forwards, batch 1, greedy, always k guesses,
for ours and for transformers' assisted decoding; without DRAFT the target drafts for itself, and every guess is
kept. A round reaches from the end of one forward of the target to the end of the next. Masks, attention and
whatever else happens inside a forward are the models' time; it is shown beside.

Second: one verification of 8 rows, k = 4, vocabulary 152,000, float32: sampling against one softmax of the
target's rows, greedy against one argmax of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import transformers
from contestants import lent_settings
from costs import outside_per_round
from machine import provenance
from measure import Clock, Run, measured
from models import Pair, load
from workload import encode, prompts_of

from specdec import DraftModel, SpeculativeGenerator
from specdec.sampling import sampling_for

OURS, ASSISTED = "specdec", "assisted"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both, print a line for each figure, and all of them as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("draft", nargs="?")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3, help="calls; the first ones warm up and are not counted")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="rows of the verification")
    parser.add_argument("--vocabulary", type=int, default=152_000, help="of the verification")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options.noise = options.useless_draft = False
    found = {"round": rounds(load(options), options), "verification": verification(options)}
    for name, figures in found["round"].items():
        print(
            f"{name:12} {figures['outside_ms']:.2f} ms a round outside the models (90th percentile "
            f"{figures['p90_ms']:.2f}), {figures['inside_ms']:.1f} ms inside; {figures['rounds']} rounds, "
            f"{figures['guesses']:.1f} guesses each"
        )
    for name, figures in found["verification"].items():
        print(f"{name:12} {figures['ms']:.2f} ms, {figures['ratio']:.2f} x {figures['against']}")
    print(json.dumps({"arguments": vars(options), "provenance": provenance(torch.device(options.device)), **found}))
    return 0


def rounds(pair: Pair, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds a round, alternated; medians over rounds."""
    draft = pair.draft if pair.draft is not None else copy.deepcopy(pair.target)
    generator = SpeculativeGenerator(pair.target, DraftModel(draft, confidence=0.0), num_draft_tokens=options.k)
    settings = {
        "num_assistant_tokens": options.k,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    inputs = encode(pair.tokenizer, prompts_of("chat", 1), pair.target.device)
    how = {"max_new_tokens": options.new, "do_sample": False}

    def assisted(streamer: Any) -> Any:
        with lent_settings(draft, settings):
            return pair.target.generate(**inputs, **how, assistant_model=draft)

    calls = {OURS: lambda streamer: generator.generate(**inputs, **how), ASSISTED: assisted}
    runs: dict[str, list[Run]] = {name: [] for name in calls}
    for _ in range(options.repeats + 1):
        for name, call in calls.items():
            runs[name].append(measured(call, inputs=inputs, target=pair.target, draft=draft, streams=False))
    return {name: of_rounds(found[1:]) for name, found in runs.items()}


def of_rounds(runs: Sequence[Run]) -> dict[str, float]:
    """Medians over all rounds of some calls; the prompt's passes and a first, odd round are left out."""
    outside, inside, guesses = [], [], []
    for run in runs:
        decoding = run.target[2:]
        outside += outside_per_round(decoding, run.draft)
        for before, after in pairwise(decoding):
            drafting = [f for f in run.draft if before.end <= f.begin < after.begin]
            inside.append(after.seconds + sum(f.seconds for f in drafting))
            guesses.append(after.width - 1)
    if not outside:
        raise SystemExit("The texts are over before a round can be measured: give more tokens with --new")
    return {
        "outside_ms": 1000 * statistics.median(outside),
        "p90_ms": 1000 * float(np.quantile(outside, 0.9)),
        "inside_ms": 1000 * statistics.median(inside),
        "guesses": statistics.mean(guesses),
        "rounds": len(outside),
    }


def verification(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Milliseconds of one verification, noise included, and its ratio to the least it must do."""
    device = torch.device(options.device)
    shape = (options.batch, options.k + 1, options.vocabulary)
    maker = torch.Generator().manual_seed(0)
    target = (3 * torch.randn(shape, generator=maker)).to(device)
    draft = target[:, :-1] + torch.randn(target[:, :-1].shape, generator=maker).to(device)
    guesses = draft.argmax(-1)
    lengths = torch.full((options.batch,), options.k, device=device)
    positions = torch.zeros_like(lengths)
    ways = {name: sampling_for("block", name == "sampling", 0, device, list) for name in ("sampling", "greedy")}
    timed = {
        "sampling": lambda: ways["sampling"].verify(target, guesses, lengths, draft, positions),
        "greedy": lambda: ways["greedy"].verify(target, guesses, lengths, None, positions),
        "softmax": lambda: target.softmax(-1),
        "argmax": lambda: target.argmax(-1),
    }
    with torch.no_grad():
        seconds = alternated(timed, Clock(device))
    least = {"sampling": "softmax", "greedy": "argmax"}
    return {
        name: {
            "ms": 1000 * seconds[name],
            "against": against,
            "against_ms": 1000 * seconds[against],
            "ratio": seconds[name] / seconds[against],
        }
        for name, against in least.items()
    }


def alternated(calls: dict[str, Callable[[], Any]], clock: Clock, repeats: int = 15) -> dict[str, float]:
    """Median seconds of each call; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            clock.wait()
            start = clock.mark()
            call()
            end = clock.mark()
            clock.wait()
            if turn >= 2:
                times[name].append(clock.between(start, end))
    return {name: statistics.median(found) for name, found in times.items()}


if __name__ == "__main__":
    sys.exit(main())
