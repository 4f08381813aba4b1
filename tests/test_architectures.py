"""The text of plain ``generate()`` and really guessed ahead: one architecture for every layout and kind of mask.

``make architectures`` does the same for all of transformers; this is the quick selection.
"""

import pytest

from .architectures.build import Case
from .architectures.identity import examine

# what each stands for, and the layouts of batch 1 and of the left-padded batch of 3
KINDS = {
    "causal/llama": ("the plain case", "slots", "slots"),
    "causal/gemma3_text": ("windows on every other layer", "slots", "slots"),
    "causal/mistral": ("windows on every layer", "slots", "slots"),
    "causal/qwen2": ("biases", "slots", "slots"),
    "causal/gpt2": ("learned positions", "slots", "slots"),
    "causal/bloom": ("alibi", "slots", "slots"),
    "causal/whisper": ("decoder with learned positions and cross-attention", "slots", "slots"),
    "seq2seq/t5": ("relative positions, encoder", "slots", "columns"),
    "seq2seq/bart": ("positions that count padding, encoder", "slots", "columns"),
    "multimodal/pp_formulanet": ("no table of embeddings to be found, an encoder of pictures", "slots", "columns"),
    "causal/lfm2": ("convolution states", "columns", "columns"),
    "causal/openai-gpt": ("no cache", "columns", "columns"),
    "causal/qwen3_next": ("recurrent states and attention", "columns+snapshot", "columns+snapshot"),
    "causal/mamba2": ("recurrent states alone", "columns+snapshot", "columns+snapshot"),
    "causal/blt": ("no layout passes the self-check", "plain", "plain"),
    "causal/mamba": ("a forward of several tokens starts from nothing", "plain", "plain"),
}


@pytest.mark.parametrize("name", KINDS)
def test_same_text_as_plain_generate(name):
    row = examine(Case(*name.split("/")))
    assert row["built"], row.get("reason")
    assert row["configs unchanged"]
    for batch, layout in zip(("1", "3"), KINDS[name][1:], strict=True):
        found = row[batch]
        assert found["exact"], found
        assert found["draft unchanged"], found
        assert found["layout"] == layout, found
        assert found["speculates"] == (layout != "plain"), found
