"""The front door's object: settings, copies, loading, and what a verdict or a count is kept for."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer, QuantizedLayer

import specdec.construction as construction
import specdec.layouts.choices as choices_room
from specdec import (
    Cascade,
    DraftModel,
    Fallback,
    InvalidInput,
    InvalidProposal,
    Mixture,
    NGram,
    Proposal,
    SpeculativeGenerator,
    Store,
    Suffix,
    UnsupportedModel,
    UnsupportedOption,
    choose_layers,
    pack_weights,
    prune_head,
    quantize_draft,
)
from specdec.layouts.facts import CACHE
from specdec.length.fixed import Fixed
from specdec.proposers import mixture as mixture_room
from specdec.state import State
from specdec.testing import byte_tokenizer, lively, noisy_copy, ragged_prompt, tiny_llama

from .contract import llama, noisy, plain, prompts, speculative, t5

GREEDY = {"max_new_tokens": 12, "do_sample": False}


# --- settings ---


@pytest.mark.parametrize("name", ["draft", "num_draft_tokens", "verification", "seed", "layout", "target"])
def test_settings_stay_as_they_are(name):
    gen = SpeculativeGenerator(llama(), "ngram")
    with pytest.raises(InvalidInput, match=rf"{name} is settled.*make another"):
        setattr(gen, name, "ngram")
    gen.note = "a user's own attribute"


@pytest.mark.parametrize("number", [np.int64(3), torch.tensor(3), np.array(3)])
def test_whole_numbers_of_other_kinds(number):
    gen = SpeculativeGenerator(llama(), "ngram", num_draft_tokens=number)
    assert type(gen.num_draft_tokens) is int
    texts = [
        gen.generate(**prompts(1), max_new_tokens=9, do_sample=True, seed=seed).tolist() for seed in (number, 3)
    ]
    assert texts[0] == texts[1]
    with pytest.raises(InvalidInput, match=r"seed=.*whole number"):
        SpeculativeGenerator(llama(), "ngram", seed="a")
    for odd in (np.bool_(True), torch.tensor(2.5), np.array([1, 2])):
        with pytest.raises(InvalidInput, match="whole number"):
            SpeculativeGenerator(llama(), "ngram", num_draft_tokens=odd)


def test_a_whole_number_of_tokens_may_be_a_float():
    got = SpeculativeGenerator(llama(), "ngram").generate(**prompts(1), max_new_tokens=5.0, do_sample=False)
    assert got.tolist() == plain(llama(), prompts(1), max_new_tokens=5.0).tolist()


def test_tokenizers_are_tokenizers():
    with pytest.raises(InvalidInput, match=r"tokenizer is a str.*AutoTokenizer"):
        SpeculativeGenerator(llama(), "ngram", tokenizer="gpt2")
    with pytest.raises(InvalidInput, match="give `tokenizer` as well"):
        SpeculativeGenerator(llama(), noisy(llama()), draft_tokenizer=byte_tokenizer("a"))


def test_a_hub_id_for_a_draft_is_told_how_to_load_it():
    with pytest.raises(InvalidInput, match=r"AutoModelForCausalLM.from_pretrained\('org/small'\)"):
        SpeculativeGenerator(llama(), "org/small")


def test_printed():
    gen = SpeculativeGenerator(llama(), noisy(llama()), num_draft_tokens=4)
    wanted = "SpeculativeGenerator(LlamaForCausalLM, LlamaForCausalLM, num_draft_tokens=4, verification='block')"
    assert repr(gen) == wanted


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda gen: pickle.loads(pickle.dumps(gen))])
def test_copies_generate_the_same(way):
    target = tiny_llama(num_hidden_layers=1)
    drafts = [Suffix(store=Store(), tenant="one"), noisy_copy(target)]
    gen = SpeculativeGenerator(target, drafts, num_draft_tokens=3)
    text = gen.generate(**prompts(3), **GREEDY)
    other = way(gen)
    assert other.stats.emitted == gen.stats.emitted
    assert other.generate(**prompts(3), **GREEDY).tolist() == text.tolist()


def test_stats_can_be_compared():
    gen = speculative(llama(), "noisy")
    gen.generate(**prompts(3), **GREEDY)
    assert gen.stats == gen.stats
    assert copy.deepcopy(gen.stats) != gen.stats


def test_loading(monkeypatch):
    loaded = []

    class Loads:
        def __init__(self, what):
            self.what = what

        def from_pretrained(self, name, **options):
            loaded.append((name, options))
            return self.what

    monkeypatch.setattr(transformers, "AutoModelForCausalLM", Loads(llama()))
    monkeypatch.setattr(transformers, "AutoTokenizer", Loads(byte_tokenizer("a")))
    gen = SpeculativeGenerator.from_pretrained(
        "org/big", "org/small", num_draft_tokens=2, verification="token", revision="v2", dtype="float32"
    )
    assert (gen.num_draft_tokens, gen.verification) == (2, "token")
    model = {"use_safetensors": True, "revision": "v2", "dtype": "float32"}
    tokenizer = {"revision": "v2"}
    assert loaded == [("org/big", model), ("org/big", tokenizer), ("org/small", model), ("org/small", tokenizer)]


@pytest.mark.parametrize("draft", [None, "ngram", "self"])
def test_another_default_device_is_no_matter_of_ours(draft):
    inputs = {**prompts(3), "attention_mask": torch.ones_like(prompts(3)["input_ids"])}
    expected = llama().generate(**inputs, **GREEDY)
    gen = SpeculativeGenerator(llama(), llama() if draft == "self" else draft, num_draft_tokens=3)
    torch.set_default_device("meta")
    try:
        assert gen.generate(**inputs, **GREEDY).tolist() == expected.tolist()
    finally:
        torch.set_default_device(None)


def test_loading_a_list_of_drafts(monkeypatch):
    tokenizer = byte_tokenizer("a")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **options: llama())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **options: tokenizer)
    gen = SpeculativeGenerator.from_pretrained("org/big", ["suffix", "org/small"])
    assert gen.draft[0] == "suffix"
    assert isinstance(gen.draft[1], torch.nn.Module)
    assert SpeculativeGenerator.from_pretrained("org/big", draft="ngram").draft == "ngram"


def test_tokenizers_that_are_given_are_not_loaded(monkeypatch):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **options: llama())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    given = {"tokenizer": byte_tokenizer("a"), "draft_tokenizer": byte_tokenizer("a")}
    gen = SpeculativeGenerator.from_pretrained("org/big", "org/small", **given)
    assert gen.tokenizer is given["tokenizer"]


def test_a_misspelt_word_says_what_words_there_are(monkeypatch):
    def load(name, **options):
        if name != "org/big":
            raise OSError("not there")
        return llama()

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **options: None)
    with pytest.raises(OSError, match="not there") as caught:
        SpeculativeGenerator.from_pretrained("org/big", "sufix")
    assert "suffix, " in caught.value.__notes__[0]


def test_from_pretrained_of_a_model():
    with pytest.raises(InvalidInput, match=r"LlamaForCausalLM; wanted is a hub id.*SpeculativeGenerator\(target"):
        SpeculativeGenerator.from_pretrained(llama(), "ngram")


# --- options in the wrong place, and things that are no models ---


@pytest.mark.parametrize("name", ["num_draft_tokens", "draft", "verification", "layout"])
def test_a_setting_is_no_option(name):
    with pytest.raises(UnsupportedOption, match=rf"`{name}`.*when the generator is made"):
        SpeculativeGenerator(llama(), "ngram").generate(**prompts(1), **{name: 3})


def test_release_belongs_to_streams():
    with pytest.raises(UnsupportedOption, match=r"`release`.*stream\(\)"):
        SpeculativeGenerator(llama(), "ngram").generate(**prompts(1), release=1)


def test_a_row_without_a_prompt_is_not_called_padded_on_the_right():
    inputs = prompts(3)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][1] = 0
    with pytest.raises(InvalidInput, match="mask of row 1 leaves no token"):
        SpeculativeGenerator(llama(), "ngram").generate(**inputs, **GREEDY)


@pytest.mark.parametrize(
    "make",
    [DraftModel, pack_weights, quantize_draft, lambda x: prune_head(x, [1], 4), lambda x: Fallback(x, NGram())],
)
def test_things_that_are_no_models(make):
    with pytest.raises(UnsupportedModel, match="a str"):
        make("ngram")


def test_packing_twice_says_so():
    model = copy.deepcopy(llama())
    with pack_weights(model), pytest.raises(UnsupportedModel, match="is packed already; unpack_weights"):
        pack_weights(model)


def test_a_head_is_pruned_by_several_texts_of_different_lengths():
    ragged = prune_head(llama(), [[5, 6, 7], [7], []], 8)
    assert ragged.lm_head.kept.tolist() == prune_head(llama(), [5, 6, 7, 7], 8).lm_head.kept.tolist()
    with pytest.raises(InvalidInput, match="no token ids"):
        prune_head(llama(), "a text", 8)


def test_a_store_of_true_tokens():
    with pytest.raises(InvalidInput, match="tokens=True; give a whole number"):
        Store(tokens=True)


def test_a_model_of_one_layer_has_none_to_leave_out():
    with pytest.raises(UnsupportedModel, match="has 1 layer"):
        choose_layers(llama(), [[5, 6, 7]])


# --- verdicts are kept for what they were found with ---


def test_dropout_in_training_mode_is_forgotten_in_evaluation_mode():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64, pad_token_id=0, eos_token_id=None
    )
    target = lively(GPT2LMHeadModel(config))
    gen = SpeculativeGenerator(target.train(), "ngram", num_draft_tokens=3)
    with pytest.warns(UserWarning, match=r"training mode.*model\.eval\(\)"):
        gen.generate(**prompts(3), **GREEDY)
    assert gen.stats.layout == "plain"
    target.eval()
    assert gen.generate(**prompts(3), **GREEDY).tolist() == plain(target, prompts(3), **GREEDY).tolist()
    assert gen.stats.layout == "slots"


@pytest.mark.parametrize("first", ["with autocast", "without"])
@pytest.mark.parametrize("draft", ["ngram", "noisy"])
def test_autocast_for_some_calls(first, draft):
    target = tiny_llama(num_hidden_layers=1)
    gen = SpeculativeGenerator(target, noisy(target) if draft == "noisy" else draft, num_draft_tokens=3)
    options = {"max_new_tokens": 20, "do_sample": False}
    for enabled in (True, False, True) if first == "with autocast" else (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            got = gen.generate(**prompts(3), **options)
            if not enabled:
                assert got.tolist() == plain(target, prompts(3), **options).tolist()
        assert gen.stats.layout == "slots"


def test_a_full_memory_says_nothing_of_the_next_call(monkeypatch):
    target = tiny_llama(num_hidden_layers=1)
    gen = SpeculativeGenerator(target, "ngram", num_draft_tokens=3)

    class Full:
        def __init__(self, *_):
            raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as full:
        full.setattr(choices_room, "Slots", Full)
        assert gen.generate(**prompts(3), **GREEDY).tolist() == plain(target, prompts(3), **GREEDY).tolist()
        assert gen.stats.layout == "columns"
    gen.generate(**prompts(3), **GREEDY)
    assert gen.stats.layout == "slots"


def test_a_static_cache_that_is_too_small_is_named():
    target = llama()
    cache = StaticCache(config=target.config, max_cache_len=14)
    with pytest.raises(InvalidInput, match=r"14 columns.*fill \d+.*max_cache_len"):
        SpeculativeGenerator(target, "ngram").generate(**prompts(1), **{CACHE: cache}, **GREEDY)


# --- one draft for many calls ---


def test_a_number_for_a_call_does_not_make_the_draft_anew(monkeypatch):
    made = []
    original = construction.quantize_draft
    monkeypatch.setattr(construction, "quantize_draft", lambda *args: made.append(1) or original(*args))
    gen = SpeculativeGenerator(llama(), "self-int8")
    for number in (1, 2, 3):
        gen.generate(**prompts(1), **GREEDY, num_assistant_tokens=number)
    gen.generate(**prompts(1), **GREEDY, assistant_confidence_threshold=0.5)
    assert len(made) == 1


def test_a_translated_draft_takes_a_confidence():
    target = tiny_llama(vocabulary=300, num_hidden_layers=1)
    one, other = byte_tokenizer("hello", " world"), byte_tokenizer("abc", " def")
    draft = tiny_llama(2, vocabulary=300, num_hidden_layers=1)
    gen = SpeculativeGenerator(target, draft, tokenizer=one, draft_tokenizer=other)
    got = gen.generate(**prompts(1), **GREEDY, assistant_confidence_threshold=0.4)
    assert got.tolist() == plain(target, prompts(1), **GREEDY).tolist()


def test_padding_that_a_draft_does_not_know_loses_no_row():
    target = tiny_llama(1, vocabulary=400, pad_token_id=399, num_hidden_layers=1)
    draft = tiny_llama(1, vocabulary=398, num_hidden_layers=1)
    inputs = ragged_prompt((9, 4), 390)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 399)
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=3)
    got = gen.generate(**inputs, **GREEDY)
    assert got.tolist() == plain(target, inputs, **GREEDY).tolist()
    assert (gen.stats.row_drafted > 0).all()


# --- several drafts ---


@pytest.mark.parametrize("below", [Suffix(), Mixture("suffix", "ngram"), Fallback(Suffix(shortest=4), NGram())])
def test_what_combines_others_has_no_model_of_its_own(monkeypatch, below):
    """Where a level of a cascade does not pay, what is below it guesses for the target."""
    monkeypatch.setattr(Fixed, "begins", lambda self, opening=None: False)
    target = llama()
    gen = SpeculativeGenerator(target, Cascade(below, noisy(target)), num_draft_tokens=4)
    got = gen.generate(**prompts(1), max_new_tokens=40, do_sample=False)
    assert got.tolist() == plain(target, prompts(1), max_new_tokens=40).tolist()
    assert gen.stats.drafted > 0
    assert gen.stats.draft_forwards == 0


@pytest.mark.parametrize(
    "draft", ["noisy", "auto", Mixture("ngram", noisy(llama())), Cascade("ngram", noisy(llama()))]
)
def test_a_clock_may_stand_still(monkeypatch, draft):
    monkeypatch.setattr("specdec.clock.perf_counter", lambda: 1.0)
    gen = speculative(llama(), draft, tokens="auto")
    got = gen.generate(**prompts(3), max_new_tokens=30, do_sample=False)
    assert got.tolist() == plain(llama(), prompts(3), max_new_tokens=30).tolist()


def test_a_mixture_does_not_count_its_readers_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(mixture_room, "RECENT", 1.0)
    runs = []
    original = mixture_room._Run.__init__

    def noted(self, *args):
        original(self, *args)
        self._clock = lambda: now[0]
        runs.append(self)

    monkeypatch.setattr(mixture_room._Run, "__init__", noted)
    gen = SpeculativeGenerator(llama(), Mixture("suffix", noisy(llama())), num_draft_tokens=3)
    for _ in gen.stream(**prompts(1), **GREEDY):
        now[0] += 50.0  # the reader takes its time
    assert runs[0]._rest == 0.0


def test_where_guesses_are_judged_by_their_use_a_part_is_asked_again(monkeypatch):
    """On an accelerator nobody looks at guesses that were not used; what has become good is found all the same."""
    target, inputs = llama(), prompts(1)
    truth = plain(target, inputs, max_new_tokens=200)[0].tolist()

    class Part:
        def __init__(self, right):
            self.right = right

        def propose(self, state, limits):
            here = int(state.lengths[0])
            guess = truth[here : here + int(limits[0])]
            return Proposal.certain([guess if self.right(here) else [(t + 1) % 64 for t in guess]], state.device)

    class Good(Part):
        pass

    class Late(Part):
        pass

    original = mixture_room._Run.__init__

    def unseen(self, *args):
        original(self, *args)
        self._when_used[:] = True

    monkeypatch.setattr(mixture_room._Run, "__init__", unseen)
    parts = Mixture(Good(lambda at: at % 3 > 0), Late(lambda at: at > 40))
    gen = SpeculativeGenerator(target, parts, num_draft_tokens=4)
    got = gen.generate(**inputs, max_new_tokens=190, do_sample=False)
    assert got[0].tolist() == truth[: got.shape[1]]
    assert int(gen.stats.drafting.rpartition(" ")[2]) > 10, gen.stats.drafting


def test_a_part_that_returns_no_proposal_is_named():
    class Odd:
        def propose(self, state, limits):
            return None

    with pytest.raises(InvalidProposal, match="a NoneType"):
        SpeculativeGenerator(llama(), [Odd(), "ngram"], num_draft_tokens=3).generate(**prompts(1), **GREEDY)


# --- the end of a call ---


def test_a_stream_closed_early_leaves_its_counts():
    gen = speculative(llama(), "noisy")
    records = gen.stream(**prompts(1), max_new_tokens=40, do_sample=False)
    for _ in range(3):
        next(records)
    records.close()
    stats = gen.stats
    assert stats.layout
    assert stats.target_forwards >= stats.rounds > 0
    assert min(stats.seconds, stats.draft_forwards) > 0
    assert 0 < stats.emitted < 40


def test_one_warning_with_the_reason():
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    config = RecurrentGemmaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, lru_width=32, attention_window_size=16, pad_token_id=0, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    target = lively(RecurrentGemmaForCausalLM(config).eval())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        SpeculativeGenerator(target, "ngram", num_draft_tokens=2).generate(**prompts(1), **GREEDY)
    ours = [str(one.message) for one in said if "specdec" in str(one.message)]
    assert len(ours) == 1
    assert "do not give the scores" not in ours[0]


# --- models and caches of one's own ---


class OneByOne(LlamaForCausalLM):
    """Knows one new token only: all tokens of a pass with a past have the first one's position."""

    def forward(self, input_ids=None, position_ids=None, cache=None, past_key_values=None, **kwargs):
        cache = past_key_values if cache is None else cache
        if position_ids is not None and cache is not None and cache.get_seq_length():
            position_ids = position_ids[..., :1].expand_as(position_ids)
        return super().forward(input_ids=input_ids, position_ids=position_ids, **{CACHE: cache}, **kwargs)


class RulesOut(OneByOne):
    """The same, and ids 60 and above are ruled out by a large number."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits[..., 60:] = -1e9
        return out


class Segments(LlamaForCausalLM):
    """Its positions begin anew behind every id 7: it looks at all ids when it prepares a pass."""

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        width = inputs["input_ids"].shape[1]
        behind = (input_ids == 7).cumsum(dim=1)[:, -width:]
        inputs["position_ids"] = inputs["position_ids"] + 3 * behind
        return inputs


class Counts(LlamaForCausalLM):
    """Says something else in every pass: it counts them."""

    steps = 0

    def forward(self, *args, **kwargs):
        self.steps = self.steps + 1
        self.seen.append(self.steps)
        self.passes += 1
        out = super().forward(*args, **kwargs)
        out.logits[..., (5 * self.steps + len(self.seen) + int(self.passes)) % 64] += 9.0
        return out


def own_model(kind):
    model = kind(tiny_llama(1, num_hidden_layers=1).config).eval()
    lively(model)
    model.seen = []
    model.register_buffer("passes", torch.zeros((), dtype=torch.int64))
    return model


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", [OneByOne, RulesOut, Segments, Counts])
def test_models_of_ones_own(kind, batch):
    for inputs in (prompts(batch), {**prompts(batch), "input_ids": prompts(batch)["input_ids"].clone()}):
        inputs["input_ids"][:, -2] = 7
        for draft in ("ngram", "suffix"):
            wanted = plain(own_model(kind), inputs, max_new_tokens=24).tolist()
            gen = SpeculativeGenerator(own_model(kind), draft, num_draft_tokens=3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert gen.generate(**inputs, max_new_tokens=24, do_sample=False).tolist() == wanted


def test_what_a_model_keeps_is_the_same_object_behind_the_check():
    model = own_model(LlamaForCausalLM)
    model.view = model.lm_head.weight.view(-1)
    model.shared = model.model.shared = torch.ones(3)
    model.leaf = torch.ones(2, requires_grad=True)
    held = model.view, model.shared, model.leaf, model.seen
    with torch.inference_mode():
        SpeculativeGenerator(model, "ngram", num_draft_tokens=3).generate(**prompts(1), **GREEDY)
    now = model.view, model.shared, model.leaf, model.seen
    assert all(one is other for one, other in zip(held, now, strict=True))
    assert model.model.shared is model.shared
    assert model.leaf.requires_grad
    assert not model.shared.is_inference()


def test_hooks_that_come_later_are_judged_anew():
    target = own_model(LlamaForCausalLM)
    gen = SpeculativeGenerator(target, "ngram", num_draft_tokens=3)
    gen.generate(**prompts(3), **GREEDY)
    assert gen.stats.layout == "slots"

    def steer(module, args, out):
        out.logits[:, -1, 9] += 30.0 * (out.logits[:, -1].argmax(-1) % 2 == 0)
        return out

    handle = target.register_forward_hook(steer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert gen.generate(**prompts(3), **GREEDY).tolist() == plain(target, prompts(3), **GREEDY).tolist()
    handle.remove()
    gen.generate(**prompts(3), **GREEDY)
    assert gen.stats.layout == "slots"


@pytest.mark.parametrize("made", [torch.jit.script, lambda part: torch.jit.trace(part, torch.ones(2, 3))])
def test_a_model_with_a_part_in_torchscript(made):
    """Such a module has not all that other modules hold, and its class no method to be looked at."""
    target = tiny_llama(1, num_hidden_layers=1)
    target.model.layers[0].mlp.act_fn = made(torch.nn.SiLU())
    gen = SpeculativeGenerator(target, "ngram", num_draft_tokens=3)
    assert gen.generate(**prompts(3), **GREEDY).tolist() == plain(target, prompts(3), **GREEDY).tolist()
    assert gen.stats.layout == "slots"


class Mixing(torch.nn.Module):
    """What a pass makes of a token depends on the tokens beside it, as where activations share a scale."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, states):
        return self.inner(states) + 0.5 * states.mean(dim=1, keepdim=True)


def test_layers_that_come_later_are_judged_anew():
    target = llama()
    gen = SpeculativeGenerator(target, noisy(target), num_draft_tokens=3)
    gen.generate(**prompts(3), **GREEDY)
    assert gen.stats.layout == "slots"
    layer = target.model.layers[0]
    layer.mlp = Mixing(layer.mlp)
    with pytest.warns(UserWarning, match="plainly"):
        assert gen.generate(**prompts(3), **GREEDY).tolist() == plain(target, prompts(3), **GREEDY).tolist()
    assert gen.stats.layout == "plain"
    layer.mlp = layer.mlp.inner
    gen.generate(**prompts(3), **GREEDY)
    assert gen.stats.layout == "slots"


class Steered(LlamaForCausalLM):
    """Told how, it mixes the scores of the tokens of a pass."""

    def forward(self, input_ids=None, steer=None, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        if steer is not None:
            out.logits = out.logits + steer * out.logits.mean(dim=1, keepdim=True).roll(1, -1)
        return out


def test_inputs_that_come_later_are_judged_anew():
    target = lively(Steered(llama().config).eval())
    gen = SpeculativeGenerator(target, noisy(target), num_draft_tokens=3)
    gen.generate(**prompts(3), **GREEDY)
    assert gen.stats.layout == "slots"
    options = {**GREEDY, "steer": torch.tensor(3.0)}
    with pytest.warns(UserWarning, match="plainly"):
        assert gen.generate(**prompts(3), **options).tolist() == plain(target, prompts(3), **options).tolist()
    assert gen.stats.layout == "plain"
    gen.generate(**prompts(3), **GREEDY)
    assert gen.stats.layout == "slots"


class Sinks(DynamicCache):
    """Forgets most of a long text."""

    def update(self, keys, values, layer, *args, **kwargs):
        keys, values = super().update(keys, values, layer, *args, **kwargs)
        return (keys, values) if keys.shape[-2] < 20 else (keys * 0.5, values)


def test_a_cache_of_ones_own_decodes_plainly():
    target, options = llama(), {"max_new_tokens": 24, "do_sample": False}
    wanted = plain(target, prompts(1), **options, **{CACHE: Sinks(config=target.config)}).tolist()
    gen = SpeculativeGenerator(target, "ngram", num_draft_tokens=3)
    gen.generate(**prompts(1), **options)
    with pytest.warns(UserWarning, match="plainly.*a Sinks may come to change"):
        got = gen.generate(**prompts(1), **options, **{CACHE: Sinks(config=target.config)})
    assert got.tolist() == wanted


class Coarse(QuantizedLayer):
    """Quantises as transformers' layers for quanto and HQQ do, without these libraries."""

    def _quantize(self, tensor, axis):
        step = tensor.abs().amax(-1, keepdim=True) / 7
        return (tensor / step).round() * step

    def _dequantize(self, tensor):
        return tensor


class Own(DynamicLayer):
    """A layer of the caller's."""


@pytest.mark.parametrize("layer", [lambda: Coarse(residual_length=16), Own])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cache_whose_layers_may_change_what_they_hold_decodes_plainly(layer, batch):
    target, options = llama(), {"max_new_tokens": 60, "do_sample": False}

    def cache():
        return Cache(layers=[layer() for _ in range(target.config.num_hidden_layers)])

    wanted = plain(target, prompts(batch), **options, **{CACHE: cache()}).tolist()
    gen = SpeculativeGenerator(target, noisy(target), num_draft_tokens=3)
    with pytest.warns(UserWarning, match=f"plainly.*a {type(layer()).__name__} may come to change"):
        got = gen.generate(**prompts(batch), **options, **{CACHE: cache()})
    assert got.tolist() == wanted


def test_layers_of_ones_own_beside_an_encoder_decode_plainly():
    target, options = t5(), {"max_new_tokens": 12, "do_sample": False}

    def cache():
        return EncoderDecoderCache(Cache(layers=[Own()]), DynamicCache())

    wanted = plain(target, prompts(1), **options, **{CACHE: cache()}).tolist()
    gen = SpeculativeGenerator(target, "ngram", num_draft_tokens=3)
    with pytest.warns(UserWarning, match="plainly.*a Own may come to change"):
        got = gen.generate(**prompts(1), **options, **{CACHE: cache()})
    assert got.tolist() == wanted


@pytest.mark.parametrize("layout", ["slots", "columns", "snapshot"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("way", ["closed", "raised"])
def test_an_interrupted_call_leaves_its_own_text_in_the_callers_cache(layout, batch, way):
    target, cache = llama(), DynamicCache(config=llama().config)
    text = plain(target, prompts(batch), max_new_tokens=40)
    gen = SpeculativeGenerator(target, noisy(target), num_draft_tokens=3, layout=layout)
    options = {"max_new_tokens": 40, "do_sample": False, CACHE: cache}
    if way == "closed":
        records = gen.stream(**prompts(batch), **options)
        for _ in range(9):
            next(records)
        records.close()
    else:

        def stumble(ids, scores):
            if ids.shape[1] > 20:
                raise KeyError("in the middle")
            return scores

        with pytest.raises(KeyError):
            gen.generate(**prompts(batch), **options, logits_processor=[stumble])
    held = cache.get_seq_length()
    truth = DynamicCache(config=target.config)
    mask = torch.nn.functional.pad(prompts(batch)["attention_mask"], (0, held), value=1)[:, :held]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        target(text[:, :held], attention_mask=mask, position_ids=positions, **{CACHE: truth})
    real = mask[:, None, :, None].bool()
    for one, other in zip(cache.layers, truth.layers, strict=True):
        torch.testing.assert_close(one.keys.where(real, 0), other.keys.where(real, 0), atol=1e-4, rtol=1e-4)


def test_a_copy_made_while_attached_is_its_own():
    target = tiny_llama(1, num_hidden_layers=1)
    gen = SpeculativeGenerator(target, "ngram")
    with gen.attached():
        copied, loaded = copy.deepcopy(target), pickle.loads(pickle.dumps(target))
    with torch.no_grad():
        for one in (copied, loaded):
            one.lm_head.weight.copy_(one.lm_head.weight.flip(0))
            assert "generate" not in vars(one) or one.generate.__self__ is one
    truth = plain(copied, prompts(1), **GREEDY)
    assert truth.tolist() == loaded.generate(**prompts(1), **GREEDY).tolist()
    assert truth.tolist() != plain(target, prompts(1), **GREEDY).tolist()


@pytest.mark.parametrize(("pad", "behind"), [(None, 5), (5, 5), (9, 9), (0, 0)])
def test_the_text_is_a_copy_with_the_padding_that_was_asked_for(pad, behind):
    tokens = torch.tensor([[1, 2, 3, 5], [4, 5, 5, 5]])
    state = SimpleNamespace(tokens=tokens, lengths=np.array([3, 2]), pad_id=5, device=tokens.device)
    text = State.text(state, pad)
    assert text.tolist() == [[1, 2, 3], [4, 5, behind]]
    text.zero_()
    assert tokens.all()
