"""A suffix automaton that grows with its text (as in SAM-Decoding, 2411.10666, section 3).

A state stands for substrings that end at the same places of the text. Adding a token costs amortised O(1), and
so does the question that a draft asks: which is the longest end of the text that stood somewhere before, and
where? It needs no search and no second pass: the suffix link of the newest state *is* that end (the longest
suffix with another place of ending). Another text is followed through an automaton with ``advance``.
Knows no row and no proposal. Read next: ``store.py``.
"""

from __future__ import annotations

from collections.abc import Iterable

NOTHING = -1  # stands between texts; follows no match and is never guessed
RECENT = 8  # states told of a newer place; telling all would cost O(length) on repetitive text


class SuffixAutomaton:
    """All substrings of a text, and where each was last known to end.

    Attributes:
        text: the tokens so far.
        matched: length of the longest end of ``text`` that stood there before, 0 if none.
        place: index in ``text`` behind that earlier occurrence, a recent one of them.
    """

    __slots__ = ("_last", "_lengths", "_links", "_next", "_places", "matched", "place", "text")

    def __init__(self, text: Iterable[int] = ()) -> None:
        """Begin with ``text``."""
        self.text: list[int] = []
        self.matched = 0
        self.place = 0
        self._next: list[dict[int, int]] = [{}]
        self._links = [-1]
        self._lengths = [0]
        self._places = [0]
        self._last = 0
        self.extend(text)

    def extend(self, tokens: Iterable[int]) -> None:
        """Put ``tokens`` at the end of the text."""
        for token in tokens:
            self._append(token)

    def _append(self, token: int) -> None:
        following, links, lengths, places = self._next, self._links, self._lengths, self._places
        self.text.append(token)
        length = len(self.text)
        current, state = len(lengths), self._last
        following.append({})
        lengths.append(length)
        places.append(length)
        links.append(0)
        while state >= 0 and token not in following[state]:
            following[state][token] = current
            state = links[state]
        link = 0
        if state >= 0:
            link = following[state][token]
            if lengths[link] != lengths[state] + 1:
                link = self._split(link, state, token)
        links[current] = link
        self._last = current
        self.matched, self.place = lengths[link], places[link]
        for _ in range(RECENT):
            if link <= 0:
                break
            places[link] = length
            link = links[link]

    def _split(self, whole: int, state: int, token: int) -> int:
        """Give the shorter substrings of ``whole``, those that follow ``state``, a state of their own."""
        copy = len(self._lengths)
        self._next.append(dict(self._next[whole]))
        self._lengths.append(self._lengths[state] + 1)
        self._places.append(self._places[whole])
        self._links.append(self._links[whole])
        self._links[whole] = copy
        while state >= 0 and self._next[state].get(token) == whole:
            self._next[state][token] = copy
            state = self._links[state]
        return copy

    def advance(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """Follow another text by one token: the longest end of it that stands in this one.

        Args:
            state: where the other text stood before the token; 0 at its beginning.
            matched: length of its end that stood here; 0 at its beginning.
            token: what comes next there.

        Returns:
            State and length with the token.
        """
        links, lengths = self._links, self._lengths
        # the text may have grown since, and a state may have been split
        while links[state] > 0 and lengths[links[state]] >= matched:
            state = links[state]
        while token not in self._next[state]:
            state = links[state]
            if state < 0:
                return 0, 0
            matched = lengths[state]
        return self._next[state][token], matched + 1

    @property
    def end(self) -> tuple[int, int]:
        """State and length of the longest end of the text that stood before, for ``advance``."""
        return (self._links[self._last], self.matched) if self.text else (0, 0)

    def continuation(self, state: int, limit: int) -> list[int]:
        """Up to ``limit`` tokens behind the place of ``state``."""
        return _cut(self.text[self._places[state] : self._places[state] + limit])

    def repetition(self, limit: int) -> list[int]:
        """Up to ``limit`` tokens behind the earlier occurrence of the text's own end; empty if there is none.

        Where the occurrence reaches up to the end, what it repeats is repeated on: a text "a b a b" is
        guessed to go on "a b a b a ...", not to stop where the copy meets itself.
        """
        if not self.matched:
            return []
        behind = self.text[self.place : self.place + limit]
        while len(behind) < limit:
            behind += behind[: limit - len(behind)]
        return _cut(behind)


def _cut(tokens: list[int]) -> list[int]:
    """The tokens before the end of their text."""
    return tokens[: tokens.index(NOTHING)] if NOTHING in tokens else tokens
