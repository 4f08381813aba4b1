"""transformers' own options for assisted decoding: the same meaning here, or refused by name."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from specdec import DraftModel, InvalidInput, NGram, SpeculativeGenerator, UnsupportedOption
from specdec.assistance import read_assistance
from specdec.testing import byte_tokenizer, tiny_llama

from .contract import NEW, Counted, assert_untouched, fingerprint, llama, noisy, plain, prompts, speculative
from .test_contract_stopping import text_of
from .test_contract_stopping import tokenizer as letters

GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def run(gen, **options):
    got = gen.generate(**prompts(3), **GREEDY, **options)
    assert got.tolist() == plain(llama(), prompts(3)).tolist()
    return gen.stats


def test_the_draft_of_a_call():
    gen = SpeculativeGenerator(llama())
    assert run(gen).drafted == 0
    before = fingerprint(noisy(llama()))
    with Counted(noisy(llama())) as counted:
        stats = run(gen, assistant_model=noisy(llama()), num_assistant_tokens=3)
    assert counted.calls == stats.draft_forwards > 0
    assert len(stats.drafted_at) == 3
    assert_untouched(noisy(llama()), before)
    assert run(gen).drafted == 0, "for that call only"


def test_the_draft_of_a_call_counts_before_the_generators():
    gen = speculative(llama(), "ngram")
    assert run(gen).draft_forwards == 0
    assert run(gen, assistant_model=noisy(llama())).draft_forwards > 0


def test_what_the_draft_of_a_call_teaches_is_kept_apart():
    gen = SpeculativeGenerator(llama())
    run(gen, assistant_model=noisy(llama()))
    assert gen._memories[noisy(llama())]._known
    assert not gen._memory._known


@pytest.mark.parametrize("number", [1, 4])
def test_guesses_of_a_call(number):
    gen = speculative(llama(), llama(), tokens=2)
    assert len(run(gen).drafted_at) == 2
    assert len(run(gen, num_assistant_tokens=number, num_assistant_tokens_schedule="constant").drafted_at) == number


def test_guesses_in_the_config_of_the_draft():
    draft = copy.deepcopy(llama())
    draft.generation_config.update(num_assistant_tokens=2, assistant_confidence_threshold=0.0)
    assert len(run(SpeculativeGenerator(llama()), assistant_model=draft).drafted_at) == 2


def test_the_confidence_of_a_call():
    gen = speculative(llama(), noisy(llama()), tokens=4)
    assert len(run(gen, assistant_confidence_threshold=1.0).drafted_at) == 1
    assert len(run(gen, assistant_confidence_threshold=0.0).drafted_at) == 4


@pytest.mark.parametrize("source", ["argument", "config", "the model's own"])
def test_prompt_lookup(source):
    target, options = copy.deepcopy(llama()), {}
    if source == "argument":
        options = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    elif source == "config":
        options = {"generation_config": GenerationConfig(pad_token_id=0, prompt_lookup_num_tokens=4)}
    else:
        target.generation_config.prompt_lookup_num_tokens = 4
    inputs = {k: v.repeat(1, 2) for k, v in prompts(3).items() if k == "input_ids"}
    wanted = plain(llama(), inputs, num_return_sequences=1)
    before = fingerprint(target)
    gen = SpeculativeGenerator(target)
    got = gen.generate(**inputs, **options, **GREEDY)
    assert got.tolist() == wanted.tolist()
    assert 0 < max(len(gen.stats.drafted_at), 1) <= 4
    assert gen.stats.drafted > 0
    assert_untouched(target, before)
    several = {"do_sample": True, "top_k": 1, "num_return_sequences": 2, "max_new_tokens": NEW}
    got = gen.generate(**inputs, **options, **several)  # plain generate() refuses this
    assert got.tolist() == wanted.repeat_interleave(2, dim=0).tolist()


def test_prompt_lookup_in_the_models_own_config_yields_to_the_generators_draft():
    target = copy.deepcopy(llama())
    target.generation_config.prompt_lookup_num_tokens = 4
    assert run(speculative(target, noisy(llama()))).draft_forwards > 0


REFUSED = {
    "schedule": (
        {"num_assistant_tokens_schedule": "heuristic"}, UnsupportedOption, "num_assistant_tokens_schedule"
    ),
    "ensemble": ({"assistant_ensemble_weight": 0.5}, UnsupportedOption, "distribution"),
    "a schedule's word elsewhere": ({"speculation_type": "constant"}, UnsupportedOption, "speculation_type"),
    "two drafts": (
        {"assistant_model": llama(), "prompt_lookup_num_tokens": 3}, InvalidInput, "several drafts"
    ),
    "no guess": ({"num_assistant_tokens": 0}, InvalidInput, "num_assistant_tokens=0"),
    "a size of a match alone": ({"max_matching_ngram_size": 3}, UnsupportedOption, "prompt_lookup_num_tokens"),
    "a tokenizer alone": ({"assistant_tokenizer": object()}, UnsupportedOption, "assistant_model"),
    "an exit behind the last layer": ({"assistant_early_exit": 1}, InvalidInput, "has one layer"),
    "an exit and a lookup": (
        {"assistant_early_exit": 1, "prompt_lookup_num_tokens": 3}, InvalidInput, "are several drafts"
    ),
    "a lookup and a tokenizer": (
        {"prompt_lookup_num_tokens": 3, "assistant_tokenizer": object()}, UnsupportedOption, "assistant_tokenizer"
    ),
    "a draft's tokenizer and not the target's": (
        {"assistant_model": llama(), "assistant_tokenizer": byte_tokenizer("a")}, InvalidInput, "give `tokenizer`"
    ),
    "an exit and a tokenizer": (
        {"assistant_early_exit": 1, "assistant_tokenizer": object()}, UnsupportedOption, "assistant_tokenizer"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    options, kind, message = REFUSED[name]
    with Counted(llama()) as counted, pytest.raises(kind, match=message):
        speculative(llama(), "ngram").generate(**prompts(1), **options, **GREEDY)
    assert counted.calls == 0


def test_what_counts_before_what():
    config = GenerationConfig(prompt_lookup_num_tokens=4, max_matching_ngram_size=3)
    found = read_assistance(True, config, None, {})
    assert (found.num_draft_tokens, max(found.draft._sizes)) == (4, 3)
    given = {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 1, "assistant_confidence_threshold": 0.5}
    found = read_assistance(True, config, None, given)
    assert (found.num_draft_tokens, max(found.draft._sizes), found.confidence) == (5, 1, 0.5)
    found = read_assistance(True, None, config, {"prompt_lookup_num_tokens": 5, "num_assistant_tokens": 2})
    assert (found.num_draft_tokens, max(found.draft._sizes)) == (2, 2), "transformers' own length of a match"
    assert read_assistance(True, None, config, {}) is None
    # an argument that is None takes back what a config has; a number that is none is refused, not replaced
    assert read_assistance(True, config, None, {"prompt_lookup_num_tokens": None}) is None
    with pytest.raises(InvalidInput, match="prompt_lookup_num_tokens=0"):
        read_assistance(True, config, None, {"num_assistant_tokens": 0})
    with pytest.raises(InvalidInput, match="max_matching_ngram_size=-1"):
        read_assistance(True, config, None, {"max_matching_ngram_size": -1})
    # what the draft's own settings say yields to the call's
    settings = GenerationConfig(num_assistant_tokens=7, assistant_confidence_threshold=0.25)
    model = SimpleNamespace(generation_config=settings)
    found = read_assistance(True, None, None, {"assistant_model": model})
    assert (found.draft, found.num_draft_tokens, found.confidence) == (model, 7, 0.25)
    given = {"num_assistant_tokens": 3, "assistant_confidence_threshold": 0.0, "assistant_tokenizer": 1}
    found = read_assistance(True, None, None, {"assistant_model": model, **given})
    assert (found.num_draft_tokens, found.confidence, found.tokenizer) == (3, 0.0, 1)


def test_nothing_is_asked_for():
    for given in ({}, {"assistant_early_exit": 0}, {"assistant_early_exit": None, "num_assistant_tokens": None}):
        assert read_assistance(False, GenerationConfig(), GenerationConfig(), given) is None
    for name, value in {"num_assistant_tokens": 3, "assistant_confidence_threshold": 0.5}.items():
        assert read_assistance(False, None, None, {name: value}).draft is None, "the generator's own"


def test_what_an_exit_of_the_models_config_teaches_is_kept():
    gen = SpeculativeGenerator(tiny_llama())
    for _ in range(2):
        gen.generate(**prompts(3), **GREEDY, assistant_early_exit=1)
    assert len(gen._memories) == 1


def test_a_confidence_without_a_model():
    with pytest.raises(UnsupportedOption, match="assistant_confidence_threshold"):
        run(speculative(llama(), NGram()), assistant_confidence_threshold=0.5)


def test_a_draft_model_of_the_callers_keeps_the_generators_draft():
    gen = SpeculativeGenerator(llama(), DraftModel(noisy(llama()), confidence=0.0), num_draft_tokens=3)
    assert len(run(gen, num_assistant_tokens=2).drafted_at) == 2


# --- token healing --------------------------------------------------------------------------------


@pytest.fixture
def tokenizer():
    return letters()


@pytest.mark.parametrize("source", ["argument", "config"])
def test_token_healing(tokenizer, source):
    """generate() heals with the tokenizer of the call, which its door would lose."""
    healed = []
    target = copy.deepcopy(llama())

    def heal(ids, given=None):
        healed.append(given)
        return torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 64], dim=1)

    target.heal_tokens = heal
    options = {"token_healing": True}
    if source == "config":
        options = {"generation_config": GenerationConfig(pad_token_id=0, token_healing=True)}
    wanted = target.generate(**prompts(3), **options, **GREEDY, tokenizer=tokenizer)
    for draft in ("noisy", "ngram", None):
        got = speculative(target, noisy(llama()) if draft == "noisy" else draft).generate(
            **prompts(3), **options, **GREEDY, tokenizer=tokenizer
        )
        assert got.tolist() == wanted.tolist()
    got = speculative(target, "ngram", tokenizer=tokenizer).generate(**prompts(3), **options, **GREEDY)
    assert got.tolist() == wanted.tolist()
    assert healed == [tokenizer] * 5


def test_token_healing_beside_stop_strings():
    target = copy.deepcopy(llama())
    target.heal_tokens = lambda ids, given=None: ids
    text = plain(llama(), prompts(1))[0]
    stop = text_of(text[12:13])
    options = {"token_healing": True, "stop_strings": [stop], "tokenizer": letters()}
    wanted = target.generate(**prompts(1), **options, **GREEDY)
    assert wanted.shape[1] < len(text)
    got = speculative(target, "ngram").generate(**prompts(1), **options, **GREEDY)
    assert got.tolist() == wanted.tolist()


def test_token_healing_without_a_tokenizer_is_refused_as_in_plain():
    for run in (llama().generate, SpeculativeGenerator(llama()).generate):
        with pytest.raises(ValueError, match="tokenizer"):
            run(**prompts(1), token_healing=True, **GREEDY)
