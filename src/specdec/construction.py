"""What ``SpeculativeGenerator`` is made of: its settings, judged, and the proposer that ``draft`` names.

Everything is judged before any work is done. Knows no option of ``generate()``. Read next: ``options.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationMixin

from specdec.errors import InvalidInput, UnsupportedModel, VocabularyMismatch
from specdec.layouts.choices import LAYOUTS
from specdec.proposers import Nothing, is_proposer
from specdec.proposers.cascade import Cascade
from specdec.proposers.draft_model import DraftModel
from specdec.proposers.fallback import Fallback
from specdec.proposers.layers import OwnLayers
from specdec.proposers.mixture import Mixture
from specdec.proposers.prompt import embedded
from specdec.proposers.translated import TranslatedDraft
from specdec.proposers.vocabulary import same_ids
from specdec.proposers.words import WORDS, one_behind_another
from specdec.sampling import VERIFICATIONS
from specdec.weights.adapters import inner_model, is_model
from specdec.weights.quantized import has_two_weights, quantize_draft
from specdec.whole import whole

SELF = {"self-int4": "int4", "self-int8": "int8"}  # the target itself with fewer bits a weight
# every word that ``draft`` may be
NAMES = (*WORDS, *SELF, "auto")


def check_constructor(
    target: Any, num_draft_tokens: Any, verification: Any, layout: Any, tokenizer: Any, draft_tokenizer: Any
) -> int | str:
    """Refuse arguments of ``SpeculativeGenerator`` that do not exist or are out of range.

    Returns:
        the number of guesses, as Python's own number.
    """
    if not is_model(target):
        raise UnsupportedModel(
            f"the target is a {type(target).__name__}; wanted is a Hugging Face model with generate()"
        )
    kind = type(inner_model(target))
    if getattr(kind, "_sample", GenerationMixin._sample) is not GenerationMixin._sample:
        raise UnsupportedModel(
            f"{kind.__name__} decodes in a loop of its own (`_sample`), as models that speak do, and ours would "
            "take its place; call target.generate()"
        )
    if isinstance(target, torch.nn.Module) and has_two_weights(target):
        raise UnsupportedModel(
            "the target was made by quantize_draft(keep=True): a pass over several tokens computes with other "
            "weights than one over a single token. Make it with keep=False, or give the model itself"
        )
    auto = isinstance(num_draft_tokens, str) and num_draft_tokens == "auto"
    guesses = "auto" if auto else whole(num_draft_tokens)
    if guesses is None or (guesses != "auto" and int(guesses) < 0):
        raise InvalidInput(
            f"num_draft_tokens={num_draft_tokens!r}; give 'auto', or a whole number >= 0 (0 decodes plainly)"
        )
    if verification not in VERIFICATIONS:
        raise InvalidInput(f"verification={verification!r} does not exist; use one of {VERIFICATIONS}")
    if layout not in LAYOUTS:
        raise InvalidInput(f"layout={layout!r} does not exist; use one of {LAYOUTS}")
    for name, given in (("tokenizer", tokenizer), ("draft_tokenizer", draft_tokenizer)):
        # the target's alone may be anything that decodes; two are compared
        compared = draft_tokenizer is not None and tokenizer is not None
        if isinstance(given, str) or (compared and not hasattr(given, "get_vocab")):
            raise InvalidInput(
                f"{name} is a {type(given).__name__}; wanted is what AutoTokenizer.from_pretrained(...) returns"
            )
    if draft_tokenizer is not None and tokenizer is None:
        raise InvalidInput("draft_tokenizer is compared with the target's; give `tokenizer` as well")
    return guesses


def check_compile(compile: Any, num_draft_tokens: Any, layout: str) -> None:
    """Refuse ``compile=True`` where nothing would be compiled, or nothing could be."""
    if not isinstance(compile, bool):
        raise InvalidInput(f"compile={compile!r}; give True or False")
    if not compile:
        return
    if num_draft_tokens == 0:
        raise InvalidInput("compile=True needs guesses to verify, and num_draft_tokens=0 makes none")
    if layout not in ("auto", "slots"):
        raise InvalidInput(
            f"compile=True needs the layout 'slots', whose shapes stay; layout={layout!r} forces another"
        )


def check_seed(seed: Any) -> int | list[int] | None:
    """A seed, one a row, or None."""
    if isinstance(seed, (list, tuple)):
        rows = [one for one in map(whole, seed) if one is not None]
        if len(rows) == len(seed):
            return rows
    elif seed is None or whole(seed) is not None:
        return whole(seed)
    raise InvalidInput(f"seed={seed!r}; give a whole number, a list with one a row, or None")


def build_proposer(target: Any, draft: Any, tokenizer: Any, draft_tokenizer: Any, compile: bool = False) -> Any:
    """The proposer that ``draft`` names; a model is checked against the target first."""
    if draft is None:
        return Nothing()
    if isinstance(draft, str):
        if draft == "auto":
            return Mixture("suffix", "recycling")
        if draft in SELF:
            return DraftModel(quantize_draft(target, SELF[draft]), compile=compile)
        if draft not in WORDS:
            words = ", ".join(map(repr, NAMES))
            load = f" (AutoModelForCausalLM.from_pretrained({draft!r}) loads one)" if "/" in draft else ""
            raise InvalidInput(
                f"draft={draft!r} is no known proposer; use {words}, a model{load}, a Proposer or None"
            )
        return WORDS[draft]()
    if isinstance(draft, (list, tuple)):
        return one_behind_another(
            draft, lambda one: build_proposer(target, one, tokenizer, draft_tokenizer, compile)
        )
    if isinstance(draft, type):
        raise UnsupportedModel(f"the draft is the class {draft.__name__}; give an object: {draft.__name__}()")
    if isinstance(draft, OwnLayers):
        draft.check(target)
    if is_proposer(draft):
        if isinstance(draft, (DraftModel, Mixture, Fallback, Cascade)):
            _check_ids(target, draft, tokenizer, draft_tokenizer)
        return draft
    if not is_model(draft):
        raise UnsupportedModel(
            f"the draft is a {type(draft).__name__}; wanted is a Hugging Face model, an object with "
            f"propose(state, limits), one of {', '.join(map(repr, NAMES))}, a list of such, or None"
        )
    draft = inner_model(draft)
    if draft.config.is_encoder_decoder != target.config.is_encoder_decoder:
        raise UnsupportedModel(
            "draft and target must both be decoder-only or both be encoder-decoder models; "
            f"{type(draft).__name__} and {type(target).__name__} are not"
        )
    if _shares_ids(target, draft, tokenizer, draft_tokenizer):
        return DraftModel(draft, compile=compile)
    if draft.config.is_encoder_decoder:
        raise VocabularyMismatch(
            "the tokenizers differ, and only decoder-only models can draft across tokenizers; give an "
            "encoder-decoder draft of the same family"
        )
    return TranslatedDraft(draft, tokenizer, draft_tokenizer, compile=compile)


def _check_ids(target: Any, draft: Any, tokenizer: Any, draft_tokenizer: Any) -> None:
    """Refuse other token ids in the models of ``draft``, which were given to it and are never translated."""
    if any(not _shares_ids(target, model, tokenizer, draft_tokenizer) for model in _models(draft)):
        raise InvalidInput(
            "draft_tokenizer is for a model that is the draft, or one of a list; a "
            f"{type(draft).__name__} takes its models as they are: give "
            "TranslatedDraft(model, tokenizer, draft_tokenizer) in the model's place, and no draft_tokenizer"
        )


def _models(draft: Any) -> Iterator[Any]:
    """The draft models in a proposer, and in those that it is made of."""
    if isinstance(draft, DraftModel):
        yield draft.model
    if isinstance(draft, (Mixture, Fallback, Cascade)):
        for part in draft.parts:
            yield from _models(part)


def _shares_ids(target: Any, draft: Any, tokenizer: Any, draft_tokenizer: Any) -> bool:
    """Whether token ids mean the same to both, by the tokenizers where given; else sizes must agree.

    Scores are often padded to a round number of rows (Qwen2.5: 151936 or 152064 for the same tokenizer), so
    sizes may differ by a little; ids past the smaller one are never guessed.

    Raises:
        VocabularyMismatch: the sizes differ by more than 1 %.
    """
    if tokenizer is not None and draft_tokenizer is not None:
        return same_ids(tokenizer, draft_tokenizer)
    sizes = [embedded(model) for model in (target, draft)]
    if abs(sizes[0] - sizes[1]) > 0.01 * max(sizes):
        raise VocabularyMismatch(
            f"the target has {sizes[0]} token ids and the draft {sizes[1]}, so an id does not mean the same to "
            "both. Pass both tokenizers, `tokenizer` (the target's) and `draft_tokenizer`: then guesses are "
            "translated; or give a draft of the same family"
        )
    return True
