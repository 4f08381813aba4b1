"""Attention by groups: the sums of transformers' "sdpa", no copies of keys and values, and only in our passes."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specdec import SpeculativeGenerator
from specdec.layouts import compiled, grouped
from specdec.testing import noisy_copy, ragged_prompt, tiny_llama
from specdec.weights.passing import Pass, under_way


@pytest.fixture
def copies(monkeypatch):
    """How often transformers copies keys or values for the heads of a group."""
    seen = []
    right = sdpa_attention.repeat_kv

    def watched(states, groups):
        seen.append(groups)
        return right(states, groups)

    monkeypatch.setattr(sdpa_attention, "repeat_kv", watched)
    return seen


def arguments(dtype, boolean, *, batch=3, groups=3, keys=2, queries=4, columns=11):
    maker = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=maker, dtype=torch.float64).to(dtype)

    mask = torch.rand(batch, 1, queries, columns, generator=maker) < 0.6
    mask[..., 0] = True
    if not boolean:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    query = some(batch, groups * keys, queries, 8)
    return module, query, some(batch, keys, columns, 8), some(batch, keys, columns, 6), mask


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
def test_the_sums_of_transformers(dtype, error, boolean, copies):
    grouped.install()
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    given = arguments(dtype, boolean)
    expected, _ = attend(*given, scaling=0.3)
    assert copies == [3, 3]  # outside our passes nothing changes
    with Pass(by_groups=True):
        found, weights = attend(*given, scaling=0.3)
    assert copies == [3, 3]
    assert weights is None
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert (found - expected).abs().max() <= error


def test_one_mask_a_pass_and_none_after_it():
    grouped.install()
    given = arguments(torch.float32, True)
    with Pass(by_groups=True) as passing:
        for _ in range(3):
            ALL_ATTENTION_FUNCTIONS["sdpa"](*given)
        assert len(passing.masks) == 1
    assert under_way() is None


@pytest.mark.parametrize("change", [{"softcap": 30.0}, {"position_bias": torch.zeros(1)}, {"dropout": 0.1}])
def test_what_it_does_not_know_goes_to_transformers(change, monkeypatch):
    told = []

    def original(*args, **kwargs):
        told.append(kwargs)
        return torch.zeros(1), None

    attend = grouped._wrapped(original)
    with Pass(by_groups=True):
        attend(*arguments(torch.float32, True), **change)
    assert told
    assert told[0].items() >= change.items()


def test_a_mask_for_every_head_goes_to_transformers():
    told = []
    attend = grouped._wrapped(lambda *args, **kwargs: told.append(args) or (None, None))
    module, query, key, value, mask = arguments(torch.float32, True)
    with Pass(by_groups=True):
        attend(module, query, key, value, mask)
        assert not told
        attend(module, query, key, value, mask.expand(-1, query.shape[1], -1, -1))
    assert len(told) == 1


def test_it_is_wrapped_once():
    grouped.install()
    first = ALL_ATTENTION_FUNCTIONS["sdpa"]
    grouped.install()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is first


def test_a_mask_lives_as_long_as_the_pass():
    """It is known by its id, which another mask may have once it is gone."""
    grouped.install()
    given = [*arguments(torch.float32, True)]
    mask = weakref.ref(given[-1])
    with Pass(by_groups=True):
        ALL_ATTENTION_FUNCTIONS["sdpa"](*given)
        given.clear()
        assert mask() is not None
    assert mask() is None


def test_a_call_makes_no_copies(copies):
    """The prompt is fed natively; with a mask of left padding it copies, our passes do not."""
    target = tiny_llama()
    assert target.config.num_attention_heads > target.config.num_key_value_heads
    generator = SpeculativeGenerator(target, noisy_copy(target), num_draft_tokens=3)
    prompt = ragged_prompt((9, 6, 3))
    generator.generate(**prompt, max_new_tokens=4, do_sample=False)  # includes the self-check
    copies.clear()
    out = generator.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert generator.stats.layout == "slots"
    layers = target.config.num_hidden_layers
    assert len(copies) == 2 * 2 * layers  # keys and values, target and draft, one pass each: the prompt's
    assert out.equal(target.generate(**prompt, max_new_tokens=20, do_sample=False))


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("boolean", [True, False])
def test_graphs_of_ours_attend_by_groups_and_others_do_not(copies, boolean, queries):
    grouped.install()
    torch._dynamo.reset()
    given = arguments(torch.float32, boolean, queries=queries)
    expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](*given)
    copies.clear()
    graph = torch.compile(lambda *args: ALL_ATTENTION_FUNCTIONS["sdpa"](*args), fullgraph=True, backend="eager")
    assert torch.allclose(graph(*given)[0], expected, atol=2e-6)
    assert copies == [3, 3], "somebody's graph is traced as it always was"
    with grouped.in_graphs():
        assert torch.allclose(graph(*given)[0], expected, atol=2e-6)
    assert copies == [3, 3]
    assert torch.allclose(graph(*given)[0], expected, atol=2e-6)


def test_graphs_of_several_threads_end_one_after_another():
    assert grouped._threads == 0
    with ThreadPoolExecutor(1) as pool:
        with grouped.in_graphs():
            other = grouped.in_graphs()
            pool.submit(other.__enter__).result()
        assert grouped._threads == torch.get_num_threads(), "the other thread's still runs"
        pool.submit(other.__exit__, None, None, None).result()
    assert grouped._threads == 0
    with pytest.raises(KeyError), grouped.in_graphs():
        raise KeyError
    assert grouped._threads == grouped._running == 0


def test_a_compiled_call_makes_no_copies(copies, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    target = tiny_llama()
    generator = SpeculativeGenerator(target, noisy_copy(target), num_draft_tokens=3, compile=True)
    prompt = ragged_prompt((9, 6, 3))
    out = generator.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert generator.stats.layout == "slots+compiled"
    copies.clear()
    again = generator.generate(**prompt, max_new_tokens=20, do_sample=False)
    layers = target.config.num_hidden_layers
    assert len(copies) == 2 * 2 * layers  # the prompts'
    expected = target.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert out.equal(expected)
    assert again.equal(expected)
