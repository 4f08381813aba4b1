"""The short way to packed kernels: in passes of ours alone, with the bits of the long one."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional

from specdec import SpeculativeGenerator, pack_weights, unpack_weights
from specdec.errors import UnsupportedModel
from specdec.testing import noisy_copy, tiny_llama
from specdec.weights import blocks, direct
from specdec.weights.packed import PackedWeight
from specdec.weights.thin import MOST_ROWS, ThinProducts, is_as_made

from .contract import plain, prompts

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def packed_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 24, bias=False))
    try:
        pack_weights(model)
    except UnsupportedModel:
        pytest.skip("this processor packs no float32")
    return model


@pytest.fixture
def found(monkeypatch):
    """Products that were found through torch's protocol for tensor subclasses."""
    calls, right = [], PackedWeight.__torch_function__

    def watched(cls, func, types, args=(), kwargs=None):
        if func is functional.linear:
            calls.append(func)
        return right(func, types, args, kwargs)

    monkeypatch.setattr(PackedWeight, "__torch_function__", classmethod(watched))
    return calls


def patched(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_same_bits_without_torchs_protocol(found, rows):
    model, states = packed_model(), torch.randn(rows, 32)
    with torch.no_grad():
        usual = model(states)
        assert len(found) == 2
        found.clear()
        with ThinProducts(model).over(rows):
            assert patched(model) == ["0", "1"]
            assert all(map(is_as_made, model))
            assert torch.equal(model(states), usual)
        assert found == []
        assert patched(model) == []
        with ThinProducts(model).over(MOST_ROWS + 1):
            assert patched(model) == [], "a prompt is computing, and a detour does not matter"


def test_unusual_calls_go_the_usual_way(found):
    model = packed_model()
    layer, states = model[0], torch.randn(3, 32)
    dense = layer.weight.dense()
    with ThinProducts(model).over(3):
        learning = states.clone().requires_grad_()
        layer(learning).sum().backward()
        assert torch.allclose(learning.grad, dense.sum(0).expand(3, -1))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(states).dtype == torch.bfloat16
        with torch.no_grad(), pytest.raises(RuntimeError):
            layer(states.double())
        with torch.no_grad():
            assert layer(states[:0]).shape == (0, 16)
            found.clear()
            with ThreadPoolExecutor(1) as pool:  # which has no pass of its own
                assert pool.submit(layer, states).result().shape == (3, 16)
            assert len(found) == 1
            unpack_weights(model)
            assert torch.allclose(layer(states), functional.linear(states, dense, layer.bias), atol=1e-5)


def test_hooks_run_as_ever():
    model, seen = packed_model(), []
    model[1].register_forward_hook(lambda module, given, out: seen.append(tuple(out.shape)) or out + 1)
    with torch.no_grad():
        usual = model(torch.ones(2, 32))
        with ThinProducts(model).over(2):
            assert torch.equal(model(torch.ones(2, 32)), usual)
    assert seen == [(2, 24)] * 2


@onednn
def test_rows_are_filled_up_where_that_is_faster(monkeypatch):
    """And the kernel is given what comes where it is not: no question is asked on the way."""
    model, given = packed_model(), []
    right = blocks.linear
    monkeypatch.setattr(blocks, "linear", lambda states, *rest: given.append(len(states)) or right(states, *rest))
    for module in model:
        module.weight.form.is_large = True
    for times, three in (((0, 1, 2, 4, 4, 5, 6, 7, 8), 4), (tuple(range(9)), 3)):
        monkeypatch.setattr(blocks, "fastest", lambda dtype, threads, times=times: times)
        assert blocks.fills(torch.float32, 8) == (three == 4)
        assert not blocks.fills(torch.float32, 2)
        assert not blocks.fills(torch.float32, 9)
        thin = ThinProducts(model)
        with torch.no_grad():
            for rows in (2, 3, 9):
                given.clear()
                with thin.over(rows):
                    model(torch.ones(rows, 32))
                assert given == [three if rows == 3 else rows] * 2


def test_a_module_changed_by_its_owner_is_left_alone(found):
    model = packed_model()
    model[0].forward = lambda states: torch.zeros(len(states), 16)
    assert not is_as_made(model[0])
    with torch.no_grad(), ThinProducts(model).over(3):
        assert patched(model) == ["0", "1"]
        assert not isinstance(model[0].forward, type(direct.direct(model[1], fills=False)))
        assert model[0](torch.ones(3, 32)).abs().sum() == 0


@pytest.mark.parametrize("batch", [1, 3])
def test_a_call_goes_the_short_way_and_leaves_nothing(found, batch):
    target = tiny_llama()
    draft = noisy_copy(target)
    text = plain(target, prompts(batch), max_new_tokens=12, do_sample=False)
    for model in (target, draft):
        pack_weights(model)
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=3)
    gen.generate(**prompts(batch), max_new_tokens=12, do_sample=False)  # the self-check as well
    found.clear()
    out = gen.generate(**prompts(batch), max_new_tokens=12, do_sample=False)
    assert torch.equal(out, text)
    layers = sum(type(module) is torch.nn.Linear for module in target.modules())
    assert len(found) <= 2 * layers, "the two prompts, and no pass after them"
    assert patched(target) == patched(draft) == []


def test_a_copy_made_within_a_pass_is_a_model_like_any_other():
    model, states = packed_model(), torch.randn(3, 32)
    with torch.no_grad():
        usual = model(states)
        with ThinProducts(model).over(3):
            other = copy.deepcopy(model)
            assert torch.allclose(other(states), usual, atol=1e-5)
        with ThinProducts(other).over(3):
            assert torch.allclose(other(states), usual, atol=1e-5)
        assert torch.allclose(other(states), usual, atol=1e-5)
        assert type(other[0].weight) is torch.nn.Parameter


def test_a_part_that_a_model_compiles_by_itself_calls_back(found):
    model, states = packed_model(), torch.randn(3, 32)
    torch._dynamo.reset()
    part = torch.compile(lambda states: model(states), backend="eager")
    with torch.no_grad():
        usual = model(states)
        with ThinProducts(model).over(3):
            assert torch.allclose(part(states), usual, atol=1e-5)
