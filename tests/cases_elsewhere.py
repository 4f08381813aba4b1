"""Calls on a device that is not the host (``elsewhere.py``), beside the same calls on the host.

``python -m tests.cases_elsewhere [NAME ...]`` prints one line of JSON for every case, or for those named: whether
the text is the same, and where the host waited for the device in the rounds of a second call. What it should print
stands in ``test_elsewhere.py``.
"""

import json
import sys
import traceback
import warnings

import numpy as np
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import logits_process as hf

from specdec import SpeculativeGenerator, TranslatedDraft, transfer
from specdec.layouts.facts import CACHE
from specdec.length.fixed import Fixed
from specdec.state import State
from specdec.testing import byte_tokenizer, noisy_copy, ragged_prompt, tiny_llama

from .contract import bart, gemma, mamba2, mistral, qwen3_next, t5
from .proposers import PROPOSERS

NEW = 14
TEXTS = [[9, 8, 7, 6], [5, 6, 7, 8, 9], [5, 5]]


class Odd(LogitsProcessor):
    """Nobody knows whether it holds a state."""

    def __call__(self, ids, scores):
        return scores - (ids[:, -1:] % 3 == 0).float()


class Mixes(LogitsProcessor):
    """Makes its tensor on the host, which a GPU would not have."""

    specdec_pure = True

    def __call__(self, ids, scores):
        return scores + torch.zeros(scores.shape)


class Reads(LogitsProcessor):
    """Looks at a value, so that the host waits."""

    specdec_pure = True

    def __call__(self, ids, scores):
        return scores if bool((ids > -1).any()) else -scores


class Sum(StoppingCriteria):
    """Ends rows by what they hold."""

    def __call__(self, ids, scores, **_):
        return ids.sum(dim=1) % 11 == 0


FIRST, SECOND = byte_tokenizer(), byte_tokenizer("the", "ab")


def bytes_target():
    return tiny_llama(3, vocabulary=len(FIRST))


def translated(model, texts):
    draft = tiny_llama(9, vocabulary=len(SECOND))
    if model.device.type != "cpu":
        from .elsewhere import moved

        draft = moved(draft)
    return TranslatedDraft(draft, FIRST, SECOND), {}


RULES = {
    "greedy": {"do_sample": False},
    "token": {"do_sample": True, "verification": "token", "top_p": 0.9},
    "block": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "coupled": {"do_sample": True, "verification": "coupled"},
}
CASES = {f"{name}, greedy": {"draft": name, **RULES["greedy"]} for name in PROPOSERS}
# on the CPU alone recycling looks where its chain ends: there its guesses and, by rejection, its texts are others
OTHERWISE = ("recycling", "mixture")
CASES |= {f"{name}, block": {"draft": name, **RULES["block"]} for name in PROPOSERS if name not in OTHERWISE}
CASES |= {f"{name}, coupled": {"draft": name, **RULES["coupled"]} for name in OTHERWISE}
CASES |= {
    f"{name}, {rule}": {"draft": name, **RULES[rule]}
    for name in ("model", "suffix", "early exit")
    for rule in ("token", "coupled")
}
CASES |= {f"{name}, columns": {"draft": name, "layout": "columns"} for name in ("model", "suffix", "cascade")}
CASES |= {f"{name}, auto": {"draft": name, "tokens": "auto"} for name in ("model", "a list", "mixture, model")}
CASES |= {f"{name}, inputs on the host": {"draft": name, "inputs": "host"} for name in ("none", "model", "cascade")}
CASES |= {
    f"{name}, draft on the host": {"draft": name, "drafts": "host", **RULES["block"]}
    for name in ("model", "cascade", "a list", "mixture, model")
}
# the draft length asks after every guess how likely it was, which only the host can tell for free
CASES["cascade, asked, draft on the host"] = {"draft": "cascade", "drafts": "host", "asks": True}
# a named layout is refused where it does not fit
SPLIT = {"split": True, "layout": "slots"}
CASES |= {f"{name}, split": {"draft": name, **SPLIT} for name in ("model", "suffix", "early exit")}
CASES |= {
    "split, columns": {"split": True, "layout": "columns"},
    "split, outputs": {**SPLIT, "return_dict_in_generate": True, "output_hidden_states": True},
    "repetition penalty": {"repetition_penalty": 1.3},
    "ngrams, lengths, words": {"no_repeat_ngram_size": 2, "min_new_tokens": 5, "bad_words_ids": [[5], [6, 7]]},
    "suppressed": {"suppress_tokens": [4, 9], "begin_suppress_tokens": [5]},
    "ends and a condition": {"eos_token_id": [5, 17], "make": lambda: {"stopping_criteria": [Sum()]}},
    "unknown processor": {"make": lambda: {"logits_processor": [Odd()]}},
    "prefix": {"make": lambda: {"prefix_allowed_tokens_fn": lambda _, ids: [3 + int(ids[-1]) % 50, 7, 9]}},
    "guidance": {"guidance_scale": 1.4},
    "all outputs": {
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True,
    },
    "a given cache": {"make": lambda: {CACHE: DynamicCache()}},
    "a static cache": {"cache_implementation": "static"},
    "several a prompt": {"num_return_sequences": 2, "do_sample": True, "verification": "coupled"},
    "windows": {"target": mistral},
    "windows and more": {"target": gemma},
    "recurrent": {"target": mamba2},
    "hybrid": {"target": qwen3_next},
    "encoder": {"target": t5},
    "another encoder": {"target": bart},
    "functions at home": {
        "inputs": "host", "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
        "make": lambda: {"logits_processor": [Mixes(), hf.SuppressTokensLogitsProcessor([4, 9])],
                         "stopping_criteria": [Sum()],
                         "prefix_allowed_tokens_fn": lambda row, ids: (ids[-1:].numpy() + np.arange(9)) % 60 + 3},
    },
    "watermarks at home": {
        "inputs": "host",
        "make": lambda: {"logits_processor": [hf.WatermarkLogitsProcessor(64, device="cpu"), synthid()]},
    },
    "another tokenizer": {"draft": "translated", "target": bytes_target},
    "another tokenizer, sampled": {"draft": "translated", "target": bytes_target, **RULES["block"]},
    "another tokenizer, draft on the host": {
        "draft": "translated", "target": bytes_target, "drafts": "host", **RULES["block"],
    },
    "mixes devices": {"make": lambda: {"logits_processor": [Mixes()]}},
    "reads a value": {"make": lambda: {"logits_processor": [Reads()]}},
    "copies wait": {"queues": False},
}  # fmt: skip


def synthid():
    """A watermark with a state, which makes tensors on the device that it is told."""
    sizes = {"ngram_len": 3, "sampling_table_size": 64, "context_history_size": 16}
    return hf.SynthIDTextWatermarkLogitsProcessor(**sizes, keys=[1, 2, 3], sampling_table_seed=0, device="cpu")


def outcome(name):
    """Run one case on both devices."""
    from .elsewhere import NAME, There, moved, put_there, split, waits

    torch.manual_seed(0)
    case = dict(CASES[name])
    transfer.QUEUES = frozenset({NAME} if case.pop("queues", True) else ())
    host = case.pop("target", lambda: tiny_llama(3))()
    draft, layout, make = case.pop("draft", "model"), case.pop("layout", "auto"), case.pop("make", dict)
    tokens, verification = case.pop("tokens", 4), case.pop("verification", "block")
    inputs = ragged_prompt((9, 6, 3), host.config.vocab_size)
    stay = {key for key in ("inputs", "drafts") if case.pop(key, "") == "host"}
    move = split if case.pop("split", False) else moved
    Fixed.goes_on = staticmethod(lambda chances: True) if case.pop("asks", False) else None
    ids = []
    for there in (False, True):
        target = move(host) if there else host
        place = put_there if there and "inputs" not in stay else lambda tensor: tensor
        given = {key: place(value) for key, value in inputs.items()}
        proposer, extra = {"translated": translated, **PROPOSERS}[draft](
            noisy_copy(host if "drafts" in stay else target, 0.05), TEXTS
        )
        generator = SpeculativeGenerator(
            target, proposer, num_draft_tokens=tokens, verification=verification, layout=layout, seed=1
        )
        waited = []
        for _ in range(2):
            commits = []
            commit = State.commit

            def counted(*args, commit=commit, commits=commits):
                result = commit(*args)
                commits.append(len(waits))
                return result

            State.commit = counted
            waits.clear()
            try:
                options = {key: _list(value) for key, value in make().items()}
                out = generator.generate(**given, max_new_tokens=NEW, pad_token_id=0, **case, **extra, **options)
            except Exception as error:
                return {"error": f"{type(error).__name__}: {str(error)[:200]}", "at": traceback.format_exc()[-600:]}
            finally:
                State.commit = commit
            # what prepares a model or tries a layout is over by then
            first = min(3, len(commits) - 1)
            waited = waits[commits[first] : commits[-1]]
            rounds = len(commits) - 1 - first
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        assert isinstance(sequences, There) == (there and "inputs" not in stay)
        ids.append(sequences.tolist())
    others = sorted({place for place in waited if not place.startswith("transfer.py to_host")})
    return {"same": ids[0] == ids[1], "rounds": rounds, "waits": len(waited), "others": others,
            "layout": generator.stats.layout, "drafted": int(generator.stats.drafted)}  # fmt: skip


def _list(value):
    if isinstance(value, list):
        return StoppingCriteriaList(value) if isinstance(value[0], StoppingCriteria) else LogitsProcessorList(value)
    return value


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    warnings.simplefilter("ignore")
    for name in CASES:
        if name in (sys.argv[1:] or CASES):
            print(json.dumps({"case": name, **outcome(name)}), flush=True)
