"""stream() and astream(): the text of generate(), told as it becomes final; cancelled cleanly."""

import asyncio
import gc
import random
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, StaticCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec import SpeculativeGenerator, Tokens, UnsupportedOption
from specdec.layouts.columns import Columns
from specdec.layouts.facts import CACHE
from specdec.layouts.slots import SlotCache
from specdec.scorer import Scorer
from specdec.state import State
from specdec.streaming import Text, _Teller, in_threads
from specdec.testing import byte_tokenizer, ragged_prompt, tiny_llama

from .contract import (
    NEW,
    Counted,
    Guesses,
    assert_untouched,
    fingerprint,
    gemma,
    llama,
    noisy,
    oracle,
    plain,
    prompts,
    speculative,
    whisper,
)

GREEDY = {"max_new_tokens": NEW, "do_sample": False}
START = 9


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes: id i is one byte, and characters of two bytes are split over two tokens."""
    words = {f"<0x{i:02X}>": i for i in range(256)}
    made = Tokenizer(models.BPE(words, [], byte_fallback=True, unk_token="<0x00>"))
    made.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def drain(records):
    """All records, and what the generator returned."""
    found = []
    while True:
        try:
            found.append(next(records))
        except StopIteration as end:
            return found, end.value


def rows_of(records, batch):
    ids = [[] for _ in range(batch)]
    for record in records:
        assert isinstance(record, Tokens)
        assert len(record.ids) == len(record.from_draft)
        ids[record.row] += record.ids
    return ids


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("draft", ["noisy", "ngram", None])
@pytest.mark.parametrize("stop", ["nothing", "end of sequence", "criterion", "both"])
def test_the_records_are_the_text(stop, draft, batch):
    free = plain(llama(), prompts(batch))
    options = dict(GREEDY)
    if stop in ("end of sequence", "both"):
        options["eos_token_id"] = int(free[0, START + 3])
    if stop in ("criterion", "both"):
        last = int(free[-1, START + 5])
        options["stopping_criteria"] = [lambda ids, scores: ids[:, -1] == last]
    wanted = llama().generate(**prompts(batch), **options)
    gen = speculative(llama(), oracle(free) if draft == "ngram" else draft)
    records, out = drain(gen.stream(**prompts(batch), **options))
    assert out.tolist() == wanted.tolist()
    told = rows_of(records, batch)
    emitted = gen.stats.row_emitted
    for row, ids in enumerate(told):
        assert ids == wanted[row, START : START + emitted[row]].tolist()
    assert gen.stats.emitted == sum(len(ids) for ids in told)
    ended = [record.row for record in records if record.ended]
    assert sorted(ended) == list(range(batch)), "each row ends once"
    for row in range(batch):
        assert [r for r in records if r.row == row][-1].ended
    assert gen.stats.seconds > 0


@pytest.mark.parametrize("ends", [None, "late"])
def test_a_row_that_ended_ahead_of_the_others_may_still_be_cut(ends):
    """A condition comes to a step only when every row has; nothing beyond may have been told."""
    inputs, cuts = prompts(3), 0
    text = plain(llama(), inputs)[0, START:].tolist()
    options = {**GREEDY, "eos_token_id": None if ends is None else max(text, key=text.index)}
    for step in range(2, NEW + 1):
        criteria = [lambda ids, scores, step=step: torch.full((len(ids),), ids.shape[1] >= START + step)]
        wanted = plain(llama(), inputs, **options, stopping_criteria=criteria).tolist()
        gen = speculative(llama(), None, tokens=NEW)
        stream = gen.stream(**inputs, **options, stopping_criteria=criteria, prediction=[text, None, None])
        told = [[], [], []]
        for record in stream:
            told[record.row] += record.ids
        for row, ids in enumerate(told):
            new = wanted[row][START:]
            assert ids == new[: len(ids)]
            assert not any(new[len(ids) :])
        cuts += len(told[0]) < len(text)
    assert cuts > 2


def test_which_tokens_the_draft_guessed():
    free = plain(llama(), prompts(3))
    gen = speculative(llama(), oracle(free, wrong={START + 3}), tokens=3)
    records, _ = drain(gen.stream(**prompts(3), **GREEDY))
    flags = [[] for _ in range(3)]
    for record in records:
        flags[record.row] += record.from_draft
    # the prompt's token; 2 guesses and a replacement; 3 guesses and a bonus; a last token without a guess
    assert flags == [[False, True, True, False, True, True, True, False, False]] * 3
    assert sum(map(sum, flags)) == gen.stats.accepted
    records, _ = drain(speculative(llama(), None).stream(**prompts(3), **GREEDY))
    assert not any(flag for record in records for flag in record.from_draft)


def test_an_end_of_sequence_that_the_draft_guessed():
    free = plain(llama(), prompts(1))
    eos = int(free[0, START + 2])
    assert eos not in free[0, START : START + 2]
    gen = speculative(llama(), oracle(free), layout="slots")
    records, _ = drain(gen.stream(**prompts(1), **GREEDY, eos_token_id=eos))
    assert [flag for record in records for flag in record.from_draft] == [False, True, True]


def test_a_row_is_told_its_end_once_nothing_takes_it_back():
    """And once only; also where no token comes with it."""
    state = SimpleNamespace(
        batch=3, prompt_length=2, host_tokens=np.arange(15).reshape(3, 5), live=np.array([True, False, False]),
        lengths=np.array([4, 4, 2]),
    )  # fmt: skip
    teller = _Teller(state, None)
    made = SimpleNamespace(before=np.array([2, 2, 2]), accepted=np.array([1, 0, 0]))
    first = Tokens(0, (2, 3), (True, False), None, False), Tokens(2, (), (), None, True)
    assert teller.tell(state, made, np.array([4, 2, 2])) == list(first)
    none = SimpleNamespace(before=np.array([4, 4, 2]), accepted=np.array([0, 0, 0]))
    assert teller.tell(state, none, np.array([4, 4, 2])) == [Tokens(1, (7, 8), (False, False), None, True)]
    assert teller.tell(state, none, np.array([4, 4, 2])) == []


def test_tokens_come_while_the_model_still_runs():
    gen = speculative(llama(), "noisy")
    with Counted(llama()) as counted:
        stream = gen.stream(**prompts(1), max_new_tokens=40, do_sample=False)
        assert counted.calls == 0, "the model runs when it is asked"
        seen = []
        for _ in stream:
            seen.append(counted.calls)
    assert seen[0] == 1
    assert seen == sorted(seen)
    assert len(set(seen)) > 5


def test_text(tokenizer):
    """The pieces make the text; a character that is not whole waits for its other byte."""
    ids = torch.tensor([[195, 164, 65, 195, 182, 66, 240, 159, 152, 128]])
    target = llama()

    class Written:
        specdec_pure = True

        def __call__(self, input_ids, scores):
            at = (input_ids.shape[1] - START) % 9
            forced = torch.full_like(scores, -torch.inf)
            forced[:, [3, 5, 7, 8, 9, 10, 11, 12, 13][at]] = 0
            return forced

    # ids of a 64-word model stand for bytes of a text with characters of two bytes
    table = {3: 195, 5: 164, 7: 65, 8: 195, 9: 182, 10: 66, 11: 226, 12: 130, 13: 172}

    class Mapped:
        def decode(self, tokens, skip_special_tokens=True):
            return tokenizer.decode([table.get(int(t), 63) for t in tokens])

    for draft in ("ngram", None):
        gen = SpeculativeGenerator(target, draft, num_draft_tokens=3, tokenizer=Mapped())
        records, out = drain(gen.stream(**prompts(1), logits_processor=[Written()], **GREEDY))
        assert Mapped().decode(out[0, START:]) == "äAöB€"
        assert "".join(record.text for record in records) == "äAöB€"
        assert not any("\ufffd" in record.text for record in records)
        if draft is None:
            assert [record.text for record in records] == ["", "ä", "A", "", "ö", "B", "", "", "€"]
    assert ids.shape == (1, 10)


def test_every_row_has_a_text_of_its_own_to_its_last_byte():
    words = byte_tokenizer()
    gen = SpeculativeGenerator(tiny_llama(3, vocabulary=len(words)), "ngram", tokenizer=words)
    ids, texts = [[], [], []], ["", "", ""]
    for record in gen.stream(**ragged_prompt((5, 4, 2), len(words)), max_new_tokens=17, do_sample=False):
        ids[record.row] += record.ids
        texts[record.row] += record.text
    assert texts == [words.decode(one, skip_special_tokens=True) for one in ids]
    assert any(text.endswith("\ufffd") for text in texts)


def test_bytes_that_are_no_characters_are_not_waited_for():
    """A character may need three bytes more, and no more than these wait."""
    tokenizer = byte_tokenizer()
    text, byte = Text(tokenizer), tokenizer.encode("é")[0]
    told = "".join(text.add([byte], ended=False) for _ in range(20))
    assert told == 17 * "\ufffd"
    assert text.add([byte], ended=True) == 4 * "\ufffd"


def test_pieces_of_text_with_stray_bytes_are_the_whole_text():
    tokenizer, chance = byte_tokenizer(), random.Random(0)
    characters = [tokenizer.encode(character) for character in "aé€😀"]
    stray = [[byte] for character in characters for byte in character]
    for _ in range(200):
        ids = [byte for _ in range(30) for byte in chance.choice(chance.choice([characters, stray]))]
        text, told, start = Text(tokenizer), "", 0
        while start < len(ids):
            end = start + chance.randint(1, 5)
            told += text.add(ids[start:end], ended=end >= len(ids))
            start = end
        assert told == tokenizer.decode(ids)


def test_special_tokens_are_no_text():
    made = byte_tokenizer()
    ids = made("hi")["input_ids"]
    text = Text(made)
    assert text.add(ids[:1], False) + text.add([*ids[1:], made.eos_token_id], True) == "hi"


def test_without_a_tokenizer_no_text():
    records, _ = drain(speculative(llama(), "noisy").stream(**prompts(3), **GREEDY))
    assert {record.text for record in records} == {None}


def test_the_dictionary_is_returned():
    gen = speculative(llama(), "noisy")
    _, out = drain(gen.stream(**prompts(3), **GREEDY, return_dict_in_generate=True, output_scores=True))
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert len(out.scores) == NEW
    assert out[CACHE].get_seq_length() == START + NEW - 1


def test_options_are_judged_at_once():
    gen = speculative(llama(), "noisy")
    with pytest.raises(UnsupportedOption, match="num_beams"):
        gen.stream(**prompts(1), num_beams=2)
    with pytest.raises(UnsupportedOption, match="streamer"):
        gen.stream(**prompts(1), streamer=object())
    with pytest.raises(UnsupportedOption, match=r"Whisper.*whole text"):
        SpeculativeGenerator(whisper()).stream(torch.zeros(1, 8, 40))


def test_gradients_are_off_inside_and_as_they_were_outside():
    for _ in speculative(llama(), "noisy").stream(**prompts(1), **GREEDY):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("draft", ["noisy", "auto"])
def test_a_stream_goes_on_in_the_mode_that_it_was_begun_in(draft, inference):
    gen, modes = speculative(llama(), draft), set()
    options = {**prompts(3), "max_new_tokens": 24, "do_sample": False}
    wanted = plain(llama(), prompts(3), max_new_tokens=24).tolist()
    look = llama().register_forward_pre_hook(lambda *_: modes.add(torch.is_inference_mode_enabled()))
    with torch.inference_mode(inference):
        stream = gen.stream(**options)
        next(stream)
    with torch.inference_mode(not inference):
        _, out = drain(stream)
    look.remove()
    assert out.tolist() == wanted
    assert modes == {inference}
    assert gen.generate(**options).tolist() == wanted


def test_a_stream_is_closed_in_the_mode_that_it_was_begun_in():
    """Where alone wrong guesses can be taken out of the caller's cache again."""
    cache = StaticCache(config=llama().config, max_cache_len=START + 24)
    text = plain(llama(), prompts(1), max_new_tokens=24)
    gen = speculative(llama(), oracle(text, wrong=range(START, START + 24)), layout="snapshot")
    with torch.inference_mode():
        stream = gen.stream(**prompts(1), max_new_tokens=24, do_sample=False, **{CACHE: cache})
        next(stream)
    told = 1 + sum(len(next(stream).ids) for _ in range(4))
    stream.close()
    assert gen.stats.drafted > 0
    assert START <= int(cache.get_seq_length()) < START + told


def test_a_text_that_outgrows_the_room_made_for_it(monkeypatch):
    monkeypatch.setattr("specdec.state.ROOM", 5)
    wanted = plain(llama(), prompts(3), max_new_tokens=24)
    gen = speculative(llama(), oracle(wanted, wrong={12, 13, 20}))
    records, out = drain(gen.stream(**prompts(3), max_new_tokens=24, do_sample=False))
    assert out.tolist() == wanted.tolist()
    assert rows_of(records, 3) == wanted[:, START:].tolist()
    assert sum(sum(record.from_draft) for record in records) == gen.stats.accepted > 0


def test_what_was_guessed_is_remembered_while_the_room_grows(monkeypatch):
    """A row runs ahead of the others, and with a condition its tokens wait to be told."""
    monkeypatch.setattr("specdec.state.ROOM", 5)
    wanted = plain(llama(), prompts(3), max_new_tokens=24)
    right = oracle(wanted)
    ahead = Guesses(lambda row, column, state: right.choose(row, column, state) if row == 0 else 64)
    gen = speculative(llama(), ahead, layout="slots")
    never = {"stopping_criteria": [lambda ids, scores: False]}
    records, _ = drain(gen.stream(**prompts(3), max_new_tokens=24, do_sample=False, **never))
    assert sum(sum(record.from_draft) for record in records) == gen.stats.accepted > 12


# --- cancelling -----------------------------------------------------------------------------------


def of_a_call():
    """What a call makes and must not leave behind."""
    gc.collect()
    kinds = (SlotCache, Scorer, State, Columns)
    return [thing for thing in gc.get_objects() if type(thing) in kinds]


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_two_hundred_cancelled_calls_leave_nothing(how, make):
    target, draft = make(), noisy(make())
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=3)
    gen.generate(**prompts(3), **GREEDY)
    before, found = (fingerprint(target), fingerprint(draft)), len(of_a_call())
    wanted = plain(target, prompts(3)).tolist()
    for number in range(200):
        stream = gen.stream(**prompts(3), max_new_tokens=20, do_sample=False)
        for _ in range(number % 5):
            next(stream)
        if how == "closed":
            stream.close()
        del stream
    assert len(of_a_call()) == found
    assert_untouched(target, before[0])
    assert_untouched(draft, before[1])
    assert gen.generate(**prompts(3), **GREEDY).tolist() == wanted


def test_the_cache_dies_without_the_garbage_collector():
    """Closing gives the memory back at once, not at the next collection."""
    caches = []
    gen = speculative(llama(), "noisy", layout="slots")
    gc.collect()
    gc.disable()
    try:
        stream = gen.stream(**prompts(3), **GREEDY)
        next(stream)
        alive = [thing for thing in gc.get_objects() if type(thing) is SlotCache]
        caches = [weakref.ref(thing) for thing in alive]
        del alive
        stream.close()
        assert caches
        assert [ref() for ref in caches] == [None] * len(caches)
    finally:
        gc.enable()


# --- in an event loop -----------------------------------------------------------------------------


def test_async_iteration():
    gen = speculative(llama(), "noisy")

    async def collect():
        return [record async for record in gen.astream(**prompts(3), **GREEDY)]

    wanted = plain(llama(), prompts(3))
    told = rows_of(asyncio.run(collect()), 3)
    assert told == wanted[:, START:].tolist()


def test_the_event_loop_goes_on_meanwhile():
    gen = speculative(llama(), "noisy")
    ticks = []

    async def tick():
        while True:
            ticks.append(1)
            await asyncio.sleep(0)

    async def both():
        ticking = asyncio.create_task(tick())
        async for _ in gen.astream(**prompts(1), max_new_tokens=30, do_sample=False):
            pass
        ticking.cancel()

    asyncio.run(both())
    assert len(ticks) > 10


@pytest.mark.parametrize("how", ["cancelled", "closed", "left"])
def test_async_cancelled_in_the_middle(how):
    gen = speculative(llama(), "noisy")
    gen.generate(**prompts(3), **GREEDY)
    found = len(of_a_call())

    async def cancelled():
        async def consume():
            async for _ in gen.astream(**prompts(3), max_new_tokens=200, do_sample=False):
                await asyncio.sleep(0)

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def closed():
        stream = gen.astream(**prompts(3), max_new_tokens=200, do_sample=False)
        await anext(stream)
        await stream.aclose()

    async def left():
        async for _ in gen.astream(**prompts(3), max_new_tokens=200, do_sample=False):
            break

    for _ in range(10):
        asyncio.run({"cancelled": cancelled, "closed": closed, "left": left}[how]())
    assert len(of_a_call()) == found
    assert gen.generate(**prompts(3), **GREEDY).tolist() == plain(llama(), prompts(3)).tolist()


def test_every_step_sees_what_torch_keeps_for_the_thread_of_the_loop():
    def records():
        for _ in range(2):
            yield torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    async def collect():
        return [seen async for seen in in_threads(records())]

    with torch.inference_mode(), torch.autocast("cpu"):
        assert asyncio.run(collect()) == [(True, True)] * 2
    assert asyncio.run(collect()) == [(False, False)] * 2


def test_a_stream_is_closed_beside_the_event_loop():
    """It may have a round to end first, and whatever else the loop serves must not wait for that."""
    threads = []

    def records():
        try:
            while True:
                yield Tokens(0, (1,), (False,), None, False)
        finally:
            threads.append(threading.get_ident())

    async def one():
        stream = in_threads(records())
        await anext(stream)
        await stream.aclose()
        return threading.get_ident()

    here = asyncio.run(one())
    assert len(threads) == 1
    assert threads != [here]


class Broken(Exception):
    pass


def test_an_error_in_the_middle_reaches_the_consumer():
    def breaks(ids, scores):
        if ids.shape[1] > START + 2:
            raise Broken
        return False

    stream = speculative(llama(), "noisy").stream(**prompts(1), stopping_criteria=[breaks], **GREEDY)
    with pytest.raises(Broken):
        drain(stream)

    async def consume():
        async for _ in speculative(llama(), "noisy").astream(**prompts(1), stopping_criteria=[breaks], **GREEDY):
            pass

    with pytest.raises(Broken):
        asyncio.run(consume())
