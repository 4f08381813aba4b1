"""Grammars by llguidance, through its documented Python interface; optional.

A place in the grammar is a matcher that is copied before each token, which takes microseconds.
Knows no model. Read next: ``../stopping.py``.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import llguidance as llg
import llguidance.hf
import llguidance.numpy
import numpy as np

from specdec.structured.constraint import WORD, mask_of, refused

_tokenizers: WeakKeyDictionary[Any, dict[tuple[int, tuple[int, ...]], Any]] = WeakKeyDictionary()


def json_schema(text: str, tokenizer: Any, ends: tuple[int, ...], *, whitespace: bool) -> _Grammar:
    """A JSON Schema."""
    exact: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    options: Any = {"whitespace_flexible": True} if whitespace else exact
    try:
        grammar = llg.LLMatcher.grammar_from_json_schema(text, overrides=options)
    except ValueError as error:
        raise refused("JSON schema", error) from error
    return _Grammar("JSON schema", grammar, tokenizer, ends)


def regex(text: str, tokenizer: Any, ends: tuple[int, ...]) -> _Grammar:
    """A regular expression."""
    return _Grammar("regular expression", llg.LLMatcher.grammar_from_regex(text), tokenizer, ends)


def ebnf(text: str, tokenizer: Any, ends: tuple[int, ...]) -> _Grammar:
    """A grammar in GBNF."""
    try:
        converted = llg.gbnf_to_lark.any_to_lark(text)
    except Exception as error:  # its parser raises plain exceptions
        raise refused("grammar", error) from error
    return lark(converted, tokenizer, ends)


def lark(text: str, tokenizer: Any, ends: tuple[int, ...]) -> _Grammar:
    """A grammar in Lark's form."""
    return _Grammar("grammar", llg.LLMatcher.grammar_from_lark(text), tokenizer, ends)


def _tokenizer(tokenizer: Any, ends: tuple[int, ...]) -> Any:
    """Made once for a tokenizer: reading a large vocabulary takes about a second."""
    known = _tokenizers.setdefault(tokenizer, {})
    key = (len(tokenizer), ends)  # tokens may be added to it
    if key not in known:
        known[key] = llguidance.hf.from_tokenizer(tokenizer, n_vocab=len(tokenizer), eos_token=list(ends))
    return known[key]


class _Grammar:
    def __init__(self, what: str, grammar: Any, tokenizer: Any, ends: tuple[int, ...]) -> None:
        self._start = llg.LLMatcher(_tokenizer(tokenizer, ends), grammar, log_level=0)
        if self._start.is_error():
            raise refused(what, self._start.get_error())
        self.ends = ends
        self.words = (len(tokenizer) + WORD - 1) // WORD

    def start(self) -> _Matcher:
        """See ``Grammar.start``."""
        return _Matcher(self, self._start.deep_copy(), ended=False)


class _Matcher:
    def __init__(self, grammar: _Grammar, native: Any, *, ended: bool) -> None:
        self._grammar, self._native, self.ended = grammar, native, ended
        self._mask: np.ndarray | None = None

    def mask(self) -> np.ndarray:
        """See ``Matcher.mask``."""
        if self._mask is None:
            if self.ended:
                self._mask = mask_of(self._grammar.ends, self._grammar.words)
            else:
                self._mask = np.zeros(self._grammar.words, dtype=np.int32)
                llguidance.numpy.fill_next_token_bitmask(self._native, self._mask[None])
        return self._mask

    def after(self, token: int) -> _Matcher:
        """See ``Matcher.after``."""
        native = self._native.deep_copy()
        native.consume_token(token)
        return _Matcher(self._grammar, native, ended=token in self._grammar.ends)

    def forward(self) -> list[int]:
        """See ``Matcher.forward``."""
        return list(self._native.compute_ff_tokens())
