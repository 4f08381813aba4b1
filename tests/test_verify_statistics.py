"""A second line behind `laws`: real float32 noise, 200,000 rounds, a G-test on the joint of three
tokens.

Power. 27 outcomes, 26 degrees of freedom; rejection at one in a million is G > 76. A law that is
off by a total variation of t has a noncentrality of at least 4 N t^2: for t = 0.015 this is 180, G
is then 206 on average with a standard deviation of 28, and is below 76 once in 300,000 times. The
mutants below are off by 0.03 and more.
"""

import pytest
import torch
from torch import Tensor

from specdec.verify import sample, verify

ROUNDS, VOCABULARY, GUESSES = 200_000, 3, 2
CRITICAL = 76.0


def tables(seed: int) -> list[Tensor]:
    """Scores after every prefix of 0, 1 and 2 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [1.2 * torch.randn(VOCABULARY**depth, VOCABULARY, generator=generator) for depth in range(3)]


TARGET, DRAFT = tables(0), tables(1)


def joint() -> Tensor:
    law = torch.ones(1, dtype=torch.float64)
    for rows in TARGET:
        law = (law[:, None] * rows.double().softmax(-1)).flatten()
    return law


def g_statistic(outcomes: Tensor) -> float:
    counts = outcomes.bincount(minlength=VOCABULARY**3).double()
    ratio = counts / (joint() * counts.sum())
    return 2 * torch.where(counts > 0, counts * ratio.log(), 0).sum().item()


def emitted(rule: str, *, shown: bool, seed: int, bias: float = 0.0, flatter: float = 1.0) -> Tensor:
    """Three tokens of each round, as one number; a bias on the noise or flatter draft rows make it
    wrong."""
    generator = torch.Generator().manual_seed(seed)

    def uniforms(*shape: int) -> Tensor:
        return torch.rand(ROUNDS, *shape, generator=generator, dtype=torch.float64)

    prefix = torch.zeros(ROUNDS, dtype=torch.int64)
    prefixes, tokens = [prefix], []
    for depth in range(GUESSES):
        tokens.append(sample(DRAFT[depth][prefix], uniforms()))
        prefix = prefix * VOCABULARY + tokens[-1]
        prefixes.append(prefix)
    target = torch.stack([TARGET[i][prefixes[i]] for i in range(GUESSES + 1)], 1)
    draft = torch.stack([DRAFT[i][prefixes[i]] for i in range(GUESSES)], 1)
    noise = uniforms(GUESSES + 1)
    noise[:, :-1] = (noise[:, :-1] - bias).clamp(min=0)
    accepted, next_token = verify(
        target,
        torch.stack(tokens, 1),
        torch.arange(ROUNDS) % (GUESSES + 1),
        draft * flatter if shown else None,
        rule=rule,
        uniforms=noise,
    )
    prefix = torch.zeros(ROUNDS, dtype=torch.int64)
    for depth in range(GUESSES + 1):
        token = sample(TARGET[depth][prefix], uniforms())
        if depth < GUESSES:
            token = torch.where(accepted > depth, tokens[depth], token)
        token = torch.where(accepted == depth, next_token, token)
        prefix = prefix * VOCABULARY + token
    return prefix


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_three_tokens_have_the_joint_law_of_the_target(rule: str, shown: bool) -> None:
    assert g_statistic(emitted(rule, shown=shown, seed=3)) < CRITICAL


@pytest.mark.parametrize("wrong", [{"bias": 0.1}, {"flatter": 0.7}])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_test_has_power(rule: str, wrong: dict[str, float]) -> None:
    assert g_statistic(emitted(rule, shown=True, seed=4, **wrong)) > 2 * CRITICAL
