"""A draft with another tokenizer: how much of its vocabulary is shared, what is kept, what it costs, and the law.

    python benchmarks/another_tokenizer.py TARGET DRAFT [--k 4] [--new 48] [--dtype bfloat16] [--batch 1]
    python benchmarks/another_tokenizer.py TARGET DRAFT --temperature 1.0        # kept guesses when sampling
    python benchmarks/another_tokenizer.py TARGET DRAFT --law 3000               # a G-test instead of a contest

The first two alternate plain generate(), guesses by shared tokens and by text (and, greedy with one row,
transformers' universal assisted decoding) over the prompts of ``prompts/``; ratios are medians over prompts of
plain seconds / contestant's seconds. The last draws the first three new tokens N times in each way, and compares
their counts with those of plain decoding: the 12 most frequent tokens of each place, the rest together.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from exactness import divergences
from machine import provenance
from measure import Clock
from models import Pair, load
from workload import batches, encode, prompts_of

from specdec import SpeculativeGenerator, TranslatedDraft

METHODS = ("tokens", "strings")
BINS = 12
WARM_UP = 8  # new tokens


def main(command: Sequence[str] | None = None) -> None:
    """Run what the command line describes."""
    arguments = parse(command)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pair = load(arguments)
    tokenizers = pair.tokenizer, pair.draft_tokenizer
    proposers = {name: TranslatedDraft(pair.draft, *tokenizers, method=name) for name in METHODS}
    shared = proposers["tokens"].shared
    print(
        f"shared ids: {len(shared.draft_ids)}, {shared.of_draft:.1%} of the draft's, "
        f"{shared.of_target:.1%} of the target's",
        flush=True,
    )
    generators = {
        name: SpeculativeGenerator(pair.target, proposer, num_draft_tokens=arguments.k or "auto")
        for name, proposer in proposers.items()
    }
    if arguments.law:
        law(pair, generators, arguments)
    else:
        contest(pair, generators, arguments)


def parse(command: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("draft")
    parser.add_argument("--batch", type=int, default=1, help="prompts in a batch")
    parser.add_argument("--classes", nargs="+", default=["chat", "code"], help="of prompts")
    parser.add_argument("--prompts", type=int, default=None, help="how many of each class")
    parser.add_argument("--k", type=int, default=4, help="guesses a round; 0: chosen by the library")
    parser.add_argument("--new", type=int, default=48, help="new tokens")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--assisted", action="store_true", help="add transformers' own, where it can run")
    parser.add_argument("--law", type=int, default=0, metavar="N", help="draws for the G-test, 0: none")
    parser.set_defaults(noise=False, useless_draft=False)
    return parser.parse_args(command)


def contest(pair: Pair, generators: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Time and count all ways on every prompt."""
    options: dict[str, Any] = {"max_new_tokens": arguments.new, "do_sample": arguments.temperature > 0}
    if arguments.temperature:
        options |= {"temperature": arguments.temperature, "top_k": 0, "top_p": 1.0}
    target, draft = pair.target, pair.draft
    runs: dict[str, Callable[..., Any]] = {"plain": target.generate}
    runs |= {name: gen.generate for name, gen in generators.items()}
    if arguments.assisted:
        draft.generation_config.num_assistant_tokens = arguments.k
        both = {"tokenizer": pair.tokenizer, "assistant_tokenizer": pair.draft_tokenizer}
        runs["assisted"] = lambda **inputs: target.generate(**inputs, assistant_model=draft, **both)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    counts: dict[str, list[dict[str, Any]]] = {name: [] for name in generators}
    parted: dict[str, list[Any]] = {name: [] for name in runs}
    clock = Clock(target.device)
    prompts = [prompt for name in arguments.classes for prompt in prompts_of(name, arguments.prompts)]
    for number, batch in enumerate(batches(prompts, arguments.batch)):
        inputs = encode(pair.tokenizer, batch, target.device)
        texts = {}
        names = list(runs)
        if not number:  # a model's first call tries its layout, and a device's loads its kernels
            for run in runs.values():
                run(**inputs, **{**options, "max_new_tokens": WARM_UP})
        for name in names[number % len(names) :] + names[: number % len(names)]:
            clock.wait()
            start = clock.mark()
            texts[name] = runs[name](**inputs, **options)
            end = clock.mark()
            clock.wait()
            seconds[name].append(clock.between(start, end))
            if name in generators:
                counts[name].append(generators[name].stats.as_dict())
        if not arguments.temperature:
            for name in names[1:]:
                parted[name].append(divergences(target, inputs, texts["plain"], texts[name]))
        print(f"prompt {number}: " + "  ".join(f"{n} {seconds[n][-1]:.1f}s" for n in names), flush=True)
    summary = {}
    for name in runs:
        ratios = [p / s for p, s in zip(seconds["plain"], seconds[name], strict=True)]
        line = {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        if name in generators:
            drafted, accepted = (sum(one[key] for one in counts[name]) for key in ("drafted", "accepted"))
            line["accepted"] = accepted / drafted if drafted else 0.0
            line["tokens_per_round"] = statistics.mean(one["tokens_per_round"] for one in counts[name])
            # a call that drafted nothing has no first guesses
            kept, tried = (sum(sum(one[key][:1]) for one in counts[name]) for key in ("accepted_at", "drafted_at"))
            line["first"] = kept / max(tried, 1)
        summary[name] = {**line, "parted": [one for one in parted[name] if one]}
        print(f"{name:8s} " + "  ".join(f"{key} {value:.2f}" for key, value in line.items()))
        for one in summary[name]["parted"]:
            print(f"    differs from plain at [row, token, gap]: {one}")
    print(json.dumps({"arguments": vars(arguments), "provenance": provenance(target.device), "summary": summary}))


def law(pair: Pair, generators: dict[str, Any], arguments: argparse.Namespace) -> None:
    """G-tests of each place's counts against plain decoding's, and which difference they would have seen."""
    target = pair.target
    inputs = pair.tokenizer(["The sea is"], return_tensors="pt")
    width = inputs["input_ids"].shape[1]
    # the first token is never guessed: three more have guesses before them
    options = {"max_new_tokens": 4, "do_sample": True, "temperature": arguments.temperature or 1.0, "top_k": 0}
    options["num_return_sequences"] = 100

    def draw(generate: Callable[..., Any], gen: Any = None) -> torch.Tensor:
        parts, drafted, accepted = [], 0, 0
        if gen is not None:  # a text this short is over before the first call has settled the layout
            generate(**inputs, **{**options, "max_new_tokens": 12})
        for _ in range(arguments.law // 100):
            parts.append(generate(**inputs, **options)[:, width:])
            if gen is not None:
                drafted, accepted = drafted + gen.stats.drafted, accepted + gen.stats.accepted
        if gen is not None:
            print(f"{gen.stats.drafting}: kept {accepted} of {drafted} guesses", flush=True)
        return torch.cat([torch.nn.functional.pad(p, (0, 4 - p.shape[1])) for p in parts])

    plain = draw(target.generate)
    drawn = {"plain again": draw(target.generate)}
    drawn |= {name: draw(gen.generate, gen) for name, gen in generators.items()}
    for name, got in drawn.items():
        worst = 1.0
        for place in range(1, 4):
            counts = tables(plain[:, place], got[:, place])
            statistic, freedom = g_test(counts)
            chance = float(torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)))
            worst = min(worst, chance)
            print(f"{name:11s} token {place}: G = {statistic:.1f}, {freedom} degrees, p = {chance:.3f}", flush=True)
        print(f"{name:11s} smallest p {worst:.3f}", flush=True)
    power(plain[:, 1], arguments.law)


def tables(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(2, BINS + 1) counts of the tokens that are most frequent in both together, and of the rest."""
    found, counts = torch.cat([one, other]).unique(return_counts=True)
    top = found[counts.argsort(descending=True)[:BINS]]
    rows = [torch.stack([(part == token).sum() for token in top]) for part in (one, other)]
    return torch.stack([torch.cat([row, (len(one) - row.sum())[None]]) for row in rows]).double()


def g_test(counts: torch.Tensor) -> tuple[float, int]:
    """The likelihood ratio statistic of two rows of counts, and its degrees of freedom."""
    counts = counts[:, counts.sum(0) > 0]
    expected = counts.sum(0, keepdim=True) * counts.sum(1, keepdim=True) / counts.sum()
    terms = torch.where(counts > 0, counts * (counts / expected).log(), 0.0)
    return 2 * float(terms.sum()), counts.shape[1] - 1


def power(tokens: torch.Tensor, draws: int) -> None:
    """How often a law that moves 5 or 10 % of the most frequent token to the second would have been seen."""
    generator = torch.Generator().manual_seed(0)
    counts = tokens.unique(return_counts=True)[1].sort(descending=True).values
    chances = counts.double() / counts.sum()
    for moved in (0.05, 0.1):
        wrong = chances.clone()
        wrong[1] += min(moved, float(wrong[0]))
        wrong[0] -= min(moved, float(wrong[0]))
        seen = 0
        for _ in range(400):
            rows = [
                torch.multinomial(law, draws, replacement=True, generator=generator) for law in (chances, wrong)
            ]
            statistic, freedom = g_test(tables(*rows))
            # the 1 % point of chi squared, by Wilson and Hilferty
            limit = freedom * (1 - 2 / (9 * freedom) + 2.326 * math.sqrt(2 / (9 * freedom))) ** 3
            seen += statistic > limit
        print(f"power: {moved:.0%} of the mass moved is seen at the 1 % level in {seen / 400:.0%} of tests")


if __name__ == "__main__":
    main()
