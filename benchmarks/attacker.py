"""Plays the attacker: which prompt was asked, told from the number and the times of packets alone?

    python benchmarks/attacker.py record TARGET --draft suffix --out suffix.json    # again, until it says complete
    python benchmarks/attacker.py classify suffix.json

``record`` streams texts of a few prompts, each several times with other seeds, and notes when how many tokens came.
All texts have the same number of tokens, so that their length tells nothing. What is recorded stays; a run that was
cut off is continued. ``--live N`` also notes the real times of N texts a prompt that ``ShapedRelease`` let out
while the model ran.

``classify`` learns the traces of half of the samples and names the prompts of the others, then the other way round:
by the tokens of each round, by their times, and by what is seen when the same records leave through
``ShapedRelease``, by the library's own code on a virtual clock. Times count from a trace's first packet: how long a
prompt took to be read is not what is asked here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specdec import ShapedRelease, SpeculativeGenerator, Tokens, unpad
from specdec.shaping import HEADER, ID, on_a_clock

SAMPLES = 200  # points at which a trace is looked at


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record")
    record.add_argument("target")
    record.add_argument("--draft", default="suffix", help="a word: suffix, ngram, self-int8 ...")
    record.add_argument("--out", type=Path, required=True)
    record.add_argument("--classes", default="chat,code,code_editing,structured")
    record.add_argument("--prompts", type=int, default=4, help="prompts of each class")
    record.add_argument("--samples", type=int, default=6, help="texts of each prompt")
    record.add_argument("--live", type=int, default=0, help="texts of each prompt let out on the real clock")
    record.add_argument("--interval", type=float, default=0.0, help="of the live ones, seconds")
    record.add_argument("--new", type=int, default=64, help="tokens of each text; ends are ignored")
    record.add_argument("--temperature", type=float, default=0.3)
    record.add_argument("--k", type=int, default=4, help="guesses a round")
    record.add_argument("--dtype", default="bfloat16")
    record.add_argument("--seconds", type=float, default=200, help="stop after so many, to be continued")
    classify = commands.add_parser("classify")
    classify.add_argument("traces", type=Path)
    classify.add_argument("--tokens-per-chunk", type=int, default=4)
    classify.add_argument("--bucket", type=int, default=4)
    options = parser.parse_args(arguments)
    return write(options) if options.command == "record" else read(options)


# --- recording ------------------------------------------------------------------------------------


def write(options: argparse.Namespace) -> int:
    from models import load
    from workload import encode, prompts_of

    began = time.monotonic()
    settings = ("target", "draft", "classes", "prompts", "new", "temperature", "k")
    asked = {name: getattr(options, name) for name in settings if name != "target"}
    found = json.loads(options.out.read_text()) if options.out.exists() else {"asked": asked, "traces": []}
    if found["asked"] != asked:
        raise SystemExit(f"{options.out} was recorded with {found['asked']}; give the same, or another file")
    word, options.draft, options.noise, options.device = options.draft, None, False, "cpu"
    pair = load(options)
    gen = SpeculativeGenerator(pair.target, word, num_draft_tokens=options.k)
    prompts = [p for name in options.classes.split(",") for p in prompts_of(name, options.prompts)]
    done = {(trace["prompt"], trace["sample"], trace["kind"]) for trace in found["traces"]}
    kinds = [("rounds", n) for n in range(options.samples)] + [("live", n) for n in range(options.live)]
    wanted = [(p, n, kind) for kind, n in kinds for p in range(len(prompts))]
    if not done:  # the self-check belongs to no trace
        gen.generate(**encode(pair.tokenizer, prompts[:1], "cpu"), max_new_tokens=4, do_sample=False)
    for prompt, sample, kind in [key for key in wanted if key not in done]:
        if time.monotonic() - began > options.seconds:
            break
        inputs = encode(pair.tokenizer, [prompts[prompt]], "cpu")
        release = None
        if kind == "live":
            release = ShapedRelease(4, options.interval, HEADER.size + 4 * ID.size)
        seed = 1000 * prompt + sample
        length = {"max_new_tokens": options.new, "min_new_tokens": options.new}
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
        times, sizes = [], []
        start = time.perf_counter()
        for packet in gen.stream(**inputs, **length, **sampling, seed=seed, release=release):
            times.append(round(time.perf_counter() - start, 5))
            sizes.append(len(packet.ids) if isinstance(packet, Tokens) else len(packet.payload))
        found["traces"].append({"prompt": prompt, "sample": sample, "kind": kind, "times": times, "sizes": sizes})
    options.out.write_text(json.dumps(found))
    missing = len(wanted) - len(found["traces"])
    print(
        f"{len(found['traces'])} traces of {len(prompts)} prompts, "
        + (f"{missing} missing" if missing else "complete")
    )
    return 0


# --- what an attacker sees ------------------------------------------------------------------------


def read(options: argparse.Namespace) -> int:
    found = json.loads(options.traces.read_text())
    kinds = {kind: [t for t in found["traces"] if t["kind"] == kind] for kind in ("rounds", "live")}
    asked, out = found["asked"], []
    if rounds := kinds["rounds"]:
        gaps = np.concatenate([np.diff(trace["times"]) for trace in rounds])
        unit = float(np.median(gaps))
        print(f"{asked}; a round: median {unit:.3f} s, slowest {gaps.max() / unit:.2f} of it")
        pace = np.mean([(trace["times"][-1] - trace["times"][0]) / sum(trace["sizes"]) for trace in rounds]) / unit
        plain = {"pace": round(float(pace), 3), "later": 0.0, "bytes": 1.0}
        out += [{**attack("tokens of each round", rounds, counts), **plain}]
        out += [{**attack("times of the rounds", rounds, times), **plain}]
        for name, seconds in (
            ("slowest round", gaps.max()),
            ("median round", unit),
            ("half a median round", unit / 2),
        ):
            interval = options.tokens_per_chunk * float(seconds)
            for bucket in sorted({1, options.bucket}):
                title = f"released, {name}, bucket {bucket}"
                out.append(released(title, rounds, options.tokens_per_chunk, interval, bucket, unit))
    if live := kinds["live"]:
        print(f"{len(live)} traces with real times of the release")
        out += [attack("released live, number", live, counts), attack("released live, times", live, times)]
    print("pace: median rounds a token, to the last packet; later: than the token was made, in median rounds")
    print("| what is seen | right (k nearest, nearest mean) | 95 % | chance | pace | later | bytes |")
    print("|---|---|---|---|---|---|---|")
    for row in out:
        rates = ", ".join(f"{row[name]:.2f}" for name in ("neighbours", "centroid"))
        low, high = row["interval"]
        extra = " | ".join(f"{row[name]:.2f}" if name in row else "" for name in ("pace", "later", "bytes"))
        print(f"| {row['seen']} | {rates} | {low:.2f}-{high:.2f} | {row['chance']:.2f} | {extra} |")
    print(json.dumps({"asked": asked, "results": out}))
    return 0


def counts(trace: dict[str, Any]) -> np.ndarray:
    """(SAMPLES,) sizes of the packets, in order."""
    return np.array((trace["sizes"] + [0] * SAMPLES)[:SAMPLES], dtype=float)


def times(trace: dict[str, Any]) -> np.ndarray:
    """(SAMPLES + 1,) seconds between packets, in order, and how many there were."""
    gaps = np.diff(trace["times"])
    return np.append(np.resize(np.append(gaps, np.zeros(SAMPLES)), SAMPLES), 0.01 * len(gaps))


def released(
    name: str, rounds: list[dict[str, Any]], tokens: int, interval: float, bucket: int, unit: float
) -> dict[str, Any]:
    """The attack on ``rounds`` let out every ``interval`` seconds, and what that costs in times of ``unit``."""
    pad_to = HEADER.size + tokens * ID.size
    seen, paces, later, overhead = [], [], [], []
    for trace in rounds:
        chunks = replayed(trace, ShapedRelease(tokens, interval, pad_to, bucket))
        seen.append({**trace, **chunks})
        total = sum(trace["sizes"])
        came = np.repeat(trace["times"], trace["sizes"]) - trace["times"][0]
        paces.append(chunks["times"][-1] / total)
        later.append((np.repeat(chunks["times"], chunks["tokens"]) - came).mean())
        overhead.append(sum(chunks["sizes"]) / (total * ID.size))
    costs = {"pace": np.mean(paces) / unit, "later": np.mean(later) / unit, "bytes": np.mean(overhead)}
    both = attack(name, seen, lambda trace: np.concatenate([counts(trace), times(trace)]))
    return {
        **both,
        **{key: round(float(value), 4) for key, value in costs.items()},
        "interval_s": round(interval, 4),
    }


def replayed(trace: dict[str, Any], release: ShapedRelease) -> dict[str, Any]:
    """Times since the clock's start and sizes of the chunks that ``trace`` would have left in."""
    clock = Clock()
    release = ShapedRelease(
        release.tokens_per_chunk, release.interval, release.pad_to, release.bucket, clock=clock, sleep=clock.sleep
    )
    source = Recorded(clock, trace)
    found = [(clock() - source.began, chunk.payload) for chunk in on_a_clock(source, 1, None, release)]
    return {
        "times": [round(at, 9) for at, _ in found],
        "sizes": [len(payload) for _, payload in found],
        "tokens": [len(unpad(payload).ids or ()) for _, payload in found],
    }


class Clock:
    """Seconds that pass when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Recorded:
    """A trace as a source of records, at its own times after the first."""

    def __init__(self, clock: Clock, trace: dict[str, Any]) -> None:
        last = len(trace["sizes"]) - 1
        self.clock, self.began = clock, clock()
        self.records = [
            (at - trace["times"][0], Tokens(0, (0,) * size, (False,) * size, None, number == last))
            for number, (at, size) in enumerate(zip(trace["times"], trace["sizes"], strict=True))
        ]

    def start(self) -> None: ...

    def wait(self) -> None: ...

    def taken(self) -> list[Tokens]:
        came = [record for at, record in self.records if at <= self.clock() - self.began]
        self.records = self.records[len(came) :]
        return came

    def result(self) -> None: ...

    def close(self) -> None: ...


# --- classifiers ----------------------------------------------------------------------------------


def attack(name: str, traces: list[dict[str, Any]], look: Any) -> dict[str, Any]:
    """Learn one half of the samples, name the prompts of the other half; both ways round."""
    features = np.stack([look(trace) for trace in traces])
    prompt = np.array([trace["prompt"] for trace in traces])
    half = np.array([trace["sample"] % 2 for trace in traces])
    right = {"neighbours": 0, "centroid": 0}
    for learnt in (0, 1):
        known, asked = half == learnt, half != learnt
        for method, guess in (("neighbours", neighbours), ("centroid", centroid)):
            named = guess(features[known], prompt[known], features[asked])
            right[method] += int((named == prompt[asked]).sum())
    best = max(right.values())
    return {
        "seen": name,
        **{method: hits / len(traces) for method, hits in right.items()},
        "interval": wilson(best, len(traces)),
        "chance": 1 / len(set(prompt.tolist())),
        "traces": len(traces),
    }


def neighbours(known: np.ndarray, names: np.ndarray, asked: np.ndarray, k: int = 3) -> np.ndarray:
    """(M,) names of ``asked`` (M, F): the most frequent one among the ``k`` nearest of ``known`` (N, F)."""
    nearest = np.argsort(np.abs(asked[:, None] - known[None]).sum(axis=2), axis=1, kind="stable")[:, :k]
    votes = [np.bincount(names[row], weights=1 / np.arange(1, len(row) + 1)) for row in nearest]
    return np.array([int(vote.argmax()) for vote in votes])


def centroid(known: np.ndarray, names: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """(M,) names of ``asked`` (M, F): whose mean over ``known`` (N, F) is nearest."""
    classes = np.unique(names)
    means = np.stack([known[names == name].mean(axis=0) for name in classes])
    return classes[((asked[:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)]


def wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a rate."""
    rate, spread = hits / trials, z * z / trials
    middle = (rate + spread / 2) / (1 + spread)
    width = z / (1 + spread) * (rate * (1 - rate) / trials + spread / (4 * trials)) ** 0.5
    return max(middle - width, 0.0), min(middle + width, 1.0)


if __name__ == "__main__":
    raise SystemExit(main())
