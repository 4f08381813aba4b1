"""A draft with another tokenizer: the map, the text between two tokenizers, and greedy text equal to plain.

Its law is in `tests/laws/test_translated_law.py`.
"""

import copy
import gc
import string
import warnings
import weakref
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken
from transformers.convert_slow_tokenizer import bytes_to_unicode

from specdec import (
    Cascade,
    DraftModel,
    Fallback,
    InvalidInput,
    Mixture,
    SpeculativeGenerator,
    Suffix,
    TranslatedDraft,
    UnsupportedModel,
    VocabularyMismatch,
)
from specdec.layouts.compiled import CompiledSteps
from specdec.length.fixed import Fixed
from specdec.processing import Processing
from specdec.proposers import Call, draft_past, past, translated, vocabulary
from specdec.proposers.rewriting import LONGEST_TAIL, DraftRow, Translator
from specdec.proposers.vocabulary import Vocabulary, pair, pieces_of, shared_ids, split_unfinished
from specdec.records import Proposal
from specdec.sampling import Greedy
from specdec.testing import TableModel, byte_tokenizer, noisy_copy, ragged_prompt, tiny_llama

from .contract import llama, mamba2
from .parrot import TEXTS, Parrot, byte_level, characters, metaspace

KINDS = {
    "bytes 300": lambda: byte_level(300),
    "bytes 420": lambda: byte_level(420),
    "spaces 345": lambda: metaspace(345),
    "spaces 400": lambda: metaspace(400),
}
PAIRS = [(one, other) for one in KINDS for other in KINDS if one != other]
METHODS = ("tokens", "strings")
LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?éß東🌊"


@cache
def tokenizer(kind):
    return KINDS[kind]()


@cache
def parrot(kind):
    return Parrot(tokenizer(kind))


def translator(target, draft):
    ours, theirs = tokenizer(target), tokenizer(draft)
    return Translator(Vocabulary(ours), Vocabulary(theirs), shared_ids(ours, theirs))


def prompts(kind, cuts=(14, 8, 22)):
    texts = [text[:cut] for text, cut in zip(TEXTS, cuts, strict=True)]
    inputs = tokenizer(kind)(texts, return_tensors="pt", padding=True)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


# --- the map ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_say_what_the_ids_stand_for(kind):
    vocabulary = Vocabulary(tokenizer(kind))
    assert vocabulary.pieces.kind == ("byte-level" if kind.startswith("bytes") else "sentencepiece")
    texts = [*TEXTS, " leading", "  two", "\n\n", "x", "", "🌊東é", "a</s>"]
    for text, ids in zip(texts, vocabulary.encode(texts), strict=True):
        assert vocabulary.pieces.join(ids) == text.encode()


@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_pairs_stand_for_the_same_and_are_one_to_one(target, draft):
    shared = shared_ids(tokenizer(target), tokenizer(draft))
    ours, theirs = pieces_of(tokenizer(target)), pieces_of(tokenizer(draft))
    assert len(set(shared.draft_ids.tolist())) == len(set(shared.target_ids.tolist())) == len(shared.draft_ids)
    for one, other in zip(shared.draft_ids.tolist(), shared.target_ids.tolist(), strict=True):
        assert theirs.of[one] == ours.of[other]
        assert (one in theirs.special) == (other in ours.special)
    missed = set(theirs.of) & set(ours.of) - {theirs.of[one] for one in shared.draft_ids.tolist()}
    assert missed <= {b"", b"<unk>"}
    assert shared.of_draft == len(shared.draft_ids) / len(tokenizer(draft))


def test_how_tokenizers_write_bytes():
    alphabet = {char: byte for byte, char in bytes_to_unicode().items()}
    assert alphabet == vocabulary.ALPHABET
    byte_like = ["Ġa", "b", "c"]
    assert vocabulary._kind(byte_like) == "byte-level"
    assert vocabulary._kind(byte_like + ["東"] * 3) == "plain", "not all of them can be bytes"
    assert vocabulary._kind(["▁a", "b"]) == "sentencepiece"
    assert vocabulary._kind(["a", "b"]) == "plain"
    assert vocabulary._kind(["a"] * 50 + ["##b"]) == "wordpiece"
    assert vocabulary._kind(["a"] * 500 + ["##b"]) == "plain"
    written = {
        ("Ġé", "byte-level"): b" \xe9", ("東", "byte-level"): "東".encode(), ("▁a▁", "sentencepiece"): b" a ",
        ("##ing", "wordpiece"): b"ing", ("##", "wordpiece"): b" ##", ("a", "wordpiece"): b" a",
        ("##a", "plain"): b"##a", ("a\ud83d", "plain"): b"a",
    }  # fmt: skip
    assert {key: vocabulary._bytes_of(*key) for key in written} == written


class Listed:
    """A tokenizer of these words: it writes one letter after the other, and refuses one that it does not have."""

    def __init__(self, words, added=None, special=()):
        self.words, self.added_tokens_decoder, self.all_special_ids = words, added or {}, list(special)

    def get_vocab(self):
        return self.words

    def __len__(self):
        return len(self.words)

    def __call__(self, texts, *, add_special_tokens, **options):
        begin = [99] if add_special_tokens else []
        return {"input_ids": [[*begin, *(self.words[letter] for letter in text)] for text in texts]}


def test_a_byte_has_a_token_of_its_own_in_sentencepiece_only():
    """Whether it was added or not; elsewhere these are six letters."""
    found = pieces_of(Listed({"▁a": 0, "<0x41>": 1, "<0x0A>": 2, "a": 3}, {2: AddedToken("<0x0A>")}))
    assert (found.of, found.fallback) == ([b" a", b"A", b"\n", b"a"], {1, 2})
    found = pieces_of(Listed({"Ġ": 0, "<0x41>": 1}))
    assert (found.of, found.fallback) == ([b" ", b"<0x41>"], set())
    assert pieces_of(Listed({b"<0x41>": 0, b"\xff": 1})).of == [b"<0x41>", b"\xff"]


def test_added_and_special_tokens_are_taken_by_their_letters():
    """They say nothing of how the others are written, and may have ids behind a gap."""
    found = pieces_of(Listed({"▁a": 0, "a": 1}, {0: AddedToken("▁a"), 3: AddedToken(" Ġ ")}))
    assert (found.kind, found.of) == ("plain", ["▁a".encode(), b"a", b"", " Ġ ".encode()])
    found = pieces_of(Listed({"Ġa": 0, "Ġ<s>": 4}, special=[4]))
    assert (found.kind, found.of) == ("byte-level", [b" a", b"", b"", b"", "Ġ<s>".encode()])


def test_texts_longer_than_a_model_may_take_are_taken_whole():
    made = byte_level(260)
    made.model_max_length = 4
    assert Vocabulary(made).pieces.join(Vocabulary(made).encode(["The quick"])[0]) == b"The quick"


def test_a_text_that_is_refused_has_no_ids_and_the_others_have():
    words = Listed({"a": 0, "b": 1})
    words.unk_token_id = 1
    assert pieces_of(words).unknown == 1
    assert vocabulary._encode(words, ["ab", "a?", "b"], add_special_tokens=True) == [[99, 0, 1], [], [99, 1]]


class Whole(Listed):
    """A tokenizer that has a word for every text, a space in front."""

    def __call__(self, texts, **options):
        return {"input_ids": [[self.words[f"▁{text}"]] for text in texts]}


def test_a_space_that_nothing_keeps_away_is_better_than_no_ids():
    words = ["a", *(f"{sentinel}{text}" for sentinel in vocabulary.SENTINELS for text in ("", "a"))]
    made = Vocabulary(Whole({f"▁{word}": one for one, word in enumerate(words)}))
    assert made.pieces.starts_with_space
    assert made.encode(["a"]) == [[0]]
    assert not pieces_of(Listed({"a": 0, "##b": 1})).starts_with_space, "words of their own are written so"


def pieces(*of, special=(), fallback=(), unknown=None, **roles):
    return vocabulary.Pieces(list(of), frozenset(special), frozenset(fallback), roles, unknown, "plain", False)


def test_which_of_several_ids_is_the_one_of_a_pair():
    ours = pieces(b"A", b"b", b"A", b"?", b"<s>", fallback=[0], unknown=3, special=[4])
    theirs = pieces(b"<s>", b"?", b"A", b"b", b"b", b"", special=[])
    shared = pair(ours, theirs)
    # no byte token where another says the same, the first of two; neither what is unknown nor two kinds of tokens
    assert dict(zip(shared.draft_ids.tolist(), shared.target_ids.tolist(), strict=True)) == {2: 2, 3: 1}
    assert (shared.of_draft, shared.of_target) == (2 / 5, 2 / 5), "of the ids that stand for something"
    assert ours.join([2, -1, 5, 1]) == b"Ab"


def test_roles_are_paired_once():
    """A token of two roles is one token."""
    ours = pieces(b"<end>", b"<begin>", special=[0, 1], eos_token_id=0, bos_token_id=1, pad_token_id=0)
    theirs = pieces(b"<stop>", b"<pad>", special=[0, 1], eos_token_id=0, bos_token_id=0, pad_token_id=1)
    shared = pair(ours, theirs)
    assert (shared.draft_ids.tolist(), shared.target_ids.tolist()) == ([0], [0])


class Words(dict):
    """All that is asked of a tokenizer whose ids are compared."""

    get_vocab = dict.copy
    __hash__ = object.__hash__


def test_nearly_the_same_ids_are_the_same():
    ours = Words({f"w{one}": one for one in range(200)})
    more = Words({**ours, "new": 200, "newer": 201, "newest": 202})
    assert vocabulary.same_ids(ours, more)
    assert not vocabulary.same_ids(more, ours), "more than a hundredth cannot be guessed"
    assert vocabulary.same_ids(Words(list(more.items())[:-1]), ours)
    assert not vocabulary.same_ids(ours, Words({**ours, "w7": 8, "w8": 7}))


@pytest.mark.parametrize(("begin", "end"), [("", "</s>"), ("<s>", ""), ("<s> <|turn|>", "</s>")])
def test_whole_texts_begin_as_the_tokenizer_begins_them(begin, end):
    """And do not end as it ends them."""
    made = byte_level(300)
    named = {name: made.convert_tokens_to_ids(name) for name in ("<s>", "</s>", "<|turn|>")}
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}".strip(), special_tokens=list(named.items())
    )
    (ids,) = Vocabulary(made).encode(["The fox"])
    assert Vocabulary(made).encode_start(["The fox", ""]) == [
        [*(named[name] for name in begin.split()), *rest] for rest in (ids, [])
    ]
    assert (made("The fox")["input_ids"][-1] == named["</s>"]) == bool(end)


def test_special_tokens_are_paired_by_content_and_by_role():
    ours, theirs = byte_level(300), byte_level(300)
    theirs.add_special_tokens({"eos_token": "<end>", "bos_token": "<begin>"})
    shared = shared_ids(ours, theirs)
    pairs = dict(zip(shared.draft_ids.tolist(), shared.target_ids.tolist(), strict=True))
    # "</s>" is still a special token there, and the same one
    assert pairs[theirs.convert_tokens_to_ids("</s>")] == ours.eos_token_id
    assert pairs[theirs.convert_tokens_to_ids("<|turn|>")] == ours.convert_tokens_to_ids("<|turn|>")
    assert theirs.eos_token_id not in pairs
    unlike = byte_level(300)
    unlike.add_special_tokens({"eos_token": "<end>"})
    other = pair(pieces_of(metaspace(345)), pieces_of(unlike))
    assert unlike.eos_token_id not in other.draft_ids  # "</s>" has taken the part


def test_the_end_of_the_draft_is_the_end_of_the_target():
    ours, theirs = characters("ab"), characters("ba")
    ours.add_special_tokens({"eos_token": "<stop>"})
    theirs.add_special_tokens({"eos_token": "<end>"})
    shared = shared_ids(ours, theirs)
    assert dict(zip(shared.draft_ids.tolist(), shared.target_ids.tolist(), strict=True)) == {0: 1, 1: 0, 2: 2}


def test_tokens_that_were_added_since_are_known():
    made = byte_tokenizer()
    before = len(pieces_of(made).of)
    made.add_tokens(["ab"])
    assert pieces_of(made).of[before:] == [b"ab"]


def test_an_ordinary_token_is_no_special_one():
    ours, theirs = characters("ab"), characters("ba")
    ours.add_special_tokens({"eos_token": "<x>"})
    theirs.add_tokens(["<x>"])
    assert shared_ids(ours, theirs).draft_ids.tolist() == [0, 1]


def test_a_map_is_made_once_and_kept_as_long_as_its_tokenizers(monkeypatch):
    ours, theirs = characters("abc"), characters("cab")
    first = shared_ids(ours, theirs)
    assert shared_ids(ours, theirs) is first
    theirs.add_tokens(["d"])
    assert shared_ids(ours, theirs) is not first
    gone = weakref.ref(theirs)
    del theirs
    gc.collect()
    assert gone() is None


class Counting:
    """A tokenizer that counts how often its whole vocabulary is asked for."""

    def __init__(self, inner):
        self.inner, self.asked = inner, 0

    def get_vocab(self):
        self.asked += 1
        return self.inner.get_vocab()

    def __len__(self):
        return len(self.inner)

    def __call__(self, *arguments, **options):
        return self.inner(*arguments, **options)

    def __getattr__(self, name):
        return getattr(self.inner, name)


@pytest.mark.parametrize("letters", ["abcdefgh", "hgfedcba"], ids=["the same ids", "others"])
def test_tokenizers_are_compared_once_and_kept_by_nobody(letters):
    """A call that names draft and tokenizer looks at vocabularies of 150,000 tokens the first time only."""
    ours, theirs = Counting(characters("abcdefgh")), Counting(characters(letters))
    target, draft = tiny_llama(vocabulary=len(ours)), tiny_llama(1, vocabulary=len(ours))
    gen = SpeculativeGenerator(target, tokenizer=ours)
    options = {"max_new_tokens": 4, "do_sample": False, "assistant_model": draft, "assistant_tokenizer": theirs}
    inputs = ragged_prompt((5,), len(ours))
    gen.generate(**inputs, **options)
    asked = ours.asked, theirs.asked
    assert min(asked) > 0
    gen.generate(**inputs, **options)
    assert (ours.asked, theirs.asked) == asked
    theirs.inner.add_tokens(["x"])
    gen.generate(**inputs, **options)
    assert ours.asked > asked[0]
    gone = [weakref.ref(theirs), weakref.ref(draft)]
    del theirs, draft, options
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_a_tokenizer_that_nothing_reads_is_refused_by_name():
    """What was given a model takes it as it is: another tokenizer beside it would be dropped in silence."""
    ours, theirs = characters("abcdefgh"), characters("hgfedcba")
    target, draft = tiny_llama(vocabulary=len(ours)), tiny_llama(1, vocabulary=len(ours))
    for make in (
        lambda: DraftModel(draft),
        lambda: Mixture("suffix", draft),
        lambda: Cascade("ngram", draft),
        lambda: Fallback(Suffix(), DraftModel(draft)),
        lambda: ["suffix", DraftModel(draft)],
    ):
        with pytest.raises(InvalidInput, match="TranslatedDraft"):
            SpeculativeGenerator(target, make(), tokenizer=ours, draft_tokenizer=theirs)
        SpeculativeGenerator(target, make(), tokenizer=ours, draft_tokenizer=ours)
    for reads in ([Suffix(), draft], TranslatedDraft(draft, ours, theirs), [Suffix(), "recycling"]):
        SpeculativeGenerator(target, reads, tokenizer=ours, draft_tokenizer=theirs)


def twins():
    """A target, and as a draft the same model under a permutation of its vocabulary; the tokenizers of both."""
    size = len(LETTERS)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(3))
    target = tiny_llama(vocabulary=size)
    draft = copy.deepcopy(target)
    with torch.no_grad():
        draft.model.embed_tokens.weight.copy_(target.model.embed_tokens.weight[order])
        draft.lm_head.weight.copy_(target.lm_head.weight[order])
    return target, draft, characters(LETTERS), characters("".join(LETTERS[i] for i in order))


def test_a_twin_with_its_ids_shuffled_is_always_right():
    """The same model under a permutation of its vocabulary: every guess must be kept, sampled ones too."""
    target, draft, *words = twins()
    prompt = {**ragged_prompt(vocabulary=len(LETTERS)), "max_new_tokens": 24}
    sampled = {"do_sample": True, "top_k": 0, "temperature": 0.8}
    runs = [("tokens", "block", {}), ("strings", "block", {})]
    for method, rule, options in (*runs, ("tokens", "block", sampled), ("tokens", "coupled", sampled)):
        proposer = TranslatedDraft(draft, *words, method=method)
        gen = SpeculativeGenerator(target, proposer, num_draft_tokens=5, verification=rule, seed=1)
        gen.generate(**prompt, **options)
        assert gen.stats.drafted > 20
        # sampled rows differ by rounding
        assert gen.stats.acceptance_rate > (0.98 if options else 0.9999)


def allowed(row, ids):
    """Two letters, which say what came before."""
    return [int(ids[-3:].sum()) % len(LETTERS), int(ids[-1] * 5 + 2) % len(LETTERS)]


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}, {"prefix_allowed_tokens_fn": allowed}]
)
def test_a_twin_is_right_with_the_processors_of_the_call(options):
    """They look at the guesses before; what they take away is no part of the vocabulary that is not shared."""
    target, draft, *words = twins()
    prompt = {**ragged_prompt((7, 7), len(LETTERS)), "max_new_tokens": 25, "do_sample": False}
    proposer = TranslatedDraft(draft, *words, method="tokens")
    gen = SpeculativeGenerator(target, proposer, num_draft_tokens=5, layout="slots")
    assert gen.generate(**prompt, **options).tolist() == target.generate(**prompt, **options).tolist()
    # the prompt's round, and four of five guesses and one token
    assert (gen.stats.acceptance_rate, gen.stats.rounds) == (1.0, 5)


@pytest.mark.parametrize("layout", ["slots", "columns"])
@pytest.mark.parametrize("method", METHODS)
def test_what_was_guessed_and_kept_is_not_fed_again(method, layout):
    target, draft, *words = twins()
    widths = []
    draft.register_forward_pre_hook(
        lambda _, args, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    proposer = TranslatedDraft(draft, *words, method=method, layout=layout, confidence=0)
    gen = SpeculativeGenerator(target, proposer, num_draft_tokens=4, layout="slots")
    gen.generate(**ragged_prompt((7, 7), len(LETTERS)), max_new_tokens=26, do_sample=False)
    assert gen.stats.acceptance_rate == 1
    # behind the prompt and the trial of a layout: the last guess and what the target wrote, or a guess
    assert set(widths[8:]) == {1, 2}


def test_guesses_are_remembered_once_and_only_ones_own():
    """As the host saw them, or read where nobody shows the round; in a round of others they were not fed."""
    told = []
    past = SimpleNamespace(remember=lambda ids: told.append(ids.tolist()), follow=lambda state, limits: limits)
    run = translated._Tokens(past, None, None, None, "")
    run._host_to_draft = np.array([10, 11, 12])
    state, device = SimpleNamespace(batch=1, device=torch.device("cpu")), torch.device("cpu")
    run._proposal = own = Proposal.certain([[2, 0]], device)
    run.observe(SimpleNamespace(proposal=Proposal.certain([[1, 1]], device), drafted=np.array([[1, 1]])))
    assert told == []
    run.observe(SimpleNamespace(proposal=own, drafted=np.array([[2, -1]])))
    run.propose(state, np.zeros(1, dtype=np.int64))
    assert told == [[[12, -1]]]
    run._proposal = own
    run.propose(state, np.zeros(1, dtype=np.int64))
    assert told == [[[12, -1]], [[12, 10]]]


def test_a_guess_is_as_likely_as_among_all_that_the_draft_may_say():
    """In full precision, whatever the draft's is; and committed text is not written to."""
    told, scores = [], torch.tensor([[[20.0, 19.0, 20.5, 18.0]]], dtype=torch.bfloat16)
    past = SimpleNamespace(
        follow=lambda state, limits: limits, scores=lambda step: scores, write=lambda ids, step: None
    )
    stop = SimpleNamespace(reads=True, looks=True, after=lambda limits, step, chance: told.append(chance) or limits)
    shared = SimpleNamespace(draft_ids=np.array([0, 1]), target_ids=np.array([2, 0]))
    call = Call(None, torch.zeros(1, 3, dtype=torch.int64), {}, 8, Processing([]), Greedy())
    state = SimpleNamespace(
        batch=1, device=torch.device("cpu"), tokens=torch.zeros(1, 6, dtype=torch.int64), vocabulary=3,
        lengths=np.array([3]), prompt_length=3,
    )  # fmt: skip
    proposal = translated._Tokens(past, call, shared, stop, "").propose(state, np.array([2]))
    assert proposal.tokens.tolist() == [[2, 2]]
    own = float(scores[0, 0].double().softmax(0)[0])
    assert torch.cat(told).flatten().tolist() == pytest.approx([own] * 2, rel=1e-5)
    assert not state.tokens.any()


def test_the_chances_of_a_row_that_has_all_its_guesses_are_not_told():
    told, stop = [], object.__new__(translated._Stop)
    stop._goes_on = lambda chances: told.append(chances.tolist()) or len(told) < 2
    limits, chances = np.array([1, 3]), torch.tensor([[0.5], [0.25]])
    assert stop.after(limits, 1, chances).tolist() == [1, 3]
    assert stop.after(limits, 1, chances).tolist() == [1, 2]
    assert told == [[0.0, 0.25]] * 2


@pytest.mark.parametrize(("size", "more"), [("ab", "abcdefgh"), ("abcdefgh", "ab")])
def test_what_is_shared_is_a_part_of_the_smaller_vocabulary(size, more):
    draft = TranslatedDraft(tiny_llama(1, vocabulary=len(more)), characters(size), characters(more))
    assert draft.choose(greedy=False) == ("tokens", "sampling, with enough ids in common")
    assert draft.choose(greedy=True)[0] == "strings"
    few = TranslatedDraft(tiny_llama(1, vocabulary=8), characters("abcdefgh"), characters("abcwxyzt"))
    assert few.choose(greedy=False) == ("strings", "too few ids in common")


def test_a_compiler_is_asked_for_where_a_draft_shall_be_compiled(monkeypatch):
    asked = []
    monkeypatch.setattr("specdec.layouts.compiled.check_compiler", asked.append)
    draft, words = tiny_llama(1, vocabulary=2), characters("ab")
    assert TranslatedDraft(draft, words, words)._steps is None
    assert isinstance(TranslatedDraft(draft, words, words, compile=True)._steps, CompiledSteps)
    assert asked == [draft]


@pytest.mark.parametrize("method", METHODS)
def test_how_likely_a_guess_is_is_asked_where_nobody_has_to_wait_for_it(method, monkeypatch):
    """Text has its chances where the draft is, tokens where the target is."""
    monkeypatch.setattr(Fixed, "goes_on", lambda self, chances: True)
    words, here, away = characters("ab"), torch.device("cpu"), torch.device("meta")
    proposer = TranslatedDraft(tiny_llama(1, vocabulary=2), words, words, method=method)
    for draft, target in ((here, away), (away, here)):
        monkeypatch.setattr(translated, "device_of", lambda model, otherwise, draft=draft: draft)
        prompt = torch.zeros(1, 3, dtype=torch.int64, device=target)
        run = proposer.begin(Call(None, prompt, {}, 8, Processing([]), Greedy()))
        assert run._stop.looks == ((target if method == "tokens" else draft) == here)


@pytest.mark.parametrize("method", METHODS)
def test_a_draft_stops_where_it_is_not_sure(method, monkeypatch):
    """By its confidence, or because the call's draft length has had enough; text too is written token by token."""
    target, draft, *words = twins()
    prompt = {**ragged_prompt((7,), len(LETTERS)), "max_new_tokens": 6, "do_sample": False}

    def longest(confidence):
        proposer = TranslatedDraft(draft, *words, method=method, confidence=confidence, layout="slots")
        gen = SpeculativeGenerator(target, proposer, num_draft_tokens=4, layout="slots")
        gen.generate(**prompt)
        passes.append(gen.stats.draft_forwards - gen.stats.drafted)
        return len(gen.stats.drafted_at)

    passes = []
    assert [longest(confidence) for confidence in (None, 0.0, 1.0)] == [4, 4, 1]
    monkeypatch.setattr(Fixed, "goes_on", lambda self, chances: False)
    assert [longest(confidence) for confidence in (None, 0.0)] == [1, 4]
    # the first has tried the layout; none is made for a guess that is not
    assert passes[1:] == [1] * 4


def test_text_is_written_behind_the_last_committed_tokens(monkeypatch):
    """As many guesses as the target's tokenizer makes of it: here several of a single token of the draft."""
    letters, followed, right = byte_level(260), [], Translator.follow
    target, draft = Parrot(letters), parrot("bytes 420")

    def watched(self, committed, texts):
        followed.extend(zip((ids.tolist() for ids in committed), texts, strict=True))
        return right(self, committed, texts)

    monkeypatch.setattr(Translator, "follow", watched)
    proposer = TranslatedDraft(draft, letters, tokenizer("bytes 420"), method="strings", confidence=1)
    gen = SpeculativeGenerator(target, proposer, num_draft_tokens=4, layout="columns")
    inputs = letters(["The quick", "a"], return_tensors="pt", padding=True)
    gen.generate(**{name: inputs[name] for name in ("input_ids", "attention_mask")}, max_new_tokens=20)
    assert len(gen.stats.drafted_at) == 4
    first, second = followed[::2], followed[1::2]
    assert all(letters.decode(ids) + text.decode() in TEXTS[0] for ids, text in first)
    assert {10, 16} <= {len(ids) for ids, _ in first} <= {*range(17)}
    assert all(ids == second[0][0] and len(ids) == 2 for ids, _ in second), "no padding"


def test_the_end_of_a_text_is_a_guess_in_the_targets_id(monkeypatch):
    """Behind text, or at once; not behind text that the target would write otherwise."""
    ours, theirs = characters("abcd"), characters("abcdx")
    ours.add_special_tokens({"eos_token": "<stop>"})
    theirs.add_special_tokens({"eos_token": "<end>"})
    follows = {0: 1, 1: 2, 2: "end", 3: "x"}
    target, draft = torch.full((5,) * 3, -30.0), torch.full((6,) * 3, -30.0)
    for table, words in ((target, {"end": 4, "x": 3}), (draft, {"end": 5, "x": 4})):
        for last, one in follows.items():
            table[:, last, words.get(one, one)] = 0
    draft[:, 4, 5] = draft[:, 5, 0] = 0
    guesses, right = [], translated._Strings.propose

    def watched(self, state, limits):
        proposal = right(self, state, limits)
        guesses.append([row[:most].tolist() for row, most in zip(proposal.tokens, proposal.lengths, strict=True)])
        return proposal

    monkeypatch.setattr(translated._Strings, "propose", watched)
    proposer = TranslatedDraft(TableModel(draft), ours, theirs, method="strings", confidence=0)
    gen = SpeculativeGenerator(TableModel(target), proposer, num_draft_tokens=3, layout="columns")
    ids = torch.tensor([[0], [1], [3]])
    got = gen.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=4)
    assert got.tolist() == [[0, 1, 2, 4, 0], [1, 2, 4, 0, 0], [3, 3, 3, 3, 3]]
    assert guesses[0] == [[2, 4], [4], []]


def test_text_of_a_row_ends_where_the_draft_was_not_sure(monkeypatch):
    proposals, right = [], translated._Strings.propose
    monkeypatch.setattr(
        translated._Strings, "propose", lambda *args: proposals.append(right(*args)) or proposals[-1]
    )
    table = torch.full((4, 4, 4), -30.0)
    table[:, 0, 1] = table[:, 1, 0] = 0
    table[:, 2, 2:] = table[:, 3, 2:] = 0  # one as likely as the other
    words = characters("abcd")
    proposer = TranslatedDraft(TableModel(table), words, words, method="strings", confidence=0.7)
    gen = SpeculativeGenerator(TableModel(table), proposer, num_draft_tokens=3, layout="columns")
    ids = torch.tensor([[0], [2]])
    gen.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert proposals[0].lengths.tolist() == [3, 1]


# --- between two tokenizers ------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_committed_text_becomes_the_ids_that_the_draft_would_have(target, draft):
    """Token by token, across merges and split characters; what is settled stays."""
    between = translator(target, draft)
    theirs = between.draft
    for text in TEXTS:
        ids = between.target.encode([text])[0]
        row, head = DraftRow(5, b""), []
        for one in ids:
            said = row.add(between.bytes_of(np.array([one])))
            head += row.encoded(theirs.encode([said])[0], between)
            assert row.settled == 5 + len(head)
            assert len(row.tail) < LONGEST_TAIL
        assert theirs.pieces.join(head + row.tail) == text.encode()
        assert row.known
        assert head + row.tail == theirs.encode([text])[0]


def test_what_ids_say_to_the_draft():
    ours, theirs = characters("ab"), characters("abc")
    ours.add_special_tokens({"eos_token": "<stop>"})
    theirs.add_special_tokens({"eos_token": "<end>"})
    between = Translator(Vocabulary(ours), Vocabulary(theirs), shared_ids(ours, theirs))
    # the end is the draft's own; ids that the tokenizer does not have say nothing
    assert between.bytes_of(np.array([0, 1, 2, 3, -1])) == b"ab<end>"


def test_prompts_begin_as_the_drafts_own_do():
    between = translator("bytes 420", "bytes 300")
    (ids, behind_a_space), begin = between.target.encode(["The fox", " The fox"]), between.target.pieces.roles
    rows = [[begin["bos_token_id"], *ids], ids, behind_a_space, []]
    prompts, rest = between.prompts([np.array(row, dtype=np.int64) for row in rows])
    theirs = between.draft.encode(["The fox", " The fox"])
    # no text has no ids, and there must be one to be fed
    assert prompts == [theirs[0], theirs[0], theirs[1], [between.draft.pieces.roles["bos_token_id"]]]
    assert rest == [b""] * 4


def test_a_prompt_may_end_inside_a_character():
    between = translator("bytes 300", "bytes 420")
    half = np.array([between.target.pieces.of.index(byte) for byte in (b"a", b"\xc3")])
    prompts, (rest,) = between.prompts([half])
    assert prompts == between.draft.encode(["a"])
    assert DraftRow(1, rest).add(b"\xa9") == "é"


def test_bytes_that_finish_no_character_are_one_id_where_the_draft_has_it():
    between = translator("bytes 300", "bytes 420")
    of = between.draft.pieces.of
    assert between.unfinished_ids(b"\xe2\x82") == [of.index(b"\xe2\x82")]
    assert between.unfinished_ids(b"\xe2\x83") == [of.index(b"\xe2"), of.index(b"\x83")]


def test_a_split_character_is_fed_as_bytes():
    between = translator("bytes 300", "spaces 345")
    row = DraftRow(0, b"")
    said = row.add("é🌊".encode()[:-1])
    row.encoded(between.draft.encode([said])[0], between)
    assert row.known
    assert between.draft.pieces.join(row.tail) == "é🌊".encode()[:-1]


def test_without_bytes_a_split_character_stops_the_draft():
    ours, theirs = byte_level(300), characters("abé")
    between = Translator(Vocabulary(ours), Vocabulary(theirs), shared_ids(ours, theirs))
    row = DraftRow(0, b"")
    row.encoded(between.draft.encode([row.add("aé".encode()[:-1])])[0], between)
    assert not row.known
    row.encoded(between.draft.encode([row.add("é".encode()[-1:])])[0], between)
    assert row.known
    assert between.draft.pieces.join(row.tail) == "aé".encode()


def test_a_text_that_a_tokenizer_cannot_say_is_left_behind():
    """A normaliser that changes the text: the tail cannot be cut, and does not grow for ever."""
    ours, theirs = characters("AB"), characters("AB")
    theirs.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace("B", "A")
    between = Translator(Vocabulary(ours), Vocabulary(theirs), shared_ids(ours, theirs))
    row = DraftRow(0, b"")
    for _ in range(300):
        row.encoded(between.draft.encode([row.add(b"B")])[0], between)
        assert len(row.tail) <= LONGEST_TAIL + 1
    assert row.settled > 200


def test_what_is_left_behind_is_whole_characters():
    ours, theirs = byte_level(300), characters("AB")
    theirs.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace("B", "A")
    between = Translator(Vocabulary(ours), Vocabulary(theirs), shared_ids(ours, theirs))
    row = DraftRow(0, b"")
    said = row.add(b"B" * (LONGEST_TAIL + 1) + b"\xc3")
    row.encoded(between.draft.encode([said])[0], between)
    assert row.settled == LONGEST_TAIL + 1
    assert row.add(b"\xa9") == "é"


def test_a_tail_is_not_cut_where_its_ids_say_another_text():
    ours, theirs = characters("AB"), characters("AB")
    theirs.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace("B", "AA")
    between = Translator(Vocabulary(ours), Vocabulary(theirs), shared_ids(ours, theirs))
    row = DraftRow(0, b"")
    assert row.encoded(between.draft.encode([row.add(b"B" * 10)])[0], between) == []
    assert row.add(b"B") == "B" * 11


def test_a_text_without_ids_has_no_end_to_guess_behind():
    ours, theirs = characters("ab"), characters("a")
    between = Translator(Vocabulary(ours), Vocabulary(theirs), shared_ids(ours, theirs))
    row = DraftRow(0, b"")
    row.encoded(between.draft.encode([row.add(b"b")])[0], between)
    assert row.tail == [0]
    assert not row.known


@pytest.mark.parametrize("kind", KINDS)
def test_text_behind_committed_tokens(kind):
    between = translator(kind, "bytes 300")
    vocabulary = between.target
    for text in TEXTS:
        ids = vocabulary.encode([text])[0]
        for cut in range(1, len(ids) - 1):
            rest = vocabulary.pieces.join(ids[cut:])
            (found,) = between.follow([np.array(ids[:cut])], [rest])
            assert found == ids[cut:] or not found
        found = between.follow([np.array(ids[:6])] * 2, [vocabulary.pieces.join(ids[6:]), b""])
        assert found == [ids[6:], []]


def test_tokens_that_no_encoding_would_give_are_looked_behind_less():
    between = translator("bytes 420", "bytes 300")
    encoded = between.target.encode
    letters = [one for ids in encoded(["T", "h", "e", " quick"]) for one in ids]
    assert between.follow([np.array(letters)], [b" brown"]) == encoded([" brown"])
    # half of a character comes out as another one: what is compared begins behind it
    half = between.target.pieces.of.index(b"\xa9")
    assert len(encoded(["ÿ"])[0]) == 2
    assert between.follow([np.array([half, *encoded(["ÿ"])[0]])], [b"a"]) == encoded(["a"])
    assert between.follow([np.array([half])], [b"a"]) == [[]]
    # an id of a padded vocabulary says nothing
    assert between.follow([np.array([10**6, *encoded(["The"])[0]])], [b" quick"]) == encoded([" quick"])


def test_text_that_would_change_a_committed_token_is_no_guess():
    between = translator("bytes 420", "bytes 300")
    ids = between.target.encode(["The quick"])[0]
    assert between.target.pieces.of[ids[-1]] == b" quick"
    cut = between.target.encode(["The qui"])[0]
    assert between.follow([np.array(cut)], [b"ck brown"]) == [[]]


@pytest.mark.parametrize(
    ("data", "text", "rest"),
    [
        (b"ab", "ab", b""),
        ("aé".encode()[:-1], "a", b"\xc3"),
        ("🌊".encode()[:3], "", "🌊".encode()[:3]),
        (b"\xffa", "\ufffda", b""),
        (b"a\xe6\x9d", "a", b"\xe6\x9d"),
    ],
)
def test_split_unfinished(data, text, rest):
    assert split_unfinished(data) == (text, rest)


# --- greedy text is that of plain generate() -------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_reciting_the_same_text(target, draft, method):
    """Target and draft agree in all but their tokens: the text is plain's, and guesses are kept."""
    model = parrot(target)
    plain = model.generate(**prompts(target), max_new_tokens=60, do_sample=False)
    proposer = TranslatedDraft(parrot(draft), tokenizer(target), tokenizer(draft), method=method)
    gen = SpeculativeGenerator(model, proposer, num_draft_tokens=4)
    assert gen.generate(**prompts(target), max_new_tokens=60, do_sample=False).tolist() == plain.tolist()
    least = {"tokens": 0.25, "strings": 0.6}[method]
    assert gen.stats.acceptance_rate > least
    assert (gen.stats.row_accepted > 0).all()
    assert gen.stats.drafting.startswith(f"{method}: asked for; ")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["slots", "columns", "snapshot"])
@pytest.mark.parametrize(
    ("target", "draft"), [("bytes 300", "spaces 345"), ("spaces 400", "bytes 420"), ("bytes 420", "bytes 300")]
)
def test_random_text(target, draft, layout, method):
    """Random tokens: broken characters, special tokens in the text, rows that no text stands for."""
    sizes = [len(tokenizer(kind)) for kind in (target, draft)]
    model = tiny_llama(vocabulary=sizes[0], eos_token_id=7)
    prompt = ragged_prompt((9, 5, 1, 12), sizes[0])
    proposer = TranslatedDraft(
        tiny_llama(1, vocabulary=sizes[1]), tokenizer(target), tokenizer(draft), method=method,
        confidence=0, layout=layout,
    )  # fmt: skip
    plain = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    for guesses in (1, 4):
        gen = SpeculativeGenerator(model, proposer, num_draft_tokens=guesses)
        assert gen.generate(**prompt, max_new_tokens=40, do_sample=False).tolist() == plain.tolist()
        assert gen.stats.drafted > 0
        name = "columns+snapshot" if layout == "snapshot" else layout
        assert gen.stats.draft_layout == name


def test_what_the_draft_was_fed_is_the_committed_text(monkeypatch):
    """After every round the draft's past, forgotten and fed again, scores like the same text fed afresh."""
    sizes = [len(tokenizer(kind)) for kind in ("bytes 420", "bytes 300")]
    draft = tiny_llama(1, vocabulary=sizes[1])
    seen = []
    right = draft_past.DraftPast.scores

    def watched(self, step):
        scores = right(self, step)
        if step == 0:
            for b in np.flatnonzero(self._active):
                width = int(self.lengths[b])
                start = int(self._starts[b])
                with torch.no_grad():
                    fresh = draft(torch.from_numpy(self._host[b, start:width].copy())[None]).logits[0, -1]
                seen.append(float((fresh - scores[b]).abs().max()))
        return scores

    monkeypatch.setattr(draft_past.DraftPast, "scores", watched)
    model = parrot("bytes 420")
    for method in METHODS:
        proposer = TranslatedDraft(
            draft, tokenizer("bytes 420"), tokenizer("bytes 300"), method=method, confidence=0
        )
        gen = SpeculativeGenerator(model, proposer, num_draft_tokens=5)
        gen.generate(**prompts("bytes 420"), max_new_tokens=30)
    assert len(seen) > 60
    assert max(seen) < 1e-4


def told(monkeypatch, between):
    """Compare what drafts are fed with what was committed; returns how many rows could guess, round by round."""
    right, alive = draft_past.DraftPast.follow, []

    def watched(self, state, limits):
        found = right(self, state, limits)
        for b in np.flatnonzero(found):
            ids = state.host_tokens[b, state.starts[b] : state.lengths[b]]
            fed = self._host[b, self._starts[b] : self.lengths[b]]
            assert between.draft.pieces.join(fed) == between.bytes_of(ids)
            assert self._tokens[b, : self.lengths[b]].tolist() == self._host[b, : self.lengths[b]].tolist()
        alive.append(int((found > 0).sum()))
        return found

    monkeypatch.setattr(draft_past.DraftPast, "follow", watched)
    return alive


def test_a_row_is_told_the_end_of_a_character_that_its_prompt_began(monkeypatch):
    letters = byte_level(260)
    between = Translator(Vocabulary(letters), Vocabulary(letters), shared_ids(letters, letters))
    alive, ids = told(monkeypatch, between), between.target.encode(["Ein Kä"])[0]
    gen = SpeculativeGenerator(
        Parrot(letters), TranslatedDraft(Parrot(letters), letters, letters), num_draft_tokens=3
    )
    gen.generate(torch.tensor([ids[:-1]]), max_new_tokens=20)
    assert sum(alive) > 3


@pytest.mark.parametrize("method", METHODS)
def test_every_row_is_told_what_it_has_committed(method, monkeypatch):
    """Rows that get on at different speeds, and end one after the other."""
    alive = told(monkeypatch, translator("bytes 420", "bytes 300"))
    kinds = [tokenizer(kind) for kind in ("bytes 420", "bytes 300")]
    proposer = TranslatedDraft(parrot("bytes 300"), *kinds, method=method, confidence=0)
    gen = SpeculativeGenerator(parrot("bytes 420"), proposer, num_draft_tokens=4)
    for _ in range(2):  # the rounds of a model's first call are others: it has no layout yet
        alive.clear()
        gen.generate(**prompts("bytes 420"), max_new_tokens=90)
    assert {1, 2, 3} <= set(alive)
    assert len(set(gen.stats.row_accepted.tolist())) == 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_draft_whose_scores_are_no_distribution_breaks_nothing(rule, method):
    sizes = [len(tokenizer(kind)) for kind in ("bytes 300", "bytes 420")]
    model, broken = tiny_llama(vocabulary=sizes[0]), tiny_llama(1, vocabulary=sizes[1])
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    kinds = tokenizer("bytes 300"), tokenizer("bytes 420")
    proposer = TranslatedDraft(broken, *kinds, method=method, confidence=0)  # never unsure
    gen = SpeculativeGenerator(model, proposer, num_draft_tokens=3, verification=rule, layout="slots")
    got = gen.generate(**prompts("bytes 300"), max_new_tokens=8, do_sample=True, seed=3)
    assert got.shape[1] == prompts("bytes 300")["input_ids"].shape[1] + 8


@pytest.mark.parametrize("sample", [False, True])
def test_no_guess_where_hardly_any_of_the_drafts_mass_is_shared(sample, monkeypatch):
    """Known before the draw, so that the guesses before are submitted whatever comes."""
    right, told = translated._Tokens.propose, []

    def watched(self, state, limits):
        proposal = right(self, state, limits)
        last = state.host_tokens[np.arange(state.batch), state.lengths - 1]
        told.extend(zip(last.tolist(), np.minimum(limits, 4).tolist(), proposal.lengths.tolist(), strict=True))
        widths = {part.shape[1] for part in (proposal.tokens, proposal.logits) if part is not None}
        assert not limits.any() or widths == {max(proposal.lengths)}
        if proposal.logits is not None:  # the letter that the draft does not have
            assert (proposal.logits[..., 3] == -torch.inf).all()
        return proposal

    monkeypatch.setattr(translated._Tokens, "propose", watched)
    table = torch.full((4, 4, 4), -30.0)  # what follows the last letter, of "abcx"
    table[:, 0, 1] = table[:, 1, 3] = table[:, 3, 0] = 0
    table[:, 2, 3], table[:, 2, 0] = 0, -2.0  # an eighth
    target = TableModel(torch.randn((4, 4, 4), generator=torch.Generator().manual_seed(0)))
    for confidence, counts in ((None, (1, 0, 2)), (0.0, (4, 4, 4))):
        proposer = TranslatedDraft(
            TableModel(table), characters("abcd"), characters("abcx"), method="tokens", confidence=confidence
        )
        gen = SpeculativeGenerator(target, proposer, num_draft_tokens=4, layout="columns")
        ids = torch.tensor([[0, 1], [2, 0], [1, 2]])
        gen.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=sample, seed=2)
        seen = [one for one in told if one[0] < 3]  # behind a letter that it cannot say it guesses as before it
        assert {last for last, *_ in seen} == {0, 1, 2}
        assert all(got == min(most, counts[last]) for last, most, got in seen)
        told.clear()


def test_a_surer_draft_leaves_the_other_as_it_was():
    proposer = TranslatedDraft(parrot("bytes 420"), tokenizer("bytes 300"), tokenizer("bytes 420"))
    surer = proposer.sure(0.9)
    assert surer.shared is proposer.shared
    assert (proposer._confidence, surer._confidence) == (None, 0.9)


@pytest.mark.parametrize("method", METHODS)
def test_shared_noise_gives_the_same_text_with_any_draft(method):
    sizes = [len(tokenizer(kind)) for kind in ("bytes 300", "bytes 420")]
    model = tiny_llama(vocabulary=sizes[0])
    options = {"do_sample": True, "max_new_tokens": 20, "top_p": 0.9}
    plain = SpeculativeGenerator(model, None, verification="coupled", seed=5)
    proposer = TranslatedDraft(
        tiny_llama(1, vocabulary=sizes[1]), tokenizer("bytes 300"), tokenizer("bytes 420"), method=method
    )
    gen = SpeculativeGenerator(model, proposer, num_draft_tokens=4, verification="coupled", seed=5)
    prompt = ragged_prompt(vocabulary=sizes[0])
    assert gen.generate(**prompt, **options).tolist() == plain.generate(**prompt, **options).tolist()
    assert gen.stats.drafted > 0


@pytest.mark.parametrize("method", METHODS)
def test_with_processors_conditions_and_several_sequences(method):
    sizes = [len(tokenizer(kind)) for kind in ("spaces 345", "bytes 420")]
    model = tiny_llama(vocabulary=sizes[0])
    proposer = TranslatedDraft(
        noisy_copy(tiny_llama(1, vocabulary=sizes[1])),
        tokenizer("spaces 345"),
        tokenizer("bytes 420"),
        method=method,
    )
    prompt = ragged_prompt(vocabulary=sizes[0])
    options = {
        "max_new_tokens": 25, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "do_sample": False,
        "stop_strings": ["e"], "tokenizer": tokenizer("spaces 345"),
    }  # fmt: skip
    plain = model.generate(**prompt, **options)
    gen = SpeculativeGenerator(model, proposer, num_draft_tokens=4)
    assert gen.generate(**prompt, **options).tolist() == plain.tolist()
    out = gen.generate(**prompt, do_sample=True, num_return_sequences=2, max_new_tokens=10)
    assert out.shape == (6, 19)


# --- the front door --------------------------------------------------------------------------------


def pair_of_models():
    sizes = [len(tokenizer(kind)) for kind in ("bytes 420", "bytes 300")]
    return [tiny_llama(seed, vocabulary=size) for seed, size in enumerate(sizes)]


def test_both_tokenizers_make_the_pair_work():
    target, draft = pair_of_models()
    options = {"tokenizer": tokenizer("bytes 420"), "draft_tokenizer": tokenizer("bytes 300")}
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=4, **options)
    prompt = ragged_prompt(vocabulary=400)
    plain = target.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert gen.generate(**prompt, max_new_tokens=12, do_sample=False).tolist() == plain.tolist()
    assert gen.stats.drafting == (
        "strings: greedy text has no use for probabilities; 100% of the smaller vocabulary is shared"
    )
    gen.generate(**prompt, max_new_tokens=12, do_sample=True)
    assert (
        gen.stats.drafting
        == "tokens: sampling, with enough ids in common; 100% of the smaller vocabulary is shared"
    )


def test_without_tokenizers_the_error_asks_for_them():
    target, draft = pair_of_models()
    with pytest.raises(VocabularyMismatch, match=r"Pass both tokenizers, `tokenizer`.*`draft_tokenizer`"):
        SpeculativeGenerator(target, draft, tokenizer=tokenizer("bytes 420"))


def test_the_same_ids_need_no_translation():
    target, draft = (tiny_llama(seed, vocabulary=300) for seed in (0, 1))
    options = {"tokenizer": byte_level(300), "draft_tokenizer": byte_level(300)}
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=4, **options)
    gen.generate(**ragged_prompt(vocabulary=300), max_new_tokens=8)
    assert gen.stats.drafting == ""
    assert gen.stats.draft_forwards > 0


def test_vocabularies_with_nothing_in_common():
    target, draft = tiny_llama(vocabulary=4), tiny_llama(1, vocabulary=4)
    prompt = torch.tensor([[0, 1, 2]])
    options = {"tokenizer": characters("abcd"), "draft_tokenizer": characters("wxyz")}
    with pytest.warns(UserWarning, match=r"little in common \(0\.0% of"):
        gen = SpeculativeGenerator(target, draft, num_draft_tokens=4, **options)
    for sample in (False, True):
        gen.generate(prompt, max_new_tokens=8, do_sample=sample)
        assert gen.stats.drafting.startswith("strings")
        assert gen.stats.drafted == 0
    with pytest.warns(UserWarning, match="little in common"):
        forced = TranslatedDraft(draft, *options.values(), method="tokens")
    gen = SpeculativeGenerator(target, forced, num_draft_tokens=4)
    plain = target.generate(prompt, max_new_tokens=8, do_sample=False)
    assert gen.generate(prompt, max_new_tokens=8, do_sample=False).tolist() == plain.tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [(3, 4), (4, 3)])
def test_tokenizers_may_have_more_ids_than_models_have_scores(sizes, method):
    target, draft = (tiny_llama(seed, vocabulary=size) for seed, size in enumerate(sizes))
    proposer = TranslatedDraft(draft, characters("abcd"), characters("dcba"), method=method, confidence=0)
    gen = SpeculativeGenerator(target, proposer, num_draft_tokens=4)
    prompt = torch.tensor([[0, 1, 2]])
    plain = target.generate(prompt, max_new_tokens=12, do_sample=False)
    assert gen.generate(prompt, max_new_tokens=12, do_sample=False).tolist() == plain.tolist()
    assert gen.stats.drafted > 0


def test_a_draft_that_is_too_short_for_the_text():
    target = tiny_llama(vocabulary=300)
    draft = tiny_llama(1, vocabulary=345, max_position_embeddings=24)
    prompt = ragged_prompt((9, 6), 300)
    plain = target.generate(**prompt, max_new_tokens=40, do_sample=False)
    proposer = TranslatedDraft(draft, tokenizer("bytes 300"), tokenizer("spaces 345"), confidence=0)
    gen = SpeculativeGenerator(target, proposer, num_draft_tokens=4)
    assert gen.generate(**prompt, max_new_tokens=40, do_sample=False).tolist() == plain.tolist()
    assert 0 < gen.stats.drafted < 40
    long = ragged_prompt((60,), 300)
    with pytest.warns(UserWarning, match="drafts nothing with LlamaForCausalLM: the prompt has"):
        gen.generate(**long, max_new_tokens=8, do_sample=False)
    assert gen.stats.drafted == 0


def test_a_row_that_is_too_long_for_the_draft_leaves_the_others_theirs(monkeypatch):
    target, letters = parrot("bytes 420"), byte_level(260)
    draft = Parrot(letters)
    draft.config.max_position_embeddings = 40
    proposer = TranslatedDraft(draft, tokenizer("bytes 420"), letters, method="strings", confidence=0)
    gen = SpeculativeGenerator(target, proposer, num_draft_tokens=4)
    right, seen = draft_past.DraftPast.follow, []

    def watched(self, state, limits):
        found = right(self, state, limits)
        if self._rows:
            assert not found[~self._active].any()
            assert (self.lengths + found).max() <= 40
            seen.append(self._active.copy())
        return found

    monkeypatch.setattr(draft_past.DraftPast, "follow", watched)
    inputs = prompts("bytes 420", (4, 4, 4))
    plain = target.generate(**inputs, max_new_tokens=40, do_sample=False)
    assert gen.generate(**inputs, max_new_tokens=40, do_sample=False).tolist() == plain.tolist()
    assert any(active.any() and not active.all() for active in seen)
    # who has left does not come back
    assert all((after <= before).all() for before, after in pairwise(seen))


def test_no_guess_where_the_draft_cannot_say_what_there_is(monkeypatch):
    right, seen = draft_past.DraftPast.follow, []

    def watched(self, state, limits):
        found = right(self, state, limits)
        seen.extend((row.known, int(most)) for row, most in zip(self._rows, found, strict=False))
        return found

    monkeypatch.setattr(draft_past.DraftPast, "follow", watched)
    theirs = characters("abcdefghijklmnopqrstuvwxyz .")
    proposer = TranslatedDraft(tiny_llama(1, vocabulary=28), tokenizer("bytes 300"), theirs, confidence=0)
    gen = SpeculativeGenerator(tiny_llama(vocabulary=300), proposer, num_draft_tokens=3)
    gen.generate(**ragged_prompt((6,), 300), max_new_tokens=30, do_sample=False)
    assert any(not known for known, _ in seen), "half a character"
    assert not any(most for known, most in seen if not known)


def test_a_draft_that_knows_fewer_ids_than_its_tokenizer():
    target, draft = parrot("bytes 300"), tiny_llama(1, vocabulary=300)
    for method in METHODS:
        proposer = TranslatedDraft(
            draft, tokenizer("bytes 300"), tokenizer("bytes 420"), method=method, confidence=0
        )
        gen = SpeculativeGenerator(target, proposer, num_draft_tokens=3)
        plain = target.generate(**prompts("bytes 300"), max_new_tokens=20, do_sample=False)
        assert gen.generate(**prompts("bytes 300"), max_new_tokens=20, do_sample=False).tolist() == plain.tolist()
        assert gen.stats.drafted > 0


def test_guesses_are_remembered_as_they_were_fed():
    past = object.__new__(draft_past.DraftPast)
    past._embeds = 4
    past.remember(np.array([[1, 5, -1]]))
    assert past._guesses.tolist() == [[1, 3, -1]]  # one that is unknown is no id


def test_a_text_may_be_much_longer_in_the_drafts_ids(monkeypatch):
    made, pasts = draft_past.DraftPast.__init__, []
    monkeypatch.setattr(draft_past.DraftPast, "__init__", lambda *args: pasts.append(args[0]) or made(*args))
    letters, inputs = byte_level(260), tokenizer("bytes 420")([TEXTS[0][:3]], return_tensors="pt")
    proposer = TranslatedDraft(Parrot(letters), tokenizer("bytes 420"), letters, method="strings")
    gen = SpeculativeGenerator(parrot("bytes 420"), proposer, num_draft_tokens=4)
    gen.generate(inputs["input_ids"], max_new_tokens=50, do_sample=False)
    assert gen.stats.emitted < 50  # the end of the text was reached
    assert pasts[0].lengths[0] > 90  # and followed: a letter is a column


def test_the_draft_of_a_pair_is_run_as_one(monkeypatch):
    target, draft = pair_of_models()
    proposer = TranslatedDraft(draft, tokenizer("bytes 420"), tokenizer("bytes 300"))
    proposer._steps = CompiledSteps()
    proposer._steps.refused = "nothing is compiled here"
    made, given = draft_past.Scorer, []
    monkeypatch.setattr(
        draft_past, "Scorer", lambda *args, **options: given.append(options) or made(*args, **options)
    )
    gen = SpeculativeGenerator(target, proposer, num_draft_tokens=4)
    gen.generate(**ragged_prompt(vocabulary=400), max_new_tokens=12, do_sample=False)
    assert given[0]["steps"] is proposer._steps
    assert gen.stats.draft_layout == "slots"


@pytest.mark.parametrize("method", METHODS)
def test_a_draft_is_asked_in_every_round_whether_it_shall_guess(method, monkeypatch):
    target, draft = pair_of_models()
    prompt = ragged_prompt(vocabulary=400)
    wanted = target.generate(**prompt, max_new_tokens=40, do_sample=False)
    fed = []

    def begins(self, opening=None):
        fed.append(opening is None)
        assert opening in (None, past.opening(draft, target))
        return len(fed) % 3 == 0

    monkeypatch.setattr(Fixed, "begins", begins)
    proposer = TranslatedDraft(draft, tokenizer("bytes 420"), tokenizer("bytes 300"), method=method, confidence=0)
    gen = SpeculativeGenerator(target, proposer, num_draft_tokens=4)
    assert gen.generate(**prompt, max_new_tokens=40, do_sample=False).tolist() == wanted.tolist()
    assert fed == [number >= 3 for number in range(len(fed))]  # its prompt is fed when it may guess at last
    assert 0 < gen.stats.drafted_at[0] <= prompt["input_ids"].shape[0] * (len(fed) // 3)


@pytest.mark.parametrize("method", METHODS)
def test_room_is_made_as_the_text_grows_not_for_all_that_it_may_become(method, monkeypatch):
    """A draft that says nothing of its positions, and a limit that stands for none."""
    monkeypatch.setattr("specdec.proposers.draft_past.ROOM", 5, raising=False)
    made, pasts = draft_past.DraftPast.__init__, []
    monkeypatch.setattr(draft_past.DraftPast, "__init__", lambda *args: pasts.append(args[0]) or made(*args))
    words, target = characters(string.ascii_letters + string.digits + " ."), llama()
    proposer = TranslatedDraft(mamba2(), words, words, method=method, confidence=0)
    gen = SpeculativeGenerator(target, proposer, num_draft_tokens=4, layout="slots")
    options = {**ragged_prompt(), "do_sample": False}
    options["stopping_criteria"] = [lambda ids, _: torch.full((len(ids),), ids.shape[1] >= 60)]
    wanted = target.generate(**options, max_new_tokens=60)
    assert gen.generate(**options, max_new_tokens=10**6).tolist() == wanted.tolist()
    assert gen.stats.drafted > 100
    assert 60 < pasts[0]._tokens.shape[1] < 100


def test_a_draft_that_cannot_take_the_prompt_is_asked_once():
    small = tiny_llama(1, vocabulary=len(tokenizer("bytes 420")), max_position_embeddings=4)
    model = tiny_llama(vocabulary=len(tokenizer("bytes 300")))
    proposer = TranslatedDraft(small, tokenizer("bytes 300"), tokenizer("bytes 420"))
    gen = SpeculativeGenerator(model, proposer, num_draft_tokens=3, layout="slots")
    options = {**prompts("bytes 300"), "max_new_tokens": 8, "do_sample": False}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert torch.equal(gen.generate(**options), model.generate(**options))
    assert [("drafts nothing" in str(one.message)) for one in told] == [True]


def test_a_tokenizer_that_refuses_a_text_breaks_nothing(monkeypatch):
    target, draft = pair_of_models()
    theirs = byte_level(300)
    calls = []
    right = type(theirs).__call__

    def moody(self, texts, **options):
        if self is theirs and calls.append(0) is None and len(calls) > 4:
            raise ValueError("no")
        return right(self, texts, **options)

    monkeypatch.setattr(type(theirs), "__call__", moody)
    proposer = TranslatedDraft(draft, tokenizer("bytes 420"), theirs, confidence=0)
    gen = SpeculativeGenerator(target, proposer, num_draft_tokens=4)
    prompt = ragged_prompt(vocabulary=400)
    plain = target.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert gen.generate(**prompt, max_new_tokens=12, do_sample=False).tolist() == plain.tolist()
    assert len(calls) > 6


@pytest.mark.parametrize("options", [{"method": "tli"}, {"confidence": 2}, {"confidence": "0.4"}])
def test_arguments_out_of_range(options):
    _, draft = pair_of_models()
    with pytest.raises(InvalidInput, match=next(iter(options))):
        TranslatedDraft(draft, tokenizer("bytes 420"), tokenizer("bytes 300"), **options)


def test_a_name_is_no_model():
    with pytest.raises(UnsupportedModel, match=r"TranslatedDraft was given a str.*from_pretrained"):
        TranslatedDraft("gpt2", tokenizer("bytes 420"), tokenizer("bytes 300"))


@pytest.mark.parametrize(
    ("given", "message"), [((None, "bytes 300"), "tokenizer is a None"), (("bytes 420", 5), "draft_tok.*int")]
)
def test_what_is_no_tokenizer(given, message):
    _, draft = pair_of_models()
    pair = [tokenizer(one) if isinstance(one, str) else one for one in given]
    with pytest.raises(InvalidInput, match=f"{message}.*AutoTokenizer"):
        TranslatedDraft(draft, *pair)


def test_nothing_is_warned_about_an_ordinary_pair():
    target, draft = pair_of_models()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"tokenizer": tokenizer("bytes 420"), "draft_tokenizer": tokenizer("bytes 300")}
        gen = SpeculativeGenerator(target, draft, num_draft_tokens=4, **options)
        gen.generate(**ragged_prompt(vocabulary=400), max_new_tokens=8)
