"""Grammars for tests: state machines in pure Python, and a byte-level tokenizer made in the process."""

from functools import cache

import numpy as np

from specdec.structured import Constraint
from specdec.testing import byte_tokenizer

# Remembers more than the last two tokens, so that a model that sees two cannot make up for a wrong state.
# state -> token -> state; token 2 exists in the larger vocabulary only.
TOY = {
    "a": {0: "b", 1: "c", 2: "d"},
    "b": {0: "a", 1: "c"},
    "c": {0: "d"},
    "d": {0: "b", 1: "d", 2: "c"},
}
# Ends with token 2 in every case, at one place without a choice.
ENDING = {
    "a": {0: "b", 1: "c"},
    "b": {0: "c", 1: "last", 2: "end"},
    "c": {0: "b", 1: "c", 2: "end"},
    "last": {2: "end"},
}


class Automaton:
    """A `Grammar` whose places are the states of a table; "end" is the end."""

    def __init__(self, table, ends=(), words=1, hints=None):
        self.table, self.ends, self.words = table, tuple(ends), words
        self.hints = hints or {}  # state -> tokens that it says will probably follow, rightly or not

    def start(self):
        return Place(self, "a")


class Place:
    def __init__(self, grammar, name):
        self.grammar, self.name, self.ended = grammar, name, name == "end"

    def mask(self):
        mask = np.zeros(self.grammar.words, dtype=np.uint32)
        for token in self.grammar.ends if self.ended else self.grammar.table[self.name]:
            mask[token // 32] |= np.uint32(1 << token % 32)
        return mask.view(np.int32)

    def after(self, token):
        return Place(self.grammar, self.grammar.table[self.name][token])

    def forward(self):
        return self.grammar.hints.get(self.name, [])


def toy(table=TOY, ends=(), hints=None):
    return Constraint(Automaton(table, ends, hints=hints))


def counting(vocabulary=64, groups=5):
    """A constraint over a larger vocabulary: the sum of all ids so far says which ids may follow."""

    def follow(group):
        return {token: (group + token) % groups or "a" for token in range(3 + group, vocabulary, 3)}

    table = {group or "a": follow(group) for group in range(groups)}
    return Constraint(Automaton(table, (), (vocabulary + 31) // 32))


@cache
def json_tokenizer():
    """Bytes, and some pieces of JSON as real tokenizers have them; id 0 is padding, 1 ends a text."""
    return byte_tokenizer('{"', '": "', '", "', '"}', "name", "age", "true", "fal", "yes", "ab")
