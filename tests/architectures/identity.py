"""Is the text of one architecture exactly that of plain ``generate()``, and was it really guessed ahead?

``examine(case)`` builds the tiny model, a noisy copy of it as the draft, and compares greedy texts of 24 tokens:
one prompt alone, and three left-padded ones. Exact by never speculating would be no achievement, so the row
also says which layout ran and in how many rounds. Read next: ``run.py``.
"""

import time
import warnings
from typing import Any

import torch
from torch import Tensor

from specdec import SpeculativeGenerator
from specdec.testing import noisy_copy, ragged_prompt

from . import build
from .build import Case, NotBuilt
from .corrections import INPUTS

GUESSES = 5
NEW = 24
WIDTHS = {"1": (12,), "3": (12, 9, 5)}
# how lively a random model is depends on where it normalises; the first seed and gain with a varied text wins
ATTEMPTS = ((0, 1.6), (1, 0.8), (2, 0.4), (3, 2.5), (4, 1.2))
VARIED = 8
# noise of the draft, in standard deviations of a weight; the next one where none of its guesses was right
NOISE = (0.1, 0.03, 0.005)


def examine(case: Case) -> dict[str, Any]:
    """A row of the report: ``built`` or ``reason``; ``exact``, ``rounds``, ``layout`` and more by batch size."""
    started = time.perf_counter()
    row: dict[str, Any] = {"case": str(case), "class": build.class_name(case), "built": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, row["varied"] = varied_model(case)
        except Exception as error:
            row["reason"] = said(error)
        else:
            row["built"] = True
            before = configs(model)
            for batch, widths in WIDTHS.items():
                row[batch] = compare(case, model, widths)
            row["configs unchanged"] = before == configs(model)
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def varied_model(case: Case) -> tuple[Any, int]:
    """A model whose plain text does not stall, and how many tokens of that text differ."""
    best: tuple[Any, int] = (None, 0)
    for seed, gain in ATTEMPTS:
        model = build.build(case, seed, gain)
        text = plain(model, inputs_for(case, WIDTHS["1"])).sequences[0, -NEW:]
        if (distinct := len(text.unique())) > best[1]:
            best = model, distinct
        if distinct >= VARIED:
            break
    return best


def compare(case: Case, model: Any, widths: tuple[int, ...]) -> dict[str, Any]:
    """Ours against plain ``generate()`` on one batch of prompts."""
    inputs = inputs_for(case, widths)
    try:
        reference = plain(model, inputs)
    except Exception as error:
        return {"exact": False, "error": f"plain generate() fails: {said(error)}"}
    found: dict[str, Any] = {}
    for noise in NOISE:
        draft = noisy_copy(model, noise)
        before = configs(draft)
        try:
            # a number: a copy of the model as its draft never pays, and "auto" would rightly make little of it
            generator = SpeculativeGenerator(model, draft, num_draft_tokens=GUESSES)
            ours = generator.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        except Exception as error:
            return {"exact": False, "error": said(error)}
        stats = generator.stats
        found = {
            "exact": torch.equal(ours, reference.sequences),
            "rounds": stats.rounds,
            "speculates": stats.rounds < NEW,
            "accepted": stats.accepted,
            "drafted": stats.drafted,
            "layout": stats.layout,
            "draft layout": stats.draft_layout,
            "noise": noise,
            "draft unchanged": before == configs(draft),
        }
        if not found["exact"]:
            found["parting"] = parting(ours, reference)
        if found["speculates"] or not found["exact"] or stats.layout == "plain":
            break
    return found


def inputs_for(case: Case, widths: tuple[int, ...]) -> dict[str, Any]:
    """Random prompts, padded on the left, and what a few models need beside them."""
    inputs: dict[str, Any] = ragged_prompt(widths, build.PROMPT_IDS[1], seed=sum(widths))
    if str(case) in INPUTS:
        inputs = INPUTS[str(case)](inputs)
    return inputs


def plain(model: Any, inputs: dict[str, Any]) -> Any:
    return model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
    )


def parting(ours: Tensor, reference: Any) -> dict[str, Any]:
    """Where the texts part and by how much plain ``generate()`` preferred its token: large is a fault."""
    theirs, start = reference.sequences, reference.sequences.shape[1] - NEW
    if ours.shape != theirs.shape:
        return {"shapes": [list(ours.shape), list(theirs.shape)]}
    row, column = (int(n) for n in (ours != theirs).nonzero()[0])
    scores = reference.logits[column - start][row]
    top = scores.topk(2).values
    return {"row": row, "token": column - start, "margin": float(top[0] - top[1])}


def configs(model: Any) -> tuple[str, str]:
    return model.config.to_json_string(), model.generation_config.to_json_string()


def said(error: Exception) -> str:
    """The first lines of an error, short enough for a table."""
    words = " ".join(str(error).split())
    return words if isinstance(error, NotBuilt) else f"{type(error).__name__}: {words}"[:200]
