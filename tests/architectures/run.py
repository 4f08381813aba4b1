"""Compare with plain ``generate()`` on every architecture of transformers: ``make architectures``.

    python tests/architectures/run.py [--only REGEX] [--jobs 2] [--timeout 120] [--out FILE.json]

One forked child a case, one thread each, so that a crash or a hang costs one row. Prints a line a case, then the
cases that could not be built with the reason, those that differ, and the counts; exit code 1 if one that was
built is not exact. Read next: ``identity.py``.
"""

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from architectures import build
from architectures.build import Case
from architectures.identity import WIDTHS, examine

Row = dict[str, Any]
DULL = 3  # a text of fewer different tokens shows little


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression on group/model_type")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="children at a time")
    parser.add_argument("--timeout", type=float, default=120, help="seconds a case")
    parser.add_argument("--out", type=Path, help="write all rows here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    chosen = [case for case in build.cases() if re.search(options.only, str(case))]
    print(f"{len(chosen)} cases, {options.jobs} at a time", flush=True)
    rows = []
    for row in examined(chosen, options.jobs, options.timeout):
        rows.append(row)
        print(f"{len(rows):4d}/{len(chosen)}  {line(row)}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return report(rows)


def examined(chosen: list[Case], jobs: int, timeout: float) -> Iterator[Row]:
    """Rows as they are finished."""
    fork = get_context("fork")
    waiting, running = list(reversed(chosen)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop()
            ours, theirs = fork.Pipe(duplex=False)
            child = fork.Process(target=answer, args=(theirs, case), daemon=True)
            child.start()
            theirs.close()
            running[ours] = case, child, time.monotonic()
        ready = wait(list(running), timeout=0.5)
        for ours, (case, child, started) in list(running.items()):
            late = time.monotonic() - started > timeout
            if ours not in ready and not late:
                continue
            row: Row = {"case": str(case), "built": False, "reason": f"no answer in {timeout:.0f} s"}
            if ours in ready:
                try:
                    row = ours.recv()
                except EOFError:
                    child.join()
                    row["reason"] = f"the process died, exit code {child.exitcode}"
            else:
                child.kill()
            child.join()
            ours.close()
            del running[ours]
            yield row


def answer(pipe: Connection, case: Case) -> None:
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        pipe.send(examine(case))  # models print; the report is ours


def right(row: Row) -> bool:
    """The same text at every batch size, and every config as it was."""
    found = [row[batch] for batch in WIDTHS]
    return row["configs unchanged"] and all(f["exact"] and f["draft unchanged"] for f in found)


def line(row: Row) -> str:
    if not row["built"]:
        return f"{row['case']:40} not built: {row['reason']}"
    cells = [f"batch {batch}: {cell(row[batch])}" for batch in WIDTHS]
    notes = [] if row["configs unchanged"] else ["CONFIG CHANGED"]
    return f"{row['case']:40} {'   '.join(cells + notes)}   {row['seconds']} s"


def cell(found: Row) -> str:
    if "error" in found:
        return f"ERROR {found['error']}"
    if not found["exact"]:
        return f"DIFFERS {found['parting']} ({found['layout']})"
    return f"exact, {found['rounds']:2d} rounds, {found['layout']}"


def report(rows: list[Row]) -> int:
    """Print the counts; the exit code."""
    built = [row for row in rows if row["built"]]
    missing = [row for row in rows if not row["built"]]
    wrong = [r for r in built if not right(r)]
    if missing:
        print("\nnot built:", *(f"{row['case']}: {row['reason']}" for row in missing), sep="\n  ")
    slow = [f"{r['case']}: {r['1']['layout']}" for r in built if r not in wrong and not r["1"]["speculates"]]
    if slow:
        print("\nexact, but one token a round:", *slow, sep="\n  ")
    dull = [f"{r['case']}: {r['varied']}" for r in built if r["varied"] < DULL]
    if dull:
        print("\ncompared, but the text has few different tokens (a weak test):", *dull, sep="\n  ")
    if wrong:
        print("\nnot exact:", *(line(row) for row in wrong), sep="\n  ")
    for batch in WIDTHS:
        layouts = Counter(row[batch].get("layout", "error") for row in built)
        print(f"\nbatch {batch}: " + ", ".join(f"{name} {count}" for name, count in layouts.most_common()))
    exact = {batch: sum(row[batch]["exact"] for row in built) for batch in WIDTHS}
    ahead = [sum(row[batch].get("speculates", False) for row in built) for batch in WIDTHS]
    print(
        f"{len(built)} of {len(rows)} architectures built, {exact['1']} exact at batch 1, "
        f"{exact['3']} exact at batch 3, {ahead[0]} / {ahead[1]} really speculating"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
