"""Logits processors: every one that generate() builds, and the user's own, act as in plain generate().

Text and scores of every step are compared, with a model, n-grams and nothing as the draft, for one
row and for three padded ones. Processors with a state must see exactly plain's calls.
"""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from transformers import (
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

from specdec import InvalidInput
from specdec.processing import Processing

from .contract import (
    DRAFTS,
    NEW,
    Guesses,
    assert_agrees,
    llama,
    noisy,
    oracle,
    plain,
    prompts,
    speculative,
    t5,
)

BATCHES = (1, 3)


def only_neighbours(row, ids):
    """Ids near the last one; other ones for every row."""
    last = int(ids[-1])
    return [(last * 5 + row * 3 + i) % 64 for i in range(1, 9)]


# name -> options, from the text (a list of new ids of the first row) that comes out without them
OPTIONS = {
    "repetition_penalty": lambda text: {"repetition_penalty": 3.0},
    "repetition_reward": lambda text: {"repetition_penalty": 0.5},
    "no_repeat_ngram_size": lambda text: {"no_repeat_ngram_size": 1},
    "no_repeat_bigrams": lambda text: {"no_repeat_ngram_size": 2, "repetition_penalty": 0.5},
    "bad_word": lambda text: {"bad_words_ids": [[text[2]]]},
    "bad_words": lambda text: {"bad_words_ids": [[text[1], text[2]], [text[4]]]},
    "sequence_bias_one": lambda text: {"sequence_bias": {(text[3],): -50.0}},
    "sequence_bias_many": lambda text: {"sequence_bias": [[[text[1], text[2]], -50.0]]},
    "min_length": lambda text: {"eos_token_id": text[2], "min_length": 15},
    "min_new_tokens": lambda text: {"eos_token_id": text[2], "min_new_tokens": 7},
    "forced_eos_token_id": lambda text: {"forced_eos_token_id": (text[-1] + 1) % 64},
    "exponential_decay": lambda text: {
        "eos_token_id": 5, "exponential_decay_length_penalty": (3, 1.9)
    },
    "suppress_tokens": lambda text: {"suppress_tokens": [text[0], text[3]]},
    "begin_suppress_tokens": lambda text: {"begin_suppress_tokens": [text[0]]},
    "renormalize_logits": lambda text: {"renormalize_logits": True},
    "prefix_allowed_tokens_fn": lambda text: {"prefix_allowed_tokens_fn": only_neighbours},
    "guidance_scale": lambda text: {"guidance_scale": 1.7},
    "lefthash": lambda text: {
        "watermarking_config": WatermarkingConfig(bias=6.0, seeding_scheme="lefthash")
    },
    "selfhash": lambda text: {
        "watermarking_config": WatermarkingConfig(
            bias=6.0, seeding_scheme="selfhash", context_width=2
        )
    },
    "synthid": lambda text: {
        "watermarking_config": SynthIDTextWatermarkingConfig(
            ngram_len=3, keys=[654, 400, 836, 123, 340, 443, 597, 160], sampling_table_size=2**10
        )
    },
}  # fmt: skip


@cache
def without_options(model, batch):
    return plain(model, prompts(batch), return_dict_in_generate=True, output_scores=True)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", OPTIONS)
def test_processor_of_generate(name, batch):
    base = without_options(llama(), batch)
    text = base.sequences[0, -NEW:].tolist()
    drafts = ("noisy",) if name == "selfhash" else DRAFTS  # plain is slow there
    with_it = assert_agrees(llama(), prompts(batch), drafts=drafts, **OPTIONS[name](text))
    assert any(not torch.equal(a, b) for a, b in zip(with_it.scores, base.scores, strict=False)), (
        "the option had no effect: this test shows nothing"
    )


@pytest.mark.parametrize("batch", BATCHES)
def test_several_processors_in_their_order(batch):
    text = plain(llama(), prompts(batch))[0, -NEW:].tolist()
    assert_agrees(
        llama(),
        prompts(batch),
        repetition_penalty=1.4,
        bad_words_ids=[[text[0], text[1]]],
        sequence_bias=[[[text[2]], -3.0], [[text[3], text[4]], 4.0]],
        no_repeat_ngram_size=2,
        min_new_tokens=5,
        eos_token_id=[text[1], 7],
        renormalize_logits=True,
    )


@pytest.mark.parametrize("batch", BATCHES)
def test_remove_invalid_values(batch):
    broken = copy.deepcopy(llama())
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.nan
        broken.lm_head.weight[6] = torch.inf
    clean = noisy(llama())
    text = plain(broken, prompts(batch))
    assert (text[:, -NEW:] == 5).all()  # without the option NaN wins every argmax
    assert_agrees(broken, prompts(batch), drafts=(clean, "ngram", None), remove_invalid_values=True)


def test_remove_invalid_values_where_all_that_is_allowed_is_suppressed():
    """What was forbidden is a number again, and follows after all: the function is asked behind it."""
    options = {"prefix_allowed_tokens_fn": lambda row, ids: [7, 9], "suppress_tokens": [7, 9]}
    guesses = Guesses(lambda row, column, state: 7)
    assert_agrees(llama(), prompts(1), drafts=(guesses,), remove_invalid_values=True, **options)


def test_processors_are_given_what_bfloat16_holds_in_float32():
    asked = {"repetition_penalty": 1.3, "output_scores": True, "return_dict_in_generate": True}
    target = llama(0, torch.bfloat16)
    wanted = plain(target, prompts(1), **asked)
    got = speculative(target, None).generate(**prompts(1), max_new_tokens=NEW, do_sample=False, **asked)
    for ours, theirs in zip(got.scores, wanted.scores, strict=True):
        assert torch.equal(ours, theirs)


def test_what_only_float64_tells_apart_is_a_tie():
    target = copy.deepcopy(llama(0, torch.float64))
    head = target.lm_head.weight
    with torch.no_grad():
        head[1::2] = head[::2] * (1 + 1e-10)
    assert_agrees(target, prompts(1), drafts=("ngram", None))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("masked", [False, True])
def test_negative_prompt(batch, masked):
    negative = torch.randint(3, 64, (batch, 4), generator=torch.Generator().manual_seed(3))
    options = {"guidance_scale": 2.5, "negative_prompt_ids": negative}
    if masked:
        mask = torch.ones_like(negative)
        mask[0, :2] = 0
        options["negative_prompt_attention_mask"] = mask
    with_it = assert_agrees(llama(), prompts(batch), **options)
    without = plain(llama(), prompts(batch), guidance_scale=2.5)
    assert with_it.sequences.tolist() != without.tolist()


ENCODER_OPTIONS = {
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 2.5},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_bos_and_begin_suppress": {"forced_bos_token_id": 9, "begin_suppress_tokens": [55, 17]},
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ENCODER_OPTIONS)
def test_processor_of_an_encoder_decoder(name, batch):
    base = without_options(t5(), batch)
    with_it = assert_agrees(t5(), prompts(batch), **ENCODER_OPTIONS[name])
    assert any(not torch.equal(a, b) for a, b in zip(with_it.scores, base.scores, strict=False)), (
        "the option had no effect: this test shows nothing"
    )


class Bias(LogitsProcessor):
    """A pure function of its arguments: a bias that depends on the last two ids and the length."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        liked = (input_ids[:, -2:].sum(dim=1) + input_ids.shape[1]) % 64
        scores[torch.arange(len(scores)), liked] += 4.0
        return scores


class PureBias(Bias):
    """The same, declared so: it may be called in any order, and for the draft."""

    specdec_pure = True


class InPlace(LogitsProcessor):
    """Writes into the scores it is given, as many processors of users do."""

    def __call__(self, input_ids, scores):
        best = scores.argmax(dim=1, keepdim=True)
        return scores.scatter_(1, best, -99.0)


class PureInPlace(InPlace):
    specdec_pure = True


class Machine(LogitsProcessor):
    """A state machine: what it forbids depends on how often it was called; it records the calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.clone(), scores.clone()))
        scores = scores.clone()
        scores[:, len(self.calls) % 3 :: 3] -= 3.0
        return scores


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", [Bias, PureBias, InPlace, PureInPlace, Machine])
def test_processor_of_the_user(kind, batch):
    with_it = assert_agrees(llama(), prompts(batch), make=lambda: {"logits_processor": [kind()]})
    assert with_it.sequences.tolist() != plain(llama(), prompts(batch)).tolist()


class InPlaceOfACopy(InPlace):
    def __call__(self, input_ids, scores):
        return super().__call__(input_ids, scores.clone())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", [InPlace, PureInPlace])
def test_what_a_processor_writes_into_is_not_what_the_model_said(kind, batch):
    asked = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": NEW, "do_sample": False}
    inputs = prompts(batch)
    wanted = llama().generate(**inputs, **asked, logits_processor=[InPlaceOfACopy()])
    for draft in ("noisy", None):
        got = speculative(llama(), draft).generate(**inputs, **asked, logits_processor=[kind()])
        assert got.sequences.tolist() == wanted.sequences.tolist()
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(wanted.logits), atol=1e-4, rtol=1e-4)


class Returns(LogitsProcessor):
    """Returns what `change` makes of the scores."""

    def __init__(self, change, pure):
        self.change, self.specdec_pure = change, pure

    def __call__(self, input_ids, scores):
        return self.change(scores)


RETURNED = {
    "nothing": (lambda scores: None, "a NoneType"),
    "fewer ids": (lambda scores: scores[:, :40], r"shape \({batch}, 40\)"),
    "one id": (lambda scores: scores[:, :1], r"shape \({batch}, 1\)"),
    "one row": (lambda scores: scores[0], r"shape \(64,\)"),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize("name", RETURNED)
def test_a_processor_that_returns_something_else_is_named(name, pure, batch):
    change, came = RETURNED[name]
    for draft in ("noisy", None):
        with pytest.raises(InvalidInput, match=f"Returns returned.*{came.format(batch=batch)}.*every id"):
            speculative(llama(), draft).generate(
                **prompts(batch), max_new_tokens=NEW, logits_processor=[Returns(change, pure)]
            )


@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_processor_may_return_numbers_of_another_kind(dtype, pure):
    processors = [Returns(lambda scores: scores.to(dtype), pure)]
    wanted = plain(llama(), prompts(3), logits_processor=processors)
    options = {"max_new_tokens": NEW, "do_sample": False, "logits_processor": processors}
    for draft in ("noisy", None):
        assert speculative(llama(), draft).generate(**prompts(3), **options).tolist() == wanted.tolist()


def run_recorded(generate, inputs, **options):
    machine = Machine()
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    text = generate(**inputs, logits_processor=[machine], **options)
    return text, machine.calls


def assert_same_calls(got, wanted, live):
    """The same ids in the same order; close scores for rows that `live(row, length)`."""
    assert len(got) == len(wanted)
    for (ids, scores), (wanted_ids, wanted_scores) in zip(got, wanted, strict=True):
        assert ids.tolist() == wanted_ids.tolist()
        for row in range(len(ids)):
            if live(row, ids.shape[1]):
                torch.testing.assert_close(scores[row], wanted_scores[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("draft", ["noisy", "ngram", "oracle", "oracle with errors", None])
def test_a_stateful_processor_sees_the_calls_of_plain(draft, batch):
    inputs = prompts(batch)
    text, wanted = run_recorded(llama().generate, inputs)
    if draft == "oracle":
        draft = oracle(text)
    elif draft == "oracle with errors":
        draft = oracle(text, wrong={12, 16, 17})
    got_text, got = run_recorded(speculative(llama(), draft).generate, inputs)
    assert got_text.tolist() == text.tolist()
    assert_same_calls(got, wanted, lambda row, length: True)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("draft", ["noisy", "oracle"])
@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_stateful_processor_sees_the_calls_of_plain_past_an_end_of_sequence(draft, place, batch):
    inputs = prompts(batch)
    free, _ = run_recorded(llama().generate, inputs)
    start = inputs["input_ids"].shape[1]
    eos = int(free[0, start + place])
    text, wanted = run_recorded(llama().generate, inputs, eos_token_id=eos)
    draft = oracle(free) if draft == "oracle" else draft
    got_text, got = run_recorded(speculative(llama(), draft).generate, inputs, eos_token_id=eos)
    assert got_text.tolist() == text.tolist()

    def live(row, length):
        return eos not in text[row, start:length].tolist()

    assert_same_calls(got, wanted, live)


def test_a_stateful_processor_beside_a_criterion_sees_the_calls_of_plain():
    inputs = prompts(1)
    stop = [lambda ids, scores: ids.shape[1] >= 15]
    text, wanted = run_recorded(llama().generate, inputs, stopping_criteria=stop)
    gen = speculative(llama(), oracle(run_recorded(llama().generate, inputs)[0]))
    got_text, got = run_recorded(gen.generate, inputs, stopping_criteria=stop)
    assert got_text.tolist() == text.tolist()
    assert_same_calls(got, wanted, lambda row, length: True)


class Flat(LogitsProcessor):
    """Takes the flat view of ids and scores, which only a tensor that lies side by side has."""

    def __init__(self, pure):
        self.specdec_pure = pure

    def __call__(self, ids, scores):
        ids.view(-1), scores.view(-1)
        return scores


@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_processor_and_a_condition_are_shown_whole_tensors(pure, batch):
    inputs, options = prompts(batch), {"max_new_tokens": NEW, "do_sample": False}
    for draft in ("noisy", "ngram", None):
        got = speculative(llama(), draft).generate(
            **inputs,
            **options,
            logits_processor=[Flat(pure)],
            stopping_criteria=[lambda ids, scores: ids.view(-1)[0] < 0] if pure else None,
        )
        assert got.tolist() == plain(llama(), inputs).tolist()


def test_guesses_past_a_rows_length_never_reach_the_text_in_lockstep():
    """A row may submit fewer guesses than its neighbour; what stands behind them is no guess."""
    inputs = prompts(3)
    text, wanted = run_recorded(llama().generate, inputs, pad_token_id=3)

    class Shorter:
        """Submits one guess for the first row, and leaves the right ones behind it unsubmitted."""

        def propose(self, state, limits):
            proposal = oracle(text).propose(state, limits)
            proposal.lengths[0] = min(proposal.lengths[0], 1)
            return proposal

    gen = speculative(llama(), Shorter())
    got_text, got = run_recorded(gen.generate, inputs, pad_token_id=3)
    assert got_text.tolist() == text.tolist()
    assert_same_calls(got, wanted, lambda row, length: True)


def test_a_pure_processor_is_judged_in_wide_rounds_and_shapes_the_draft():
    """Declared pure it costs no lockstep: identical draft and target then accept everything."""
    gen = speculative(llama(), llama())
    gen.generate(**prompts(3), max_new_tokens=NEW, do_sample=False, logits_processor=[PureBias()])
    assert gen.stats.acceptance_rate == 1.0
    gen.generate(**prompts(3), max_new_tokens=NEW, do_sample=False, logits_processor=[Bias()])
    assert gen.stats.acceptance_rate < 1.0


WARPERS = {
    "temperature": {"temperature": 0.6, "top_k": 0},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7, "top_k": 0},
    "min_p": {"min_p": 0.1, "top_k": 0},
    "typical_p": {"typical_p": 0.8, "top_k": 0},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02, "top_k": 0},
    "eta_cutoff": {"eta_cutoff": 0.05, "top_k": 0},
    "top_h": {"top_h": 0.4, "top_k": 0},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95},
    "default top_k": {},
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", WARPERS)
def test_warpers_with_a_single_choice(name, batch):
    """With top_k = 1 sampling has one outcome: plain's text is ours."""
    options = {**WARPERS[name], "top_k": 1, "do_sample": True}
    assert_agrees(llama(), prompts(batch), drafts=("noisy", "ngram"), **options)


@pytest.mark.parametrize("name", WARPERS)
def test_warped_scores_of_every_step_are_plains(name):
    """What a sampled token was drawn from, step by step, is what plain warps after that text."""
    inputs, options = prompts(3), {**WARPERS[name], "do_sample": True, "top_k": 0} | WARPERS[name]
    asked = {"return_dict_in_generate": True, "output_scores": True}
    gen = speculative(llama(), "noisy", seed=5)
    got = gen.generate(**inputs, max_new_tokens=6, **options, **asked)
    assert gen.stats.accepted > 0
    start = inputs["input_ids"].shape[1]
    for step, scores in enumerate(got.scores):
        ids = got.sequences[:, : start + step]
        mask = torch.cat([inputs["attention_mask"], ids.new_ones(3, step)], dim=1)
        wanted = llama().generate(ids, attention_mask=mask, max_new_tokens=1, **options, **asked)
        torch.testing.assert_close(scores, wanted.scores[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("rule", ["block", "token"])
def test_identical_draft_and_target_accept_everything(rule, batch):
    gen = speculative(llama(), llama(), tokens=4, verification=rule, seed=1)
    gen.generate(**prompts(batch), max_new_tokens=40, do_sample=True, temperature=0.7, top_p=0.9, top_k=0)
    assert gen.stats.drafted > 20 * batch
    assert gen.stats.acceptance_rate == 1.0


@pytest.mark.parametrize("processors", [[], [MinLengthLogitsProcessor(1, [1])]])
def test_a_draft_never_guesses_an_id_that_it_has_no_score_for(processors):
    """Its rows are cut or filled up to the ids of the target, and what it does not know cannot be drawn."""
    rows, tokens = torch.tensor([[[-9.0, -8.0, -9.0]]]), torch.zeros(1, 4, dtype=torch.int64)
    processing = Processing(LogitsProcessorList(processors))
    filled = processing.draft(rows, tokens, np.array([2]), 5)
    assert filled.tolist() == [[[-9.0, -8.0, -9.0, -torch.inf, -torch.inf]]]
    assert processing.draft(rows, tokens, np.array([2]), 2).tolist() == [[[-9.0, -8.0]]]


@pytest.mark.parametrize("lengths", [(5, 5, 5), (3, 9, 6), (2, 2, 3), (8, 12, 9)])
@pytest.mark.parametrize(
    "one",
    [MinLengthLogitsProcessor(8, [1, 4]), MinNewTokensLengthLogitsProcessor(3, 5, [1, 4])],
    ids=["length", "new"],
)
def test_a_least_length_is_asked_about_once_a_round(one, lengths, monkeypatch):
    """In a ragged batch there are as many lengths as positions; each would cost a call over all rows and ids."""
    right, calls = type(one).__call__, []
    monkeypatch.setattr(type(one), "__call__", lambda *given: calls.append(len(given[1])) or right(*given))
    scores, tokens, count = torch.randn(3, 4, 6), torch.zeros(3, 16, dtype=torch.int64), 4
    before = scores.clone()
    processing = Processing(LogitsProcessorList([one]))
    assert not processing.in_lockstep
    got = processing.target(scores, tokens, np.array(lengths), np.full(3, count - 1), np.full(3, True))
    short = [[length + i < 8 for i in range(count)] for length in lengths]
    assert calls == ([sum(map(sum, short))] if any(map(any, short)) else [])
    for row, length in enumerate(lengths):
        for i in range(count):
            assert torch.equal(got[row, i], right(one, tokens[:1, : length + i], before[row, i][None])[0])
            assert torch.isneginf(got[row, i]).sum() == 2 * short[row][i]
    assert torch.equal(scores, before)


class Echo(LogitsProcessor):
    """A user's own, which may know how many rows there are."""

    specdec_pure = True

    def __call__(self, input_ids, scores):
        return scores + input_ids.float().sum(dim=1, keepdim=True)


BY_LENGTH = {
    "n-grams": (NoRepeatNGramLogitsProcessor(2), True),
    "words": (NoBadWordsLogitsProcessor([[1, 2], [3]]), True),
    "the encoder's": (EncoderRepetitionPenaltyLogitsProcessor(3.0, torch.tensor([[1], [2], [3]])), False),
    "the user's": (Echo(), False),
}


@pytest.mark.parametrize("lengths", [(3, 9, 6), (5, 6, 5), (4, 4, 4)])
@pytest.mark.parametrize("name", BY_LENGTH)
def test_rows_of_a_length_are_shown_together_and_others_only_to_who_may_number_them(name, lengths, monkeypatch):
    one, alone = BY_LENGTH[name]
    right, calls = type(one).__call__, []
    monkeypatch.setattr(type(one), "__call__", lambda *given: calls.append(given[1].shape) or right(*given))
    torch.manual_seed(1)
    scores, tokens = torch.randn(3, 4, 6), torch.randint(1, 4, (3, 16))
    guesses, live = np.array([3, 0, 2]), np.array([True, False, True])
    processing = Processing(LogitsProcessorList([one]))
    got, wanted = processing.target(scores, tokens, np.array(lengths), guesses, live), guesses + live
    seen = [lengths[row] + i for row in range(3) for i in range(wanted[row])]
    assert [length for _, length in calls] == sorted(set(seen))
    if lengths[0] != lengths[2]:
        assert [rows for rows, _ in calls] == [seen.count(length) if alone else 3 for length in sorted(set(seen))]
    for row in range(3):
        for i in range(wanted[row]):
            ids = tokens[:, : lengths[row] + i]
            assert torch.equal(got[row, i], right(one, ids, scores[:, i])[row]), (row, i)


@pytest.mark.parametrize("ignored", [None, 4, torch.tensor([0, 3, 5])], ids=["nothing", "a prompt", "padding"])
def test_a_repetition_penalty_is_asked_once_a_round(ignored, monkeypatch):
    """``generate()`` gives it the padding of each row, which it leaves out."""
    one = RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=ignored)
    right, calls = type(one).__call__, []
    monkeypatch.setattr(type(one), "__call__", lambda *given: calls.append(given[2].shape) or right(*given))
    torch.manual_seed(2)
    scores, tokens, lengths = torch.randn(3, 4, 6), torch.randint(6, (3, 16)), np.array([6, 11, 8])
    processing = Processing(LogitsProcessorList([one]))
    got = processing.target(scores, tokens, lengths, np.full(3, 3), np.full(3, True))
    assert calls == [(12, 6)]
    for row in range(3):
        for i in range(4):
            ids = tokens[:, : lengths[row] + i]
            assert torch.equal(got[row, i], right(one, ids, scores[:, i])[row]), (row, i)
    if isinstance(ignored, torch.Tensor):
        with pytest.raises(ValueError, match="batch size"):
            processing.target(scores[:2], tokens[:2], lengths[:2], np.full(2, 3), np.full(2, True))
