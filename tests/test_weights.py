"""Packed weights change nothing; quantised and pruned drafts are just drafts; the given models stay as they are."""

import copy
import pickle
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch.nn import Linear, functional
from transformers import Mamba2Config, Mamba2ForCausalLM

import specdec.weights.packed as packed
from specdec import (
    DraftModel,
    InvalidInput,
    SpeculativeGenerator,
    UnsupportedModel,
    pack_weights,
    prune_head,
    quantize_draft,
    unpack_weights,
)
from specdec.demo.contestants import Contest
from specdec.proposers.past import opening
from specdec.testing import TableModel, assert_lossless, lively, noisy_copy, ragged_prompt, tiny_llama
from specdec.weights import blocks, half, integer, quantized
from specdec.weights.packed import PackedWeight
from specdec.weights.passing import Pass
from specdec.weights.quantized import all_alike

from .contract import assert_untouched, bart, fingerprint, mamba2, t5

GREEDY = {"max_new_tokens": 12, "do_sample": False}
FORMS = {
    "int8": lambda model: quantize_draft(model, "int8", keep=False),
    "int8 and its own": lambda model: quantize_draft(model, "int8"),
    "int4": lambda model: quantize_draft(model, "int4"),
    "int4 alone": lambda model: quantize_draft(model, "int4", keep=False),
    "pruned": lambda model: prune_head(model, [3, 3, 7, 7, 7, 9], 32),
    "pruned int4": lambda model: quantize_draft(prune_head(model, [], 32), "int4", keep=False),
}


def linears(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def plain(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(states, others):
    return states.keys() == others.keys() and all(torch.equal(states[name], others[name]) for name in states)


# --- packed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_packing_is_reversible_and_keeps_the_text(dtype, tied):
    model = tiny_llama(dtype=dtype, tie_word_embeddings=tied)
    if not packed.packable(model.lm_head.weight):
        pytest.skip(f"{dtype} is not packed on this processor: nothing would be faster")
    inputs, before, untouched = ragged_prompt(), plain(model), fingerprint(model)
    parameters = {name: id(value) for name, value in model.named_parameters()}
    head = model.lm_head.weight if tied else None
    text = model.generate(**inputs, **GREEDY)
    gen = SpeculativeGenerator(model, tiny_llama(seed=0, dtype=dtype), num_draft_tokens=3)
    ours = gen.generate(**inputs, **GREEDY)
    assert dtype != torch.float32 or torch.equal(ours, text)  # tiny models in 16 bits have exact ties
    handle = pack_weights(model)
    assert handle.layers == len(linears(model)) == 15
    assert all(isinstance(module.weight, PackedWeight) for module in linears(model))
    assert handle.packed_bytes == sum(module.weight.nbytes for module in linears(model))
    assert handle.doubled_bytes == (head.nbytes if tied else 0)
    # torch's float16 adds up in an order of its own, which differs between processors
    assert dtype == torch.float16 or torch.equal(model.generate(**inputs, **GREEDY), text)
    assert dtype == torch.float16 or torch.equal(gen.generate(**inputs, **GREEDY), ours)
    assert gen.stats.drafted > 0
    assert model.dtype == dtype
    assert model.device.type == "cpu"
    assert model.num_parameters() == tiny_llama(dtype=dtype, tie_word_embeddings=tied).num_parameters() + (
        handle.doubled_bytes // before["lm_head.weight"].element_size()
    )
    assert same(model.state_dict(), before)
    handle.unpack()
    assert {type(module.weight) for module in linears(model)} == {torch.nn.Parameter}
    assert_untouched(model, untouched)
    assert head is None or model.lm_head.weight is model.model.embed_tokens.weight is head
    assert parameters.keys() == dict(model.named_parameters()).keys()


def test_scores_are_those_of_the_plain_weights():
    model, inputs = tiny_llama(), ragged_prompt()
    with torch.no_grad():
        wanted = model(**inputs).logits
        with pack_weights(model):
            torch.testing.assert_close(model(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)


def test_only_plain_linear_layers_are_packed():
    class Adapter(Linear):
        pass

    model = torch.nn.Sequential(Linear(32, 32), Adapter(32, 32), torch.nn.Embedding(4, 32), Linear(32, 32).double())
    assert pack_weights(model).layers == 1
    assert not isinstance(model[1].weight, PackedWeight)
    with pytest.raises(UnsupportedModel, match="no linear layer that can be packed"):
        pack_weights(model[1:])


def test_a_weight_without_numbers_stays_as_it_is():
    model = torch.nn.Sequential(Linear(32, 32), Linear(32, 32))
    model[0].weight = torch.nn.Parameter(torch.empty(0, 32))
    with pack_weights(model) as packing:
        assert packing.layers == 1
        assert type(model[0].weight) is torch.nn.Parameter


def test_packing_twice_leaves_what_is_packed():
    model = torch.nn.Sequential(Linear(32, 32), Linear(32, 32))
    with pack_weights(model), pytest.raises(UnsupportedModel):
        pack_weights(model)
    assert type(model[0].weight) is torch.nn.Parameter


def test_unpacked_weights_learn_again():
    model = tiny_llama(num_hidden_layers=1).requires_grad_()
    ids = torch.arange(1, 9)[None]
    with torch.inference_mode(), pack_weights(model):
        model(ids)
    model(ids, labels=ids).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_shared_weights_stay_shared():
    model = torch.nn.Sequential(Linear(32, 32), Linear(32, 32), Linear(32, 32))
    model[2].weight = model[0].weight
    before = plain(model)
    handle = pack_weights(model)
    assert handle.layers == 2
    assert handle.doubled_bytes == 0
    assert model[2].weight is model[0].weight
    handle.unpack()
    assert model[2].weight is model[0].weight
    assert same(plain(model), before)


def test_weights_of_one_number_are_not_taken_for_one(monkeypatch):
    """What is packed is let go of, and the next weight may get its place in memory, and with it its number."""
    model = torch.nn.Sequential(Linear(32, 32), Linear(32, 32), Linear(32, 32))
    before = plain(model)
    with monkeypatch.context() as patched:
        patched.setattr(packed, "id", lambda one: 7, raising=False)
        handle = pack_weights(model)
    assert handle.layers == 3
    assert same(plain(model), before)


@pytest.mark.parametrize("fault", [MemoryError, KeyboardInterrupt])
def test_packing_that_breaks_off_leaves_the_model_as_it_was(monkeypatch, fault):
    model = torch.nn.Sequential(Linear(32, 32), Linear(32, 32))
    before, forms = plain(model), []
    right = packed._form

    def form(weight):
        forms.append(1)
        if len(forms) == 2:
            raise fault
        return right(weight)

    monkeypatch.setattr(packed, "_form", form)
    with pytest.raises(fault):
        pack_weights(model)
    assert {type(weight) for weight in model.parameters()} == {torch.nn.Parameter}
    assert same(plain(model), before)


def test_weights_learn_again_as_they_did():
    model = torch.nn.Sequential(Linear(32, 16), Linear(16, 16).requires_grad_(False))
    with pack_weights(model):
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for one in (model, *copies):
        assert [weight.requires_grad for weight in one.parameters()] == [True, True, False, False]


def test_a_conversion_that_packed_weights_refuse_says_how_to_go_on():
    model = torch.nn.Sequential(torch.nn.LayerNorm(32), Linear(32, 16))
    pack_weights(model)
    with pytest.raises(UnsupportedModel, match=r"before this weight has been: unpack, and convert again"):
        model.double()
    assert {weight.dtype for weight in model.parameters()} == {torch.float32, torch.float64}
    unpack_weights(model)
    assert {weight.dtype for weight in model.double().parameters()} == {torch.float64}


def test_packed_weights_refuse_to_be_written_and_read_as_plain():
    model = torch.nn.Sequential(Linear(32, 16))
    before = plain(model)
    weight = model[0].weight.detach().clone()
    with pack_weights(model):
        for write in (
            lambda: model.load_state_dict(before),
            lambda: model.half(),
            lambda: model[0].weight.copy_(weight),
            lambda: setattr(model[0].weight, "data", weight),
            lambda: model[0].weight.add_(1),
            lambda: model[0].weight.__setitem__(0, 1.0),
            lambda: torch.add(weight, 1, out=model[0].weight),
            lambda: torch._foreach_add_([model[0].weight], 1.0),
        ):
            with torch.no_grad(), pytest.raises((UnsupportedModel, RuntimeError), match=r"packed|dimensions"):
                write()
        assert model.to("cpu") is model
        assert torch.equal(model[0].weight.T @ torch.eye(16), weight.T)
        assert torch.equal(torch.zeros(16, 32).copy_(model[0].weight), weight)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(copied[0].weight) is torch.nn.Parameter
            assert same(plain(copied), before)
    assert same(plain(model), before)


def test_copies_of_a_packed_model_are_tied_as_it_is():
    model = tiny_llama(tie_word_embeddings=True)
    before = plain(model)
    with pack_weights(model):
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for one in copies:
        assert one.lm_head.weight is one.model.embed_tokens.weight is not model.lm_head.weight
        assert same(plain(one), before)


def test_memory_that_a_packed_weight_has_not_is_not_reached_for():
    """A process of its own: torch would end it."""
    code = """
import torch
from specdec import UnsupportedModel, pack_weights
model = torch.nn.Sequential(torch.nn.Linear(32, 16))
weight = model[0].weight.detach().clone()
with pack_weights(model):
    assert torch.equal(torch.from_dlpack(model[0].weight), weight)
    try:
        model.share_memory()
    except UnsupportedModel:
        print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "refused", done.stderr


def test_what_the_kernel_cannot_compute_goes_through_the_plain_matrix():
    layer = torch.nn.Sequential(Linear(32, 16))
    states = torch.randn(3, 32)
    wanted = torch.autograd.functional.jacobian(layer, states)
    with pack_weights(layer):
        assert torch.allclose(torch.autograd.functional.jacobian(layer, states), wanted)
        assert layer(torch.zeros(0, 32)).shape == (0, 16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(states).dtype == torch.bfloat16
        with torch.no_grad():
            slanted = torch.randn(2, 32, 5).transpose(1, 2)  # not contiguous
            torch.testing.assert_close(layer(slanted), layer(slanted.contiguous()))


def test_nothing_is_left_packed_after_an_exception(monkeypatch):
    model = tiny_llama()
    before = plain(model)
    with pytest.raises(KeyError), pack_weights(model):
        raise KeyError
    assert not any(isinstance(module.weight, PackedWeight) for module in linears(model))
    right, calls = packed._put, []

    def fails(module, weight):
        calls.append(module)
        if len(calls) == 4:
            raise MemoryError
        right(module, weight)

    monkeypatch.setattr(packed, "_put", fails)
    with pytest.raises(MemoryError):
        pack_weights(model)
    unpack_weights(model)
    assert not any(isinstance(module.weight, PackedWeight) for module in linears(model))
    assert same(plain(model), before)


@pytest.fixture
def every_matrix_is_large(monkeypatch):
    monkeypatch.setattr(packed, "LEAST", 1)


@pytest.mark.usefixtures("every_matrix_is_large")
def test_float32_stays_plain_where_packing_would_cost_time(monkeypatch):
    model = torch.nn.Sequential(Linear(32, 16), Linear(16, 16), Linear(16, 8).bfloat16())
    mixed = packed.packable(model[2].weight)
    monkeypatch.setattr(blocks, "pays", lambda dtype, threads: False)
    with pytest.warns(UserWarning, match="leaves the float32 weights of Sequential as they are"):
        handle = pack_weights(model)
    assert handle.layers == mixed
    assert [isinstance(part.weight, PackedWeight) for part in model] == [False, False, mixed]
    handle.unpack()
    with pytest.warns(UserWarning, match="Use it as it is"), pack_weights(model[:2]) as handle:
        assert handle.layers == handle.packed_bytes == 0
    monkeypatch.setattr(blocks, "pays", lambda dtype, threads: True)
    with pack_weights(model) as handle:
        assert handle.layers == 2 + mixed


def test_nobody_asks_whether_packing_pays_for_small_matrices_or_other_dtypes(monkeypatch):
    monkeypatch.setattr(blocks, "pays", lambda dtype, threads: pytest.fail("timed"))
    assert pack_weights(torch.nn.Sequential(Linear(32, 16))).layers == 1
    monkeypatch.setattr(packed, "LEAST", 1)
    model = torch.nn.Sequential(Linear(32, 16)).bfloat16()
    if packed.packable(model[0].weight):
        assert pack_weights(model).layers == 1


@pytest.mark.parametrize(
    ("milliseconds", "pays"),
    [
        ({1: (8, 8, 4), 5: (8, 8, 4)}, True),
        ({1: (8, 8, 4), 5: (12, 6, 6)}, True),
        ({1: (4, 4, 4), 5: (12, 6, 6)}, False),  # nothing gained
        ({1: (4, 5, 6), 5: (12, 6, 4)}, False),  # a single row is the slower for it
        ({1: (8, 8, 4), 5: (12, 3, 6)}, False),  # as are five, beside the way that plain ones go
        ({1: (8, 4, 6), 5: (6, 6, 6)}, True),  # plain's single row is torch's own
    ],
)
def test_packing_pays_where_it_gains_and_nothing_loses(monkeypatch, milliseconds, pays):
    def seconds(ways):
        asked = [(way.args[0].shape[0], way.func) for way in ways]
        rows = asked[0][0]
        assert asked == [(rows, functional.linear), (rows, blocks.linear), (rows, blocks.linear)]
        return milliseconds[rows]

    monkeypatch.setattr(blocks, "seconds", seconds)
    monkeypatch.setattr(blocks, "TRIED", (16, 8))
    monkeypatch.setattr(blocks, "reorder", lambda weight: weight)
    assert blocks.pays.__wrapped__(torch.float32, 1) is pays


@pytest.mark.usefixtures("every_matrix_is_large")
def test_the_demo_shows_nothing_packed_where_nothing_is(monkeypatch):
    monkeypatch.setattr(blocks, "pays", lambda dtype, threads: False)
    with pytest.raises(UnsupportedModel, match="plain ones are as fast"):
        Contest(torch.nn.Linear(4, 4), "ngram", None, 4).packed({})


# --- half precision --------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor compiles with g++ or clang++"
)
needs_half = pytest.mark.skipif(
    not half.available(), reason="this processor or this torch has no half-precision kernels"
)


@needs_half
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_matrices_give_every_bit_back_and_add_up_in_float32(dtype):
    weight = (torch.randn(48, 64) / 40).to(dtype)
    weight[0, :4] = torch.tensor([-0.0, 1e-7, 3e-12, -2e-30]).to(dtype)
    matrix = half.HalfMatrix.of(weight)
    back = matrix.dense()
    assert torch.equal(back, weight)
    assert torch.equal(back.signbit(), weight.signbit())
    states, bias = torch.randn(2, 3, 64, dtype=dtype), torch.randn(48, dtype=dtype)
    exact = (states.double() @ weight.double().T + bias.double()).to(dtype)
    got = matrix.linear(states, bias)
    # as near as one rounding: sums in 16 bits would be off by several steps in some of 288 places
    assert ((got - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()
    assert torch.equal(matrix.linear(states[:1], None), matrix.linear(states, None)[:1])


@needs_half
@pytest.mark.parametrize("odd", [torch.inf, torch.nan, 1e8])
def test_a_matrix_without_a_place_in_float16_stays_as_it_is(monkeypatch, odd):
    model = torch.nn.Sequential(Linear(32, 16), Linear(16, 16)).bfloat16()
    with torch.no_grad():
        model[0].weight.mul_(1e-4)[3, 3] = odd
    assert half.HalfMatrix.of(model[0].weight) is None
    monkeypatch.setattr(packed, "_blocks", lambda dtype: False)
    with pack_weights(model) as packing:
        assert packing.layers == 1
        assert type(model[0].weight) is torch.nn.Parameter
    assert half.HalfMatrix.of(torch.zeros(4, 4, dtype=torch.bfloat16)).dense().eq(0).all()


@pytest.mark.parametrize("form", ["chosen", pytest.param("half", marks=needs_half)])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_packed_layers_in_graphs(monkeypatch, backend, form):
    """Inductor has a lowering of its own for oneDNN's product, which takes only what it has packed itself."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(Linear(32, 16), Linear(16, 24, bias=False))
    if form == "half":
        model.bfloat16()
        monkeypatch.setattr(packed, "_blocks", lambda dtype: False)
    states = torch.randn(3, 32, dtype=model[0].weight.dtype)
    kind = half.HalfMatrix if form == "half" else blocks.Blocked
    calls, right = [], kind.linear
    monkeypatch.setattr(kind, "linear", lambda *args: calls.append(1) or right(*args))
    with torch.no_grad(), pack_weights(model) as packing:
        assert packing.layers == 2
        graph = torch.compile(lambda states: model(states), fullgraph=True, backend=backend)
        assert torch.equal(graph(states), model(states))
        calls.clear()
        again = graph(states + 1)
        assert len(calls) == 2, "the packed matrices, and not the plain ones"
        assert torch.equal(again, model(states + 1))
        number = model[0].weight.form.number
        assert torch.equal(
            packed.graphs.packed_linear(states, None, number, 16), right(model[0].weight.form, states, None)
        )
    del graph
    with pytest.raises(UnsupportedModel, match="compile it again"):
        packed.graphs.packed_linear(states, None, 10**9, 16)


# --- full blocks -----------------------------------------------------------------------------------


@pytest.fixture
def in_sixes(monkeypatch):
    """Every matrix is large, and one or two rows are fastest among six; the rows of the kernel's calls."""
    calls, right = [], blocks.linear

    def kernel(states, packed, bias=None):
        calls.append(states.numel() // states.shape[-1])
        return right(states, packed, bias)

    monkeypatch.setattr(blocks, "LEAST", 1)
    monkeypatch.setattr(blocks, "fastest", lambda dtype, threads: (0, 6, 6, 3, 4, 5, 6, 7, 8))
    monkeypatch.setattr(blocks, "linear", kernel)
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2,), (1, 2), (1, 5), (2, 1), (9,), (3, 4)])
def test_blocks_are_filled_up_and_nobody_sees_it(in_sixes, shape, bias):
    torch.manual_seed(0)
    layer = Linear(32, 16, bias=bias)
    states = torch.randn(*shape, 32)
    rows = states[..., 0].numel()
    with torch.no_grad():
        usual = layer(states)
        with pack_weights(layer):
            for drafting in (False, True):
                in_sixes.clear()
                with Pass(of_draft=True) if drafting else nullcontext():
                    got = layer(states)
                assert in_sixes == [6 if rows == 2 or (rows == 1 and drafting) else rows]
                torch.testing.assert_close(got, usual)
                assert got.untyped_storage().nbytes() == got.nbytes, "who keeps it keeps no more"
    assert not blocks.drafting()


def test_only_a_drafts_single_rows_are_filled_up(in_sixes, monkeypatch):
    monkeypatch.setattr(blocks, "fastest", lambda dtype, threads: (0, 6, 2, 3, 4, 5, 6, 7, 8))
    target, inputs = tiny_llama(num_hidden_layers=2), ragged_prompt((7,))
    draft = noisy_copy(target, 0.1)
    text = target.generate(**inputs, **GREEDY)
    for model, draft_tokens, filled in ((target, 0, False), (target, 3, False), (draft, 3, True)):
        in_sixes.clear()
        with pack_weights(model):
            gen = SpeculativeGenerator(target, draft, num_draft_tokens=draft_tokens)
            assert torch.equal(gen.generate(**inputs, **GREEDY), text)
        assert (6 in in_sixes) == filled
        assert (in_sixes.count(1) <= 1) == filled, "the prompt's last row is a single one, too"


def test_a_draft_of_one_thread_is_none_of_another():
    with Pass(of_draft=True), ThreadPoolExecutor(1) as pool:
        assert blocks.drafting()
        assert not pool.submit(blocks.drafting).result()


@pytest.mark.parametrize("best", [6, 3, 1])
def test_what_is_clearly_faster_is_taken(monkeypatch, best):
    times = {rows: [2.0, 1.9, 1.7, 1.3, 1.2, 1.1, 1.6, 2.0][rows - 1] for rows in range(1, 9)}
    times[best] = 1.0
    monkeypatch.setattr(blocks, "seconds", lambda ways: [times[len(way.args[0])] for way in ways])
    monkeypatch.setattr(blocks, "TRIED", (8, 8))
    full = blocks.fastest.__wrapped__(torch.float32, 1)
    assert full == (0, *[best if rows < best and times[rows] > 1 / 0.9 else rows for rows in range(1, 9)])


def test_without_them_sixteen_bits_are_packed_only_where_the_processor_computes_in_them(monkeypatch):
    monkeypatch.setattr(half, "available", lambda: False)
    for dtype, packs in ((torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported()), (torch.float16, False)):
        assert packed.packable(Linear(8, 8, dtype=dtype).weight) == packs


# --- quantised -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "levels"), [("int8", 254), ("int4", 15)])
def test_quantised_weights_are_within_half_a_step(kind, levels, dtype):
    layer = Linear(64, 48, dtype=dtype)
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(0.1, 3, 64)).add_(0.2)
        model = tiny_llama(hidden_size=64, vocabulary=48, dtype=dtype)
        model.lm_head = layer
        head = quantize_draft(model, kind, keep=False).lm_head
        got = torch.cat([head(row[None]) for row in torch.eye(64, dtype=dtype)]).float() - layer.bias.float()
    weight = layer.weight.detach().float().T
    groups = weight.T.view(48, -1, 32 if kind == "int4" else 64)
    spread = groups.amax(2) - groups.amin(2) if kind == "int4" else 2 * groups.abs().amax(2)
    step = (spread / levels).repeat_interleave(groups.shape[2], 1).T
    rounding = 2**-7 * (weight.abs() + layer.bias.abs().max())  # the kernels give bfloat16
    assert ((got - weight).abs() <= step / 2 + rounding).all()
    assert (got - weight).abs().max() > 0


def test_what_a_draft_will_cost_is_known_from_its_weights():
    target = tiny_llama(hidden_size=64, vocabulary=48, dtype=torch.bfloat16)
    assert opening(target, target) == (1.0, 1.0)
    for kind, share in (("int8", 0.5), ("int4", 0.25)):
        for keep in (False, True):
            work, reading = opening(quantize_draft(target, kind, keep=keep), target)
            assert work == 1.0
            assert share <= reading < share + 0.15  # scales, and layers that stay as they are
    smaller = opening(tiny_llama(hidden_size=32, vocabulary=48, dtype=torch.bfloat16), target)
    assert 0.2 < smaller.work <= 0.5
    assert 0.2 < smaller.reading <= 0.5


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_models_that_take_the_matrix_out_of_its_layer(kind, keep):
    """Routers multiply with ``layer.weight`` on their own; 13 of 295 architectures do so somewhere."""
    model = tiny_llama(hidden_size=64, vocabulary=48)
    layer = quantize_draft(model, kind, keep=keep).model.layers[0].mlp.up_proj
    row = torch.randn(1, 64)
    with torch.no_grad():
        if keep:
            assert layer.weight is model.model.layers[0].mlp.up_proj.weight
        else:
            torch.testing.assert_close(functional.linear(row, layer.weight), layer(row), atol=0.02, rtol=0.02)
    size = {
        "hidden_size": 32,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 1,
        "num_hidden_layers": 2,
    }
    target = lively(Mamba2ForCausalLM(Mamba2Config(vocab_size=64, expand=2, pad_token_id=0, **size)).eval())
    prompt = ragged_prompt((7,))
    gen = SpeculativeGenerator(target, quantize_draft(target, kind, keep=keep), num_draft_tokens=3)
    got = gen.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(got, target.generate(**prompt, max_new_tokens=12, do_sample=False))
    assert gen.stats.accepted > 0


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_for_wide_passes_do_not_fail_a_draft_in_its_self_check(kind):
    """Three columns of four rows are a wide pass, the steps that they are compared with narrow ones."""
    target, prompt = tiny_llama(num_hidden_layers=4), ragged_prompt((9, 6, 4, 8))
    gen = SpeculativeGenerator(target, quantize_draft(target, kind), num_draft_tokens=4)
    for _ in range(2):
        got = gen.generate(**prompt, **GREEDY)
        assert torch.equal(got, target.generate(**prompt, **GREEDY))
        assert gen.stats.draft_layout == "slots"
    # where nothing is compared the wide passes go through the weights given
    states = torch.randn(8, target.config.hidden_size)
    draft = quantize_draft(target, kind)
    assert torch.equal(draft.lm_head(states), target.lm_head(states))


def test_a_draft_shares_all_but_linear_weights_and_leaves_the_model_alone():
    model = tiny_llama(tie_word_embeddings=True)
    before = fingerprint(model)
    for make in FORMS.values():
        draft = make(model)
        assert type(draft) is type(model)
        assert draft.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert draft.model.norm.weight.data_ptr() == model.model.norm.weight.data_ptr()
        own = dict(model.named_buffers())
        assert own
        assert all(buffer is own[name] for name, buffer in draft.named_buffers() if name in own)
        draft.config.pad_token_id = 5
        draft.generation_config.pad_token_id = 5
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draft.model.embed_tokens.half()
        assert_untouched(model, before)


def test_a_quantised_draft_stays_where_it_is():
    draft = quantize_draft(tiny_llama(), "int4")
    assert draft.to(torch.float32) is draft
    for move in (lambda: draft.bfloat16(), lambda: draft.to("meta")):
        with pytest.raises(UnsupportedModel, match=r"stays in torch\.float32 on cpu"):
            move()


def test_wide_passes_go_through_the_given_weights():
    model = tiny_llama()
    states = torch.randn(2, 16, 32)
    with torch.no_grad():
        wanted = model.lm_head(states)
        with pack_weights(model):
            draft = quantize_draft(model, "int4")
            torch.testing.assert_close(draft.lm_head(states), wanted)
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # without these instructions only packed ones are faster
            assert torch.equal(quantize_draft(model, "int4").lm_head(states), wanted)
        assert not torch.equal(quantize_draft(model, "int4", keep=False).lm_head(states), wanted)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_which_weights_are_faster_is_the_processors_doing(monkeypatch, kind):
    """Without instructions for bfloat16 plain matrices never are the faster ones, packed ones soon."""
    monkeypatch.setattr(integer, "available", lambda: False)
    model = tiny_llama(num_hidden_layers=1)
    with torch.no_grad():
        for multiplies, packs, tokens, given in (
            (True, False, 1, False), (True, False, 8, True), (True, True, 3, False),
            (False, False, 8, False), (False, True, 2, False), (False, True, 3, True),
        ):  # fmt: skip
            monkeypatch.setattr(quantized, "MULTIPLIES_BFLOAT16", multiplies)
            with pack_weights(model) if packs else nullcontext():
                states = torch.randn(tokens, 32)
                wanted = model if given else quantize_draft(model, kind, keep=False)
                assert torch.equal(quantize_draft(model, kind).lm_head(states), wanted.lm_head(states))


def test_a_self_check_in_one_thread_leaves_wide_passes_in_another_alone():
    draft, states = quantize_draft(tiny_llama(), "int4"), torch.randn(8, 32)
    with ThreadPoolExecutor(1) as other, torch.no_grad():
        wanted = draft.lm_head(states)
        with all_alike():
            assert not torch.equal(draft.lm_head(states), wanted)
            assert torch.equal(other.submit(draft.lm_head, states).result(), wanted)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_matrix_is_quantised_in_parts_as_in_one(monkeypatch, kind):
    model, states = tiny_llama(), torch.randn(1, 32)
    with torch.no_grad():
        whole = quantize_draft(model, kind, keep=False).lm_head(states)
        monkeypatch.setattr(quantized, "ROWS", 24)
        assert torch.equal(quantize_draft(model, kind, keep=False).lm_head(states), whole)


def test_sizes_that_the_kernel_refuses_stay_as_they_are():
    model = tiny_llama(vocabulary=50)
    draft = quantize_draft(model, "int4")
    assert type(draft.lm_head) is Linear
    assert type(draft.model.layers[0].mlp.up_proj) is not Linear
    assert type(quantize_draft(model, "int8").lm_head) is not Linear
    # torch's kernel would read past the end of such rows, and be wrong or crash
    model.lm_head = Linear(20, 50)
    assert type(quantize_draft(model, "int8").lm_head) is Linear
    model.lm_head = Linear(48, 64)
    assert type(quantize_draft(model, "int4").lm_head) is Linear


def test_a_layer_that_may_compute_something_else_stays_as_it_is():
    class Adapter(Linear):
        pass

    model = tiny_llama()
    model.lm_head = Adapter(32, 64)
    assert type(quantize_draft(model, "int8").lm_head) is Adapter


def test_a_draft_with_layers_of_its_own_is_not_saved_as_a_plain_model(tmp_path):
    model = tiny_llama()
    for draft in (quantize_draft(model, "int8"), prune_head(model, [], 16)):
        for one in (draft, copy.deepcopy(draft)):
            with pytest.raises(UnsupportedModel, match="make the draft anew"):
                one.save_pretrained(tmp_path)
        torch.save(draft, tmp_path / "draft")
        again = torch.load(tmp_path / "draft", weights_only=False)
        ids = torch.arange(1, 9)[None]
        with torch.no_grad():
            assert torch.equal(again(ids).logits, draft(ids).logits)
    model.save_pretrained(tmp_path)


def test_models_that_cannot_be_quantised_are_refused():
    with pytest.raises(InvalidInput, match="kind='int3'"):
        quantize_draft(tiny_llama(), "int3")
    for word in ("self-int4", "self-int8"):
        for target in (t5(), bart()):
            with pytest.raises(UnsupportedModel, match="encoder-decoder"):
                SpeculativeGenerator(target, word)
    with pytest.raises(UnsupportedModel, match="no linear layer that can be quantised"):
        SpeculativeGenerator(TableModel(torch.zeros(3, 3, 3)), "self-int4")
    with pytest.raises(UnsupportedModel, match="no linear layer that can be quantised"):
        quantize_draft(tiny_llama(dtype=torch.float64), "int8")
    patched = tiny_llama()
    patched.model.forward = patched.model.forward
    with pytest.raises(UnsupportedModel, match="patched"):
        quantize_draft(patched, "int8")


# --- pruned ----------------------------------------------------------------------------------------


def test_a_pruned_head_scores_special_then_frequent_then_low_tokens():
    model = tiny_llama()
    model.generation_config.eos_token_id = [60, 61]
    draft = prune_head(model, torch.tensor([[40, 41, 41], [50, 50, 50]]), 8)
    # padding 0, beginning 1, ends 60 and 61; then 50 and 41 and 40; then the lowest left
    assert draft.lm_head.kept.tolist() == [0, 1, 2, 40, 41, 50, 60, 61]
    ids = ragged_prompt()["input_ids"]
    with torch.no_grad():
        got, wanted = draft(ids).logits, model(ids).logits
    kept = torch.zeros(64, dtype=torch.bool)
    kept[draft.lm_head.kept] = True
    assert got.shape == wanted.shape
    torch.testing.assert_close(got[..., kept], wanted[..., kept])
    assert (got[..., ~kept] == -torch.inf).all()


@pytest.mark.parametrize("form", ["pruned", "pruned int8"])
def test_a_pruned_head_of_a_model_that_asks_for_its_dtype(form):
    target = mamba2()
    draft = prune_head(target, [], 32)
    draft = quantize_draft(draft, "int8") if form == "pruned int8" else draft
    assert draft.lm_head.weight.dtype == target.dtype
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=3)
    options = {**ragged_prompt(), "max_new_tokens": 9, "do_sample": False}
    assert gen.generate(**options).tolist() == target.generate(**options).tolist()
    assert gen.stats.drafted > 0


def test_what_cannot_be_pruned_is_refused():
    model = tiny_llama()
    for n in (0, 65, True, 2.5):
        with pytest.raises(InvalidInput, match="n="):
            prune_head(model, [], n)
    for ids in ([64], [-1], [0.5]):
        with pytest.raises(InvalidInput, match="text_ids"):
            prune_head(model, ids, 8)
    with pytest.raises(UnsupportedModel, match="Prune before quantising"):
        prune_head(quantize_draft(model, "int8"), [], 8)


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_is_kept(form):
    model = tiny_llama()
    model.lm_head = Linear(32, 64)
    with torch.no_grad(), pack_weights(model):
        model.lm_head.bias.copy_(10 * torch.randn(64))
        draft = FORMS[form](model)
        for tokens in (1, 40):  # few, and as many as go through the given weights
            states = torch.randn(tokens, 32)
            got = draft.lm_head(states)
            wanted = model.lm_head(states).where(got.isfinite(), -torch.inf)
            torch.testing.assert_close(got, wanted, atol=0.5, rtol=0)


# --- just drafts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_text_is_the_targets_own(form):
    target, inputs = tiny_llama(tie_word_embeddings=True), ragged_prompt()
    gen = SpeculativeGenerator(target, FORMS[form](target), num_draft_tokens=3)
    assert torch.equal(gen.generate(**inputs, **GREEDY), target.generate(**inputs, **GREEDY))
    assert 0 < gen.stats.accepted < gen.stats.drafted or form.startswith("int8")
    options = {"do_sample": True, "max_new_tokens": 12, "seed": 3}
    texts = [
        SpeculativeGenerator(target, draft, verification="coupled").generate(**inputs, **options)
        for draft in (None, FORMS[form](target))
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("word", ["self-int4", "self-int8"])
def test_the_targets_own_weights_as_its_draft(word):
    target, inputs = tiny_llama(), ragged_prompt((9,))
    before = fingerprint(target)
    gen = SpeculativeGenerator(target, word, num_draft_tokens=4)
    assert torch.equal(gen.generate(**inputs, **GREEDY), target.generate(**inputs, **GREEDY))
    assert gen.stats.acceptance_rate > 0.1
    assert_untouched(target, before)


class OfTheTarget:
    """A proposer made of whatever target the call brings."""

    def __init__(self, make):
        self.make = make

    def begin(self, call):
        return DraftModel(self.make(call.target)).begin(call)


@pytest.mark.parametrize("form", ["int8", "int8 and its own", "pruned int8"])
def test_the_law_of_sampled_text(form):
    def make(target):
        draft = prune_head(target, [2, 3, 3], 3) if form == "pruned int8" else target
        return quantize_draft(draft, "int8", keep=form == "int8 and its own")

    assert_lossless(OfTheTarget(make))
