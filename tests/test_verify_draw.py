"""Drawing and matching: the law of the race, greedy choices, rows that cannot be drawn from."""

import math
from itertools import product

import pytest
import torch

from specdec.verify import choose, match, race

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_first_to_arrive_wins(dtype: torch.dtype) -> None:
    """arrival = exponential / weight, and unnormalised logits change nothing."""
    weights = torch.tensor([0.5, 0.25, 0.25, 0.0])
    for shift in (-20.0, 0.0, 20.0):
        logits = (weights.log() + shift).to(dtype)
        for times, winner in (([1, 1, 1, 1], 0), ([1, 0.4, 1, 0], 1), ([9, 9, 1, 0], 2)):
            assert race(logits, torch.tensor(times, dtype=torch.float32)) == winner


def test_leading_dimensions_are_free() -> None:
    logits = torch.randn(2, 3, 4, 5)
    times = torch.empty(2, 3, 4, 5).exponential_()
    tokens = race(logits, times)
    assert tokens.shape == (2, 3, 4)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens[1, 2], race(logits[1, 2], times[1, 2]))
    assert choose(logits).shape == (2, 3, 4)


@pytest.mark.parametrize("noise", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [torch.float32, torch.float64])
@pytest.mark.parametrize("time", [0.0, 1e-45, 1e-300, 5e-324])
def test_no_noise_brings_out_a_forbidden_token(rows: torch.dtype, noise: torch.dtype, time: float) -> None:
    logits = torch.tensor([-INF, 0.0, -INF], dtype=rows)
    assert race(logits, torch.tensor([time, 100.0, time], dtype=noise)) == 1
    assert race(logits, torch.tensor([time, time, time], dtype=noise)) == 1


def test_an_exponential_of_zero_does_not_let_any_token_win() -> None:
    """float32 noise is 0 about once in 10 million draws; a token of weight 1e-20 must not win by
    it."""
    logits = torch.tensor([1.0, 1e-20]).log()
    assert race(logits, torch.tensor([1.0, 0.0])) == 0
    assert race(torch.tensor([0.9, 0.1]).log(), torch.tensor([1.0, 0.0])) == 1


@pytest.mark.parametrize(
    ("row", "greedy", "drawn"),
    [
        ([NAN, 0.0, 1.0], -1, -1),
        ([0.0, NAN, -INF], -1, -1),
        ([-INF, -INF, -INF], -1, -1),
        ([0.0, INF, 1.0], 1, -1),  # an argmax there is; softmax has none
        ([-INF, -3e38, -INF], 1, 1),
    ],
)
def test_rows_without_a_distribution(row: list[float], greedy: int, drawn: int) -> None:
    logits = torch.tensor([row, [0.0, 1.0, 2.0]])
    assert choose(logits).tolist() == [greedy, 2]
    assert choose(logits, torch.zeros(2, 3)).tolist() == [greedy, 2]
    assert race(logits, torch.ones(2, 3)).tolist() == [drawn, 2]


def test_the_lowest_id_wins_a_tie() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    assert choose(logits).tolist() == [1, 0]
    assert choose(logits.bfloat16()).tolist() == [1, 0]


def test_noise_is_added_to_the_scores() -> None:
    logits = torch.tensor([0.0, 1.0, -INF])
    assert choose(logits, torch.tensor([2.0, 0.0, 99.0])) == 0


def test_match_agrees_with_a_loop_on_every_small_case() -> None:
    """All choices and guesses over {-1, 0, 1}, two guesses, every length."""
    symbols = (-1, 0, 1)
    cases = [
        (choices, guesses, length)
        for choices in product(symbols, repeat=3)
        for guesses in product(symbols, repeat=2)
        for length in range(3)
    ]
    choices = torch.tensor([one for one, _, _ in cases])
    guesses = torch.tensor([one for _, one, _ in cases])
    lengths = torch.tensor([one for _, _, one in cases])
    accepted, next_token = match(choices, guesses, lengths)
    for number, (own, guessed, length) in enumerate(cases):
        kept = 0
        while kept < length and own[kept] == guessed[kept] != -1:
            kept += 1
        assert accepted[number] == kept
        assert next_token[number] == own[kept]


def test_match_without_guesses() -> None:
    accepted, next_token = match(
        torch.tensor([[4], [-1]]), torch.empty(2, 0, dtype=torch.int64), torch.zeros(2).long()
    )
    assert accepted.tolist() == [0, 0]
    assert next_token.tolist() == [4, -1]
