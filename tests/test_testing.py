"""``specdec.testing.assert_lossless`` lets lossless proposers through and stops the others."""

import numpy as np
import pytest
import torch

from specdec import NGram, Proposal, SpeculativeGenerator, generator
from specdec.testing import assert_lossless, noisy_copy, ragged_prompt, tiny_llama


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


# one wrong token in some of the calls, and what is said of it
WRONG = {
    "greedy text differs, batch 1, k = 4": lambda rows, made, asked: (rows, made["num_draft_tokens"]) == (1, 4),
    "greedy text differs, batch 3, k = 1": lambda rows, made, asked: rows == 3,
    "text with shared noise differs": lambda rows, made, asked: "seed" in asked,
    "with rule 'token'": lambda rows, made, asked: made.get("verification") == "token",
    "with rule 'block'": lambda rows, made, asked: made.get("verification") == "block",
}


@pytest.mark.parametrize("said", WRONG)
def test_every_way_to_generate_is_looked_at(said, monkeypatch):
    class Wrong(SpeculativeGenerator):
        def __init__(self, target, draft, **options):
            super().__init__(target, draft, **options)
            self.made = {} if draft is None else options

        def generate(self, input_ids, **options):
            out = super().generate(input_ids, **options)
            if self.made and WRONG[said](len(input_ids), self.made, options):
                out[:, -2] = (out[:, -2] == 1).long()
            return out

    monkeypatch.setattr(generator, "SpeculativeGenerator", Wrong)
    with pytest.raises(AssertionError, match=said):
        assert_lossless(NGram(2), samples=200)


def test_every_check_may_have_a_proposer_of_its_own():
    made = []
    assert_lossless(None, make=lambda: made.append(NGram(2)) or made[-1], samples=50)
    assert len(made) == 10


def test_models_and_prompts_are_the_same_for_the_same_seed():
    def weights(model):
        return torch.cat([one.flatten() for one in model.parameters()])

    one, other = tiny_llama(3), tiny_llama(4)
    before = weights(one)
    assert torch.equal(before, weights(tiny_llama(3)))
    assert not torch.equal(before, weights(other))
    draft = weights(noisy_copy(one))
    assert torch.equal(draft, weights(noisy_copy(one)))
    assert torch.equal(before, weights(one)), "the model is as it was"
    assert 0 < (draft - before).abs().mean() < (weights(other) - before).abs().mean()
    prompt = ragged_prompt((4, 2))
    assert prompt["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert torch.equal(prompt["input_ids"], ragged_prompt((4, 2))["input_ids"])
