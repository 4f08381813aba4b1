"""Every proposer of the library, one row each: the list that laws, identity and contract tests run over.

A row makes the draft and what `generate()` is given besides, from a draft model and the texts that the rows of
the batch are expected to have (right or not).
"""

from collections.abc import Callable
from typing import Any

from specdec import (
    Cascade,
    DraftModel,
    EarlyExit,
    Fallback,
    LayerSkip,
    Mixture,
    NGram,
    Recycling,
    Store,
    Suffix,
)
from specdec.testing import noisy_copy

Texts = list[list[int]]
Row = Callable[[Any, Texts], tuple[Any, dict[str, Any]]]

# drafts that are layers of the target itself: it must have two, and no encoder
OWN_LAYERS = ("early exit", "layer skip")


class Printed(Store):
    """A store that takes in nothing new: the same guesses however often it is used."""

    def __init__(self, texts: Texts) -> None:
        super().__init__()
        for text in texts:
            super().add("reader", text)

    def add(self, tenant, tokens):
        pass


def other(model: Any) -> Any:
    """A model below ``model``, which agrees with it now and then."""
    return noisy_copy(model, 0.3, seed=5)


PROPOSERS: dict[str, Row] = {
    "none": lambda model, texts: (None, {}),
    "model": lambda model, texts: (model, {}),
    "ngram": lambda model, texts: (NGram(2), {}),
    "suffix": lambda model, texts: (Suffix(), {}),
    "store": lambda model, texts: (Suffix(store=Printed(texts)), {"tenant": "reader"}),
    "recycling": lambda model, texts: (Recycling(), {}),
    "fallback": lambda model, texts: (Fallback(Suffix(shortest=2), DraftModel(model)), {}),
    "cascade": lambda model, texts: (Cascade("ngram", model), {}),
    "cascade of three": lambda model, texts: (Cascade(Suffix(), other(model), model), {}),
    "cascade of models": lambda model, texts: (Cascade(other(model), model), {}),
    "mixture": lambda model, texts: (Mixture("suffix", "recycling", NGram(2)), {}),
    "mixture, model": lambda model, texts: (Mixture(NGram(2), model, other(model)), {}),
    "a list": lambda model, texts: ([NGram(3, 2), "suffix", model], {}),
    "early exit": lambda model, texts: (EarlyExit(layers=1), {}),
    "layer skip": lambda model, texts: (LayerSkip(skip=[0]), {}),
    "prediction": lambda model, texts: (None, {"prediction": texts}),
    "prediction, suffix": lambda model, texts: (Suffix(), {"prediction": [*texts[:1], *[None] * (len(texts) - 1)]}),
    "prediction, model": lambda model, texts: (model, {"prediction": [*texts[:1], *[None] * (len(texts) - 1)]}),
}
