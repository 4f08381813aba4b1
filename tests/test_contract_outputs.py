"""What comes back: ids, output classes, scores a step, several samples a prompt, and whose settings win.

Plain generate() is the reference. After a row has ended its scores are zeros.
"""

import copy
from functools import cache

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from specdec import Stats, call
from specdec.testing import lively, ragged_prompt

from .architectures.build import Case, build
from .contract import (
    NEW,
    Counted,
    Guesses,
    assert_agrees,
    assert_scores_agree,
    bart,
    ends,
    gemma,
    llama,
    noisy,
    oracle,
    plain,
    prompts,
    qwen3_next,
    speculative,
    t5,
    whisper,
)

BATCHES = (1, 3)
START = 9
DICT = {"return_dict_in_generate": True}
BOTH = {**DICT, "output_scores": True, "output_logits": True}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("draft", ["noisy", "ngram", None, "oracle"])
@pytest.mark.parametrize("place", [None, 1, 4])
def test_scores_and_logits_of_every_step(place, draft, batch):
    inputs = prompts(batch)
    free = plain(llama(), inputs)
    draft = oracle(free) if draft == "oracle" else draft
    eos = None if place is None else int(free[-1, START + place])
    options = {**BOTH, "eos_token_id": eos, "repetition_penalty": 1.2, "max_new_tokens": NEW}
    wanted = llama().generate(**inputs, do_sample=False, **options)
    got = speculative(llama(), draft).generate(**inputs, do_sample=False, **options)
    assert got.sequences.tolist() == wanted.sequences.tolist()
    lengths = ends(wanted.sequences, START, eos)
    assert_scores_agree(got.scores, wanted.scores, lengths, START)
    assert_scores_agree(got.logits, wanted.logits, lengths, START)
    assert not torch.equal(got.scores[0], got.logits[0])


@pytest.mark.parametrize("eos_beside", [False, True])
def test_scores_are_zeros_after_a_criterion_ended_a_row(eos_beside):
    """The row was ahead when the criterion was asked: what it had written beyond is taken back."""
    inputs = prompts(3)
    free = plain(llama(), inputs)
    eos = 63 if not eos_beside else int(free[2, START + 5])
    last = int(free[0, START + 2])
    options = {**BOTH, "eos_token_id": eos, "max_new_tokens": NEW, "do_sample": False}
    criterion = [lambda ids, scores: ids[:, -1] == last]
    wanted = llama().generate(**inputs, stopping_criteria=criterion, **options)
    gen = speculative(llama(), oracle(free))
    got = gen.generate(**inputs, stopping_criteria=criterion, **options)
    assert got.sequences.tolist() == wanted.sequences.tolist()
    lengths = ends(wanted.sequences, START, [eos, last])
    assert lengths[0] == START + 3
    assert_scores_agree(got.scores, wanted.scores, lengths, START)
    assert_scores_agree(got.logits, wanted.logits, lengths, START)


def test_steps_that_a_criterion_took_back_are_not_returned():
    """One row was far ahead when the criterion ended all of them."""
    inputs = prompts(3)
    free = plain(llama(), inputs)
    options = {**BOTH, "output_hidden_states": True, "max_new_tokens": NEW, "do_sample": False}
    options["stopping_criteria"] = [lambda ids, scores: torch.full((3,), ids.shape[1] >= START + 5)]
    wanted = llama().generate(**inputs, **options)
    draft = Guesses(lambda row, column, state: int(free[row, column]) + (row > 0))
    got = speculative(llama(), draft, tokens=6).generate(**inputs, **options)
    assert got.sequences.tolist() == wanted.sequences.tolist()
    for name in ("scores", "logits", "hidden_states"):
        assert len(got[name]) == len(wanted[name]) == 5


@pytest.mark.parametrize("flags", [(), ("output_scores",), ("output_logits",)])
def test_only_what_was_asked_for(flags):
    out = speculative(llama(), "noisy").generate(
        **prompts(3), max_new_tokens=5, do_sample=False, **DICT, **dict.fromkeys(flags, True)
    )
    assert type(out) is GenerateDecoderOnlyOutput
    for name in ("scores", "logits"):
        assert (getattr(out, name) is not None) == (f"output_{name}" in flags)


def test_flags_without_the_dictionary_are_ignored_as_in_plain():
    options = {"output_scores": True, "output_logits": True}
    wanted = plain(llama(), prompts(3), **options)
    got = speculative(llama(), "noisy").generate(**prompts(3), max_new_tokens=NEW, do_sample=False, **options)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == wanted.dtype == torch.int64
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("flag", ["output_attentions", "output_hidden_states"])
def test_these_outputs_are_ignored_without_the_dictionary_as_in_plain(flag):
    gen = speculative(llama(), "noisy")
    got = gen.generate(**prompts(1), max_new_tokens=NEW, do_sample=False, **{flag: True})
    assert got.tolist() == plain(llama(), prompts(1)).tolist()
    assert gen.stats.drafted > 0


FLAGS = {"output_hidden_states": True, "output_attentions": True}


def assert_states_agree(ours, theirs, lengths, start):
    """A tuple a step of a tuple a layer; zeros in rows that have ended."""
    assert type(ours) is type(theirs) is tuple
    assert len(ours) == len(theirs)
    for step, (mine, wanted) in enumerate(zip(ours, theirs, strict=True)):
        assert type(mine) is tuple
        assert [layer.shape for layer in mine] == [layer.shape for layer in wanted]
        for one, other in zip(mine, wanted, strict=True):
            for row, length in enumerate(lengths):
                if start + step < length:
                    torch.testing.assert_close(one[row], other[row], atol=1e-4, rtol=1e-4)
                else:
                    assert not one[row].any()


@pytest.fixture(params=[llama, gemma, t5, bart, qwen3_next])
def eager(request):
    model = copy.deepcopy(request.param())
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("ends_early", [False, True])
@pytest.mark.parametrize("flags", [FLAGS, {"output_hidden_states": True}])
def test_hidden_states_and_attentions(eager, flags, ends_early, batch):
    inputs = prompts(batch)
    free = plain(eager, inputs)
    start = free.shape[1] - NEW
    eos = [int(free[0, start + 2]), int(free[-1, start + 5])] if ends_early else None
    options = {**DICT, **flags, "eos_token_id": eos, "max_new_tokens": NEW, "do_sample": False}
    wanted = eager.generate(**inputs, **options)
    lengths = ends(wanted.sequences, start, eos)
    for draft in ("noisy", oracle(free), oracle(free, wrong={start + 1, start + 4}), None):
        gen = speculative(eager, draft)
        got = gen.generate(**inputs, **options)
        assert got.sequences.tolist() == wanted.sequences.tolist()
        assert got.keys() == {*wanted.keys()}
        for name in (
            "hidden_states",
            "attentions",
            "decoder_hidden_states",
            "decoder_attentions",
            "cross_attentions",
        ):
            if wanted.get(name) is not None:
                assert_states_agree(got[name], wanted[name], lengths, start)
        for name in ("encoder_hidden_states", "encoder_attentions"):
            for mine, other in zip(got.get(name) or (), wanted.get(name) or (), strict=True):
                torch.testing.assert_close(mine, other)
        if draft is not None and not ends_early:
            assert (gen.stats.drafted > 0) == ("output_attentions" not in flags)


def test_attentions_that_a_model_does_not_tell():
    model = build(Case("multimodal", "pix2struct"))
    options = {**DICT, "output_attentions": True, "max_new_tokens": 3, "do_sample": False}
    options |= {"flattened_patches": torch.rand(2, 6, 34, generator=torch.Generator().manual_seed(0))}
    wanted = model.generate(**options)
    got = speculative(model, "ngram").generate(**options)
    assert got.cross_attentions == wanted.cross_attentions == ((None,) * 4,) * 3


@cache
def openai_gpt():
    """It has no cache."""
    config = OpenAIGPTConfig(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return lively(OpenAIGPTLMHeadModel(config).eval())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("make", "flags"), [(llama, {"use_cache": False}), (openai_gpt, {})])
def test_hidden_states_without_a_cache(make, flags, batch):
    """Plain generate() feeds the whole text in every step, and returns the states of all of it."""
    options = {**DICT, **flags, "output_hidden_states": True, "max_new_tokens": NEW, "do_sample": False}
    wanted = make().generate(**prompts(batch), **options)
    got = speculative(make(), "ngram").generate(**prompts(batch), **options)
    assert got.sequences.tolist() == wanted.sequences.tolist()
    assert len(got.hidden_states) == len(wanted.hidden_states) == NEW
    for mine, other in zip(got.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.filterwarnings("ignore:specdec decodes")
@pytest.mark.parametrize(
    "name", ["causal/gemma3n_text", "multimodal/glm5_next", "causal/rwkv", "causal/xlnet", "causal/xlm"]
)
def test_hidden_states_of_odd_shapes(name):
    """Several streams a token, before the rows or behind the columns; states of more columns than were fed."""
    model = build(Case(*name.split("/")))
    for inputs in (ragged_prompt((7, 5, 3), 112), ragged_prompt((4, 4, 3, 2), 112)):
        options = {**DICT, "output_hidden_states": True, "max_new_tokens": 6, "do_sample": False}
        wanted = model.generate(**inputs, **options)
        got = speculative(model, "ngram").generate(**inputs, **options)
        assert got.sequences.tolist() == wanted.sequences.tolist()
        for mine, other in zip(got.hidden_states, wanted.hidden_states, strict=True):
            for one, two in zip(mine, other, strict=True):
                assert one.shape == two.shape
                torch.testing.assert_close(one, two, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("draft", ["noisy", None])
def test_scores_and_logits_of_half_precision_are_float32(draft):
    target = copy.deepcopy(llama()).to(torch.bfloat16)
    options = {**BOTH, "max_new_tokens": 4, "do_sample": False}
    wanted = target.generate(**prompts(3), **options)
    got = speculative(target, draft).generate(**prompts(3), **options)
    for name in ("scores", "logits"):
        assert {one.dtype for one in got[name]} == {one.dtype for one in wanted[name]} == {torch.float32}


@pytest.mark.filterwarnings("ignore:specdec decodes")
def test_hidden_states_of_odd_shapes_behind_an_end():
    """Rows are the second dimension here, behind the streams of a token."""
    model, inputs = build(Case("causal", "gemma3n_text")), ragged_prompt((7, 5, 3), 112)
    options = {**DICT, "output_hidden_states": True, "max_new_tokens": 6, "do_sample": False}
    eos = int(model.generate(**inputs, **options).sequences[1, 7 + 2])
    wanted = model.generate(**inputs, **options, eos_token_id=eos)
    got = speculative(model, "ngram").generate(**inputs, **options, eos_token_id=eos)
    lengths = ends(wanted.sequences, 7, eos)
    assert got.sequences.tolist() == wanted.sequences.tolist()
    assert min(lengths) == 7 + 3 < max(lengths)
    for step, (mine, other) in enumerate(zip(got.hidden_states, wanted.hidden_states, strict=True)):
        for one, two in zip(mine, other, strict=True):
            for row, length in enumerate(lengths):
                part = one.select(one.ndim - 3, row)
                if 7 + step < length:
                    torch.testing.assert_close(part, two.select(one.ndim - 3, row), atol=2e-3, rtol=2e-3)
                else:
                    assert not part.any()


def test_hidden_states_of_passes_that_are_made_token_by_token():
    """Behind a guess of padding such a model would count positions anew; the states of all its tokens come back."""
    model = build(Case("seq2seq", "m2m_100"))
    inputs, padding = ragged_prompt((7, 5, 3), 112), model.config.pad_token_id
    options = {**DICT, "output_hidden_states": True, "max_new_tokens": NEW, "do_sample": False}
    wanted = model.generate(**inputs, **options)

    def choose(row, column, state):
        column = min(column, wanted.sequences.shape[1] - 1)
        return padding if row == 0 and column % 2 else int(wanted.sequences[row, column])

    gen = speculative(model, Guesses(choose), layout="columns")
    with Counted(model) as counted:
        got = gen.generate(**inputs, **options)
    assert counted.calls > gen.stats.rounds + 4  # no round was a single pass
    assert gen.stats.accepted > 4
    assert got.sequences.tolist() == wanted.sequences.tolist()
    lengths = [wanted.sequences.shape[1]] * 3
    assert_states_agree(got.decoder_hidden_states, wanted.decoder_hidden_states, lengths, 1)


def test_attentions_that_the_kernel_does_not_give():
    """With sdpa plain generate() returns an empty tuple a step, as many as the longest row has."""
    eos = int(plain(llama(), prompts(3))[0, START + 1])
    options = {**DICT, **FLAGS, "max_new_tokens": 5, "do_sample": False, "eos_token_id": eos}
    wanted = llama().generate(**prompts(3), **options)
    got = speculative(llama(), "noisy").generate(**prompts(3), **options)
    assert got.attentions == wanted.attentions == ((),) * 5
    assert (got.sequences[0, START + 2 :] == 0).all()
    assert len(got.hidden_states) == 5


@pytest.mark.parametrize("normalize", [False, True])
def test_compute_transition_scores(normalize):
    inputs = prompts(3)
    eos = int(plain(llama(), inputs)[1, START + 3])
    found, lengths = [], []
    for run in (llama().generate, speculative(llama(), "noisy").generate):
        out = run(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=eos, output_scores=True, **DICT)
        found.append(llama().compute_transition_scores(out.sequences, out.scores, normalize_logits=normalize))
        lengths = ends(out.sequences, START, eos)
    assert found[0].shape == found[1].shape
    for row, length in enumerate(lengths):
        torch.testing.assert_close(
            found[1][row, : length - START], found[0][row, : length - START], atol=1e-4, rtol=1e-4
        )


def test_speculation_is_the_stats_of_the_call():
    gen = speculative(llama(), "noisy")
    first = gen.generate(**prompts(3), max_new_tokens=6, do_sample=False, **DICT)
    assert isinstance(first.speculation, Stats)
    assert first.speculation is gen.stats
    assert first.speculation.emitted == 18
    gen.generate(**prompts(1), max_new_tokens=3, do_sample=False)
    assert gen.stats.emitted == 3
    assert first.speculation.emitted == 18


@pytest.mark.parametrize("pad", [0, 2, 63])
def test_padding_after_the_end(pad):
    free = plain(llama(), prompts(3))
    eos = [int(free[0, START + 1]), int(free[1, START + 4])]
    wanted = plain(llama(), prompts(3), eos_token_id=eos, pad_token_id=pad)
    for draft in ("noisy", "ngram", oracle(free)):
        got = speculative(llama(), draft).generate(
            **prompts(3), max_new_tokens=NEW, do_sample=False, eos_token_id=eos, pad_token_id=pad
        )
        assert got.tolist() == wanted.tolist()
    assert (wanted[0, START + 2 :] == pad).all()


@pytest.mark.parametrize("pad", [-1, 64])
@pytest.mark.parametrize("layout", ["slots", "columns"])
def test_padding_that_no_model_can_be_fed(layout, pad):
    """Llama's first checkpoints name -1, and a new token may be in the tokenizer only.

    Plain generate() can go on as long as no row has ended.
    """
    free = plain(llama(), prompts(3))
    for more in ({}, {"eos_token_id": int(free[0, START + 2]), "max_new_tokens": 4}):
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": pad, **more}
        wanted = plain(llama(), prompts(3), **options)
        for draft in ("noisy", "ngram", oracle(free, wrong={START + 5})):
            got = speculative(llama(), draft, layout=layout).generate(**prompts(3), **options)
            assert got.tolist() == wanted.tolist()
    assert wanted[0, -1] == pad


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model", [t5, bart])
def test_encoder_decoder(model, batch):
    target, inputs = model(), prompts(batch)
    free = plain(target, inputs)
    eos = int(free[0, 5])
    options = {**BOTH, "eos_token_id": eos, "max_new_tokens": NEW, "do_sample": False}
    wanted = target.generate(**inputs, **options)
    for draft in ("noisy", "ngram", None, oracle(free)):
        got = speculative(target, draft).generate(**inputs, **options)
        assert type(got) is GenerateEncoderDecoderOutput
        assert got.sequences.tolist() == wanted.sequences.tolist()
        lengths = ends(wanted.sequences, 1, eos)
        assert_scores_agree(got.scores, wanted.scores, lengths, 1)
        assert_scores_agree(got.logits, wanted.logits, lengths, 1)


@pytest.mark.parametrize("model", [t5, bart])
def test_encoder_decoder_with_a_begun_answer(model):
    begun = torch.tensor([[2, 9, 30], [2, 31, 8], [2, 5, 5]])
    assert_agrees(model(), {**prompts(3), "decoder_input_ids": begun}, drafts=("noisy", "ngram"))


@pytest.mark.parametrize("draft", ["noisy", "ngram", None])
@pytest.mark.parametrize("model", [llama, t5])
def test_several_samples_a_prompt(model, draft):
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8, "top_k": 0}
    inputs = {k: v[:2] for k, v in prompts(3).items()}
    start = START if model is llama else 1
    reference = speculative(model(), None, verification="coupled").generate(**inputs, seed=4, **options)
    got = speculative(model(), draft, verification="coupled").generate(**inputs, seed=4, **options)
    assert got.shape == (6, start + 8)
    assert got.tolist() == reference.tolist()
    if model is llama:
        wanted = inputs["input_ids"].repeat_interleave(3, dim=0)
        assert got[:, :start].tolist() == wanted.tolist()
    assert len({tuple(row) for row in got.tolist()}) == 6
    for rule in ("block", "token"):
        gen = speculative(model(), draft, verification=rule)
        assert gen.generate(**inputs, seed=4, **options).shape == (6, start + 8)


def test_several_samples_a_prompt_without_a_mask():
    ids = prompts(3)["input_ids"][:1]
    gen = speculative(llama(), "noisy", verification="coupled", seed=1)
    options = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 6, "pad_token_id": 0}
    assert gen.generate(ids, **options).shape == (4, START + 6)


@pytest.mark.parametrize("masked", [False, True])
def test_several_samples_of_rows_with_positions_of_their_own(masked):
    ids = prompts(3)["input_ids"][:2, -3:]
    inputs = {"input_ids": ids, "position_ids": torch.tensor([[2, 3, 4], [7, 8, 9]])}
    inputs |= {"attention_mask": torch.ones_like(ids)} if masked else {}
    options = {"do_sample": True, "num_return_sequences": 2, "top_k": 1, "max_new_tokens": NEW}
    wanted = llama().generate(**inputs, **options)
    gen = speculative(llama(), llama())
    assert gen.generate(**inputs, **options).tolist() == wanted.tolist()
    assert gen.stats.acceptance_rate == 1.0


@pytest.mark.parametrize("samples", [0, -1])
def test_less_than_one_sample_is_one_as_in_plain(samples):
    ids = prompts(3)["input_ids"][:1]
    options = {"do_sample": True, "num_return_sequences": samples, "top_k": 1, "max_new_tokens": 3}
    assert speculative(llama(), "noisy").generate(ids, **options).equal(llama().generate(ids, **options))


def test_several_samples_of_what_was_heard():
    """Whisper's generate() makes the rows itself, and asks for one of each."""
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1))
    options = {"do_sample": True, "num_return_sequences": 2, "top_k": 1, "max_new_tokens": NEW}
    wanted = whisper().generate(features, **options)
    gen = speculative(whisper(), whisper())
    assert gen.generate(features, **options).tolist() == wanted.tolist()
    assert gen.stats.acceptance_rate == 1.0


def test_what_is_repeated_for_several_samples():
    inputs = {
        "position_ids": torch.tensor([[[1, 2], [3, 4]]] * 3),
        "pictures": torch.tensor([5, 6, 7]),
        "rows": torch.tensor([8, 9]),
    }
    found = call._repeated(llama(), inputs, 4, 2)
    assert found["position_ids"].tolist() == [[[1, 2], [1, 2], [3, 4], [3, 4]]] * 3
    assert found["pictures"].tolist() == [5, 6, 7]
    assert found["rows"].tolist() == [8, 8, 9, 9]
    assert call._repeated(llama(), inputs, 2, 1) is inputs


@pytest.mark.parametrize("eos", [torch.tensor(5), torch.tensor([5, 6])])
def test_several_samples_and_a_tensor_that_is_no_input(eos):
    options = {"do_sample": True, "num_return_sequences": 2, "top_k": 1, "eos_token_id": eos}
    wanted = llama().generate(**prompts(3), max_new_tokens=NEW, **options)
    got = speculative(llama(), "noisy").generate(**prompts(3), max_new_tokens=NEW, **options)
    assert got.tolist() == wanted.tolist()


def test_several_greedy_samples_are_refused_as_in_plain():
    for run in (llama().generate, speculative(llama(), "noisy").generate):
        with pytest.raises(ValueError, match="num_return_sequences"):
            run(**prompts(1), do_sample=False, num_return_sequences=2, max_new_tokens=3)


SETTINGS = {
    "the model's own": ({"repetition_penalty": 2.0}, None, {}),
    "config over the model's": ({"repetition_penalty": 9.0}, {"repetition_penalty": 2.0}, {}),
    "config keeps the model's": ({"repetition_penalty": 2.0}, {"max_new_tokens": 7}, {}),
    "kwargs over config": ({}, {"repetition_penalty": 9.0}, {"repetition_penalty": 2.0}),
    "kwargs over all": (
        {"repetition_penalty": 9.0, "max_new_tokens": 3},
        {"repetition_penalty": 5.0, "max_new_tokens": 4},
        {"repetition_penalty": 2.0, "max_new_tokens": 8},
    ),
    "sampling by the model's own": ({"do_sample": True, "top_k": 1}, None, {}),
    "sampling by config": ({}, {"do_sample": True, "top_k": 1}, {}),
    "greedy over the model's": ({"do_sample": True}, None, {"do_sample": False}),
    "dictionary by config": ({}, {"return_dict_in_generate": True, "output_scores": True}, {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_whose_settings_win(name):
    own, given, options = SETTINGS[name]
    model = copy.deepcopy(llama())
    model.generation_config.update(**{"max_new_tokens": NEW, **own})
    config = None if given is None else GenerationConfig(pad_token_id=0, **given)
    before = None if config is None else copy.deepcopy(config.to_dict())
    options = {"generation_config": config, **options}
    wanted = model.generate(**prompts(3), **options)
    got = speculative(model, noisy(llama())).generate(**prompts(3), **options)
    assert type(got) is type(wanted)
    if not isinstance(got, torch.Tensor):
        wanted, got = wanted.sequences, got.sequences
    assert got.tolist() == wanted.tolist()
    if config is not None:
        assert config.to_dict() == before


def test_lists_and_tensors_of_the_caller_stay_as_they_were():
    inputs = prompts(3)
    copies = {k: v.clone() for k, v in inputs.items()}
    processors = LogitsProcessorList([lambda ids, scores: scores])
    criteria = StoppingCriteriaList([lambda ids, scores: False])
    speculative(llama(), "noisy").generate(
        **inputs,
        logits_processor=processors,
        stopping_criteria=criteria,
        stop_strings=None,
        repetition_penalty=1.5,
        max_new_tokens=5,
        do_sample=False,
    )
    assert len(processors) == len(criteria) == 1
    for name, tensor in copies.items():
        assert torch.equal(inputs[name], tensor)


def test_the_result_is_the_callers_own():
    """Writing into it changes no later call."""
    gen = speculative(llama(), "noisy")
    first = gen.generate(**prompts(3), max_new_tokens=5, do_sample=False)
    kept = first.clone()
    first.fill_(7)
    assert torch.equal(gen.generate(**prompts(3), max_new_tokens=5, do_sample=False), kept)
