"""Drafts that are layers of the target: what they share with it, what they leave alone, what they refuse."""

import copy
import gc
import pickle
import warnings
import weakref
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    StaticCache,
)

import specdec.state as state_room
from specdec import (
    Cascade,
    DraftModel,
    EarlyExit,
    Fallback,
    InvalidInput,
    LayerSkip,
    Mixture,
    SpeculativeGenerator,
    Suffix,
    UnsupportedModel,
    UnsupportedOption,
    pack_weights,
)
from specdec.layouts import compiled
from specdec.layouts.facts import CACHE
from specdec.layouts.slots import Slots
from specdec.length.fixed import Fixed
from specdec.proposers import layers as layers_room
from specdec.testing import lively, noisy_copy, ragged_prompt, tiny_llama
from specdec.weights.layers import count_layers, with_layers

from .contract import (
    SPECIAL,
    Counted,
    assert_untouched,
    fingerprint,
    gemma,
    mistral,
    plain,
    prompts,
    qwen3_next,
    t5,
)
from .test_contract_cache import DICT, assert_same_cache

START = 9
LONG = {"max_new_tokens": 90, "do_sample": False}


@cache
def deep(dtype=torch.float32):
    return tiny_llama(0, num_hidden_layers=4, dtype=dtype)


@cache
def gpt2():
    config = GPT2Config(vocab_size=64, n_positions=24, n_embd=32, n_layer=3, n_head=2, **SPECIAL)
    return lively(GPT2LMHeadModel(config).eval())


DRAFTS = {
    "exit": lambda: EarlyExit(layers=1),
    "late exit": lambda: EarlyExit(layers=3),
    "first left out": lambda: LayerSkip(skip=[0]),
    "two left out": lambda: LayerSkip(skip=(2, 1)),
}


def first_layers(model, number):
    """A model of its own, made of the first layers."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = number
    alone = LlamaForCausalLM(config).to(model.dtype).eval()
    names = set(alone.state_dict())
    alone.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in names})
    return alone


def test_a_generator_with_an_exit_can_be_copied_after_a_call():
    target = tiny_llama(0, num_hidden_layers=4)  # who was ever asked for hidden states cannot be pickled
    gen = SpeculativeGenerator(target, EarlyExit(layers=2), num_draft_tokens=3)
    text = gen.generate(**prompts(1), **LONG).tolist()
    for other in (pickle.loads(pickle.dumps(gen)), copy.deepcopy(gen)):
        assert other.generate(**prompts(1), **LONG).tolist() == text


# --- what is shared -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_an_exit_guesses_what_a_model_of_the_first_layers_does(batch):
    target = deep(torch.float64)
    counts = []
    for draft in (EarlyExit(layers=2), DraftModel(first_layers(target, 2), layout="slots", confidence=0.0)):
        gen = SpeculativeGenerator(target, draft, num_draft_tokens=3, layout="slots")
        got = gen.generate(**prompts(batch), **LONG)
        assert got.tolist() == plain(target, prompts(batch), max_new_tokens=90).tolist()
        counts.append((gen.stats.drafted_at, gen.stats.accepted_at, gen.stats.row_accepted.tolist()))
    assert counts[0] == counts[1]
    assert counts[0][1][0] > 0


def test_an_exit_guesses_with_the_processors_of_the_call():
    """They look at the guesses before, as they do in any draft."""
    target, counts = deep(torch.float64), []
    options = {"max_new_tokens": 30, "do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    for draft in (EarlyExit(layers=2), DraftModel(first_layers(target, 2), layout="slots", confidence=0.0)):
        gen = SpeculativeGenerator(target, draft, num_draft_tokens=4, layout="slots")
        assert gen.generate(**prompts(3), **options).tolist() == target.generate(**prompts(3), **options).tolist()
        counts.append((gen.stats.accepted_at, gen.stats.row_accepted.tolist()))
    assert counts[0] == counts[1]


def test_an_exit_begins_no_guess_that_does_not_pay(monkeypatch):
    monkeypatch.setattr(Fixed, "begins", lambda self, opening=None: False)
    gen = SpeculativeGenerator(deep(), EarlyExit(layers=2), num_draft_tokens=3, layout="slots")
    gen.generate(**prompts(1), max_new_tokens=8, do_sample=False)
    assert gen.stats.drafted == gen.stats.draft_forwards == 0


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("batch", [1, 3])
def test_nothing_is_fed_twice(name, batch):
    """The prompt passes every layer once; a draft step is one token, in some of the target's layers."""
    target, widths = deep(), [[] for _ in range(4)]
    gen = SpeculativeGenerator(target, DRAFTS[name](), num_draft_tokens=3)
    gen.generate(**prompts(batch), **LONG)  # the layout is settled
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[1]))
        for layer, seen in zip(target.model.layers, widths, strict=True)
    ]
    gen.generate(**prompts(batch), **LONG)
    for hook in hooks:
        hook.remove()
    stats = gen.stats
    kept = DRAFTS[name]().kept(4)
    assert stats.draft_layout == "shared slots"
    assert stats.draft_forwards > 0
    for layer, seen in enumerate(widths):
        assert seen.count(START) == 1
        assert len(seen) == stats.target_forwards + stats.draft_forwards * (layer in kept)
    with Counted(target) as counted:  # who listens to the model hears its own passes
        gen.generate(**prompts(batch), **LONG)
    assert counted.calls == stats.target_forwards
    assert [len(w) for w in widths].count(stats.target_forwards) == 4 - len(kept)


def test_keys_and_values_are_the_targets_own(monkeypatch):
    lent = []
    right = Slots.share

    def share(self, model, keep):
        lent.append((self, right(self, model, keep)))
        return lent[-1][1]

    monkeypatch.setattr(Slots, "share", share)
    SpeculativeGenerator(deep(), LayerSkip(skip=[1]), num_draft_tokens=3).generate(**prompts(3), **LONG)
    ((lender, other),) = lent
    own = lender._cache.layers
    assert [own.index(layer) for layer in other._cache.layers] == [0, 2, 3]
    assert other._cache.room == lender._cache.room > 64  # it has grown, and all of it


def test_the_part_is_the_models_own_weights():
    target = copy.deepcopy(deep())
    before = fingerprint(target)
    part = with_layers(target, (0, 2, 3))
    weights = {id(weight) for weight in target.parameters()}
    assert {id(weight) for weight in part.parameters()} < weights
    assert part.config.num_hidden_layers == count_layers(part) == 3
    assert [layer.self_attn.layer_idx for layer in part.model.layers] == [0, 1, 2]
    assert_untouched(target, before)
    assert [layer.self_attn.layer_idx for layer in target.model.layers] == [0, 1, 2, 3]
    assert target.model.layers[0] is part.model.layers[0]


def test_the_part_is_made_once_for_layers_and_attention():
    target, part = copy.deepcopy(deep()), layers_room._Part()
    first = part.of(target, (0, 1))
    assert part.of(target, (0, 1)) is first
    assert count_layers(part.of(target, (0,))) == 1
    target.set_attn_implementation("eager")
    assert part.of(target, (0,)).config._attn_implementation == "eager"


def test_a_text_that_grows_out_of_its_room(monkeypatch):
    """Nothing but a condition ends it, so room is made as it grows."""
    monkeypatch.setattr(state_room, "ROOM", 5)
    gen = SpeculativeGenerator(deep(), EarlyExit(layers=2), num_draft_tokens=3, layout="slots")
    options = {**prompts(3), "do_sample": False}
    options["stopping_criteria"] = [lambda ids, _: torch.full((len(ids),), ids.shape[1] >= 60)]
    wanted = deep().generate(**options, max_new_tokens=60)
    assert gen.generate(**options, max_new_tokens=10**6).tolist() == wanted.tolist()
    assert gen.stats.drafted > 60


def test_the_part_follows_the_models_weights():
    target = copy.deepcopy(deep())
    gen = SpeculativeGenerator(target, LayerSkip(skip=[1]), num_draft_tokens=3, layout="slots")
    gen.generate(**prompts(3), **LONG)
    for change in (lambda: target.double(), lambda: target.model.layers[2].mlp.up_proj.weight.zero_()):
        change()
        got = gen.generate(**prompts(3), **LONG)
        assert got.tolist() == plain(target, prompts(3), max_new_tokens=90).tolist()
        assert gen.stats.draft_layout == "shared slots"
        fresh = SpeculativeGenerator(target, LayerSkip(skip=[1]), num_draft_tokens=3, layout="slots")
        fresh.generate(**prompts(3), **LONG)
        assert gen.stats.accepted == fresh.stats.accepted
    packed = copy.deepcopy(deep())
    gen = SpeculativeGenerator(packed, EarlyExit(layers=2), num_draft_tokens=3)
    gen.generate(**prompts(3), **LONG)
    pack_weights(packed)
    assert gen.generate(**prompts(3), **LONG).tolist() == plain(packed, prompts(3), max_new_tokens=90).tolist()


@pytest.mark.parametrize("name", ["exit", "first left out"])
def test_one_draft_follows_each_of_two_targets(name):
    shared = DRAFTS[name]()
    for target in (deep(), tiny_llama(1, num_hidden_layers=4)):
        accepted = []
        for draft in (shared, DRAFTS[name]()):
            gen = SpeculativeGenerator(target, draft, num_draft_tokens=3, layout="slots")
            gen.generate(**prompts(3), max_new_tokens=40, do_sample=False)
            accepted.append(gen.stats.accepted)
        assert accepted[0] == accepted[1] > 0


@pytest.mark.parametrize("name", ["exit", "first left out"])
def test_a_draft_keeps_no_target_alive(name):
    target, draft = copy.deepcopy(deep()), DRAFTS[name]()
    SpeculativeGenerator(target, draft, num_draft_tokens=3).generate(**prompts(1), **LONG)
    weights = weakref.ref(target.get_input_embeddings())
    del target
    gc.collect()
    assert weights() is None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("draft", ["exit", "first left out"])
def test_adapters_are_switched_between_calls(draft):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    target = peft.get_peft_model(copy.deepcopy(deep(torch.float64)), config)
    target.add_adapter("other", config)
    target.double()  # in float32 one of these texts meets a tie
    gen = SpeculativeGenerator(target, DRAFTS[draft](), num_draft_tokens=3, layout="slots")
    texts = []
    for name in ("default", "other", "default"):
        target.set_adapter(name)
        texts.append(gen.generate(**prompts(3), **LONG).tolist())
        assert texts[-1] == target.generate(**prompts(3), **LONG).tolist()
        assert gen.stats.draft_layout == "shared slots"
        fresh = SpeculativeGenerator(target, DRAFTS[draft](), num_draft_tokens=3, layout="slots")
        fresh.generate(**prompts(3), **LONG)
        assert gen.stats.accepted == fresh.stats.accepted > 0
    assert texts[0] == texts[2] != texts[1]


def test_attention_is_changed_between_calls():
    target = copy.deepcopy(deep())
    gen = SpeculativeGenerator(target, LayerSkip(skip=[1]), num_draft_tokens=3)
    for kind in ("sdpa", "eager"):
        target.set_attn_implementation(kind)
        got = gen.generate(**prompts(3), **LONG)
        assert got.tolist() == plain(target, prompts(3), max_new_tokens=90).tolist()
        assert gen.stats.draft_layout == "shared slots"


@pytest.mark.parametrize("draft", ["exit", "first left out"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("make", "shared"), [(mistral, True), (gemma, True), (gpt2, True), (qwen3_next, False)])
def test_architectures(make, shared, batch, draft):
    """Windows, two kinds of layers, positions that end with the text, a recurrent state that cannot be shared."""
    before = fingerprint(make())
    gen = SpeculativeGenerator(make(), DRAFTS[draft](), num_draft_tokens=4)
    runs = make is not qwen3_next or draft != "exit"  # its cache cannot do with recurrent layers only
    with nullcontext() if runs else pytest.warns(UserWarning, match="drafts nothing with"):
        got = gen.generate(**prompts(batch), max_new_tokens=15, do_sample=False)
    assert got.tolist() == plain(make(), prompts(batch), max_new_tokens=15).tolist()
    assert (gen.stats.drafted > 0) == runs
    assert (gen.stats.draft_layout == "shared slots") == shared
    assert_untouched(make(), before)


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_cache_of_its_own_elsewhere(draft):
    gen = SpeculativeGenerator(deep(), DRAFTS[draft](), num_draft_tokens=3, layout="columns")
    for _ in range(2):
        got = gen.generate(**prompts(3), **LONG)
        assert got.tolist() == plain(deep(), prompts(3), max_new_tokens=90).tolist()
        assert gen.stats.draft_layout == "slots"
        assert gen.stats.drafted > 0


def test_behind_another_proposer():
    gen = SpeculativeGenerator(deep(), Fallback(Suffix(), EarlyExit(layers=3)), num_draft_tokens=3)
    got = gen.generate(**prompts(3), **LONG)
    assert got.tolist() == plain(deep(), prompts(3), max_new_tokens=90).tolist()
    assert gen.stats.draft_layout == "shared slots"


def test_under_a_cascade():
    """A level's text is not the target's, so nothing can be shared there."""
    gen = SpeculativeGenerator(deep(), Cascade(EarlyExit(layers=3), noisy_copy(deep(), 0.02)), num_draft_tokens=3)
    got = gen.generate(**prompts(3), **LONG)
    assert got.tolist() == plain(deep(), prompts(3), max_new_tokens=90).tolist()
    assert gen.stats.accepted > 0


def test_in_a_mixture():
    gen = SpeculativeGenerator(deep(), Mixture("ngram", EarlyExit(layers=3)), num_draft_tokens=3)
    for _ in range(2):
        got = gen.generate(**prompts(3), **LONG)
        assert got.tolist() == plain(deep(), prompts(3), max_new_tokens=90).tolist()


def test_with_the_controller():
    gen = SpeculativeGenerator(deep(), EarlyExit(layers=3))
    for _ in range(2):
        assert gen.generate(**prompts(3), **LONG).tolist() == plain(deep(), prompts(3), max_new_tokens=90).tolist()


# --- caches that the caller sees --------------------------------------------------------------------


def rows_of(skip):
    return SpeculativeGenerator(deep(), LayerSkip(skip=skip), num_draft_tokens=3, layout="slots")


def returned_by(gen):
    """Rows that end far apart: what plain fed to the ended ones is padding, and the cache holds it."""
    inputs = prompts(3)
    free = plain(deep(), inputs, max_new_tokens=40)
    options = {**DICT, "max_new_tokens": 40, "eos_token_id": [int(free[0, START + 3]), int(free[2, START + 12])]}
    wanted = deep().generate(**inputs, **options)
    got = gen.generate(**inputs, **options)
    assert got.sequences.tolist() == wanted.sequences.tolist()
    return got[CACHE], wanted[CACHE]


def test_returned_cache():
    assert_same_cache(*returned_by(rows_of([1])))


def test_a_draft_that_begins_behind_the_committed_tokens_spoils_the_padding(monkeypatch):
    """Ended rows hold padding in columns that no pass writes again, so the draft must keep off them."""
    right = layers_room._InSlots.propose

    def propose(self, state, limits):
        stand_at = self._slots.stand_at
        self._slots.stand_at = lambda _, live: stand_at(state.lengths - 1, live)
        return right(self, state, limits)

    monkeypatch.setattr(layers_room._InSlots, "propose", propose)
    with pytest.raises(AssertionError):
        assert_same_cache(*returned_by(rows_of([1])))


@pytest.mark.parametrize("make", [DynamicCache, lambda: StaticCache(deep().config, max_cache_len=64)])
def test_a_cache_that_is_given(make):
    ids = prompts(1)["input_ids"]
    texts, caches = [], []
    for run in (deep(), rows_of([2])):
        cache, text = make(), ids
        for _ in range(2):
            text = torch.cat([text, ids[:, :3]], dim=1)
            text = run.generate(
                text,
                attention_mask=torch.ones_like(text),
                **{CACHE: cache},
                max_new_tokens=12,
                do_sample=False,
            )
        texts.append(text.tolist())
        caches.append(cache)
    assert texts[0] == texts[1]
    assert_same_cache(caches[1], caches[0], len(texts[0][0]) - 1)


def test_embeddings():
    embeds = deep().get_input_embeddings()(prompts(3)["input_ids"])
    inputs = {"inputs_embeds": embeds, "attention_mask": prompts(3)["attention_mask"], **LONG}
    gen = rows_of([1])
    assert gen.generate(**inputs).tolist() == deep().generate(**inputs).tolist()
    assert gen.stats.drafted > 0


def test_hidden_states_are_not_recorded_twice():
    """transformers records by hooks on modules, and the draft has the same modules."""
    target = copy.deepcopy(deep())
    gen = SpeculativeGenerator(target, EarlyExit(layers=2), num_draft_tokens=3)
    options = {**DICT, "output_hidden_states": True, "max_new_tokens": 9}
    gen.generate(**prompts(3), **LONG)
    got = gen.generate(**prompts(3), **options)
    wanted = deep().generate(**prompts(3), **options)
    assert gen.stats.draft_layout == "shared slots"
    for ours, theirs in zip(got.hidden_states, wanted.hidden_states, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_compiled_target(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    gen = SpeculativeGenerator(deep(), EarlyExit(layers=2), num_draft_tokens=3, compile=True)
    for _ in range(2):
        assert gen.generate(**prompts(3), **LONG).tolist() == plain(deep(), prompts(3), max_new_tokens=90).tolist()
        assert gen.stats.layout == "slots+compiled"
        assert gen.stats.draft_layout == "shared slots"


# --- attached, options of transformers ---------------------------------------------------------------


def test_attached():
    for layout in ("slots", "columns"):
        gen = SpeculativeGenerator(deep(), EarlyExit(layers=2), num_draft_tokens=3, layout=layout)
        with gen.attached():
            got = deep().generate(**prompts(3), **LONG)
        assert got.tolist() == plain(deep(), prompts(3), max_new_tokens=90).tolist()
        assert gen.stats.drafted > 0


@pytest.mark.parametrize("source", ["argument", "config", "the model's own"])
def test_early_exit_of_transformers(source):
    target, options = copy.deepcopy(deep()), {}
    if source == "argument":
        options = {"assistant_early_exit": 2}
    elif source == "config":
        options = {"generation_config": copy.deepcopy(target.generation_config)}
        options["generation_config"].assistant_early_exit = 2
    else:
        target.generation_config.assistant_early_exit = 2
    before = fingerprint(target)
    for draft in (None, "ngram") if source != "the model's own" else (None,):
        gen = SpeculativeGenerator(target, draft, num_draft_tokens=3)
        got = gen.generate(**prompts(3), **options, **LONG)
        assert got.tolist() == plain(deep(), prompts(3), max_new_tokens=90).tolist()
        assert gen.stats.draft_layout == "shared slots"
        assert gen.stats.draft_forwards > 0
    assert_untouched(target, before)


@pytest.mark.parametrize("layout", ["slots", "columns"])
def test_the_confidence_of_an_exit(layout):
    gen = SpeculativeGenerator(deep(), EarlyExit(layers=2, confidence=1.0), num_draft_tokens=3, layout=layout)
    gen.generate(**prompts(1), max_new_tokens=12, do_sample=False)
    assert len(gen.stats.drafted_at) == 1


@pytest.mark.parametrize("draft", [None, EarlyExit(layers=2), LayerSkip(skip=[1])])
def test_the_confidence_of_a_call(draft):
    gen = SpeculativeGenerator(deep(), draft, num_draft_tokens=4)
    exits = {"assistant_early_exit": 2} if draft is None else {}
    for confidence, most in ((1.0, 1), (0.0, 4)):
        gen.generate(**prompts(1), **LONG, **exits, assistant_confidence_threshold=confidence)
        assert len(gen.stats.drafted_at) == most


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EarlyExit(layers=0), "layers=0; give"),
        (lambda: EarlyExit(layers=True), "layers=True; give"),
        (lambda: EarlyExit(layers=1, confidence=2), "confidence=2; give"),
        (lambda: LayerSkip(skip=[]), "draft=None decodes plainly"),
        (lambda: LayerSkip(3), "skip=3; give a list of"),
        (lambda: LayerSkip(skip=[-1]), "from 0"),
        (lambda: LayerSkip(skip=[1], confidence="0.4"), "confidence='0.4'; give a probability"),
        (lambda: LayerSkip(skip=[0.5]), "from 0"),
        (lambda: SpeculativeGenerator(deep(), EarlyExit(layers=4)), "an exit after 4 layers.* 1 to 3"),
        (lambda: SpeculativeGenerator(tiny_llama(num_hidden_layers=1), EarlyExit(layers=1)), "has one layer"),
        (lambda: SpeculativeGenerator(tiny_llama(num_hidden_layers=1), LayerSkip(skip=[0])), "has one layer"),
        (lambda: SpeculativeGenerator(deep(), LayerSkip(skip=[4])), "0 to 3"),
        (lambda: SpeculativeGenerator(deep(), LayerSkip(skip=[8, 1])), "0 to 3"),
        (lambda: SpeculativeGenerator(deep(), LayerSkip(skip=range(4))), "not all"),
    ],
)
def test_layers_that_do_not_exist(make, message):
    with pytest.raises(InvalidInput, match=message):
        make()


def test_models_that_cannot_be_taken_apart():
    twins = copy.deepcopy(deep())
    twins.model.more = torch.nn.ModuleList([torch.nn.Identity() for _ in range(4)])
    shares = copy.deepcopy(deep())
    shares.config.num_kv_shared_layers = 2
    for model, message in [(t5(), "encoder-decoder"), (twins, "2 lists of 4"), (shares, "share keys and values")]:
        with pytest.raises(UnsupportedModel, match=message):
            SpeculativeGenerator(model, EarlyExit(layers=1))
    patched = copy.deepcopy(deep())
    patched.model.forward = patched.model.forward
    with pytest.raises(UnsupportedModel, match="patched"):
        SpeculativeGenerator(patched, EarlyExit(layers=1)).generate(**prompts(1), **LONG)


def test_a_part_that_does_not_run_costs_its_guesses_only(monkeypatch):
    class Fails(torch.nn.Module):
        def forward(self, *args, **kwargs):
            raise KeyError("the value of another layer")

    def broken(model, keep):
        part = with_layers(model, keep)
        part.model.layers[-1] = Fails()
        return part

    monkeypatch.setattr(layers_room, "with_layers", broken)
    gen = SpeculativeGenerator(deep(), LayerSkip(skip=[1]), num_draft_tokens=3)
    with pytest.warns(UserWarning, match="the value of another layer") as told:
        got = gen.generate(**prompts(3), **LONG)
    assert got.tolist() == plain(deep(), prompts(3), max_new_tokens=90).tolist()
    assert gen.stats.drafted == 0
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SpeculativeGenerator(deep(), "ngram").generate(**prompts(3), **LONG)


def test_a_threshold_needs_a_model():
    with pytest.raises(UnsupportedOption, match="assistant_confidence_threshold"):
        SpeculativeGenerator(deep(), "ngram").generate(**prompts(1), **LONG, assistant_confidence_threshold=0.5)


def test_a_part_knows_which_rows_have_ended(monkeypatch):
    """Packed layers leave out rows that have ended, in passes of the part too."""
    target = tiny_llama(3, vocabulary=32)
    target.generation_config.eos_token_id = [5, 6, 7, 8]
    seen = []
    original = layers_room._InSlots.next_scores

    def noted(self, state, step, guessing):
        scores = original(self, state, step, guessing)
        seen.append((state.live.copy(), self._slots._live.copy()))
        return scores

    monkeypatch.setattr(layers_room._InSlots, "next_scores", noted)
    gen = SpeculativeGenerator(target, EarlyExit(1), num_draft_tokens=3, layout="slots")
    gen.generate(**ragged_prompt((9, 6, 3), 32), max_new_tokens=60, do_sample=False)
    assert any(not live.all() for live, _ in seen)
    assert all(live.tolist() == known.tolist() for live, known in seen)
