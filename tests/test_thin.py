"""Thin products: what a pass of ours multiplies with, and that nothing of it stays behind."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn import functional

from specdec import EarlyExit, SpeculativeGenerator
from specdec.testing import tiny_llama
from specdec.weights import blocks, race, thin
from specdec.weights.filling import real_tokens
from specdec.weights.passing import UNTOLD, Pass, under_way
from specdec.weights.share import shared_copy
from specdec.weights.thin import ThinProducts, product

from .contract import bart, gemma, llama, mamba2, noisy, plain, prompts, qwen3_next, speculative, t5

BATCHES = (1, 3)
WINS = thin.wins
onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def counted(monkeypatch):
    """Every layer is large, and oneDNN's kernel the faster one; (tokens, matrices) of its calls."""
    calls = []

    def kernel(states, weight, bias=None):
        calls.append(states.numel() // states.shape[-1])
        return functional.linear(states.double(), weight.double(), None if bias is None else bias.double()).float()

    monkeypatch.setattr(race, "LEAST", 1)
    monkeypatch.setattr(thin, "wins", lambda weight, rows: weight.dtype == torch.float32)
    monkeypatch.setattr(blocks, "linear", kernel)
    return calls


def patched(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


# --- the kernel ---


@onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2,), (1, 5), (3, 4), (8, 8), (1, 1), (65,)])
def test_product_is_linear(monkeypatch, shape, bias):
    monkeypatch.setattr(thin, "wins", lambda weight, rows: True)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(1024, 512))
    states, added = torch.randn(*shape, 512), torch.randn(1024) if bias else None
    with torch.no_grad():
        for given in (states, states.flip(-1).flip(-1), states.transpose(0, -1).contiguous().transpose(0, -1)):
            usual = functional.linear(given, weight, added)
            torch.testing.assert_close(product(given, weight, added), usual, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("slow", "wins"), [("linear", True), ("onednn", False), ("neither", False)])
def test_the_clearly_faster_kernel_is_taken(monkeypatch, slow, wins):
    plain = functional.linear

    def taking(seconds):
        def kernel(*args):
            time.sleep(seconds)
            return plain(*args)

        return kernel

    monkeypatch.setattr(thin.functional, "linear", taking(0.02 if slow != "onednn" else 0.001))
    monkeypatch.setattr(blocks, "linear", taking(0.02 if slow != "linear" else 0.001))
    assert thin._race(torch.randn(64, 32), 4) is wins


def test_a_size_is_timed_once_a_process(monkeypatch):
    raced = []
    monkeypatch.setattr(thin, "_wins", {})
    monkeypatch.setattr(thin, "_race", lambda weight, rows: raced.append((weight.shape, rows)) or False)
    for shape, rows in (((32, 16), 4), ((16, 32), 4), ((32, 16), 60), ((32, 16), 1), ((32, 16), 1)):
        thin.wins(torch.zeros(shape), rows)
    assert len(raced) == (3 if torch.backends.mkldnn.is_available() else 0)


def test_two_and_three_rows_are_timed_where_four_are_faster(monkeypatch):
    """torch's kernel may be the faster one up to three rows, as on an Intel processor with its own library."""
    raced, fast = [], {(32, 16): {1, 4}, (16, 32): {2, 3, 4}, (8, 8): {2, 3}}
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(thin, "_wins", {})
    monkeypatch.setattr(thin, "_race", lambda at, rows: raced.append(rows) or rows in fast[tuple(at.shape)])
    for shape, wins in fast.items():
        weight = torch.zeros(shape)
        got = {rows for rows in range(1, 9) if thin.wins(weight, rows)}
        assert got == (set() if 4 not in wins else wins | {5, 6, 7, 8})
    assert raced == [1, 4, 2, 3, 1, 4, 2, 3, 1, 4]


def test_nothing_is_timed_in_a_pass(counted, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(thin, "wins", WINS)
    monkeypatch.setattr(thin, "_wins", {})
    raced = []
    monkeypatch.setattr(thin, "_race", lambda weight, rows: raced.append(rows) or rows == 4)
    layer = torch.nn.Linear(8, 8)
    target, draft = ThinProducts(layer), ThinProducts(layer, is_draft=True)
    assert sorted(raced) == [1, 2, 3, 4]
    with torch.no_grad():
        for products in (target, draft):
            for rows in range(1, 8):
                with products.over(rows):
                    assert bool(patched(torch.nn.Sequential(layer))) == (rows >= 4)
                    layer(torch.ones(rows, 8))
    assert counted == [4, 5, 6, 7] * 2
    assert len(raced) == 4


# --- in a call ---


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("make", [llama, gemma, mamba2, qwen3_next, t5, bart])
def test_text_is_plains(counted, make, batch):
    target = make()
    for draft in ("noisy", "ngram"):
        got = speculative(target, draft).generate(**prompts(batch), max_new_tokens=12, do_sample=False)
        assert got.tolist() == plain(target, prompts(batch), max_new_tokens=12).tolist()
    assert 0 < max(counted, default=0) <= thin.MOST_ROWS
    assert patched(target) == []


def test_the_target_a_draft_and_a_part_of_the_target_go_through_it(counted):
    target = tiny_llama(num_hidden_layers=2)
    for draft in (noisy(target), EarlyExit(1)):
        counted.clear()
        gen = SpeculativeGenerator(target, draft, num_draft_tokens=3, layout="slots")
        gen.generate(**prompts(1), max_new_tokens=9, do_sample=False)
        assert set(counted) >= {1, 4}  # a draft's guess; three of them and one
        counted.clear()
        SpeculativeGenerator(target, None).generate(**prompts(1), max_new_tokens=9, do_sample=False)
        assert counted == [], "a token of a single row is plain's, to the bit"
        gen.generate(**prompts(3), max_new_tokens=9, do_sample=False)
        assert 3 in counted


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"do_sample": True, "seed": 3}], ids=["greedy", "coupled"]
)
def test_bits_that_only_a_draft_sees_change_no_text(counted, monkeypatch, options, batch):
    """Single rows come out wrong by far in the other kernel: the target's must never have been there."""
    right, texts, wrong = blocks.linear, [], []

    def kernel(states, weight, bias=None):
        out = right(states, weight, bias)
        if states.numel() != states.shape[-1]:
            return out
        wrong.append(1)
        return out + 3 * torch.randn(out.shape, generator=torch.Generator().manual_seed(len(wrong)))

    for single in (right, kernel):
        monkeypatch.setattr(blocks, "linear", single)
        target = tiny_llama(num_hidden_layers=2)
        gen = SpeculativeGenerator(target, noisy(target), num_draft_tokens=3, verification="coupled")
        texts.append(gen.generate(**prompts(batch), max_new_tokens=12, **options).tolist())
    assert texts[0] == texts[1]
    assert bool(wrong) == (batch == 1)


def test_what_only_fills_up_is_left_out(counted, monkeypatch):
    monkeypatch.setattr("specdec.weights.filling.READING", 1)
    monkeypatch.setattr("specdec.weights.filling.MOVING", 1)
    gen = SpeculativeGenerator(llama(), "ngram", num_draft_tokens=4, layout="slots")
    inputs = prompts(3)
    got = gen.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert got.tolist() == plain(llama(), inputs, max_new_tokens=24).tolist()
    rectangles = {3 * width for width in range(1, 6)}
    assert set(counted) - rectangles, "some pass was ragged and computed no more than its tokens"


def test_nothing_stays_after_an_exception(counted):
    target = llama()

    def stumble(ids, scores):
        if ids.shape[1] > 11:
            raise KeyError("in the middle")
        return scores

    with pytest.raises(KeyError):
        speculative(target, "ngram").generate(
            **prompts(1), max_new_tokens=9, do_sample=False, logits_processor=[stumble]
        )
    handle = target.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("in a pass")))
    with pytest.raises(KeyError):
        speculative(target, "ngram").generate(**prompts(3), max_new_tokens=9, do_sample=False)
    handle.remove()
    assert patched(target) == []


def test_overlapping_passes_leave_nothing(counted):
    model = copy.deepcopy(llama())
    one, other = ThinProducts(model).over(4), ThinProducts(model).over(4)
    with ThreadPoolExecutor(1) as pool:
        with one:
            pool.submit(other.__enter__).result()
        pool.submit(other.__exit__).result()
        assert patched(model) == []
        pool.submit(other.__enter__).result()
        with one:
            assert patched(model)
            pool.submit(other.__exit__).result()
    assert patched(model) == []


def test_a_pass_is_none_of_another_threads(counted):
    layer, states = torch.nn.Linear(8, 8), torch.randn(3, 8)

    @torch.no_grad()
    def beside():
        return layer(states), len(ThinProducts(layer).over(3)._layers)

    with ThinProducts(layer).over(3):
        with ThreadPoolExecutor(1) as pool:
            got, layers = pool.submit(beside).result()
        assert counted == []
        assert torch.equal(got, functional.linear(states, layer.weight, layer.bias))
        assert layers == 1
        beside()
    assert counted == [3]


def test_a_draft_can_be_made_while_another_thread_has_a_pass(counted):
    model = llama()
    with ThinProducts(model).over(4):
        draft = shared_copy(model, {})
    assert patched(draft) == patched(model) == []
    assert plain(draft, prompts(1)).equal(plain(model, prompts(1)))


def test_a_single_row_goes_the_faster_way_in_a_pass_of_a_draft_only(counted):
    """Whatever pass has just been: to a target its bits are owed."""
    layer, row = torch.nn.Linear(8, 8), torch.ones(1, 1, 8)
    target, draft = ThinProducts(layer), ThinProducts(layer, is_draft=True)
    with torch.no_grad():
        for tokens in (1, 4):
            with draft.over(tokens):
                assert blocks.drafting()
                layer(row)
            assert not blocks.drafting()
            assert counted == [1]
            with target.over(tokens):
                assert torch.equal(layer(row), functional.linear(row, layer.weight, layer.bias))
            assert counted == [1]
            counted.clear()


def test_layers_are_told_only_what_one_of_them_asks():
    plain = ThinProducts(torch.nn.Linear(8, 8).bfloat16(), is_draft=True)
    assert plain.over(1) is plain.over(4) is plain.compiled() is UNTOLD
    packed = torch.nn.Linear(8, 8).bfloat16()
    packed.weight = torch.nn.Parameter(packed.weight.as_subclass(Own))
    target, draft = (ThinProducts(torch.nn.Sequential(packed), is_draft=is_draft) for is_draft in (False, True))
    assert target.over(1) is target.over(4) is target.compiled() is UNTOLD
    for told in (draft.over(1), draft.over(4), draft.over(65), draft.compiled()):
        with told:
            assert blocks.drafting()
    with plain.over(4, by_groups=True) as passing:
        assert passing.masks == {}
        assert not blocks.drafting()


def test_a_pass_within_another_hears_nothing_of_it():
    inner = ThinProducts(torch.nn.Linear(8, 8).bfloat16())
    real = real_tokens(np.array([8, 1]), 8, np.array([True, True]))
    with Pass(of_draft=True, real=real, by_groups=True) as outer:
        with inner.over(1) as passing:
            assert under_way() is passing
            assert (passing.of_draft, passing.real, passing.masks) == (False, None, None)
        with inner.compiled():
            assert not blocks.drafting()
        assert under_way() is outer
    assert under_way() is None


def test_hooks_run_as_ever(counted):
    target, seen = copy.deepcopy(llama()), []
    target.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[:2].numel()))
    speculative(target, "ngram").generate(**prompts(1), max_new_tokens=9, do_sample=False)
    assert 4 in seen


def test_a_forward_of_the_users_is_left_alone(counted):
    target = copy.deepcopy(llama())
    head, asked = target.lm_head, []
    own = lambda input: (asked.append(1), functional.linear(input, head.weight))[1]  # noqa: E731
    head.forward = own
    speculative(target, "ngram").generate(**prompts(1), max_new_tokens=9, do_sample=False)
    assert asked
    assert head.forward is own


def test_a_forward_that_is_put_there_during_a_pass_stays(counted):
    layer, own = torch.nn.Linear(8, 8), lambda input: input
    with ThinProducts(layer).over(3):
        layer.forward = own
    assert layer.forward is own


def test_a_forward_that_is_put_there_between_passes_stays_and_is_asked(counted):
    layer, own = torch.nn.Linear(8, 8), lambda input: input
    products, states = ThinProducts(layer), torch.ones(3, 8)
    layer.forward = own
    with products.over(3):
        assert layer(states) is states
    assert layer.forward is own


@pytest.mark.parametrize("by", ["the model", "its forward"])
def test_compiled_models_keep_their_graphs(counted, by):
    target = copy.deepcopy(llama())
    if by == "the model":
        target.compile(backend="eager")
    else:
        target.forward = torch.compile(target.forward, backend="eager")
    before = patched(target)
    with ThinProducts(target).over(4):
        assert patched(target) == before


class Own(torch.Tensor):
    """What may multiply in a way of its own."""


def test_gradients_and_other_kinds_of_tensors_go_the_usual_way(counted):
    layer = torch.nn.Linear(8, 8)
    with ThinProducts(layer).over(3):
        layer(torch.randn(3, 8)).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(3, 8)).dtype == torch.bfloat16
        with torch.no_grad(), pytest.raises(RuntimeError):
            layer(torch.randn(3, 8).bfloat16())
        with torch.no_grad():
            assert type(layer(torch.randn(3, 8).as_subclass(Own))) is Own
    assert counted == []
    assert layer.weight.grad is not None


def test_other_dtypes_only_leave_out_filling(counted, monkeypatch):
    monkeypatch.setattr("specdec.weights.filling.READING", 1)
    monkeypatch.setattr("specdec.weights.filling.MOVING", 1)
    multiplied = []

    def counting(states, *rest, linear=functional.linear):
        multiplied.append(states.shape[:-1].numel())
        return linear(states, *rest)

    monkeypatch.setattr(functional, "linear", counting)
    layer = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    model, states = torch.nn.Sequential(layer), torch.randn(2, 3, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        for fed in ([3, 3], [3, 1]):
            with ThinProducts(model).over(6, real_tokens(np.array(fed), 3, np.array([True, True]))):
                assert bool(patched(model)) == (fed == [3, 1])
                layer(states)
    assert counted == []
    assert multiplied == [6, 4]
