"""Draft lengths: the formulas against published tables, and the controller on made-up drafts and clocks.

No model here: a round's outcome is drawn from a given acceptance, its seconds come from given costs.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from specdec.length import Opening
from specdec.length.acceptance import (
    BIN_WEIGHT,
    DOUBT,
    FADE,
    PRIOR,
    PRIOR_WEIGHT,
    TEXT_PRIOR,
    TEXT_WEIGHT,
    TEXTS,
    Acceptance,
)
from specdec.length.adaptive import LONGEST_WAIT, STALE, Adaptive, Memory
from specdec.length.cost import OUTDATED, REMEMBERED, Assumed, Timings, best_length, rising, speed, tokens_per_round
from specdec.length.rows import Rows, together
from specdec.records import Proposal, Round

# --- formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("acceptance", "guesses", "published"),
    [(0.6, 2, 1.96), (0.7, 3, 2.53), (0.8, 2, 2.44), (0.8, 5, 3.69), (0.9, 2, 2.71), (0.9, 10, 6.86)],
)
def test_speed_without_draft_cost_is_table_1_of_leviathan_et_al(acceptance, guesses, published):
    assert round(speed(acceptance, 0.0, guesses), 2) == published


@pytest.mark.parametrize(
    ("acceptance", "cost", "guesses", "published"),
    [(0.75, 0.02, 7, 3.2), (0.65, 0.02, 5, 2.4), (0.71, 0.11, 3, 2.0), (0.82, 0.11, 7, 2.5), (0.53, 0.02, 5, 1.9)],
)
def test_speed_is_table_4_within_its_rounding(acceptance, cost, guesses, published):
    assert speed(acceptance, cost, guesses) == pytest.approx(published, abs=0.1)


def test_limits_of_the_formulas():
    assert speed(1.0, 0.0, 4) == 5
    assert speed(0.0, 0.0, 4) == 1
    assert tokens_per_round([]).tolist() == [1.0]
    for acceptance, cost in ((0.3, 0.4), (0.4, 0.4)):  # a draft no better than it is dear
        seconds = 1 + cost * np.arange(17)
        assert best_length(tokens_per_round(acceptance ** np.arange(1, 17)), seconds) == 0


def ceiling(acceptance, cost):
    """Speed against plain decoding of a controller that foresaw every rejection: none can do better."""
    return 1 / (1 - acceptance + acceptance * cost)


def test_the_best_length_is_the_best_of_all_and_below_the_ceiling():
    for acceptance in (0.3, 0.6, 0.8, 0.95):
        for cost in (0.02, 0.1, 0.3):
            speeds = [speed(acceptance, cost, k) for k in range(33)]
            seconds = 1 + cost * np.arange(33)
            assert best_length(tokens_per_round(acceptance ** np.arange(1, 33)), seconds) == int(np.argmax(speeds))
            assert max(speeds) < ceiling(acceptance, cost)


def test_rising_pools_neighbours_out_of_order():
    assert rising([1, 3, 2, 4], [1, 1, 1, 1]).tolist() == [1, 2.5, 2.5, 4]
    assert rising([4, 1], [1, 3]).tolist() == [1.75, 1.75]
    assert rising([5], [1]).tolist() == [5]
    assert rising([2, 3, 0.5, 1], [1, 1, 2, 1]).tolist() == [1.4] * 4, "a pool may meet the one before it"


def test_timings_interpolate_and_extrapolate():
    timings = Timings()
    assert timings.table(4) is None
    timings.add(0, 1.0)
    assert timings.table(2).tolist() == [1.0, 1.5, 2.0]  # assumed
    for seconds in (1.4, 9.0, 1.4):  # one of them disturbed
        timings.add(2, seconds)
    assert timings.table(4) == pytest.approx([1.0, 1.2, 1.4, 1.6, 1.8])


def test_timings_are_medians_that_count_as_often_as_they_were_measured():
    timings = Timings()
    for seconds in (4.0, 3.0, 5.0):
        timings.add(0, seconds)
    assert timings.table(0).tolist() == [4.0], "a round that was fast by chance is none to go by either"
    timings.add(1, 2.0)
    assert timings.table(1).tolist() == [3.5, 3.5]


def test_what_one_thread_reads_no_other_writes_into():
    timings = Timings()
    for width in range(6):
        timings.add(width, 1.0 + width)
    read = timings._seen
    before = copy.deepcopy(read)
    for _ in range(2 * OUTDATED):
        timings.add(1, 2.0)
    timings.add(0, 2.0)
    timings.add(9, 2.0)
    assert read == before
    assert timings._seen.keys() == {0, 1, 9}, "what does not come again is let go"


def test_a_width_that_does_not_come_again_loses_its_oldest_timing_now_and_then():
    timings = Timings()
    for width, seconds in ((0, 1.0), (1, 2.0), (3, 4.0), (3, 9.0)):
        timings.add(width, seconds)
    said = []
    for _ in range(2 * OUTDATED):
        timings.add(1, 2.0)
        said.append(float(timings.table(3)[3]))
    assert said == [*[4.0] * (OUTDATED - 1), *[9.0] * OUTDATED, 1 + 3 * (2.0 - 1.0)], "one at a time, then none"


def test_beyond_what_was_timed_guesses_cost_what_was_said_a_quarter_of_the_line_or_so_much_of_a_plain_round():
    timings = Timings()
    for width, seconds in ((0, 10.0), (2, 18.0)):  # 4 seconds a guess
        timings.add(width, seconds)
    assert timings.table(3)[3] == 22.0
    assert timings.table(3, wider=2.5)[3] == 20.5
    assert timings.table(3, wider=0.1)[3] == 19.0
    assert timings.table(3, least=0.5)[3] == 23.0


def test_what_rounds_take_now_counts_and_not_what_they_took():
    timings = Timings()
    for seconds in (1.0, 3.0):
        for _ in range(REMEMBERED):
            timings.add(0, seconds)
            timings.add(2, 2 * seconds)
    assert timings.table(2).tolist() == [3.0, 4.5, 6.0]


def test_a_round_that_had_more_to_do_is_believed_where_it_took_clearly_less():
    timings = Timings()
    timings.add(0, 1.0)
    timings.at_most(2, 0.1)
    assert not timings.priced, "nothing is known yet that it could be compared with"
    timings.add(2, 2.0)
    timings.at_most(2, 1.9)
    assert timings.table(2)[2] == 2.0
    timings.at_most(2, 1.2)
    assert timings.table(2)[2] == 1.2


def test_a_plain_round_is_known_the_better_the_more_often_it_was_timed():
    timings, known = Timings(), []
    for _ in range(REMEMBERED + 2):
        known.append(timings.known)
        timings.add(0, 1.0)
    assert known == [*np.arange(REMEMBERED) / REMEMBERED, 1.0, 1.0]


def test_a_clock_that_stands_still_is_no_fault():
    timings = Timings()
    rule = Adaptive(timings)
    for _ in range(4):
        rule.observe(outcome(rule.next(16), np.zeros(1, dtype=np.int64)), 0.0)
    assert timings.table(1)[0] > 0


def test_a_guess_stays_priced_though_only_wider_rounds_come():
    """Timings that do not come again are let go, but for the narrowest, which no wider one stands for."""
    timings = Timings()
    for width in (0, 1, 2):
        timings.add(width, 1.0 + width)
    for _ in range(2 * OUTDATED):
        timings.add(4, 1.5)
    assert timings._seen.keys() == {0, 1, 4}
    assert timings.table(4)[1] < 2, "and what was slower than a wider round is taken to have been disturbed"


# --- the controller -------------------------------------------------------------------------------


class Rig:
    """Rounds with drawn outcomes and counted seconds, as the loop would report them."""

    def __init__(self, cost: float, wider: float = 0.0, rows: int = 1, tells: bool = False, seed: int = 0):
        self.cost, self.wider, self.rows, self.tells = cost, wider, rows, tells
        self.random = np.random.default_rng(seed)
        self.seconds = 0.0
        self.tokens = 0
        self.rounds: list[tuple[int, float]] = []  # guesses, tokens a row

    def round(self, rule: Adaptive, acceptance: float) -> None:
        asked = rule.next(16)
        drafted = 0
        while drafted < asked:
            drafted += 1
            # a draft that knows: half of its guesses are sure, the others take the rest of the blame
            if self.tells and not rule.goes_on(np.full(self.rows, acceptance)):
                break
        trials = self.random.random((self.rows, max(drafted, 1))) < acceptance
        accepted = trials[:, :drafted].cumprod(axis=1).sum(axis=1)
        seconds = 1 + drafted * (self.cost + self.wider)
        self.seconds += seconds
        self.tokens += float(accepted.mean()) + 1
        self.rounds.append((drafted, float(accepted.mean()) + 1))
        rule.observe(outcome(drafted, accepted), seconds)

    def run(self, rule: Adaptive, acceptance: float, tokens: float) -> float:
        """Speed against plain decoding over ``tokens`` more tokens a row."""
        start, since = self.tokens, self.seconds
        while self.tokens - start < tokens:
            self.round(rule, acceptance)
        return (self.tokens - start) / (self.seconds - since)


def outcome(drafted: int, accepted: np.ndarray) -> Round:
    rows = len(accepted)
    zeros = np.zeros((rows, drafted), dtype=np.int64)
    return Round(
        proposal=Proposal.empty(rows, torch.device("cpu")),
        drafted=zeros,
        lengths=np.full(rows, drafted),
        accepted=accepted,
        emitted=np.zeros((rows, drafted + 1), dtype=np.int64),
        counts=accepted + 1,
        before=np.zeros(rows, dtype=np.int64),
        scores=torch.zeros(0),
    )


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize("cost", [0.05, 0.4, 0.8])
def test_a_useless_draft_costs_a_few_percent(cost, rows, tells):
    for seed in range(5):
        rig = Rig(cost, wider=0.05, rows=rows, tells=tells, seed=seed)
        speed_up = rig.run(Adaptive(Timings()), 0.0, 256)
        assert speed_up > 0.975
    assert sum(guesses > 0 for guesses, _ in rig.rounds) >= 4  # it does look again


def test_a_draft_that_is_fed_what_it_missed_at_a_price_is_seldom_asked():
    """Sixteen rows: every round without the draft will cost it a third of a round to catch up on."""
    rule, missed, seconds = Adaptive(Timings()), 0, 0.0
    for _ in range(400):
        drafted = min(rule.next(16), 1)
        spent = 1 + drafted * (0.3 + missed / 3)
        missed = 0 if drafted else missed + 1
        seconds += spent
        rule.observe(outcome(drafted, np.zeros(16, dtype=np.int64)), spent)
    assert seconds < 1.05 * 400


@pytest.mark.parametrize("prompt", [0.0, 8.0])
@pytest.mark.parametrize(("catching_up", "often"), [(0.015, True), (0.05, False)])
def test_what_a_useless_draft_missed_decides_how_often_it_is_asked_and_its_first_prompt_does_not(
    prompt, catching_up, often
):
    """Seconds of a round that the draft was not in, which its next one takes."""
    rule, probes, missed = Adaptive(Timings()), 0, 0
    rule.fed(prompt, 1, 1000)
    for _ in range(400):
        spent = 1.0
        drafted = min(rule.next(400), 1)
        if drafted:
            assert rule.begins(None if probes else Opening(0.1, 0.2))
            spent += 0.2 + (missed * catching_up if probes else 0.1 * prompt)
            probes += 1
        missed = 0 if drafted else missed + 1
        rule.observe(outcome(drafted, np.zeros(1, dtype=np.int64)), spent)
    assert (probes > 7) == often


def test_a_probe_kept_by_chance_does_not_make_the_next_ones_frequent():
    rule, probes, kept = Adaptive(Timings()), [], [0, 0, 0, 1, 0, 0]
    for number in range(250):
        drafted = rule.next(16)
        accepted = kept[len(probes)] if drafted and len(probes) < len(kept) else 0
        probes += [number] * drafted
        rule.observe(outcome(drafted, np.array([accepted])), 1 + 0.5 * drafted)
    assert np.diff(probes[:6]).tolist() == [1, 25, 49, 1, 49]


@pytest.mark.parametrize("cost", [0.05, 0.4])
@pytest.mark.parametrize("rows", [1, 16])
def test_a_draft_that_becomes_good_is_found_within_64_tokens(cost, rows):
    for seed in range(8):
        rig = Rig(cost, rows=rows, seed=seed)
        rule = Adaptive(Timings())
        rig.run(rule, 0.0, 256)
        rig.rounds.clear()
        rig.run(rule, 0.97, 64 + 16)
        guesses = [drafted for drafted, _ in rig.rounds]
        plain = sum(drafted == 0 for drafted in guesses)
        assert plain <= 64
        assert guesses[-1] >= 2


@pytest.mark.parametrize("acceptance", [0.5, 0.7, 0.85, 0.95])
@pytest.mark.parametrize(("cost", "wider"), [(0.02, 0.0), (0.1, 0.02), (0.3, 0.0), (0.05, 0.3)])
def test_nearly_as_fast_as_the_best_fixed_length(acceptance, cost, wider):
    best = max(speed(acceptance, cost + wider, guesses) for guesses in range(17))
    reached = [Rig(cost, wider, seed=seed).run(Adaptive(Timings()), acceptance, 400) for seed in range(6)]
    assert np.mean(reached) > 0.9 * best
    assert np.mean(reached) < ceiling(acceptance, cost + wider) * 1.05


def test_a_draft_that_knows_its_chances_beats_every_fixed_length():
    """Guesses are sure or hopeless, and the draft knows which: it must stop behind the first hopeless one."""
    cost, random = 0.3, np.random.default_rng(1)
    rule, seconds, tokens = Adaptive(Timings()), 0.0, 0.0
    for _ in range(400):
        asked, chances = rule.next(16), []
        while len(chances) < asked:
            chances.append(0.97 if random.random() < 0.7 else 0.05)
            if not rule.goes_on(np.array([chances[-1]])):
                break
        kept = (random.random(len(chances)) < np.array(chances)).cumprod().sum()
        spent = 1 + cost * len(chances)
        rule.observe(outcome(len(chances), np.array([kept])), spent)
        seconds, tokens = seconds + spent, tokens + kept + 1
    alike = 0.7 * 0.97 + 0.3 * 0.05
    assert tokens / seconds > 1.08 * max(speed(alike, cost, guesses) for guesses in range(17))


def test_what_was_learnt_serves_the_next_call():
    memory = Memory()
    rig = Rig(0.05)
    rig.run(memory.recall(1, False), 0.9, 100)
    assert memory.recall(1, False).next(16) > 2
    assert memory.recall(2, False).next(16) == 0  # another kind of call: a plain round comes first
    assert memory.recall(1, True).next(16) == 0


@pytest.mark.parametrize("acceptance", [0.0, 0.7])
def test_assumed_costs_do_not_listen_to_the_clock(acceptance):
    found = []
    for slow in (0.01, 1.0, 50.0):
        rule, rig, lengths = Adaptive(Assumed(0.2)), Rig(0.2, seed=3), []
        rule.fed(slow, 1, 10)
        for _ in range(200):
            asked = rule.next(16)
            accepted = (rig.random.random((1, 16)) < acceptance).cumprod(axis=1).sum(axis=1).clip(max=asked)
            rule.observe(outcome(asked, accepted), slow)
            lengths.append(asked)
        found.append(lengths)
    assert found[0] == found[1] == found[2]
    assert sum(asked > 0 for asked in found[0]) > 3


def test_where_costs_are_assumed_a_prompt_may_take_as_long_as_it_likes():
    begins = []
    for slow in (0.01, 1e4):
        rule = Adaptive(Assumed(0.2))
        rule.fed(slow, 1, 10)
        rule.next(16)
        begins.append(rule.begins(Opening(0.1, 0.1)))
    assert begins == [True, True]


def test_never_more_than_there_is_room_for():
    rule, rig = Adaptive(Timings()), Rig(0.01)
    rig.run(rule, 0.95, 60)
    assert rule.next(3) == 3
    assert rule.next(0) == 0
    probing = Adaptive(Assumed(0.9))
    while not probing.next(16):
        probing.observe(outcome(0, np.zeros(1, dtype=np.int64)), 1.0)
    assert probing._probing
    assert probing.next(0) == 0


def test_a_round_without_guesses_is_no_evidence_of_cost_for_a_draft_that_copies():
    """Nothing found, nothing guessed: the round was a plain one, and drafting stays on."""
    rule = Adaptive(Timings())
    found = [False] * 20 + [True] * 6
    for hit in found:
        asked = rule.next(16)
        drafted = asked if hit else 0
        rule.observe(outcome(drafted, np.array([drafted])), 1 + 0.01 * drafted)
    assert rule.next(16) >= 2


def test_rows_that_another_proposer_guessed_for_say_nothing_of_the_draft_chances():
    acceptance = Acceptance(4)
    for _ in range(20):  # row 0: the draft, sure and right; row 1: somebody else, right and without a chance
        acceptance.add(2, np.array([2, 2]), np.array([2, 2]), [np.array([0.9, 0.0])] * 2)
    assert acceptance.of_chance(np.array([0.0]))[0] == 0.0
    assert acceptance.of_chance(np.array([0.9]))[0] > 0.95


def test_survival_falls_and_borrows():
    acceptance = Acceptance(6)
    for _ in range(10):
        acceptance.add(3, np.array([3, 3]), np.array([3, 2]), [])
    survival = acceptance.survival()
    assert (np.diff(survival) <= 0).all()
    assert survival[0] > 0.95
    assert 0.4 < survival[2] < 0.65
    assert 0 < survival[5] < survival[2]  # never asked for: from its neighbours
    assert LONGEST_WAIT < 64


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize(("cost", "acceptance"), [(1.5, 0.95), (1.1, 0.8), (0.9, 0.8)])
def test_a_good_draft_that_is_too_dear_costs_a_few_percent(cost, acceptance, tells, rows):
    """Kept probes must not be confirmed for ever: what is kept may still not be worth its price."""
    speeds = []
    for seed in range(6):
        speeds.append(Rig(cost, rows=rows, tells=tells, seed=seed).run(Adaptive(Timings()), acceptance, 256))
    assert np.mean(speeds) > 0.97


@pytest.mark.parametrize("tells", [False, True])
def test_plain_rounds_that_have_become_faster_are_noticed_while_drafting(tells):
    """A neighbour slowed the first rounds down: by their seconds drafting pays, by those of now it does not."""
    rule, rig = Adaptive(Timings()), Rig(0.95, tells=tells)
    rule.next(16)
    rule.observe(outcome(0, np.zeros(1, dtype=np.int64)), 1.4)
    rig.run(rule, 0.85, 12)
    assert np.mean([guesses > 0 for guesses, _ in rig.rounds]) > 0.8
    # what was timed once only is timed again soon
    rig.run(rule, 0.85, 150)
    assert rig.run(rule, 0.85, 200) > 0.98


def test_a_batch_must_promise_more_than_a_row():
    """Eight rows end when the slowest does: a few percent more in the mean are none at the end."""
    asked = {1: [], 8: []}
    for rows, shares in asked.items():
        for seed in range(6):
            rule, rig = Adaptive(Timings()), Rig(0.7, rows=rows, seed=seed)
            rig.run(rule, 0.85, 300)
            shares.append(np.mean([guesses > 0 for guesses, _ in rig.rounds[-100:]]))
    assert np.mean(asked[1]) > 2 * np.mean(asked[8])


def opened(
    rule, *, room, opening=0.3, prompt=8.0, columns=1000, rounds=60, acceptance=0.8, cost=0.3, seed=0, rows=1,
    disturbed=0.0,
):  # fmt: skip
    """The rounds in which a draft that has a prompt to feed was let guess."""
    random, guessed = np.random.default_rng(seed), []
    rule.fed(prompt, rows, columns)
    for number in range(rounds):
        asked = rule.next(room - number)
        drafted, pay = 0, 0.0
        if asked and rule.begins(None if guessed else Opening(opening, cost)):
            drafted, pay = asked, 0.0 if guessed else opening * prompt
            guessed.append(number)
        kept = (random.random((rows, drafted)) < acceptance).cumprod(axis=1).sum(axis=1)
        rule.observe(outcome(drafted, kept), 1 + (cost + disturbed) * drafted + pay)
    return guessed


def test_a_draft_is_not_fed_a_prompt_that_the_rest_of_the_text_cannot_earn():
    assert not opened(Adaptive(Timings()), room=8, rounds=8)  # 2.4 rounds for the prompt, 8 to go
    assert not opened(Adaptive(Timings()), room=12, rounds=12)  # nor is what they may just earn worth the risk
    assert opened(Adaptive(Timings()), room=18, rounds=12)[0] == 1
    assert opened(Adaptive(Timings()), room=64)[0] == 1
    assert opened(Adaptive(Timings()), room=8, rounds=8, prompt=1.0)[0] == 1  # a short prompt
    endless = {"room": 10**6, "rounds": 40, "prompt": 10_000.0, "columns": 10**6}
    assert not opened(Adaptive(Timings()), **endless)  # no text is taken to be
    # prompts of one token and of a few, as decoders behind an encoder have them, say little of what a token costs
    assert opened(Adaptive(Timings()), room=64, prompt=1.0, columns=1)[0] == 1
    assert opened(Adaptive(Timings()), room=64, prompt=1.2, columns=4)[0] == 1
    # neither do those of a process that has just begun
    assert opened(Adaptive(Timings()), room=64, prompt=6.0, columns=14)[0] == 1
    # a seed promises a text that hangs on no clock
    assert opened(Adaptive(Assumed(0.2)), room=8, rounds=8)[0] == 0


def test_a_draft_is_not_fed_where_passes_that_check_guesses_would_multiply_rather_than_read():
    """A token of 0.2 plain rounds: passes of up to 5 are free, and four rows with a guess each are 8."""
    prompts = {"columns": 100, "room": 96, "opening": 0.01}  # it is not for their price
    assert opened(Adaptive(Timings()), prompt=20.0, **prompts)[0] == 1
    assert not opened(Adaptive(Timings()), prompt=80.0, rows=4, **prompts)
    assert opened(Adaptive(Timings()), prompt=4.0, rows=4, **prompts)[0] == 1  # all reading
    assert opened(Adaptive(Timings()), prompt=20.0, rows=4, **prompts)[0] == 1  # a token is a twentieth of a pass
    # bfloat16 without instructions for it: every token costs nearly a pass
    assert not opened(Adaptive(Timings()), prompt=80.0, **prompts)


def test_what_a_draft_stopped_short_of_does_not_count_against_its_prompt():
    """A draft that tells its chances is asked for many guesses and stopped in time: the rest it did not miss."""
    memory = Memory()
    Rig(0.5, rows=8, tells=True).run(memory.recall(8, False), 0.9, 60)
    assert opened(memory.recall(8, False), room=64, rows=8, acceptance=0.9, cost=0.5, rounds=10)[:1] == [0]


# milliseconds of a 1.5B model in float32 on two cores with AVX2, by tokens in a pass
STEEP_THEN_FLAT = [
    396, 852, 1216, 1188, 1336, 1352, 1477, 1071, 1329, 1519, 1496, 1474, 1501, 1528, 1585, 1643, 1702,
]  # fmt: skip


def copied(acceptance: float, rounds: int, prompt: float, seed: int = 0) -> float:
    """Speed against plain decoding where the second token of a pass is dear and others are not."""
    random, rule = np.random.default_rng(seed), Adaptive(Timings())
    rule.fed(prompt, 1, 330)
    tokens = seconds = 0.0
    for _ in range(rounds):
        drafted = rule.next(200)
        kept = int((random.random(drafted) < acceptance).cumprod().sum())
        took = STEEP_THEN_FLAT[drafted] / STEEP_THEN_FLAT[0]
        rule.observe(outcome(drafted, np.array([kept])), took)
        tokens, seconds = tokens + kept + 1, seconds + took
    return tokens / seconds


def test_a_pass_over_two_tokens_says_little_of_one_over_sixteen():
    assert copied(0.98, 40, prompt=21.0) > 2
    assert np.mean([copied(0.8, 60, prompt=21.0, seed=seed) for seed in range(8)]) > 0.95
    assert copied(0.0, 256, prompt=21.0) > 0.965  # a look every 48 rounds, at 1.15 plain ones each
    # a model that guesses costs more with every guess
    rule = Adaptive(Timings())
    rule.fed(21.0, 1, 330)
    rule.observe(outcome(0, np.zeros(1, dtype=np.int64)), 1.0)
    rule.next(200)
    assert rule.begins()
    rule.observe(outcome(1, np.ones(1, dtype=np.int64)), 1.5)
    assert rule.next(200) < 4
    assert not rule.begins(Opening(100.0, 0.3)), "another one has a prompt that earns nothing"
    assert rule._wider() == np.inf
    tells = Adaptive(Timings())
    assert tells._wider() == np.inf, "nor does a prompt that was not timed say anything"
    tells.fed(21.0, 1, 330)
    assert tells._wider() < 1
    tells.goes_on(np.array([0.9]))
    assert tells._wider() == np.inf
    # a prompt that is as dear as that promises nothing of the kind
    assert copied(0.98, 40, prompt=330.0) < 1.1


def test_what_a_draft_was_not_asked_is_not_held_against_it():
    memory = Memory()
    for _ in range(5):
        assert not opened(memory.recall(1, False), room=8, rounds=8)
    assert opened(memory.recall(1, False), room=200)[0] == 0


@pytest.mark.parametrize(("disturbed", "again"), [(1.0, 4), (3.0, 6)])
def test_short_calls_together_wait_for_a_draft_whose_first_rounds_were_disturbed(disturbed, again):
    """None of them alone may pay for its prompt, 2.4 rounds of their 60; what seems hopeless waits for 384."""
    memory, tried = Memory(), []
    for call in range(10):
        more = 0.0 if call else disturbed
        rounds = opened(memory.recall(1, False), room=60, acceptance=0.9, cost=0.1, disturbed=more)
        tried.append(len(rounds))
    assert 0 < tried[0] < 5
    assert not any(tried[1:again])
    assert min(tried[again:]) > 30, "one look is enough to see what it takes"


def test_a_draft_that_was_told_not_to_guess_was_not_tried_in_any_row():
    rule = Adaptive(Timings())
    assert not opened(rule, room=8, rounds=8, rows=2)
    assert not rule._differing._tried.any()


def refused():
    """A controller that has just told a draft with a long prompt not to guess."""
    rule = Adaptive(Timings())
    rule.fed(100.0, 1, 10)
    rule.observe(outcome(0, np.zeros(1, dtype=np.int64)), 1.0)
    assert rule.next(4) == 1
    assert not rule.begins(Opening(1.0, 0.3))
    return rule


def test_that_a_draft_was_told_not_to_guess_holds_for_its_round_and_for_no_other_draft():
    rule = refused()
    expected = rule._acceptance.survival()[0]
    rule.observe(outcome(1, np.ones(1, dtype=np.int64)), 1.2)
    assert rule._acceptance.survival()[0] > expected, "another one guessed"
    rule = refused()
    for looked_for in (False, True):
        rule.observe(outcome(0, np.zeros(1, dtype=np.int64)), 1.0)
        assert (rule._acceptance.survival()[0] < expected) == looked_for, "in the second round nothing was found"
        assert rule.next(4) == 1


def test_guesses_that_were_only_foreseen_say_nothing_of_drafts():
    rule = Adaptive(Timings())
    for width, seconds in ((0, 1.0), (2, 3.0), (2, 3.0)):
        rule.next(16)
        rule._asked = width
        rule.observe(outcome(width, np.array([width])), seconds)
        others = rule._others
    rule.next(0)
    rule.observe(outcome(2, np.array([2])), 1.1)
    assert rule._timings.table(2)[2] == 3.0
    fresh = Adaptive(Timings())
    assert fresh.next(16) == 0
    fresh.observe(outcome(2, np.array([2])), 1.1)
    assert (others, fresh._others) == (True, False)


def test_a_round_in_which_a_draft_found_nothing_is_no_other_drafts():
    """What its rounds have brought in other texts goes on to promise that its prompt will be earned."""
    memory = Memory()
    Rig(0.1).run(memory.recall(1, False), 0.98, 200)
    rule = memory.recall(1, False)
    rule.fed(3.0, 1, 1000)
    assert rule.next(30) > 0
    rule.observe(outcome(0, np.zeros(1, dtype=np.int64)), 1.0)
    assert rule.next(30) > 0
    assert rule.begins(Opening(1.0, 0.9))


def test_foreseen_guesses_are_judged_up_to_the_first_wrong_one():
    """Three of six are kept: the fourth is wrong, and of the others nobody knows."""
    rule = Adaptive(Timings())
    for width in (0, 6) * 30:
        rule.next(0)
        rule.observe(outcome(width, np.array([width // 2])), 1 + 0.6 * width)
    assert rule.free(np.array([1])) == 1
    assert rule.free(np.array([0])) == rule.free(np.array([], dtype=np.int64)) == 0
    assert Adaptive(Assumed(0.0)).free(np.array([40])) == rule.most


def test_a_row_that_has_ended_has_no_guess_to_judge():
    rule = Adaptive(Timings())
    for width in (0, 1):
        rule.next(16)
        if width:
            rule.goes_on(np.array([0.9, 0.0]))
        live = replace(outcome(width, np.array([width, 0])), counts=np.array([1 + width, 0]))
        rule.observe(live, 1 + 0.2 * width)
    assert rule._learnt.told[1].of_chance(np.array([0.9]))[0] > 0.9


def test_a_probe_is_the_models_where_another_draft_guesses_as_well():
    rule, begun = Adaptive(Assumed(0.9)), []
    for _ in range(60):
        asked = rule.next(16)
        if asked:
            begun.append(rule.begins())
        rule.observe(outcome(asked, np.zeros(1, dtype=np.int64)), 1.0)  # guessed without a chance told
    assert begun == [True] * 2


# (rounds, guesses kept of four, plain rounds a guess, whether chances were told), one after the other
OF_BOTH = {
    "bad": [(20, 0, 0.8, True), (40, 4, 0.01, False)],
    "good": [(20, 4, 0.2, True), (40, 0, 0.8, False)],
    "unknown": [(60, 0, 0.01, False)],
}


@pytest.mark.parametrize("model", OF_BOTH)
def test_what_copies_gained_is_no_promise_of_a_model_with_a_prompt_to_feed(model):
    """Nor is what they lost held against it, or the seconds of its prompt against its first guess."""
    rule = Adaptive(Timings())
    for rounds, kept, cost, tells in [(1, 0, 0.0, False), *OF_BOTH[model], (60, 0, 0.0, False)]:
        for _ in range(rounds):
            rule.next(64)
            rule._asked = width = 4 if cost else 0
            if tells:
                rule.goes_on(np.array([0.5]))
            rule.observe(outcome(width, np.array([kept])), 1 + cost * width)
    rule.fed(8.0, 1, 1000)
    assert rule.next(64) > 0
    # the good one reads as much as the target, but is known to take a fifth of its time
    assert rule.begins(Opening(0.3, 0.25 if model == "unknown" else 1.0)) == (model != "bad")
    if model == "good":
        assert rule._probing
        rule.goes_on(np.array([0.5]))
        rule.observe(outcome(1, np.ones(1, dtype=np.int64)), 1.2 + 0.3 * 8.0)
        assert rule._missed < 0.01


def test_a_sure_guess_of_a_row_that_is_ahead_does_not_pay_for_the_others():
    """Both end with the slower one, whose guesses are lost."""
    rule, made = Adaptive(Timings()), []
    for _ in range(60):
        made.append(0)
        if rule.next(16):
            made[-1] = 1
            while rule.goes_on(np.array([0.97, 0.01])):
                made[-1] += 1
        rule.observe(outcome(made[-1], np.array([made[-1], 0])), 1 + 0.05 * made[-1])
    assert np.mean(made[30:]) < 1.5
    assert any(made[30:])


@pytest.mark.parametrize("tells", [False, True])
def test_a_draft_that_tells_its_chances_is_asked_for_as_many_as_there_may_be(tells):
    """It is stopped in time."""
    rule = Adaptive(Timings())
    Rig(0.2, tells=tells).run(rule, 0.7, 100)
    assert (rule.next(16) == 16) == tells
    assert 0 < rule.next(2) <= 2


def test_a_draft_that_seldom_finds_a_copy_is_asked_as_long_as_it_costs_little_more_to_look():
    """A guess that is not made takes no time."""
    rule, asked = Adaptive(Timings()), []
    for number in range(200):
        asked.append(rule.next(16))
        drafted = asked[-1] if number % 8 == 0 else 0
        rule.observe(outcome(drafted, np.array([drafted])), 1 + 0.15 * drafted)
    assert np.mean(np.array(asked[100:]) > 0) > 0.8


def test_a_probe_may_cost_its_share_of_the_rounds_before_it_and_must_be_fed_what_every_row_has_got_since():
    """Four rows, a plain round for every token of their prompts, and a draft of a thousandth of the work."""
    rule = Adaptive(Timings())
    rule.fed(3.0 + 4 * 25, 4, 26)
    for number in range(200):
        rule.next(1000)
        # a guess is too dear to promise a gain: 0.001 × (103 + 4 n) of n / 100
        if number and rule.begins(Opening(0.001, 5.0)):
            break
        rule.observe(outcome(0, np.zeros(4, dtype=np.int64)), 1.0)
    assert number == 18


def test_a_rule_within_another_knows_nothing_of_its_clock():
    rule = Adaptive(Timings())
    Rig(0.05).run(rule, 0.9, 60)
    assert rule.next(16) > 0
    assert rule.within().next(16) == 0
    assert Adaptive(Assumed(0.05)).within().next(16) > 0


def test_a_plain_round_is_timed_again_the_sooner_the_less_it_is_known():
    rule, rig = Adaptive(Timings()), Rig(0.02)
    for _ in range(260):
        rig.round(rule, 1.0)
    plain = [number for number, (guesses, _) in enumerate(rig.rounds) if not guesses]
    assert np.diff(plain).tolist() == [41, 78, 117]


def test_a_probe_does_not_wait_for_a_plain_round_that_was_long_ago():
    """A grammar foresees tokens in every round of a text, so there is none that is plain."""
    memory, rig, asked = Memory(), Rig(0.6), []
    for acceptance, tokens in (*[(0.0, 60)] * TEXTS, (1.0, 600)):
        rig.run(memory.recall(1, False), acceptance, tokens)
    rule = memory.recall(1, False)
    assert rule._timings.age > STALE
    for _ in range(LONGEST_WAIT):
        asked.append(rule.next(16))
        rule.observe(outcome(2, np.array([0 if asked[-1] else 2])), 1.1)
    assert asked[0] == 0
    assert any(asked)


@pytest.mark.parametrize("cost", [0.02, 0.5])
def test_a_draft_that_pays_is_asked_although_no_round_is_plain(cost):
    """A grammar foresees a token in every round, so a plain round that is asked for never comes."""
    rule, rig = Adaptive(Timings()), Rig(cost)
    rig.run(rule, 1.0, 60)
    asked = []
    for _ in range(1000):
        asked.append(rule.next(16))
        width = asked[-1] or 1
        rule.observe(outcome(width, np.array([width])), 1 + cost * asked[-1])
    assert all(asked[place : place + 8] != [0] * 8 for place in range(1000))
    assert 5 <= asked.count(0) <= 30, "what a plain round takes is asked for again, and seldom"


def switched_off(cost, rounds=60):
    """A rule for eight rows that has seen nothing kept."""
    rule, rig = Adaptive(Timings()), Rig(cost, rows=8)
    for _ in range(rounds):
        rig.round(rule, 0.0)
    return rule


@pytest.mark.parametrize(("missed", "confirmed"), [(0, True), (1, True), (4, False), (8, False)])
def test_a_probe_that_most_rows_keep_is_confirmed(missed, confirmed):
    """A row that misses once is no slow one: of eight rows some miss in most rounds that pay."""
    rule = switched_off(0.45)
    while not rule.next(16):
        rule.observe(outcome(0, np.zeros(8, dtype=np.int64)), 1.0)
    rule.observe(outcome(1, np.array([0] * missed + [1] * (8 - missed))), 1.45)
    assert (rule.next(16) > 0) is confirmed


def test_rows_that_keep_nothing_are_known_after_a_few_probes():
    rule, rounds = switched_off(0.45), 600
    kept, asked = np.array([0, 0, 1, 1, 1, 1, 1, 1]), 0
    for _ in range(rounds):
        width = min(rule.next(16), 1)
        asked += width
        rule.observe(outcome(width, kept * width), 1 + 0.45 * width)
    assert 0 < asked < 0.04 * rounds


def test_a_draft_known_to_be_useless_is_not_fed_again_for_a_probe():
    memory = Memory()
    times = [opened(memory.recall(1, False), room=300, acceptance=0.0, rounds=200) for _ in range(TEXTS + 1)]
    assert times[0][0] == 1
    assert not times[-1]  # its prompt costs 2.4 plain rounds, and probes may cost a hundredth of all


class TwoDrafts:
    """Every other round a text is copied, wide and cheap and right; in between a model guesses, and tells."""

    def __init__(self, cost: float, acceptance: float, seed: int = 0):
        self.cost, self.acceptance = cost, acceptance
        self.random = np.random.default_rng(seed)
        self.guessed: list[int] = []  # of the model, in its rounds

    def run(self, rule: Adaptive, rounds: int) -> None:
        for number in range(rounds):
            asked = rule.next(16)
            copies = number % 2 == 0
            drafted, cost = (min(asked, 12), 0.01) if copies else (0, self.cost)
            if not copies and asked and rule.begins():
                drafted = 1
                while rule.goes_on(np.full(1, self.acceptance)):
                    drafted += 1
            right = np.ones(drafted) if copies else self.random.random(drafted) < self.acceptance
            kept = np.array([int(right.cumprod().sum())])
            rule.observe(outcome(drafted, kept), 1 + cost * drafted)
            if not copies and asked:
                self.guessed.append(drafted)


def test_cheap_rounds_of_another_draft_do_not_hide_what_a_model_costs():
    both = TwoDrafts(cost=0.4, acceptance=0.75)
    both.run(Adaptive(Timings()), 200)
    # 12 copied tokens a round raise the rate to several tokens a plain round: a guess at 0.4 of one hardly pays
    assert np.mean(both.guessed[20:]) < 2
    cheap = TwoDrafts(cost=0.02, acceptance=0.9)
    cheap.run(Adaptive(Timings()), 200)
    assert np.mean(cheap.guessed[20:]) > 3


def test_a_model_that_does_not_pay_is_left_alone_where_another_draft_does():
    both = TwoDrafts(cost=0.8, acceptance=0.02)
    both.run(Adaptive(Timings()), 400)
    assert np.mean(np.array(both.guessed[20:]) > 0) < 0.06
    assert any(both.guessed[100:])  # it does look again
    both.acceptance, both.cost, both.guessed = 0.99, 0.01, []
    rule = Adaptive(Timings())
    both.run(rule, 200)
    assert np.mean(both.guessed[-20:]) > 3


def batch(rule: Adaptive, acceptance: list[float], length: int, cost: float, seed: int) -> float:
    """Plain seconds over those of a batch whose rows keep ``acceptance`` of their guesses and end at ``length``."""
    random = np.random.default_rng(seed)
    chances = np.array(acceptance)
    left = np.full(len(chances), length - 1)
    seconds = 0.0
    while left.any():
        drafted = rule.next(max(int(left.max()) - 1, 0))
        lengths = np.where(left > 0, np.minimum(drafted, left - 1), 0).clip(min=0)
        kept = (random.random((len(chances), max(drafted, 1))) < chances[:, None]).cumprod(axis=1).sum(axis=1)
        accepted = np.minimum(kept, lengths)
        counts = np.where(left > 0, accepted + 1, 0)
        left = left - counts
        spent = 1 + cost * int(lengths.max())
        seconds += spent
        rule.observe(replace(outcome(drafted, accepted), lengths=lengths, counts=counts), spent)
    return (length - 1) / seconds


@pytest.mark.parametrize("slow", [1, 2, 7])
@pytest.mark.parametrize(("cost", "least"), [(0.2, 0.88), (0.45, 0.94)])
def test_rows_that_gain_do_not_make_the_others_wait(slow, cost, least):
    """Some of eight rows copy and some cannot: the batch ends with those, and guesses make their rounds dearer."""
    acceptance = [0.97] * (8 - slow) + [0.0] * slow
    found = [batch(Adaptive(Timings()), acceptance, 128, cost, seed) for seed in range(4)]
    assert np.mean(found) > least


def test_what_was_learnt_of_rows_that_have_ended_does_not_speak_for_the_others():
    survival = 0.9 ** np.arange(1, 5)
    rows = Rows()
    for _ in range(20):
        rows.see(4, np.array([True, True, True]), np.array([4, 4, 0]))
    together, weights = rows.pace(survival)
    assert weights[4].argmax() == 2
    rows.see(4, np.array([False, False, True]), np.array([0, 0, 0]))
    alone, weights = rows.pace(survival)
    assert alone[4] < together[4] < tokens_per_round(survival)[4]
    assert alone[4] < 1.2
    assert weights[4].tolist()[:2] == [0, 0]
    assert weights[4][2] == pytest.approx(1)


def test_rows_that_are_alike_are_one_row_many_times():
    survival = 0.8 ** np.arange(1, 5)
    rows = Rows()
    rows.see(4, np.array([True, True]), np.array([3, 3]))
    tokens, weights = rows.pace(survival)
    assert tokens == pytest.approx(tokens_per_round(survival))
    assert weights == pytest.approx(np.ones((5, 2)))
    alone, weights = Rows().pace(survival)
    assert alone == pytest.approx(tokens_per_round(survival))
    assert weights == pytest.approx(np.ones((5, 1)))


@pytest.mark.parametrize("known", [False, True])
def test_a_batch_is_guessed_for_in_narrow_rounds_first(known):
    """Also where earlier calls make wide ones look good: whether this text's rows differ, none of them says."""
    memory = Memory()
    if known:
        Rig(0.05, rows=8, tells=True).run(memory.recall(8, False), 0.95, 200)
    rule, rig = memory.recall(8, False), Rig(0.05, rows=8, tells=True)
    rule.fed(8.0, 8, 40)
    rig.run(rule, 0.95, 200)
    widths = [width for width, _ in rig.rounds if width]
    assert widths[0] == 1
    assert all(width <= 1 + np.ceil(place / 4) for place, width in enumerate(widths))
    assert max(widths) >= 8, "in the end as many as pay"
    alone, rig = memory.recall(1, False), Rig(0.05, tells=True)
    alone.fed(1.0, 1, 40)
    rig.run(alone, 0.95, 40)
    assert max(width for width, _ in rig.rounds[:8]) >= 8, "a single row waits for no other"


# --- what is counted --------------------------------------------------------------------------------


def counted(rounds, *, asked, lengths, kept, chances=(), of=None, most=4):
    """Evidence of so many equal rounds, behind that of others."""
    acceptance = Acceptance(most) if of is None else of
    for _ in range(rounds):
        acceptance.add(asked, np.array(lengths), np.array(kept), [np.array(one) for one in chances])
    return acceptance


def test_a_round_of_many_rows_counts_as_one_of_a_few():
    few, many = (
        counted(1, asked=2, lengths=[2, 2] * n, kept=[2, 0] * n, chances=[[0.9, 0.9] * n]) for n in (2, 16)
    )
    assert many.survival() == pytest.approx(few.survival())
    assert many.overall == pytest.approx(few.overall)
    assert many.of_chance(np.array([0.9])) == pytest.approx(few.of_chance(np.array([0.9])))
    # four guesses that were to be kept with 0.9, of which two were, beside what the draft itself says
    assert few.of_chance(np.array([0.9])) == pytest.approx((2 + BIN_WEIGHT * 0.9) / (4 + BIN_WEIGHT))


def test_a_round_in_which_no_row_was_live_says_nothing():
    acceptance, rows, survival = counted(3, asked=2, lengths=[2], kept=[1]), Rows(), 0.8 ** np.arange(1, 3)
    before = acceptance.survival()
    counted(1, asked=2, lengths=[], kept=[], of=acceptance)
    assert acceptance.survival().tolist() == before.tolist()
    rows.see(2, np.array([True, True]), np.array([2, 0]))
    rows.see(2, np.array([False, False]), np.array([0, 0]))
    tokens, weights = rows.pace(survival)
    assert (tokens.tolist(), weights.tolist()) == (tokens_per_round(survival).tolist(), [[1]] * 3)


def test_only_what_was_submitted_behind_kept_guesses_is_judged():
    short = counted(20, asked=3, lengths=[1], kept=[1])  # nothing was there to follow, which is no fault of a guess
    assert short.overall > 0.95
    assert short.survival()[1] < 0.2
    mixed = counted(20, asked=3, lengths=[3, 3], kept=[3, 0])
    assert mixed.overall == pytest.approx(0.75, abs=0.01)


def test_chances_of_guesses_that_were_not_submitted_are_not_looked_at():
    acceptance = counted(20, asked=2, lengths=[1], kept=[1], chances=[[0.9], [0.9]])
    assert acceptance.of_chance(np.array([0.9]))[0] > 0.95
    behind = counted(20, asked=2, lengths=[2], kept=[0], chances=[[0.2], [0.9]])
    assert behind.of_chance(np.array([0.9]))[0] == 0.9, "nor at those behind a wrong one"


def test_a_draft_may_be_certain():
    wrong = counted(20, asked=1, lengths=[1], kept=[0], chances=[[1.0]])
    assert wrong.of_chance(np.array([1.0]))[0] < 0.3


def test_what_was_submitted_lately_says_how_wide_a_round_becomes():
    acceptance = counted(20, asked=2, lengths=[2, 0], kept=[0, 0])
    assert acceptance.widths()[:2].min() > 0.9, "a round is as wide as its widest row"
    assert counted(60, asked=2, lengths=[0, 0], kept=[0, 0], of=acceptance).widths()[:2].max() < 0.1


def test_what_is_believed_fades():
    acceptance = counted(40, asked=1, lengths=[1], kept=[1], chances=[[0.6]])
    counted(40, asked=1, lengths=[1], kept=[0], chances=[[0.6]], of=acceptance)
    assert acceptance.survival()[0] < 0.2
    assert acceptance.overall < 0.2
    assert acceptance.of_chance(np.array([0.6]))[0] < 0.2


def test_doubt_leaves_the_worth_of_two_rounds_and_adds_nothing_to_one():
    acceptance = counted(40, asked=1, lengths=[1], kept=[0], chances=[[0.9]])
    acceptance.doubt()
    assert acceptance.overall == pytest.approx(PRIOR_WEIGHT * PRIOR / (DOUBT + PRIOR_WEIGHT))
    assert acceptance.survival()[0] == pytest.approx(PRIOR * (PRIOR_WEIGHT / (DOUBT + PRIOR_WEIGHT)) ** 2)
    assert acceptance.of_chance(np.array([0.9])) == pytest.approx(BIN_WEIGHT * 0.9 / (DOUBT + BIN_WEIGHT))
    little = counted(1, asked=1, lengths=[1], kept=[0])
    before = little.overall
    little.doubt()
    assert little.overall == before


def test_a_text_begins_with_what_others_had_tried_and_submitted_and_with_some_trust_in_chances():
    acceptance = Acceptance(4)
    for _ in range(TEXTS):
        counted(40, asked=2, lengths=[1], kept=[1], chances=[[0.3]], of=acceptance)
        acceptance = acceptance.another_text()
    # of two guesses that were asked for one came, and was kept
    assert acceptance.survival()[0] == pytest.approx((1.5 + TEXT_PRIOR * PRIOR) / (TEXT_WEIGHT + TEXT_PRIOR))
    assert acceptance.overall == pytest.approx((3 + TEXT_PRIOR * PRIOR) / (TEXT_WEIGHT + TEXT_PRIOR))
    trust = (DOUBT + BIN_WEIGHT * 0.3) / (DOUBT + BIN_WEIGHT)
    assert acceptance.of_chance(np.array([0.3])) == pytest.approx(trust, rel=0.01)


def test_the_last_texts_count_and_no_longer_the_first():
    for kept, wanted in (([1] * 2 + [0] * TEXTS, False), ([0] * TEXTS + [1] * 2, True)):
        acceptance = Acceptance(4)
        for one in kept:
            acceptance = counted(20, asked=1, lengths=[1], kept=[one], of=acceptance).another_text()
        assert (acceptance.survival()[0] > 0.8) == wanted
        assert (acceptance.survival()[0] < 0.3) != wanted


def test_a_text_in_which_nothing_was_tried_lets_others_fade_and_does_not_push_them_out():
    acceptance, said = counted(20, asked=1, lengths=[1], kept=[1]), []
    for _ in range(TEXTS + 1):
        acceptance = acceptance.another_text()
        said.append(float(acceptance.survival()[0]))
    assert said == sorted(set(said), reverse=True)
    assert said[-1] > PRIOR + 0.05


def test_rows_are_told_apart_by_what_each_of_them_kept_while_it_was_live():
    rows, survival = Rows(), 0.9 ** np.arange(1, 5)
    rows.see(4, np.array([True, True, True]), np.array([4, 1, 0]))
    rows.see(0, np.array([True, True, True]), np.array([2, 0, 2]))  # foreseen, and so nothing that was asked for
    rows.see(4, np.array([True, True, False]), np.array([4, 0, 0]))
    tried, kept = FADE * np.array([4, 2, 1]) + [4, 1, 0], FADE * np.array([4, 1, 0]) + [4, 0, 0]
    usual = kept.sum() / tried.sum()
    chances = np.minimum(0.9 * (kept + usual) / (tried + 1) / usual, 1)
    assert chances[0] == 1, "nobody keeps more than all"
    each = np.stack([tokens_per_round(chance ** np.arange(1, 5)) for chance in chances[:2]], axis=1)
    tokens, weights = rows.pace(survival)
    assert tokens == pytest.approx(together(each))
    for row in range(2):  # of two rows, by so much more of one
        more = each + 1e-6 * np.eye(2)[row]
        assert weights[:, row] == pytest.approx(2e6 * (together(more) - together(each)), rel=1e-3)


# --- what was timed badly, and what another text says -------------------------------------------------


def test_a_width_that_once_was_slow_is_tried_again():
    timings = Timings()
    for width, seconds in ((0, 1.0), (1, 1.2), (2, 9.0), *[(0, 1.0)] * 200, *[(1, 1.2)] * 40):
        timings.add(width, seconds)
    assert timings.table(2)[2] == pytest.approx(9.0), "rounds without guesses, or few, are no reason to forget"
    for _ in range(20):
        timings.add(1, 1.2)
    assert timings.table(4).tolist() == pytest.approx([1.0, 1.2, 1.4, 1.6, 1.8])
    for _ in range(100):
        timings.add(4, 1.5)
    assert timings.table(1)[1] == pytest.approx(1.2), "the narrowest stays priced"


def test_a_first_guess_that_was_slow_does_not_stop_all_others():
    """The first pass over two tokens makes its kernels: it took two and a half plain rounds, and takes 1.1."""
    rule, drafted = Adaptive(Timings()), []
    for _ in range(120):
        asked = rule.next(16)
        seconds = 2.5 if asked and not any(drafted) else 1 + 0.1 * asked
        rule.observe(outcome(asked, np.array([asked if any(drafted) else 0])), seconds)
        drafted.append(asked)
    assert np.mean(drafted[60:]) > 4


def test_one_slow_width_does_not_stop_what_pays_beyond_it():
    """Guesses cost a fifth and are kept; rounds of two guesses were timed beside a neighbour."""
    rule = Adaptive(Timings())
    for width, seconds in ((0, 1.0), (0, 1.0), (1, 1.2), (2, 2.9), (3, 1.6), (4, 1.8), (4, 1.8), (4, 1.8)):
        rule.next(16)
        if width:
            rule.goes_on(np.array([0.97]))
        rule._asked = width
        rule.observe(outcome(width, np.array([width])), seconds)
    made = 0
    assert rule.next(16) > 4
    while rule.goes_on(np.array([0.97])):
        made += 1
    assert made >= 3


def test_a_guess_of_a_model_is_never_free():
    """Plain rounds were slow at first, so a round with a guess seems to take no longer."""
    rule, chances = Adaptive(Timings()), 0
    rule.fed(3.0, 1, 8)
    for width in (0, 0, 1, 1):
        if rule.next(40):
            assert rule.begins(Opening(0.3, 0.25)) or width == 0
            rule.goes_on(np.array([0.9]))
        rule.observe(outcome(width, np.array([width])), 1.0)
    assert rule.next(40) > 0
    while rule.goes_on(np.array([0.5])):
        chances += 1
    assert chances <= 4


def test_what_earlier_texts_kept_is_what_to_expect_of_another():
    expected = []
    for rate in (0.05, 0.9):
        acceptance = Acceptance(4)
        for text in range(6):
            acceptance = acceptance.another_text()
            if text:
                expected.append(float(acceptance.survival()[0]))
            for seed in range(20):
                acceptance.add(1, np.array([1]), np.array([int(np.random.default_rng(seed).random() < rate)]), [])
        assert abs(acceptance.survival()[0] - rate) < 0.2
    assert expected[:5] == sorted(expected[:5], reverse=True)
    assert expected[1] > 0.6, "one text says little of the next"
    assert expected[4] < 0.2
    assert expected[9] > 0.8


def test_one_good_text_among_bad_ones_is_reason_to_try_the_next():
    acceptance = Acceptance(4)
    for kept in (0, 0, 1, 0):
        for _ in range(20):
            acceptance.add(1, np.array([1]), np.array([kept]), [])
        acceptance = acceptance.another_text()
    hopeful = acceptance.survival()[0]
    assert hopeful > 0.45
    for _ in range(20):
        acceptance = acceptance.another_text()  # nothing was tried: little is known by now
    assert abs(acceptance.survival()[0] - PRIOR) < 0.1


def test_a_call_that_begins_takes_nothing_from_one_that_is_under_way():
    memory = Memory()
    one, rig = memory.recall(1, False), Rig(0.3, tells=True)
    rig.run(one, 0.9, 60)
    before = one._learnt.told[1].survival()
    memory.recall(1, False)
    assert (one._learnt.told[1].survival() == before).all()


def test_guesses_that_cannot_follow_are_no_reason_for_one():
    """The second guess is dear, and the gain would come with the tenth, for which there is no room."""
    made = []
    for room in (3, 16):
        rule = Adaptive(Timings())
        for width, seconds in ((0, 1.0), (1, 1.1), (2, 2.6), (12, 2.7), (12, 2.7), (12, 2.7)):
            rule.next(16)
            rule._asked = width
            if width:
                rule.goes_on(np.array([0.95]))
            rule.observe(outcome(width, np.array([width])), seconds)
        rule.next(room)
        made.append(1)
        while rule.goes_on(np.array([0.95])):
            made[-1] += 1
    assert made[0] == 1
    assert made[1] > 3


def test_a_text_that_gained_nothing_does_not_speak_for_the_next():
    """A draft that was given up in one text is used at once in the next, where others were guessed well."""
    used = []
    for seed in range(20):
        memory = Memory()
        for acceptance in (0.9, 0.9, 0.1, 0.9):
            rule, rig = memory.recall(1, False), Rig(0.45, tells=True, seed=seed)
            rule.fed(3.0, 1, 60)
            while rig.tokens < 96:
                if not rule._steps and rule.next(96 - int(rig.tokens)):
                    rule.begins(Opening(0.3, 0.25))
                rig.round(rule, acceptance)
        used.append(np.mean([guesses > 0 for guesses, _ in rig.rounds]))
    assert np.mean(used) > 0.85
    assert np.median(used) == 1
