"""Plays the attacker: which prompt was asked, told from the number and the times of packets alone?

    python benchmarks/attacker.py record TARGET --draft suffix --out suffix.json    # again, until it says complete
    python benchmarks/attacker.py classify suffix.json

``record`` streams texts of a few prompts, each several times with other seeds, and notes when how many tokens came.
All texts have the same number of tokens, so that their length tells nothing. What is recorded stays; a run that was
cut off is continued. ``classify`` learns the traces of half of the samples and names the prompts of the others, then
the other way round, once by the tokens a round brought, once by the times as well, and once with the same records let
out by ``ShapedRelease`` (on a virtual clock, by the library's own code). ``--live N`` of ``record`` also notes real
times of N samples a prompt that were let out while the model ran.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specdec import ShapedRelease, SpeculativeGenerator, Tokens
from specdec.shaping import on_a_clock

PAYLOAD = 4  # bytes of a token


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
    classify.add_argument("--speed", type=float, default=1.0, help="interval over that of plain decoding")
    options = parser.parse_args(arguments)
    return write(options) if options.command == "record" else read(options)


# --- recording ------------------------------------------------------------------------------------


def write(options: argparse.Namespace) -> int:
    import torch
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
            release = ShapedRelease(4, options.interval, 3 + 4 * PAYLOAD)
        seed = 1000 * prompt + sample
        length = {"max_new_tokens": options.new, "min_new_tokens": options.new}
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
        times, sizes = [], []
        start = time.perf_counter()
        for packet in gen.stream(**inputs, **length, **sampling, seed=seed, release=release):
            times.append(round(time.perf_counter() - start, 5))
            sizes.append(len(packet.ids) if isinstance(packet, Tokens) else len(packet.payload))
        found["traces"].append({"prompt": prompt, "sample": sample, "kind": kind, "times": times, "sizes": sizes})
        assert release is not None or sum(sizes) == options.new
    options.out.write_text(json.dumps(found))
    missing = len(wanted) - len(found["traces"])
    print(
        f"{len(found['traces'])} traces of {len(prompts)} prompts, "
        + (f"{missing} missing" if missing else "complete")
    )
    torch.manual_seed(0)
    return 0


def read(o):
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
