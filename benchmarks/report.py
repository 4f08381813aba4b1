"""The table for people. Computes nothing; see ``summary.py`` for what the columns are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

WIDE = 180  # columns at least: a terminal that is narrower folds the lines


def number(value: float | None, form: str = ".2f", scale: float = 1.0) -> str:
    """``value`` in ``form``, or nothing."""
    return "" if value is None else format(value * scale, form)


def spread(figures: dict[str, Any]) -> str:
    """Lowest and highest ratio, where there are several."""
    return "" if figures["batches"] == 1 else f"{figures['ratio']['low']:.2f}–{figures['ratio']['high']:.2f}"


def milliseconds(values: dict[str, float] | None, *names: str) -> str:
    """Percentiles, a slash between them."""
    return "" if values is None else "/".join(f"{1000 * values[name]:.0f}" for name in names)


# heading -> what stands below it
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens/s": lambda f: number(f["tokens_per_second"]),
    "x plain": lambda f: number(f["ratio"]["median"]),
    "spread": spread,
    "geo. mean": lambda f: number(f["ratio"]["geometric_mean"]),
    "after first": lambda f: number(f["ratio_after_first_token"]),
    "bound": lambda f: number(f["model_bound"]),
    "reached": lambda f: number(f["of_model_bound"], ".0%"),
    "accepted": lambda f: number(f["acceptance_rate"]),
    "a round": lambda f: number(f["tokens_per_round"]),
    "first ms": lambda f: milliseconds(f["first_token_seconds"], "p50"),
    "gap ms 50/90/99": lambda f: milliseconds(f["gap_seconds"], "p50", "p90", "p99"),
    "GB/s": lambda f: number(f["bytes_per_second"], ".1f", 1e-9),
    "Gop": lambda f: number(f["operations_per_token"], ".1f", 1e-9),
    "GB": lambda f: number(f["bytes_per_token"], ".2f", 1e-9),
    "MB": lambda f: number(f["peak_memory_bytes"], ".0f", 1e-6),
    "repeats": lambda f: number(f["repeated_8grams"]),
    "copies": lambda f: number(f["copied_8grams"]),
    "oracle": lambda f: number(f["oracle_tokens_per_round"]),
    "J/token": lambda f: number(f["joules_per_token"]),
}

LEGEND = {
    "x plain": "plain's seconds a token over these: median over batches, lowest and highest, geometric mean",
    "after first": "the same from the first token on; a draft that is fed the prompt after that pays for it here",
    "bound, reached": "x plain if all but the two models' forwards were free, and how much of it is reached",
    "accepted": "guesses kept / guesses made",
    "a round": "new tokens that a row got from one pass of the target",
    "gap": "between tokens; those of one round come together, 0 ms apart",
    "GB/s": "bytes of weights read, inside the forwards",
    "Gop, GB": "operations, and bytes of weights read, a new token, the prompt left out",
    "MB": "peak above what was in use",
    "repeats, copies": "share of the text's 8-grams that stood in it before, that stand in the prompt",
    "oracle": "tokens a round of a draft that knows from where to copy, up to 16 a round",
}


def show(document: dict[str, Any], file: Any = None) -> None:
    """Print the summary of ``document`` as a table, and what is to be said beside it."""
    file = file or sys.stdout
    console = Console(file=file, highlight=False)
    console.width = max(console.width, WIDE)
    summary = document["summary"]
    shown = [name for name, cell in COLUMNS.items() if any(cell(f) for k in summary.values() for f in k.values())]
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for kind, contestants in summary.items():
        table.add_row(f"[bold]{kind}[/bold] ({contestants['plain']['batches']} batches)")
        for name, figures in contestants.items():
            table.add_row(f"  {name}", *(COLUMNS[column](figures) for column in shown))
        table.add_section()
    console.print(table)
    for name, meaning in LEGEND.items():
        console.print(f"  {name:15} {meaning}", style="dim")
    if "J/token" not in shown:
        console.print("Energy is not readable here.", style="dim")
    for name, reason in document["skipped"].items():
        console.print(f"{name} did not take part: {reason}", markup=False)
    for kind, contestants in summary.items():
        for name, figures in contestants.items():
            for found in figures["divergences"] if kind != "all" else []:
                console.print(
                    f"{kind}, batch {found['batch']}, row {found['row']}: {name} parts from plain at new token "
                    f"{found['token']}, where the target's two best scores are {found['gap']} apart",
                    markup=False,
                )
