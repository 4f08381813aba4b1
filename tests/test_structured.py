"""Structured output: constrained text is plain `generate()`'s under the same processor, however much is guessed.

The grammars are state machines in pure Python, and both optional libraries over a byte-level tokenizer that is made
here. Tokens that a grammar leaves no choice about are guessed without a draft.
"""

import copy
import gc
import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, LogitsProcessor, PrefixConstrainedLogitsProcessor

from specdec import DraftModel, EarlyExit, InvalidInput, InvalidScores, Proposal, SpeculativeGenerator, prune_head
from specdec.length.adaptive import Adaptive
from specdec.length.cost import Assumed
from specdec.processing import Processing
from specdec.records import Round
from specdec.stepwise import Seen, Walk, _Prefix
from specdec.structured import Constraint, ebnf, json_schema, lark, regex
from specdec.structured.constraint import allows, forbidden, mask_of, single
from specdec.testing import byte_tokenizer, noisy_copy, ragged_prompt, tiny_llama

from .contract import Guesses
from .grammars import Automaton, counting, json_tokenizer
from .proposers import PROPOSERS

LIBRARIES = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed"))
    for name in ("llguidance", "xgrammar")
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[a-z]{1,6}$"}, "age": {"type": "integer", "maximum": 99},
                   "true": {"type": "boolean"}},
    "required": ["name", "age", "true"],
    "additionalProperties": False,
}  # fmt: skip
MAKERS = {
    "schema": lambda name: json_schema(SCHEMA, json_tokenizer(), backend=name),
    "schema, any white space": lambda name: json_schema(SCHEMA, json_tokenizer(), backend=name, whitespace=True),
    "regex": lambda name: regex(r"(ab|cd)+x[0-9]{3}", json_tokenizer(), backend=name),
    "ebnf": lambda name: ebnf('root ::= ("yes, " | "no, ") w\nw ::= [a-z]+ "."', json_tokenizer(), backend=name),
    "lark": lambda name: lark('start: ("yes, " | "no, ") WORD "."\nWORD: /[a-z]+/', json_tokenizer(), backend=name),
}  # fmt: skip


@cache
def pair():
    """Target and draft with a few more scores than the tokenizer has tokens, as real models have."""
    target = tiny_llama(vocabulary=len(json_tokenizer()) + 7)
    return target, noisy_copy(target, 0.1)


@cache
def made(kind, library):
    return MAKERS[kind](library)


def prompts(rows=3):
    return ragged_prompt((9, 6, 3)[:rows], len(json_tokenizer()))


OPTIONS = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0}


def texts(out, prompt):
    return json_tokenizer().batch_decode(out[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_text_is_that_of_constrained_plain_generate(kind, library, rows):
    (target, draft), constraint, inputs = pair(), made(kind, library), prompts(rows)
    plain = target.generate(**inputs, **OPTIONS, logits_processor=[constraint])
    assert plain.tolist() != target.generate(**inputs, **OPTIONS).tolist()
    for guesser, number in [(draft, 5), ("ngram", 4), (None, 8), (draft, "auto"), (None, "auto")]:
        gen = SpeculativeGenerator(target, guesser, num_draft_tokens=number)
        out = gen.generate(**inputs, **OPTIONS, logits_processor=[constraint])
        assert out.tolist() == plain.tolist(), (guesser, number)
        if guesser is draft:
            assert gen.stats.accepted > 0
    again = target.generate(**inputs, **OPTIONS, logits_processor=[constraint])
    assert again.tolist() == plain.tolist()


@pytest.mark.parametrize("library", LIBRARIES)
def test_sampled_text_is_valid_and_ends_by_itself(library):
    """Several samples of every ragged row, each ending at its own place: as many valid texts."""
    (target, draft), constraint, inputs = pair(), made("schema", library), prompts()
    options = {**OPTIONS, "do_sample": True, "top_k": 0, "num_return_sequences": 4}
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=4, seed=3)
    out = gen.generate(**inputs, **options, logits_processor=[constraint])
    found = [json.loads(text) for text in texts(out, inputs)]
    assert len({tuple(one.items()) for one in found}) > 6
    for one in found:
        assert list(one) == ["name", "age", "true"]
        assert isinstance(one["true"], bool)
        assert one["age"] <= 99
        assert one["name"].isalpha()
        assert len(one["name"]) <= 6
    ends = (out == 1).sum(dim=1)
    assert ends.tolist() == [1] * 12
    assert len(set(gen.stats.row_emitted.tolist())) > 2


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", ["schema", "regex"])
def test_shared_noise_gives_one_text_whatever_guesses(kind, library):
    (target, draft), constraint, inputs = pair(), made(kind, library), prompts()
    options = {**OPTIONS, "do_sample": True, "top_k": 0, "seed": 5, "logits_processor": [constraint]}
    rule = {"verification": "coupled", "num_draft_tokens": 5}
    want = SpeculativeGenerator(target, None, verification="coupled", num_draft_tokens=0).generate(
        **inputs, **options
    )
    for guesser in (draft, "ngram", None):
        assert torch.equal(SpeculativeGenerator(target, guesser, **rule).generate(**inputs, **options), want)


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_a_library_refuses_is_refused_in_our_words(library):
    tokenizer = json_tokenizer()
    for make in (
        lambda: json_schema({"type": "nope"}, tokenizer, backend=library),
        lambda: json_schema({"type": "number", "maximum": float("inf")}, tokenizer, backend=library),
        lambda: regex("(", tokenizer, backend=library),
        lambda: ebnf("root ::= (", tokenizer, backend=library),
        lambda: lark("start: (", tokenizer, backend=library),
    ):
        with pytest.raises(InvalidInput, match="cannot be used"):
            make()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", MAKERS)
def test_masks_know_no_token_that_does_not_exist_and_ends_only_at_the_end(kind, library):
    """Along a text: bits behind the vocabulary are 0; end-of-sequence is allowed at the end and nothing after."""
    (target, _), constraint = pair(), made(kind, library)
    out = target.generate(**prompts(1), **{**OPTIONS, "max_new_tokens": 120}, logits_processor=[constraint])
    ids = out[0, 9:].tolist()
    place = constraint.grammars[0].start()
    size = len(json_tokenizer())
    for number, token in enumerate(ids):
        bits = np.unpackbits(place.mask().view(np.uint8), bitorder="little")
        assert not bits[size:].any()
        assert not bits[0]  # padding, whose name would be text
        assert bits[token]
        assert not place.ended
        if number + 1 < len(ids) and kind != "schema, any white space":
            assert token != 1
        place = place.after(token)
    if ids[-1] == 1:
        assert place.ended
        assert np.flatnonzero(np.unpackbits(place.mask().view(np.uint8), bitorder="little")).tolist() == [1]


@pytest.mark.parametrize("library", LIBRARIES)
def test_special_tokens_are_no_text_and_ends_are_a_grammars_own(library):
    """One tokenizer serves grammars with other ends; the name of a special token may be what a grammar asks for."""
    tokenizer = byte_tokenizer()
    for end in (1, 7, 1):
        only = regex("(<[a-z]*>)?", tokenizer, backend=library, eos_token_id=end)
        start = only.grammars[0].start()
        assert not allows(start.mask(), 0)
        assert allows(start.mask(), tokenizer("<")["input_ids"][0])
        assert [one for one in (1, 7) if allows(start.mask(), one)] == [end]
        assert start.after(end).ended


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("ends", [[1, 7], [7, 1]])
def test_each_of_several_ends_may_end_a_text_and_nothing_stands_behind(library, ends):
    tokenizer = byte_tokenizer()
    letter = tokenizer("a")["input_ids"][0]
    start = regex("a?", tokenizer, backend=library, eos_token_id=ends).grammars[0].start()
    whole = start.after(letter)

    def allowed(place):
        return [one for one in range(len(tokenizer)) if allows(place.mask(), one)]

    assert allowed(start) == [1, 7, letter]
    assert allowed(whole) == [1, 7]  # a place is left as it was by what is tried behind it
    assert not whole.ended
    for place in (start, whole):
        for end in ends:
            assert place.after(end).ended
            assert allowed(place.after(end)) == [1, 7]
    only = regex("aa", tokenizer, backend=library, eos_token_id=ends)
    assert only.forward(only.grammars[0].start(), 9) == [letter, letter]  # which end is for the model to say
    one = regex("aa", tokenizer, backend=library, eos_token_id=ends[:1])
    assert one.forward(one.grammars[0].start(), 9) == [letter, letter, ends[0]]


@pytest.mark.parametrize("library", LIBRARIES)
def test_special_tokens_that_a_tokenizer_has_no_name_for_are_no_text(library):
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.add_tokens([AddedToken("<tool>", special=True, normalized=False)])
    added = len(tokenizer) - 1
    start = regex("<[a-z]*>", tokenizer, backend=library).grammars[0].start()
    assert allows(start.mask(), tokenizer("<", add_special_tokens=False)["input_ids"][0])
    assert not allows(start.mask(), added)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("whitespace", [False, True])
def test_white_space_is_that_of_json_dumps_unless_any_is_allowed(library, whitespace):
    tokenizer = byte_tokenizer()
    schema = {"type": "array", "items": {"type": "integer"}}
    place = json_schema(schema, tokenizer, whitespace=whitespace, backend=library).grammars[0].start()
    found = []
    for token in tokenizer("[1, 2]", add_special_tokens=False)["input_ids"]:
        spaces = (tokenizer(space, add_special_tokens=False)["input_ids"][0] for space in " \n")
        found.append([allows(place.mask(), space) for space in spaces])
        assert allows(place.mask(), token)
        place = place.after(token)
    assert (found[1] == [True, True]) == whitespace
    assert found[3] == [True, whitespace]
    if not whitespace:
        assert [number for number, spaces in enumerate(found) if any(spaces)] == [3]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    place = json_schema(schema, tokenizer, whitespace=whitespace, backend=library).grammars[0].start()
    for token in tokenizer('{"a":', add_special_tokens=False)["input_ids"]:
        place = place.after(token)
    space, one = (tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in " 1")
    assert (allows(place.mask(), space), allows(place.mask(), one)) == (True, whitespace)


# --- tokens that are guessed without a draft ------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("number", [8, "auto"])
def test_foreseen_tokens_are_guessed_without_a_draft(library, number):
    target, _ = pair()
    constraint, inputs = made("schema", library), prompts(1)
    gen = SpeculativeGenerator(target, None, num_draft_tokens=number)
    if number == "auto":
        gen._length = lambda *_: lambda *_: Adaptive(Assumed(0.2))
    gen.generate(**inputs, **OPTIONS, logits_processor=[constraint])
    assert gen.stats.draft_forwards == 0
    assert gen.stats.acceptance_rate > 0.5
    assert gen.stats.rounds < 0.8 * gen.stats.emitted


def test_a_draft_is_not_asked_for_what_is_foreseen():
    """A grammar of one text: every guess is known, kept, and made without a pass of the draft."""
    target, draft = tiny_llama(), noisy_copy(tiny_llama(), 0.1)
    line = {n or "a": {(7 * n + 3) % 60 + 3: n + 1} for n in range(20)}
    line[20] = {2: "end"}
    constraint = Constraint(Automaton(line, (2,), 2))
    inputs = ragged_prompt()
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": 2, "logits_processor": [constraint]}
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=6)
    out = gen.generate(**inputs, **options)
    assert torch.equal(out, target.generate(**inputs, **options))
    assert gen.stats.emitted == 3 * 21
    assert gen.stats.acceptance_rate == 1.0
    assert gen.stats.draft_forwards == 0
    assert gen.stats.rounds <= 6


class Alternating(LogitsProcessor):
    """Every third token is foreseen, the two between are free; `foresee` is asked in the middle of a round."""

    def start(self, prompt):
        return [0] * len(prompt)

    def advance(self, state, token):
        return state + 1 if state % 3 or token == 5 + state % 40 else None

    def process(self, states, scores):
        scores = scores.clone()
        for row, state in enumerate(states):
            if state is not None and state % 3 == 0:
                only = scores[row, 5 + state % 40].clone()
                scores[row] = -torch.inf
                scores[row, 5 + state % 40] = only
        return scores

    def forward(self, state, most):
        return [] if state % 3 else [5 + state % 40]

    def __call__(self, input_ids, scores):
        return self.process([input_ids.shape[1] - self.length] * len(scores), scores)


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("number", [5, "auto"])
@pytest.mark.parametrize("layout", ["slots", "columns"])
def test_foreseen_and_drafted_guesses_in_one_round(sample, number, layout):
    target = tiny_llama()
    processor, inputs = Alternating(), ragged_prompt()
    processor.length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 24, "do_sample": sample, "top_k": 0, "logits_processor": [processor]}
    options = options if sample else {**options, "top_k": None}
    draft = DraftModel(target, layout=layout)
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=number, seed=1, layout=layout)
    if number == "auto":
        gen._length = lambda *_: lambda *_: Adaptive(Assumed(0.1))
    out = gen.generate(**inputs, **options)
    assert gen.stats.acceptance_rate == 1.0  # draft and target are one model, under one grammar
    assert gen.stats.drafted > 30
    assert (gen.stats.draft_forwards - gen.stats.rounds) * 3 < gen.stats.drafted  # not one a guess
    if not sample:
        assert torch.equal(out, target.generate(**inputs, **options))
    assert out[:, processor.length + 3].tolist() == [8] * 3


def test_layers_of_the_target_go_on_behind_what_is_foreseen():
    target = copy.deepcopy(tiny_llama(num_hidden_layers=2))
    last = target.model.layers[1]
    with torch.no_grad():  # it adds nothing, so the first layer alone knows all
        for part in (last.self_attn.o_proj, last.mlp.down_proj):
            part.weight.zero_()
    processor, inputs = Alternating(), ragged_prompt()
    processor.length = inputs["input_ids"].shape[1]
    options = {**inputs, "max_new_tokens": 24, "do_sample": False, "logits_processor": [processor]}
    gen = SpeculativeGenerator(target, EarlyExit(1), num_draft_tokens=7, layout="slots")
    assert gen.generate(**options).tolist() == target.generate(**options).tolist()
    assert gen.stats.acceptance_rate == 1.0
    assert gen.stats.drafted > 4 * gen.stats.draft_forwards  # none for what is foreseen, however far ahead


class ForeseesTooMuch(LogitsProcessor):
    """Its tokenizer has more ids than the model; as one that has a state and forbids nothing."""

    def start(self, prompt):
        return [0] * len(prompt)

    def advance(self, state, token):
        return state

    def process(self, states, scores):
        return scores.clone()

    def forward(self, state, most):
        return [1000] * most


@pytest.mark.parametrize("draft", [lambda target: noisy_copy(target, 0.1), lambda target: None])
def test_foreseen_ids_that_the_target_lacks_are_never_submitted(draft):
    """By sampling the verifier has no answer to them but an error."""
    target, inputs = tiny_llama(), ragged_prompt()
    gen = SpeculativeGenerator(target, draft(target), num_draft_tokens=3, layout="slots")
    options = {"max_new_tokens": 8, "do_sample": True, "seed": 1}
    got = gen.generate(**inputs, **options, logits_processor=[ForeseesTooMuch()])
    assert got.shape == (3, 9 + 8)
    assert (gen.stats.accepted > 0) == (draft(target) is not None)


def test_the_controller_likes_what_costs_nothing():
    """Free guesses are made where a draft would not pay, as long as they are kept."""
    rule = Adaptive(Assumed(0.9))
    runs = np.array([6, 0])
    assert rule.next(8) == 0
    assert rule.free(np.array([6])) == 6
    assert rule.free(runs) == 0  # the second row would wait too long
    wrong = Round(None, None, np.array([6]), np.array([0]), None, np.array([1]), None, None)
    for _ in range(10):
        rule._asked = 0
        rule.observe(wrong, 1.0)
    assert rule.free(np.array([6])) == 0


# --- the constraint itself ------------------------------------------------------------------------


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("rows", [1, 3])
def test_every_proposer_under_a_state_machine(proposer, rows):
    """Ragged rows, wide rounds, states that depend on the whole text; some guesses are forbidden by the grammar."""
    target, inputs = tiny_llama(), ragged_prompt((9, 6, 3)[:rows])
    options = {"max_new_tokens": 24, "do_sample": False, "logits_processor": [counting()]}
    plain = target.generate(**inputs, **options)
    expected = plain[:, 9:].clone()
    expected[:, 5] = 4
    draft, given = PROPOSERS[proposer](noisy_copy(target, 0.15), expected.tolist())
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=4)
    assert torch.equal(gen.generate(**inputs, **options, **given), plain)


def test_a_constraint_costs_no_lockstep_and_shapes_the_draft():
    """Identical draft and target accept everything, in rounds as wide as without a grammar."""
    target, inputs = tiny_llama(), ragged_prompt()
    gen = SpeculativeGenerator(target, target, num_draft_tokens=5)
    gen.generate(**inputs, max_new_tokens=24, do_sample=False, logits_processor=[counting()])
    assert gen.stats.acceptance_rate == 1.0
    assert gen.stats.rounds <= 7
    # a round's own, and the guesses for the states of target and draft
    assert gen.stats.host_copies > 2 * gen.stats.rounds
    assert not Processing([counting()], inputs["input_ids"]).in_lockstep


def test_beside_other_processors_and_warpers():
    target, inputs = tiny_llama(), ragged_prompt()
    for options in (
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 9, "eos_token_id": 9},
        {"prefix_allowed_tokens_fn": lambda row, ids: range(row, 64, 2)},
        {"guidance_scale": 1.5},  # unknown, with a state: everything in lockstep
    ):
        options = {**options, "max_new_tokens": 20, "do_sample": False, "logits_processor": [counting()]}
        plain = target.generate(**inputs, **options)
        gen = SpeculativeGenerator(target, noisy_copy(target, 0.1), num_draft_tokens=4)
        assert torch.equal(gen.generate(**inputs, **options), plain)


FEW = {"a": {6: "b", 9: "c"}, "b": {12: "c"}, "c": {9: "a", 40: "b"}}


@pytest.mark.parametrize(
    "more",
    [
        {"suppress_tokens": sorted(set(range(64)) - {6, 12, 40})},
        {"logits_processor": [Constraint(Automaton(FEW, words=2))]},
    ],
    ids=["suppressed", "grammar"],
)
def test_a_token_that_was_never_allowed(more):
    """What ``remove_invalid_values`` makes of -inf may be all that others leave: the text goes on from there."""
    target, inputs = tiny_llama(), ragged_prompt()
    asked = []

    def odd(row, ids):
        asked.append((row, ids.tolist()))
        return list(range(2 + (len(ids) + row) % 2, 64, 2))

    options = {"max_new_tokens": 14, "do_sample": False, "remove_invalid_values": True, **more}
    options |= {"prefix_allowed_tokens_fn": odd, "return_dict_in_generate": True, "output_scores": True}
    plain = target.generate(**inputs, **options)
    wanted = list(asked)
    texts = list(enumerate(plain.sequences[:, 9:].tolist()))
    assert any((token + at + 9 + row) % 2 for row, text in texts for at, token in enumerate(text))
    for draft in (noisy_copy(target, 0.1), "suffix", None):
        asked.clear()
        gen = SpeculativeGenerator(target, draft, num_draft_tokens=4)
        got = gen.generate(**inputs, **options)
        assert torch.equal(got.sequences, plain.sequences)
        assert all(map(torch.equal, map(torch.isfinite, got.scores), map(torch.isfinite, plain.scores)))
        assert asked == wanted


@pytest.mark.parametrize("warper", [{"eta_cutoff": 1e-3}, {"top_h": 0.6}], ids=list)
@pytest.mark.parametrize("broken", [False, True])
def test_a_draft_that_knows_nothing_the_grammar_allows(warper, broken):
    """These two raise where a row is no distribution; of a draft, that is no reason to end the call."""
    target, inputs = tiny_llama(), ragged_prompt()
    draft = prune_head(target, [], 16)
    if broken:
        draft.lm_head.linear.weight.data.fill_(torch.nan)
    high = Automaton({"a": dict.fromkeys(range(20, 64), "a")}, words=2)
    options = {"max_new_tokens": 9, "do_sample": True, "top_k": 0, **warper, "logits_processor": [Constraint(high)]}
    wanted = SpeculativeGenerator(target, verification="coupled", seed=1).generate(**inputs, **options)
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=4, verification="coupled", seed=1)
    assert torch.equal(gen.generate(**inputs, **options), wanted)
    assert gen.stats.drafted > 0


def test_one_grammar_a_prompt():
    """Rows of a batch under different grammars, one of them free; several samples share their prompt's."""
    target, inputs = tiny_llama(), ragged_prompt()
    one, other = counting().grammars[0], counting(groups=3).grammars[0]
    options = {"max_new_tokens": 16, "do_sample": False}
    mixed = Constraint([one, None, other])
    plain = target.generate(**inputs, **options, logits_processor=[mixed])
    for row, grammar in enumerate([one, None, other]):
        alone = target.generate(**inputs, **options, logits_processor=[Constraint(grammar)])
        assert plain[row].tolist() == alone[row].tolist()
    gen = SpeculativeGenerator(target, noisy_copy(target, 0.1), num_draft_tokens=4, seed=0)
    assert torch.equal(gen.generate(**inputs, **options, logits_processor=[mixed]), plain)
    sampled = {"max_new_tokens": 8, "do_sample": True, "top_k": 0, "num_return_sequences": 2}
    out = gen.generate(**inputs, **sampled, logits_processor=[mixed])
    for row, grammar in enumerate([one, one, None, None, other, other]):
        place = grammar.start() if grammar else None
        for token in out[row, 9:].tolist() if place else []:
            assert allows(place.mask(), token)
            place = place.after(token)
    assert Constraint([Constraint(one), None, other]).grammars == mixed.grammars
    for rows in (1, 4):
        with pytest.raises(InvalidInput, match=f"3 grammars for {rows} rows"):
            gen.generate(**ragged_prompt((5,) * rows), **options, logits_processor=[mixed])


def test_plain_generate_knows_a_new_call():
    """One object for many calls, of both kinds and in turn."""
    target, constraint = tiny_llama(), counting()
    gen = SpeculativeGenerator(target, noisy_copy(target, 0.1), num_draft_tokens=3)
    for lengths in ((9, 6, 3), (10,), (9, 6, 3), (11, 4)):
        inputs = ragged_prompt(lengths, seed=len(lengths))
        options = {**inputs, "max_new_tokens": 7, "do_sample": False}
        fresh = target.generate(**options, logits_processor=[counting()])
        assert torch.equal(target.generate(**options, logits_processor=[constraint]), fresh)
        assert torch.equal(gen.generate(**options, logits_processor=[constraint]), fresh)


def test_a_call_with_one_row_that_goes_on_from_the_last_call_is_a_new_one():
    constraint, scores = counting(), torch.zeros(2, 64)
    constraint(torch.tensor([[5, 6], [7, 8]]), scores)
    ids = torch.tensor([[5, 6, 3], [7, 9, 3]])
    assert constraint(ids, scores).equal(counting()(ids, scores))
    assert len(constraint._seen) == 2, "and of that nothing is kept"


class Unknown(LogitsProcessor):
    """Changes nothing, and may hold a state for all we know: everything goes in lockstep."""

    def __call__(self, input_ids, scores):
        return scores


def test_in_lockstep_a_grammar_belongs_to_its_call():
    """Two calls under way at once with one object, and one that goes on where another ended."""
    target, constraint = tiny_llama(), counting()
    gen = SpeculativeGenerator(target, noisy_copy(target, 0.1), num_draft_tokens=2)
    options = {"max_new_tokens": 9, "do_sample": False}
    inputs = [ragged_prompt((9,)), ragged_prompt((4,), seed=1)]
    plain = [target.generate(**one, **options, logits_processor=[counting()]) for one in inputs]
    options["logits_processor"] = [constraint, Unknown()]
    streams = [gen.stream(**one, **options) for one in inputs]
    found = [[], []]
    while any(streams):
        for number, stream in enumerate(streams):
            record = stream and next(stream, None)
            found[number] += record.ids if record else []
            streams[number] = stream if record else None
    assert found == [out[0, one["input_ids"].shape[1] :].tolist() for out, one in zip(plain, inputs, strict=True)]
    more = {"input_ids": plain[0], "attention_mask": torch.ones_like(plain[0])}
    again = target.generate(**more, max_new_tokens=9, do_sample=False, logits_processor=[counting()])
    assert gen.generate(**inputs[0], **options).equal(plain[0])
    assert gen.generate(**more, **options).equal(again)


class Bare:
    """A processor whose state is a value and that plain `generate()` cannot call: even ids, or odd ones."""

    def start(self, prompt):
        return [row % 2 for row in range(len(prompt))]

    def advance(self, state, token):
        return state if token % 2 == state else None

    def process(self, states, scores):
        out = scores.clone()
        for row, state in enumerate(states):
            if state is not None:
                out[row, 1 - state :: 2] = -torch.inf
        return out


@pytest.mark.parametrize("ends", [None, 7])
def test_in_lockstep_states_are_asked_as_anywhere_else(ends):
    target, inputs = tiny_llama(), ragged_prompt()
    gen = SpeculativeGenerator(target, noisy_copy(target, 0.1), num_draft_tokens=4)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
    free = gen.generate(**inputs, **options, logits_processor=[Bare()])
    assert gen.generate(**inputs, **options, logits_processor=[Bare(), Unknown()]).equal(free)
    assert gen.stats.accepted > 0


def test_prefix_allowed_tokens_fn_is_asked_only_what_plain_might_ask():
    """Not in lockstep; never about a prefix that the function itself has forbidden."""
    target, inputs = tiny_llama(), ragged_prompt()
    asked = []

    def near(row, ids):
        last = int(ids[-1])
        asked.append((row, tuple(ids[9:].tolist())))
        return [(last * 5 + row * 3 + i) % 64 for i in range(1, 9)]

    options = {"max_new_tokens": 20, "do_sample": False, "prefix_allowed_tokens_fn": near}
    plain = target.generate(**inputs, **options)
    for draft in (target, "ngram"):
        asked.clear()
        gen = SpeculativeGenerator(target, draft, num_draft_tokens=4)
        assert torch.equal(gen.generate(**inputs, **options), plain)
        if draft is target:
            assert gen.stats.acceptance_rate == 1.0
            assert gen.stats.rounds <= 7
        for row, text in asked:
            last = int(inputs["input_ids"][row, -1])
            for token in text:
                assert (token - last * 5 - row * 3 - 1) % 64 < 8
                last = token


def test_which_prompt_prefix_allowed_tokens_fn_is_told():
    """The row's number, or the prompt's: transformers 5.24 counts the rows of several samples as one prompt."""
    target, inputs, told = tiny_llama(), ragged_prompt((9, 6)), set()

    def near(prompt, ids):
        told.add(prompt)
        return [(int(ids[-1]) * 5 + prompt * 3 + i) % 64 for i in range(1, 9)]

    greedy = {"max_new_tokens": 12, "do_sample": True, "top_k": 1}
    rows = {name: values.repeat_interleave(2, dim=0) for name, values in inputs.items()}
    for given, options in (
        (inputs, {"prefix_allowed_tokens_fn": near, "num_return_sequences": 2}),
        (rows, {"logits_processor": [PrefixConstrainedLogitsProcessor(near, 2)]}),
    ):
        plain = target.generate(**given, **greedy, **options)
        wanted = set(told)
        for draft in (target, "ngram", None):
            told.clear()
            gen = SpeculativeGenerator(target, draft, num_draft_tokens=4)
            assert torch.equal(gen.generate(**given, **greedy, **options), plain)
            assert told == wanted
        told.clear()


def test_what_prefix_allowed_tokens_fn_may_return():
    """Whatever ``generate()`` can put into a mask; what it could not measure is the caller's error."""
    for listed in ([1, 2], (2, 1), torch.tensor([1, 2]), np.array([1, 2]), torch.tensor([[1, 2]])):
        prefix = _Prefix(0, torch.zeros(1), lambda *_, listed=listed: listed)
        assert (prefix.allowed, prefix.error) == ({1, 2}, None)
    for listed in (7, None, iter([1])):
        prefix = _Prefix(0, torch.zeros(1), lambda *_, listed=listed: listed)
        assert isinstance(prefix.error, TypeError)
        assert not prefix.allowed


def test_prefix_allowed_tokens_fn_is_not_asked_behind_an_end():
    target = tiny_llama()
    ids = ragged_prompt((5,))["input_ids"]
    text = target.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
    table, asked = {length: [text[length]] for length in range(5, 10)}, []
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": text[9]}
    options |= {"prefix_allowed_tokens_fn": lambda row, ids: asked.append(len(ids)) or table[len(ids)]}
    for draft in (target, None):
        out = SpeculativeGenerator(target, draft, num_draft_tokens=8).generate(ids, **options, prediction=text[5:])
        assert out.tolist() == [text[:10]]
    assert max(asked) == 9


@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True, "seed": 1}])
def test_what_prefix_allowed_tokens_fn_raises_behind_a_stop_is_nobodys_error(how):
    target = tiny_llama()
    table = {length: [length % 7 + 3 * i for i in range(1, 6)] for length in range(9, 13)}
    options = {**how, "max_new_tokens": 12, "prefix_allowed_tokens_fn": lambda row, ids: table[len(ids)]}
    stop = [lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= 13)]
    for rows in (1, 3):
        inputs = ragged_prompt((9, 5, 7)[:rows])
        for draft in (target, noisy_copy(target, 0.05), "ngram"):
            gen = SpeculativeGenerator(target, draft, num_draft_tokens=4)
            assert gen.generate(**inputs, **options, stopping_criteria=stop).shape == (rows, 13)
            with pytest.raises(KeyError, match="13"):
                gen.generate(**inputs, **options)


def test_what_prefix_allowed_tokens_fn_raises_is_raised_though_another_row_ended_before():
    """A row that has ended waits for nobody, and nobody for it."""
    target, inputs = tiny_llama(), ragged_prompt((9, 5, 7))

    def allows(row, ids):
        if len(ids) == 13:
            raise KeyError("13")
        return [6] if row == 0 and len(ids) == 11 else range(10, 40)

    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 6, "prefix_allowed_tokens_fn": allows}
    for draft in (noisy_copy(target, 0.05), "ngram", None):
        with pytest.raises(KeyError, match="13"):
            SpeculativeGenerator(target, draft, num_draft_tokens=4).generate(**inputs, **options, pad_token_id=0)


def test_prefix_allowed_tokens_fn_is_asked_once_and_what_it_raised_is_raised():
    """Also where it was first asked about a guess, and would answer if it were asked again."""
    target, asked = tiny_llama(), []
    ids = ragged_prompt((9,))["input_ids"]

    def allows(row, seen):
        asked.append(tuple(seen.tolist()))
        if len(seen) == 12 and asked.count(asked[-1]) == 1:
            raise LookupError("never heard of it")
        return range(64)

    for draft in (target, None):
        asked.clear()
        gen = SpeculativeGenerator(target, draft, num_draft_tokens=5)
        with pytest.raises(LookupError, match="never heard"):
            gen.generate(ids, max_new_tokens=9, do_sample=False, prefix_allowed_tokens_fn=allows)
        assert len(asked) == len(set(asked))


def test_what_prefix_allowed_tokens_fn_raises_about_a_guess_keeps_no_cache_alive():
    """An error remembers the frames that it came through; where it was raised is told all the same."""
    target, draft = tiny_llama(), noisy_copy(tiny_llama(), 0.2)
    inputs, caches, raised = ragged_prompt((9,)), [], []
    text = target.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()

    def seen(model, args, kwargs):
        caches.extend(
            weakref.ref(kwargs[name]) for name in ("cache", "past_key_values") if kwargs.get(name) is not None
        )

    def allows(row, ids):
        if ids.tolist() != text[: len(ids)]:
            raised.append(ids)
            raise KeyError("never heard of it")
        return range(64)

    target.register_forward_pre_hook(seen, with_kwargs=True)
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=4)
    options = {**inputs, "max_new_tokens": 12, "do_sample": False}
    gen.generate(**options, prefix_allowed_tokens_fn=allows)
    gc.collect()
    caches.clear()
    gc.disable()
    try:
        out = gen.generate(**options, prefix_allowed_tokens_fn=allows)
        assert out[0].tolist() == text
        assert caches
        assert raised
        assert not any(cache() is not None for cache in caches)
    finally:
        gc.enable()
    with pytest.raises(KeyError) as error:
        gen.generate(**options, prefix_allowed_tokens_fn=lambda row, ids: {}[len(ids)])
    assert "in <lambda>" in error.value.__notes__[0]


def test_a_prefix_behind_which_nothing_is_allowed_is_named():
    target, inputs = tiny_llama(), ragged_prompt((4, 6))
    options = {"max_new_tokens": 9, "do_sample": False}
    options["prefix_allowed_tokens_fn"] = lambda row, ids: [] if row == 1 and len(ids) == 9 else range(64)
    with pytest.raises(ValueError, match="empty list for batch ID 1"):
        target.generate(**inputs, **options)
    for draft in (target, None):
        with pytest.raises(InvalidInput, match="allows nothing behind the 9 tokens of row 1"):
            SpeculativeGenerator(target, draft, num_draft_tokens=5).generate(**inputs, **options)


class NothingFrom(LogitsProcessor):
    """Allows nothing from some column on."""

    specdec_pure = True

    def __init__(self, column):
        self.column = column

    def __call__(self, ids, scores):
        return scores if ids.shape[1] < self.column else torch.full_like(scores, -torch.inf)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True, "seed": 1}])
def test_what_is_allowed_behind_a_stop_matters_to_nobody(how, rows):
    target = tiny_llama()
    inputs = ragged_prompt((9, 5, 7)[:rows])
    options = {"max_new_tokens": 12, **how}
    stop = [lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= 13)]
    for draft in (target, noisy_copy(target, 0.05), "ngram"):
        for verification in ("block", "token", "coupled"):
            gen = SpeculativeGenerator(target, draft, num_draft_tokens=4, verification=verification)
            free = gen.generate(**inputs, **options, stopping_criteria=stop)
            bound = {"logits_processor": [NothingFrom(13)], "stopping_criteria": stop}
            assert gen.generate(**inputs, **options, **bound).shape == free.shape == (rows, 13)
            with pytest.raises(InvalidScores, match="column 11"):
                gen.generate(**inputs, **options, logits_processor=[NothingFrom(11)], stopping_criteria=stop)


def test_a_guess_behind_which_nothing_may_stand_is_only_a_guess():
    target, inputs = tiny_llama(), ragged_prompt()
    options = {"max_new_tokens": 9, "do_sample": False}
    text = target.generate(**inputs, **options)
    end = next(token for token in range(64) if token not in text)
    gen = SpeculativeGenerator(target, Guesses(lambda *_: end), num_draft_tokens=2)
    options["prefix_allowed_tokens_fn"] = lambda row, ids: [] if ids[-1] == end else range(64)
    assert torch.equal(gen.generate(**inputs, **options), text)
    assert gen.stats.drafted > 0


class Choosy:
    """Begins only some rows; says more than it is asked for, and nothing of a row that it did not begin."""

    def start(self, prompt):
        return [None, 0]

    def advance(self, state, token):
        return state + 1

    def process(self, states, scores):
        return scores

    def require(self, state):
        assert state is not None

    def forward(self, state, most):
        assert state is not None
        return [state, 8, 9, 10][: most + 1]


def test_a_processor_is_asked_nothing_of_a_row_that_it_did_not_begin():
    """And what it says beyond what it was asked for is left out."""
    prompt = torch.ones(2, 3, dtype=torch.int64)
    walk = Walk(Choosy(), prompt)
    seen = Seen(torch.nn.functional.pad(prompt, (0, 4)), np.full(2, 3), np.ones(2, dtype=np.int64), walk.columns())
    scores = torch.zeros(2, 1, 16)
    assert walk.process(scores, seen, final=True).equal(scores)
    assert walk.foresee(seen, np.array([3, 2])) == [[], [0, 8]]


def test_states_behind_which_the_text_has_gone_on_are_let_go():
    """A long text holds the states of its last guesses only."""
    walk = Walk(Choosy(), torch.ones(2, 3, dtype=torch.int64))
    tokens = torch.ones(2, 40, dtype=torch.int64)
    for length in range(3, 40, 4):
        seen = Seen(tokens, np.full(2, length), np.ones(2, dtype=np.int64), walk.columns())
        walk.process(torch.zeros(2, 1, 16), seen, final=True)
        assert walk.columns().tolist() == [length, length]
        assert [len(row._states) for row in walk._rows] == [1, 1]


def test_a_grammar_behind_embeddings_begins_anew():
    """Plain `generate()` shows no ids at first; a call of one token leaves nothing to go on from."""
    constraint, scores = counting(), torch.zeros(2, 64)
    first, second = (constraint(torch.zeros(2, 0, dtype=torch.int64), scores) for _ in range(2))
    assert first.equal(second)
    assert first.isinf().any()


class Circle:
    """A place that every token leads back to."""

    ended = False

    def __init__(self, allowed, ahead):
        self.allowed, self.ahead, self.steps = mask_of(allowed, 1), ahead, 0

    def mask(self):
        return self.allowed

    def after(self, token):
        self.steps += 1
        assert self.steps < 20
        return self

    def forward(self):
        return self.ahead


def test_what_is_foreseen_is_allowed_and_ends_where_it_should():
    """Where a grammar leaves no choice for ever, and where a library foresees what its own mask forbids."""
    for allowed, ahead, found in (
        ([3], [], [3] * 4),
        ([3, 4], [4, 3, 4, 4, 3], [4, 3, 4, 4]),
        ([3, 4], [4, 9, 3], [4]),
        ([3, 4], [4, 3, 4, 4, 3, 9], [4, 3, 4, 4]),
    ):
        place = Circle(allowed, ahead)
        constraint = Constraint(SimpleNamespace(ends=(1,), start=lambda place=place: place))
        assert constraint.forward(place, 4) == found
    assert constraint.advance(place, 9) is None
    place.ended = True  # what fills a row up behind its end is no token of the grammar
    assert constraint.advance(place, 9) is place
    assert constraint.forward(place, 4) == []
    assert constraint.forward(Circle([3, 4], []), 4) == []


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [5, 32, 33, 70, 100])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_masks_of_any_width(vocabulary, device):
    """(W,) words against scores of more and of fewer tokens; the form for other devices has the same shape."""
    masks = [mask_of([3, 31, 64], 3), None, mask_of([0], 1)]
    out = forbidden(masks, torch.zeros(3, vocabulary, device=device))
    assert out.shape == (3, vocabulary)
    if device == "cpu":
        allowed = [np.flatnonzero(~row.numpy()).tolist() for row in out]
        assert allowed[0] == [t for t in (3, 31, 64) if t < vocabulary]
        assert allowed[1] == list(range(vocabulary))
        assert allowed[2] == [0]


def test_the_only_token_of_a_mask():
    for token in (0, 31, 32, 63, 95):
        assert single(mask_of([token], 3)) == token
        assert allows(mask_of([token], 3), token)
        assert not allows(mask_of([token], 3), (token + 1) % 96)
    assert single(mask_of([1, 2], 3)) is None
    assert single(mask_of([1, 40], 3)) is None
    assert single(mask_of(range(32), 3)) is None  # a word of ones is -1
    assert single(mask_of([0, 31], 3)) is None
    assert single(mask_of([], 3)) is None
    assert not allows(mask_of([1], 1), 32)
    assert not allows(mask_of([1], 1), -31)


# --- refused --------------------------------------------------------------------------------------


def test_refused_with_what_to_do():
    tokenizer = json_tokenizer()
    with pytest.raises(InvalidInput, match=r"backend='outlines' does not exist.*llguidance"):
        regex("a", tokenizer, backend="outlines")
    with pytest.raises(InvalidInput, match="schema is no JSON"):
        json_schema("{", tokenizer)
    with pytest.raises(InvalidInput, match="pydantic"):
        json_schema(int, tokenizer)
    with pytest.raises(InvalidInput, match="empty list of grammars"):
        Constraint([])
    for wrong in ("yes|no", [counting().grammars[0]], Constraint([None, None])):
        with pytest.raises(InvalidInput, match=f"a {type(wrong).__name__} among the grammars"):
            Constraint([wrong, None])


def test_of_both_libraries_llguidance_is_taken():
    for name in ("llguidance", "xgrammar"):
        pytest.importorskip(name)
    assert type(regex("a", json_tokenizer()).grammars[0]).__module__ == "specdec.structured.llguidance"


def test_a_library_that_is_not_there_is_named(monkeypatch):
    import specdec.structured

    monkeypatch.setattr(specdec.structured, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"llguidance is not installed; pip install llguidance"):
        regex("a", json_tokenizer())
    with pytest.raises(InvalidInput, match=r"pip install xgrammar"):
        regex("a", json_tokenizer(), backend="xgrammar")


def test_a_tokenizer_without_an_end():
    for given, ends in ((SimpleNamespace(eos_token_id=None), None), (json_tokenizer(), [])):
        with pytest.raises(InvalidInput, match="eos_token_id"):
            regex("a", given, eos_token_id=ends)
    several = [
        regex("a", json_tokenizer(), eos_token_id=ends).grammars[0].start().mask()
        for ends in ([1, 7], torch.tensor([1, 7]), np.array([1, 7]))
    ]
    assert all(np.array_equal(mask, several[0]) for mask in several), "however they are listed"


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_end_may_be_the_first_id(library):
    tokenizer = copy.deepcopy(json_tokenizer())
    assert regex("a", tokenizer, backend=library, eos_token_id=0).grammars[0].ends == (0,)
    tokenizer.eos_token = tokenizer.decode([0])
    assert tokenizer.eos_token_id == 0
    assert regex("a", tokenizer, backend=library).grammars[0].ends == (0,)


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_is_foreseen_is_in_the_tokenizers_pieces_and_does_not_begin_as_a_text_does(library):
    tokenizer = copy.deepcopy(byte_tokenizer("name"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.eos_token} $A", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    first, *pieces = tokenizer("name!")["input_ids"]
    assert (first, len(pieces)) == (tokenizer.eos_token_id, 2)
    only = regex("name!+", tokenizer, backend=library)
    start = only.grammars[0].start()
    assert start.forward()[:1] == only.forward(start, 9)[:1] == pieces[:1]
    if library == "xgrammar":
        assert single(start.mask()) is None, "n, na and the like may stand there as well"


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_vocabulary_is_read_once_for_a_tokenizer_and_its_ends(library):
    module, tokenizer = import_module(f"specdec.structured.{library}"), byte_tokenizer()
    read = module._compiler if library == "xgrammar" else module._tokenizer
    assert read(tokenizer, (1,)) is read(tokenizer, (1,)) is not read(tokenizer, (7,))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_mask_is_as_wide_as_the_vocabulary(library):
    tokenizer = copy.deepcopy(byte_tokenizer())
    for number in range(-len(tokenizer) % 32):
        tokenizer.add_tokens([f"q{number}q"])
    for words in (len(tokenizer) // 32, len(tokenizer) // 32 + 1):
        assert regex("a", tokenizer, backend=library).grammars[0].start().mask().shape == (words,)
        tokenizer.add_tokens(["zzzz"])


@pytest.mark.parametrize("library", LIBRARIES)
def test_calls_in_several_threads_may_begin_with_one_grammar(library):
    (grammar,) = made("schema", library).grammars

    def begin(_):
        start = grammar.start()
        return start.mask().tobytes(), tuple(start.forward())

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(begin, range(2000)))) == 1


@pytest.mark.parametrize("library", LIBRARIES)
def test_tokens_added_to_a_tokenizer_are_known_to_the_next_grammar(library):
    tokenizer = byte_tokenizer("name")
    regex("[ab]{3,5}", tokenizer, backend=library)
    before = len(tokenizer)
    tokenizer.add_tokens(["qqqq", "zzzz"])
    mask = regex("(qqqq|zzzz)", tokenizer, backend=library).grammars[0].start().mask()
    assert [allows(mask, id_) for id_ in range(before, len(tokenizer))] == [True, True]


def test_a_proposer_is_begun_once_under_a_grammar():
    class Own:
        begun = 0

        def begin(self, call):
            self.begun += 1
            return self

        def propose(self, state, limits):
            return Proposal.empty(state.batch, state.device)

    own, tokenizer = Own(), json_tokenizer()
    gen = SpeculativeGenerator(tiny_llama(vocabulary=len(tokenizer)), own, num_draft_tokens=3)
    only = regex("[ab]{3,50}", tokenizer, eos_token_id=1)
    gen.generate(**ragged_prompt((5,)), max_new_tokens=8, do_sample=False, logits_processor=[only], eos_token_id=1)
    assert own.begun == 1


def test_arguments_the_wrong_way_round():
    for text, tokenizer in ((json_tokenizer(), "a+"), ("a+", "gpt2"), (b"a+", json_tokenizer())):
        names = f"a {type(text).__name__} and a {type(tokenizer).__name__}"
        with pytest.raises(InvalidInput, match=rf"regex\(\) was given {names}; wanted are a text"):
            regex(text, tokenizer)
