"""Nothing in a round waits for the device but its one copy.

Real rounds of the shipped loop on fake CUDA tensors: they have shapes and no values, so whatever reads a value
(``.item()``, ``bool(tensor)``, ``nonzero``, a boolean mask) raises. The one place that may read,
``specdec.transfer.to_host``, is replaced by a script and counted. No GPU is needed, and none was used.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import masking_utils
from transformers.generation import logits_process as hf
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

import specdec.sampling
from specdec import Cascade, EarlyExit, Fallback, LayerSkip, Mixture, Recycling, Suffix, abroad
from specdec.layouts import compiled
from specdec.layouts.check import Trial
from specdec.layouts.compiled import CompiledSteps
from specdec.length.fixed import Fixed
from specdec.loop import decode
from specdec.processing import Processing
from specdec.proposers import Call, past
from specdec.proposers.draft_model import DraftModel
from specdec.records import Stats
from specdec.sampling import Coupled, Greedy, Rejection
from specdec.scorer import Scorer
from specdec.state import State
from specdec.stepwise import Stepwise
from specdec.testing import tiny_llama

BATCH, PROMPT, GUESSES, NEW = 3, 7, 4, 24
VOCABULARY = 64


class WithoutGuard(TorchFunctionMode):
    """``tensor[...]``, ``tensor[...] = value``, ``contiguous`` and ``~tensor`` in other words.

    Torch's own words for them ask for a CUDA guard, fake tensor or not, and a CPU build has none.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__invert__:
            return args[0].logical_not()
        if func is torch.Tensor.contiguous:
            return args[0].clone(memory_format=torch.contiguous_format)
        if func is torch.Tensor.__getitem__:
            return viewed(*args)
        if func is torch.Tensor.__setitem__:
            place = viewed(args[0], args[1])
            value = args[2]
            if isinstance(value, torch.Tensor):
                return torch.ops.aten.copy_.default(place, value)
            return torch.ops.aten.fill_.Scalar(place, value)
        return func(*args, **(kwargs or {}))


def viewed(result, index):
    """``result[index]``; a boolean mask is a read and fails."""
    items = index if isinstance(index, tuple) else (index,)
    if any(isinstance(item, torch.Tensor) for item in items):
        assert all(getattr(item, "dtype", None) != torch.bool for item in items), "reads a mask"
        picked = [item if isinstance(item, torch.Tensor) else None for item in items]
        return torch.ops.aten.index.Tensor(result, picked)
    first, dim = result, 0
    for item in items:
        if item is None:
            result = result.unsqueeze(dim)
        elif isinstance(item, int):
            result, dim = result.select(dim, item), dim - 1
        elif item is Ellipsis:
            named = [one for one in items if one is not None and one is not Ellipsis]
            dim += first.dim() - len(named) - 1
        else:
            start, stop, _ = item.indices(result.shape[dim])
            result = result.narrow(dim, start, max(stop - start, 0))
        dim += 1
    return result


class FakeNoise:
    """Noise of the right shapes: a CPU build has no generator for CUDA."""

    def __init__(self, seed, device):
        self.device = device

    def uniforms(self, *shape):
        return torch.empty(shape, dtype=torch.float64, device=self.device)


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    """A named layout is taken without its self-check, which compares numbers, once a model and not once a round."""
    monkeypatch.setattr(Trial, "known", lambda self: next(iter(self._candidates.values()))(self._plain))


def scripted_copies(monkeypatch):
    """Replace ``to_host``: rounds in which rows keep different numbers of guesses. Returns the calls."""
    calls: list[torch.Size] = []

    def to_host(tensor):
        calls.append(tensor.shape)
        packed = np.ones(tuple(tensor.shape), dtype=np.int64)
        if tensor.ndim == 1:
            return -packed  # the ids that end a row
        if len(calls) > 2:
            guesses = tensor.shape[1] - 2
            packed[:, -2] = np.minimum((np.arange(BATCH) + len(calls) - 1) % (GUESSES + 1), guesses)
        return packed

    for room in ("state", "transfer"):
        monkeypatch.setattr(f"specdec.{room}.to_host", to_host)
    monkeypatch.setattr("specdec.proposers.draft_model.to_host", forbidden)
    return calls


def forbidden(tensor):
    raise AssertionError("a copy of its own")


PROCESSORS = [
    hf.TemperatureLogitsWarper(0.7),
    hf.TopKLogitsWarper(10),
    hf.TopPLogitsWarper(0.9),
    hf.MinPLogitsWarper(0.05),
    hf.SuppressTokensLogitsProcessor([3], device="cpu"),
]


def rounds_on_fake_cuda(monkeypatch, sampling_of, layout, processors, count=4, guesser=DraftModel, steps=None):
    """Run ``count`` rounds; returns the shapes that were copied to the host."""
    target, draft = tiny_llama(vocabulary=VOCABULARY), tiny_llama(1, vocabulary=VOCABULARY)
    # the prompt is transformers' own business, and looks for padding by reading the mask
    monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", lambda *_: False)
    monkeypatch.setattr(specdec.sampling, "Noise", FakeNoise)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # which a CPU build has not
    calls = scripted_copies(monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, WithoutGuard():
        for model in (target, draft):
            for module in model.modules():
                for place in (module._parameters, module._buffers):
                    for name, tensor in place.items():
                        if tensor is not None:
                            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                            place[name] = torch.nn.Parameter(fake, requires_grad=False)
        assert mode is not None
        prompt = torch.zeros(BATCH, PROMPT, dtype=torch.int64, device="cuda")
        state = State(
            prompt,
            max_length=PROMPT + NEW,
            max_guesses=GUESSES,
            eos_ids=torch.zeros(2, dtype=torch.int64, device="cuda"),
            pad_id=0,
            starts=np.array([0, 2, 4]),
        )
        kwargs = {
            "attention_mask": torch.ones_like(prompt),  # its values are unknown: it may be padded
            "position_ids": torch.zeros_like(prompt),
            "use_cache": True,
            "logits_to_keep": 1,
        }
        config = SimpleNamespace(prefill_chunk_size=None)
        monkeypatch.setattr(past, "prepare", lambda model, call, _: (call.prompt, dict(kwargs), config, model))
        sampling = sampling_of(state)
        processing = Processing(processors)
        scorer = Scorer(target, kwargs, config, max_length=PROMPT + NEW, layout=layout, steps=steps)
        call = Call(target, prompt, {}, PROMPT + NEW, processing, sampling, scorer=scorer)
        proposer = guesser(draft, layout=layout).begin(call)
        stats = Stats()
        rounds = decode(state, scorer, proposer, Fixed(GUESSES), processing, sampling, stats)
        with torch.no_grad():
            for _ in range(count):
                next(rounds)
    assert stats.drafted > 0
    assert state.host_copies == count
    return calls


SAMPLINGS = {
    "greedy": lambda state: Greedy(),
    "token": lambda state: Rejection("token", 0, state.device),
    "block": lambda state: Rejection("block", 0, state.device),
    "coupled": lambda state: Coupled(torch.zeros(BATCH, dtype=torch.int64, device="cuda")),
}


@pytest.mark.parametrize("layout", ["slots", "columns"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_one_copy_a_round(monkeypatch, name, layout):
    processors = [] if name == "greedy" else PROCESSORS
    calls = rounds_on_fake_cuda(monkeypatch, SAMPLINGS[name], layout, processors, count=4)
    # the prompt and the ids that end a row once, then one a round
    assert len(calls) == 2 + 4


WITHOUT_A_SECOND_MODEL = {
    "suffix": lambda draft, layout: Suffix(),
    "early exit": lambda draft, layout: EarlyExit(layers=1),
    "layer skip": lambda draft, layout: LayerSkip(skip=[0]),
    "recycling": lambda draft, layout: Recycling(),
    "suffix, recycling": lambda draft, layout: Fallback(Suffix(), Recycling()),
    "suffix, model": lambda draft, layout: Fallback(Suffix(), DraftModel(draft, layout=layout)),
    "mixture": lambda draft, layout: Mixture(Suffix(), Recycling()),
    "mixture, model": lambda draft, layout: Mixture(Suffix(), DraftModel(draft, layout=layout)),
    "model, suffix": lambda draft, layout: Fallback(DraftModel(draft, layout=layout), Suffix()),
}


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("guesser", WITHOUT_A_SECOND_MODEL)
def test_one_copy_a_round_without_a_model(monkeypatch, guesser, name):
    calls = rounds_on_fake_cuda(monkeypatch, SAMPLINGS[name], "slots", [], guesser=WITHOUT_A_SECOND_MODEL[guesser])
    assert len(calls) == 2 + 4


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_cascade_copies_once_in_each_of_its_own_rounds(monkeypatch, name):
    commits = []
    commit = State.commit
    monkeypatch.setattr(State, "commit", lambda *args: commits.append(1) or commit(*args))
    calls = rounds_on_fake_cuda(
        monkeypatch, SAMPLINGS[name], "slots", PROCESSORS,
        guesser=lambda draft, layout: Cascade("ngram", DraftModel(draft, layout=layout)),
    )  # fmt: skip
    # each of the two texts copies its prompt and the ids that end it once
    assert len(commits) > 4
    assert len(calls) == 4 + len(commits)


def test_graphs_add_no_copy(monkeypatch):
    """What stands around a captured graph, on fake CUDA tensors; the graph itself is replaced by its eager pass."""
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    monkeypatch.setattr(compiled, "close", lambda scores, truth: True)  # reads, once a graph
    monkeypatch.setattr(compiled, "check_compiler", lambda model: None)
    steps = CompiledSteps()
    calls = rounds_on_fake_cuda(
        monkeypatch,
        SAMPLINGS["block"],
        "slots",
        PROCESSORS,
        guesser=lambda draft, layout: DraftModel(draft, layout=layout, compile=True),
        steps=steps,
    )
    assert len(calls) == 2 + 4
    assert steps.graphs > 0
    assert not steps.refused


def test_a_hidden_read_would_be_seen(monkeypatch):
    """The instrument works: a processor that looks at a value makes the same rounds raise."""

    class Reads:
        specdec_pure = True

        def __call__(self, ids, scores):
            return scores if scores.max() > 0 else -scores

    with pytest.raises(DataDependentOutputException):
        rounds_on_fake_cuda(monkeypatch, SAMPLINGS["greedy"], "slots", [Reads()])


# --- inputs on another device than the target -------------------------------------------------------

HOME, THERE = torch.device("cpu"), torch.device("cuda", 0)


def test_where_the_inputs_of_a_call_are():
    target, given = SimpleNamespace(device=HOME), torch.zeros(1, 3, device="meta")
    for inputs, options in ((given, {}), (None, {"input_ids": given}), (None, {"inputs_embeds": given})):
        assert abroad.home_of(target, inputs, options) == given.device
    hears = SimpleNamespace(device=HOME, main_input_name="input_features")
    assert abroad.home_of(hears, None, {"input_features": given}) == given.device
    # none of these is what the text begins with
    assert abroad.home_of(target, None, {"attention_mask": given, "input_ids": None}) is None
    assert abroad.home_of(target, torch.zeros(1, 3), {}) is None


class Adds:
    """Whatever it is called with must be at home, and what it answers is."""

    def __call__(self, ids, scores, **_):
        assert ids.device == scores.device == HOME
        return scores + 1


def test_what_is_taken_abroad_and_brought_home():
    target = SimpleNamespace(device=THERE)
    with FakeTensorMode():
        ids, scores = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 5)
        own, theirs = Adds(), hf.SuppressTokensLogitsProcessor([4])
        options = {
            "attention_mask": ids, "max_new_tokens": 3,
            "encoder_outputs": BaseModelOutput(last_hidden_state=scores),
            "logits_processor": [own, theirs], "stopping_criteria": [lambda ids, scores: Adds()(ids, scores) > 0],
            "prefix_allowed_tokens_fn": lambda row, ids: [row, ids.device],
        }  # fmt: skip
        before = dict(options)
        moved_ids, moved = abroad.taken_abroad(target, HOME, ids, options)
        assert moved_ids.device == moved["attention_mask"].device == THERE
        assert moved["encoder_outputs"].last_hidden_state.device == THERE
        assert moved["max_new_tokens"] == 3
        assert moved["prefix_allowed_tokens_fn"](1, moved_ids) == [1, HOME]
        called, kept = moved["logits_processor"]
        far = scores.to(THERE)
        assert called(moved_ids, far).device == THERE
        assert not called.specdec_pure
        # transformers' own kinds are recognised by their type; the caller's stays as it was
        assert type(kept) is type(theirs)
        assert kept.suppress_tokens.device == THERE
        assert theirs.suppress_tokens.device == HOME
        assert moved["stopping_criteria"][0](moved_ids, far).device == THERE
        assert options == before
        assert abroad.taken_abroad(target, HOME, None, {})[0] is None
        out = ModelOutput(sequences=moved_ids, scores=(far,), logits=(far,), hidden_states=(far,))
        home = abroad.brought_home(out, HOME)
        assert {home.sequences.device, home.scores[0].device, home.logits[0].device} == {HOME}
        assert home.hidden_states[0].device == THERE  # where plain generate() leaves them
        assert abroad.brought_home(moved_ids, HOME).device == HOME
        assert list(abroad.brought_home(ModelOutput(sequences=moved_ids), HOME)) == ["sequences"]


def test_what_a_processor_is_abroad():
    pure = Adds()
    pure.specdec_pure = True
    # one whose state is a value is called by its own methods
    grammar = SimpleNamespace(**dict.fromkeys(("start", "advance", "process"), print))
    assert isinstance(grammar, Stepwise)
    options = {"logits_processor": [pure, grammar]}
    _, moved = abroad.taken_abroad(SimpleNamespace(device=THERE), HOME, None, options)
    assert moved["logits_processor"][0].specdec_pure
    assert moved["logits_processor"][1] is grammar
