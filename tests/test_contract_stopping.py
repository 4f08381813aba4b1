"""Stop conditions and streamers: every row ends where plain generate() ends it, inside a block too.

The drafts include one that knows the text, so that an end falls into the middle of accepted guesses.
Conditions with a state and streamers must see exactly plain's calls.
"""

import copy
import time
from functools import cache
from math import ceil

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

from specdec import InvalidInput

from .contract import NEW, Counted, llama, noisy, oracle, plain, prompts, speculative

BATCHES = (1, 3)
START = 9


@cache
def tokenizer():
    """64 tokens of one or two letters, written together without spaces: "a", .. "aa", "ab", .."""
    letters = "abcdefgh"
    pairs = [(a, b) for a in letters for b in letters if a != b]
    words = [*letters, *(a + b for a, b in pairs)]
    model = models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=pairs)
    inner = Tokenizer(model)
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def text_of(ids):
    return "".join(tokenizer().convert_ids_to_tokens(ids.tolist()))


@cache
def free_text(batch):
    """(B, L) what comes out when nothing stops it."""
    return plain(llama(), prompts(batch), max_new_tokens=NEW)


def drafts(batch):
    return ("noisy", "ngram", None, oracle(free_text(batch), wrong={13}))


def assert_stops_alike(batch, make=dict, **options):
    """Ours is plain's for every draft; returns plain's text."""
    wanted = plain(llama(), prompts(batch), **options, **make())
    for draft in drafts(batch):
        gen = speculative(llama(), draft)
        options = {"max_new_tokens": NEW, "do_sample": False, **options}
        got = gen.generate(**prompts(batch), **options, **make())
        assert got.tolist() == wanted.tolist(), f"draft {draft}"
    return wanted


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("kind", "place"),
    [("int", 0), ("int", 1), ("int", 2), ("int", 3), ("int", 6), ("list", 2), ("tensor", 3)],
)
def test_end_of_sequence(kind, place, batch):
    row = free_text(batch)[-1, START:].tolist()
    ids = {"int": row[place], "list": [62, row[place]], "tensor": torch.tensor([row[place], 61])}
    text = assert_stops_alike(batch, eos_token_id=ids[kind], pad_token_id=2)
    if batch == 1:
        assert text.shape[1] == START + row.index(row[place]) + 1


@pytest.mark.parametrize("batch", BATCHES)
def test_end_of_sequence_never_reached(batch):
    assert_stops_alike(batch, eos_token_id=-1)


def test_pad_is_the_end_of_sequence_when_none_is_given():
    model = copy.deepcopy(llama())
    model.generation_config.pad_token_id = None
    eos = int(free_text(3)[0, START + 2])
    wanted = plain(model, prompts(3), eos_token_id=[eos, 63])
    assert (wanted[0, START + 3 :] == eos).all()
    got = speculative(model, noisy(llama())).generate(
        **prompts(3), max_new_tokens=NEW, do_sample=False, eos_token_id=[eos, 63]
    )
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("source", ["config given", "the model's own", "kwargs over both"])
def test_end_of_sequence_in_a_config(source, batch):
    eos = int(free_text(batch)[0, START + 2])
    model = copy.deepcopy(llama())
    options = {"max_new_tokens": NEW, "do_sample": False}
    if source == "the model's own":
        model.generation_config.eos_token_id = eos
    elif source == "config given":
        options = {"generation_config": GenerationConfig(eos_token_id=eos, pad_token_id=0, **options)}
    else:
        model.generation_config.eos_token_id = 63
        given = GenerationConfig(eos_token_id=62, pad_token_id=0, **options)
        options = {"generation_config": given, "eos_token_id": eos}
    wanted = model.generate(**prompts(batch), **options)
    got = speculative(model, noisy(llama())).generate(**prompts(batch), **options)
    assert got.tolist() == wanted.tolist()
    assert eos in got[0].tolist()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("new", [1, 2, 3, 4, 7])
def test_max_new_tokens(new, batch):
    text = assert_stops_alike(batch, max_new_tokens=new)
    assert text.shape[1] == START + new


@pytest.mark.parametrize("batch", BATCHES)
def test_max_length(batch):
    text = assert_stops_alike(batch, max_new_tokens=None, max_length=START + 6)
    assert text.shape[1] == START + 6


@pytest.mark.parametrize("batch", BATCHES)
def test_max_new_tokens_wins_over_max_length(batch):
    text = assert_stops_alike(batch, max_new_tokens=5, max_length=START + 9)
    assert text.shape[1] == START + 5


@pytest.mark.parametrize("limit", [{"max_new_tokens": 10**12}, {"max_new_tokens": None, "max_length": int(1e30)}])
def test_a_limit_that_no_memory_holds(limit):
    eos = int(free_text(1)[0, START + 5])
    assert_stops_alike(1, **limit, eos_token_id=eos)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")
def test_without_a_limit_twenty_tokens():
    wanted = llama().generate(**prompts(3), do_sample=False)
    got = speculative(llama(), "noisy").generate(**prompts(3), do_sample=False)
    assert got.tolist() == wanted.tolist()
    assert got.shape[1] == START + 20


@pytest.mark.filterwarnings("ignore:Input length of input_ids:UserWarning")
@pytest.mark.parametrize("length", [START, START - 3])
def test_a_prompt_as_long_as_max_length(length):
    """Whatever plain does (it warns, writes one token or raises), ours does."""
    options = {"max_length": length, "do_sample": False}
    try:
        wanted = llama().generate(**prompts(1), **options)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)[:40]):
            speculative(llama(), "noisy").generate(**prompts(1), **options)
    else:
        got = speculative(llama(), "noisy").generate(**prompts(1), **options)
        assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", [START + 4, START + 4.5, START + 30])
def test_a_length_criterion_of_the_user_takes_precedence(length, batch):
    """Of two criteria of a kind plain uses the user's: it may be shorter or longer."""
    text = assert_stops_alike(
        batch, make=lambda: {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(length)])}
    )
    assert text.shape[1] == ceil(length)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("configured", [None, 1])
def test_an_end_of_sequence_criterion_of_the_user_takes_precedence(configured, batch):
    """The user's replaces the one of `eos_token_id`, at place `configured`, if there is any."""
    row = free_text(batch)[0, START:].tolist()
    options = {"eos_token_id": None if configured is None else row[configured]}
    criteria = [EosTokenCriteria(eos_token_id=row[4])]
    text = assert_stops_alike(batch, make=lambda: {"stopping_criteria": criteria}, **options)
    if batch == 1:
        assert text.shape[1] == START + 5


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("lengths", [(START + 8, START + 4), (START + 4, START + 8)])
def test_of_several_length_criteria_the_shortest_ends_rows(lengths, batch):
    make = lambda: {"stopping_criteria": [MaxLengthCriteria(length) for length in lengths]}  # noqa: E731
    assert assert_stops_alike(batch, make=make).shape[1] == START + 4


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("places", [(6, 3), (3, 6)])
def test_of_several_end_of_sequence_criteria_each_ends_rows(places, batch):
    row = free_text(batch)[-1, START:].tolist()
    make = lambda: {"stopping_criteria": [EosTokenCriteria(row[place]) for place in places]}  # noqa: E731
    text = assert_stops_alike(batch, make=make)
    if batch == 1:
        assert text.shape[1] == START + 4


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", [START, START - 5])
@pytest.mark.parametrize("draft", ["noisy", "ngram", None])
def test_a_length_criterion_that_the_prompt_exceeds(draft, length, batch):
    """Plain judges it behind the first token, which so is the only one."""
    options = {"stopping_criteria": [MaxLengthCriteria(length)], "max_new_tokens": NEW, "do_sample": False}
    wanted = llama().generate(**prompts(batch), **options)
    got = speculative(llama(), draft).generate(**prompts(batch), **options)
    assert got.tolist() == wanted.tolist()
    assert got.shape[1] == START + 1


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("first", "last"), [(0, 2), (2, 3), (3, 7), (5, 8), (9, 11)])
def test_stop_strings(first, last, batch):
    """Strings that lie in a token, across two, and across more."""
    string = text_of(free_text(batch)[0, START:])[first:last]
    got = assert_stops_alike(batch, stop_strings=[string, "zz"], tokenizer=tokenizer())
    assert string in text_of(got[0, START:])
    if batch == 1:
        assert got.shape[1] < START + NEW


@pytest.mark.parametrize("batch", BATCHES)
def test_stop_strings_beside_end_of_sequence(batch):
    free = free_text(batch)
    string = text_of(free[0, START:])[5:9]
    eos = int(free[-1, START + 1])
    assert_stops_alike(batch, stop_strings=string, tokenizer=tokenizer(), eos_token_id=eos)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("source", ["config given", "the model's own"])
def test_stop_strings_in_a_config(source, batch):
    string = text_of(free_text(batch)[0, START:])[3:6]
    model = copy.deepcopy(llama())
    options = {"max_new_tokens": NEW, "do_sample": False}
    if source == "the model's own":
        model.generation_config.stop_strings = [string]
    else:
        given = GenerationConfig(stop_strings=[string], pad_token_id=0, **options)
        options = {"generation_config": given}
    own = model.generation_config
    wanted = model.generate(**prompts(batch), tokenizer=tokenizer(), **options)
    gen = speculative(model, noisy(llama()), tokenizer=tokenizer())
    got = gen.generate(**prompts(batch), **options)
    assert got.tolist() == wanted.tolist()
    assert string in text_of(got[0, START:])
    assert model.generation_config is own
    if source == "the model's own":
        assert own.stop_strings == [string]
        with pytest.raises(RuntimeError, match="on purpose"):
            gen.generate(**prompts(batch), stopping_criteria=[failing], **options)
        assert model.generation_config is own
        assert own.stop_strings == [string]
    else:
        assert given.stop_strings == [string]


@pytest.mark.parametrize("source", ["config given", "the model's own"])
def test_no_stop_strings_given_takes_back_those_of_a_config(source):
    string = text_of(free_text(1)[0, START:])[3:6]
    model = copy.deepcopy(llama())
    options = {"max_new_tokens": NEW, "do_sample": False, "stop_strings": None}
    if source == "the model's own":
        model.generation_config.stop_strings = [string]
    else:
        options["generation_config"] = GenerationConfig(stop_strings=[string], pad_token_id=0)
    wanted = model.generate(**prompts(1), tokenizer=tokenizer(), **options)
    got = speculative(model, noisy(llama()), tokenizer=tokenizer()).generate(**prompts(1), **options)
    assert got.tolist() == wanted.tolist() == free_text(1).tolist()


def failing(ids, scores):
    raise RuntimeError("on purpose")


def test_stop_strings_leave_the_users_list_of_criteria_as_it_is():
    given = StoppingCriteriaList([lambda ids, scores: False])
    assert_stops_alike(1, stop_strings=["abab"], tokenizer=tokenizer(), stopping_criteria=given)
    assert len(given) == 1


def test_stop_strings_need_a_tokenizer():
    with Counted(llama()) as counted, pytest.raises(InvalidInput, match=r"stop_strings.*tokenizer="):
        speculative(llama(), "noisy").generate(**prompts(1), stop_strings="ab")
    assert counted.calls == 0


def test_a_stop_string_criterion_of_the_user_takes_precedence():
    text = text_of(free_text(1)[0, START:])
    own = StopStringCriteria(tokenizer=tokenizer(), stop_strings=[text[9:12]])
    got = assert_stops_alike(
        1,
        make=lambda: {"stopping_criteria": StoppingCriteriaList([own])},
        stop_strings=[text[3:6]],
        tokenizer=tokenizer(),
    )
    assert text[9:12] in text_of(got[0, START:])


class Recorder(StoppingCriteria):
    """Records every call; says stop after so many calls, or as `rule` says."""

    def __init__(self, rule):
        self.rule, self.calls = rule, []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append((input_ids.clone(), None if scores is None else len(scores)))
        return self.rule(len(self.calls), input_ids)


def rows_with(ids):
    """Rows that end in one of `ids`."""
    return lambda calls, input_ids: torch.isin(input_ids[:, -1], torch.as_tensor(ids))


def rules(batch):
    free = free_text(batch)
    return {
        "last token": rows_with(free[:, START + 2]),
        "last token, one row": rows_with(free[:1, START + 4]),
        "length": lambda calls, ids: torch.full((len(ids),), ids.shape[1] >= START + 5),
        "plain bool on length": lambda calls, ids: ids.shape[1] >= START + 6,
        "calls": lambda calls, ids: calls >= 6,
        "rows by calls": lambda calls, ids: torch.arange(len(ids)) + 3 <= calls,
        "looks at other rows": lambda calls, ids: ids[:, -1] == ids[:, -1].max(),
        "never": lambda calls, ids: False,
    }


RULES = list(rules(1))


@pytest.mark.parametrize(("ended_by", "batch"), [("nothing", 1), ("nothing", 3), ("an end of sequence", 3)])
@pytest.mark.parametrize("name", RULES)
def test_criterion_of_the_user_sees_the_calls_of_plain(name, ended_by, batch):
    """Without an end-of-sequence token plain lets ended rows go on until all have ended."""
    eos = None if ended_by == "nothing" else int(free_text(batch)[-1, START + 3])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": eos}
    wanted = Recorder(rules(batch)[name])
    text = plain(llama(), prompts(batch), stopping_criteria=[wanted], **options)
    for draft in drafts(batch):
        got = Recorder(rules(batch)[name])
        ours = speculative(llama(), draft).generate(**prompts(batch), stopping_criteria=[got], **options)
        assert ours.tolist() == text.tolist(), f"draft {draft}"
        seen = [ids.tolist() for ids, _ in got.calls]
        assert seen == [ids.tolist() for ids, _ in wanted.calls], f"draft {draft}"
        assert all(count is None for _, count in got.calls)


@pytest.mark.parametrize("draft", ["noisy", "ngram"])
def test_a_criterion_of_the_user_that_names_an_end_of_sequence(draft):
    """By its having that attribute plain generate() knows that rows which have ended are padded."""
    free = free_text(3)
    own = Recorder(rows_with(free[:1, START + 2]))
    own.eos_token_id = free[:1, START + 2]
    options = {"max_new_tokens": NEW, "do_sample": False, "stopping_criteria": [own]}
    wanted = plain(llama(), prompts(3), **options)
    assert wanted[0, START + 3 :].tolist() == [0] * (wanted.shape[1] - START - 3)
    assert speculative(llama(), draft).generate(**prompts(3), **options).tolist() == wanted.tolist()


def test_criterion_sees_the_scores_when_they_are_asked_for():
    options = {"return_dict_in_generate": True, "output_scores": True}
    seen = []
    for run in (llama().generate, speculative(llama(), oracle(free_text(3))).generate):
        calls = []

        def criterion(ids, scores, calls=calls):
            calls.append([s.clone() for s in scores])
            return ids.shape[1] >= START + 5

        run(**prompts(3), max_new_tokens=NEW, do_sample=False, stopping_criteria=[criterion], **options)
        seen.append(calls)
    assert [len(c) for c in seen[0]] == [len(c) for c in seen[1]] == [1, 2, 3, 4, 5]
    torch.testing.assert_close(seen[1], seen[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_list_of_criteria(batch):
    free = free_text(batch)

    def make():
        first = Recorder(rows_with(free[0, START + 3]))
        return {"stopping_criteria": StoppingCriteriaList([first, lambda ids, scores: False])}

    assert_stops_alike(batch, make=make)


@pytest.mark.parametrize("batch", BATCHES)
def test_max_time_that_is_over_at_once(batch):
    text = assert_stops_alike(batch, max_time=0.0)
    assert text.shape[1] == START + 1


def test_max_time_ends_a_long_call():
    start = time.perf_counter()
    out = speculative(llama(), "noisy").generate(**prompts(3), max_new_tokens=480, max_time=0.2, do_sample=False)
    assert START < out.shape[1] < START + 480
    assert time.perf_counter() - start < 2.0


def test_a_time_criterion_of_the_user():
    past = MaxTimeCriteria(max_time=1.0, initial_timestamp=time.time() - 5)
    text = assert_stops_alike(3, make=lambda: {"stopping_criteria": [past]})
    assert text.shape[1] == START + 1


class Listener:
    """Records what a streamer is told."""

    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append((value.device.type, value.clone().tolist()))

    def end(self):
        self.heard.append("end")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("stop", ["nothing", "eos", "criterion", "both"])
def test_streamer_hears_what_plain_tells(stop, batch):
    free = free_text(batch)
    options = {"max_new_tokens": NEW, "do_sample": False}
    if stop in ("eos", "both"):
        options["eos_token_id"] = int(free[-1, START + 3])
    make = dict
    if stop in ("criterion", "both"):
        make = lambda: {"stopping_criteria": [Recorder(rows_with(free[:, START + 5]))]}  # noqa: E731
    wanted = Listener()
    llama().generate(**prompts(batch), streamer=wanted, **options, **make())
    for draft in drafts(batch):
        got = Listener()
        speculative(llama(), draft).generate(**prompts(batch), streamer=got, **options, **make())
        assert got.heard == wanted.heard, f"draft {draft}"
    assert wanted.heard[-1] == "end"


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_text_streamer(skip_prompt, capsys):
    printed = []
    for run in (llama().generate, speculative(llama(), "noisy").generate):
        streamer = TextStreamer(tokenizer(), skip_prompt=skip_prompt)
        run(**prompts(1), streamer=streamer, max_new_tokens=NEW, do_sample=False)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert text_of(free_text(1)[0, START:]) in printed[1]


def test_text_streamer_refuses_a_batch_before_any_work():
    with Counted(llama()) as counted, pytest.raises(ValueError, match="batch size 1"):
        speculative(llama(), "noisy").generate(**prompts(3), streamer=TextStreamer(tokenizer()), max_new_tokens=3)
    assert counted.calls == 0


def test_text_iterator_streamer():
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=5)
    speculative(llama(), "noisy").generate(**prompts(1), streamer=streamer, max_new_tokens=NEW, do_sample=False)
    assert "".join(streamer) == text_of(free_text(1)[0, START:])


def test_streaming_is_in_time():
    """A token is told as soon as its round is over, not at the end of the call."""
    told_at, draft = [], oracle(free_text(1))

    class Slow(Listener):
        def put(self, value):
            told_at.append(forwards.calls)

    with Counted(llama()) as forwards:
        gen = speculative(llama(), draft)
        gen.generate(**prompts(1), streamer=Slow(), max_new_tokens=NEW, do_sample=False)
    assert len(told_at) == 1 + NEW
    assert told_at[0] == 0
    assert told_at == sorted(told_at)
    # the first token comes before any guess is scored; the check of the layout may lie before it
    assert len(set(told_at)) == 1 + gen.stats.rounds


class Halts:
    """A callback of any kind that raises what Python's generators cannot let through."""

    def put(self, value):
        if value.ndim == 1:
            raise StopIteration("enough")

    def end(self):
        pass

    def __call__(self, *_):
        raise StopIteration("enough")


@pytest.mark.parametrize("given", ["streamer", "stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn"])
@pytest.mark.parametrize("draft", ["noisy", None])
def test_a_callback_may_raise_stop_iteration(given, draft):
    callback = [Halts()] if given in ("stopping_criteria", "logits_processor") else Halts()
    for generate in (llama().generate, speculative(llama(), draft).generate):
        with pytest.raises(StopIteration, match="enough"):
            generate(**prompts(1), max_new_tokens=NEW, **{given: callback})


def test_what_a_callback_raises_itself_arrives_as_it_is():
    def breaks(ids, scores):
        raise RuntimeError("of the caller") from KeyError("why")

    with pytest.raises(RuntimeError, match="of the caller"):
        speculative(llama(), "noisy").generate(**prompts(1), max_new_tokens=NEW, stopping_criteria=[breaks])
