"""Two pictures: speed by class, and the cost of a pass against its width."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Write the pictures that ``document`` has figures for; returns their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = [speeds(document, folder / "speed.png")]
    if "target" in document["cost_curve"]:
        written.append(costs(document, folder / "cost.png"))
    return written


def speeds(document: dict[str, Any], path: Path) -> Path:
    """Bars: ratio to plain, a group for each class, lines from the lowest to the highest ratio."""
    from matplotlib import pyplot

    summary = document["summary"]
    names = list(dict.fromkeys(name for kind in summary.values() for name in kind if name != "plain"))
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.6 * len(summary)), 4.5), layout="constrained")
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        kinds = [number for number, kind in enumerate(summary.values()) if name in kind]
        ratios = [kind[name]["ratio"] for kind in summary.values() if name in kind]
        medians = [ratio["median"] for ratio in ratios]
        errors = [
            [ratio["median"] - ratio["low"] for ratio in ratios],
            [ratio["high"] - ratio["median"] for ratio in ratios],
        ]
        centres = [number - 0.4 + width * (place + 0.5) for number in kinds]
        axes.bar(centres, medians, width, yerr=errors, label=name, error_kw={"linewidth": 0.8})
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(summary)), list(summary), rotation=20)
    axes.set_ylabel("speed, plain generate() = 1")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def costs(document: dict[str, Any], path: Path) -> Path:
    """Line: seconds of a target pass over its one-token pass, against tokens a row."""
    from matplotlib import pyplot

    curve = {int(width): seconds for width, seconds in document["cost_curve"]["target"].items()}
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(list(curve), [seconds / curve[1] for seconds in curve.values()], marker="o")
    axes.set_xlabel("tokens a row")
    axes.set_ylabel(f"seconds, one token ({1000 * curve[1]:.0f} ms) = 1")
    axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
