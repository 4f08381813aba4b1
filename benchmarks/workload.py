"""What is asked: the prompts of ``prompts/``, one file a class, as batches of tokens.

Knows no model. A file has a line ``about`` and a list of prompts; a prompt is a ``text``, or an ``instruction``
with a ``passage`` (a text to work on) or with a ``file`` and its ``language`` (code to be changed; the file as it
was is then the prediction of the answer). Read next: ``contestants.py``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "prompts"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked, and the answer that may be expected to be much like it, if there is one."""

    text: str
    prediction: str | None = None


def classes() -> list[str]:
    """Names of the classes: the files of ``prompts/``."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def prompts_of(name: str, count: int | None = None) -> list[Prompt]:
    """The first ``count`` prompts of a class, or all."""
    path = FOLDER / f"{name}.toml"
    if not path.exists():
        raise ValueError(f"there is no class {name!r} of prompts; there are {', '.join(classes())}")
    entries = tomllib.loads(path.read_text())["prompt"]
    return [composed(entry) for entry in entries[:count]]


def composed(entry: dict[str, str]) -> Prompt:
    """One prompt of a file."""
    if "text" in entry:
        return Prompt(entry["text"].strip())
    if "passage" in entry:
        return Prompt(f"{entry['instruction']}\n\n{entry['passage'].strip()}")
    block = f"```{entry['language']}\n{entry['file'].strip()}\n```"
    return Prompt(f"{entry['instruction']} Answer with the whole file in one code block.\n\n{block}", block)


def behind(context: int, prompts: Sequence[Prompt], tokenizer: Any) -> list[Prompt]:
    """``prompts`` behind ``context`` tokens of other text: the prompts of all classes, over and over, as notes."""
    asked = {prompt.text for prompt in prompts}
    others = [prompt.text for name in classes() for prompt in prompts_of(name) if prompt.text not in asked]
    text, ids = "\n\n".join(others), []
    while len(ids) < context:
        ids += tokenizer(f"{text}\n\n", add_special_tokens=False)["input_ids"]
    notes = tokenizer.decode(ids[:context])
    return [
        Prompt(f"Notes, which do not matter here:\n\n{notes}\n\nAnd now: {prompt.text}", prompt.prediction)
        for prompt in prompts
    ]


def batches(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    """Full batches of ``size``; the last one is filled up from the start, so that every batch costs the same."""
    count = -(-len(prompts) // size)
    endless = cycle(prompts)
    return [list(islice(endless, size)) for _ in range(count)]


def encode(tokenizer: Any, batch: Sequence[Prompt], device: Any) -> dict[str, Any]:
    """Ids (B, P) and attention mask (B, P), padded on the left; in the model's chat template if it has one."""
    texts = [prompt.text for prompt in batch]
    special = tokenizer.chat_template is None  # a template writes the special tokens itself
    if not special:
        chats = [[{"role": "user", "content": text}] for text in texts]
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    encoded = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=special)
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
