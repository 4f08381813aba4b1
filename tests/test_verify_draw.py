"""Drawing and matching: shares of the noise, greedy choices, rows that cannot be drawn from."""

import math
from itertools import product

import pytest
import torch

from specdec.verify import choose, draw, match, sample
from specdec.verify.draw import highest, probabilities
from specdec.verify.matching import match_on_device

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_noise_falls_into_a_share(dtype: torch.dtype) -> None:
    """Unnormalised logits change nothing."""
    weights = torch.tensor([0.5, 0.0, 0.25, 0.25])
    for shift in (-8.0, 0.0, 8.0):
        logits = (weights.log() + shift).to(dtype)
        for noise, token in ((0.0, 0), (0.49, 0), (0.51, 2), (0.74, 2), (0.76, 3), (1 - 2**-53, 3)):
            assert sample(logits, torch.tensor(noise, dtype=torch.float64)) == token


def test_leading_dimensions_are_free() -> None:
    logits = torch.randn(2, 3, 4, 5)
    noise = torch.rand(2, 3, 4)
    tokens = sample(logits, noise)
    assert tokens.shape == (2, 3, 4)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens[1, 2], sample(logits[1, 2], noise[1, 2]))
    assert choose(logits).shape == (2, 3, 4)


@pytest.mark.parametrize("rows", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.0, 5e-324, 0.5, 1 - 2**-53])
def test_no_noise_brings_out_a_forbidden_token(rows: torch.dtype, noise: float) -> None:
    weights = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=rows)
    assert draw(weights, torch.tensor(noise, dtype=torch.float64)) in (1, 3)
    assert draw(weights / 3, torch.tensor(1.0, dtype=torch.float64)) == 3  # more than any generator gives


def test_small_shares_are_met_as_often_as_they_should() -> None:
    """A weight that a float32 sum would swallow keeps its share: 150,000 tokens, one has 3e-9 of the mass."""
    weights = torch.full((150_000,), 1 / 150_000)
    weights[77_777] = 3e-9
    total = float(weights.sum(dtype=torch.float64))
    start = float(weights[:77_777].sum(dtype=torch.float64))
    for place in (0.01, 0.5, 0.99):
        assert draw(weights, torch.tensor((start + place * 3e-9) / total, dtype=torch.float64)) == 77_777
    assert draw(weights, torch.tensor((start + 1.01 * 3e-9) / total, dtype=torch.float64)) == 77_778


def test_unnormalised_weights_are_drawn_by_their_shares() -> None:
    weights = torch.tensor([[0.1, 0.3], [1e-300, 3e-300], [1e300, 3e300]], dtype=torch.float64)
    assert draw(weights, torch.full((3,), 0.24).double()).tolist() == [0, 0, 0]
    assert draw(weights, torch.full((3,), 0.26).double()).tolist() == [1, 1, 1]


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
    assert sample(logits, torch.tensor([0.5, 0.9])).tolist() == [drawn, 2]


def test_the_lowest_id_wins_a_tie() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    assert choose(logits).tolist() == [1, 0]
    assert choose(logits.bfloat16()).tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bits_of_16_are_ordered_as_their_numbers(dtype: torch.dtype) -> None:
    """Every row of three special numbers, alone and between ordinary ones, against the same row in float32."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    largest = torch.finfo(dtype).max
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, tiny, -tiny, 1.0, -1.0, largest, -largest], dtype=dtype)
    # a NaN's other sign, and the NaN next to infinity
    nans = special[:2].view(torch.int16) ^ torch.tensor([-0x8000, 1], dtype=torch.int16)
    special = torch.cat([special, nans.view(dtype)])
    ordinary = torch.tensor([1.0, 3.0, 2.0], dtype=dtype)
    for row in product(special, repeat=3):
        scores = torch.stack([ordinary, torch.stack(row), ordinary])
        assert choose(scores[1:2]).tolist() == choose(scores[1:2].float()).tolist(), row
        assert choose(scores).tolist() == choose(scores.float()).tolist(), row
        assert choose(scores[1]) == choose(scores[1].float())


def test_scores_of_16_bits_that_are_a_view() -> None:
    scores = torch.randn(3, 4, 100, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    for view in (scores[:, 1:3], scores.transpose(0, 1), scores[..., ::2], scores[:, :, 10:90]):
        assert torch.equal(choose(view), view.float().argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_that_gradients_go_through(dtype: torch.dtype) -> None:
    """As those of a processor with weights of its own, in a call that was not told to leave gradients out."""
    for row in ([0.0, 2.0, 1.0], [-3.0, -2.0, -1.0]):  # of 16 bits: by their bits, and not
        scores = torch.tensor([row], dtype=dtype, requires_grad=True)
        assert choose(scores).tolist() == highest(scores).tolist() == [row.index(max(row))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_have_32_bits_at_least(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=dtype)
    wide = logits.double().softmax(-1)
    within = 1e-15 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(probabilities(logits).double(), wide, rtol=within, atol=0)


def test_weights_without_shares() -> None:
    weights = torch.tensor([[0.0, 0.0, 0.0], [0.0, INF, 1.0], [0.5, NAN, 1.0], [0.0, 1.0, 0.0]])
    for noise in (0.0, 0.5, 1 - 2**-53):
        assert draw(weights, torch.full((4,), noise, dtype=torch.float64)).tolist() == [-1, -1, -1, 1]


def test_scores_of_64_bits_keep_them() -> None:
    scores = torch.tensor([[1.0, 1.0 + 1e-12, 0.0]], dtype=torch.float64)
    assert choose(scores).tolist() == highest(scores).tolist() == [1]


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
    found = match_on_device(choices, guesses, lengths)
    assert torch.equal(found[0], accepted)
    assert torch.equal(found[1], next_token)
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
