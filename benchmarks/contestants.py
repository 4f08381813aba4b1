"""Who competes: plain ``generate()``, transformers' assisted decoding and prompt lookup, and ours.

All get the same options and inputs. What a contestant cannot do (batches, say) is its own error to raise.
Measures nothing. Read next: ``measure.py``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from models import Pair
from workload import Prompt

from specdec import Cascade, Mixture, SpeculativeGenerator

PLAIN = "plain"
LOOKUP_TOKENS = 10  # transformers has no default; its documentation uses 3 and 10


Call = Callable[[dict[str, Any], Sequence[Prompt], Any, int], Any]


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to generate.

    Args:
        name: as shown.
        call: (inputs, prompts, streamer, most new tokens) -> (B, L) ids.
        draft: the model that drafts, whose forwards are to be counted, or None.
        generator: ours, for its statistics; None for the others.
        predicts: it needs prompts that come with a prediction of the answer.
        packed: it finds the weights packed that the command line wants packed.
        compiles: it makes graphs for each kind of call, and needs such a call before it is measured.
    """

    name: str
    call: Call
    draft: Any = None
    generator: Any = None
    predicts: bool = False
    packed: bool = False
    compiles: bool = False

    def stats(self) -> Any:
        """Statistics of the last call, or None."""
        return self.generator and self.generator.stats


def line_up(pair: Pair, options: argparse.Namespace) -> list[Contestant]:
    """The contestants that the command line asks for, plain first; names are unique.

    Raises:
        SpecdecError: a draft or number of draft tokens that the library does not know.
    """
    chosen = [plain(pair, options)]
    if options.pack:
        chosen.append(replace(chosen[0], name="packed plain", packed=True))
    lengths = options.k or [None]
    whole = [k for k in lengths if isinstance(k, int) and k > 0]
    if pair.draft is not None and not options.ours_only:
        chosen += [assisted(pair, options, k) for k in whole]
        chosen.append(assisted(pair, options, None))
    if not options.ours_only:
        chosen += [lookup(pair, options, k) for k in whole or [LOOKUP_TOKENS]]
    for word in options.drafts:
        chosen += [ours(pair, options, word, k) for k in lengths]
        if options.compile and word != "none":
            chosen += [ours(pair, options, word, k, compiles=True) for k in lengths]
    if "none" not in options.drafts:
        chosen.append(ours(pair, options, "none", None))
    return list({contestant.name: contestant for contestant in chosen}.values())


def draft_length(text: str) -> int | str:
    """``num_draft_tokens`` from the command line: a number, or a word that the library will judge."""
    return int(text) if text.lstrip("-").isdigit() else text


def choices(options: argparse.Namespace, new: int) -> dict[str, Any]:
    """Options of ``generate()`` that all contestants get."""
    how: dict[str, Any] = {"do_sample": False}
    if options.sample:
        how = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    return {"max_new_tokens": new, **how}


def plain(pair: Pair, options: argparse.Namespace) -> Contestant:
    """The target's own ``generate()``."""

    def call(inputs: dict[str, Any], prompts: Sequence[Prompt], streamer: Any, new: int) -> Any:
        return pair.target.generate(**inputs, **choices(options, new), streamer=streamer)

    return Contestant(PLAIN, call)


def assisted(pair: Pair, options: argparse.Namespace, k: int | None) -> Contestant:
    """Assisted decoding with its defaults, or with ``k`` guesses (and the threshold given, or its default)."""
    more: dict[str, Any] = {"assistant_model": pair.draft}
    if pair.tokenizer.get_vocab() != pair.draft_tokenizer.get_vocab():
        more |= {"tokenizer": pair.tokenizer, "assistant_tokenizer": pair.draft_tokenizer}
    settings: dict[str, Any] = {}
    if k is not None:
        settings = {"num_assistant_tokens": k, "num_assistant_tokens_schedule": "constant"}
        if options.threshold is not None:
            settings["assistant_confidence_threshold"] = options.threshold

    def call(inputs: dict[str, Any], prompts: Sequence[Prompt], streamer: Any, new: int) -> Any:
        with lent_settings(pair.draft, settings):
            return pair.target.generate(**inputs, **choices(options, new), **more, streamer=streamer)

    return Contestant("assisted" if k is None else f"assisted, k={k}", call, draft=pair.draft)


@contextmanager
def lent_settings(draft: Any, settings: dict[str, Any]) -> Iterator[None]:
    """Assisted decoding reads the draft's generation config, and may write into it: lend it a copy."""
    own = draft.generation_config
    draft.generation_config = copy.deepcopy(own)
    draft.generation_config.update(**settings)
    try:
        yield
    finally:
        draft.generation_config = own


def lookup(pair: Pair, options: argparse.Namespace, k: int) -> Contestant:
    """transformers' prompt lookup with ``k`` guesses."""

    def call(inputs: dict[str, Any], prompts: Sequence[Prompt], streamer: Any, new: int) -> Any:
        how = choices(options, new)
        return pair.target.generate(**inputs, **how, prompt_lookup_num_tokens=k, streamer=streamer)

    return Contestant(f"prompt lookup, k={k}", call)


def ours(
    pair: Pair, options: argparse.Namespace, word: str, k: int | str | None, compiles: bool = False
) -> Contestant:
    """specdec with the draft ``word``.

    "model" is the draft model and "none" no draft, "cascade" the suffix automaton under the draft model, "mixture"
    the best of suffix, recycling and the draft model if there is one; any other word is handed to the library.
    Several ("suffix+model") stand one behind another. "prediction", alone or with a draft ("model+prediction"),
    hands the expected answer to ``generate()``.
    """
    words = word.split("+")
    predicts = "prediction" in words
    named = [w for w in words if w != "prediction"]
    if pair.draft is None and {"model", "cascade"} & set(named):
        raise ValueError(f"the draft {word!r} needs a draft model: give DRAFT behind TARGET")
    made: dict[str, Any] = {"model": pair.draft, "none": None}
    if "cascade" in named:
        made["cascade"] = Cascade("suffix", pair.draft)
    if "mixture" in named:
        made["mixture"] = Mixture("suffix", "recycling", *([pair.draft] if pair.draft is not None else []))
    drafts = [made.get(w, w) for w in named]
    draft = drafts if len(drafts) > 1 else next(iter(drafts), None)
    more: dict[str, Any] = {"compile": compiles} if k is None else {"num_draft_tokens": k, "compile": compiles}
    if "model" in named:
        more["draft_tokenizer"] = pair.draft_tokenizer
    generator = SpeculativeGenerator(pair.target, draft, tokenizer=pair.tokenizer, **more)
    # a draft that the library makes itself is not to be had otherwise; without it only gen.stats counts
    found = pair.draft if set(named) & {"model", "cascade", "mixture"} else None
    found = getattr(getattr(generator, "_proposer", None), "model", found)
    model = found if isinstance(found, torch.nn.Module) else None

    def call(inputs: dict[str, Any], prompts: Sequence[Prompt], streamer: Any, new: int) -> Any:
        how = choices(options, new)
        if predicts:
            how["prediction"] = [prompt.prediction for prompt in prompts]
        return generator.generate(**inputs, **how, streamer=streamer)

    name = f"specdec {word}" + (f", k={k}" if k is not None else "") + (", compiled" if compiles else "")
    return Contestant(
        name, call, draft=model, generator=generator, predicts=predicts, packed=True, compiles=compiles
    )
