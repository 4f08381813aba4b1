"""The controller: as many guesses as pay, measured during the call, none where none pays.

Every round it compares draft lengths by tokens a second (``cost.py``), from the seconds that rounds of each width
took on this machine for this batch, and from how many guesses were kept at each position (``acceptance.py``).
Where a draft tells its own chance of each guess, more are drafted only while the gain that is left (the chance
that the next and all before it are kept, or some next ones) outweighs its price at the present rate: SpecDec++'s
threshold (2405.19715) with measured costs. When nothing pays it drafts nothing, and probes with one guess now and
then, so seldom that probes cost about a hundredth of plain decoding, and often enough to find a draft again that
has become good.
A draft model's prompt is fed with its first guess, so that comes only if what is left of the text may earn it.

Non-anticipating (see ``__init__.py``): ``next`` looks at past rounds, ``goes_on`` at guesses that are submitted
whatever it says. Knows no model. Read next: ``../choosing.py``.
"""

from __future__ import annotations

import copy
from math import ceil, inf, log2

import numpy as np

from specdec.length import Opening
from specdec.length.acceptance import FADE, PRIOR, PRIOR_WEIGHT, Acceptance
from specdec.length.cost import Assumed, Timings, best_length, speed, tokens_per_round
from specdec.length.rows import Rows
from specdec.records import Round

ASSUMED_COST = 0.2  # of a guess, in plain rounds, where no clock may be asked (``Assumed``)
MOST = 16  # guesses a round: wider passes are no longer nearly free on any machine measured
PROBES = 0.01  # of plain decoding's time, spent on probes while nothing pays
CATCHING_UP = 0.03  # of it, on feeding a draft what it missed between them
FIRST_WAIT, LONGEST_WAIT = 12, 48  # rounds without a probe: doubled by each that fails
WARMING = 3  # plain rounds that a prompt takes whatever its length: more than a pass, for a process' first is slow
PREMIUM = 1.5  # what a draft's prompt must promise to earn for its price: that is certain, and acceptance a guess
FORESEEN = 256  # tokens: how long a text becomes nobody knows, and the most that it may is often far away
STALE, THIN = 48, 1.25  # a plain round is timed again after so many others; after 4 times as many for larger gains
CHEAPEST = 0.5  # of what a draft's pass reads, in plain rounds: what a guess of a model takes at least, until timed
STAKE = 0.03  # of the gain, that every plain round which a round takes longer must bring
ROW_MARGIN = 0.03  # for every doubling of the rows: 6 to 9 % of the rounds of eight rows waited for the last one
LAG = 4  # rounds after which a draft has so much to catch up on that the seconds of the next say nothing


class Learnt:
    """Evidence: seconds by width, and guesses that were kept.

    Attributes:
        every: of all rounds.
        told: of rounds in which the draft told the chances of its guesses. Where a draft copies what matches and
            asks a model for the rest, wide rounds are cheap when copied, and say nothing of the model's price.
        undrafted: seconds of rounds that asked for no guesses, but may have some that a grammar foresaw.
        foreseen: (2,) how many such guesses were judged, and how many of these kept.
        waited: rounds without guesses of a draft since the last ones with, in whatever call.
    """

    def __init__(self, timings: Timings | Assumed) -> None:
        """Nothing is learnt yet; seconds are known as ``timings`` knows them."""
        self.every: tuple[Timings | Assumed, Acceptance] = (timings, Acceptance(MOST))
        self.told: tuple[Timings | Assumed, Acceptance] = (timings.afresh(), Acceptance(MOST))
        self.undrafted = timings.afresh()
        self.foreseen = np.full(2, PRIOR_WEIGHT)
        self.waited = 0
        self.least = 0.0  # plain rounds that a guess of the draft model takes at least

    def of(self, told: bool) -> list[tuple[Timings | Assumed, Acceptance]]:
        """What a round belongs to."""
        return [self.every, self.told] if told else [self.every]

    def another_text(self) -> Learnt:
        """For a call that begins: the same seconds, and counts of its own; another call may be under way."""
        other = copy.copy(self)
        other.every, other.told = ((seconds, kept.another_text()) for seconds, kept in (self.every, self.told))
        return other

    def doubt(self) -> None:
        """Believe less of what was kept."""
        for _, acceptance in (self.every, self.told):
            acceptance.doubt()


class Memory:
    """What a generator has learnt, by kind of call; the constructor measures nothing."""

    def __init__(self) -> None:
        """Nothing is learnt yet."""
        self._known: dict[tuple[int, bool], Learnt] = {}

    def recall(self, batch: int, do_sample: bool) -> Adaptive:
        """A controller for a call with ``batch`` rows that goes on from earlier calls of the kind."""
        kind = batch, do_sample
        learnt = self._known[kind] = self._known.get(kind, Learnt(Timings())).another_text()
        return Adaptive(learnt)


class Adaptive:
    """A ``DraftLength`` for one call."""

    most = MOST

    def __init__(self, learnt: Timings | Assumed | Learnt) -> None:
        """Decide by what was ``learnt`` in earlier calls, or by how seconds are known."""
        self._learnt = learnt if isinstance(learnt, Learnt) else Learnt(learnt)
        self._timings, self._acceptance = self._learnt.every
        self._table = np.zeros(0)  # seconds of a round by width
        self._prices = np.zeros(0)  # the same where a model guesses
        self._others = False  # some rounds were guessed for without a chance told
        self._idle = 0  # rounds of others since a draft that tells its chances was asked
        self._rate = 0.0  # tokens a row and second at the present draft length
        self._differing = Rows()
        self._weights = np.ones(1)  # (B,) or (1,) what a token of each row is worth in the running round
        self._rows = 1  # rows that had not ended in the last round
        self._asked = 0  # guesses a row in the running round
        self._since = LAG + 1  # rounds since guesses were last asked for
        self._probing = self._promising = False  # the running round is a probe; the last probe was kept
        self._failed = 0  # probes in a row
        self._tells = False  # the proposer tells the chances of its guesses
        self._steps = False  # a draft model was let guess
        self._chances: list[np.ndarray] = []  # of the running round's guesses
        self._alive: np.ndarray | float = 1.0  # chance that all of them are kept, a row
        self._prompt = 0.0  # seconds that the target took for the prompt
        self._beyond = 0  # tokens of the prompt but the first of every row
        self._opened = 0.0  # seconds that a draft's own prompt should take in the running round
        self._missed = 0.0  # plain rounds that a draft needs to catch up on one, as the last probe had it
        self._grown = 0.0  # tokens that a row has got since
        self._left = 0  # tokens that the longest row may still get
        self._refused = False  # a draft was told not to guess in the running round

    def next(self, room: int) -> int:
        """See ``DraftLength.next``."""
        self._chances, self._alive = [], 1.0
        self._left, self._refused, self._opened = room, False, 0.0
        table = self._timings.table(self.most, self._wider())
        if table is None or not room:  # the first plain round will tell
            self._asked, self._probing = 0, False
            return 0
        tokens, weights = self._differing.pace(self._acceptance.survival())
        seconds = table[0] + np.concatenate(([0.0], np.cumsum(self._acceptance.widths() * np.diff(table))))
        # the longest of nearly equal rounds is not worth its risk
        price = seconds / table[0]
        best = int(np.argmax(tokens / price - STAKE * (price - 1)))
        gain = float(tokens[best] / seconds[best] * table[0])
        if gain < self._least_gain:
            best, gain = 0, 1.0
        self._table, self._rate, self._weights = table, gain / float(table[0]), weights[best]
        told = self._learnt.told[0].table(self.most, least=self._learnt.least)
        self._prices = table if told is None else told
        self._probing = best == 0 and self._due()
        if best and self._timings.age >= self._timings.known * (STALE if gain < THIN else 4 * STALE):
            self._asked = 0  # a plain round, to know again what one takes
            self._timings.age = 0  # what a grammar foresees may make it none, and then it is asked for later again
        elif self._probing:
            self._asked = 1
        else:
            # a draft that tells its chances is stopped in time, so it is asked for as many as there may be
            self._asked = min(self.most if best and self._tells else best, room)
        return self._asked

    def _wider(self) -> float:
        """Seconds that a guess more is taken to cost beyond all widths measured, where it is copied."""
        if self._tells or self._steps or not self._prompt:
            return inf  # a model guesses, whose own price is in the line
        # in a narrow pass a token's multiplications take about twice what they take in a prompt
        return 2 * self._rows * self._prompt / max(self._beyond + self._rows, 1)

    @property
    def _least_gain(self) -> float:
        """What drafting must promise: the slowest row of a batch decides when it ends, and rows differ."""
        return 1 + ROW_MARGIN * log2(self._rows)

    def _due(self) -> bool:
        """A probe is affordable, or the price is not known yet, or the last probe was kept and wants confirming."""
        if self._promising or not self._timings.priced:
            return True
        # not even guesses that are always kept would pay, and prices change seldom; or what the draft has missed,
        # and is fed first, costs too much however seldom that is, as in a wide batch
        hopeless = not best_length(np.arange(1.0, self.most + 2), self._table)
        if hopeless or self._missed > CATCHING_UP:
            return self._learnt.waited >= 8 * LONGEST_WAIT
        affordable = ceil((float(self._table[1] / self._table[0]) - 1) / PROBES)
        return self._since >= min(affordable, FIRST_WAIT << self._failed, LONGEST_WAIT)

    def free(self, runs: np.ndarray) -> int:
        """See ``DraftLength.free``: the width that brings most tokens a second."""
        widest = min(int(runs.max(initial=0)), self.most)
        table = self._learnt.undrafted.table(self.most)
        if table is None or not widest:
            return 0
        judged, kept = self._learnt.foreseen
        made = (runs[:, None] > np.arange(widest)).mean(axis=0)
        tokens = tokens_per_round(made * (kept / judged) ** np.arange(1, widest + 1))
        return best_length(tokens, table[: widest + 1])

    def goes_on(self, chances: np.ndarray) -> bool:
        """See ``DraftLength.goes_on``."""
        self._tells = True
        self._chances.append(chances)
        drafted = len(self._chances)
        if drafted >= min(self._asked, self._differing.most(self._rows)):
            return False
        _, acceptance = self._learnt.told
        self._alive = self._alive * acceptance.of_chance(chances)
        return self._pays(float(np.sum(self._alive * self._weights)) / self._rows, acceptance.overall, drafted)

    def begins(self, opening: Opening | None = None) -> bool:
        """See ``DraftLength.begins``: where a draft is alone and its prompt is fed, ``next`` has decided."""
        begins = self._begins(opening)
        self._steps |= begins
        return begins

    def _begins(self, opening: Opening | None) -> bool:
        if opening is not None:
            if not self._opens(opening):
                self._refused = True
                return False
            self._opened = opening.work * self._prompt
            self._learnt.least = CHEAPEST * opening.reading
        timings, acceptance = self._learnt.told
        if not self._others or self._probing or not timings.priced or self._pays(1.0, acceptance.overall, 0):
            return True
        self._idle += 1
        return self._idle > LONGEST_WAIT

    def _opens(self, opening: Opening) -> bool:
        """Whether what is left of the text may earn the draft's prompt, or a probe may cost it."""
        every, told = self._learnt.every, self._learnt.told
        plain = float(self._table[0])
        token = max(self._prompt - WARMING * plain, 0.0) / max(self._beyond, 1)  # one more in a pass
        price = opening.work * (self._prompt + self._rows * token * self._grown)
        timings, acceptance = told if told[0].priced else every
        if timings.priced and (timings is told[0] or not self._others):
            kept = acceptance.overall ** np.arange(1, self.most + 1)  # not what it stopped short of by itself
            rate = float((tokens_per_round(kept) / timings.table(self.most)).max())
        else:
            wider = self._rows * token / plain
            rate = max(speed(PRIOR, opening.reading, n, verify=1 + n * wider) for n in range(5)) / plain
        saved = min(self._left, FORESEEN) * (plain - self._least_gain / rate)
        return price <= max(saved / PREMIUM, PROBES * self._learnt.waited * plain)

    def _pays(self, alive: float, kept: float, drafted: int) -> bool:
        """The next guess behind ``drafted``, or some next ones, are worth their seconds at the present rate.

        All before them are kept with the chance ``alive``, or in so many rows, each of them in turn with ``kept``.
        Single widths are timed badly: one that happened to be slow shall not stop what pays beyond it.
        """
        prices = self._prices[drafted : self._asked + 1]
        gains = alive * np.cumsum(kept ** np.arange(1, len(prices)))
        return bool((gains > self._rate * (prices[1:] - prices[0])).any())

    def within(self) -> Adaptive:
        """See ``DraftLength.within``."""
        return Adaptive(self._timings.afresh())

    def fed(self, seconds: float, rows: int, columns: int) -> None:
        """See ``DraftLength.fed``."""
        self._prompt, self._rows = self._timings.heard(seconds), rows
        self._beyond = rows * (columns - 1)

    def observe(self, round_: Round, seconds: float) -> None:
        """See ``DraftLength.observe``."""
        live = round_.counts > 0
        self._rows = max(int(live.sum()), 1)
        self._grown += float(round_.counts[live].sum()) / self._rows
        lengths, accepted = round_.lengths[live], round_.accepted[live]
        width = int(lengths.max(initial=0))
        if self._refused and not width:
            self._asked, self._probing = 0, False
        self._differing.see(self._asked, live, round_.accepted)
        told = bool(self._chances)
        self._others |= width > 0 and self._asked > 0 and not told
        for timings, _ in self._learnt.of(told or not width):
            if not width or (self._asked and self._since <= LAG):
                timings.add(width, seconds)
            elif self._asked:  # the draft may have had to catch up, or to read its prompt
                timings.at_most(width, max(seconds - self._opened, float(self._table[0])))
        if not self._asked:
            self._learnt.undrafted.add(width, seconds)
            if width:
                kept, failed = int(accepted.sum()), int((lengths > accepted).sum())
                self._learnt.foreseen = FADE * self._learnt.foreseen + [kept + failed, kept]
            self._since += 1
            self._learnt.waited += 1
            return
        self._idle = 0 if told else self._idle
        for _, acceptance in self._learnt.of(told):
            acceptance.add(self._asked, lengths, accepted, [chance[live] for chance in self._chances])
        # the one guess of a probe pays where it brings more than its price in plain rounds
        price = self._least_gain * float(self._table[1] / self._table[0])
        if self._probing and self._since > LAG:
            heard = self._timings.heard(seconds)
            more = (heard - self._opened - float(self._table[1])) / float(self._table[0])
            self._missed = max(more, 0.0) / self._since
        self._promising = False
        if self._probing and live.any():  # by what is known of each row by now: who missed once is no slow one yet
            self._promising = bool(self._differing.pace(np.array([accepted.mean()]))[0][1] > price)
        if self._probing and not self._promising:
            self._learnt.doubt()
            self._failed += 1
        elif not self._probing:
            self._failed = 0
        self._since = self._learnt.waited = 0
