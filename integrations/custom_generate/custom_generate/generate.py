"""Speculative decoding through ``model.generate(custom_generate=<this folder>, trust_remote_code=True)``.

transformers loads this file, from a local folder or a repository of models, and calls ``generate`` with the
arguments of ``model.generate()``. It needs ``specdec`` installed.
"""

from typing import Any

from specdec import SpeculativeGenerator


def generate(
    model: Any,
    draft: Any = "ngram",
    num_draft_tokens: int | str = "auto",
    verification: str = "block",
    draft_tokenizer: Any = None,
    custom_generate: Any = None,
    **kwargs: Any,
) -> Any:
    """What ``model.generate()`` returns, with the same output law.

    Args:
        model: the target, given by transformers.
        draft: what guesses, as for ``SpeculativeGenerator``: a model, a proposer, a word such as "ngram", or None.
        num_draft_tokens: as for ``SpeculativeGenerator``.
        verification: as for ``SpeculativeGenerator``.
        draft_tokenizer: judges the pair, together with ``tokenizer``.
        custom_generate: set when ``SpeculativeGenerator`` itself comes in; then transformers' own loop prepares.
        kwargs: arguments of ``model.generate()``.
    """
    if custom_generate is not None:
        return type(model).generate(model, custom_generate=custom_generate, **kwargs)
    generator = SpeculativeGenerator(
        model,
        draft,
        num_draft_tokens=num_draft_tokens,
        verification=verification,
        tokenizer=kwargs.get("tokenizer"),
        draft_tokenizer=draft_tokenizer,
    )
    return generator.generate(**kwargs)
