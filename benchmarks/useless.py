"""Never slower? A draft that is of no use at all, and one that is of no use at first.

    python benchmarks/useless.py TARGET DRAFT [--batch 16] [--new 256] [--repeats 7]

First: TARGET with a model of DRAFT's size and random weights, plain and ours in turn, a fresh generator each
time. Reported are the ratio of the medians, and the *counted* cost, which no neighbour on the machine can spoil:
forwards of target and draft, each at its measured one-token time, over plain's. It says what useless guesses
cost in forwards; a pass over several tokens is counted as one, so where it costs more than a narrow one the
counted cost is too low, and the measured ratio is the one to believe.

Second: the real DRAFT, its scores turned round for the first half of the text. After how many tokens is it used
again? "Used" means: four rounds running with guesses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import transformers
from contestants import draft_length
from costs import cost_curve
from exactness import divergences
from machine import provenance
from measure import Forward, Run, measured
from models import Pair, load
from transformers.generation.streamers import BaseStreamer
from workload import classes, encode, prompts_of

from specdec import SpecdecError, SpeculativeGenerator

RUNNING = 4  # rounds with guesses, one after the other, that count as use


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both, print a line for each, and everything as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("draft")
    parser.add_argument("--k", type=draft_length, default="auto", help="num_draft_tokens (default: auto)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=256, help="new tokens of every row; ends are ignored")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=["useless", "switching"], help="one of the two")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options.noise = False
    out: dict[str, Any] = {}
    try:
        for part in (useless, switching):
            if options.only in (None, part.__name__):
                out[part.__name__] = part(options)
                print(f"{part.__name__}: " + ", ".join(f"{k} {shown(v)}" for k, v in out[part.__name__].items()))
    except (SpecdecError, OSError) as error:
        print(f"The benchmark cannot start: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"arguments": vars(options), "provenance": provenance(torch.device(options.device)), **out}))
    return 0


def shown(value: Any) -> str:
    """A figure for people."""
    return format(value, ".3g") if isinstance(value, float) else str(value)


def prepared(options: argparse.Namespace, *, random: bool) -> tuple[Pair, dict[str, Any]]:
    """Models whose text does not end, and ``batch`` prompts; both models have run, and passed the self-check."""
    options.useless_draft = random
    pair = load(options)
    pair.target.generation_config.eos_token_id = None
    prompts = [prompt for kind in classes() for prompt in prompts_of(kind) if kind in ("chat", "code")]
    chosen = (prompts * options.batch)[: options.batch]
    inputs = encode(pair.tokenizer, chosen, pair.target.device)
    for generate in (pair.target.generate, SpeculativeGenerator(pair.target, pair.draft).generate):
        checked(pair, generate, inputs)
    return pair, inputs


def checked(pair: Pair, generate: Any, inputs: dict[str, Any]) -> None:
    """Let the models pass the self-check with what measures on them: hooks make them other models to it."""

    def call(streamer: Any) -> Any:
        return generate(**inputs, max_new_tokens=8, do_sample=False)

    measured(call, inputs=inputs, target=pair.target, draft=pair.draft, streams=False)


def useless(options: argparse.Namespace) -> dict[str, Any]:
    """Plain and ours in turn, with a draft of random weights."""
    pair, inputs = prepared(options, random=True)
    how = {"max_new_tokens": options.new, "do_sample": False}

    def ours(streamer: Any) -> Any:
        generator = SpeculativeGenerator(pair.target, pair.draft, num_draft_tokens=options.k)
        return generator.generate(**inputs, **how)

    calls = {"plain": lambda streamer: pair.target.generate(**inputs, **how), "specdec": ours}
    runs: dict[str, list[Run]] = {name: [] for name in calls}
    for turn in range(options.repeats):
        for name in sorted(calls, reverse=bool(turn % 2)):
            runs[name].append(
                measured(calls[name], inputs=inputs, target=pair.target, draft=pair.draft, streams=False)
            )
    step = {name: cost_curve(model, inputs, [1])[1] for name, model in vars_of(pair).items()}
    seconds = {name: statistics.median(run.seconds for run in found) for name, found in runs.items()}
    each = [a.seconds / b.seconds for a, b in zip(runs["plain"], runs["specdec"], strict=True)]
    forwards = [(len(run.target), len(run.draft)) for run in runs["specdec"]]
    counted = [(t * step["target"] + d * step["draft"]) / (options.new * step["target"]) for t, d in forwards]
    return {
        "ratio": seconds["plain"] / seconds["specdec"],
        "lowest": min(each),
        "highest": max(each),
        "counted_cost": statistics.median(counted),
        "target_forwards": statistics.median(t for t, _ in forwards),
        "draft_forwards": statistics.median(d for _, d in forwards),
        "plain_forwards": len(runs["plain"][0].target),
        "draft_step_share": step["draft"] / step["target"],
        "divergences": divergences(pair.target, inputs, *(found[-1].sequences for found in runs.values())),
    }


def vars_of(pair: Pair) -> dict[str, Any]:
    """The two models by name."""
    return {"target": pair.target, "draft": pair.draft}


class Counter(BaseStreamer):
    """Counts the tokens that every row has."""

    def __init__(self) -> None:
        self.tokens = -1  # the prompt comes first

    def put(self, value: torch.Tensor) -> None:
        """Take one token of every row, or the prompt."""
        self.tokens += 1

    def end(self) -> None:
        """Nothing is left to do."""


@contextmanager
def turned_round(draft: Any, counter: Counter, until: int) -> Iterator[None]:
    """While fewer than ``until`` tokens are written, every score of ``draft`` is given to another token."""

    def turn(module: Any, arguments: Any, output: Any) -> None:
        if counter.tokens < until:
            output.logits = output.logits.roll(output.logits.shape[-1] // 2, dims=-1)

    hook = draft.register_forward_hook(turn)
    try:
        yield
    finally:
        hook.remove()


def switching(options: argparse.Namespace) -> dict[str, Any]:
    """The real draft, of no use for the first half."""
    pair, inputs = prepared(options, random=False)
    half = options.new // 2
    counter = Counter()
    generator = SpeculativeGenerator(pair.target, pair.draft, num_draft_tokens=options.k)

    def call(streamer: Any) -> Any:
        return generator.generate(**inputs, max_new_tokens=options.new, do_sample=False, streamer=counter)

    at: list[int] = []  # tokens written when each round of the target began
    note = pair.target.register_forward_pre_hook(lambda *_: at.append(counter.tokens))
    try:
        with turned_round(pair.draft, counter, half):
            checked(pair, SpeculativeGenerator(pair.target, pair.draft).generate, inputs)
            at.clear()
            run = measured(call, inputs=inputs, target=pair.target, draft=pair.draft, streams=False)
    finally:
        note.remove()
    drafted = [guesses > 0 for guesses in guesses_per_round(run.target, run.draft)]
    used = first_use(at[1:], drafted, half)
    late = [tokens for tokens in at if tokens >= options.new * 3 // 4]
    return {
        "switched_at": half,
        "used_again_after": None if used is None else used - half,
        "rounds_with_guesses_before": sum(d for t, d in zip(at[1:], drafted, strict=True) if t < half),
        "rounds_before": sum(t < half for t in at[1:]),
        "tokens_per_round_in_last_quarter": (options.new - late[0]) / len(late) if late else None,
    }


def guesses_per_round(target: Sequence[Forward], draft: Sequence[Forward]) -> list[int]:
    """Forwards of the draft between neighbouring forwards of the target."""
    return [sum(before.end <= f.begin < after.begin for f in draft) for before, after in pairwise(target)]


def first_use(tokens: Sequence[int], drafted: Sequence[bool], start: int) -> int | None:
    """Tokens written at the first of ``RUNNING`` rounds with guesses, from ``start`` tokens on."""
    for place in range(len(drafted) - RUNNING + 1):
        if tokens[place] >= start and all(drafted[place : place + RUNNING]):
            return tokens[place]
    return None


if __name__ == "__main__":
    sys.exit(main())
