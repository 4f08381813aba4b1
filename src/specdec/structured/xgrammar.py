"""Grammars by XGrammar (2411.15100), through its documented Python interface; optional.

A place in the grammar is a matcher that is forked before each token, which takes microseconds.
Knows no model. Read next: ``llguidance.py``.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import xgrammar as xgr

from specdec.structured.constraint import WORD, mask_of, refused

REMEMBERED = 1 << 28  # bytes of compiled grammars: a service may see another schema with every request
_compilers: WeakKeyDictionary[Any, dict[tuple[int, tuple[int, ...]], Any]] = WeakKeyDictionary()


def json_schema(text: str, tokenizer: Any, ends: tuple[int, ...], *, whitespace: bool) -> _Grammar:
    """A JSON Schema."""
    return _Grammar("JSON schema", "compile_json_schema", text, tokenizer, ends, any_whitespace=whitespace)


def regex(text: str, tokenizer: Any, ends: tuple[int, ...]) -> _Grammar:
    """A regular expression."""
    return _Grammar("regular expression", "compile_regex", text, tokenizer, ends)


def ebnf(text: str, tokenizer: Any, ends: tuple[int, ...]) -> _Grammar:
    """A grammar in GBNF."""
    return _Grammar("grammar", "compile_grammar", text, tokenizer, ends)


def lark(text: str, tokenizer: Any, ends: tuple[int, ...]) -> _Grammar:
    """A grammar in Lark's form."""
    return _Grammar("grammar", "compile_lark", text, tokenizer, ends)


def _compiler(tokenizer: Any, ends: tuple[int, ...]) -> Any:
    """Made once for a tokenizer: reading a large vocabulary takes about a second."""
    known = _compilers.setdefault(tokenizer, {})
    key = (len(tokenizer), ends)  # tokens may be added to it
    if key not in known:
        info = xgr.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer), stop_token_ids=list(ends))
        known[key] = xgr.GrammarCompiler(info, cache_limit_bytes=REMEMBERED)
    return known[key]


class _Grammar:
    def __init__(
        self, what: str, method: str, text: str, tokenizer: Any, ends: tuple[int, ...], **options: Any
    ) -> None:
        compiler = _compiler(tokenizer, ends)
        try:
            self._compiled = getattr(compiler, method)(text, **options)
        except Exception as error:  # of several kinds, RuntimeError among them
            raise refused(what, error) from error
        self.ends = ends
        self.words = (len(tokenizer) + WORD - 1) // WORD
        # its masks may hold special tokens, as if they were their names, and bits behind the last token
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {*tokenizer.all_special_ids, *(one for one, token in added.items() if token.special)}
        self.barred = mask_of([*(special - {*ends}), *range(len(tokenizer), self.words * WORD)], self.words)
        self._tokenizer = tokenizer
        self._split: dict[str, list[int]] = {}

    def start(self) -> _Matcher:
        """See ``Grammar.start``."""
        return _Matcher(self, xgr.GrammarMatcher(self._compiled, override_stop_tokens=list(self.ends)))

    def ids(self, text: str) -> list[int]:
        """What the tokenizer makes of ``text`` in the middle of a text."""
        if text not in self._split:
            self._split[text] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._split[text]


class _Matcher:
    def __init__(self, grammar: _Grammar, native: Any) -> None:
        self._grammar, self._native = grammar, native
        self._mask: np.ndarray | None = None
        self.ended = bool(native.is_terminated())

    def mask(self) -> np.ndarray:
        """See ``Matcher.mask``."""
        if self._mask is None:
            if self.ended:
                self._mask = mask_of(self._grammar.ends, self._grammar.words)
            else:
                self._mask = np.zeros(self._grammar.words, dtype=np.int32)
                self._native.fill_next_token_bitmask(torch.from_numpy(self._mask)[None])
                self._mask &= ~self._grammar.barred
        return self._mask

    def after(self, token: int) -> _Matcher:
        """See ``Matcher.after``."""
        native = self._native.fork()
        native.accept_token(token)
        return _Matcher(self._grammar, native)

    def forward(self) -> list[int]:
        """See ``Matcher.forward``: the string that must follow, in the tokenizer's own pieces."""
        text = self._native.find_jump_forward_string()
        return self._grammar.ids(text) if text else []
