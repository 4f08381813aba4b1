"""Several threads at once with one generator and one model object, as in a small service."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from specdec import EarlyExit, LayerSkip, SpeculativeGenerator
from specdec.attaching import attached, having, healing_with, own_settings
from specdec.testing import byte_tokenizer, noisy_copy, ragged_prompt, tiny_llama

from .contract import assert_untouched, fingerprint
from .proposers import PROPOSERS

TOKENIZER = byte_tokenizer()
WAIT = 60  # seconds, that no test should need


@pytest.fixture
def target():
    return tiny_llama(3, vocabulary=len(TOKENIZER))


def options(number):
    """Calls that differ in batch, length and end."""
    lengths = [(4,), (7, 3), (9,), (2, 5, 8)][number % 4]
    inputs = ragged_prompt(lengths, len(TOKENIZER), number)
    return {**inputs, "max_new_tokens": 8 + number % 5, "do_sample": False}


class Meeting(StoppingCriteria):
    """Ends nothing; lets another call run from its beginning to its end between two steps of this one."""

    def __init__(self):
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        self.inside.set()
        assert self.go_on.wait(WAIT)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def while_another_runs(first, second):
    """(what ``first(criteria)`` returns, what ``second()`` returned in the middle of it)."""
    meeting = Meeting()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(first, StoppingCriteriaList([meeting]))
        try:
            assert meeting.inside.wait(WAIT)
            between = second()
        finally:
            meeting.go_on.set()
        return running.result(WAIT), between


@pytest.mark.parametrize("draft", PROPOSERS)
def test_calls_at_once(target, draft):
    draft_model = noisy_copy(target, 0.1)
    texts = [[5, 6, 7]] * 3
    made, more = PROPOSERS[draft](draft_model, texts)
    more.pop("prediction", None)
    gen = SpeculativeGenerator(target, made, num_draft_tokens=3)
    wanted = [target.generate(**options(number)).tolist() for number in range(8)]
    before = fingerprint(target), fingerprint(draft_model)
    with ThreadPoolExecutor(4) as pool:
        got = pool.map(lambda number: gen.generate(**options(number % 8), **more).tolist(), range(16))
        assert list(got) == wanted * 2
    assert_untouched(target, before[0])
    assert_untouched(draft_model, before[1])


def test_seeds_hold_beside_other_calls(target):
    gen = SpeculativeGenerator(target, noisy_copy(target, 0.1), num_draft_tokens=3)
    calls = [{**options(number), "do_sample": True, "seed": number} for number in range(8)]
    wanted = [gen.generate(**call).tolist() for call in calls]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda call: gen.generate(**call).tolist(), calls * 2)) == wanted * 2


def test_stop_strings_of_the_model_hold_for_a_call_in_the_middle_of_another(target):
    """The first call has taken them out of the model's settings, which the second reads."""
    call = options(0)
    text = TOKENIZER.decode(target.generate(**call)[0, 4:])
    own = target.generation_config = GenerationConfig(pad_token_id=0, stop_strings=[text[3:5]])
    wanted = target.generate(**call, tokenizer=TOKENIZER).tolist()
    assert len(wanted[0]) < 4 + call["max_new_tokens"]
    gen = SpeculativeGenerator(target, noisy_copy(target, 0.1), tokenizer=TOKENIZER)
    before = fingerprint(target)
    got = while_another_runs(
        lambda criteria: gen.generate(**call, stopping_criteria=criteria).tolist(),
        lambda: gen.generate(**call).tolist(),
    )
    assert got == (wanted, wanted)
    assert target.generation_config is own
    assert_untouched(target, before)


@pytest.mark.parametrize("first_out", [0, 1])
def test_loans_that_overlap_leave_nothing(target, first_out):
    own, lent = target.generation_config, [GenerationConfig(), GenerationConfig()]
    before = fingerprint(target)
    stacks = [ExitStack(), ExitStack()]
    for stack, config in zip(stacks, lent, strict=True):
        stack.enter_context(having(target, config))
        assert target.generation_config is config
    assert own_settings(target) is own
    stacks[first_out].close()
    assert target.generation_config is lent[1 - first_out]
    assert own_settings(target) is own
    stacks[1 - first_out].close()
    assert target.generation_config is own_settings(target) is own
    assert_untouched(target, before)


def test_one_thing_may_be_lent_twice(target):
    """The newest loan of it ends first: what was lent in between counts again."""
    own, one, other = target.generation_config, GenerationConfig(), GenerationConfig()
    with having(target, one):
        with having(target, other):
            with having(target, one):
                assert target.generation_config is one
            assert target.generation_config is other
        assert target.generation_config is one
    assert target.generation_config is own


def test_settings_given_between_two_loans_are_what_is_left(target):
    """What a model had before its first loan is not what it had before its second."""
    for own in (GenerationConfig(pad_token_id=0), GenerationConfig(pad_token_id=1)):
        target.generation_config = own
        with having(target, GenerationConfig()):
            assert own_settings(target) is own
        assert target.generation_config is own


def test_tokens_are_healed_with_the_tokenizer_of_the_thread(target):
    used = []
    target.heal_tokens = lambda ids, tokenizer=None: used.append(tokenizer)
    with healing_with(target, "ours"), ThreadPoolExecutor(1) as pool:
        target.heal_tokens(1)
        pool.submit(target.heal_tokens, 1, "theirs").result(WAIT)
        pool.submit(target.heal_tokens, 1).result(WAIT)
    assert used == ["ours", "theirs", None]


def test_attached_blocks_that_overlap(target):
    """Whoever leaves first: afterwards ``generate`` is the model's own."""
    gens = [SpeculativeGenerator(target, "ngram"), SpeculativeGenerator(target, noisy_copy(target, 0.1))]
    call, before = options(1), fingerprint(target)
    wanted = target.generate(**call).tolist()
    stacks = [ExitStack(), ExitStack()]
    for stack, gen in zip(stacks, gens, strict=True):
        stack.enter_context(gen.attached())
    stacks[0].close()
    assert target.generate(**call).tolist() == wanted
    assert (gens[0].stats.rounds, gens[1].stats.rounds > 0) == (0, True)
    stacks[1].close()
    assert "generate" not in vars(target)
    assert_untouched(target, before)


def test_what_is_lent_to_a_compiled_model_is_lent_to_the_model_inside(target):
    given = torch.compile(target, backend="eager")
    own = target.generate = lambda: "own"
    with attached(given, lambda: "lent"):
        assert given.generate() == target.generate() == "lent"
    assert target.generate is own


def test_a_loan_that_ends_takes_no_other_with_it(target):
    first, second = ExitStack(), ExitStack()
    first.enter_context(attached(target, lambda: "first"))
    with having(target, GenerationConfig()):
        pass
    second.enter_context(attached(target, lambda: "second"))
    first.close()
    assert target.generate() == "second"
    second.close()
    assert "generate" not in vars(target)


def test_a_draft_is_prepared_without_being_touched(target, monkeypatch):
    """Another thread may be using it: even a setting that is put back would be seen."""
    draft = noisy_copy(target, 0.1)
    set_on_draft = []
    plain = type(draft).__setattr__

    def watched(self, name, value):
        if self is draft:
            set_on_draft.append(name)
        plain(self, name, value)

    gen = SpeculativeGenerator(target, draft, num_draft_tokens=3)
    monkeypatch.setattr(type(draft), "__setattr__", watched)
    gen.generate(**options(3))
    assert gen.stats.drafted > 0
    assert not set_on_draft


@pytest.mark.parametrize("draft", [EarlyExit(layers=1), LayerSkip(skip=[1])])
def test_one_draft_of_layers_for_two_targets_at_once(draft):
    """Each call gets the layers of its own target."""
    targets = [tiny_llama(3, num_hidden_layers=2), tiny_llama(4, num_hidden_layers=2)]
    gens = [SpeculativeGenerator(target, draft, num_draft_tokens=3) for target in targets]
    calls = [{**options(number), "input_ids": options(number)["input_ids"] % 60 + 3} for number in range(4)]
    wanted = [target.generate(**call).tolist() for call in calls for target in targets]
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(gen.generate, **call) for _ in range(4) for call in calls for gen in gens]
        assert [run.result(WAIT).tolist() for run in runs] == wanted * 4
