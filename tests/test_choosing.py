"""The search for layers that can be left out."""

import copy

import pytest
import torch

from specdec import InvalidInput, LayerSkip, SpeculativeGenerator, UnsupportedModel, choose_layers
from specdec.testing import byte_tokenizer, tiny_llama

from .contract import assert_untouched, fingerprint, gemma, mistral, plain, prompts, t5

PROMPTS = [[5, 9, 3, 17, 40], [8, 8, 2]]


@pytest.fixture(scope="module")
def idle():
    """Six layers of which three do next to nothing."""
    model = copy.deepcopy(tiny_llama(3, num_hidden_layers=6))
    with torch.no_grad():
        for layer in (1, 2, 4):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(1e-3)
            model.model.layers[layer].mlp.down_proj.weight.mul_(1e-3)
    return model


def test_idle_layers_are_found_and_the_draft_is_kept(idle):
    before, lines = fingerprint(idle), []
    skip = choose_layers(idle, PROMPTS, tokens=24, report=lines.append)
    assert skip == (1, 2, 4)
    assert lines[-1].startswith("3 of 6 layers left out (1, 2, 4): ")
    assert_untouched(idle, before)
    gen = SpeculativeGenerator(idle, LayerSkip(skip=skip), num_draft_tokens=4)
    got = gen.generate(**prompts(3), max_new_tokens=40, do_sample=False)
    assert got.tolist() == plain(idle, prompts(3), max_new_tokens=40).tolist()
    assert gen.stats.acceptance_rate > 0.95


def test_nothing_is_left_out_where_nothing_pays():
    model = tiny_llama(3, num_hidden_layers=4)
    lines = []
    assert choose_layers(model, PROMPTS, report=lines.append) == ()
    assert all(" expected speed 0." in line for line in lines)
    assert len(choose_layers(model, PROMPTS, least=2)) >= 2


def test_the_same_seed_finds_the_same(idle):
    runs = [choose_layers(idle, PROMPTS, tokens=8, least=2, seed=1) for _ in range(2)]
    assert runs[0] == runs[1]


def test_no_time_is_the_first_few_choices(idle):
    assert choose_layers(idle, PROMPTS, tokens=24, seconds=0) != ()


@pytest.mark.parametrize("make", [mistral, gemma])
def test_windows_and_kinds_of_layers(make):
    assert choose_layers(make(), [prompts(1)["input_ids"][0].tolist()], tokens=12, least=1) in {(0,), (1,)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": ["a text"]}, "give the tokenizer"),
        ({"prompts": "a text", "tokenizer": byte_tokenizer()}, r"prompts is a str; .*\[prompt\]"),
        ({"prompts": prompts(1), "tokenizer": byte_tokenizer()}, r"prompts is a dict; .*list of texts"),
        ({"prompts": [[1]]}, "at least 2"),
        ({"least": 6}, "least=6"),
        ({"tokens": 0}, "tokens=0"),
    ],
)
def test_refused(idle, options, message):
    with pytest.raises(InvalidInput, match=message):
        choose_layers(idle, **{"prompts": PROMPTS, **options})


def test_models_that_cannot_be_taken_apart():
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        choose_layers(t5(), PROMPTS)
