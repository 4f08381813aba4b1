"""The text of plain ``generate()`` and really guessed ahead: one architecture for every layout and kind of mask.

``make architectures`` does the same for all of transformers; this is the quick selection.
"""

import pytest
import torch

from specdec import SpeculativeGenerator
from specdec.testing import noisy_copy, ragged_prompt

from .architectures.build import PAD, Case, build
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


@pytest.mark.parametrize("name", ["seq2seq/m2m_100", "multimodal/kosmos-2.5"])
def test_padding_as_a_word(name):
    """Some models number the tokens of a pass without padding, and go on from the cache's length in the next."""
    torch.manual_seed(0)
    model = build(Case(*name.split("/")))
    among = 0
    for widths in ((12,), (12, 9, 5)):
        inputs = ragged_prompt(widths, 112, seed=1)
        for bias in (2.0, 3.0, 4.0, 6.0):
            options = {"max_new_tokens": 24, "do_sample": False, "sequence_bias": [[[PAD], bias]]}
            wanted = model.generate(**inputs, **options)
            words = wanted[:, -24:] != PAD
            among += bool((words[:, 1:] & ~words[:, :-1]).any())
            for draft in (noisy_copy(model, 0.03), "ngram"):
                gen = SpeculativeGenerator(model, draft, num_draft_tokens=5)
                assert gen.generate(**inputs, **options).tolist() == wanted.tolist()
    assert among, "no text has a word behind padding: this test shows nothing"
