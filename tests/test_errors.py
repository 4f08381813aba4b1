"""Errors: what cannot be honoured is refused by name, before any model has run.

Every message says what came, what is wanted and what to do. What only a round can meet (scores that
are NaN, nonsense of a proposer) is refused in that round, and the next call is right again.
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, LogitsProcessor

from specdec import (
    DraftModel,
    EarlyExit,
    InvalidInput,
    InvalidProposal,
    InvalidScores,
    LayerSkip,
    NGram,
    Proposal,
    ShapedRelease,
    SpecdecError,
    SpeculativeGenerator,
    Store,
    Suffix,
    UnsupportedModel,
    UnsupportedOption,
    VocabularyMismatch,
    prune_head,
)
from specdec.layouts.facts import CACHE
from specdec.testing import TableModel, tiny_llama
from specdec.whole import real, whole

from .contract import Counted, bart, llama, noisy, oracle, plain, prompts, speculative, t5

IDS = prompts(1)["input_ids"]
SHORT = {"max_new_tokens": 9, "do_sample": False}


# --- the constructor ------------------------------------------------------------------------------


def tokenizer(words):
    """As much of a tokenizer as is looked at."""
    return SimpleNamespace(get_vocab=lambda: {w: i for i, w in enumerate(words)})


CONSTRUCTIONS = {
    "negative k": ({"num_draft_tokens": -1}, InvalidInput, r"num_draft_tokens=-1.*>= 0"),
    "k no whole number": ({"num_draft_tokens": 2.0}, InvalidInput, r"2\.0.*whole number"),
    "k a word": ({"num_draft_tokens": "5"}, InvalidInput, r"'5'.*whole number"),
    "k a truth value": ({"num_draft_tokens": True}, InvalidInput, r"True.*whole number"),
    "k missing": ({"num_draft_tokens": None}, InvalidInput, r"None.*whole number"),
    "unknown rule": ({"verification": "typical"}, InvalidInput, r"'typical'.*'block'.*'coupled'"),
    "unknown layout": ({"layout": "rows"}, InvalidInput, r"'rows'.*'slots'.*'columns'"),
    "unknown word": ({"draft": "eagle"}, InvalidInput, r"'eagle'.*'ngram'"),
    "no draft at all": ({"draft": 7}, UnsupportedModel, r"int.*propose.*'ngram'"),
    "a class for a model": ({"draft": dict}, UnsupportedModel, r"class dict.*object"),
    "encoder-decoder draft": ({"draft": t5}, UnsupportedModel, r"T5For.*LlamaFor"),
    "other vocabulary": (
        {"draft": lambda: tiny_llama(vocabulary=90)}, VocabularyMismatch, r"64.*90.*tokenizer"
    ),
    "other vocabulary, one tokenizer": (
        {"draft": lambda: tiny_llama(vocabulary=90), "tokenizer": tokenizer("abcd")},
        VocabularyMismatch,
        r"Pass both tokenizers, `tokenizer` .*`draft_tokenizer`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_constructor(name):
    options, kind, message = CONSTRUCTIONS[name]
    draft = options.get("draft", "ngram")
    draft = draft() if callable(draft) and draft is not dict else draft
    with Counted(llama()) as counted, pytest.raises(kind, match=message):
        SpeculativeGenerator(llama(), **{**options, "draft": draft})
    assert counted.calls == 0


@pytest.mark.parametrize("target", [None, "gpt2", torch.nn.Linear(2, 2)])
def test_a_target_that_is_no_model(target):
    with pytest.raises(UnsupportedModel, match=f"{type(target).__name__}.*generate"):
        SpeculativeGenerator(target)


class Speaks(LlamaForCausalLM):
    """Draws its tokens itself, as CSM and Higgs Audio do."""

    def _sample(self, input_ids, **kwargs):
        return input_ids[:, :1]


def test_a_target_with_a_loop_of_its_own():
    target = Speaks(llama().config)
    with pytest.raises(UnsupportedModel, match=r"Speaks decodes in a loop of its own.*target\.generate"):
        SpeculativeGenerator(target, "ngram")
    speculative(llama(), target).generate(**prompts(1), **SHORT)  # a draft makes passes only


def test_a_decoder_only_draft_for_an_encoder_decoder():
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM and T5For"):
        SpeculativeGenerator(t5(), llama())


@pytest.mark.parametrize("words", ["badc", "ab"])
def test_encoder_decoders_with_unlike_tokenizers(words):
    with pytest.raises(VocabularyMismatch, match=r"tokenizers differ.*decoder-only.*same family"):
        SpeculativeGenerator(t5(), t5(), tokenizer=tokenizer("abcd"), draft_tokenizer=tokenizer(words))


def test_an_encoder_decoder_draft_that_begins_with_another_token():
    """Found only when a call prepares both prompts: Bart puts its own start before T5's."""
    gen = SpeculativeGenerator(t5(), bart())
    with Counted(t5(), bart()) as counted, pytest.raises(UnsupportedModel, match="special tokens"):
        gen.generate(**prompts(3), max_new_tokens=6, do_sample=False)
    assert counted.calls == 0


@pytest.mark.parametrize(
    ("longest", "shortest", "message"),
    [
        (0, 1, "longest=0; .* >= shortest=1"),
        (1, 2, "longest=1; .* >= shortest=2"),
        (2.5, 1, "longest=2.5; .*whole number"),
        (3, 0, "shortest=0; .* >= 1"),
        (-1, -1, "shortest=-1; .* >= 1"),
        (3, True, "shortest=True; .*whole number"),
    ],
)
def test_ngram_sizes(longest, shortest, message):
    with pytest.raises(InvalidInput, match=message):
        NGram(longest, shortest)


@pytest.mark.parametrize("confidence", ["0.4", True, float("nan"), 1.5, -0.1, [0.4], torch.ones(2)])
def test_a_confidence_that_is_no_probability(confidence):
    for make in (DraftModel, lambda model, **given: DraftModel(model).sure(**given)):
        with pytest.raises(InvalidInput, match=r"confidence=.*from 0 to 1, or None"):
            make(llama(), confidence=confidence)


@pytest.mark.parametrize("kind", [np.float32, torch.tensor])
def test_a_confidence_of_any_kind(kind):
    got = speculative(llama(), DraftModel(noisy(llama()), confidence=kind(0.5))).generate(**prompts(1), **SHORT)
    assert got.equal(plain(llama(), prompts(1), max_new_tokens=9))


def test_what_is_a_number():
    assert [whole(one) for one in (3, np.int8(3), torch.tensor(3))] == [3] * 3
    assert not any(whole(one) for one in (True, np.True_, torch.tensor(True), 3.0, "3", None, torch.ones(2)))
    assert [real(one) for one in (0.5, np.float32(0.5), torch.tensor(0.5))] == [0.5] * 3
    assert not any(
        real(one)
        for one in (True, np.True_, torch.tensor(True), "0.5", b"0.5", None, [0.5], torch.ones(2), 10**400)
    )


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor], ids=["int64", "uint8", "tensor"])
def test_whole_numbers_of_any_kind(kind):
    two, model = kind(2), tiny_llama()
    given = {**prompts(1), "max_new_tokens": 9, "do_sample": False}
    wanted = model.generate(**given)
    drafts = [NGram(two, two), Suffix(shortest=two), EarlyExit(kind(1)), LayerSkip(skip=[kind(1)])]
    for draft in (*drafts, Suffix(store=Store(tokens=kind(100), tenants=two), tenant="me")):
        assert SpeculativeGenerator(model, draft, num_draft_tokens=two).generate(**given).equal(wanted)
    by_name = {"prompt_lookup_num_tokens": two, "max_matching_ngram_size": two}
    assert speculative(model, None).generate(**given, **by_name).equal(wanted)
    told = speculative(model, "ngram").generate(**given, prediction=[kind(5), kind(7), kind(5)])
    assert told.equal(wanted)
    assert prune_head(model, range(9), n=kind(20)).generate(**given).shape == wanted.shape
    assert ShapedRelease(two, 0.1, kind(64), bucket=two) == ShapedRelease(2, 0.1, 64, bucket=2)


# --- options of generate() ------------------------------------------------------------------------

REFUSED = {
    "num_beams": 2,
    "cache_implementation": "quantized",
    "penalty_alpha": 0.6,
    "dola_layers": "high",
}
ARGUMENTS = {
    "cache_params": DynamicCache,
    "custom_generate": lambda: print,
    "synced_gpus": lambda: True,
    "use_mtp": lambda: True,
}


def assert_refused(target, kind, message, /, *inputs, **options):
    draft = noisy(llama())
    with Counted(target, draft) as counted, pytest.raises(kind, match=message) as raised:
        SpeculativeGenerator(target, draft).generate(*inputs, **options)
    assert counted.calls == 0
    return raised.value


@pytest.mark.parametrize("source", ["argument", "config", "the model's own"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_setting(name, source):
    target, options = copy.deepcopy(llama()), {}
    if source == "argument":
        options = {name: REFUSED[name]}
    elif source == "config":
        config = GenerationConfig(pad_token_id=0)
        setattr(config, name, REFUSED[name])
        options = {"generation_config": config}
    else:
        setattr(target.generation_config, name, REFUSED[name])
    error = assert_refused(target, UnsupportedOption, f"`{name}` is not supported", IDS, **options)
    assert error.option == name
    assert "target.generate()" in str(error) or "SpeculativeGenerator" in str(error)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_refused_argument(name):
    options = {name: ARGUMENTS[name]()}
    error = assert_refused(llama(), UnsupportedOption, f"`{name}` is not", IDS, **options)
    assert error.option == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_config": {"do_sample": False}}, "generation_config is a dict.*GenerationConfig"),
        ({"logits_processor": lambda ids, scores: scores}, r"logits_processor is a function.*\[...\]"),
        ({"stopping_criteria": lambda ids, scores: False}, r"stopping_criteria is a function.*\[...\]"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_what_comes_in_another_form(options, message):
    assert_refused(llama(), InvalidInput, message, IDS, **options)


@pytest.mark.parametrize("source", ["argument", "config"])
def test_a_cache_that_is_not_to_be_used(source):
    """Plain generate() feeds the whole text behind itself in every pass, and gives some other text."""
    options = {"max_new_tokens": 6, "do_sample": False, CACHE: DynamicCache()}
    if source == "argument":
        options["use_cache"] = False
    else:
        options["generation_config"] = GenerationConfig(use_cache=False, pad_token_id=0)
    error = assert_refused(llama(), UnsupportedOption, "`use_cache` is not.*" + CACHE, IDS, **options)
    assert error.option == "use_cache"
    llama().generate(IDS, **options)
    assert options[CACHE].get_seq_length() > IDS.shape[1] + 6


@pytest.mark.filterwarnings("ignore:`cache_params` is deprecated:FutureWarning")  # by transformers 5.24
@pytest.mark.parametrize("name", [*REFUSED, *ARGUMENTS])
def test_a_refused_option_that_holds_nothing_is_fine(name):
    value = 1 if name == "num_beams" else None
    got = speculative(llama(), "noisy").generate(
        IDS, **{name: value}, attention_mask=None, max_new_tokens=4, do_sample=False
    )
    assert got.tolist() == plain(llama(), {"inputs": IDS}, max_new_tokens=4).tolist()


@pytest.mark.parametrize("name", ["cache_implementation", "penalty_alpha", "prompt_lookup_num_tokens"])
def test_an_argument_that_holds_nothing_takes_back_what_the_models_own_config_has(name):
    target = copy.deepcopy(llama())
    setattr(target.generation_config, name, {**REFUSED, "prompt_lookup_num_tokens": 3}[name])
    given = {name: None, "max_new_tokens": 4, "do_sample": False}
    gen = SpeculativeGenerator(target)
    assert gen.generate(IDS, **given).tolist() == target.generate(IDS, **given).tolist()
    assert gen.stats.drafted == 0


def test_an_unknown_argument_is_refused_as_in_plain():
    assert_refused(llama(), ValueError, "temprature", IDS, temprature=0.5)


# --- prompts --------------------------------------------------------------------------------------

RIGHT = torch.tensor([[5, 6, 7], [8, 9, 0]])
PROMPTS = {
    "right padding by the mask": (
        {"input_ids": RIGHT + 1, "attention_mask": (RIGHT != 0).long()}, "padding_side = 'left'"
    ),
    "right padding by the pad id": ({"input_ids": RIGHT}, "padding_side = 'left'"),
    "one dimension": ({"input_ids": IDS[0]}, r"\(9,\).*\(batch, length\)"),
    "three dimensions": ({"input_ids": IDS[None]}, r"\(1, 1, 9\).*\(batch, length\)"),
    "real numbers": ({"input_ids": IDS.float()}, r"float32.*token ids"),
    "truth values": ({"input_ids": IDS.bool()}, r"bool.*token ids"),
    "a list": ({"input_ids": IDS.tolist()}, r"list.*return_tensors='pt'"),
    "what a tokenizer returns": ({"inputs": prompts(1)}, r"dict.*return_tensors='pt'"),
    "a mask for another length": (
        {"input_ids": IDS, "attention_mask": torch.ones(1, 5)}, r"\(1, 5\).*\(1, 9\)"
    ),
    "a mask for another batch": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 9)}, r"\(2, 9\).*\(1, 9\)"
    ),
    "a mask of one dimension": (
        {"input_ids": IDS, "attention_mask": torch.ones(9)}, r"\(9,\).*\(1, 9\)"
    ),
    "a mask as a list": ({"input_ids": IDS, "attention_mask": [[1] * 9]}, r"attention_mask is a list.*tensor"),
    "an empty prompt": ({"input_ids": IDS[:, :0]}, r"empty.*at least one token"),
    "an empty batch": ({"input_ids": IDS[:0]}, r"\(0, 9\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt(name):
    inputs, message = PROMPTS[name]
    assert_refused(llama(), InvalidInput, message, **inputs, max_new_tokens=3)


def test_right_padding_positional():
    assert_refused(llama(), InvalidInput, "padding_side", RIGHT)


def test_right_padding_where_a_given_config_names_no_padding():
    assert llama().generation_config.pad_token_id == 0
    config = GenerationConfig(max_new_tokens=3)
    assert_refused(llama(), InvalidInput, "padding_side", RIGHT, generation_config=config)


def test_ids_twice_is_refused_as_in_plain():
    assert_refused(llama(), ValueError, "input_ids", IDS, input_ids=IDS)


def test_no_prompt_and_no_bos():
    target = copy.deepcopy(llama())
    target.generation_config.bos_token_id = None
    assert_refused(target, ValueError, "bos_token_id")


def test_several_ends_of_sequence_in_a_tensor_and_no_mask():
    ids, eos = prompts(3)["input_ids"][:, -3:], torch.tensor([62, 61])
    got = speculative(llama(), "noisy").generate(ids, eos_token_id=eos, max_new_tokens=4, do_sample=False)
    assert got.tolist() == plain(llama(), {"inputs": ids}, eos_token_id=eos, max_new_tokens=4).tolist()


def test_a_pad_id_at_the_end_of_one_row_is_no_padding():
    ids = torch.tensor([[5, 6, 0]])
    mask = torch.ones_like(ids)
    for options in ({"attention_mask": mask}, {"attention_mask": mask, "pad_token_id": 6}):
        got = speculative(llama(), "noisy").generate(ids, max_new_tokens=4, do_sample=False, **options)
        wanted = llama().generate(ids, max_new_tokens=4, do_sample=False, **options)
        assert got.tolist() == wanted.tolist()


# --- what a round meets ---------------------------------------------------------------------------


def table(bad=None, value=torch.nan):
    """A model over 16 tokens whose scores are `value` once the last token is `bad`."""
    scores = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(2)) * 2
    if bad is not None:
        scores[:, bad] = value
    return TableModel(scores)


TABLE_PROMPT = {"input_ids": torch.tensor([[3, 4], [5, 6], [7, 9]]), "attention_mask": None}
TABLE_PROMPT["attention_mask"] = torch.ones(3, 2, dtype=torch.int64)


def bad_token():
    """(token, row, column): the first row to write it, and where its scores are asked for."""
    text = plain(table(), TABLE_PROMPT, max_new_tokens=12)
    rows = [row[2:].tolist() for row in text]
    for token in rows[1][2:]:
        first = [row.index(token) if token in row else 99 for row in rows]
        if first[1] < min(first[0], first[2]) and token not in TABLE_PROMPT["input_ids"]:
            return token, 1, 2 + first[1] + 1
    raise AssertionError("choose another seed")


MODES = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "top_k": 1}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", ["block", "token", "coupled"])
@pytest.mark.parametrize("draft", ["clean", "itself", None])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_scores_that_are_no_distribution(value, draft, rule, mode):
    """top_k = 1 would turn NaN into a choice; the library refuses it all the same."""
    token, row, _ = bad_token()
    model = table(token, value)
    draft = {"clean": table(), "itself": model, None: None}[draft]
    gen = speculative(model, draft, verification=rule, seed=1)
    with pytest.raises(InvalidScores, match=rf"row {row} .*remove_invalid_values"):
        gen.generate(**TABLE_PROMPT, max_new_tokens=12, **MODES[mode])
    got = speculative(table(), draft, verification=rule).generate(
        **TABLE_PROMPT, max_new_tokens=12, do_sample=False
    )
    assert got.tolist() == plain(table(), TABLE_PROMPT, max_new_tokens=12).tolist()


def test_the_column_of_bad_scores_is_named():
    token, row, column = bad_token()
    text = plain(table(), TABLE_PROMPT, max_new_tokens=12)
    for draft in (None, oracle(text)):
        gen = speculative(table(token), draft)
        with pytest.raises(InvalidScores, match=rf"row {row} .*column {column}\b"):
            gen.generate(**TABLE_PROMPT, max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize("rule", ["block", "token", "coupled"])
@pytest.mark.parametrize("mode", MODES)
def test_a_draft_whose_scores_are_no_distribution(mode, rule):
    """A draft can do no harm: such a guess is not the target's choice, and that is all."""
    draft, wanted = copy.deepcopy(llama()), plain(llama(), prompts(3), max_new_tokens=12)
    with torch.no_grad():
        draft.model.embed_tokens.weight[int(wanted[1, 12])] = torch.nan
    gen = speculative(llama(), draft, verification=rule, seed=1)
    got = gen.generate(**prompts(3), max_new_tokens=12, **MODES[mode])
    assert got.tolist() == wanted.tolist()
    assert gen.stats.accepted > 0


def test_scores_of_a_row_that_has_ended_do_not_matter():
    token, _, _ = bad_token()
    options = {"eos_token_id": token, "pad_token_id": token, "max_new_tokens": 12}
    wanted = plain(table(), TABLE_PROMPT, **options)
    gen = speculative(table(token), table())
    got = gen.generate(**TABLE_PROMPT, do_sample=False, **options)
    assert got.tolist() == wanted.tolist()


class ForbidsAll(LogitsProcessor):
    """Forbids every token of the last row from some length on."""

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= 12:
            scores = scores.clone()
            scores[-1] = -torch.inf
        return scores


class PurelyForbidsAll(ForbidsAll):
    specdec_pure = True


@pytest.mark.parametrize("kind", [ForbidsAll, PurelyForbidsAll])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_processor_that_forbids_everything(do_sample, kind):
    gen = speculative(llama(), "noisy", seed=1)
    with pytest.raises(InvalidScores, match=r"row 2 .*processors"):
        gen.generate(**prompts(3), max_new_tokens=8, do_sample=do_sample, logits_processor=[kind()])


def guesses(state, limits):
    """A proposal without fault, three guesses wide."""
    return Proposal(torch.full((state.batch, 3), 5), np.minimum(limits, 3))


def logits(width, vocabulary, value=0.0):
    return torch.full((3, width, vocabulary), value)


NONSENSE = {
    "too few rows": lambda p: Proposal(p.tokens[:2], p.lengths[:2]),
    "one dimension": lambda p: Proposal(p.tokens[:, 0], p.lengths),
    "real tokens": lambda p: Proposal(p.tokens.float(), p.lengths),
    "small integers": lambda p: Proposal(p.tokens.int(), p.lengths),
    "too few lengths": lambda p: Proposal(p.tokens, p.lengths[:2]),
    "negative lengths": lambda p: Proposal(p.tokens, p.lengths - 4),
    "lengths past the tokens": lambda p: Proposal(p.tokens[:, :1], p.lengths + 2),
    "lengths in two dimensions": lambda p: Proposal(p.tokens, p.lengths[:, None]),
    "lengths that are no whole numbers": lambda p: Proposal(p.tokens, p.lengths - 0.5),
    "logits for other positions": lambda p: Proposal(p.tokens, p.lengths, logits(4, 64)),
    "logits of two dimensions": lambda p: Proposal(p.tokens, p.lengths, logits(3, 64)[:, 0]),
    "logits of another vocabulary": lambda p: Proposal(p.tokens, p.lengths, logits(3, 63)),
    "nothing": lambda p: None,
    "tokens alone": lambda p: p.tokens,
}
SAMPLED = {"do_sample": True, "top_k": 0}


def spoilt(spoil):
    """A proposer whose second proposal is spoilt."""
    made = []

    def propose(state, limits):
        made.append(1)
        proposal = guesses(state, limits)
        return proposal if len(made) == 1 else spoil(proposal)

    return SimpleNamespace(propose=propose, made=made)


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
@pytest.mark.parametrize("name", NONSENSE)
def test_a_proposal_of_the_wrong_form(name, mode):
    proposer = spoilt(NONSENSE[name])
    options = SAMPLED if mode == "sampled" else {"do_sample": False}
    with pytest.raises(InvalidProposal, match=r"(?i)propos.*wanted"):
        speculative(llama(), proposer, seed=1).generate(**prompts(3), max_new_tokens=12, **options)
    assert len(proposer.made) == 2


WRONG_IDS = {"past the vocabulary": 64, "far past it": 10**6, "negative": -1}


@pytest.mark.parametrize("name", WRONG_IDS)
def test_ids_out_of_range_greedy(name):
    """They are no choice of the target: refused, or an error of ours; never an IndexError."""
    proposer = spoilt(lambda p: Proposal(torch.full_like(p.tokens, WRONG_IDS[name]), p.lengths))
    try:
        got = speculative(llama(), proposer).generate(**prompts(3), max_new_tokens=12, do_sample=False)
    except SpecdecError:
        return
    assert got.tolist() == plain(llama(), prompts(3), max_new_tokens=12).tolist()


@pytest.mark.parametrize("rule", ["block", "token"])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", WRONG_IDS)
def test_ids_out_of_range_sampled(name, given, rule):
    def spoil(p):
        tokens = torch.full_like(p.tokens, WRONG_IDS[name])
        return Proposal(tokens, p.lengths, logits(3, 64) if given else None)

    gen = speculative(llama(), spoilt(spoil), verification=rule, seed=1)
    with pytest.raises((InvalidProposal, InvalidScores)):
        gen.generate(**prompts(3), max_new_tokens=12, **SAMPLED)


@pytest.mark.parametrize("rule", ["block", "token"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_logits_that_guesses_cannot_come_from(value, rule):
    def spoil(p):
        return Proposal(p.tokens, p.lengths, logits(3, 64, value))

    gen = speculative(llama(), spoilt(spoil), verification=rule, seed=1)
    with pytest.raises((InvalidProposal, InvalidScores)):
        gen.generate(**prompts(3), max_new_tokens=12, **SAMPLED)


def test_more_guesses_than_the_limits_are_cut():
    """Right ones to tell: what is past the limits is not submitted."""
    text = plain(llama(), prompts(3), max_new_tokens=12)

    class Eager:
        def propose(self, state, limits):
            return oracle(text).propose(state, np.full_like(limits, 9))

    gen = speculative(llama(), Eager(), tokens=2)
    got = gen.generate(**prompts(3), max_new_tokens=12, do_sample=False)
    assert got.tolist() == text.tolist()
    assert len(gen.stats.drafted_at) == 2


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_lengths_are_whole_numbers_of_any_kind(dtype):
    text = plain(llama(), prompts(3), max_new_tokens=12)

    def propose(state, limits):
        proposal = oracle(text, wrong={14}).propose(state, limits)
        return Proposal(proposal.tokens, proposal.lengths.astype(dtype))

    told = []
    gen = speculative(llama(), SimpleNamespace(propose=propose, observe=told.append))
    assert gen.generate(**prompts(3), max_new_tokens=12, do_sample=False).tolist() == text.tolist()
    assert gen.stats.accepted > 0
    assert {round_.lengths.dtype for round_ in told} == {np.dtype(np.int64)}


def test_ids_past_a_rows_length_may_be_anything():
    def spoil(p):
        p.tokens[:, 1:] = 10**6
        return Proposal(p.tokens, np.minimum(p.lengths, 1))

    got = speculative(llama(), SimpleNamespace(propose=lambda s, n: spoil(guesses(s, n)))).generate(
        **prompts(3), max_new_tokens=12, do_sample=False
    )
    assert got.tolist() == plain(llama(), prompts(3), max_new_tokens=12).tolist()


def test_every_error_belongs_to_the_tree():
    for kind in (
        InvalidInput, InvalidProposal, InvalidScores, UnsupportedModel, UnsupportedOption,
        VocabularyMismatch,
    ):  # fmt: skip
        assert issubclass(kind, SpecdecError)
        assert issubclass(kind, RuntimeError if kind is InvalidScores else ValueError)
