"""Top-p and top-k without a full sort keep exactly what transformers' classes keep."""

import math

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from specdec import warpers
from specdec.processing import Processing
from specdec.warpers import warp

IDS = torch.zeros(1, 1, dtype=torch.int64)


def rows(kind, vocabulary, generator):
    """(N, V) rows of scores of one kind."""
    noise = torch.randn(6, vocabulary, generator=generator)
    peaks = torch.tensor([0.3, 1.0, 2.0, 3.0, 5.0, 9.0])[:, None]
    if kind == "random":
        return noise * peaks
    if kind == "text":  # a few likely tokens over a long tail
        order = torch.randperm(vocabulary, generator=generator)
        return -torch.log1p(order.float()) * (1 + peaks / 3) + noise / 4
    if kind == "bfloat16":
        return (noise * peaks).bfloat16().float()
    if kind == "tied":
        return (noise * peaks).round()
    if kind == "flat":
        return torch.full_like(noise, 1.5)
    if kind == "nearly flat":
        return (noise > 0).float() * 1e-3
    if kind == "one-hot":
        return torch.where(noise == noise.amax(dim=1, keepdim=True), 0.0, -math.inf)
    if kind == "masked":
        return (noise * peaks).masked_fill(torch.rand(noise.shape, generator=generator) < 0.9, -math.inf)
    if kind == "signed zeros":
        return torch.where(noise > 2, noise, torch.copysign(torch.zeros_like(noise), noise))
    assert kind == "one allowed"
    return torch.full_like(noise, -math.inf).index_fill(1, torch.tensor([7]), -3.0)


KINDS = [
    "random", "text", "bfloat16", "tied", "flat", "nearly flat", "one-hot", "masked", "signed zeros", "one allowed",
]  # fmt: skip
WARPERS = [
    *(hf.TopPLogitsWarper(p) for p in (0.0, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0)),
    hf.TopPLogitsWarper(0.3, min_tokens_to_keep=5),
    hf.TopPLogitsWarper(0.3, min_tokens_to_keep=400),
    hf.TopPLogitsWarper(0.9, filter_value=-1e4),
    hf.TopKLogitsWarper(1),
    hf.TopKLogitsWarper(50),
    hf.TopKLogitsWarper(10**6),
    hf.TopKLogitsWarper(50, filter_value=-1e4),
]


def named(warper):
    return type(warper).__name__.removesuffix("LogitsWarper") + str(vars(warper))


@pytest.mark.parametrize("warper", WARPERS, ids=named)
@pytest.mark.parametrize("kind", KINDS)
def test_same_as_transformers(kind, warper):
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (1024, 5003, 30011):
        scores = rows(kind, vocabulary, generator)
        before = scores.clone()
        assert torch.equal(warp(warper, IDS, scores), warper(IDS, scores))
        assert torch.equal(scores, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("warper", WARPERS[3:5], ids=named)
def test_rows_without_a_distribution_are_left_to_transformers(warper, bad):
    scores = torch.randn(3, 2000, generator=torch.Generator().manual_seed(1))
    scores[1] = bad if bad == -math.inf else scores[1]
    scores[1, 5] = bad
    assert torch.equal(warp(warper, IDS, scores).nan_to_num(7.0), warper(IDS.expand(3, 1), scores).nan_to_num(7.0))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("warper", [hf.EtaLogitsWarper(3e-4), hf.TopHLogitsWarper(0.5)], ids=named)
def test_rows_without_a_distribution_pass_what_would_raise_there(warper, bad):
    scores = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    others = torch.tensor([0, 2])
    wanted = warper(IDS.expand(2, 1), scores[others].clone())
    scores[1] = bad if bad == -math.inf else scores[1]
    scores[1, 5] = bad
    found = warp(warper, IDS.expand(3, 1), scores)
    assert torch.equal(found[1].nan_to_num(7.0), scores[1].nan_to_num(7.0))
    assert torch.equal(found[others], wanted)


def borders():
    """Rows and warpers for which mass and border agree up to rounding, no two scores being equal."""
    for size in (113, 127):
        scores = torch.full((1, 2048), -math.inf)
        scores[0, :size] = 1e-9 * torch.arange(size)
        yield from ((scores, hf.TopPLogitsWarper(kept / size)) for kept in range(1, size))


def test_border_on_a_score():
    """Only transformers' own arithmetic can say which side."""
    for scores, warper in borders():
        assert torch.equal(warp(warper, IDS, scores), warper(IDS, scores))


def test_without_slack_the_border_is_missed(monkeypatch):
    """The test above has power."""

    def careless(highest, total, vocabulary, border):
        tails = 1 - torch.tensor(highest).cumsum(0) / total
        return int((tails > border).sum()) + 1

    monkeypatch.setattr(warpers, "_kept", careless)
    assert not all(torch.equal(warp(w, IDS, scores), w(IDS, scores)) for scores, w in borders())


def test_every_way_is_taken(monkeypatch):
    """Selecting few, selecting more, and sorting all give the same, and each is reached."""
    counts = {256: 0, 4096: 0, None: 0}
    shipped = warpers._kept

    def kept(highest, *rest):
        found = shipped(highest, *rest)
        counts[len(highest) if found is not None else None] += 1
        return found

    monkeypatch.setattr(warpers, "_kept", kept)
    generator = torch.Generator().manual_seed(2)
    warper = hf.TopPLogitsWarper(0.9)
    for sharpness in (0.1, 1.5, 2.5, 5.0):
        scores = torch.randn(4, 20000, generator=generator) * sharpness
        assert torch.equal(warp(warper, IDS, scores), warper(IDS, scores))
    assert all(counts.values()), counts


def test_processing_uses_them_in_their_order():
    processors = [hf.TemperatureLogitsWarper(0.7), hf.TopKLogitsWarper(300), hf.TopPLogitsWarper(0.8)]
    scores = torch.randn(2, 3, 3000, generator=torch.Generator().manual_seed(3)) * 3
    expected = scores.reshape(6, -1)
    for processor in processors:
        expected = processor(IDS, expected)
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    lengths, guesses, live = np.array([4, 5]), np.array([2, 2]), np.array([True, True])
    found = Processing(processors).target(scores, tokens, lengths, guesses, live)
    assert torch.equal(found.reshape(6, -1), expected)
