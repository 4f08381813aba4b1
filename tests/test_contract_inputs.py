"""Inputs, drafts and models: what plain generate() takes, ours takes; all of it is left as it was.

Also drafts that do not fit exactly: another vocabulary size, dtype, length, kind of model.
"""

import copy
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from transformers import LogitsProcessor

from specdec import InvalidInput, SpeculativeGenerator, Store, Suffix
from specdec.testing import noisy_copy, tiny_llama

from .contract import (
    NEW,
    Counted,
    Guesses,
    assert_agrees,
    assert_untouched,
    bart,
    fingerprint,
    gemma,
    llama,
    mamba2,
    noisy,
    oracle,
    plain,
    prompts,
    qwen3_next,
    speculative,
    t5,
    whisper,
)

GREEDY = {"max_new_tokens": NEW, "do_sample": False}
IDS = prompts(3)["input_ids"]
MASK = prompts(3)["attention_mask"]
FULL = IDS[:, -3:]  # three rows without padding

WAYS = {
    "positional": ((IDS,), {"attention_mask": MASK}),
    "inputs": ((), {"inputs": IDS, "attention_mask": MASK}),
    "input_ids": ((), {"input_ids": IDS, "attention_mask": MASK}),
    "no mask": ((FULL,), {}),
    "mask None": ((FULL,), {"attention_mask": None}),
    "mask of ones": ((FULL,), {"attention_mask": torch.ones_like(FULL)}),
    "mask of truth values": ((IDS,), {"attention_mask": MASK.bool()}),
    "mask of bfloat16": ((IDS,), {"attention_mask": MASK.bfloat16()}),
    "padding told by the pad id": ((IDS,), {}),
    "positions": (
        (IDS,), {"attention_mask": MASK, "position_ids": (MASK.cumsum(1) - 1).clamp(min=0)}
    ),
    "other positions": (
        (IDS,), {"attention_mask": MASK, "position_ids": (MASK.cumsum(1) + 4) * MASK}
    ),
    "small integers": ((IDS.int(),), {"attention_mask": MASK.int()}),
    "one token a row": ((IDS[:, -1:],), {"attention_mask": MASK[:, -1:]}),
    "nothing, begins with bos": ((), {}),
    "no cache": ((IDS,), {"attention_mask": MASK, "use_cache": False}),
    "the prompt in chunks": ((IDS,), {"attention_mask": MASK, "prefill_chunk_size": 4}),
    "a hole in the mask": (
        (IDS,), {"attention_mask": MASK * torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 1])}
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("draft", ["noisy", "ngram", "suffix", None])
def test_ways_to_give_a_prompt(draft, way):
    given, options = WAYS[way]
    wanted = llama().generate(*given, **options, **GREEDY)
    got = speculative(llama(), draft).generate(*given, **options, **GREEDY)
    assert got.tolist() == wanted.tolist()
    assert got.dtype == wanted.dtype


def test_a_non_contiguous_prompt():
    ids = IDS[0].repeat_interleave(2)[None, ::2]
    wanted = llama().generate(ids, **GREEDY)
    assert speculative(llama(), "noisy").generate(ids, **GREEDY).tolist() == wanted.tolist()


# --- drafts ---------------------------------------------------------------------------------------


def resized(model, size, scale=0.05):
    """A noisy copy of `model` with `size` token ids: the first ones, or a few more at random."""
    draft = tiny_llama(9, vocabulary=size, num_hidden_layers=1)
    source = noisy_copy(model, scale).state_dict()
    with torch.no_grad():
        for name, weight in draft.state_dict().items():
            rows = min(len(weight), len(source[name]))
            weight[:rows] = source[name][:rows]
    return draft


@pytest.mark.parametrize("size", [199, 202])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_draft_padded_to_another_size(do_sample, size):
    target = tiny_llama(vocabulary=200, num_hidden_layers=1)
    draft = resized(target, size)
    with torch.no_grad():
        draft.lm_head.weight[199:] *= 30.0  # the ids past the smaller size are its favourites
    options = {"do_sample": True, "top_k": 0, "seed": 3} if do_sample else {"do_sample": False}
    found = []
    for which in (None, draft):
        gen = speculative(target, which, verification="coupled")
        found.append(gen.generate(**prompts(3), max_new_tokens=NEW, **options).tolist())
    assert found[0] == found[1]
    assert gen.stats.accepted > 0
    for rule in ("block", "token"):
        gen = speculative(target, draft, verification=rule)
        got = gen.generate(**prompts(3), max_new_tokens=NEW, **options)
        assert got.shape == (3, 9 + NEW)
        assert gen.stats.drafted > 0


def same_words(target, draft):
    """A generator for models whose tokenizers are the same, whatever their sizes."""
    tokenizer = SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(50)})
    return SpeculativeGenerator(target, draft, num_draft_tokens=3, tokenizer=tokenizer, draft_tokenizer=tokenizer)


def test_a_row_with_ids_that_the_draft_has_not_is_not_drafted_for():
    inputs = {k: v.clone() for k, v in prompts(3).items()}
    inputs["input_ids"].clamp_(max=50)
    inputs["input_ids"][1, 6] = 63
    gen = same_words(llama(), resized(llama(), 60))
    got = gen.generate(**inputs, **GREEDY)
    assert got.tolist() == plain(llama(), inputs).tolist()
    assert gen.stats.row_drafted[1] == 0
    assert gen.stats.row_drafted[0] > 0
    assert gen.stats.row_drafted[2] > 0


class Writes63(LogitsProcessor):
    """Makes every row write the last id in column 16."""

    specdec_pure = True

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] != 16:
            return scores
        scores = scores.clone()
        scores[:, 63] = 99.0
        return scores


def test_a_row_is_no_longer_drafted_for_once_it_has_written_such_an_id():
    row = {k: v[:1].clamp(max=50) for k, v in prompts(3).items()}
    options = {"suppress_tokens": [60, 61, 62, 63], "logits_processor": [Writes63()]}
    drafted = []
    # the first call of a model guesses later, for its self-check
    speculative(llama(), "ngram").generate(**row, **GREEDY)
    for new in (7, 24):
        text = plain(llama(), row, max_new_tokens=new, **options)
        gen = same_words(llama(), resized(llama(), 60))
        got = gen.generate(**row, max_new_tokens=new, do_sample=False, **options)
        assert got.tolist() == text.tolist()
        drafted.append(gen.stats.drafted)
    assert text[0, 16] == 63
    assert drafted[0] > 0
    assert drafted[1] <= drafted[0] + 3  # the round that met it, and none after


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_draft_in_another_dtype(do_sample, dtype):
    draft = noisy_copy(llama(), 0.02).to(dtype)
    gen = speculative(llama(), draft, seed=1)
    if do_sample:
        got = gen.generate(**prompts(3), do_sample=True, top_k=1, max_new_tokens=NEW)
    else:
        got = gen.generate(**prompts(3), **GREEDY)
    assert got.tolist() == plain(llama(), prompts(3)).tolist()
    assert gen.stats.accepted > 0


@pytest.mark.parametrize("limit", [4, 9, 12])
@pytest.mark.filterwarnings("ignore:This is a friendly reminder:UserWarning")
def test_a_draft_with_fewer_positions(limit):
    """It drafts as far as it reaches; a prompt longer than that is decoded plainly."""
    draft = copy.deepcopy(noisy(llama()))
    draft.config.max_position_embeddings = limit
    gen = speculative(llama(), draft)
    got = gen.generate(**prompts(3), **GREEDY)
    assert got.tolist() == plain(llama(), prompts(3)).tolist()
    assert (gen.stats.drafted > 0) == (limit == 12)
    full = speculative(llama(), "noisy")
    full.generate(**prompts(3), **GREEDY)
    assert gen.stats.drafted < full.stats.drafted


OTHER_KINDS = {
    "a sliding window for full attention": (llama, gemma),
    "a recurrent draft": (llama, mamba2),
    "a hybrid draft": (llama, qwen3_next),
    "a draft for a recurrent target": (mamba2, llama),
    "a draft for a sliding window": (gemma, llama),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_draft_of_another_kind(name):
    target, draft = (make() for make in OTHER_KINDS[name])
    assert_agrees(target, prompts(3), drafts=(draft,))


OWN_SETTINGS = {
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.1, "top_k": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "bad_words_ids": [[8]]},
    "guidance": {"guidance_scale": 3.0},
    "end of sequence": {"eos_token_id": 24},
    "suppressed": {"suppress_tokens": [34]},
    "a dictionary": {"return_dict_in_generate": True, "output_scores": True},
    "length": {"max_length": 5},
    "limit": {"max_new_tokens": 2},
    "least": {"min_new_tokens": 30},
    "time": {"max_time": 0.0},
    "stop strings": {"stop_strings": ["a"]},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "an end that grows likelier": {"exponential_decay_length_penalty": (2, 1.1)},
    "hidden states": {"output_hidden_states": True, "output_attentions": True},
    "a lookup": {"prompt_lookup_num_tokens": 3},
    "an exit": {"assistant_early_exit": 1},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "the prompt in chunks": {"prefill_chunk_size": 4},
}


# tokenizer): what is None in a config given is taken from the model's own
@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_settings_of_the_drafts_own_config_are_not_the_callers(name):
    draft = copy.deepcopy(llama())
    draft.generation_config.update(**OWN_SETTINGS[name])
    gen = speculative(llama(), draft)
    got = gen.generate(**prompts(3), **GREEDY)
    assert got.tolist() == plain(llama(), prompts(3)).tolist()
    assert gen.stats.acceptance_rate == 1.0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", [t5, bart])
def test_an_encoder_decoder_draft(model, batch):
    gen = speculative(model(), noisy(model(), 0.02))
    got = gen.generate(**prompts(batch), **GREEDY)
    assert got.tolist() == plain(model(), prompts(batch)).tolist()
    assert gen.stats.accepted > 0


@pytest.mark.parametrize("way", ["positional", "inputs", "no mask", "mask of bfloat16"])
@pytest.mark.parametrize("draft", ["itself", "suffix"])
def test_an_encoder_decoder_takes_its_inputs_in_every_way(draft, way):
    given, options = WAYS[way]
    gen = speculative(t5(), t5() if draft == "itself" else draft)
    wanted = t5().generate(*given, **options, **GREEDY)
    assert gen.generate(*given, **options, **GREEDY).tolist() == wanted.tolist()
    if draft == "itself":
        assert gen.stats.acceptance_rate == 1.0  # the draft read the same text


def test_the_mask_of_an_encoder_says_nothing_of_the_answer():
    """It may have as many columns as the answer has begun with."""
    starts = []
    draft = Guesses(lambda row, column, state: starts.append(state.starts.tolist()) or 5)
    speculative(t5(), draft).generate(**prompts(3), decoder_input_ids=IDS, **GREEDY)
    assert starts
    assert all(found == [0, 0, 0] for found in starts)


@pytest.mark.parametrize("draft", ["noisy", "ngram", None])
def test_what_the_encoder_put_out(draft):
    inputs = {"encoder_outputs": t5().get_encoder()(**prompts(3)), "attention_mask": MASK}
    said = pytest.warns(UserWarning, match="drafts nothing") if draft == "noisy" else nullcontext()
    with said:  # the draft has an encoder of its own, and nothing to feed it
        got = speculative(t5(), draft).generate(**inputs, **GREEDY)
    assert got.tolist() == plain(t5(), prompts(3)).tolist()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("way", ["positional", "keyword"])
def test_audio(way, batch):
    """Whisper's generate() is its own; what it hands on is honoured all the same."""
    features = torch.randn(batch, 8, 40, generator=torch.Generator().manual_seed(1))
    given, options = ((features,), {}) if way == "positional" else ((), {"input_features": features})
    wanted = whisper().generate(*given, **options, **GREEDY)
    for draft in (noisy(whisper(), 0.02), "ngram", None):
        gen = speculative(whisper(), draft)
        got = gen.generate(*given, **options, **GREEDY)
        assert got.tolist() == wanted.tolist()
        assert gen.stats.rounds > 0


@cache
def transcriber():
    """Takes recordings of any length piece by piece, 40 frames each, as long as there is something to hear."""
    model = copy.deepcopy(whisper())
    settings = model.generation_config
    settings.update(eos_token_id=3, return_timestamps=True)
    settings.no_timestamps_token_id, settings.prev_sot_token_id = 50, 5
    settings.is_multilingual, settings.max_initial_timestamp_index, settings.alignment_heads = False, None, None
    return model


def recordings(*frames):
    features = torch.randn(len(frames), 8, max(frames), generator=torch.Generator().manual_seed(1))
    heard = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    return {"input_features": features, "attention_mask": heard.long(), "return_timestamps": True}


@pytest.mark.parametrize("frames", [(130,), (130, 70, 35)])
def test_long_recordings(frames):
    """Whisper's generate() decodes once for every piece, with fewer rows as recordings end."""
    model, inputs, options = transcriber(), recordings(*frames), {"max_new_tokens": 10, "do_sample": False}
    wanted = model.generate(**inputs, **options)
    for draft in ("ngram", None):
        gen = speculative(model, draft)
        assert gen.generate(**inputs, **options).tolist() == wanted.tolist()
        stats = gen.stats
        assert stats.decodings == 4
        assert stats.row_emitted.tolist() == [10] * (4 if len(frames) == 1 else 7)
        assert stats.emitted == stats.row_emitted.sum()
        assert stats.accepted == stats.row_accepted.sum() == sum(stats.accepted_at)
        assert stats.target_forwards >= stats.rounds >= 4
        assert stats.seconds > stats.seconds_scoring > 0
        assert 1 <= stats.tokens_per_round <= 10


def test_a_prediction_is_counted_for_every_piece():
    gen = speculative(transcriber(), None)
    gen.generate(**recordings(130), max_new_tokens=10, do_sample=False, prediction=[[7, 8]])
    assert gen.stats.prediction_accepted + gen.stats.prediction_rejected == 4 * 2


@pytest.mark.parametrize("given", [{"prediction": [[7], [8]]}, {"tenant": ["a", "b"]}, {"seed": [1, 2]}])
def test_nobody_guesses_whose_an_entry_is_once_a_recording_has_ended(given):
    gen = speculative(transcriber(), Suffix(store=Store(), tenant="c"), verification="coupled")
    with pytest.raises(InvalidInput, match=r"2 .*for 1 rows"):
        gen.generate(**recordings(130, 35), max_new_tokens=10, do_sample=True, temperature=2.0, **given)


@pytest.mark.parametrize("verification", ["block", "coupled"])
def test_a_seed_says_something_else_of_every_piece(verification):
    inputs = recordings(40)
    piece = inputs["input_features"].repeat(1, 1, 3)
    inputs = {**inputs, "input_features": piece, "attention_mask": torch.ones(1, 120, dtype=torch.long)}
    gen = speculative(transcriber(), "ngram", verification=verification)
    options = {"max_new_tokens": 10, "do_sample": True, "temperature": 5.0, "seed": 3, "return_segments": True}
    first, again = (gen.generate(**inputs, **options)["sequences"][0].tolist() for _ in range(2))
    assert first == again
    pieces = [tuple(first[at : at + 10]) for at in range(0, len(first), 10)]
    assert len(pieces) == 3
    assert len(set(pieces)) == 3


# --- everything is left as it was -----------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("make", [llama, t5, gemma, qwen3_next])
def test_models_are_left_as_they_were(make, do_sample, training):
    target, draft = copy.deepcopy(make()), noisy_copy(make(), 0.05)
    for model in (target, draft):
        model.train(training)
        if make is t5:
            model.eval()  # its dropout would make two calls differ
    before = fingerprint(target), fingerprint(draft)
    speculative(target, draft).generate(
        **prompts(3), max_new_tokens=6, do_sample=do_sample, repetition_penalty=1.2, eos_token_id=9
    )
    assert_untouched(target, before[0])
    assert_untouched(draft, before[1])


def test_plain_generate_is_the_same_afterwards():
    """The masks of transformers are wrapped once; calls that are not ours see no difference."""
    wanted = plain(gemma(), prompts(3))
    speculative(gemma(), "noisy", layout="slots").generate(**prompts(3), **GREEDY)
    assert torch.equal(plain(gemma(), prompts(3)), wanted)


class Broken(Exception):
    pass


def breaks(after):
    """A callable that raises at its call number `after`."""
    calls = []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            raise Broken
        return args

    return broken


def failing(where):
    """(draft, options of a call) with something that raises in a later round."""
    broken = breaks(4)
    if where == "processor":
        return "noisy", {"logits_processor": [lambda ids, scores: (broken(), scores)[1]]}
    if where == "criterion":
        return "noisy", {"stopping_criteria": [lambda ids, scores: bool(broken() is None)]}
    if where == "streamer":
        return "noisy", {"streamer": SimpleNamespace(put=broken, end=lambda: None)}
    if where == "prefix function":
        return "noisy", {"prefix_allowed_tokens_fn": lambda row, ids: (broken(), [1, 2])[1]}
    if where == "observe":
        proposer = Guesses(lambda row, column, state: 5)
        proposer.observe = breaks(2)
        return proposer, {}
    return Guesses(lambda row, column, state: (broken(), 5)[1]), {}


@pytest.mark.parametrize("where", ["processor", "criterion", "streamer", "prefix function", "proposer", "observe"])
def test_an_exception_in_the_middle_leaves_everything_as_it_was(where):
    target, own_draft = copy.deepcopy(llama()), noisy_copy(llama(), 0.05)
    draft, options = failing(where)
    draft = own_draft if draft == "noisy" else draft
    before = fingerprint(target), fingerprint(own_draft)
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=3)
    state = torch.get_rng_state()
    with pytest.raises(Broken):
        gen.generate(**prompts(3), **options, **GREEDY)
    assert torch.equal(torch.get_rng_state(), state)
    assert_untouched(target, before[0])
    assert_untouched(own_draft, before[1])
    wanted = plain(llama(), prompts(3)).tolist()
    assert gen.generate(**prompts(3), **GREEDY).tolist() == wanted
    assert plain(target, prompts(3)).tolist() == wanted


@pytest.mark.parametrize("whose", ["target", "draft"])
def test_a_model_that_fails_once(whose):
    target, draft = copy.deepcopy(llama()), noisy_copy(llama(), 0.05)
    gen = speculative(target, draft)
    broken, armed = breaks(4), []
    model = target if whose == "target" else draft
    hook = model.register_forward_pre_hook(lambda *_: (armed and broken(), None)[1])
    gen.generate(**prompts(3), **GREEDY)  # the layouts are checked, where failing is part of the trial
    armed.append(True)
    with pytest.raises(Broken):
        gen.generate(**prompts(3), **GREEDY)
    hook.remove()
    wanted = plain(llama(), prompts(3)).tolist()
    assert gen.generate(**prompts(3), **GREEDY).tolist() == wanted


def test_calls_do_not_know_of_one_another():
    """Other batches, prompts and options in turn, through one generator."""
    gen = speculative(llama(), "noisy")
    for batch, options in [(3, {}), (1, {}), (3, {"repetition_penalty": 1.3}), (1, {}), (3, {})]:
        got = gen.generate(**prompts(batch), **GREEDY, **options)
        assert got.tolist() == plain(llama(), prompts(batch), **options).tolist()


def test_a_proposer_without_begin_serves_several_calls():
    text = plain(llama(), prompts(3))
    gen = speculative(llama(), oracle(text))
    for _ in range(2):
        assert gen.generate(**prompts(3), **GREEDY).tolist() == text.tolist()
        assert gen.stats.acceptance_rate == 1.0


def test_no_forward_of_the_draft_where_none_can_be_of_use():
    draft = noisy(llama())
    with Counted(draft) as counted:
        speculative(llama(), draft).generate(**prompts(3), max_new_tokens=1, do_sample=False)
        speculative(llama(), draft, tokens=0).generate(**prompts(3), **GREEDY)
    assert counted.calls == 0
