"""Eight bits on both sides: the kernel against whole numbers multiplied by hand, and what is rounded only once."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional

from specdec import SpeculativeGenerator, quantize_draft
from specdec.testing import ragged_prompt, tiny_llama
from specdec.weights import filling, integer
from specdec.weights.integer import LARGEST, Bytes, few
from specdec.weights.passing import Pass
from specdec.weights.quantized import all_alike

pytestmark = pytest.mark.skipif(
    not integer.available(), reason="this processor has no instructions for products of bytes (VNNI, AMX)"
)


def matrix(rows=48, columns=64):
    torch.manual_seed(0)
    return torch.randint(-LARGEST, LARGEST + 1, (rows, columns), dtype=torch.int8), torch.rand(rows) / 1000


def by_hand(states, numbers, scales):
    """In float64, from bytes that are rounded as they should be."""
    states = states.double()
    top = states.abs().amax()
    rounded = (states / top * LARGEST + 0.5).floor()
    return functional.linear(rounded, numbers.double() * scales.double()[:, None]) * top / LARGEST


@pytest.mark.parametrize("shape", [(1, 64), (2, 64), (8, 1, 64), (3, 2, 64), (2, 2, 1, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_rounded_numbers(shape, dtype):
    numbers, scales = matrix()
    held = Bytes(numbers, scales)
    states = (torch.randn(shape) * torch.logspace(-1, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    wanted = by_hand(states, numbers, scales)
    for got in (held.linear(states, None), held.beside_others(states)):
        assert got.dtype == dtype
        exact = 1e-5 if dtype == torch.float32 else 2**-7
        # a number in the middle between two bytes may go either way
        either = scales.double().max() * states.double().abs().max()
        away = (got.double() - wanted).abs()
        assert (away <= exact * wanted.abs() + 1e-6).float().mean() > 0.9
        assert (away <= exact * wanted.abs() + 2 * either).all()


def test_which_tokens_may_share_a_scale():
    """One or two of every row; of a prompt's the first is often far larger than all others."""
    for shape, shared in (
        ((1, 64), True), ((2, 64), True), ((3, 64), False), ((8, 1, 64), True), ((8, 2, 64), True),
        ((2, 3, 64), False), ((1, 2, 64), True), ((64,), True), ((0, 64), False), ((0, 1, 64), False),
    ):  # fmt: skip
        assert few(torch.zeros(shape)) == shared


def test_zeros_biases_and_the_matrix_itself():
    numbers, scales = matrix()
    held, bias = Bytes(numbers, scales), torch.randn(48)
    for shape in ((1, 64), (2, 64)):
        assert not held.linear(torch.zeros(shape), None).any()
        assert torch.equal(held.linear(torch.zeros(shape), bias), bias.expand(shape[0], -1))
    assert torch.equal(held.dense(), numbers)
    states = torch.randn(1, 64)
    again = pickle.loads(pickle.dumps(held))
    assert copy.deepcopy(held) is held
    assert again.number != held.number
    assert torch.equal(again.linear(states, None), held.linear(states, None))


@pytest.fixture
def rounds(monkeypatch):
    """How often something was rounded."""
    made, real = [], integer._rounded
    monkeypatch.setattr(integer, "_rounded", lambda states: made.append(1) or real(states))
    integer._here.__dict__.clear()
    return made


def test_what_several_matrices_multiply_is_rounded_once(rounds):
    one, other = Bytes(*matrix()), Bytes(*matrix(32))
    states = torch.randn(2, 1, 64)
    wanted = other.linear(states, None)
    rounds.clear()
    one.beside_others(states)
    assert torch.equal(other.beside_others(states), wanted)
    assert len(rounds) == 1


def test_what_is_no_longer_the_same_is_rounded_again(rounds):
    held = Bytes(*matrix())
    states = torch.randn(2, 1, 64)
    held.beside_others(states)
    states[0].mul_(3)
    assert torch.equal(held.beside_others(states), held.beside_others(states.clone()))
    assert len(rounds) == 3, "written into, and another tensor"
    with torch.inference_mode():
        states = torch.randn(2, 1, 64)
        for _ in range(2):
            assert torch.equal(held.beside_others(states), held.linear(states, None))
            states[0].mul_(3)  # nobody counts that
    rounds.clear()
    for _ in range(2):  # a graph writes into its buffers as it likes
        held.linear(states, None)
    assert len(rounds) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_a_draft_round_what_they_share_once_a_pass(rounds, dtype):
    model = tiny_llama(num_hidden_layers=1, dtype=dtype)
    draft = quantize_draft(model, "int8")
    ids = torch.arange(1, 5)
    with torch.no_grad():
        draft(ids[:, None])
        assert len(rounds) == 5, "queries, keys and values; output; gate and up; down; head"
        rounds.clear()
        draft(ids[None])
        assert not rounds, "a prompt goes through the weights given"
        with all_alike():
            assert torch.equal(draft(ids[:, None]).logits, model(ids[:, None]).logits)
    assert not rounds, "so does all that is compared"
    assert draft.lm_head.quantized is None, "held once"
    assert draft.lm_head(torch.randn(4, 1, 32, dtype=dtype)).dtype == dtype


def test_tokens_that_only_fill_up_are_left_out_and_the_others_rounded(rounds, monkeypatch):
    monkeypatch.setattr(filling, "MOVING", 1)
    monkeypatch.setattr(filling, "TILES", 1)
    head = quantize_draft(tiny_llama(num_hidden_layers=1), "int8").lm_head
    states = torch.randn(8, 2, 32)
    real = filling.real_tokens(np.array([2, 1, 2, 1, 2, 1, 2, 1]), 2, np.ones(8, dtype=bool))
    with torch.no_grad():
        wanted = head(states)
        with Pass(real=real):
            got = head(states)
    assert len(rounds) == 2
    torch.testing.assert_close(got[::2], wanted[::2], atol=0.1, rtol=0.1)
    assert torch.equal(got[1::2, 1], got[1::2, 0])


def test_no_tokens_at_all_are_the_given_weights_affair():
    head = quantize_draft(tiny_llama(num_hidden_layers=1), "int8").lm_head
    assert head(torch.zeros(0, 32)).shape == (0, 64)


def test_without_other_weights_for_prompts_activations_stay_as_they_are():
    """It may be a target as well, whose tokens must hear of no neighbour."""
    assert quantize_draft(tiny_llama(), "int8", keep=False).lm_head.held is None


def test_a_draft_guesses_as_well_in_a_batch_as_alone():
    target = tiny_llama(num_hidden_layers=2)
    draft = quantize_draft(target, "int8")
    gen, kept = SpeculativeGenerator(target, draft, num_draft_tokens=3), []
    for lengths in ((7,), (7, 7, 7, 7), (9, 7, 4, 6)):
        prompt = ragged_prompt(lengths)
        got = gen.generate(**prompt, max_new_tokens=24, do_sample=False)
        assert torch.equal(got, target.generate(**prompt, max_new_tokens=24, do_sample=False))
        assert (gen.stats.layout, gen.stats.draft_layout) == ("slots", "slots")
        kept.append(gen.stats.acceptance_rate)
    assert min(kept) > 0.75
