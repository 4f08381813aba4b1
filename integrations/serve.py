"""``transformers serve``, the server itself, with a target that generates speculatively.

    python -m pip install . 'transformers[serving]'
    python integrations/serve.py TARGET [DRAFT] [--port 8000]

DRAFT is a hub id or folder, or a word ("ngram", "suffix", "auto", "self-int8"; default: suffix). The server calls
``model.generate()`` for one request after the other; its continuous batching never calls it and stays plain. A
streamer hears one token a step; the tokens of a round come together, which tells who watches the wire how well the
draft guessed (``docs/private-streaming.md``).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.cli.serve import Serve

from specdec import SpeculativeGenerator
from specdec.construction import NAMES


@contextmanager
def serving(target: str, draft: str, port: int) -> Iterator[tuple[Any, SpeculativeGenerator]]:
    """The server, listening on ``port`` of this machine, and the generator that its model has become."""
    server = Serve(force_model=target, model_timeout=-1, port=port, non_blocking=True, log_level="error")
    try:
        manager = server._model_manager  # the server has no public way to its model
        model, tokenizer = manager.load_model_and_processor(manager.process_model_name(target))
        guesses = draft if draft in NAMES else AutoModelForCausalLM.from_pretrained(draft, dtype=model.dtype)
        generator = SpeculativeGenerator(model, guesses, tokenizer=tokenizer)
        with generator.attached():
            yield server, generator
    finally:
        server.kill_server()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("draft", nargs="?", default="suffix")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args(arguments)
    with serving(options.target, options.draft, options.port) as (server, _):
        server._thread.join()


if __name__ == "__main__":
    main()
