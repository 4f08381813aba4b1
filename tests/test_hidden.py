"""Hidden states for proposers that ask: those of plain generate(), at the positions that were committed."""

import pytest
import torch

from specdec import Fallback, Mixture, NGram, SpeculativeGenerator, Suffix, UnsupportedModel

from .architectures.build import Case, build
from .contract import NEW, gemma, llama, oracle, plain, prompts, qwen3_next, t5
from .test_compiled import traced  # noqa: F401

START = {llama: 9, gemma: 9, qwen3_next: 9, t5: 1}
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


class Reader:
    """Guesses what another proposer does, and keeps what it is shown."""

    wants_hidden = True

    def __init__(self, guesses):
        self.propose = guesses.propose
        self.rounds = []

    def observe(self, round_):
        self.rounds.append(round_)


def reader(make, batch):
    text = plain(make(), prompts(batch))
    return Reader(oracle(text, wrong={START[make] + 3, START[make] + 4}))


def assert_hidden_as_in_plain(rounds, make, batch):
    wanted = make().generate(**prompts(batch), **GREEDY, return_dict_in_generate=True, output_hidden_states=True)
    steps = wanted.decoder_hidden_states if make is t5 else wanted.hidden_states
    first, *rest = rounds
    assert first.hidden.shape == steps[0][-1].shape
    torch.testing.assert_close(first.hidden, steps[0][-1], atol=1e-4, rtol=1e-4)
    assert any((round_.counts > 1).any() for round_ in rest), "nothing was guessed"
    for round_ in rest:
        assert round_.hidden.shape[:2] == round_.emitted.shape
        for row in range(batch):
            for i in range(int(round_.counts[row])):
                step = int(round_.before[row]) - START[make] + i
                torch.testing.assert_close(round_.hidden[row, i], steps[step][-1][row, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("make", "layout"), [(llama, "slots"), (llama, "columns"), (gemma, "auto"), (t5, "auto"), (qwen3_next, "auto")]
)
def test_hidden_states_of_plain(make, layout, batch):
    draft = reader(make, batch)
    gen = SpeculativeGenerator(make(), draft, num_draft_tokens=3, layout=layout)
    got = gen.generate(**prompts(batch), **GREEDY)
    assert got.tolist() == plain(make(), prompts(batch)).tolist()
    assert_hidden_as_in_plain(draft.rounds, make, batch)


def test_they_are_not_kept_where_nobody_asks():
    draft = reader(llama, 3)
    draft.wants_hidden = False
    SpeculativeGenerator(llama(), draft, num_draft_tokens=3).generate(**prompts(3), **GREEDY)
    assert draft.rounds
    assert all(round_.hidden is None and round_.states is None for round_ in draft.rounds)


@pytest.mark.parametrize("join", [Fallback, Mixture])
def test_beside_another_proposer(join):
    draft = reader(llama, 3)
    gen = SpeculativeGenerator(llama(), join(Suffix(shortest=8), draft), num_draft_tokens=3, layout="slots")
    gen.generate(**prompts(3), **GREEDY)
    assert_hidden_as_in_plain(draft.rounds, llama, 3)


@pytest.mark.parametrize("asked", [False, True])
def test_the_caller_gets_what_the_caller_asked_for(asked):
    options = {**GREEDY, "return_dict_in_generate": True, "output_hidden_states": asked}
    got = SpeculativeGenerator(llama(), reader(llama, 3), num_draft_tokens=3).generate(**prompts(3), **options)
    wanted = llama().generate(**prompts(3), **options)
    assert (got.hidden_states is None) == (wanted.hidden_states is None) == (not asked)
    if asked:
        assert [s[-1].shape for s in got.hidden_states] == [s[-1].shape for s in wanted.hidden_states]


def test_a_compiled_target(traced):  # noqa: F811
    """A graph gives scores and nothing else, so passes that are asked for more are not graphs."""
    draft = reader(llama, 3)
    gen = SpeculativeGenerator(llama(), draft, num_draft_tokens=3, layout="slots", compile=True)
    gen.generate(**prompts(3), **GREEDY)
    assert_hidden_as_in_plain(draft.rounds, llama, 3)


def test_states_of_another_shape_are_refused():
    """gemma3n has four streams of them, before the rows."""
    model = build(Case("causal", "gemma3n_text"))
    gen = SpeculativeGenerator(model, Reader(NGram()), num_draft_tokens=3)
    with pytest.raises(UnsupportedModel, match=r"wants hidden states.*Gemma3n"):
        gen.generate(**prompts(1), **GREEDY)
