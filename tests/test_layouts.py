"""The invariant of every layout, looked at after every round: the cache holds the committed tokens, and is right.

After a rollback, row b's cache must agree with a fresh forward pass over its committed tokens up to
``kept[b]``, which is all of them but the last; rows keep different numbers of guesses. The self-check and what
the configs say are tested on models made for it.
"""

import copy
import functools
import weakref
from contextlib import ExitStack
from types import FunctionType, SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import (
    Cache,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantoQuantizedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mistral.modeling_mistral import MistralMLP

from specdec import InvalidInput, SpeculativeGenerator
from specdec.layouts import NEVER, check, facts, masks, slots, verdicts
from specdec.layouts.choices import _may_change
from specdec.layouts.facts import CACHE, one_token_reason, slots_reason
from specdec.layouts.forget import drop, trim
from specdec.layouts.handover import cached_columns, give_back, newest, static_columns, write_into
from specdec.layouts.slot_cache import SlotLayer
from specdec.layouts.snapshot import Snapshots
from specdec.proposers.draft_model import DraftModel
from specdec.scorer import Scorer
from specdec.testing import lively, noisy_copy, ragged_prompt, tiny_llama

from .contract import Counted, bart


def fresh_cache(model, ids, mask):
    """Keys and values of a forward pass over ``ids`` alone: a list of (keys, values) a layer."""
    cache = DynamicCache()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=positions, **{CACHE: cache})
    return [(layer.keys, layer.values) for layer in cache.layers]


def held_by(scorer):
    """Keys and values that the layout holds, a layer."""
    layout = scorer.layout
    cache = layout._cache if layout.name == "slots" else layout.cache
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("layout", ["slots", "columns"])
@pytest.mark.parametrize("lengths", [(7,), (9, 6, 3)])
def test_after_every_round_the_cache_holds_all_committed_tokens_but_the_last(layout, lengths, monkeypatch):
    target = tiny_llama(dtype=torch.float64)
    prompt = ragged_prompt(lengths)
    seen = []
    right = Scorer.rollback

    def watched(self, tokens, kept, live, final=None):
        right(self, tokens, kept, live, final)
        if self.model is not target:
            return
        assert self.kept[live].tolist() == kept[live].tolist()
        for row in np.flatnonzero(live):
            length = int(kept[row])
            if layout == "columns":
                length = int(kept[live].min())
            ids = tokens[row : row + 1, :length]
            mask = torch.nn.functional.pad(
                prompt["attention_mask"][row : row + 1], (0, length - max(lengths)), value=1
            )
            start = int(mask.argmax())
            pairs = zip(held_by(self), fresh_cache(target, ids, mask), strict=True)
            for held, want in pairs:
                for one, other in zip(held, want, strict=True):
                    one, other = one[row, :, start:length], other[0, :, start:]
                    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        seen.append(kept - max(lengths))

    monkeypatch.setattr(Scorer, "rollback", watched)
    gen = SpeculativeGenerator(target, noisy_copy(target, 0.1), num_draft_tokens=4, layout=layout)
    gen.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert gen.stats.layout == layout
    assert 0 < gen.stats.acceptance_rate < 1
    if len(lengths) > 1:
        assert any(len(set(kept.tolist())) > 1 for kept in seen)  # rows did come apart


@pytest.mark.parametrize("layout", ["slots", "columns"])
@pytest.mark.parametrize("lengths", [(7,), (6, 6), (9, 6, 3)])
@pytest.mark.parametrize("positions", [18, 512])
def test_planned_passes_of_a_draft_score_what_single_ones_do(layout, lengths, positions, monkeypatch):
    """Whole calls; the draft stops when unsure, may run out of positions, and its buffer grows on the way."""
    monkeypatch.setattr(slots, "BLOCK", 4)
    target = tiny_llama(dtype=torch.float64)
    draft = noisy_copy(target, 0.1)
    draft.config.max_position_embeddings = positions
    prompt = ragged_prompt(lengths)
    right = Scorer.steps

    def one_by_one(self, tokens, lengths, live, count, longest):
        for step in range(count):
            self.layout.rewind(self.kept, live)
            ends = np.minimum(lengths + step, longest)
            yield self.score(tokens, ends, ends - 1, 1), ends

    def scores_of(steps):
        seen = []

        def noted(self, tokens, lengths, live, count, longest):
            for scores, ends in steps(self, tokens, lengths, live, count, longest):
                seen.append((scores[torch.from_numpy(live)].clone(), ends[live].tolist()))
                yield scores, ends

        monkeypatch.setattr(Scorer, "steps", noted)
        proposer = DraftModel(draft, confidence=0.05, layout=layout)
        gen = SpeculativeGenerator(target, proposer, num_draft_tokens=5, layout=layout)
        gen.generate(**prompt, max_new_tokens=24, do_sample=False)
        return seen

    planned, single = scores_of(right), scores_of(one_by_one)
    assert len(planned) > 10
    for (scores, ends), (want, wanted_ends) in zip(planned, single, strict=True):
        assert ends == wanted_ends
        torch.testing.assert_close(scores, want, rtol=1e-9, atol=1e-9)


def test_columns_are_made_ahead_but_hardly_beyond_what_the_call_may_reach(monkeypatch):
    target = tiny_llama(dtype=torch.float64)
    prompt = ragged_prompt((9, 6, 3))
    want = target.generate(**prompt, max_new_tokens=60, do_sample=False)
    monkeypatch.setattr(slots, "BLOCK", 4)
    monkeypatch.setattr(slots, "RESERVE", 16)
    made, copies = [], []
    right = SlotLayer.grow

    def grow(self, room, reserve):
        before = self._reserved[0]
        right(self, room, reserve)
        made.append(self._reserved[0].shape[2])
        copies.append(self._reserved[0] is not before)
        assert self.keys.shape[2] == room <= made[-1]
        assert self.keys.data_ptr() == self._reserved[0].data_ptr()

    monkeypatch.setattr(SlotLayer, "grow", grow)
    gen = SpeculativeGenerator(target, noisy_copy(target, 0.1), num_draft_tokens=4, layout="slots")
    assert torch.equal(gen.generate(**prompt, max_new_tokens=60, do_sample=False), want)
    assert max(made) <= 9 + 60 + 8  # rows that have ended are filled up beside the others, in blocks
    assert 0.15 < np.mean(copies) < 0.35  # one growth of four or five copies what is there


def windowed(**config):
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6, "pad_token_id": 0,
    }  # fmt: skip
    return lively(MistralForCausalLM(MistralConfig(**{**sizes, **config})).eval())


def test_what_is_handed_over_is_not_held_twice(monkeypatch):
    """Layer by layer: at no time are there two of all of them."""
    right, held = slots.give_back, []

    def watched(layer, keys, values, columns):
        held.append([one.keys.numel() > 0 for one in cache.layers])
        right(layer, keys, values, columns)

    def hand_over(self, columns, right=slots.Slots.hand_over):
        nonlocal cache
        cache = self._cache
        return right(self, columns)

    cache = None
    monkeypatch.setattr(slots, "give_back", watched)
    monkeypatch.setattr(slots.Slots, "hand_over", hand_over)
    gen = SpeculativeGenerator(tiny_llama(num_hidden_layers=3), "ngram", num_draft_tokens=3, layout="slots")
    gen.generate(**ragged_prompt(), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert held == [[True, True, True], [False, True, True], [False, False, True]]
    assert not any(one.keys.numel() for one in cache.layers)


def test_without_positions_columns_are_counted_hidden_ones_too():
    layout = object.__new__(slots.Slots)
    layout._hidden, layout._width, layout._last_position = 4, 2, None
    columns = torch.tensor([[2, 3], [5, 6]])
    assert layout._positions_of(columns).tolist() == [[6, 7], [9, 10]]
    layout._last_position = torch.tensor([[7], [5]])
    assert layout._positions_of(columns).tolist() == [[8, 9], [9, 10]]


def test_a_cache_holds_what_its_fullest_layer_does():
    """Some layers keep nothing: they read what others keep."""
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 1)
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 3]
    assert cached_columns(cache) == 3
    assert cached_columns(DynamicCache()) == cached_columns(None) == 0


def test_the_room_of_a_cache_is_that_of_its_smallest_layer_which_keeps_all():
    layers = [StaticLayer(12), StaticLayer(8), StaticSlidingWindowLayer(max_cache_len=6, sliding_window=4)]
    assert static_columns(Cache(layers=layers)) == 8
    for cache in (Cache(layers=layers[2:]), DynamicCache(), None):
        assert static_columns(cache) == NEVER


OF_TRANSFORMERS = {
    "all": DynamicLayer,
    "a window": lambda: DynamicSlidingWindowLayer(sliding_window=5),
    "all in place": lambda: StaticLayer(12),
    "a window in place": lambda: StaticSlidingWindowLayer(max_cache_len=5, sliding_window=5),
}


@pytest.mark.parametrize("kind", OF_TRANSFORMERS)
@pytest.mark.parametrize("columns", [3, 5, 6, 12])
def test_a_layer_is_given_back_as_plain_would_have_left_it(kind, columns):
    keys = torch.arange(1.0, 16.0).reshape(1, 1, 15, 1)
    values, later = -keys, torch.full((1, 1, 1, 1), 99.0)
    ours, theirs = OF_TRANSFORMERS[kind](), OF_TRANSFORMERS[kind]()
    ours.update(keys[:, :, :2], values[:, :, :2])
    theirs.update(keys[:, :, :columns], values[:, :, :columns])
    give_back(ours, keys, values, columns)
    for buffer in (keys, values):
        buffer.zero_()  # it is lent to another call
    assert ours.get_seq_length() == theirs.get_seq_length() == columns
    assert (ours.keys.tolist(), ours.values.tolist()) == (theirs.keys.tolist(), theirs.values.tolist())
    if kind != "all in place" or columns < 12:
        assert [one.tolist() for one in ours.update(later, later)] == [
            one.tolist() for one in theirs.update(later, later)
        ]


@pytest.mark.parametrize(("columns", "kept"), [(3, [1, 2, 3]), (8, [4, 5, 6, 7, 8])])
def test_what_a_window_in_place_has_of_a_text_is_no_empty_room(columns, kept):
    keys, layer = torch.arange(1.0, 9.0).reshape(1, 1, 8, 1), OF_TRANSFORMERS["a window in place"]()
    layer.update(keys[:, :, :columns], -keys[:, :, :columns])
    assert [states.flatten().tolist() for states in newest(layer, columns)] == [kept, [-one for one in kept]]


def test_a_static_layer_is_not_given_more_than_it_has_room_for():
    keys, layer = torch.zeros(1, 1, 15, 1), StaticLayer(12)
    layer.update(keys[:, :, :2], keys[:, :, :2])
    with pytest.raises(InvalidInput, match="12 columns and the text came to fill 13"):
        give_back(layer, keys, keys, 13)


def test_a_cache_of_the_callers_is_written_into_where_a_copy_of_it_was_gone_on_with():
    given = DynamicCache()
    gone_on = copy.deepcopy(given)
    gone_on.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert write_into(given, gone_on) is write_into(None, gone_on) is gone_on, "nobody looks at what was given"
    assert not given.layers
    given._is_user_defined = gone_on._is_user_defined = True
    assert write_into(given, gone_on) is given
    assert write_into(given, given) is given
    assert given.layers == gone_on.layers


def test_what_transformers_layers_hold_may_change_where_they_quantise():
    assert _may_change(QuantoQuantizedLayer)
    assert not any(map(_may_change, (DynamicCache, DynamicLayer, StaticCache, StaticSlidingWindowLayer)))


@torch.no_grad()
def test_a_window_can_be_left_and_entered_again_before_it_is_trimmed():
    model = windowed()
    ids = ragged_prompt((14,))["input_ids"]
    cache = DynamicCache(config=model.config)
    model(ids[:, :9], **{CACHE: cache})
    cache.activate_past_recording()
    for stop in (11, 13):
        model(ids[:, stop - 2 : stop], **{CACHE: cache})
    drop(cache, 1)
    drop(cache, 3)  # back to column 9, over both forwards
    trim(cache)
    again = model(ids[:, 9:], **{CACHE: cache}).logits
    torch.testing.assert_close(again, model(ids).logits[:, 9:], rtol=1e-4, atol=1e-5)


def test_what_a_window_has_pushed_out_is_let_go(monkeypatch):
    """Columns that may be taken back are kept, however long the text becomes no others."""
    held = []
    right = Scorer.rollback

    def watched(self, *args):
        right(self, *args)
        held.append(max(layer.keys.shape[2] for layer in self.layout.cache.layers))

    monkeypatch.setattr(Scorer, "rollback", watched)
    model = windowed()
    gen = SpeculativeGenerator(model, "ngram", num_draft_tokens=3, layout="columns")
    gen.generate(**ragged_prompt((12,)), max_new_tokens=40, do_sample=False)
    assert len(held) > 10
    assert max(held[1:]) <= 6 + 3  # the window, and guesses beside it


@pytest.mark.parametrize("layout", ["slots", "columns", "snapshot"])
def test_a_window_is_crossed(layout):
    model, prompt = windowed(), ragged_prompt((12, 9, 5))
    want = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    gen = SpeculativeGenerator(model, noisy_copy(model, 0.1), num_draft_tokens=3, layout=layout)
    assert torch.equal(gen.generate(**prompt, max_new_tokens=20, do_sample=False), want)
    assert gen.stats.rounds < 20


def test_the_self_check_runs_once_for_a_model_and_kind_of_batch():
    model = tiny_llama(3)
    gen = SpeculativeGenerator(model, "ngram", num_draft_tokens=3)
    prompt = ragged_prompt((6,))
    wanted = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    forwards = []
    for _ in range(2):
        assert torch.equal(gen.generate(**prompt, max_new_tokens=12, do_sample=False), wanted)
        forwards.append(gen.stats.target_forwards - gen.stats.rounds)
        assert gen.stats.layout == "slots"
    # the steps it is compared with are the call's own first two
    assert forwards == [3, 0]


def test_a_text_too_short_for_the_self_check_is_written_plainly_and_without_a_warning():
    model = tiny_llama(4)
    gen = SpeculativeGenerator(model, "ngram", num_draft_tokens=3)
    gen.generate(**ragged_prompt((6,)), max_new_tokens=4, do_sample=False)
    assert gen.stats.target_forwards == gen.stats.rounds == 4
    assert gen.stats.layout == "plain"


class Forgetful(type(tiny_llama())):
    """Several tokens in one cached forward come out differently, as in models with a scan of their own."""

    def forward(self, input_ids=None, cache=None, past_key_values=None, **kwargs):
        cache = past_key_values if cache is None else cache
        cached = cache is not None and cache.get_seq_length() > 0
        out = super().forward(input_ids=input_ids, **{CACHE: cache}, **kwargs)
        if cached and input_ids.shape[1] > 1:
            out.logits = out.logits + 0.01
        return out


def test_a_model_that_fails_the_self_check_decodes_plainly_and_says_so():
    model = Forgetful(tiny_llama().config).eval()
    model.load_state_dict(tiny_llama().state_dict())
    model.generation_config = tiny_llama().generation_config
    prompt = ragged_prompt()
    gen = SpeculativeGenerator(model, "ngram")
    with Counted(model) as counted, pytest.warns(UserWarning, match="decodes Forgetful plainly"):
        out = gen.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(out, tiny_llama().generate(**prompt, max_new_tokens=12, do_sample=False))
    assert gen.stats.layout == "plain"
    assert gen.stats.drafted == 0
    assert gen.stats.target_forwards == counted.calls, "those of the layouts that failed as well"


def test_a_full_memory_says_nothing_of_the_next_call(monkeypatch):
    model, prompt = tiny_llama(6), ragged_prompt((6,))
    wanted = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    gen = SpeculativeGenerator(model, "ngram", num_draft_tokens=3)

    def full(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(check, "_agrees", full)
        with pytest.warns(UserWarning, match="plainly"):
            assert torch.equal(gen.generate(**prompt, max_new_tokens=12, do_sample=False), wanted)
    assert torch.equal(gen.generate(**prompt, max_new_tokens=12, do_sample=False), wanted)
    assert gen.stats.layout == "slots"


def test_what_another_layout_met_does_not_make_a_full_memory_a_verdict(monkeypatch):
    model, prompt = tiny_llama(6), ragged_prompt((6,))
    gen = SpeculativeGenerator(model, "ngram", num_draft_tokens=3)
    met = [torch.OutOfMemoryError, ValueError]

    def meets(*_):
        raise met.pop(0)

    with monkeypatch.context() as patched:
        patched.setattr(check, "_agrees", meets)
        with pytest.warns(UserWarning, match="plainly"):
            gen.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert not met
    gen.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert gen.stats.layout == "slots"


def test_what_interrupts_the_self_check_is_no_verdict():
    target, calls = tiny_llama(), []
    options = {**ragged_prompt(), "max_new_tokens": 12, "do_sample": False}
    text = target.generate(**options)
    for number in range(1, 8):
        model = copy.deepcopy(target)

        def interrupted(*_, number=number):
            calls.append(1)
            if len(calls) == number:
                raise TimeoutError

        calls.clear()
        handle = model.model.layers[0].register_forward_hook(interrupted)
        gen = SpeculativeGenerator(model, noisy_copy(target, 0.05), num_draft_tokens=3)
        with pytest.raises(TimeoutError):
            gen.generate(**options)
        handle.remove()
        assert torch.equal(gen.generate(**options), text)
        assert gen.stats.layout == "slots"


def forward_of(model, change):
    """A ``forward`` for ``model`` that changes the scores of passes over several tokens."""
    right = type(model).forward

    @functools.wraps(right)
    def forward(*args, **kwargs):
        out = right(model, *args, **kwargs)
        if out.logits.shape[1] > 1:
            out.logits = change(out.logits)
        return out

    return forward


def test_another_forward_at_the_place_of_a_dead_one_is_tried_anew(monkeypatch):
    monkeypatch.setattr(verdicts, "id", lambda one: 7, raising=False)
    model, prompt = tiny_llama(5), ragged_prompt((6,))
    wanted = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    gen = SpeculativeGenerator(model, "ngram", num_draft_tokens=3)
    model.forward = forward_of(model, lambda scores: scores)
    assert torch.equal(gen.generate(**prompt, max_new_tokens=12, do_sample=False), wanted)
    assert gen.stats.layout == "slots"
    model.forward = forward_of(model, torch.neg)
    with pytest.warns(UserWarning, match="plainly"):
        assert torch.equal(gen.generate(**prompt, max_new_tokens=12, do_sample=False), wanted)
    assert gen.stats.layout == "plain"


class OtherWeight(torch.nn.Parameter):
    """A tensor that might multiply in a way of its own."""


CHANGES = {
    "nothing": lambda model, stack: {},
    "attention": lambda model, stack: model.set_attn_implementation("eager"),
    "training": lambda model, stack: model.train() and None,
    "autocast": lambda model, stack: stack.enter_context(torch.autocast("cpu", torch.bfloat16)) and None,
    "dtype": lambda model, stack: model.double() and None,
    "a hook before": lambda model, stack: model.model.layers[1].register_forward_pre_hook(lambda *_: None) and None,
    "a hook behind": lambda model, stack: model.model.layers[1].register_forward_hook(lambda *_: None) and None,
    "layers of a cache": lambda model, stack: {CACHE: DynamicCache()},
    "rows": lambda model, stack: ragged_prompt((7, 7)),
    "padding": lambda model, stack: {"attention_mask": (torch.arange(7) > 1).long()[None]},
    "no cache": lambda model, stack: {"use_cache": False},
    "a static cache": lambda model, stack: {"cache_implementation": "static"},
    "a hook on all": lambda model, stack: (
        stack.callback(register_module_forward_hook(lambda *_: None).remove) and None
    ),
    "a hook before all": lambda model, stack: (
        stack.callback(register_module_forward_pre_hook(lambda *_: None).remove) and None
    ),
    "a layer": lambda model, stack: setattr(
        model.model.layers[1], "mlp", torch.nn.Sequential(model.model.layers[1].mlp)
    ),
    "a method of a layer": lambda model, stack: setattr(model.model.layers[1].mlp, "forward", torch.zeros_like),
    "a method of all": lambda model, stack: (
        stack.enter_context(patch.object(MistralMLP, "forward", lambda self, states: states)) and None
    ),
    "a method around that of all": lambda model, stack: (
        stack.enter_context(patch.object(MistralMLP, "forward", torch.no_grad()(MistralMLP.forward))) and None
    ),
    "weights": lambda model, stack: setattr(model.lm_head, "weight", OtherWeight(model.lm_head.weight, False)),
    "checkpoints": lambda model, stack: setattr(model.model.layers[0], "gradient_checkpointing", True),
}


@pytest.mark.filterwarnings("ignore:specdec decodes")
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_pass_is_tried_anew(change, monkeypatch):
    tried = []
    right = check._agrees
    monkeypatch.setattr(check, "_agrees", lambda *args: tried.append(1) or right(*args))
    model = windowed()
    gen = SpeculativeGenerator(model, "ngram", num_draft_tokens=3)
    options = {**ragged_prompt((7,)), "max_new_tokens": 8, "do_sample": False}
    gen.generate(**options)
    before = len(tried)
    assert before > 0
    with ExitStack() as stack:
        changed = CHANGES[change](model, stack) or {}
        gen.generate(**{**options, **changed})
    assert (len(tried) > before) == (change != "nothing")


def test_what_was_done_to_a_model_is_told_apart():
    """Not only that something was, and not by the object where the same is done for every call anew."""
    model, prompt = copy.deepcopy(tiny_llama()), torch.zeros(1, 3)

    def key(*names, prompt=prompt, cache=None):
        plain = SimpleNamespace(model=model, described=lambda width: {}, cache=cache)
        return verdicts.kept_for(plain, prompt, names)

    def hooked(made):
        handle = model.model.register_forward_hook(made)
        try:
            return key()
        finally:
            handle.remove()

    first, again, other = (hooked(made) for made in (*(lambda *_: None for _ in range(2)), lambda *_: 7))
    assert first == again != other != key()
    assert key("slots", "plain") != key("plain")
    assert key(prompt=torch.zeros(2, 3)) == key(prompt=torch.zeros(5, 3)) != key(), "several rows, however many"
    assert key(prompt=SimpleNamespace(device=torch.device("cuda"), shape=prompt.shape)) != key()
    dynamic, static = DynamicCache(), StaticCache(config=model.config, max_cache_len=8)
    assert len({key(cache=EncoderDecoderCache(one, DynamicCache())) for one in (dynamic, static)}) == 2
    casts = []
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            casts.append(key())
    assert len({key(), *casts}) == 3
    for name in ("forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"):
        before = key()
        setattr(model, name, getattr(model, name))
        assert key() != before
    before = key()
    model.lm_head.__class__ = type("Other", (torch.nn.Linear,), {})  # whose weights may be no plain ones
    assert key() != before


def test_hooks_may_come_while_they_are_looked_at():
    """In a call of another thread."""
    model = torch.nn.Linear(1, 1)
    for _ in range(2):
        model.register_forward_hook(lambda *_: None)
    looked_at = verdicts.changes(model)
    next(looked_at)
    model.register_forward_hook(lambda *_: None)
    assert len(list(looked_at)) == 1 + 3, "the other hook, kinds, their methods and weights"


def test_a_key_is_of_one_object_and_does_not_keep_it(monkeypatch):
    monkeypatch.setattr(verdicts, "id", lambda one: 7, raising=False)
    one, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    key, same, another = (verdicts.Very(made) for made in (one, one, other))
    assert hash(key) == hash(same) == hash(another)
    assert key == same
    assert key != another
    alive = weakref.ref(one)
    del one
    assert alive() is None
    assert key not in {same, another}
    assert verdicts.Very(object()) != verdicts.Very(object())  # of which nobody can tell whether it is alive


def test_what_a_trial_changes_in_a_model_is_as_it_was():
    model = torch.nn.BatchNorm1d(2)
    model.steps, model.seen, model.held = 3, [1], {"a": 1}
    seen, held = model.seen, model.held
    states = check._ModuleStates(model)
    model.steps = 4
    model.seen.append(2)
    model.held["b"] = 2
    model.running_mean += 1
    states.put_back()
    assert (model.steps, model.seen, model.held) == (3, [1], {"a": 1})
    assert model.seen is seen
    assert model.held is held
    assert not model.running_mean.any()


@pytest.mark.parametrize("changed", [{"b": 1}, {"a": 2}, {"a": 1, "b": 1}, {}])
def test_what_a_module_holds_by_name_is_put_back(changed):
    model = torch.nn.Linear(1, 1)
    held = model.held = {"a": 1}
    states = check._ModuleStates(model)
    held.clear()
    held.update(changed)
    states.put_back()
    assert model.held is held
    assert held == {"a": 1}


def test_the_way_back_takes_nothing_from_others():
    """What torch itself keeps of a module: another thread's hooks stay, as do its parts."""
    model, called = torch.nn.Sequential(torch.nn.Linear(1, 1)), []
    states = check._ModuleStates(model)
    model.register_forward_hook(lambda *_: called.append(1))
    model.append(torch.nn.Linear(1, 1))
    states.put_back()
    model(torch.zeros(1))
    assert called == [1]
    assert len(model) == 2


def test_modules_may_change_while_their_states_are_looked_at(monkeypatch):
    """Another thread's pass puts methods and hooks in place and takes them away."""
    model = torch.nn.BatchNorm1d(2)
    model.steps = 3
    copied = check._copied

    def meanwhile(value):
        vars(model).setdefault("forward", lambda: None)
        return copied(value)

    monkeypatch.setattr(check, "_copied", meanwhile)
    states = check._ModuleStates(model)
    model.steps = 4
    states.put_back()
    assert model.steps == 3
    for hook in (print, repr):
        model.register_forward_hook(hook)
    for _ in verdicts.changes(model):
        model.register_forward_hook(str)


def test_the_way_back_is_that_of_the_modules_too():
    went = []
    model, cache = torch.nn.BatchNorm1d(2), DynamicCache()
    plain = SimpleNamespace(model=model, cache=cache, mark=lambda: 7, go_back=lambda *args: went.append(args))
    mark = check._Mark(plain)
    model.running_mean += 1
    mark.put_back()
    assert not model.running_mean.any()
    assert [one for one, _ in went] == [7]


def test_large_states_are_put_back_and_quantised_weights_not_copied():
    model = torch.nn.Linear(1, 1)
    model.state = torch.zeros(256, 256)
    model.register_buffer("packed", torch.zeros(256, 256, dtype=torch.uint8))
    states = check._ModuleStates(model)
    for one in (model.state, model.packed):
        one += 1
    states.put_back()
    assert not model.state.any()
    assert model.packed.all()


@pytest.mark.parametrize("wrong", [None, (0, 0, 0), (0, 1, 0), (0, 1, 1), (1, 0, 0)])
def test_every_row_that_the_self_check_looks_at_counts(wrong):
    """Two ragged passes over two rows; one number is off: in which pass, row and place?"""
    truth = [torch.randn(2, 5), torch.randn(2, 5)]

    class Layout:
        passes = 0

        def forward(self, tokens, lengths, first, count):
            scores = torch.stack([*truth, torch.randn(2, 5)][:count], dim=1)
            if self.passes:  # one token a row: the second of even rows, the third of odd ones
                scores = torch.stack([truth[1][0], torch.randn(5)])[:, None]
            if wrong is not None and wrong[0] == self.passes:
                scores[wrong[1], wrong[2]] += torch.arange(5)
            self.passes += 1
            return scores

        def rewind(self, kept, live):
            assert kept.tolist() == [4, 5]

    tokens = torch.randint(3, 9, (2, 5))
    assert check._agrees(Layout(), tokens, 3, truth) == (wrong is None)


@pytest.mark.parametrize("wrong", [None, (0, 0), (1, 0), (2, 0), (2, 1)])
def test_one_row_alone_is_looked_at_behind_a_right_guess_as_well(wrong):
    truth = [torch.randn(1, 5), torch.randn(1, 5)]
    fed, rewound = [], []

    class Layout:
        def forward(self, tokens, lengths, first, count):
            scores = torch.stack([*truth, torch.randn(1, 5)], dim=1) if count == 3 else truth[1][:, None].clone()
            if wrong is not None and wrong[0] == len(fed):
                scores[0, wrong[1]] += torch.arange(5)
            fed.append(tokens[0, first[0] : lengths[0]].tolist())
            return scores

        def rewind(self, kept, live):
            rewound.extend(kept.tolist())

    assert check._agrees(Layout(), torch.tensor([[5, 6, 7, 8, 9]]), 3, truth) == (wrong is None)
    # wrong guesses; what they overwrote; a right guess and a wrong one
    assert fed == [[8, 7, 8], [9], [8, 9, 8]][: len(fed)]
    assert rewound == [4, 3][: len(fed) - 1]


@torch.no_grad()
def test_a_static_cache_is_put_back_where_it_lies():
    """Compiled code knows its buffers by their addresses."""
    model, ids = tiny_llama(), ragged_prompt((6,))["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=8)
    model(ids[:, :4], **{CACHE: cache})
    keys, held = cache.layers[0].keys, cache.layers[0].keys.clone()
    states = Snapshots()
    states.take(cache)
    model(ids[:, 4:], **{CACHE: cache})
    assert not torch.equal(keys, held)
    assert states.put_back() is cache
    assert cache.layers[0].keys is keys
    assert torch.equal(keys, held)
    assert cache.get_seq_length() == 4


def test_a_cache_of_an_unknown_kind_is_put_back_as_often_as_it_is_needed():
    cache = SimpleNamespace(states=[torch.zeros(2)])
    states = Snapshots()
    states.take(cache)
    for _ in range(2):
        cache = states.put_back()
        assert not cache.states[0].any()
        cache.states[0] += 1


def test_the_check_sees_what_it_is_for():
    truth = torch.randn(3, 50)
    assert check.close(truth + 1e-5, truth)
    assert not check.close(truth + 7e-4, truth)
    assert not check.close(truth * torch.nan, truth)
    ruled_out = torch.tensor([[0.0, 1.0, -1e9]])
    assert check.close(torch.tensor([[0.0, 1.0, -2e9]]), ruled_out)
    assert not check.close(torch.tensor([[0.0, 1.0, 0.5]]), ruled_out)
    assert not check.close(torch.tensor([[0.0, 1.0, torch.nan]]), ruled_out)
    assert not check.close(truth - 7e-4, truth)
    assert not check.close(torch.zeros(1, 50), torch.zeros(3, 50))
    # far below the best there are no differences; of large scores the last digits are others
    assert check.close(torch.tensor([[0.0, 1.0, -35.0]]), torch.tensor([[0.0, 1.0, -60.0]]))
    large = torch.tensor([[60.0, 80.0]])
    assert check.close(large + 1.5e-3, large)
    assert not check.close(large + 3e-3, large)
    nothing = torch.full((1, 3), -torch.inf)
    assert check.close(nothing, nothing)
    half = truth.bfloat16()
    assert check.close((truth * 1.01).bfloat16(), half)
    assert not check.close((truth + 0.2 * torch.randn(3, 50)).bfloat16(), half)


@pytest.mark.parametrize(
    ("rope", "prompt", "longest", "plain"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 10, 64, False),
        ({"rope_type": "dynamic", "factor": 2.0}, 10, 65, True),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 10, 32, False),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 10, 33, True),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 32, 60, True),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 33, 60, False),
        ({"rope_type": "default"}, 10, 500, False),
    ],
)
def test_frequencies_that_change_at_a_boundary(rope, prompt, longest, plain):
    model = tiny_llama()
    model.config.max_position_embeddings = 64
    model.config.rope_parameters = {"rope_theta": 1e4, **rope}
    assert bool(one_token_reason(model, prompt, longest)) == plain


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "batch", "longest", "plain"),
    [
        ({"model_type": "zamba2"}, 1, 10, True),
        ({"model_type": "llama"}, 3, 10, False),
        ({"model_type": "unlimited_ocr"}, 1, 10, False),
        ({"model_type": "unlimited_ocr"}, 2, 10, True),
        ({"model_type": "doge", "keep_window_size": 32}, 1, 32, False),
        ({"model_type": "doge", "keep_window_size": 32}, 1, 33, True),
        ({"model_type": "moshi", "sliding_window": 16}, 1, 16, False),
        ({"model_type": "moshi", "sliding_window": 16}, 1, 17, True),
        ({"model_type": "moshi", "sliding_window": None}, 1, 17, False),
        ({"model_type": "mistral", "sliding_window": 16, "keep_window_size": 16}, 1, 17, False),
        ({"rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": {}}}, 1, 65, True),
        ({"rope_scaling": {"type": "dynamic"}}, 1, 65, True),
        ({"rope_parameters": {"rope_type": "longrope"}, "original_max_position_embeddings": 32}, 1, 33, True),
        ({"rope_parameters": {"rope_type": "longrope"}}, 1, 64, False),
        ({"rope_parameters": {"rope_type": "longrope"}}, 1, 65, True),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 10}}, 1, 11, True),
    ],
)
def test_who_takes_one_token_at_a_time(config, batch, longest, plain):
    """What a config says holds for the part of a model that it is about, however deep that lies."""
    config = SimpleNamespace(**{"max_position_embeddings": 64, **config})
    middle = SimpleNamespace(sub_configs={"text_config": None, "other": None}, text_config=config, other=None)
    for whole in (config, middle, SimpleNamespace(sub_configs={"part": None}, part=middle)):
        assert bool(one_token_reason(SimpleNamespace(config=whole), 10, longest, batch)) == plain


def test_what_holds_for_several_rows_only_is_asked_with_their_number(monkeypatch):
    monkeypatch.setitem(facts.ONE_TOKEN_IN_BATCHES, "llama", "two are a crowd")
    gen = SpeculativeGenerator(tiny_llama(5), "ngram", num_draft_tokens=3)
    gen.generate(**ragged_prompt((9,)), max_new_tokens=8, do_sample=False)
    assert gen.stats.layout == "slots"
    with pytest.warns(UserWarning, match="plainly.*two are a crowd"):
        gen.generate(**ragged_prompt((9, 6)), max_new_tokens=8, do_sample=False)


def test_who_cannot_be_in_slots():
    """Llama4 from some column on, and who has padding that is a word and no position."""
    model = tiny_llama()
    model.config.attn_temperature_tuning, model.config.floor_scale = True, 32
    assert slots_reason(model, 31) == ""
    assert "one length of the cache" in slots_reason(model, 32)
    model.config.attn_temperature_tuning = False
    assert slots_reason(model, 32) == ""
    model.config.model_type = "trocr"
    assert "padding" in slots_reason(model, 20)
    model.config.pad_token_id = None
    assert slots_reason(model, 20) == ""


def test_who_prepares_the_inputs_of_a_model():
    """Transformers for all models, transformers for this one, or somebody else: in a class, or in this object."""

    def prepare(self, *args, **kwargs):
        return {}

    usual = tiny_llama()
    assert (facts.prepares_as_usual(usual), slots_reason(usual, 20)) == (True, "")
    for name in ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation"):
        by_others = type("Own", (type(usual),), {name: prepare})(usual.config)
        patched = tiny_llama()
        setattr(patched, name, functools.partial(prepare, patched))
        theirs = FunctionType(prepare.__code__, {})
        theirs.__module__ = "transformers.models.some"
        by_them = type("Own", (type(usual),), {name: theirs})(usual.config)
        for model, reason in ((by_others, True), (patched, True), (by_them, False)):
            assert not facts.prepares_as_usual(model)
            assert bool(slots_reason(model, 20)) == reason


@pytest.mark.parametrize(
    ("config", "last"),
    [
        ({"max_position_embeddings": 24}, 24),
        ({"max_position_embeddings": 24, "rope_parameters": {"rope_type": "default"}}, NEVER),
        ({"max_position_embeddings": None, "max_target_positions": 20}, 20),
        ({"max_position_embeddings": 24, "max_target_positions": 20}, 20),
        ({"max_position_embeddings": -1}, NEVER),
        ({}, NEVER),
    ],
)
def test_where_positions_end(config, last):
    config = SimpleNamespace(**config)
    config.get_text_config = lambda decoder: config
    assert facts.last_position(SimpleNamespace(config=config)) == last


def longrope(boundary=32):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": boundary}
    return tiny_llama(rope_parameters={**rope, "short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 9.0, 20.0]})


def test_embeddings_are_columns_before_the_boundary_as_well():
    model = longrope()
    ids, mask = ragged_prompt((20,)).values()
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    wanted = model.generate(**inputs, max_new_tokens=25, do_sample=False)
    gen = SpeculativeGenerator(model, "ngram", num_draft_tokens=3)
    with pytest.warns(UserWarning, match="longrope"):
        assert torch.equal(gen.generate(**inputs, max_new_tokens=25, do_sample=False), wanted)
    assert gen.stats.layout == "plain"
    # the boundary lies within the prompt, and none of the text behind it
    ids, mask = ragged_prompt((36,)).values()
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    gen.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert gen.stats.layout != "plain"


def scaled_from(column):
    """A model like Llama4, which scales its attention from ``column`` on; the self-check does not look so far."""
    model = tiny_llama(7)
    model.config.attn_temperature_tuning, model.config.floor_scale = True, column
    return model


@pytest.mark.parametrize(
    ("make", "layouts", "reason"),
    [(longrope, ("slots", "columns", "snapshot"), "longrope"), (lambda: scaled_from(21), ("slots",), "one length")],
)
def test_a_named_layout_is_refused_for_what_no_check_can_see(make, layouts, reason):
    model, options = make(), {**ragged_prompt((9,)), "max_new_tokens": 30, "do_sample": False}
    for layout in layouts:
        with pytest.raises(InvalidInput, match=f"'{layout}' would not be exact.*{reason}"):
            SpeculativeGenerator(model, "ngram", layout=layout).generate(**options)


@pytest.mark.filterwarnings("ignore:specdec decodes")
def test_one_token_steps_may_be_asked_for_where_nothing_else_is_exact():
    model, options = longrope(), {**ragged_prompt((9,)), "max_new_tokens": 30, "do_sample": False}
    gen = SpeculativeGenerator(model, "ngram", layout="plain")
    assert torch.equal(gen.generate(**options), model.generate(**options))
    assert gen.stats.layout == "plain"


@pytest.mark.parametrize("layout", ["one by one", "nothing"])
def test_a_layout_of_a_draft_that_does_not_exist_is_refused(layout):
    gen = SpeculativeGenerator(tiny_llama(), DraftModel(tiny_llama(3), layout=layout), num_draft_tokens=3)
    with pytest.raises(InvalidInput, match=f"'{layout}' does not exist.*snapshot"):
        gen.generate(**ragged_prompt((9,)), max_new_tokens=8, do_sample=False)


def test_a_draft_that_may_take_one_token_at_a_time_only_does_so_and_is_rolled_back():
    target, draft, widths = tiny_llama(), longrope(20), []
    prompt = ragged_prompt((9, 6, 3))
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=4)
    hook = draft.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        got = gen.generate(**prompt, max_new_tokens=24, do_sample=False)
    finally:
        hook.remove()
    assert torch.equal(got, target.generate(**prompt, max_new_tokens=24, do_sample=False))
    assert 0 < gen.stats.acceptance_rate < 1
    assert gen.stats.draft_layout == "columns+snapshot"
    assert widths[0] == 9
    assert set(widths[1:]) == {1}


@pytest.mark.parametrize(("column", "layout"), [(28, "columns"), (29, "slots")])
def test_embeddings_are_columns_that_slots_must_do_for(column, layout):
    model = scaled_from(column)
    ids, mask = ragged_prompt((20,)).values()
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    gen = SpeculativeGenerator(model, "ngram", num_draft_tokens=3)
    gen.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert gen.stats.layout == layout


def test_embeddings_are_columns_that_are_made_once(monkeypatch):
    monkeypatch.setattr(slots, "BLOCK", 4)
    made, right = [], SlotLayer.grow

    def grow(self, room, reserve):
        right(self, room, reserve)
        made.append(self._reserved[0].shape[2])

    monkeypatch.setattr(SlotLayer, "grow", grow)
    model = tiny_llama()
    ids, mask = ragged_prompt((20,)).values()
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    gen = SpeculativeGenerator(model, "ngram", num_draft_tokens=3, layout="slots")
    gen.generate(**inputs, max_new_tokens=30, do_sample=False)
    assert max(made) <= 20 + 30 + 4


def translator(seed):
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=4, pad_token_id=0,
        eos_token_id=None, decoder_start_token_id=0,
    )  # fmt: skip
    model = lively(T5ForConditionalGeneration(config).eval(), seed)
    model.generation_config.decoder_start_token_id = 0
    return model


@pytest.mark.parametrize("make", [lambda: translator(0), bart])
@pytest.mark.parametrize(("rows", "layouts"), [(1, ("slots", "columns")), (3, ("columns",))])
def test_rows_of_models_that_nobody_tells_their_positions_stand_together(make, rows, layouts, monkeypatch):
    """Whatever the self-check says of rows that stand apart: in 16 bits a column may pass for noise."""
    monkeypatch.setattr(check, "close", lambda *_: True)
    monkeypatch.setattr(check, "_VERDICTS", weakref.WeakKeyDictionary())
    gen = SpeculativeGenerator(make(), "ngram", num_draft_tokens=3)
    gen.generate(**ragged_prompt((9, 6, 3)[:rows]), max_new_tokens=12, do_sample=False)
    assert gen.stats.layout in layouts


def test_who_is_told_its_positions():
    """The model or its decoder, or it adds by column; of other people's models nothing is known."""

    def untold(self, input_ids): ...

    def told(self, input_ids, position_ids=None): ...

    def told_as_decoder(self, input_ids, decoder_position_ids=None): ...

    def model(outer, inner, kind="", home="transformers.models.some"):
        decoder = type("Decoder", (), {"forward": inner})()
        config = SimpleNamespace(model_type=kind)
        parts = {"__module__": home, "forward": outer, "config": config, "get_decoder": lambda self: decoder}
        return type("Model", (), parts)()

    assert facts._counts_by_length(model(untold, untold))
    for one in ((told, untold), (untold, told), (told_as_decoder, untold), (untold, untold, "bloom")):
        assert not facts._counts_by_length(model(*one))
    assert not facts._counts_by_length(model(untold, untold, home="elsewhere.some"))
    own = type("Own", (type(model(untold, untold)),), {"__module__": "elsewhere.some"})  # a subclass of the user's
    assert facts._counts_by_length(own())


@pytest.mark.parametrize("rows", [1, 2])
def test_what_a_layer_keeps_beside_its_keys_is_not_cropped(rows):
    """DeepSeek-V4's sums of every few columns: behind a prompt of three or four the self-check may not see them."""
    config = DeepseekV4Config(
        vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
        head_dim=16, partial_rotary_factor=0.5, q_lora_rank=16, o_lora_rank=8, o_groups=2, n_routed_experts=4,
        num_experts_per_tok=2, index_topk=2, index_head_dim=16, index_n_heads=4, sliding_window=8, hc_mult=2,
        layer_types=["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        mlp_layer_types=["moe"] * 3, max_position_embeddings=128, eos_token_id=None,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    )  # fmt: skip
    model = lively(DeepseekV4ForCausalLM(config).eval())
    for length in (3, 4):
        ids = torch.arange(5, 5 + rows * length).view(rows, length)
        gen = SpeculativeGenerator(copy.deepcopy(model), "ngram", num_draft_tokens=3)
        for new in (6, 24):
            wanted = model.generate(ids, max_new_tokens=new, do_sample=False)
            assert torch.equal(gen.generate(ids, max_new_tokens=new, do_sample=False), wanted)
        assert gen.stats.layout == "columns+snapshot"


def test_relative_positions_that_begin_to_matter_later():
    """Two columns say nothing of positions where attention is certain there; the text that follows does."""
    model = translator(2)
    inputs = {"inputs_embeds": torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))}
    options = {"max_new_tokens": 20, "do_sample": False}
    wanted = model.generate(**inputs, **options)
    gen = SpeculativeGenerator(model, "ngram", num_draft_tokens=3)
    assert torch.equal(gen.generate(**inputs, **options), wanted)
    assert gen.stats.layout == "columns"


def test_masks_of_other_callers_are_left_alone():
    masks.install()
    first = masks.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    masks.install()
    assert masks.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is first
    arguments = {"batch_size": 1, "q_length": 2, "kv_length": 5, "q_offset": 3, "allow_is_causal_skip": False}
    assert torch.equal(first(**arguments), first._specdec_original(**arguments))


def fading(original):
    """Attention to which all but the first 16 columns say half as much."""

    @functools.wraps(original)
    def attend(module, query, key, value, *args, **kwargs):
        value = torch.cat([value[:, :, :16], 0.5 * value[:, :, 16:]], dim=2)
        return original(module, query, key, value, *args, **kwargs)

    return attend


def hiding(original):
    """Masks that hide what is further away than 16 columns, but the first one."""

    @functools.wraps(original)
    def mask(*args, mask_function, **kwargs):
        def near(row, head, query, key):
            return mask_function(row, head, query, key) & ((query - key < 16) | (key < 1))

        return original(*args, **{**kwargs, "mask_function": near, "allow_is_causal_skip": False})

    return mask


@pytest.mark.parametrize(
    ("registered", "other"),
    [(ALL_ATTENTION_FUNCTIONS, fading), (masks.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, hiding)],
)
@pytest.mark.parametrize("lengths", [(9,), (9, 6, 3)])
def test_attention_and_masks_of_ones_own_under_a_known_name(registered, other, lengths):
    """What begins behind the self-check's few columns; the verdict of an earlier call is another's as well."""
    target, prompt = tiny_llama(2), ragged_prompt(lengths)
    gen = SpeculativeGenerator(target, noisy_copy(target, 0.1), num_draft_tokens=3)
    options = {**prompt, "max_new_tokens": 40, "do_sample": False}
    gen.generate(**options)
    assert gen.stats.layout == "slots"
    before = registered["sdpa"]
    type(registered).register("sdpa", other(before._specdec_original))
    try:
        wanted, got = target.generate(**options), gen.generate(**options)
    finally:
        type(registered).register("sdpa", before)
    assert torch.equal(got, wanted)
    assert gen.stats.layout == "columns"
    gen.generate(**options)
    assert gen.stats.layout == "slots"


def test_whose_attention_a_model_has(monkeypatch):
    """Of a part of it as well; what we have wrapped is whose it was before."""
    model, part = tiny_llama(), SimpleNamespace(_attn_implementation="sdpa")
    for name in ("eager", "sdpa"):
        model.config._attn_implementation = name
        assert slots_reason(model, 20) == ""
    whole = SimpleNamespace(config=SimpleNamespace(sub_configs={"text_config": None}, text_config=part))
    assert not facts._attends_otherwise(whole)
    ours = FunctionType((lambda: None).__code__, {"__name__": "specdec.layouts.masks"})
    ours._specdec_original = lambda: None
    monkeypatch.setattr(facts, "ALL_ATTENTION_FUNCTIONS", {"sdpa": ours})
    assert "somebody's own" in slots_reason(model, 20)
    assert facts._attends_otherwise(whole)


def test_one_row_stands_together_in_slots():
    model = translator(0)
    assert (slots_reason(model, 20, 1), slots_reason(model, 20, 2) != "") == ("", True)


@pytest.mark.parametrize("by_vmap", [False, True])
def test_every_row_has_its_own_query_offset(by_vmap):
    offset = torch.tensor([2, 5])
    padding = torch.ones(2, 8, dtype=torch.bool)
    padding[0, 0] = False

    def causal(row, head, query, key):
        return key <= query

    mask = masks.ragged_mask(3, 8, offset, causal, padding, by_vmap=by_vmap)
    assert mask.shape == (2, 1, 3, 8)
    for row in range(2):
        for query in range(3):
            want = [int(offset[row]) + query >= key and bool(padding[row, key]) for key in range(8)]
            assert mask[row, 0, query].tolist() == want


def test_what_all_scores_of_a_row_share_is_no_difference_in_half_precision():
    truth = (3 * torch.randn(2, 400, generator=torch.Generator().manual_seed(0))).bfloat16()
    truth[0, :7] = -torch.inf
    noise = 0.05 * torch.randn(2, 400, generator=torch.Generator().manual_seed(1))
    shift = torch.tensor([[0.5], [-1.0]])
    assert check.close((truth.float() + noise + shift).bfloat16(), truth)
    assert not check.close((truth.float() + 8 * noise).bfloat16(), truth)
    assert not check.close(truth.roll(1, dims=1).where(truth.isfinite(), truth), truth)
    assert not check.close(truth.float() + 0.01, truth.float())
    for scale in (0.05, 4):  # what counts is how far the scores are apart
        assert check.close(((truth.float() + noise) * scale).bfloat16(), truth * scale)
        assert not check.close(((truth.float() + 8 * noise) * scale).bfloat16(), truth * scale)


def test_what_a_model_rules_out_stays_ruled_out():
    """Whether it says so with a number far below the others or with none at all."""
    truth = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    for never in (-1e9, -torch.inf):
        truth[:, :3] = never
        assert check.close(truth.clone(), truth)
        allowed = truth.clone()
        allowed[1, 2] = 0.0
        assert not check.close(allowed, truth)
    assert check.close(truth + 1e-4, truth), "what rounding does to scores that are all small"
