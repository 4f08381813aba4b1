"""The benchmark: plain ``generate()``, transformers' assisted decoding and prompt lookup, and specdec, in one run.

    python benchmarks/run.py TARGET [DRAFT] --drafts model,ngram --k 4 --classes chat,code --prompts 2 --new 64

Every contestant answers every prompt in every repeat; they take turns at going first, so that a drift of the
machine hits all alike. A table is for people; the last line of the output is the same as JSON with what the
numbers depend on. ``README.md`` says how to read it. Read next: ``models.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from contestants import PLAIN, Contestant, draft_length, line_up
from costs import cost_curve
from exactness import divergences
from machine import provenance
from measure import measured
from models import Dress, Pair, load, weights_of
from plots import draw
from report import show
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from summary import Case, summarise
from workload import Prompt, batches, behind, classes, encode, prompts_of

from specdec import SpecdecError

WARM_UP = 8  # new tokens
REFUSALS = (SpecdecError, ValueError, TypeError, NotImplementedError)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("target", help="hub id or folder")
    add("draft", nargs="?", help="hub id or folder of a draft model")
    add("--drafts", type=words, default=None, metavar="WORDS",
        help="what drafts for specdec: model, none, cascade, mixture, any word that SpeculativeGenerator knows, "
             "several one behind another (suffix+model), and WORD+prediction; "
             "default: model if there is one, and ngram")  # fmt: skip
    add("--k", type=draft_length, action="append", metavar="K",
        help='num_draft_tokens, a number or "auto"; may be given again; default: the library\'s')  # fmt: skip
    add("--threshold", type=float, help="assistant_confidence_threshold where K is given; 0: always K guesses")
    add("--ours-only", action="store_true", help="leave out transformers' assisted decoding and prompt lookup")
    add("--classes", type=words, default=classes(), metavar="NAMES", help=f"of {', '.join(classes())}")
    add("--prompts", type=int, metavar="N", help="the first N of each class; default: all")
    add("--new", type=int, default=64, help="most new tokens of an answer (default: 64)")
    add("--batch", type=int, default=1, help="prompts in a batch")
    add("--context", type=int, default=0, metavar="N", help="put N tokens of other text before every prompt")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--greedy", dest="sample", action="store_false", default=False, help="the default")
    how.add_argument("--sample", action="store_true", default=False, help="temperature 0.7, top-p 0.9")
    add("--repeats", type=int, default=1)
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    add("--device", default="cpu", help="cpu, or cuda (written for it, not run on one yet)")
    add("--noise", action="store_true", help="noise of half a 4-bit step on all linear weights, before all else")
    add("--draft-bits", choices=["int4", "int8"], help="quantise the draft model with specdec.quantize_draft")
    add("--draft-head", type=int, metavar="N", help="first leave it the N lowest token ids (specdec.prune_head)")
    add("--useless-draft", action="store_true", help="give the draft model random weights")
    add("--pack", action="store_true",
        help="ours, and a contestant 'packed plain', find the target's weights packed with specdec.pack_weights; "
             "transformers' own find them as they are")  # fmt: skip
    add("--pack-draft", action="store_true", help="the same for the draft")
    add("--compile", action="store_true",
        help="ours with every draft also with compile=True, every batch first once unmeasured, "
             "which makes the graphs")  # fmt: skip
    add("--no-stream", dest="stream", action="store_false", help="no streamer: nothing about single tokens")
    add("--curve", action="store_true", help="measure a pass of the target against its width, 1 to 16")
    add("--json", type=Path, metavar="FILE", help="write the JSON into a file, too")
    add("--plot", type=Path, metavar="FOLDER", help="draw speed and cost curve")
    chosen = parser.parse_args(arguments)
    if chosen.drafts is None:
        chosen.drafts = [*(["model"] if chosen.draft else []), "ngram"]
    return chosen


def words(text: str) -> list[str]:
    """Words with commas between."""
    return [word.strip() for word in text.split(",") if word.strip()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the contest; 2 where it cannot start."""
    options = parse(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        work = {kind: prompts_of(kind, options.prompts) for kind in options.classes}
        pair = load(options)
        if options.context:
            work = {kind: behind(options.context, prompts, pair.tokenizer) for kind, prompts in work.items()}
        weights = {model: weights_of(model) for model in (pair.target, pair.draft) if model is not None}
        contestants = line_up(pair, options)
        weights |= {c.draft: weights_of(c.draft) for c in contestants if c.draft not in {None, *weights}}
        wanted = ((pair.target, options.pack), (pair.draft, options.pack_draft))
        dress = Dress([model for model, packs in wanted if packs and model])
    except (SpecdecError, ValueError, OSError) as error:
        print(f"The benchmark cannot start: {error}", file=sys.stderr)
        return 2
    cases, skipped, curve = contest(pair, contestants, work, dress, options)
    taking_part = [c for c in contestants if c.name not in skipped]
    document = {
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()},
        "provenance": provenance(torch.device(options.device)),
        "skipped": skipped,
        "summary": summarise(cases, {c.name: (weights[pair.target], weights.get(c.draft)) for c in taking_part}),
        "cost_curve": curve,
        "batches": [details(case) for case in cases],
    }
    show(document)
    if options.plot is not None:
        for path in draw(document, options.plot):
            print(f"wrote {path}")
    line = json.dumps(document, allow_nan=False)
    if options.json is not None:
        options.json.write_text(line + "\n")
    print(line)
    return 0


def contest(
    pair: Pair,
    contestants: Sequence[Contestant],
    work: dict[str, list[Prompt]],
    dress: Dress,
    options: argparse.Namespace,
) -> tuple[list[Case], dict[str, str], dict[str, Any]]:
    """Run everything: the cases, who did not take part and why, the cost curve (empty unless wanted)."""
    device = torch.device(options.device)
    todo = [
        (Case(kind, number), batch, encode(pair.tokenizer, batch, device))
        for kind, prompts in work.items()
        for number, batch in enumerate(batches(prompts, options.batch))
    ]
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), auto_refresh=False,  # no second thread while something is measured
    )  # fmt: skip
    with bar:
        task = bar.add_task("warming up", total=None)
        skipped: dict[str, str] = {}
        for contestant in contestants:
            bar.update(task, description=f"warming up: {contestant.name}", refresh=True)
            dress.wear(contestant.packed)
            reason = warm_up(contestant, todo, pair.target)
            if reason is not None:
                skipped[contestant.name] = reason
        racing = [c for c in contestants if c.name not in skipped]
        bar.reset(task, total=sum(suits(c, batch) for _, batch, _ in todo for c in racing) * options.repeats)
        for place, (case, batch, inputs) in enumerate(todo):
            for contestant in racing:
                if contestant.compiles and suits(contestant, batch):
                    bar.update(task, description=f"compiling: {contestant.name}", refresh=True)
                    dress.wear(contestant.packed)
                    contestant.call(inputs, batch, None, options.new)
            for repeat in range(options.repeats):
                turn = (place + repeat) % len(racing)
                for contestant in racing[turn:] + racing[:turn]:
                    if suits(contestant, batch):
                        at = f"{case.kind} {case.number + 1}: {contestant.name}"
                        bar.update(task, description=at, refresh=True)
                        dress.wear(contestant.packed)
                        torch.manual_seed(1000 * place + repeat)
                        run = measured(
                            lambda streamer, c=contestant, i=inputs, b=batch: c.call(i, b, streamer, options.new),
                            inputs=inputs, target=pair.target, draft=contestant.draft, stats=contestant.stats,
                            streams=options.stream,
                        )  # fmt: skip
                        case.runs.setdefault(contestant.name, []).append(run)
                        bar.advance(task)
            dress.wear(False)
            if not options.sample:
                bar.update(task, description="comparing the texts", refresh=True)
                plain = case.runs[PLAIN][0].sequences
                for name, runs in case.runs.items():
                    case.divergences[name] = divergences(pair.target, inputs, plain, runs[-1].sequences)
        curve: dict[str, Any] = {}
        if options.curve or options.plot is not None:
            bar.update(task, description="cost of a pass against its width", refresh=True)
            curve = curves(pair, todo[0][2])
    return [case for case, _, _ in todo], skipped, curve


def curves(pair: Pair, inputs: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a pass of the target by its width, and of a step of the draft, behind the first prompts."""
    found: dict[str, Any] = {"rows": len(inputs["input_ids"]), "prompt": inputs["input_ids"].shape[1]}
    try:
        found["target"] = cost_curve(pair.target, inputs)
        if pair.draft is not None:
            found["draft"] = cost_curve(pair.draft, inputs, widths=[1])
    except ValueError as error:  # a recurrent state, say, that cannot be put back
        found["not_measured"] = str(error)
    return found


def suits(contestant: Contestant, batch: Sequence[Prompt]) -> bool:
    """It can take part with these prompts."""
    return not contestant.predicts or all(prompt.prediction is not None for prompt in batch)


def warm_up(
    contestant: Contestant, todo: Sequence[tuple[Case, list[Prompt], dict[str, Any]]], target: Any
) -> str | None:
    """A few tokens of the first prompts that suit; returns why the contestant cannot take part, if it cannot.

    Measured like the rest: a model with hooks on it is another one to the self-check.
    """
    found = next(((batch, inputs) for _, batch, inputs in todo if suits(contestant, batch)), None)
    if found is None:
        return "none of these prompts comes with a prediction of the answer"
    try:
        measured(
            lambda streamer: contestant.call(found[1], found[0], streamer, WARM_UP),
            inputs=found[1],
            target=target,
            draft=contestant.draft,
            streams=False,
        )
    except REFUSALS as error:
        if contestant.name == PLAIN:
            raise
        return f"{type(error).__name__}: {error}"
    return None


def details(case: Case) -> dict[str, Any]:
    """One batch for the JSON."""
    return {
        "class": case.kind,
        "batch": case.number,
        "contestants": {
            name: {
                "seconds": [run.seconds for run in runs],
                "in_models": [run.in_models for run in runs],
                "tokens": [run.emitted for run in runs],
                "stats": runs[-1].stats,
                "divergences": case.divergences.get(name, []),
            }
            for name, runs in case.runs.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
