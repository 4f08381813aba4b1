"""The cache: returned as plain generate() returns it, and honoured when the caller gives one.

Conversations of several turns are held twice, by plain generate() and by ours, each going on from its own
cache; texts must be equal, and plain generate() must be able to go on from a cache of ours.
"""

import copy
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria

from specdec import EarlyExit, InvalidInput, SpeculativeGenerator
from specdec.layouts.facts import CACHE
from specdec.layouts.forget import own_cache
from specdec.testing import lively, noisy_copy, ragged_prompt, tiny_llama

from .architectures.build import Case, build
from .contract import (
    NEW,
    Counted,
    Guesses,
    bart,
    gemma,
    llama,
    mamba2,
    mistral,
    noisy,
    oracle,
    plain,
    prompts,
    qwen3_next,
    speculative,
    t5,
)
from .proposers import PROPOSERS

DICT = {"return_dict_in_generate": True, "do_sample": False, "max_new_tokens": NEW}
DRAFTS = ("noisy", "ngram", None)
START = 9


def states(cache):
    """Everything that a cache holds, in order."""
    found = []
    for layer in own_cache(cache).layers:
        for name in ("keys", "values"):
            if getattr(layer, name, None) is not None:
                found.append(getattr(layer, name))
        for name in ("conv_states", "recurrent_states"):
            found += [s for s in getattr(layer, name, {}).values() if s is not None]
    return found


def assert_same_cache(ours, theirs, columns=None):
    assert type(ours) is type(theirs)
    assert [type(a) for a in own_cache(ours).layers] == [type(b) for b in own_cache(theirs).layers]
    assert len(states(ours)) == len(states(theirs)) > 0
    for mine, wanted in zip(states(ours), states(theirs), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)
    for layer in own_cache(ours).layers:
        assert not getattr(layer, "record_past", False)
    if columns is not None:
        assert ours.get_seq_length() == theirs.get_seq_length() == columns


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("make", [llama, mistral, gemma])
@pytest.mark.parametrize("layout", ["slots", "columns", "snapshot", "plain"])
def test_returned_cache(layout, make, draft, batch):
    inputs = prompts(batch)
    free = plain(make(), inputs)
    for eos in (None, [int(free[0, START + 1]), int(free[-1, START + 4])]):
        wanted = make().generate(**inputs, eos_token_id=eos, **DICT)
        gen = speculative(make(), draft, layout=layout)
        got = gen.generate(**inputs, eos_token_id=eos, **DICT)
        assert got.sequences.tolist() == wanted.sequences.tolist()
        assert type(got[CACHE]) is DynamicCache
        assert_same_cache(got[CACHE], wanted[CACHE], got.sequences.shape[1] - 1)


@pytest.mark.parametrize("layout", ["slots", "columns", "snapshot"])
def test_returned_cache_where_rows_end_far_apart(layout):
    """What plain generate() fed to an ended row is padding, and that is what the cache holds."""
    inputs = prompts(3)
    free = plain(llama(), inputs, max_new_tokens=40)
    eos = int(free[2, START + 2])
    options = {**DICT, "max_new_tokens": 40, "eos_token_id": eos}
    wanted = llama().generate(**inputs, **options)
    for draft in (oracle(free), oracle(free, wrong={12, 15, 16, 30}), "noisy", None):
        gen = speculative(llama(), draft, layout=layout)
        with Counted(llama()) as counted:
            got = gen.generate(**inputs, **options)
        assert got.sequences.tolist() == wanted.sequences.tolist()
        assert_same_cache(got[CACHE], wanted[CACHE])
        # one pass at most besides those of the rounds, and the trial of the layout
        assert gen.stats.target_forwards <= counted.calls <= gen.stats.rounds + 9


@pytest.mark.parametrize("make", [llama, mistral])
def test_a_returned_cache_has_no_columns_to_spare(make):
    got = speculative(make(), "noisy", layout="slots").generate(**prompts(3), **DICT)
    for held in states(got[CACHE]):
        assert held.is_contiguous()
        assert held.untyped_storage().nbytes() == held.nbytes


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("make", [mamba2, qwen3_next, t5, bart])
def test_returned_cache_of_other_kinds(make, batch):
    wanted = make().generate(**prompts(batch), **DICT)
    for draft in ("noisy", "ngram", None):
        got = speculative(make(), draft).generate(**prompts(batch), **DICT)
        assert got.sequences.tolist() == wanted.sequences.tolist()
        assert_same_cache(got[CACHE], wanted[CACHE])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["xlnet", "reformer"])
def test_returned_cache_of_a_form_of_its_own(name, batch):
    model = build(Case("causal", name))
    inputs = {key: value[:batch] for key, value in ragged_prompt((9, 6, 3), 96).items()}
    wanted = model.generate(**inputs, **DICT)
    for draft in ("ngram", None):
        with pytest.warns(UserWarning, match="form of its own") if draft else nullcontext():
            got = SpeculativeGenerator(model, draft).generate(**inputs, **DICT)
        assert got.sequences.tolist() == wanted.sequences.tolist()
        assert type(got[CACHE]) is type(wanted[CACHE])
        mine, theirs = (getattr(out[CACHE], "states_cache", out[CACHE]) for out in (got, wanted))
        assert len(mine) == len(theirs) > 0
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_no_cache_no_return():
    options = {**DICT, "use_cache": False}
    assert llama().generate(**prompts(3), **options).get(CACHE) is None
    assert speculative(llama(), "noisy").generate(**prompts(3), **options).get(CACHE) is None


@pytest.mark.parametrize("ended_by", ["criterion", "max_length of the caller's"])
def test_returned_cache_after_a_cut(ended_by):
    """A row that was ahead is cut when it is judged; what it had fed beyond is taken out of the cache."""
    inputs = prompts(3)
    free = plain(llama(), inputs)
    last = int(free[0, START + 2])
    criteria = {
        "criterion": [lambda ids, scores: ids[:, -1] == last],
        "max_length of the caller's": [MaxLengthCriteria(START + 4)],
    }[ended_by]
    for eos in (None, 63):
        options = {**DICT, "eos_token_id": eos, "stopping_criteria": criteria}
        wanted = llama().generate(**inputs, **options)
        for layout in ("slots", "columns", "snapshot"):
            got = speculative(llama(), oracle(free), layout=layout).generate(**inputs, **options)
            assert got.sequences.tolist() == wanted.sequences.tolist()
            assert_same_cache(got[CACHE], wanted[CACHE])


# --- conversations --------------------------------------------------------------------------------


def turn(number, batch):
    """What the user says in a turn: a few tokens, the same for every run."""
    generator = torch.Generator().manual_seed(100 + number)
    return torch.randint(2, 64, (batch, 2 + number), generator=generator)


def converse(run, batch, turns=5, new=4, eos=None, config=None, **options):
    """All turns through ``run``, going on from the cache; the text and the cache at the end."""
    given = prompts(batch)
    ids, mask, cache = given["input_ids"], given["attention_mask"], DynamicCache(config=config)
    options = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True, **options}
    for number in range(turns):
        out = run(input_ids=ids, attention_mask=mask, **{CACHE: cache}, eos_token_id=eos, pad_token_id=0, **options)
        assert out[CACHE] is cache, "the caller's own object is gone on with"
        assert cache.get_seq_length() == out.sequences.shape[1] - 1
        said = turn(number, batch)
        answered = out.sequences[:, ids.shape[1] :]
        ids = torch.cat([out.sequences, said], dim=1)
        mask = torch.cat([mask, (answered != 0).long() if eos else torch.ones_like(answered)], dim=1)
        mask = torch.cat([mask, torch.ones_like(said)], dim=1)
    return ids, cache


def from_scratch(model, batch, turns=5, new=4):
    ids, mask = prompts(batch).values()
    for number in range(turns):
        said = turn(number, batch)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        ids = torch.cat([out, said], dim=1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    return ids


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("make", [llama, mistral, gemma, qwen3_next])
@pytest.mark.parametrize("layout", ["auto", "columns"])
def test_five_turns(layout, make, batch):
    if make is qwen3_next and layout == "columns":
        pytest.skip("a recurrent state cannot be cropped")
    wanted, cache = converse(make().generate, batch, config=make().config)
    assert wanted.tolist() == from_scratch(make(), batch).tolist()
    for draft in DRAFTS:
        gen = speculative(make(), draft, layout=layout)
        got, ours = converse(gen.generate, batch, config=make().config)
        assert got.tolist() == wanted.tolist()
        assert_same_cache(ours, cache)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("layout", ["slots", "columns"])
def test_five_turns_with_ends_of_sequence(layout, masked):
    """Padding behind an end is masked, or seen, as the caller's mask says; in both ways as in plain."""
    free, _ = converse(llama().generate, 3)
    eos = int(free[1, START + 2])
    for draft in DRAFTS:
        texts = []
        for run in (llama().generate, speculative(llama(), draft, layout=layout).generate):
            text, _ = converse(run, 3, eos=eos)
            texts.append(text.tolist())
        assert texts[0] == texts[1]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("make", [llama, gemma])
def test_plain_and_ours_take_turns(make, batch):
    """Each goes on from the cache that the other left."""
    wanted, _ = converse(make().generate, batch)
    gen = speculative(make(), "noisy")
    calls = []

    def alternately(**options):
        calls.append(1)
        return (gen if len(calls) % 2 else make()).generate(**options)

    got, _ = converse(alternately, batch)
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("layout", ["slots", "columns"])
@pytest.mark.parametrize("make", [llama, gemma])
def test_only_what_is_new(make, layout, draft):
    """The ids hold the new turn alone, the mask the whole conversation."""
    said = turn(1, 3)
    texts, caches = [], []
    for run in (make().generate, speculative(make(), draft, layout=layout).generate):
        first = make().generate(**prompts(3), **DICT)
        cache = first[CACHE]
        new = torch.cat([first.sequences[:, -1:], said], dim=1)
        mask = torch.nn.functional.pad(prompts(3)["attention_mask"], (0, NEW + said.shape[1]), value=1)
        out = run(input_ids=new, attention_mask=mask, **{CACHE: cache}, **DICT)
        texts.append(out.sequences.tolist())
        caches.append(out[CACHE])
    assert texts[0] == texts[1]
    assert len(texts[0][0]) == 1 + said.shape[1] + NEW
    assert_same_cache(caches[1], caches[0])


def test_a_cache_is_gone_on_with_whatever_is_returned():
    """Without the dictionary, too, plain generate() writes into the cache that it was given."""
    caches = [DynamicCache(), DynamicCache()]
    options = {"max_new_tokens": NEW, "do_sample": False}
    wanted = llama().generate(**prompts(3), **{CACHE: caches[0]}, **options)
    got = speculative(llama(), "noisy").generate(**prompts(3), **{CACHE: caches[1]}, **options)
    assert got.tolist() == wanted.tolist()
    assert_same_cache(caches[1], caches[0])


def test_sampling_goes_on_from_a_cache():
    options = {"do_sample": True, "top_k": 1}
    wanted, _ = converse(llama().generate, 3)
    for rule in ("block", "token", "coupled"):
        gen = speculative(llama(), "noisy", verification=rule)
        got, _ = converse(gen.generate, 3, **options)
        assert got.tolist() == wanted.tolist()


def test_what_was_said_is_not_fed_again():
    """The first pass of a turn feeds what is new."""
    widths = []
    hook = llama().register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    gen = speculative(llama(), "ngram")
    try:
        converse(gen.generate, 1)
        widths.clear()
        converse(gen.generate, 1)
    finally:
        hook.remove()
    assert widths[0] == START
    assert max(widths[1:]) <= 1 + 5  # a turn, the last token before it, or the guesses of a round


def test_an_exception_leaves_the_cache_at_the_prompt_or_further():
    class Broken(Exception):
        pass

    calls = []

    def breaks(ids, scores):
        calls.append(1)
        if len(calls) == 3:
            raise Broken
        return False

    cache = DynamicCache()
    with pytest.raises(Broken):
        speculative(llama(), "noisy").generate(
            **prompts(3), **{CACHE: cache}, stopping_criteria=[breaks], max_new_tokens=NEW, do_sample=False
        )
    assert cache.get_seq_length() >= START
    assert all(layer.keys is not None for layer in cache.layers)


@pytest.mark.parametrize("layout", ["slots", "columns"])
def test_a_cache_of_the_callers_is_sound_behind_an_exception(layout):
    """It holds what was committed, or the prompt alone, and no guess; whoever gave it can go on from there."""

    class Broken(Exception):
        pass

    def breaks(ids, scores):
        if ids.shape[1] == START + 4:
            raise Broken
        return False

    inputs, cache = prompts(3), DynamicCache()
    wanted = llama().generate(**inputs, **DICT)
    wrong = oracle(wanted.sequences, wrong={START + 3, START + 4, START + 5})
    with pytest.raises(Broken):
        speculative(llama(), wrong, layout=layout).generate(
            **inputs, **{CACHE: cache}, stopping_criteria=[breaks], max_new_tokens=NEW, do_sample=False
        )
    columns = cache.get_seq_length()
    assert START <= columns <= START + 4
    for mine, other in zip(states(cache), states(wanted[CACHE]), strict=True):
        torch.testing.assert_close(mine, other[:, :, :columns], atol=1e-4, rtol=1e-4)
    text = wanted.sequences
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)
    more = llama().generate(text, attention_mask=mask, **{CACHE: cache}, max_new_tokens=4, do_sample=False)
    assert more.tolist() == plain(llama(), inputs, max_new_tokens=NEW + 4).tolist()


class Breaks(LogitsProcessor):
    """Fails on the scores of its call number `place`, counted from 0."""

    specdec_pure = True

    def __init__(self, place=0):
        self.left = place

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return scores


def goes_on_from(make, cache, inputs):
    """Plain generate() writes its own text from a cache that a call left behind."""
    assert len({int(layer.get_seq_length()) for layer in cache.layers}) == 1
    text = plain(make(), inputs, max_new_tokens=NEW)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)
    more = make().generate(text, attention_mask=mask, **{CACHE: cache}, max_new_tokens=4, do_sample=False)
    return more.equal(plain(make(), inputs, max_new_tokens=NEW + 4))


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize("layout", ["slots", "columns", "snapshot", "auto"])
def test_a_cache_of_the_callers_is_sound_behind_an_error_about_the_prompts_scores(layout, make):
    inputs, cache = prompts(3), DynamicCache(config=make().config)
    gen = speculative(make(), "ngram", layout=layout)
    with pytest.raises(KeyboardInterrupt):
        gen.generate(**inputs, **{CACHE: cache}, logits_processor=[Breaks()], max_new_tokens=NEW, do_sample=False)
    assert cache.get_seq_length() == START
    assert goes_on_from(make, cache, inputs)


@pytest.mark.parametrize("make", [tiny_llama, mistral])
@pytest.mark.parametrize("layout", ["slots", "columns", "snapshot", "auto"])
def test_a_cache_of_the_callers_is_sound_behind_a_pass_that_broke_off(layout, make):
    """Between layers, one having written more than the other: in steps, in a trial of the layout, in rounds."""
    inputs, target = prompts(3), copy.deepcopy(make())
    wrong = oracle(plain(make(), inputs), wrong={START + 2, START + 3, START + 5})
    found = set()
    for place in (*range(1, 8), *range(1, 4)):  # at first the layout is still to be tried
        passes = iter(range(99))

        def breaks(*_, passes=passes, place=place):
            if next(passes) == place:
                raise KeyboardInterrupt

        cache = DynamicCache(config=target.config)
        hook = target.model.layers[1].register_forward_pre_hook(breaks)
        try:
            speculative(target, wrong, layout=layout).generate(**inputs, **{CACHE: cache}, **DICT)
        except KeyboardInterrupt:
            assert goes_on_from(make, copy.deepcopy(cache), inputs)
            found.add(cache.get_seq_length())
        finally:
            hook.remove()
    assert min(found) == START
    assert len(found) > 1 or layout != "columns", "committed columns stay where they can"


@pytest.mark.parametrize("name", dict.fromkeys([CACHE, "past_key_values"]))
def test_a_cache_that_is_ahead_of_the_text(name):
    cache = llama().generate(**prompts(1), **DICT)[CACHE]
    kept = copy.deepcopy(cache)
    for ids in (prompts(1)["input_ids"], turn(1, 1)):
        with pytest.raises(InvalidInput, match=CACHE + r" holds 17 columns.*whole conversation"):
            speculative(llama(), "noisy").generate(ids, **{name: cache}, **DICT)
    assert_same_cache(cache, kept)


# --- static caches --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("make", [llama, mistral, gemma, t5, bart])
def test_static_cache_by_name(make, batch):
    options = {**DICT, "cache_implementation": "static", "max_new_tokens": 12}
    wanted = make().generate(**prompts(batch), **options)
    for draft in ("noisy", oracle(wanted.sequences), "ngram", None):
        gen = speculative(make(), draft)
        got = gen.generate(**prompts(batch), **options)
        assert got.sequences.tolist() == wanted.sequences.tolist()
        assert_same_cache(got[CACHE], wanted[CACHE])
        assert (gen.stats.drafted > 0) == (draft is not None)


@pytest.mark.parametrize("new", [1, 2, 3, 4])
def test_a_static_cache_has_room_for_no_more_than_the_text(new):
    options = {**DICT, "cache_implementation": "static", "max_new_tokens": new}
    make = llama.__wrapped__  # a model of its own: transformers keeps the longest static cache with a model
    wanted = make().generate(**prompts(3), **options)
    with pytest.warns(UserWarning, match="of its cache") if new == 3 else nullcontext():
        got = speculative(make(), "ngram").generate(**prompts(3), **options)
    assert got.sequences.tolist() == wanted.sequences.tolist()
    assert_same_cache(got[CACHE], wanted[CACHE])


@pytest.mark.parametrize("make", [llama, t5, bart])
def test_a_row_that_ended_is_not_fed_behind_the_end_of_a_static_cache(make):
    """Its last token never is in plain generate(), and in columns all rows are fed up to the longest."""
    options = {"cache_implementation": "static", "max_new_tokens": 12, "do_sample": False}
    wanted = make().generate(**prompts(3), **options)
    slow = oracle(wanted)
    guess, slow.choose = slow.choose, lambda row, column, state: guess(row, column, state) if row else 63
    gen = speculative(make(), slow, layout="columns")
    assert gen.generate(**prompts(3), **options).tolist() == wanted.tolist()
    assert gen.stats.row_accepted[1] > gen.stats.row_accepted[0]


def test_a_static_cache_without_room_for_the_self_check_says_nothing_of_other_calls():
    """In sampling the layout is settled at the prompt, and a pass too wide for the cache is an error."""
    model = bart.__wrapped__()  # transformers keeps the longest static cache with a model
    gen = speculative(model, "ngram")
    for new, layout in ((3, "plain"), (12, "columns")):
        options = {"cache_implementation": "static", "max_new_tokens": new, "do_sample": True, "top_k": 1}
        wanted = model.generate(**prompts(3), **options)
        with pytest.warns(UserWarning, match="of its cache") if new == 3 else nullcontext():
            assert gen.generate(**prompts(3), **options).tolist() == wanted.tolist()
        assert gen.stats.layout == layout


def test_a_window_that_ends_at_the_last_key_of_a_static_cache():
    """What it shows goes by how many tokens are fed at once; a cache that grows has no such columns."""
    config = GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        window_size=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = lively(GPTNeoForCausalLM(config).eval())
    for kind, layout in (("static", "plain"), ("dynamic", "columns")):
        options = {"cache_implementation": kind, "max_new_tokens": 30, "do_sample": False}
        wanted = model.generate(**prompts(1), **options)
        gen = speculative(model, oracle(wanted, wrong={14, 19, 25}))
        with pytest.warns(UserWarning, match="last key") if kind == "static" else nullcontext():
            assert gen.generate(**prompts(1), **options).tolist() == wanted.tolist()
        assert gen.stats.layout == layout


@pytest.mark.parametrize("batch", [1, 3])
def test_a_static_cache_keeps_a_window_that_the_text_comes_to_pass(batch):
    """It has then overwritten what a step back would need; a check behind a shorter prompt cannot see that."""
    inputs = {name: value[:batch] for name, value in ragged_prompt((4, 3, 2)).items()}
    options = {**inputs, "cache_implementation": "static", "max_new_tokens": 30, "do_sample": False}
    for draft in ("noisy", "ngram"):
        with pytest.raises(InvalidInput, match="would not be exact"):
            speculative(mistral(), draft, layout="columns").generate(**options)
        for layout in ("auto", "slots", "snapshot"):
            gen = speculative(mistral(), draft, layout=layout)
            assert gen.generate(**options).tolist() == mistral().generate(**options).tolist()


def test_the_size_of_a_static_cache():
    options = {**DICT, "cache_implementation": "static", "max_cache_len": 77}
    for run in (llama().generate, speculative(llama(), "noisy").generate):
        assert run(**prompts(3), **options)[CACHE].get_max_length() == 77


@pytest.mark.parametrize("layout", ["slots", "snapshot", "plain"])
@pytest.mark.parametrize("make", [llama, gemma])
def test_a_static_cache_of_the_callers(make, layout):
    texts, caches = [], []
    for run in (make().generate, speculative(make(), "noisy", layout=layout).generate):
        cache = StaticCache(config=make().config, max_cache_len=48)
        ids, mask = prompts(3).values()
        for number in range(3):
            ids = run(input_ids=ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=5, do_sample=False)
            ids = torch.cat([ids, turn(number, 3)], dim=1)
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            if not number:
                addresses = [layer.keys.data_ptr() for layer in cache.layers]
        assert [layer.keys.data_ptr() for layer in cache.layers] == addresses
        texts.append(ids.tolist())
        caches.append(cache)
    assert texts[0] == texts[1]
    assert_same_cache(caches[1], caches[0])


# --- embeddings -----------------------------------------------------------------------------------


def embedded(model, batch):
    ids, mask = prompts(batch).values()
    return {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("layout", ["auto", "slots", "columns"])
def test_embeddings(layout, make, with_ids, batch):
    inputs = embedded(make(), batch)
    if with_ids:
        inputs["input_ids"] = prompts(batch)["input_ids"]
    wanted = make().generate(**inputs, **DICT)
    assert wanted.sequences.shape[1] == NEW + START * with_ids
    for draft in (*DRAFTS, oracle(wanted.sequences)):
        gen = speculative(make(), draft, layout=layout)
        got = gen.generate(**inputs, **DICT)
        assert got.sequences.tolist() == wanted.sequences.tolist()
        assert_same_cache(got[CACHE], wanted[CACHE], START + NEW - 1)
        assert gen.stats.drafted > 0 or draft in (None, "ngram")
    sampled = {"max_new_tokens": NEW, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    for rule in ("block", "coupled"):
        got = speculative(make(), "noisy", verification=rule, layout=layout).generate(**inputs, **sampled)
        assert got.tolist() == wanted.sequences.repeat_interleave(2, dim=0).tolist()


@pytest.mark.parametrize("name", [*PROPOSERS, "auto"])
def test_embeddings_without_ids_and_every_proposer(name):
    """There is no last token of a prompt to begin with."""
    model = tiny_llama(num_hidden_layers=2)
    inputs = embedded(model, 3)
    wanted = plain(model, inputs).tolist()
    draft, more = ("auto", {}) if name == "auto" else PROPOSERS[name](noisy_copy(model, 0.05), wanted)
    gen = speculative(model, draft)
    assert gen.generate(**inputs, **more, max_new_tokens=NEW, do_sample=False).tolist() == wanted


def test_a_soft_prompt_before_the_ids():
    """Embeddings may be longer than the ids that stand for their end."""
    ids, mask = prompts(3).values()
    soft = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(3))
    inputs = {
        "inputs_embeds": torch.cat([soft, llama().get_input_embeddings()(ids)], dim=1),
        "attention_mask": torch.nn.functional.pad(mask, (4, 0), value=1),
    }
    wanted = llama().generate(ids, **inputs, **DICT)
    for draft in DRAFTS:
        for layout in ("slots", "columns"):
            got = speculative(llama(), draft, layout=layout).generate(ids, **inputs, **DICT)
            assert got.sequences.tolist() == wanted.sequences.tolist()
            assert_same_cache(got[CACHE], wanted[CACHE])


def test_embeddings_that_the_draft_cannot_read():
    small = tiny_llama(3, num_hidden_layers=1, hidden_size=16)
    inputs = embedded(llama(), 3)
    gen = speculative(llama(), small)
    with pytest.warns(UserWarning, match="drafts nothing.*embeddings of another size"):
        got = gen.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert got.tolist() == plain(llama(), inputs).tolist()


def test_embeddings_take_positions_of_the_draft():
    """They have no ids, so the text seems to begin behind them."""
    inputs = embedded(gpt2(), 3)
    gen = speculative(gpt2(), gpt2(positions=24))
    got = gen.generate(**inputs, max_new_tokens=40, do_sample=False)
    assert got.tolist() == plain(gpt2(), inputs, max_new_tokens=40).tolist()
    assert 0 < gen.stats.draft_forwards < 40


def test_embeddings_of_an_encoder():
    inputs = embedded(t5(), 3)
    wanted = plain(t5(), inputs)
    for draft in DRAFTS[1:]:
        assert speculative(t5(), draft).generate(**inputs, max_new_tokens=NEW, do_sample=False).tolist() == (
            wanted.tolist()
        )


@pytest.mark.parametrize(("window", "guesses"), [(None, True), (24, True), (13, True), (11, False), (9, False)])
def test_embeddings_take_up_positions_of_a_draft_but_no_columns_of_the_text(window, guesses):
    """Nine embeddings: a draft without a window guesses to the end of the text, others to that of the window."""
    if window is None:
        target = lively(BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).eval())
    else:
        target = llama()
    draft = noisy_copy(target, 0.01)
    if window is not None:
        draft.config.max_position_embeddings = window
    how = {**embedded(target, 1), "max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=2)
    assert gen.generate(**how).tolist() == target.generate(**how).tolist()
    assert (gen.stats.drafted > 0) == guesses
    assert (gen.stats.rounds <= 6) == (window in (None, 24))


# --- positions, token types, starts ---------------------------------------------------------------


class Reaches(StoppingCriteria):
    """Ends all rows at so many columns."""

    def __init__(self, columns):
        self.columns = columns

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.columns)


@cache
def gpt2(positions=64, layers=1):
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=layers, n_head=4, n_positions=positions, bos_token_id=1,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return lively(GPT2LMHeadModel(config).eval())


@pytest.mark.parametrize("layout", ["slots", "columns"])
@pytest.mark.parametrize(
    "draft", ["model", "ngram", "recycling", EarlyExit(1)], ids=["model", "ngram", "recycling", "exit"]
)
def test_no_guess_lies_behind_the_last_position(draft, layout):
    """Plain generate() stops two tokens before them, at a condition that the guesses do not know."""
    target, inputs = gpt2(24, 2), prompts(1)
    how = {**inputs, "max_new_tokens": 60, "do_sample": False}
    wanted = target.generate(**how, stopping_criteria=StoppingCriteriaList([Reaches(22)]))
    far = torch.nn.functional.pad(wanted, (0, 20), value=5)
    draft = {"model": noisy(target), "oracle": oracle(far)}.get(draft, draft)
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=8, layout=layout)
    for _ in range(2):
        got = gen.generate(**how, stopping_criteria=StoppingCriteriaList([Reaches(22)]))
        assert got.tolist() == wanted.tolist()
        assert gen.stats.drafted


@pytest.mark.parametrize("layout", ["slots", "columns"])
@pytest.mark.parametrize("draft", ["model", "ngram", EarlyExit(1)], ids=["model", "ngram", "exit"])
def test_a_row_that_ended_behind_the_last_position_is_not_fed_there(draft, layout):
    """Its last token never is in plain generate(), where all rows come to it together."""
    target, inputs = gpt2(16, 2), prompts(3)
    how = {**inputs, "max_new_tokens": 16 + 1 - inputs["input_ids"].shape[1], "do_sample": False}
    wanted = target.generate(**how)
    for guesses in range(1, 7):
        gen = SpeculativeGenerator(
            target, noisy(target) if draft == "model" else draft, num_draft_tokens=guesses, layout=layout
        )
        assert gen.generate(**how).tolist() == wanted.tolist()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("layout", ["slots", "columns"])
@pytest.mark.parametrize("end", [20, 24, 25])
def test_a_row_that_is_ahead_of_a_condition_is_not_fed_behind_the_last_position(end, layout, static):
    """The others have yet to come to where the condition ends all of them."""
    target, inputs = llama() if static else gpt2(24, 2), prompts(3)
    text = plain(target, inputs, max_new_tokens=16)
    how = {**inputs, "max_new_tokens": 60, "do_sample": False}

    def more():
        cache = {CACHE: StaticCache(target.config, max_cache_len=24)} if static else {}
        return {**cache, "stopping_criteria": StoppingCriteriaList([Reaches(end)])}

    wanted = target.generate(**how, **more())
    first = Guesses(lambda row, column, state: (int(text[row, min(column, 24)]) + (row > 0)) % 64)
    for draft in (first, oracle(text)):
        gen = SpeculativeGenerator(target, draft, num_draft_tokens=4, layout=layout)
        assert gen.generate(**how, **more()).tolist() == wanted.tolist()
    assert gen.stats.tokens_per_round > 1.5


def test_a_prompt_at_the_last_positions_says_nothing_of_other_calls():
    """The self-check has no room there: nothing is guessed, and the next call is checked as ever."""
    target = copy.deepcopy(gpt2(32, 2))
    draft = noisy(target)
    for columns in (30, 9):
        inputs = {"input_ids": torch.arange(3, 3 + columns)[None], "attention_mask": torch.ones(1, columns).long()}
        how = {**inputs, "max_new_tokens": 3 if columns == 30 else NEW, "do_sample": False}
        gen = SpeculativeGenerator(target, draft, num_draft_tokens=3)
        with pytest.warns(UserWarning, match="positions end") if columns == 30 else nullcontext():
            got = gen.generate(**how)
        assert got.tolist() == target.generate(**how).tolist()
    assert (gen.stats.layout, gen.stats.draft_layout) == ("slots", "slots")
    # nor does the draft's, where only that has so few
    other, draft = copy.deepcopy(gpt2(64, 2)), copy.deepcopy(draft)
    for columns in (30, 9):
        inputs = {"input_ids": torch.arange(3, 3 + columns)[None], "attention_mask": torch.ones(1, columns).long()}
        gen = SpeculativeGenerator(other, draft, num_draft_tokens=3)
        gen.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert (gen.stats.drafted > 0) == (columns == 9)
    assert gen.stats.draft_layout == "slots"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", ["slots", "columns"])
def test_token_types(layout, batch):
    inputs = prompts(batch)
    types = torch.tensor([[3, 3, 3, 3, 3, 3, 5, 5, 5]]).expand(batch, -1)
    wanted = plain(gpt2(), {**inputs, "token_type_ids": types})
    assert wanted.tolist() != plain(gpt2(), inputs).tolist()
    for draft in DRAFTS:
        gen = speculative(gpt2(), draft, layout=layout)
        got = gen.generate(**inputs, token_type_ids=types, max_new_tokens=NEW, do_sample=False)
        assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("starts", [[2, 9, 30], 7])
@pytest.mark.parametrize("make", [t5, bart])
def test_decoder_start_of_the_call(make, starts):
    options = {"decoder_start_token_id": starts, "max_new_tokens": NEW, "do_sample": False}
    wanted = make().generate(**prompts(3), **options)
    assert wanted[:, 0].tolist() == (starts if isinstance(starts, list) else [starts] * 3)
    for draft in DRAFTS:
        gen = speculative(make(), draft)
        assert gen.generate(**prompts(3), **options).tolist() == wanted.tolist()
        assert gen.stats.drafted > 0 or draft is None
