"""What fills up a ragged pass is not computed by packed and quantised layers, and nobody notices."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from specdec import Cascade, DraftModel, LayerSkip, Proposal, SpeculativeGenerator, pack_weights, quantize_draft
from specdec.layouts.facts import CACHE
from specdec.testing import ragged_prompt, tiny_llama
from specdec.weights import blocks, filling
from specdec.weights.passing import Pass, under_way

from .contract import assert_agrees, bart, ends, noisy, plain

NEW = 24


@pytest.fixture(autouse=True)
def for_tiny_models(monkeypatch):
    monkeypatch.setattr(filling, "READING", 0)
    monkeypatch.setattr(filling, "MOVING", 0)


@pytest.fixture
def multiplied(monkeypatch):
    """Shapes (R, K) or (B, W, K) that packed kernels were given."""
    shapes = []

    def spied(states, size, multiply):
        return on_real(states, size, lambda given: shapes.append(tuple(given.shape)) or multiply(given))

    def kernel(form, states, bias):
        shapes.append(tuple(states.shape))
        return as_given(form, states, bias)

    on_real, as_given = filling.on_real, blocks.Blocked.as_given
    monkeypatch.setattr("specdec.weights.quantized.on_real", spied)
    monkeypatch.setattr(blocks.Blocked, "as_given", kernel)
    return shapes


class Uneven:
    """Row b guesses (b + round) mod 5 tokens, those of ``text`` but for every seventh; remembers the rounds."""

    def __init__(self, text):
        self.text, self.rounds = text, []

    def propose(self, state, limits):
        guesses = []
        for row, limit in enumerate(limits):
            first = int(state.lengths[row])
            many = min(int(limit), (row + len(self.rounds)) % 5)
            guess = self.text[row, first : first + many].tolist()
            guesses.append([(token + 1) % 64 if (first + i) % 7 == 0 else token for i, token in enumerate(guess)])
        return Proposal.certain(guesses, state.device)

    def observe(self, round_):
        self.rounds.append(round_)


def test_only_what_is_real_is_multiplied(multiplied):
    target, inputs = tiny_llama(eos_token_id=9), ragged_prompt()
    text = plain(target, inputs, max_new_tokens=NEW, do_sample=False)
    assert len(set(ends(text, inputs["input_ids"].shape[1], 9))) > 1, "rows shall end at different steps"
    with pack_weights(target) as packing:
        proposer = Uneven(text)
        gen = SpeculativeGenerator(target, proposer, num_draft_tokens=4)
        for _ in range(2):  # the first call makes the self-check as well
            proposer.rounds.clear()
            multiplied.clear()
            ours = gen.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(ours, text)
    assert gen.stats.layout == "slots"
    decoding = proposer.rounds[1:]
    real = [int((round_.lengths + 1)[round_.counts > 0].sum()) for round_ in decoding]
    wide = [round_.drafted.size + len(round_.lengths) for round_ in decoding]
    assert sum(real) < 0.8 * sum(wide)
    rows = [int(np.prod(shape[:-1])) for shape in multiplied][-len(decoding) * packing.layers :]
    assert rows == [count for count in real for _ in range(packing.layers)]


def packed_draft(model):
    draft = noisy(model)
    pack_weights(draft)
    return DraftModel(draft)


def eight_bits(model):
    return DraftModel(quantize_draft(noisy(model), "int8", keep=False))


def two_levels(model):
    return Cascade("ngram", packed_draft(model))


def fewer_layers(model):
    return LayerSkip(skip=[1])


def uneven(model):
    return Uneven(plain(model, ragged_prompt(), max_new_tokens=NEW, do_sample=False))


@pytest.mark.parametrize("make", [packed_draft, eight_bits, two_levels, fewer_layers, uneven])
def test_text_and_scores_are_those_of_plain(make, multiplied):
    target, inputs = tiny_llama(eos_token_id=9), ragged_prompt()
    draft = make(target)
    pack_weights(target)
    multiplied.clear()
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 9}
    text = assert_agrees(target, inputs, drafts=[draft, draft], **options).sequences
    assert len(set(ends(text, inputs["input_ids"].shape[1], 9))) > 1, "rows shall end at different steps"
    assert any(len(shape) == 2 for shape in multiplied), "nothing was left out"


def test_a_returned_cache_holds_what_plain_generate_leaves():
    target, inputs = tiny_llama(eos_token_id=9), ragged_prompt()
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    theirs = plain(target, inputs, **options)
    draft = Uneven(theirs.sequences)
    pack_weights(target)
    ours = SpeculativeGenerator(target, draft, num_draft_tokens=4).generate(**inputs, **options)
    for mine, wanted in zip(ours[CACHE].layers, theirs[CACHE].layers, strict=True):
        torch.testing.assert_close(mine.keys, wanted.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.values, wanted.values, atol=1e-4, rtol=1e-4)


def test_beside_an_encoder_everything_is_computed(monkeypatch, multiplied):
    target = copy.deepcopy(bart())
    inputs = ragged_prompt()
    text = plain(target, inputs, max_new_tokens=NEW, do_sample=False)
    pack_weights(target)
    gen = SpeculativeGenerator(target, Uneven(text), num_draft_tokens=4)
    assert torch.equal(gen.generate(**inputs, max_new_tokens=NEW, do_sample=False), text)
    assert gen.stats.accepted
    assert all(len(shape) == 3 for shape in multiplied)


def test_tokens_that_fill_up_get_the_numbers_of_the_one_before():
    states = torch.arange(24.0).view(2, 3, 4)
    fed, live = np.array([1, 2]), np.array([True, True])
    given = []

    def double(rows):
        given.append(rows.shape)
        return 2 * rows

    with Pass(real=filling.real_tokens(fed, 3, live)):
        out = filling.on_real(states, 1, double)
        other = filling.on_real(states[:, :2], 1, double)  # of another shape: nothing to do with the pass
    assert given == [(3, 4), (2, 2, 4)]
    assert torch.equal(other, 2 * states[:, :2])
    assert torch.equal(out, 2 * torch.stack([states[0, [0, 0, 0]], states[1, [0, 1, 1]]]))
    with Pass(real=filling.real_tokens(fed, 3, ~live)):  # nobody is left: as it is
        assert torch.equal(filling.on_real(states, 1, double), 2 * states)
    assert torch.equal(filling.on_real(states, 1, double), 2 * states)


def test_a_pass_within_another_takes_nothing_from_it():
    states, live = torch.ones(2, 8, 4), np.array([True, True])
    outer, inner = (Pass(real=filling.real_tokens(np.array(fed), 8, live)) for fed in ([8, 1], [3, 2]))

    def multiplied():
        return filling.on_real(states, filling.MOVING, lambda rows: 0 * rows + rows[..., 0].numel()).max().item()

    with outer:
        assert multiplied() == 9
        with inner:
            assert multiplied() == 5
        assert multiplied() == 9
    assert multiplied() == 16
    assert under_way() is None


def test_what_fills_up_in_one_thread_is_real_in_another():
    states = torch.ones(3, 4, 8)

    def multiplied():
        return filling.on_real(states, 1, lambda rows: 0 * rows + rows[..., 0].numel()).unique().tolist()

    with Pass(real=filling.real_tokens(np.array([4, 2, 1]), 4, np.ones(3, dtype=bool))):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(multiplied).result() == [12]
        assert multiplied() == [7]


def test_small_matrices_and_short_passes_are_computed_whole(monkeypatch):
    states, live = torch.ones(2, 8, 4), np.array([True, True])
    monkeypatch.setattr(filling, "MOVING", 1000)
    with Pass(real=filling.real_tokens(np.array([8, 1]), 8, live)):
        assert filling.on_real(states, 142, torch.Tensor.size) == (2, 8, 4)  # 7 tokens less: 994
        assert filling.on_real(states, 143, lambda rows: rows).shape == (2, 8, 4)
        seen = []
        filling.on_real(states, 143, lambda rows: seen.append(len(rows)) or rows)
        assert seen == [9]
    monkeypatch.setattr(filling, "READING", 16)
    with Pass(real=filling.real_tokens(np.array([8, 1]), 8, live)):
        assert filling.on_real(states, 143, torch.Tensor.size) == (2, 8, 4)


@pytest.mark.parametrize(("dtype", "moved"), [(torch.float32, True), (torch.bfloat16, False)])
def test_tiles_have_further_rows_for_nearly_nothing(monkeypatch, dtype, moved):
    monkeypatch.setattr(filling, "MOVING", 100)
    monkeypatch.setattr(filling, "has_tiles", lambda: True)
    states, seen = torch.ones(2, 8, 4, dtype=dtype), []

    def multiply(rows):
        seen.append(rows[..., 0].numel())
        return rows

    with Pass(real=filling.real_tokens(np.array([8, 1]), 8, np.array([True, True]))):
        for size in (100, 100 * filling.TILES):
            filling.on_real(states, size, multiply)
    assert seen == [9 if moved else 16, 9]


def test_whether_there_are_tiles_is_asked_of_torch(monkeypatch):
    for told in ({}, {"amx_bf16": False}, {"amx_bf16": True}):
        filling.has_tiles.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", told.copy, raising=False)
        assert filling.has_tiles() is told.get("amx_bf16", False)
    filling.has_tiles.cache_clear()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert filling.has_tiles() is False
    filling.has_tiles.cache_clear()
