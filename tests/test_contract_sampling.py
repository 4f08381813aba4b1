"""Seeds: shared noise makes the text a function of target, seed and prompt; what generators are used.

Bit equality across drafts, numbers of guesses, batches and layouts at temperature > 0, with targets
in float64.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor

from specdec import DraftModel, InvalidInput, SpeculativeGenerator
from specdec.noise import seed_of
from specdec.sampling import asked_of
from specdec.testing import lively, noisy_copy, ragged_prompt, tiny_llama

from .contract import llama, noisy, oracle, prompts, speculative, t5

WARM = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 10}
LENGTHS = (9, 6, 3, 7)


def target():
    return llama(0, torch.float64)


def inputs(batch):
    """Four padded rows, or the first alone, which has no padding in company either."""
    return {k: v[:batch] for k, v in ragged_prompt(LENGTHS).items()}


@cache
def reference(batch, seed=7):
    gen = SpeculativeGenerator(target(), None, verification="coupled", seed=seed)
    return gen.generate(**inputs(batch), **WARM)


def draft(name):
    return {
        "none": None,
        "ngram": "ngram",
        "noisy": noisy(target()),
        "self": target(),
        "another": llama(5),
        "oracle": oracle(reference(4), wrong={14}),
    }[name]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tokens", [1, 4, 7])
@pytest.mark.parametrize("name", ["ngram", "noisy", "self", "another", "oracle"])
def test_the_same_text_for_every_draft(name, tokens, batch):
    gen = speculative(target(), draft(name), tokens=tokens, verification="coupled", seed=7)
    assert gen.generate(**inputs(batch), **WARM).tolist() == reference(batch).tolist()
    assert gen.stats.drafted > 0
    if name in ("self", "oracle"):
        assert gen.stats.accepted > 0


def test_identical_draft_and_target_accept_everything():
    gen = speculative(target(), target(), verification="coupled", seed=7)
    gen.generate(**inputs(4), **WARM)
    assert gen.stats.acceptance_rate == 1.0


def test_a_row_alone_and_in_company():
    """Each row by itself, without its padding, under the same seed."""
    together, mask = reference(4), inputs(4)["attention_mask"]
    for row, length in enumerate(LENGTHS):
        ids = inputs(4)["input_ids"][row : row + 1, -length:]
        gen = speculative(target(), "noisy", verification="coupled", seed=7)
        alone = gen.generate(ids, attention_mask=torch.ones_like(ids), **WARM)
        assert alone[0].tolist() == together[row, mask.shape[1] - length :].tolist()


def test_a_row_with_token_types_alone_and_in_company():
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64, pad_token_id=0)
    gen = speculative(lively(GPT2LMHeadModel(config).eval()), "ngram", verification="coupled", seed=7)
    asked = inputs(4)
    types = asked["input_ids"] % 2 * asked["attention_mask"]
    together = gen.generate(**asked, token_type_ids=types, **WARM)
    for row, length in enumerate(LENGTHS):
        alone = {name: one[row : row + 1, -length:] for name, one in {**asked, "token_type_ids": types}.items()}
        text = gen.generate(**alone, **WARM)
        assert text[0].tolist() == together[row, types.shape[1] - length :].tolist()


def test_the_order_of_the_rows_does_not_matter():
    order = [2, 0, 3, 1]
    shuffled = {k: v[order] for k, v in inputs(4).items()}
    gen = speculative(target(), "noisy", verification="coupled", seed=7)
    assert gen.generate(**shuffled, **WARM).tolist() == reference(4)[order].tolist()


@pytest.mark.parametrize("layout", ["slots", "columns", "snapshot", "plain"])
@pytest.mark.parametrize("name", ["noisy", "oracle"])
def test_the_same_text_in_every_layout(name, layout):
    gen = speculative(target(), draft(name), verification="coupled", seed=7, layout=layout)
    assert gen.generate(**inputs(4), **WARM).tolist() == reference(4).tolist()


@pytest.mark.parametrize("layout", ["slots", "columns", "snapshot"])
def test_the_same_text_in_every_layout_of_the_draft(layout):
    gen = speculative(target(), DraftModel(noisy(target()), layout=layout), verification="coupled", seed=7)
    assert gen.generate(**inputs(4), **WARM).tolist() == reference(4).tolist()
    assert gen.stats.accepted > 0


def test_the_seed_of_the_call_wins_and_changes_the_text():
    gen = speculative(target(), "noisy", verification="coupled", seed=1)
    for seed in (7, 0):
        assert gen.generate(**inputs(4), seed=seed, **WARM).tolist() == reference(4, seed).tolist()
    assert gen.generate(**inputs(4), **WARM).tolist() == reference(4, 1).tolist()
    assert reference(4, 1).tolist() not in (reference(4).tolist(), reference(4, 0).tolist())


def test_one_seed_a_row():
    gen = speculative(target(), "noisy", verification="coupled")
    got = gen.generate(**inputs(4), seed=[7, 1, 1, 7], **WARM)
    wanted = [reference(4, seed)[row] for row, seed in enumerate([7, 1, 1, 7])]
    assert got.tolist() == torch.stack(wanted).tolist()


def test_a_wrong_number_of_seeds_is_refused():
    gen = speculative(target(), "noisy", verification="coupled")
    with pytest.raises(InvalidInput, match=r"3 seeds for 4 rows.*one seed a row"):
        gen.generate(**inputs(4), seed=[1, 2, 3], **WARM)


def test_a_seed_is_another_for_every_decoding():
    """Of every row, where every row has its own; nobody counts seeds so that they meet."""
    assert seed_of(None, 3) is None
    assert (seed_of(5, 0), seed_of([5, 6], 0)) == (5, [5, 6])
    assert seed_of([5, 6], 2) == [seed_of(5, 2), seed_of(6, 2)]
    assert len({seed_of(seed, number) for seed in range(50) for number in range(50)}) == 2500


@pytest.mark.parametrize("rule", ["block", "token"])
def test_seeds_a_row_need_shared_noise(rule):
    gen = speculative(target(), "noisy", verification=rule)
    with pytest.raises(InvalidInput, match="coupled"):
        gen.generate(**inputs(4), seed=[1, 2, 3, 4], **WARM)


def test_two_copies_of_a_prompt_differ():
    twice = {k: v[:1].repeat(2, 1) for k, v in inputs(1).items()}
    gen = speculative(target(), "noisy", verification="coupled", seed=7)
    got = gen.generate(**twice, **WARM)
    assert got[0].tolist() == reference(1)[0].tolist()
    assert got[1].tolist() != got[0].tolist()


class Warmer(LogitsProcessor):
    """For all that the library knows, it has a state."""

    def __call__(self, input_ids, scores):
        return scores * 0.9


def test_processors_with_a_state_leave_the_coupling_as_it_is():
    """Verification one position after the other draws the same tokens."""
    options = {**WARM, "max_new_tokens": 24, "logits_processor": [Warmer()]}
    found = [
        speculative(target(), draft(name), verification="coupled", seed=3).generate(**inputs(4), **options).tolist()
        for name in ("none", "ngram", "noisy", "self")
    ]
    assert found[1:] == [found[0]] * 3


@pytest.mark.parametrize("eos", [None, 7])
def test_conditions_end_the_same_text(eos):
    """Where rows end does not depend on the draft, nor on how far a row was ahead."""
    free = reference(4)
    stop = {int(free[row, 9 + place]) for row, place in ((0, 2), (1, 5), (2, 3), (3, 4))}

    def criterion(ids, scores):
        return torch.isin(ids[:, -1], torch.tensor(sorted(stop)))

    options = {**WARM, "eos_token_id": eos, "stopping_criteria": [criterion]}
    found = []
    for name in ("none", "ngram", "noisy", "self", "oracle"):
        gen = speculative(target(), draft(name), verification="coupled", seed=7)
        found.append(gen.generate(**inputs(4), **options).tolist())
    assert found[1:] == [found[0]] * 4
    assert found[0] != free.tolist()


@pytest.mark.parametrize("rule", ["block", "token", "coupled"])
@pytest.mark.parametrize("name", ["noisy", "ngram", "none"])
def test_manual_seed_reproduces_a_call_and_two_calls_differ(name, rule):
    gen = speculative(target(), draft(name), verification=rule)
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        runs.append([gen.generate(**inputs(4), **WARM).tolist() for _ in range(2)])
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


@pytest.mark.parametrize("rule", ["block", "token", "coupled"])
def test_a_seed_reproduces_a_call(rule):
    gen = speculative(target(), "noisy", verification=rule, seed=5)
    first = gen.generate(**inputs(4), **WARM).tolist()
    assert gen.generate(**inputs(4), **WARM).tolist() == first
    assert gen.generate(**inputs(4), seed=6, **WARM).tolist() != first


@pytest.mark.parametrize("rule", ["block", "token", "coupled"])
@pytest.mark.parametrize("name", ["noisy", "ngram", "none"])
def test_draws_from_the_global_generator(name, rule):
    """Greedy draws nothing, a seed given draws nothing, sampling draws one number and no more."""
    gen = speculative(target(), draft(name), verification=rule)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    gen.generate(**inputs(4), max_new_tokens=6, do_sample=False)
    assert torch.equal(torch.get_rng_state(), before)
    gen.generate(**inputs(4), seed=1, **WARM)
    assert torch.equal(torch.get_rng_state(), before)
    gen.generate(**inputs(4), **WARM)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.randint(0, 2**62, (1,))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("rule", ["block", "token", "coupled"])
@pytest.mark.parametrize("seed", [0, -5, 2**70])
def test_any_whole_number_is_a_seed(seed, rule):
    gen = speculative(llama(), "noisy", verification=rule, seed=seed)
    runs = [gen.generate(**prompts(1), **WARM).tolist() for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("seed", ["7", 1.5])
def test_what_is_no_seed_is_refused_by_name(seed):
    with pytest.raises(InvalidInput, match="seed"):
        speculative(llama(), "noisy", seed=seed).generate(**prompts(1), **WARM)


def test_shared_noise_of_an_encoder_decoder_model_is_keyed_by_what_the_encoder_reads():
    """A row alone and in company, in any place: the decoder's start is the same for all rows."""
    inputs = prompts(3)
    options = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 12, "seed": 5}
    gen = speculative(t5(), "ngram", verification="coupled")
    together = gen.generate(**inputs, **options)
    turned = gen.generate(**{name: value.flip(0) for name, value in inputs.items()}, **options)
    assert together.tolist() == turned.flip(0).tolist()
    alone = {name: value[:1] for name, value in inputs.items()}
    assert gen.generate(**alone, **options)[0].tolist() == together[0].tolist()


@pytest.mark.parametrize("draft", ["noisy", "ngram", None])
def test_padding_of_what_a_decoder_begins_with_is_no_part_of_the_key(draft):
    ids, mask = prompts(3).values()
    start = torch.tensor([[0, 0, 0, 11, 12], [0, 20, 21, 22, 23], [0, 0, 30, 31, 32]])
    seen = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 12, "seed": 5}
    gen = speculative(t5(), draft, verification="coupled")
    together = gen.generate(
        ids, attention_mask=mask, decoder_input_ids=start, decoder_attention_mask=seen, **options
    )
    for row, first in enumerate(seen.argmax(dim=1).tolist()):
        one = slice(row, row + 1)
        alone = gen.generate(ids[one], attention_mask=mask[one], decoder_input_ids=start[one, first:], **options)
        assert alone[0, -12:].tolist() == together[row, -12:].tolist(), row


def test_samples_of_one_prompt_are_keyed_by_what_the_encoder_reads():
    """Whatever other prompts there are."""
    ids = prompts(3)["input_ids"][:2, -3:]
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 12, "seed": 5}
    gen = speculative(t5(), "ngram", verification="coupled")
    together = gen.generate(ids, **options)
    assert together[2:].tolist() == gen.generate(ids[1:], **options).tolist()


def test_padding_of_embeddings_is_no_part_of_the_key():
    ids, mask = inputs(2).values()
    embeds = target().get_input_embeddings()(ids)
    gen = speculative(target(), "ngram", verification="coupled", seed=7)
    together = gen.generate(inputs_embeds=embeds, attention_mask=mask, **WARM)
    alone = gen.generate(inputs_embeds=embeds[1:, -6:], attention_mask=mask[1:, -6:], **WARM)
    assert together[1:].tolist() == alone.tolist()


@pytest.mark.parametrize("rule", ["block", "token", "coupled"])
@pytest.mark.parametrize("tokens", ["auto", 3])
def test_a_seed_means_the_same_text_on_the_first_call_of_a_model_and_later(tokens, rule):
    """The self-check of the first call must not change how many guesses are made."""
    model = tiny_llama(11)
    gen = SpeculativeGenerator(model, noisy_copy(model, 0.1), num_draft_tokens=tokens, verification=rule)
    options = {**WARM, "max_new_tokens": 24}
    texts = [gen.generate(**inputs(1), **options, seed=5).tolist() for _ in range(3)]
    assert gen.stats.drafted > 0 or rule == "coupled"  # whose text does not depend on it: there the clock decides
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds"])
def test_padding_beside_the_prompt_is_no_part_of_what_was_asked(name):
    """What an encoder reads is, without masks and positions: a row asks the same in every batch."""

    def asked(padding):
        values = torch.tensor([[5, 6, 7], [8, 9, 4]])
        values = torch.nn.functional.pad(values, (0, padding), value=padding)
        mask = torch.ones(2, 3 + padding, dtype=torch.int64)
        mask[:, 3:] = 0
        if name == "inputs_embeds":
            values = values[..., None].float()
        state = SimpleNamespace(host_tokens=np.array([[0, 1], [0, 1]]), starts=[1, 0], prompt_length=2, batch=2)
        return asked_of(state, {name: values, "attention_mask": mask, "position_ids": mask.cumsum(1)})

    assert asked(0) == asked(1) == asked(2)
    (first, _), (*second, _) = asked(0)
    assert [first] == [1]
    assert second == [0, 1]
    assert asked(0)[0][-1] != asked(0)[1][-1]
