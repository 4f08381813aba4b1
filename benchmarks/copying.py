"""Texts that repeat their prompt: edits, summaries and questions, with the drafts that need no model.

    python benchmarks/copying.py TARGET [--tasks edit summary qa] [--new 128] [--guesses 8] [--dtype float32]

One row, greedy. Plain `generate()` and every draft write every text, in turns; ratios are seconds of plain over
seconds of the contestant, per kind of task the sum over its tasks. A short call before the clock starts takes
the self-check, so it is not in the numbers. The last row is no contestant but a ceiling: guesses that copy from
the text so far as long as the copy is right, chosen with foreknowledge of plain's text.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import SpeculativeGenerator

ORDERS = """import csv
from dataclasses import dataclass


@dataclass
class Order:
    '''One line of the order file.'''

    number: int
    customer: str
    total: float
    paid: bool = False


def read_orders(path):
    '''Read all orders from a CSV file with a header line.'''
    orders = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            order = Order(
                number=int(row["number"]),
                customer=row["customer"].strip(),
                total=float(row["total"]),
                paid=row["paid"] == "yes",
            )
            orders.append(order)
    return orders


def unpaid(orders):
    '''The orders that are still open.'''
    return [order for order in orders if not order.paid]


def total_by_customer(orders):
    '''Sum of totals for each customer.'''
    sums = {}
    for order in orders:
        sums[order.customer] = sums.get(order.customer, 0.0) + order.total
    return sums
"""
STACK = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def peek(self):
        if not self.items:
            raise IndexError("peek at an empty stack")
        return self.items[-1]

    def is_empty(self):
        return len(self.items) == 0

    def size(self):
        return len(self.items)
"""
LIBRARY = (
    "The Library of the Harbour Town opened in 1911 as a reading room for sailors. It held four hundred "
    "books, most of them given by a retired captain, and it was open in the evenings only. In 1934 the town "
    "council took it over, moved it into the old customs house, and hired the first librarian, who stayed for "
    "thirty-one years. Under her the collection grew to twenty thousand volumes and lending to children was "
    "allowed for the first time. A flood in 1962 destroyed about a third of the books; fishermen carried the "
    "rest to the church in their boats. The rebuilt library opened in 1965 with a map room that is still used "
    "by researchers of coastal history. Since 2008 the catalogue has been online, and since 2016 the reading "
    "room has been open on Sundays again, as it was for the sailors."
)
NOTES = (
    "Meeting notes, 12 March. Present: Ines, Tomas, Priya, Dan. (1) The release of version 2.4 moves from 20 "
    "March to 3 April, because the migration of the billing tables takes longer than planned. Tomas will "
    "write to all customers by Friday. (2) The search page is slow for accounts with more than ten thousand "
    "documents. Priya found that an index on the owner column is missing; she adds it this week and measures "
    "again. (3) Dan proposes to drop support for the old mobile client. Ines wants the usage numbers first. "
    "Dan brings them to the next meeting. (4) The office is closed on 29 March. Next meeting: 26 March, "
    "10:00."
)


def fenced(code: str) -> str:
    return f"```python\n{code}```"


# kind, question, what the answer will probably be
TASKS: list[tuple[str, str, str | None]] = [
    (
        "edit",
        "Rename the field `customer` to `client` everywhere in this code, and the function total_by_customer to "
        "total_by_client. Return only the complete new code.\n\n" + fenced(ORDERS),
        fenced(ORDERS),
    ),
    (
        "edit",
        "Add type hints to all methods of this class. Return only the complete new code.\n\n" + fenced(STACK),
        fenced(STACK),
    ),
    ("summary", "Summarise this text in four sentences.\n\n" + LIBRARY, None),
    (
        "summary",
        "List all tasks with the person who does them and the date, one a line.\n\n" + NOTES,
        None,
    ),
    (
        "qa",
        "When and why was the library rebuilt, and what happened to the books? Quote the sentences of the text "
        "that say so.\n\n" + LIBRARY,
        None,
    ),
    (
        "qa",
        "Who must do what about the search page, and why? Answer with a quotation from the notes, then explain.\n\n"
        + NOTES,
        None,
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--tasks", nargs="+", default=["edit", "summary", "qa"])
    parser.add_argument("--each", type=int, default=2, help="tasks of a kind")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--guesses", type=int, default=8)
    parser.add_argument("--drafts", nargs="+", default=["ngram", "suffix", "recycling"])
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=getattr(torch, arguments.dtype))
    options = {"max_new_tokens": arguments.new, "do_sample": False, "repetition_penalty": 1.0}
    gens = {
        draft: SpeculativeGenerator(target, draft, num_draft_tokens=arguments.guesses, tokenizer=tokenizer)
        for draft in arguments.drafts
    }
    warm = tokenizer("one two three one two", return_tensors="pt")
    for gen in gens.values():
        gen.generate(**warm, max_new_tokens=4, do_sample=False)
    names = ["plain", *gens, *(["prediction, suffix"] if "suffix" in gens else [])]
    totals: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for kind in arguments.tasks:
        for number, (_, question, guess) in enumerate([t for t in TASKS if t[0] == kind][: arguments.each]):
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True, return_tensors="pt", return_dict=True,
            )  # fmt: skip
            turn = number % len(names)
            texts: dict[str, Any] = {}
            for name in names[turn:] + names[:turn]:
                if guess is None and name.startswith("prediction"):
                    continue
                start = time.perf_counter()
                if name == "plain":
                    texts[name] = target.generate(**inputs, **options)
                else:
                    gen = gens[name.split(", ")[-1]]
                    given = {"prediction": guess} if name.startswith("prediction") else {}
                    texts[name] = gen.generate(**inputs, **options, **given)
                count = totals[kind, name]
                count["seconds"] += time.perf_counter() - start
                if name != "plain":
                    stats = gen.stats
                    for field in ("rounds", "drafted", "accepted", "emitted"):
                        count[field] += getattr(stats, field)
            prompt = inputs["input_ids"].shape[1]
            for name, text in texts.items():
                if not torch.equal(text, texts["plain"]):
                    print(f"{kind} {number}: the text of {name} differs from plain")
            ceiling = totals[kind, "ceiling"]
            emitted = texts["plain"].shape[1] - prompt
            ceiling["emitted"] += emitted
            ceiling["rounds"] += best_copies(texts["plain"][0].tolist(), prompt, arguments.guesses)
            ceiling["drafted"] = ceiling["accepted"] = 1
    report(totals, arguments)


def best_copies(text: list[int], prompt: int, guesses: int) -> int:
    """Rounds, the prefill included, if each guessed the longest right copy from the text before it."""
    done, rounds = prompt + 1, 1
    while done < len(text):
        rest = min(guesses, len(text) - done - 1)
        best = 0
        for start in range(done):
            length = 0
            while length < rest and text[start + length] == text[done + length]:
                length += 1
            best = max(best, length)
        done, rounds = done + best + 1, rounds + 1
    return rounds


def report(totals: dict[tuple[str, str], dict[str, float]], arguments: argparse.Namespace) -> None:
    print(f"{arguments}\n{'task':9s} {'contestant':20s} {'x plain':>8s} {'accepted':>9s} {'tokens a round':>15s}")
    for (kind, name), count in totals.items():
        ratio = totals[kind, "plain"]["seconds"] / count["seconds"] if count["seconds"] else 0.0
        accepted = count["accepted"] / count["drafted"] if count["drafted"] else 0.0
        per_round = count["emitted"] / count["rounds"] if count["rounds"] else 1.0
        shown = f"{ratio:8.2f}" if ratio else " " * 8
        print(f"{kind:9s} {name:20s} {shown} {accepted:9.2f} {per_round:15.2f}")
    print({"torch": torch.__version__, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
