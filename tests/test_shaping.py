"""stream(release=ShapedRelease(...)): what is seen from outside is a function of the text's length alone.

The trace is the times and sizes of a row's chunks. Times are virtual: a clock that only `sleep` moves.
"""

import asyncio
import contextvars
import gc
import itertools
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import Chunk, InvalidInput, ShapedRelease, SpeculativeGenerator, Tokens, shaping, unpad
from specdec.ahead import Ahead, surroundings
from specdec.shaping import on_a_clock

from .contract import NEW, llama, oracle, plain, prompts, speculative
from .test_streaming import GREEDY, START, Broken, drain, of_a_call, tokenizer  # noqa: F401

HEADER = 3


class Clock:
    """Seconds that pass when somebody sleeps."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += seconds


class Script:
    """A source whose records come at set times after its start."""

    def __init__(self, clock, timed):
        self.clock, self.timed, self.closed = clock, sorted(timed, key=lambda pair: pair[0]), False

    def start(self):
        self.began = self.clock()

    def wait(self):
        self.clock.now = self.began + self.timed[0][0]

    def taken(self):
        found = [record for at, record in self.timed if self.began + at <= self.clock() + 1e-9]
        self.timed = self.timed[len(found) :]
        return found

    def result(self):
        return "the end"

    def close(self):
        self.closed = True


def text_of(rng, row, tokens, release, *, late=False):
    """Records of a row of ``tokens`` ids in rounds of random sizes, on time unless ``late``."""
    timed, told, now = [], 0, 0.0
    while told < tokens:
        size = int(min(rng.integers(1, 8), tokens - told))
        due = (told // release.tokens_per_chunk + 1) * release.interval
        if told:
            now = max(now, float(rng.uniform(now, due * (3 if late else 0.999))))
        ids = tuple(int(i) for i in rng.integers(0, 64, size))
        flags = tuple(bool(i) for i in rng.integers(0, 2, size))
        told += size
        timed.append((now, Tokens(row, ids, flags, None, told == tokens)))
    return timed


def traces(timed, rows, release, words=None, delay=lambda: 0.0):
    """For each row: (seconds since the clock started, bytes) of every chunk; and the ids that arrived."""
    clock = Clock()
    release = ShapedRelease(
        release.tokens_per_chunk, release.interval, release.pad_to, release.bucket, release.first_after,
        clock, clock.sleep,
    )  # fmt: skip
    script = Script(clock, timed)
    seen, contents = [[] for _ in range(rows)], [[] for _ in range(rows)]
    for chunk in on_a_clock(script, rows, words, release):
        seen[chunk.row].append((round(clock() - script.began, 6), len(chunk.payload)))
        contents[chunk.row].append(unpad(chunk.payload))
        clock.now += delay()
    assert script.closed
    return seen, contents


def wanted(tokens, release):
    """The trace of a row of ``tokens`` tokens: this is all that may be seen."""
    chunks = -(-tokens // release.tokens_per_chunk)
    chunks = -(-chunks // release.bucket) * release.bucket
    first = release.first_after or 0.0
    return [(round(first + i * release.interval, 6), release.pad_to) for i in range(1, chunks + 1)]


def assert_only_the_length_shows(rng, lengths, release):
    """Two texts of the same lengths, with other ids, rounds and times: their traces are what the length says."""
    for _ in range(2):
        timed = [pair for row, n in enumerate(lengths) for pair in text_of(rng, row, n, release)]
        told = sorted(timed, key=lambda pair: pair[0])
        said = [[i for _, r in told if r.row == row for i in r.ids] for row in range(len(lengths))]
        seen, contents = traces(timed, len(lengths), release)
        assert seen == [wanted(length, release) for length in lengths]
        for row in range(len(lengths)):
            assert [i for content in contents[row] for i in content.ids] == said[row]
            assert contents[row][-1].ended
        if len(lengths) == 1:  # a reader that takes its time over a chunk does not move the ticks
            seen, _ = traces(timed, 1, release, delay=lambda: float(rng.uniform(0, 0.999 * release.interval)))
            assert seen == [wanted(lengths[0], release)]


CASES = st.tuples(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 8),
    st.sampled_from([None, 0.7]),
)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_the_trace_is_a_function_of_the_length_alone(case):
    seed, lengths, tokens, bucket, spare, first = case
    release = ShapedRelease(tokens, 0.25, HEADER + 4 * tokens + spare, bucket, first)
    assert_only_the_length_shows(np.random.default_rng(seed), lengths, release)


def assert_lateness_does_not_show():
    """Chunks go out whether or not there is something in them; returns how often there were more at the end."""
    rng = np.random.default_rng(0)
    release = ShapedRelease(3, 0.5, HEADER + 12, bucket=2)
    more = 0
    for _ in range(50):
        timed = text_of(rng, 0, 20, release, late=True)
        (seen,), (contents,) = traces(timed, 1, release)
        on_time = wanted(20, release)
        assert len(seen) % 2 == 0
        assert seen[: len(on_time)] == on_time
        assert seen == [(round(i * 0.5, 6), HEADER + 12) for i in range(1, len(seen) + 1)]
        assert [i for c in contents for i in c.ids] == [i for _, r in timed for i in r.ids]
        more += len(seen) > len(on_time)
    return more


def test_a_late_text_keeps_times_and_sizes():
    assert assert_lateness_does_not_show() > 10


def test_late_tokens_catch_up_where_there_is_room():
    release = ShapedRelease(2, 1.0, HEADER + 4 * 8)
    first, rest = Tokens(0, (1,), (False,), None, False), Tokens(0, tuple(range(2, 9)), (True,) * 7, None, True)
    _, (contents,) = traces([(0.0, first), (3.5, rest)], 1, release)
    assert [content.ids for content in contents] == [(1,), (), (), (2, 3, 4, 5, 6, 7, 8)]


@pytest.mark.parametrize("spare", [0, 3])
def test_what_does_not_fit_whole_waits_and_chunks_keep_their_size(spare):
    release = ShapedRelease(8, 1.0, HEADER + 4 * 2 + spare)
    record = Tokens(0, (1, 2, 3, 4, 5), (False,) * 5, None, True)
    (seen,), (contents,) = traces([(0.0, record)], 1, release)
    assert [content.ids for content in contents] == [(1, 2), (3, 4), (5,)]
    assert {size for _, size in seen} == {release.pad_to}


@pytest.mark.parametrize(("first_after", "first"), [(None, 4.3), (0, 1.0), (1.5, 2.5)])
def test_when_the_clock_starts(first_after, first):
    """When the prompt has been read, or so long after the request, however long the start takes."""

    class Slow(Script):
        def start(self):
            super().start()
            self.clock.now += 0.5

    clock = Clock()
    release = ShapedRelease(1, 1, 24, first_after=first_after, clock=clock, sleep=clock.sleep)
    chunks = on_a_clock(Slow(clock, [(3.3, Tokens(0, (1,), (False,), None, True))]), 1, None, release)
    next(chunks)
    assert clock() == pytest.approx(100 + first)


def test_a_reader_who_was_away_gets_at_once_what_was_due_meanwhile():
    clock = Clock()
    release = ShapedRelease(1, 1.0, 16, clock=clock, sleep=clock.sleep)
    record = Tokens(0, (1, 2, 3), (False,) * 3, None, True)
    chunks = on_a_clock(Script(clock, [(0.0, record)]), 1, None, release)
    next(chunks)
    clock.now += 10
    assert [unpad(chunk.payload).ids for chunk in chunks] == [(2,), (3,)]
    assert clock() == 100 + 1 + 10


def test_what_was_guessed_is_not_told():
    release = ShapedRelease(2, 1.0, 16)
    sent = []
    for guessed in (True, False):
        clock = Clock()
        record = Tokens(0, (5, 6, 7), (guessed,) * 3, None, True)
        timed = ShapedRelease(2, 1.0, 16, clock=clock, sleep=clock.sleep)
        sent.append(list(on_a_clock(Script(clock, [(0.0, record)]), 1, None, timed)))
    assert sent[0] == sent[1]
    assert set(Chunk.__slots__) == {"row", "payload"}
    assert release.pad_to == len(sent[0][0].payload)


def test_the_end_is_told_with_the_last_token():
    release = ShapedRelease(2, 1.0, 16, bucket=2)
    _, (contents,) = traces([(0.0, Tokens(0, tuple(range(5)), (False,) * 5, None, True))], 1, release)
    assert [(content.ids, content.ended) for content in contents] == [
        ((0, 1), False), ((2, 3), False), ((4,), True), ((), True),
    ]  # fmt: skip


# --- mutants: releases that leak ------------------------------------------------------------------


class FlushesAtTheEnd(shaping._Row):
    """What is left of a row leaves as soon as the row has ended."""

    def chunk(self, tick):
        return super().chunk(10**6 if self._ended else tick)


class StopsAtTheEnd(shaping._Row):
    """No chunks behind the end."""

    def complete(self, tick):
        return self._empty()


class PadsToTheContent(shaping._Row):
    """A chunk is as long as what is in it."""

    def chunk(self, tick):
        whole = super().chunk(tick)
        return Chunk(whole.row, whole.payload[: HEADER + shaping.HEADER.unpack_from(whole.payload)[1]])


class LetsOutWhatCame(shaping._Row):
    """All tokens that have come leave at the next tick."""

    def chunk(self, tick):
        return super().chunk(10**6)


@pytest.mark.parametrize("mutant", [FlushesAtTheEnd, StopsAtTheEnd, PadsToTheContent, LetsOutWhatCame])
def test_leaky_releases_are_caught(mutant, monkeypatch):
    def check():
        rng = np.random.default_rng(1)
        for _ in range(20):
            release = ShapedRelease(3, 0.25, HEADER + 4 * 12, bucket=3)
            assert_only_the_length_shows(rng, [int(rng.integers(1, 40))], release)

    check()
    monkeypatch.setattr(shaping, "_Row", mutant)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("leaks", ["leaves out empty chunks", "waits for tokens"])
def test_a_release_that_shows_lateness_is_caught(leaks, monkeypatch):
    """One that has nothing to say and does not say it, or says it later."""
    true = on_a_clock

    def silent(*arguments):
        for chunk in true(*arguments):
            content = unpad(chunk.payload)
            if content.ids or content.ended:
                yield chunk

    def waiting(source, rows, words, release):
        for chunk in true(source, rows, words, release):
            if not unpad(chunk.payload).ids:
                release.sleep(release.interval / 2)
            yield chunk

    monkeypatch.setitem(globals(), "on_a_clock", silent if leaks.startswith("leaves") else waiting)
    with pytest.raises(AssertionError):
        assert_lateness_does_not_show()


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [4, 7, 40])
def test_text_in_bytes(tokenizer, room):  # noqa: F811
    """Characters are never divided, and what does not fit waits."""
    written = "äAöB€ und 😀."
    ids = list(written.encode())
    release = ShapedRelease(3, 0.5, HEADER + room, bucket=2)
    texts = set()
    for seed in range(5):
        rng = np.random.default_rng(seed)
        cuts = [0, *sorted(rng.choice(np.arange(1, len(ids)), 4, replace=False).tolist()), len(ids)]
        timed = [
            (0.0, Tokens(0, tuple(ids[a:b]), (True,) * (b - a), None, b == len(ids)))
            for a, b in itertools.pairwise(cuts)
        ]
        (seen,), (contents,) = traces(timed, 1, release, tokenizer)
        assert "".join(content.text for content in contents) == written
        assert {content.ids for content in contents} == {None}
        texts.add(tuple(content.text for content in contents))
        assert len(seen) == -(-max(len(ids) / 3, len(ids) / room) // 2) * 2 or room == 4
    assert len(texts) == 1, "what leaves when is a function of the text"


def test_a_token_of_more_letters_than_fit_is_divided_between_them():
    clock, words = Clock(), SimpleNamespace(decode=lambda ids, **options: "ninety" * len(ids))
    release = ShapedRelease(1, 0.5, HEADER + 4, clock=clock, sleep=clock.sleep)
    chunks = on_a_clock(Script(clock, [(0.0, Tokens(0, (9,), (False,), None, True))]), 1, words, release)
    assert [unpad(next(chunks).payload).text for _ in range(2)] == ["nine", "ty"]


def test_half_a_character_at_the_end_comes_out(tokenizer):  # noqa: F811
    release = ShapedRelease(3, 0.5, 32)
    record = Tokens(0, (65, 195), (False, False), None, True)
    _, (contents,) = traces([(0.0, record)], 1, release, tokenizer)
    assert "".join(content.text for content in contents) == "A\ufffd"


def test_half_a_character_waits_for_the_other_half_that_is_late(tokenizer):  # noqa: F811
    release = ShapedRelease(1, 1.0, 32)
    half, rest = Tokens(0, (195,), (False,), None, False), Tokens(0, (164,), (False,), None, True)
    _, (contents,) = traces([(0.0, half), (2.5, rest)], 1, release, tokenizer)
    assert [content.text for content in contents] == ["", "", "ä"]


def test_a_character_is_not_divided_where_its_end_came_long_ago(tokenizer):  # noqa: F811
    """The whole text is there with the first chunk; what is due ends within a character."""
    release = ShapedRelease(1, 0.5, 32)
    record = Tokens(0, tuple("ä.".encode()), (False,) * 3, None, True)
    _, (contents,) = traces([(0.0, record)], 1, release, tokenizer)
    assert [content.text for content in contents] == ["", "ä", "."]


# --- through the front door -----------------------------------------------------------------------


class Patient(Clock):
    """Sleeps, in no time, until the call of ``gen`` has made all its tokens: the model is never late."""

    def sleep(self, seconds):
        super().sleep(seconds)
        while not self.gen.stats.seconds:
            time.sleep(0.001)


def patient(gen, *numbers, **options):
    clock = Patient()
    clock.gen = gen
    return clock, ShapedRelease(*numbers, clock=clock, sleep=clock.sleep, **options)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("ends", [False, True])
def test_the_chunks_are_the_text(ends, batch):
    free = plain(llama(), prompts(batch))
    options = {**GREEDY, "eos_token_id": int(free[0, START + 3])} if ends else GREEDY
    expected = llama().generate(**prompts(batch), **options)
    seen = []
    for draft in (None, "noisy", oracle(free), oracle(free, wrong={START + 2, START + 4})):
        gen = speculative(llama(), draft)
        clock, release = patient(gen, 2, 0.5, 24, bucket=3)
        trace, rows = [], [[] for _ in range(batch)]
        records = gen.stream(**prompts(batch), **options, release=release)
        while True:
            try:
                chunk = next(records)
            except StopIteration as end:
                out = end.value
                break
            trace.append((clock() - 100, chunk.row, len(chunk.payload)))
            rows[chunk.row] += unpad(chunk.payload).ids
        assert out.tolist() == expected.tolist()
        emitted = gen.stats.row_emitted
        assert rows == [expected[row, START : START + emitted[row]].tolist() for row in range(batch)]
        seen.append(trace)
    assert gen.stats.accepted > 0
    assert seen[0] == seen[1] == seen[2] == seen[3], "acceptance shows"


def test_two_prompts_with_texts_of_one_length():
    one, other = ({"input_ids": prompts(3)["input_ids"][row : row + 1, skip:]} for row, skip in ((0, 0), (1, 3)))
    seen, accepted = [], []
    for inputs, wrong in ((one, ()), (other, range(0, 99, 2))):
        gen = speculative(llama(), oracle(plain(llama(), inputs), wrong=set(wrong)))
        speculative(llama(), "ngram").generate(**inputs, **GREEDY)  # the self-check of a first call costs guesses
        clock, release = patient(gen, 4, 0.5, 24)
        chunks = gen.stream(**inputs, **GREEDY, release=release)
        seen.append([(clock(), len(chunk.payload)) for chunk in chunks])
        accepted.append(gen.stats.accepted)
    assert seen[0] == seen[1]
    assert accepted[0] > accepted[1]


def test_a_tick_falls_into_a_round():
    """The clock does not wait for the model: chunks without content leave while a round is under way."""
    gate = threading.Event()

    def slow(ids, scores):
        assert ids.shape[1] <= START + 1 or gate.wait(30)
        return False

    clock = Clock()
    release = ShapedRelease(4, 0.5, 24, clock=clock, sleep=clock.sleep)
    gen = speculative(llama(), "noisy")
    chunks = gen.stream(**prompts(1), **GREEDY, stopping_criteria=[slow], release=release)
    early = [unpad(next(chunks).payload) for _ in range(4)]
    assert [len(content.ids) for content in early] == [1, 0, 0, 0]
    gate.set()
    ids = list(early[0].ids)
    for chunk in chunks:
        ids += unpad(chunk.payload).ids
        time.sleep(0.001)
    assert ids == plain(llama(), prompts(1))[0, START:].tolist()


def test_several_samples_a_prompt():
    gen = speculative(llama(), "noisy")
    _, release = patient(gen, 4, 0.5, 24)
    options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 2, "seed": 3}
    chunks = list(gen.stream(**prompts(3), **options, release=release))
    assert [chunk.row for chunk in chunks] == list(range(6))


def test_words(tokenizer):  # noqa: F811
    gen = SpeculativeGenerator(llama(), "ngram", num_draft_tokens=3, tokenizer=tokenizer)
    _, release = patient(gen, 4, 0.5, 64)
    chunks, out = drain(gen.stream(**prompts(1), **GREEDY, release=release))
    text = "".join(unpad(chunk.payload).text for chunk in chunks)
    assert text == tokenizer.decode(out[0, START:])


# --- cancelling, errors, threads ------------------------------------------------------------------


def runners():
    return [thread for thread in threading.enumerate() if thread.name == "specdec-ahead"]


@pytest.mark.parametrize("how", ["closed", "dropped", "never begun"])
def test_cancelled_calls_leave_nothing(how):
    gen = speculative(llama(), "noisy")
    gen.generate(**prompts(3), **GREEDY)
    found = len(of_a_call())
    for number in range(50):
        clock = Clock()
        release = ShapedRelease(1, 0.5, 24, clock=clock, sleep=clock.sleep)
        chunks = gen.stream(**prompts(3), max_new_tokens=200, do_sample=False, release=release)
        if how != "never begun":
            for _ in range(1 + number % 5):
                next(chunks)
        if how == "closed":
            chunks.close()
        del chunks
        assert not runners()
    assert len(of_a_call()) == found
    assert gen.generate(**prompts(3), **GREEDY).tolist() == plain(llama(), prompts(3)).tolist()


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
def test_what_came_is_taken_before_what_ended_it_is_raised(error):
    def items():
        yield from (1, 2)
        raise error

    ahead = Ahead(items())
    ahead.start()
    with pytest.raises(error):
        ahead.result()
    assert ahead.taken() == [1, 2]
    with pytest.raises(error):
        ahead.taken()


def test_the_first_item_is_waited_for_or_the_end_and_a_program_waits_for_neither():
    asked, go_on = threading.Event(), threading.Event()

    class Watched(threading.Event):
        def wait(self, timeout=None):
            asked.set()
            return super().wait(60)

    def items():
        asked.wait(60)
        yield 1
        go_on.wait(60)

    ahead = Ahead(items())
    ahead._news = Watched()
    ahead.start()
    try:
        ahead.wait()
        assert ahead.taken() == [1]
        assert not ahead._over
        assert all(thread.daemon for thread in runners())
    finally:
        asked.set()
        go_on.set()
        ahead.close()
    empty = Ahead(item for item in ())
    empty.start()
    empty.result()
    assert empty._news.is_set()


def test_what_comes_while_it_is_asked_for_is_not_lost():
    ahead = Ahead(item for item in ())

    class Late(deque):
        def __len__(self):
            found = super().__len__()
            if not found and not ahead._over:  # behind the question an item comes, and an error
                self.append(1)
                ahead._error, ahead._over = Broken(), True
            return found

    ahead._come = Late()
    assert ahead.taken() == []
    assert ahead.taken() == [1]
    with pytest.raises(Broken):
        ahead.taken()


def test_a_generator_is_closed_when_close_returns():
    def items():
        while True:
            yield 1

    for begins in (False, True):
        own = items()
        ahead = Ahead(own)
        if begins:
            ahead.start()
            ahead.wait()
        ahead.close()
        assert own.gi_frame is None
        assert ahead.taken() == []


def test_a_generator_may_be_closed_from_its_own_thread():
    """The garbage collector runs in any."""

    def items():
        yield 1
        ahead.close()
        yield 2

    ahead = Ahead(items())
    ahead.start()
    assert ahead.result() is None


def test_the_thread_sees_the_context_of_its_maker():
    said = contextvars.ContextVar("said", default="nothing")
    said.set("something")

    def items():
        yield said.get()

    ahead = Ahead(items())
    ahead.start()
    ahead.result()
    assert ahead.taken() == ["something"]


def test_closing_needs_no_garbage_collector():
    gen = speculative(llama(), "noisy")
    gc.collect()
    gc.disable()
    try:
        before = len([thing for thing in gc.get_objects() if type(thing).__name__ == "SlotCache"])
        chunks = gen.stream(**prompts(3), max_new_tokens=200, do_sample=False, release=ShapedRelease(1, 1e-3, 24))
        next(chunks)
        chunks.close()
        assert len([thing for thing in gc.get_objects() if type(thing).__name__ == "SlotCache"]) == before
    finally:
        gc.enable()


def test_an_error_in_the_middle_reaches_the_consumer():
    def breaks(ids, scores):
        if ids.shape[1] > START + 2:
            raise Broken
        return False

    clock = Clock()
    release = ShapedRelease(1, 0.5, 24, clock=clock, sleep=clock.sleep)
    chunks = speculative(llama(), "noisy").stream(
        **prompts(1), stopping_criteria=[breaks], **GREEDY, release=release
    )
    with pytest.raises(Broken):
        drain(chunks)
    assert not runners()


def test_in_an_event_loop():
    gen = speculative(llama(), "noisy")

    async def collect():
        release = ShapedRelease(4, 1e-3, 24)
        return [unpad(chunk.payload) async for chunk in gen.astream(**prompts(1), **GREEDY, release=release)]

    ids = [i for content in asyncio.run(collect()) for i in content.ids]
    assert ids == plain(llama(), prompts(1))[0, START:].tolist()


@pytest.mark.parametrize("how", ["cancelled", "left"])
def test_async_cancelled_in_the_middle(how):
    gen = speculative(llama(), "noisy")
    gen.generate(**prompts(3), **GREEDY)
    found = len(of_a_call())
    release = ShapedRelease(1, 1e-3, 24)
    options = {**prompts(3), "max_new_tokens": 200, "do_sample": False, "release": release}

    async def cancelled():
        came = asyncio.Event()

        async def consume():
            async for _ in gen.astream(**options):
                came.set()

        task = asyncio.create_task(consume())
        await came.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def left():
        async for _ in gen.astream(**options):
            break

    for _ in range(5):
        asyncio.run({"cancelled": cancelled, "left": left}[how]())
        assert not runners()
    assert len(of_a_call()) == found


@pytest.mark.parametrize("door", ["stream", "release", "astream"])
def test_other_threads_see_what_torch_keeps_for_each(door):
    """Autocast and inference mode change the numbers, and hold for one thread only."""
    seen = []

    class Looks:
        specdec_pure = True

        def __call__(self, ids, scores):
            seen.append(
                (torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled())
            )
            return scores

    gen = SpeculativeGenerator(llama(), "ngram", num_draft_tokens=3)
    options = {**prompts(1), **GREEDY, "logits_processor": [Looks()]}
    release = ShapedRelease(4, 1e-3, 24) if door == "release" else None

    async def collect():
        async for _ in gen.astream(**options):
            pass

    def run():
        if door == "astream":
            asyncio.run(collect())
        else:
            list(gen.stream(**options, release=release))

    run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run()
    with torch.inference_mode():
        run()
    assert set(seen) == {(False, False, False), (True, False, False), (False, True, False)}


def test_another_thread_casts_to_what_this_one_casts_to():
    """Also where that is not what a device casts to by itself, and to nothing where nothing was cast."""
    plainly = surroundings()
    with torch.autocast("cpu", dtype=torch.float16):
        within = surroundings()
        with plainly():
            assert not torch.is_autocast_enabled("cpu")

    def look():
        with within():
            return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(look).result() == (True, torch.float16)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"tokens_per_chunk": 0}, "tokens_per_chunk=0"),
        ({"tokens_per_chunk": True}, "tokens_per_chunk=True"),
        ({"interval": 0}, "interval=0"),
        ({"interval": float("inf")}, "interval=inf"),
        ({"interval": None}, "interval=None"),
        ({"interval": True}, "interval=True"),
        ({"pad_to": 6}, "pad_to=6"),
        ({"pad_to": HEADER + 0x10000}, "pad_to=65539"),
        ({"bucket": 0}, "bucket=0"),
        ({"first_after": -1.0}, "first_after"),
    ],
)
def test_numbers_out_of_range(changed, named):
    with pytest.raises(InvalidInput, match=named):
        ShapedRelease(**{"tokens_per_chunk": 4, "interval": 0.5, "pad_to": 32, **changed})


def test_a_release_of_another_kind():
    with pytest.raises(InvalidInput, match="ShapedRelease"):
        speculative(llama(), None).stream(**prompts(1), release=4)


def test_the_room_of_a_chunk():
    clock = Clock()
    release = ShapedRelease(2, 1.0, HEADER + 0xFFFF, clock=clock, sleep=clock.sleep)
    record = Tokens(0, tuple(range(NEW)), (False,) * NEW, None, True)
    (payload, *_) = [c.payload for c in on_a_clock(Script(clock, [(0.0, record)]), 1, None, release)]
    assert len(payload) == HEADER + 0xFFFF


@pytest.mark.parametrize("payload", [b"", b"\0\0", b"\0\0\x05abc", b"\x02\0\x05abc"])
def test_no_payload(payload):
    with pytest.raises(InvalidInput, match="payload"):
        unpad(payload)


@pytest.mark.parametrize("payload", [b"\0\0\x03abc", b"\x02\0\x01\xff", b""])
def test_bytes_that_are_no_payload(payload):
    with pytest.raises(InvalidInput, match="no payload"):
        unpad(payload)
