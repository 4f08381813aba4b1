"""``specdec.testing.assert_lossless`` lets lossless proposers through and stops the others."""

import numpy as np
import pytest
import torch

from specdec import NGram, Proposal
from specdec.testing import assert_lossless


def test_a_lossless_proposer_passes():
    assert_lossless(NGram(2), samples=1500)


class SaysOtherwise:
    """Guesses token 1, always, and says that every token was as likely."""

    def propose(self, state, limits):
        width = int(limits.max(initial=0))
        tokens = torch.ones(state.batch, width, dtype=torch.int64)
        return Proposal(tokens, limits, torch.zeros(state.batch, width, state.vocabulary))


class PeeksAndDrops:
    """Draws from rows that it shows, but submits a guess only if it came out as token 2 or more."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def propose(self, state, limits):
        width = int(limits.max(initial=0))
        chances = torch.ones(state.batch * width, state.vocabulary)
        tokens = torch.multinomial(chances, 1, generator=self.generator).view(state.batch, width)
        kept = (tokens >= 2).long().cumprod(1).sum(1).numpy() if width else np.zeros(state.batch, np.int64)
        return Proposal(tokens, np.minimum(kept, limits), torch.zeros(state.batch, width, state.vocabulary))


@pytest.mark.parametrize("wrong", [SaysOtherwise, PeeksAndDrops])
def test_a_proposer_that_changes_the_law_is_stopped(wrong):
    with pytest.raises(AssertionError, match="law of sampled tokens is off"):
        assert_lossless(wrong(), samples=1500)


class NoForm:
    """Guesses a tensor of floats."""

    def propose(self, state, limits):
        return Proposal(torch.ones(state.batch, int(limits.max(initial=0))), limits)


def test_a_proposer_that_returns_nonsense_is_stopped():
    from specdec import InvalidProposal

    with pytest.raises(InvalidProposal, match="wanted is"):
        assert_lossless(NoForm())
