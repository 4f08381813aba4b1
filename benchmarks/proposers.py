"""What a draft without a model costs: microseconds of the host for each proposed token.

    python benchmarks/proposers.py [--rounds 200] [--guesses 8] [--vocabulary 32000] [--lengths 256 1024 4096]

No target runs. Rows are the words of this project's own documents and source, numbered; every round commits
four of them and asks for guesses. For each proposer, batch size and length of text:

- text: reading the text the first time, a token of it (once a call);
- round: `propose` in the rounds that follow, a row;
- token: the same, a proposed token;
- observe: what it does with a round's scores, a row (Recycling only; an argmax over the vocabulary).
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from specdec import Fallback, NGram, Recycling, Store, Suffix
from specdec.processing import Processing
from specdec.proposers import Call
from specdec.proposers.prediction import Prediction
from specdec.records import Proposal, Round
from specdec.sampling import Greedy
from specdec.state import State

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = 4  # tokens a row and round


def words(vocabulary: int) -> np.ndarray:
    files = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.py")])
    numbers: dict[str, int] = {}
    found = re.findall(r"\w+|[^\w\s]|\n", "\n".join(file.read_text() for file in files))
    return np.array([numbers.setdefault(word, len(numbers) + 1) % vocabulary for word in found])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--guesses", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    options = parser.parse_args(arguments)
    text = words(options.vocabulary)
    print(f"{'proposer':20s} {'batch':>5s} {'length':>6s} {'text':>8s} {'round':>8s} {'token':>8s} {'observe':>8s}")
    for batch in (1, 8):
        for length in options.lengths:
            for name in ("ngram", "suffix", "suffix, store", "recycling", "prediction"):
                measure(name, text, batch, length, options)


def proposer(name: str, text: np.ndarray, expected: list[Any]) -> Any:
    if name == "suffix, store":
        store = Store()
        for start in range(0, 40000, 1000):
            store.add("me", text[start : start + 1000])
        return Suffix(store=store, tenant="me")
    makers = {
        "ngram": NGram,
        "suffix": Suffix,
        "recycling": Recycling,
        "prediction": lambda: Fallback(Prediction(expected), NGram()),
    }
    return makers[name]()


def measure(name: str, text: np.ndarray, batch: int, length: int, options: argparse.Namespace) -> None:
    new = options.rounds * COMMITTED
    rows = np.stack([np.roll(text, -7919 * row)[: length + new + 1] for row in range(batch)])
    state = State(
        torch.from_numpy(rows[:, :length].copy()), max_length=length + new + 1, max_guesses=options.guesses,
        eos_ids=None, pad_id=0, starts=np.zeros(batch, dtype=np.int64),
    )  # fmt: skip
    state.vocabulary = options.vocabulary
    prompt = state.tokens[:, :length]
    # every twentieth token of the prediction is wrong
    expected = [np.where(np.arange(new) % 20 == 19, 0, row[length : length + new]) for row in rows]
    drafts = proposer(name, text, expected)
    target = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False))
    if hasattr(drafts, "begin"):
        drafts = drafts.begin(Call(target, prompt, {}, state.max_length, Processing([]), Greedy()))
    observes = hasattr(drafts, "observe") and name == "recycling"
    scores = torch.zeros(batch, options.guesses + 1, options.vocabulary)
    limits = np.full(batch, options.guesses)
    first = spent = observed = 0.0
    proposed = 0
    proposal = Proposal.empty(batch, state.device)
    for number in range(options.rounds):
        if observes:
            width = proposal.tokens.shape[1] + 1
            after = rows[:, length + number * COMMITTED : length + number * COMMITTED + width]
            here = scores[:, : after.shape[1]].zero_()
            here.scatter_(-1, torch.from_numpy(after.copy())[..., None], 1.0)
            kept = np.minimum(proposal.lengths, COMMITTED - 1)
            none = np.zeros((batch, 0), dtype=np.int64)
            round_ = Round(proposal, none, proposal.lengths, kept, none, kept + 1, state.lengths, here)
            start = time.perf_counter()
            drafts.observe(round_)
            observed += time.perf_counter() - start
        start = time.perf_counter()
        proposal = drafts.propose(state, limits)
        seconds = time.perf_counter() - start
        if number == 0:
            first = seconds
        else:
            spent += seconds
            proposed += int(proposal.lengths.sum())
        done = slice(length + number * COMMITTED, length + (number + 1) * COMMITTED)
        state.host_tokens[:, done] = rows[:, done]
        state.tokens[:, done] = torch.from_numpy(rows[:, done])
        state.lengths = state.lengths + COMMITTED
    rounds = (options.rounds - 1) * batch
    values = (first / (batch * length), spent / rounds, spent / max(proposed, 1), observed / rounds)
    shown = " ".join(f"{value * 1e6:8.1f}" for value in values)
    print(f"{name:20s} {batch:5d} {length:6d} {shown}", flush=True)


if __name__ == "__main__":
    main()
