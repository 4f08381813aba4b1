"""What ``python -m specdec.demo`` does and prints.

Plain ``model.generate()``, transformers' own assisted decoding and ``SpeculativeGenerator`` answer
the same prompts greedily, one by one; then all prompts go through as one batch. On a CPU ours goes once
more with packed weights. The times are those of one run each, after a short warm-up: an impression, no
benchmark. Read next: ``model.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.demo.contestants import Contest, Run
from specdec.demo.model import demo_model
from specdec.errors import UnsupportedModel

CODE = """\
Add type hints to this code:

```python
def running_mean(values, window):
    total = sum(values[:window])
    means = [total / window]
    for i in range(window, len(values)):
        total += values[i] - values[i - window]
        means.append(total / window)
    return means
```"""

PASSAGE = """\
Make the following text a bullet list:

The octopus has three hearts. Two of them pump blood through the gills, and the third sends it \
around the body. Its blood is blue because it carries oxygen with copper instead of iron, which \
works better in cold water with little oxygen. When an octopus swims, the third heart stops \
beating, which is why it prefers to crawl."""

CHAT = "Why is the sky blue? Explain it to a ten-year-old."

PROMPTS = {
    "Editing code (much of the answer stands in the prompt)": CODE,
    "Rewriting a passage (nearly all of it does)": PASSAGE,
    "Plain chat (little to copy)": CHAT,
}

HEAD = f"  {'':24}{'seconds':>8}{'tokens/s':>10}{'speed':>8}{'accepted':>10}{'per round':>11}   same"

LEGEND = """
  speed      plain's seconds / these seconds
  accepted   guesses kept / guesses made
  per round  new tokens that a row got from one pass of the model
  same       token for token as plain generate()

  One run each after a short warm-up: an impression, no benchmark."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m specdec.demo",
        description="One model, real prompts, three ways to generate, one text.",
    )
    parser.add_argument("--model", help="hub id or directory (default: SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--draft",
        default="ngram",
        help="hub id or directory of a draft model, or the name of a proposer (default: ngram)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=96, metavar="N")
    parser.add_argument(
        "--num-draft-tokens",
        type=lambda text: text if text == "auto" else int(text),
        default="auto",
        metavar="K",
        help='guesses a round (default: "auto", measured; assisted decoding then takes 5)',
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="default: float32; in half precision a near-tie may fall either way",
    )
    options = parser.parse_args(arguments)
    if not _is_model(options.draft):
        from specdec.construction import NAMES

        if options.draft not in NAMES:
            parser.error(f"--draft {options.draft}: use {', '.join(NAMES)}, a hub id or a directory")
    return options


def _is_model(draft: str) -> bool:
    return "/" in draft or Path(draft).is_dir()


def load(options: argparse.Namespace) -> tuple[Contest, Any]:
    """Fetch and load what the options name: the models and the target's tokenizer."""
    import transformers

    from specdec import SpeculativeGenerator

    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()

    def load_model(name: str | Path) -> Any:
        print(f"Loading {Path(name).name} ({options.dtype}, {options.device}) ...", flush=True)
        dtype = getattr(torch, options.dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return model.to(options.device).eval()

    name = options.model or demo_model(lambda line: print(line, flush=True))
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    target, draft = load_model(name), options.draft
    guesses = 5 if options.num_draft_tokens == "auto" else options.num_draft_tokens
    if _is_model(draft):
        draft = load_model(draft)
        draft.generation_config.num_assistant_tokens = guesses
        draft.generation_config.num_assistant_tokens_schedule = "constant"
    generator = SpeculativeGenerator(target, draft, num_draft_tokens=options.num_draft_tokens)
    return Contest(target, draft, generator, guesses), tokenizer


def compare(contest: Contest, inputs: Mapping[str, Tensor], **options: Any) -> tuple[Run, bool]:
    """Run all on ``inputs`` and print a line as each ends.

    Returns:
        plain's run, and whether ours wrote the same tokens.
    """
    print(HEAD)
    plain = contest.plain(inputs, **options)
    print(line("plain generate()", plain, plain, "-"), flush=True)
    try:
        assisted = contest.assisted(inputs, **options)
        print(line("transformers, assisted", assisted, plain, verdict(contest, assisted, plain, inputs)))
    except ValueError as error:
        batch = len(inputs["input_ids"]) > 1
        reason = "refuses batches" if batch else textwrap.shorten(str(error), 60)
        print(f"  {'transformers, assisted':26}{reason}")
    sys.stdout.flush()
    ours = contest.speculative(inputs, **options)
    same = verdict(contest, ours, plain, inputs)
    print(line("specdec", ours, plain, same), flush=True)
    if contest.target.device.type == "cpu":
        try:
            packed = contest.packed(inputs, **options)
            print(
                line("specdec, packed weights", packed, plain, verdict(contest, packed, plain, inputs)), flush=True
            )
        except UnsupportedModel as error:
            print(f"  {'specdec, packed weights':26}{textwrap.shorten(str(error), 60)}", flush=True)
    return plain, same == "yes"


def line(name: str, run: Run, plain: Run, same: str) -> str:
    """One line of the table."""
    accepted = "-" if run.acceptance is None else f"{run.acceptance:.0%}"
    speed = f"{plain.seconds / run.seconds:.2f}x"
    times = f"{run.seconds:8.2f}{run.emitted / run.seconds:10.1f}{speed:>8}"
    return f"  {name:24}{times}{accepted:>10}{run.per_round:11.2f}   {same}"


def verdict(contest: Contest, run: Run, plain: Run, inputs: Mapping[str, Tensor]) -> str:
    """``yes``, or where the two part."""
    parting = contest.parting(run, plain, inputs)
    if parting is None:
        return "yes"
    row, column, distance = parting
    return f"NO: row {row}, column {column}, best two scores {distance:.2g} apart"


def heading(text: str) -> None:
    """Print ``text`` apart from what came before, bold where a person reads along."""
    bold = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"\n\033[1m{text}\033[0m\n" if bold else f"\n{text}\n{'-' * len(text)}\n")


def show(text: str, mark: str) -> None:
    """Print ``text`` behind ``mark``, long lines folded."""
    for part in text.strip().splitlines():
        folded = textwrap.fill(part, 96, initial_indent=mark, subsequent_indent=mark)
        print(folded or mark.rstrip())


def main(arguments: list[str] | None = None) -> int:
    """Run the demo.

    Returns:
        0; 1 where ours wrote other tokens than plain ``generate()``; 2 where it cannot start.
    """
    chosen = parse(arguments)
    try:
        contest, tokenizer = load(chosen)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"The demo cannot start: {error}", file=sys.stderr)
        return 2

    def encode(*prompts: str) -> Mapping[str, Tensor]:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        encoded: Mapping[str, Tensor] = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(chosen.device)
        return encoded

    options = {"max_new_tokens": chosen.max_new_tokens, "do_sample": False}
    print("Warming up ...", flush=True)
    for generate in (contest.plain, contest.assisted, contest.speculative):
        generate(encode(CHAT), max_new_tokens=8, do_sample=False)
    contest.speculative(encode(*PROMPTS.values()), max_new_tokens=8, do_sample=False)

    same = []
    for title, prompt in PROMPTS.items():
        heading(title)
        show(prompt, "  > ")
        print()
        inputs = encode(prompt)
        plain, equal = compare(contest, inputs, **options)
        same.append(equal)
        print()
        written = plain.sequences[0, inputs["input_ids"].shape[1] :]
        show(tokenizer.decode(written, skip_special_tokens=True), "  | ")
    heading(f"All {len(PROMPTS)} prompts as one left-padded batch")
    print("  A batch lasts as long as its slowest row.\n")
    same.append(compare(contest, encode(*PROMPTS.values()), **options)[1])
    print(LEGEND)
    if not all(same):
        print("\nspecdec did not write the tokens of plain generate(). Half precision can do that to")
        print("a near-tie; in float32 it should not be: please report it.", flush=True)
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
