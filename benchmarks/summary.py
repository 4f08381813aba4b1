"""From runs to figures: one record for each contestant and class, and one over all classes.

All speeds are ratios to plain decoding of the same prompt in the same program run. Read next: ``report.py``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from contestants import PLAIN
from costs import bandwidth, bytes_read, operations
from measure import Run
from models import Weights

ALL = "all"
LAYOUTS = ("layout", "draft_layout")
# what is worked out from single forwards; inside a graph none can be seen
FROM_FORWARDS = (
    "model_bound", "of_model_bound", "target_forwards_per_token", "draft_forwards_per_token",
    "operations_per_token", "bytes_per_token", "bytes_per_second",
)  # fmt: skip


@dataclass(slots=True)
class Case:
    """One batch of prompts of a class, and what every contestant made of it."""

    kind: str
    number: int
    runs: dict[str, list[Run]] = field(default_factory=dict)
    divergences: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def per_token(self, name: str) -> float:
        """Seconds a new token: the median of the repeats."""
        return statistics.median(run.per_token for run in self.runs[name])

    def in_models(self, name: str) -> float:
        """Seconds a new token inside the two models' forwards."""
        return statistics.median(run.in_models / max(run.emitted, 1) for run in self.runs[name])


def summarise(
    cases: Sequence[Case], weights: dict[str, tuple[Weights, Weights | None]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """{class: {contestant: figures}}; ``weights`` has those of target and draft for each contestant."""
    kinds = list(dict.fromkeys(case.kind for case in cases))
    groups = {kind: [case for case in cases if case.kind == kind] for kind in kinds}
    if len(kinds) > 1:
        groups[ALL] = list(cases)
    return {
        kind: {name: figures(name, chosen, *weights[name]) for name in weights if (chosen := had(name, group))}
        for kind, group in groups.items()
    }


def had(name: str, cases: Iterable[Case]) -> list[Case]:
    """The cases that a contestant took part in."""
    return [case for case in cases if name in case.runs]


def figures(name: str, cases: Sequence[Case], target: Weights, draft: Weights | None) -> dict[str, Any]:
    """What is known of one contestant in some cases; None where it cannot be known."""
    runs = [run for case in cases for run in case.runs[name]]
    ratios = [case.per_token(PLAIN) / case.per_token(name) for case in cases]
    bounds = [case.per_token(PLAIN) / case.in_models(name) for case in cases]
    found = {
        "batches": len(cases),
        "tokens": sum(run.emitted for run in runs),
        "tokens_per_second": sum(run.emitted for run in runs) / sum(run.seconds for run in runs),
        "ratio": {
            "median": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "geometric_mean": statistics.geometric_mean(ratios),
            "each": ratios,
        },
        "ratio_after_first_token": after_first_token(name, cases),
        # the speed if everything but the models' forwards were free, and how much of it is reached
        "model_bound": statistics.median(bounds),
        "of_model_bound": statistics.median(r / b for r, b in zip(ratios, bounds, strict=True)),
        "first_token_seconds": percentiles([r.first_token for r in runs if r.first_token is not None]),
        "gap_seconds": percentiles([gap for run in runs for gap in run.gaps]),
        **speculation(runs),
        "target_forwards_per_token": sum(len(run.target) for run in runs) / sum(run.emitted for run in runs),
        "draft_forwards_per_token": sum(drafted_forwards(r) for r in runs) / sum(run.emitted for run in runs),
        "operations_per_token": mean(operations(run, target, draft) for run in runs),
        "bytes_per_token": sum(bytes_read(r, target, draft) for r in runs) / sum(r.emitted for r in runs),
        "bytes_per_second": mean(bandwidth(run, target, draft) for run in runs),
        "peak_memory_bytes": max((run.memory for run in runs if run.memory is not None), default=None),
        "joules_per_token": mean(run.joules and run.joules / run.emitted for run in runs),
        "oracle_tokens_per_round": mean(
            oracle(text, prompt)
            for run in runs
            for text, prompt in zip(run.texts, run.sequences[:, : run.prompt].tolist(), strict=True)
        ),
        "repeated_8grams": mean(repeated(text) for run in runs for text in run.texts),
        "copied_8grams": mean(
            copied(text, prompt)
            for run in runs
            for text, prompt in zip(run.texts, run.sequences[:, : run.prompt].tolist(), strict=True)
        ),
        "layout": runs[-1].stats and runs[-1].stats.get("layout"),
        "divergences": [
            {"batch": case.number, **place} for case in cases for place in case.divergences.get(name, [])
        ],
    }
    in_graphs = any("+compiled" in str((run.stats or {}).get(key)) for run in runs for key in LAYOUTS)
    return found | dict.fromkeys(FROM_FORWARDS) if in_graphs else found


def after_first_token(name: str, cases: Sequence[Case]) -> float | None:
    """Median ratio to plain of the seconds between tokens, from the first one on: the prompt weighs nothing."""
    ratios = []
    for case in cases:
        plain, own = ([run.after_first for run in case.runs[who]] for who in (PLAIN, name))
        if None in plain or None in own:
            return None
        ratios.append(statistics.median(plain) / statistics.median(own))
    return statistics.median(ratios)


def drafted_forwards(run: Run) -> int:
    """Forwards of the draft; by the library's own count where the model was not to be seen."""
    return len(run.draft) or int((run.stats or {}).get("draft_forwards", 0))


def speculation(runs: Sequence[Run]) -> dict[str, float | None]:
    """Acceptance and tokens a round; of contestants that keep no statistics, from what the target was fed."""
    drafted = accepted = rounds = 0
    for run in runs:
        if run.stats is not None:
            drafted += run.stats["drafted"]
            accepted += run.stats["accepted"]
            rounds += run.stats["rounds"] * len(run.texts)
        else:
            # each pass is fed the prompt or one known token, and the guesses
            rows, passes = len(run.texts), len(run.target)
            drafted += rows * (sum(f.width for f in run.target) - run.prompt - (passes - 1))
            accepted += rows * (run.sequences.shape[1] - run.prompt - passes)
            rounds += rows * passes
    return {
        "acceptance_rate": accepted / drafted if drafted else None,
        "tokens_per_round": sum(run.emitted for run in runs) / rounds if rounds else None,
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """50th, 90th and 99th percentile by nearest rank."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{p}": ordered[max(-(-len(ordered) * p // 100) - 1, 0)] for p in (50, 90, 99)}


def mean(values: Iterable[float | None]) -> float | None:
    """Their mean; None if there are none, or one of them is."""
    known = list(values)
    return None if not known or None in known else statistics.mean(known)  # type: ignore[type-var]


def repeated(text: Sequence[int], n: int = 8) -> float:
    """Share of the n-grams of ``text`` that stood in it before: text that goes in circles is easily guessed."""
    grams = windows(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def copied(text: Sequence[int], prompt: Sequence[int], n: int = 8) -> float:
    """Share of the n-grams of ``text`` that stand in the prompt."""
    grams, known = windows(text, n), set(windows(prompt, n))
    return sum(gram in known for gram in grams) / len(grams) if grams else 0.0


def windows(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All n-grams of ``text``, in order."""
    return [tuple(text[start : start + n]) for start in range(len(text) - n + 1)]


def oracle(text: Sequence[int], prompt: Sequence[int], most: int = 16) -> float | None:
    """Tokens a round of a draft that knows from where in prompt and text to copy, up to ``most`` a round.

    No draft that copies can do better: what it guesses is right to the end, and the longest that there is. It may
    go on from its own guesses, as a text that goes in circles does.
    """
    whole, rounds, place = [*prompt, *text], 0, len(prompt)
    while place < len(whole):
        longest = 0
        for start in range(place):
            length = 0
            while length < min(most, len(whole) - place) and whole[start + length] == whole[place + length]:
                length += 1
            longest = max(longest, length)
        place += longest + 1
        rounds += 1
    return len(text) / rounds if rounds else None
