"""Stats: formulas, and counts that are compared with what really happened.

Forward passes are counted at the models, copies to the host where they are made, tokens in the text.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import torch

import specdec.clock as clock_room
import specdec.proposers.draft_model as draft_model_room
import specdec.state as state_room
from specdec import Stats
from specdec.clock import happens_once
from specdec.testing import noisy_copy, tiny_llama

from .contract import (
    NEW,
    Counted,
    ends,
    gemma,
    llama,
    mamba2,
    noisy,
    oracle,
    plain,
    prompts,
    speculative,
    t5,
)

BATCHES = (1, 3)
START = 9
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def test_formulas():
    stats = Stats(
        rounds=4,
        drafted=10,
        accepted=6,
        emitted=18,
        row_emitted=np.array([9, 9]),
        seconds=3.0,
        seconds_drafting=1.0,
        seconds_scoring=0.5,
        seconds_verifying=0.25,
    )
    assert stats.acceptance_rate == 0.6
    assert stats.tokens_per_round == 18 / (4 * 2)
    assert stats.tokens_per_second == 6.0
    assert stats.seconds_other == 1.25


def test_formulas_of_nothing():
    stats = Stats()
    assert stats.acceptance_rate == 0.0
    assert stats.tokens_per_round == 0.0
    assert stats.tokens_per_second == 0.0
    assert stats.seconds_other == 0.0


def test_a_later_decoding_adds_its_counts_and_says_the_layout():
    first, later = (
        Stats(
            rounds=number, accepted_at=[number] * places, drafted_at=[9] * places, layout=layout, drafting=layout,
            row_drafted=np.array(rows), row_accepted=np.array(rows), row_emitted=np.array(rows), seconds=0.25,
        )
        for number, places, layout, rows in ((2, 1, "slots", [5, 6]), (3, 2, "plain", [7]))
    )  # fmt: skip
    first.add(later)
    assert (first.rounds, first.decodings, first.seconds) == (5, 2, 0.5)
    assert (first.accepted_at, first.drafted_at) == ([5, 3], [18, 9])
    assert (first.layout, first.drafting) == ("plain", "plain")
    for rows in (first.row_drafted, first.row_accepted, first.row_emitted):
        assert rows.tolist() == [5, 6, 7]


def test_a_generator_that_has_done_nothing_has_stats_of_nothing():
    assert speculative(llama(), "noisy").stats.rounds == 0


def test_as_dict_is_ready_for_json():
    gen = speculative(llama(), "noisy")
    gen.generate(**prompts(3), **GREEDY)
    found = json.loads(json.dumps(gen.stats.as_dict()))
    assert found["emitted"] == 3 * NEW
    assert found["row_emitted"] == [NEW] * 3
    assert found["acceptance_rate"] == gen.stats.acceptance_rate
    assert found["accepted_at"] == gen.stats.accepted_at


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("make", [llama, gemma, mamba2])
@pytest.mark.parametrize("layout", ["auto", "snapshot"])
def test_forwards_are_those_of_the_models(layout, make, batch):
    """The self-check's, the prefill's and the replays' included; in a first and in a second call."""
    target = make()
    draft = noisy_copy(target, 0.05)
    for _ in range(2):
        with Counted(target) as ours, Counted(draft) as theirs:
            gen = speculative(target, draft, layout=layout)
            gen.generate(**prompts(batch), **GREEDY)
        assert gen.stats.target_forwards == ours.calls
        assert gen.stats.draft_forwards == theirs.calls
        assert gen.stats.draft_forwards > 0


def test_forwards_of_a_first_call():
    """A model not seen before is checked; the check's forwards count, and come once."""
    target = tiny_llama(3, num_hidden_layers=1)
    counts = []
    for _ in range(2):
        with Counted(target) as counted:
            gen = speculative(target, "ngram")
            gen.generate(**prompts(3), **GREEDY)
        assert gen.stats.target_forwards == counted.calls
        counts.append(counted.calls)
    assert counts[1] == gen.stats.rounds
    assert counts[0] > counts[1]


@pytest.mark.parametrize("batch", BATCHES)
def test_forwards_of_an_encoder_decoder(batch):
    target, draft = t5(), noisy(t5())
    with Counted(target) as ours, Counted(draft) as theirs:
        gen = speculative(target, draft)
        gen.generate(**prompts(batch), **GREEDY)
    assert gen.stats.target_forwards == ours.calls
    assert gen.stats.draft_forwards == theirs.calls


@pytest.mark.parametrize("draft", ["ngram", None])
def test_no_draft_model_no_forwards_of_it(draft):
    gen = speculative(llama(), draft)
    gen.generate(**prompts(3), **GREEDY)
    assert gen.stats.draft_forwards == 0
    assert gen.stats.draft_layout == ""


def counting(monkeypatch, room, name):
    """Counts the copies to the host that `room` makes by the function `name`."""
    calls = []
    original = getattr(room, name)
    monkeypatch.setattr(room, name, lambda *tensors: calls.append(1) or original(*tensors))
    return calls


PROCESSING = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    "suppressed": {"do_sample": False, "suppress_tokens": [5], "bad_words_ids": [[6]]},
    "an end": {"do_sample": False, "eos_token_id": 48},
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("draft", ["noisy", "ngram", None])
@pytest.mark.parametrize("name", PROCESSING)
def test_one_copy_to_the_host_a_round(name, draft, batch, monkeypatch):
    gen = speculative(llama(), draft)
    in_rounds = counting(monkeypatch, state_room, "together_to_host")
    before = counting(monkeypatch, state_room, "to_host")
    in_draft = counting(monkeypatch, draft_model_room, "to_host")
    gen.generate(**prompts(batch), max_new_tokens=NEW, **PROCESSING[name])
    assert gen.stats.host_copies == gen.stats.rounds
    assert len(in_rounds) == gen.stats.rounds
    # and, once, the ids that end a row
    assert len(before) == ("eos_token_id" in PROCESSING[name])
    assert not in_draft


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("draft", ["noisy", "ngram", None, "oracle"])
@pytest.mark.parametrize("stop", ["nothing", "an end", "a criterion"])
def test_counts_are_those_of_the_text_and_of_the_rows(stop, draft, batch):
    inputs = prompts(batch)
    free = plain(llama(), inputs)
    draft = oracle(free, wrong={12}) if draft == "oracle" else draft
    eos = int(free[-1, START + 3]) if stop == "an end" else None
    options = {"eos_token_id": eos, **GREEDY}
    if stop == "a criterion":
        options["stopping_criteria"] = [lambda ids, scores: ids.shape[1] >= START + 6]
    gen = speculative(llama(), draft)
    text = gen.generate(**inputs, **options)
    stats = gen.stats
    lengths = np.array(ends(text, START, eos)) - START
    assert stats.row_emitted.tolist() == lengths.tolist()
    assert stats.emitted == lengths.sum()
    for name in ("drafted", "accepted", "emitted"):
        assert getattr(stats, name) == getattr(stats, f"row_{name}").sum()
    assert sum(stats.drafted_at) == stats.drafted
    assert sum(stats.accepted_at) == stats.accepted
    assert stats.drafted_at == sorted(stats.drafted_at, reverse=True)
    assert all(a <= d for a, d in zip(stats.accepted_at, stats.drafted_at, strict=True))
    assert (stats.row_accepted <= stats.row_drafted).all()
    assert stats.emitted <= stats.accepted + batch * stats.rounds
    if stop == "nothing":
        # every round gives a live row one token beside the accepted ones
        assert stats.emitted >= stats.accepted + stats.rounds


def test_counts_of_a_known_course():
    """Two rows, three guesses a round, wrong in known places."""
    inputs = {k: v[[0, 0]] for k, v in prompts(1).items()}
    text = plain(llama(), inputs, max_new_tokens=9)
    # columns 9 .. 17; the prefill writes 9, the round guesses 10 11 12, of which 11 is wrong:
    # 10 and the replacement 11; then 12 13 14 right, and 15; then 16 (17 is the extra token)
    gen = speculative(llama(), oracle(text, wrong={11}), layout="slots")
    gen.generate(**inputs, max_new_tokens=9, do_sample=False)
    stats = gen.stats
    assert stats.rounds == 4
    assert stats.row_drafted.tolist() == [7, 7]
    assert stats.row_accepted.tolist() == [5, 5]
    assert stats.row_emitted.tolist() == [9, 9]
    assert stats.drafted_at == [6, 4, 4]
    assert stats.accepted_at == [6, 2, 2]
    assert stats.acceptance_rate == 5 / 7
    assert stats.tokens_per_round == 9 / 4


def test_seconds():
    gen = speculative(llama(), "noisy")
    gen.generate(**prompts(3), **GREEDY)
    stats = gen.stats
    parts = (stats.seconds_drafting, stats.seconds_scoring, stats.seconds_verifying)
    assert all(part > 0 for part in parts)
    assert sum(parts) + stats.seconds_other == pytest.approx(stats.seconds)
    assert stats.tokens_per_second == stats.emitted / stats.seconds


def test_layouts_are_named():
    gen = speculative(mamba2(), noisy(llama()))
    gen.generate(**prompts(3), **GREEDY)
    assert gen.stats.layout == "columns+snapshot"
    assert gen.stats.draft_layout == "slots"
    assert torch.is_tensor(prompts(3)["input_ids"])


def test_the_clock_stands_still_for_what_happens_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock_room, "perf_counter", lambda: now[0])
    read = clock_room.clock
    with ThreadPoolExecutor(1) as other:
        before = read(), other.submit(read).result()
        for seconds in (5, 2):
            with suppress(ZeroDivisionError), happens_once():
                now[0] += seconds
                raise ZeroDivisionError
        now[0] += 3
        assert read() - before[0] == 3
        # it is this thread's affair
        assert other.submit(read).result() - before[1] == 10
