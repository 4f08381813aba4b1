"""One target, one draft: plain generate(), transformers' assisted decoding and ours, alternated in one run.

    python benchmarks/pair.py TARGET DRAFT [--batch 4] [--k 2] [--new 64] [--repeats 1] [--dtype bfloat16]

Prints a table for people; the last line is the same as JSON with its provenance. Every contestant sees every
prompt in every repeat; the order is turned from prompt to prompt, so that a drift of the machine hits all alike.
Ratios are medians over prompts of plain seconds / contestant's seconds. Where ours differs from plain, the first
divergence is reported with the gap between the target's two best scores there: a small gap is a tie that
another kernel broke the other way (docs/numerics.md), a large one would be a fault.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec
from specdec import DraftModel, SpeculativeGenerator

PROMPTS = [
    "Write a Python function that returns the n-th Fibonacci number, with memoisation and type hints.",
    "Write a Python class for a stack with push, pop, peek and is_empty, with docstrings.",
    "Explain in a short paragraph what a hash table is and when it is slow.",
    "Translate to French: The library opens at nine in the morning and closes at six in the evening.",
    "Write a SQL query that lists the ten customers with the highest total order value in 2024.",
    "Rewrite this loop as a list comprehension:\nresult = []\nfor x in items:\n    if x.price > 10:\n"
    "        result.append(x.name.lower())",
    "List five differences between TCP and UDP.",
    "Write a unit test with pytest for a function `parse_date(text)` that accepts YYYY-MM-DD.",
]


def main() -> None:
    """Run the contest that the command line describes."""
    arguments = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    tokenizer = AutoTokenizer.from_pretrained(arguments.target, padding_side="left")
    load = {"dtype": dtype, "device_map": None}
    target = AutoModelForCausalLM.from_pretrained(arguments.target, **load).to(arguments.device)
    draft = AutoModelForCausalLM.from_pretrained(arguments.draft, **load).to(arguments.device)
    contestants = contest(target, draft, arguments)
    rows = []
    for number, inputs in enumerate(batches(tokenizer, arguments)):
        inputs = inputs.to(arguments.device)
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        texts: dict[str, Any] = {}
        names = list(contestants)
        for repeat in range(arguments.repeats):
            turn = (number + repeat) % len(names)
            for name in names[turn:] + names[:turn]:
                start = time.perf_counter()
                texts[name], stats = contestants[name](inputs)
                seconds[name].append(time.perf_counter() - start)
                if stats is not None:
                    rows.append({"prompt": number, "name": name, "stats": stats.as_dict()})
        width = inputs["input_ids"].shape[1]
        emitted = int((texts["plain"][:, width:] != tokenizer.pad_token_id).sum())
        for name in names:
            rows.append(
                {
                    "prompt": number,
                    "name": name,
                    "seconds": statistics.median(seconds[name]),
                    "tokens": emitted,
                    "divergence": divergence(target, inputs, texts["plain"], texts[name]),
                }
            )
        spread = "  ".join(f"{n} {statistics.median(seconds[n]):.2f}s" for n in names)
        print(f"prompt {number}: {emitted} tokens  {spread}", file=sys.stderr, flush=True)
    report(rows, list(contestants), arguments)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("draft")
    parser.add_argument("--batch", type=int, default=1, help="prompts in a batch")
    parser.add_argument("--k", type=int, default=4, help="guesses a round, for all contestants")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--no-draft", action="store_true", help="add specdec without a draft")
    return parser.parse_args()


def contest(target: Any, draft: Any, arguments: argparse.Namespace) -> dict[str, Callable[[Any], Any]]:
    """Name -> a run that returns the ids and, for ours, the statistics."""
    options = {"max_new_tokens": arguments.new, "do_sample": False}

    def plain(inputs: Any) -> Any:
        return target.generate(**inputs, **options), None

    def assisted(threshold: float) -> Callable[[Any], Any]:
        def run(inputs: Any) -> Any:
            config = draft.generation_config
            config.num_assistant_tokens = arguments.k
            config.num_assistant_tokens_schedule = "constant"
            config.assistant_confidence_threshold = threshold
            return target.generate(**inputs, **options, assistant_model=draft), None

        return run

    def ours(guesser: Any) -> Callable[[Any], Any]:
        gen = SpeculativeGenerator(target, guesser, num_draft_tokens=arguments.k, layout=arguments.layout)

        def run(inputs: Any) -> Any:
            return gen.generate(**inputs, **options), gen.stats

        return run

    out = {"plain": plain}
    if arguments.batch == 1:
        out["assisted"] = assisted(0.4)  # the library's own default: stops a draft that is unsure
    out["specdec"] = ours(draft)  # on the CPU the same default
    if arguments.batch == 1:
        out["assisted, always k"] = assisted(0.0)
    out["specdec, always k"] = ours(DraftModel(draft, confidence=0.0))
    if arguments.no_draft:
        out["specdec, no draft"] = ours(None)
    return out


def batches(tokenizer: Any, arguments: argparse.Namespace) -> Any:
    """The prompts, chat-templated, ``--batch`` at a time."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        for text in PROMPTS
    ]
    for start in range(0, len(texts), arguments.batch):
        yield tokenizer(texts[start : start + arguments.batch], return_tensors="pt", padding=True)


@torch.no_grad()
def divergence(target: Any, inputs: Any, plain: torch.Tensor, text: torch.Tensor) -> Any:
    """Where a text first differs from plain, a row: [row, new token, gap of the two best scores]."""
    found = []
    width = inputs["input_ids"].shape[1]
    for row in range(len(plain)):
        length = min(plain.shape[1], text.shape[1])
        differs = (plain[row, :length] != text[row, :length]).nonzero()
        if not len(differs):
            continue
        place = int(differs[0])
        ids = plain[row : row + 1, :place]
        mask = torch.nn.functional.pad(inputs["attention_mask"][row : row + 1], (0, place - width), value=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        scores = target(ids, attention_mask=mask, position_ids=positions).logits[0, -1].float()
        best = scores.topk(2).values
        found.append([row, place - width, round(float(best[0] - best[1]), 4)])
    return found


def report(rows: list[dict[str, Any]], names: list[str], arguments: argparse.Namespace) -> None:
    """The table, and the same as JSON."""
    timed = {(r["prompt"], r["name"]): r for r in rows if "seconds" in r}
    prompts = sorted({prompt for prompt, _ in timed})
    summary = {}
    print(
        f"\n{'contestant':22s} {'tokens/s':>9s} {'x plain':>8s} {'spread':>13s} {'accepted':>9s} {'per round':>10s}"
    )
    for name in names:
        ratios = [timed[p, "plain"]["seconds"] / timed[p, name]["seconds"] for p in prompts]
        speed = sum(timed[p, name]["tokens"] for p in prompts) / sum(timed[p, name]["seconds"] for p in prompts)
        stats = [r["stats"] for r in rows if r["name"] == name and "stats" in r]
        drafted = sum(s["drafted"] for s in stats)
        accepted = sum(s["accepted"] for s in stats) / drafted if drafted else None
        per_round = statistics.mean(s["tokens_per_round"] for s in stats) if stats else None
        summary[name] = {
            "tokens_per_second": speed,
            "ratio_median": statistics.median(ratios),
            "ratio_total": sum(timed[p, "plain"]["seconds"] for p in prompts)
            / sum(timed[p, name]["seconds"] for p in prompts),
            "ratios": ratios,
            "acceptance_rate": accepted,
            "tokens_per_round": per_round,
            "layout": stats[-1]["layout"] if stats else None,
            "divergences": [timed[p, name]["divergence"] for p in prompts if timed[p, name]["divergence"]],
        }
        print(
            f"{name:22s} {speed:9.2f} {statistics.median(ratios):8.2f} {min(ratios):6.2f}-{max(ratios):<6.2f}"
            f" {'' if accepted is None else f'{accepted:.2f}':>9s}"
            f" {'' if per_round is None else f'{per_round:.2f}':>10s}"
        )
        for found in summary[name]["divergences"]:
            print(f"    differs from plain at [row, token, gap]: {found}")
    print(json.dumps({"arguments": vars(arguments), "provenance": provenance(), "summary": summary}))


def provenance() -> dict[str, Any]:
    """What the numbers depend on."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "specdec": specdec.__version__,
        "commit": commit,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
