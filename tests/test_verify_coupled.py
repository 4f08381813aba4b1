"""Shared noise: it depends on key, position and token only, it is Gumbel noise, and it makes draft
and target agree.

Powers: with a million values, a correlation of 0.01 is 10 standard errors, a wrong mean of 0.01 is
8; the bounds are 5.
"""

import math

import pytest
import torch
from torch import Tensor

from specdec.verify import choose, keyed_gumbel, match, row_keys

MASK = (1 << 64) - 1
MANY = 1_000_000


def mixed(word: int) -> int:
    """SplitMix64's output function on Python's unbounded integers."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def twin(key: int, position: int, token: int) -> float:
    step = 0x9E3779B97F4A7C15
    start = mixed((mixed((key + step) & MASK) + position * 0xD1342543DE82EF95) & MASK)
    uniform = ((mixed((start + (token + 1) * step) & MASK) >> 12) + 0.5) / 2**52
    return -math.log(-math.log(uniform))


def test_the_twin_mixes_as_published() -> None:
    """First outputs of SplitMix64 for the seed 1234567, as its other implementations print them."""
    step = 0x9E3779B97F4A7C15
    outputs = [mixed((1234567 + n * step) & MASK) for n in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_agrees_with_a_twin_without_tensors() -> None:
    keys = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    positions = [0, 1, 2, 4095, 2**40]
    noise = keyed_gumbel(torch.tensor(keys), torch.tensor(positions).repeat(len(keys), 1), 50, torch.float64)
    values = [[[twin(k, n, v) for v in range(50)] for n in positions] for k in keys]
    expected = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(noise, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_depends_on_key_position_and_token_only(dtype: torch.dtype) -> None:
    keys, positions = torch.arange(4) * 10**15, torch.arange(20).reshape(4, 5)
    whole = keyed_gumbel(keys, positions, 301, dtype)
    assert whole.dtype == dtype
    for vocabulary in (1, 2, 3, 5, 17, 64, 300):
        assert torch.equal(keyed_gumbel(keys, positions, vocabulary, dtype), whole[..., :vocabulary])
    for row in range(4):
        alone = keyed_gumbel(keys[row : row + 1], positions[row : row + 1], 301, dtype)
        assert torch.equal(alone[0], whole[row])
        for column in range(5):
            one = keyed_gumbel(keys[[row]], positions[[row], column : column + 1], 301, dtype)
            assert torch.equal(one[0, 0], whole[row, column])


def test_is_finite_in_every_dtype_that_can_hold_it() -> None:
    """The largest and smallest uniform of 52 bits and a half."""
    for uniform in (0.5 / 2**52, (2**52 - 0.5) / 2**52):
        assert 0.0 < uniform < 1.0
        assert math.isfinite(-math.log(-math.log(uniform)))


def lots(how: str) -> Tensor:
    """A million values (1000, 1000), neighbours along both sides being neighbours in `how`."""
    side = 1000
    count = torch.arange(side)
    if how == "keys":  # one token; keys down, positions across
        return keyed_gumbel(count, count.repeat(side, 1), 1, torch.float64)[..., 0]
    if how == "positions":  # one key; positions down, tokens across
        return keyed_gumbel(torch.tensor([7]), count[None], side, torch.float64)[0]
    if how == "high bits":  # keys that differ in their high bits only
        return keyed_gumbel(count << 53, torch.zeros(side, 1).long(), side, torch.float64)[:, 0]
    return keyed_gumbel(-count, count[:, None] * 0 + 5, side, torch.float64)[:, 0]


@pytest.mark.parametrize("how", ["keys", "positions", "high bits", "negative keys"])
def test_is_standard_gumbel_noise(how: str) -> None:
    noise = lots(how)
    mean, variance = 0.5772156649, math.pi**2 / 6
    assert abs(noise.mean().item() - mean) < 5 * math.sqrt(variance / MANY)
    # The fourth central moment of a Gumbel variable is 5.4 variances squared.
    assert abs(noise.var().item() - variance) < 5 * variance * math.sqrt(4.4 / MANY)

    uniform = torch.exp(-torch.exp(-noise))
    counts = torch.histc(uniform, bins=1000, min=0, max=1)
    chi_square = ((counts - MANY / 1000) ** 2 / (MANY / 1000)).sum().item()
    assert abs(chi_square - 999) < 5 * math.sqrt(2 * 999)


@pytest.mark.parametrize("how", ["keys", "positions", "high bits", "negative keys"])
def test_neighbours_are_uncorrelated(how: str) -> None:
    noise = lots(how)
    centred = (noise - noise.mean()) / noise.std()
    for down, across in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 999), (0, 64), (64, 0)):
        one = centred[down:, across:]
        other = centred[: 1000 - down, : 1000 - across]
        correlation = (one * other).mean().item()
        assert abs(correlation) < 5 / math.sqrt(one.numel()), (down, across)
    # Diagonals the other way, where a key and a position that are merely added would repeat.
    correlation = (centred[1:, :-1] * centred[:-1, 1:]).mean().item()
    assert abs(correlation) < 5 / 999


def test_all_values_differ() -> None:
    for how in ("keys", "positions", "high bits", "negative keys"):
        assert lots(how).flatten().unique().numel() > MANY - 3


def test_argmax_under_the_noise_is_a_draw_from_softmax() -> None:
    """Power: 400,000 draws see an error of 0.005 in any of the probabilities as 6 standard
    errors."""
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
    noise = keyed_gumbel(torch.arange(400), torch.arange(1000).repeat(400, 1), 5, torch.float64)
    counts = choose(probs.log(), noise).flatten().bincount(minlength=5)
    assert counts[4] == 0
    expected = probs[:4] * counts.sum()
    chi_square = ((counts[:4] - expected) ** 2 / expected).sum().item()
    assert chi_square < 30  # 3 degrees of freedom: once in a million


def test_draft_and_target_agree_as_often_as_predicted() -> None:
    """P(match) = sum over j of 1 / sum over i of max(p_i / p_j, q_i / q_j): Daliri et al., arXiv
    2408.07978."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    q = torch.tensor([0.2, 0.4, 0.15, 0.25], dtype=torch.float64)
    noise = keyed_gumbel(torch.arange(400), torch.arange(1000).repeat(400, 1), 4, torch.float64)
    agreed = (choose(p.log(), noise) == choose(q.log(), noise)).double().mean().item()
    ratios = torch.maximum(p[:, None] / p, q[:, None] / q)
    predicted = (1 / ratios.sum(0)).sum().item()
    assert abs(agreed - predicted) < 5 * math.sqrt(0.25 / 400_000)


# --- the text --------------------------------------------------------------------------------


def table(seed: int, vocabulary: int) -> Tensor:
    """A model that looks at the last token only: (V, V) scores, some tokens forbidden."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(scores.shape, generator=generator) < 0.2, -torch.inf, scores)


def plain(model: Tensor, keys: Tensor, length: int) -> Tensor:
    """Sampling one token at a time under the noise: what the text must be."""
    text = torch.zeros(len(keys), 1, dtype=torch.int64)
    for position in range(1, length + 1):
        noise = keyed_gumbel(keys, torch.full((len(keys), 1), position), len(model), model.dtype)
        text = torch.cat([text, choose(model[text[:, -1]], noise[:, 0])[:, None]], 1)
    return text[:, 1:]


def speculated(model: Tensor, draft: Tensor, keys: Tensor, length: int, guesses: int) -> Tensor:
    """The same in rounds: guess under the noise, choose under the noise, match. Rows run apart."""
    rows, vocabulary = len(keys), len(model)
    texts = torch.zeros(rows, length + guesses + 2, dtype=torch.int64)
    ends = torch.zeros(rows, dtype=torch.int64)
    row, places, lap = torch.arange(rows), torch.arange(guesses + 1), 0
    while bool((ends < length).any()):
        lap += 1
        positions = ends[:, None] + 1 + places
        noise = keyed_gumbel(keys, positions, vocabulary, model.dtype)
        contexts = [texts[row, ends]]
        for place in range(guesses):
            contexts.append(choose(draft[contexts[-1]], noise[:, place]))
        context = torch.stack(contexts, 1)
        tokens = context[:, 1:]
        lengths = (row + lap) % (guesses + 1)
        accepted, next_token = match(choose(model[context], noise), tokens, lengths)
        output = torch.cat([tokens, tokens[:, :1]], 1).scatter(1, accepted[:, None], next_token[:, None])
        emits = (places <= accepted[:, None]) & (positions <= length)
        spots = torch.where(emits, positions, texts.shape[1] - 1)
        texts.scatter_(1, spots, output)
        ends = torch.where(ends < length, (ends + accepted + 1).clamp(max=length), ends)
    return texts[:, 1 : length + 1]


@pytest.mark.parametrize("guesses", [1, 3, 6])
@pytest.mark.parametrize("draft", ["same", "near", "useless"])
def test_the_text_is_that_of_plain_sampling(draft: str, guesses: int) -> None:
    """10,000 tokens, equal one by one, for every draft and every number of guesses."""
    vocabulary, rows, length = 12, 400, 25
    model = table(1, vocabulary)
    other = {
        "same": model,
        "near": model + 0.3 * table(2, vocabulary).clamp(min=-3),
        "useless": table(3, vocabulary),
    }
    keys = torch.tensor(row_keys([5] * rows, [[1, 2, 3]] * rows))
    text = speculated(model, other[draft], keys, length, guesses)
    assert torch.equal(text, plain(model, keys, length))
    assert len({tuple(line) for line in text.tolist()}) == rows  # copies of a prompt differ


# --- keys --------------------------------------------------------------------------------------


def test_a_key_depends_on_seed_prompt_and_occurrence() -> None:
    first, second, other_prompt, other_seed = row_keys([1, 1, 1, 2], [[5, 6], [5, 6], [56], [5, 6]])
    assert len({first, second, other_prompt, other_seed}) == 4
    assert row_keys([1], [[5, 6]]) == [first]
    assert row_keys([2, 1, 1], [[5, 6], [9], [5, 6]])[2] == first
    assert all(0 <= key < 2**63 for key in (first, second, other_prompt, other_seed))


def test_keys_take_any_integers() -> None:
    keys = row_keys([-1, 2**80, 0], [[], [0], [2**40]])
    assert torch.tensor(keys).dtype == torch.int64
    with pytest.raises(ValueError, match="shorter"):
        row_keys([1, 2], [[3]])


def test_keys_are_the_same_in_every_process() -> None:
    """Written down, because a saved key must still mean the same text tomorrow."""
    assert row_keys([1, 1, 7], [[5, 6], [5, 6], []]) == [
        4298948049130422580,
        2304592710504248450,
        8361742661317987765,
    ]
