"""Structured output: text that follows a JSON Schema, a regular expression or a grammar.

    from specdec.structured import json_schema

    only = json_schema(schema, tokenizer)
    gen.generate(**inputs, logits_processor=[only])      # or target.generate(...): the same text

Each function compiles for one of two optional libraries, ``pip install '.[llguidance]'`` or
``'.[xgrammar]'``, and returns a ``Constraint``. Read next: ``constraint.py``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from specdec.errors import InvalidInput
from specdec.structured.constraint import Constraint, Grammar, Matcher

__all__ = ["Constraint", "Grammar", "Matcher", "ebnf", "json_schema", "lark", "regex"]

BACKENDS = ("llguidance", "xgrammar")

Ends = int | Sequence[int] | None


def json_schema(
    schema: dict[str, Any] | str | type,
    tokenizer: Any,
    *,
    whitespace: bool = False,
    backend: str | None = None,
    eos_token_id: Ends = None,
) -> Constraint:
    """JSON that is valid by ``schema``.

    Args:
        schema: a JSON Schema as a dict or as text, or a pydantic model class. Both libraries know most of the
            standard, not all of it, and refuse or ignore different parts of the rest.
        tokenizer: of the target.
        whitespace: allow any white space between the parts; False writes as ``json.dumps`` does, ``", "`` and
            ``": "``, which is shorter, cannot go on for ever, and lets more be guessed. (What the schema spells out
            itself, in ``const`` and ``enum``, is written by xgrammar without any.)
        backend: "llguidance" or "xgrammar"; None takes the one that is installed, llguidance of both.
        eos_token_id: what ends a text; None asks the tokenizer. Must be among the call's own.

    Raises:
        InvalidInput: the schema is refused, or no library is installed.
    """
    if isinstance(schema, type):
        if not hasattr(schema, "model_json_schema"):
            raise InvalidInput(f"schema is the class {schema.__name__}; give a dict, JSON text or a pydantic model")
        schema = schema.model_json_schema()
    text = schema if isinstance(schema, str) else json.dumps(schema)
    try:
        json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"schema is no JSON ({error}); give a dict or JSON text") from error
    return _compiled("json_schema", text, tokenizer, backend, eos_token_id, whitespace=whitespace)


def regex(pattern: str, tokenizer: Any, *, backend: str | None = None, eos_token_id: Ends = None) -> Constraint:
    """Text that matches ``pattern`` as a whole; arguments as for ``json_schema``."""
    return _compiled("regex", pattern, tokenizer, backend, eos_token_id)


def ebnf(grammar: str, tokenizer: Any, *, backend: str | None = None, eos_token_id: Ends = None) -> Constraint:
    """Text of a context-free grammar in GBNF, whose start is the rule ``root``; else as for ``json_schema``."""
    return _compiled("ebnf", grammar, tokenizer, backend, eos_token_id)


def lark(grammar: str, tokenizer: Any, *, backend: str | None = None, eos_token_id: Ends = None) -> Constraint:
    """Text of a context-free grammar in Lark's form, whose start is ``start``; else as for ``json_schema``."""
    return _compiled("lark", grammar, tokenizer, backend, eos_token_id)


def _compiled(
    kind: str, text: str, tokenizer: Any, backend: str | None, eos_token_id: Ends, **options: Any
) -> Constraint:
    if not hasattr(tokenizer, "eos_token_id") or not isinstance(text, str):
        raise InvalidInput(
            f"{kind}() was given a {type(text).__name__} and a {type(tokenizer).__name__}; wanted are a text and a "
            "tokenizer"
        )
    if backend is not None and backend not in BACKENDS:
        raise InvalidInput(f"backend={backend!r} does not exist; use one of {BACKENDS}, or None")
    installed = [name for name in BACKENDS if find_spec(name) is not None]
    wanted = backend or next(iter(installed), None)
    if wanted not in installed:
        missing = backend or "llguidance"
        raise InvalidInput(f"{missing} is not installed; pip install {missing}")
    ends = _ends(tokenizer, eos_token_id)
    module = import_module(f"specdec.structured.{wanted}")
    return Constraint(getattr(module, kind)(text, tokenizer, ends, **options))


def _ends(tokenizer: Any, eos_token_id: Ends) -> tuple[int, ...]:
    found = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    listed = () if found is None else [found] if isinstance(found, int) else found
    ends = tuple(int(one) for one in listed)
    if not ends:
        raise InvalidInput("no end-of-sequence token is named; pass eos_token_id=...")
    return ends
