"""Everything on a device that is not the host: the same text, and one wait a round.

``elsewhere.py`` is the device, ``cases_elsewhere.py`` the calls, made in a process of their own. Fake CUDA tensors
(``test_synchronisation.py``) have no numbers. Here the front door is open from the first argument to the last
token, and copies to the device that would hold the host are counted as well.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, EosTokenCriteria, SuppressTokensLogitsProcessor, WatermarkLogitsProcessor
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from specdec.abroad import brought_home, home_of, taken_abroad
from specdec.layouts.facts import CACHE
from specdec.processing import is_function
from specdec.structured import Constraint
from specdec.testing import tiny_llama

from .cases_elsewhere import CASES, synthid

ROOT = Path(__file__).resolve().parent.parent
# where the host waits beside the round's one copy, and for what
READ = "aten._local_scalar_dense.default"
# transformers' masks look for padding, as in plain generate()
MASKS = {f"layouts/columns.py _feed: {READ}", f"layouts/masks.py mask: {READ}"}
KNOWN = {
    "none, greedy": MASKS,
    "none, block": MASKS,
    "none, inputs on the host": MASKS,
    "hybrid": MASKS,
    "encoder": MASKS,
    "another encoder": MASKS,
    # called as plain generate() calls them, one step at a time
    "ends and a condition": {"stopping.py follow: a copy to the host"},
    "unknown processor": {f"lockstep.py verify_in_lockstep: {READ}"},
    "guidance": MASKS | {f"lockstep.py verify_in_lockstep: {READ}"},
    # a function of the caller's, which reads the ids
    "prefix": {
        "stepwise.py advance: a tensor of numbers", f"stepwise.py _answer: {READ}",
        "stepwise.py process: a tensor of numbers",
    },
    "functions at home": None,
    "watermarks at home": None,
    # what a draft on another device reads and gives
    **{name: None for name in CASES if name.endswith("draft on the host")},
    "cascade, asked, draft on the host": {
        "proposers/cascade.py _ids: a copy to the host", "proposers/cascade.py _scores: a copy to the device",
    },
    "another tokenizer": set(),  # as text, so its guesses are read once more
    # the instrument works
    "reads a value": {f"positions.py by_length: {READ}", f"positions.py <listcomp>: {READ}"},
    "copies wait": {"transfer.py to_device: a copy to the device"},
}  # fmt: skip


@pytest.mark.parametrize("half", [0, 1])
def test_the_same_text_and_one_wait_a_round(half):
    names = list(CASES)[half::2]
    command = [sys.executable, "-m", "tests.cases_elsewhere", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    results = {line.pop("case"): line for line in map(json.loads, done.stdout.splitlines())}
    assert list(results) == names
    wrong = {name: result for name, result in results.items() if not as_it_should_be(name, result)}
    assert not wrong


def test_a_processor_with_a_generator_of_random_numbers_stays_at_home():
    """A generator belongs to one device; this one would be asked for numbers on another."""
    given = WatermarkLogitsProcessor(64, device="cpu")
    _, options = taken_abroad(tiny_llama(), torch.device("meta"), None, {"logits_processor": [given]})
    (called,) = options["logits_processor"]
    assert is_function(called)
    assert type(called) is not type(given)
    assert not is_function(synthid())  # a state, whose tensors are where it was told to make them
    plain, ends = SuppressTokensLogitsProcessor([4]), EosTokenCriteria(4)
    given = {"logits_processor": [plain, synthid()], "stopping_criteria": [ends]}
    _, options = taken_abroad(tiny_llama(), torch.device("meta"), None, given)
    moved, stays = options["logits_processor"]
    assert type(moved) is type(plain), "generate() must recognise it"
    assert type(stays) is type(called)
    assert type(options["stopping_criteria"][0]) is EosTokenCriteria


@pytest.mark.parametrize("name", [None, "input_ids", "inputs_embeds", "input_features"])
def test_a_call_is_at_home_where_its_inputs_are_whatever_they_are_called(name):
    target = SimpleNamespace(device=torch.device("cpu"), main_input_name="input_features")
    for device, home in (("cpu", None), ("meta", torch.device("meta"))):
        given = torch.zeros(1, 3, device=device)
        inputs, options = (given, {}) if name is None else (None, {name: given})
        assert home_of(target, inputs, {"attention_mask": torch.zeros(1, 3), **options}) == home
    assert home_of(target, None, {}) is None


class Traveller(torch.Tensor):
    """Says where it was sent, and arrives as another."""

    def to(self, device):
        self.taken.append((self.label, device))
        return torch.zeros(1)


def travellers():
    """(where tensors were sent, maker of a tensor with a name)."""
    taken = []

    def named(label):
        made = torch.zeros(1, 3).as_subclass(Traveller)
        made.label, made.taken = label, taken
        return made

    return taken, named


HERE, THERE = torch.device("cpu"), torch.device("meta")


def test_all_tensors_of_a_call_are_taken_along_and_nothing_of_the_callers_is_changed():
    taken, named = travellers()
    suppresses, grammars, cache = SuppressTokensLogitsProcessor([4]), Constraint(None), DynamicCache()
    suppresses.suppress_tokens = named("tokens")
    options = {
        "inputs_embeds": named("embeds"), "encoder_outputs": BaseModelOutput(named("states")), CACHE: cache,
        "logits_processor": [suppresses, grammars],
    }  # fmt: skip
    before = dict(options)
    _, moved = taken_abroad(SimpleNamespace(device=HERE), THERE, named("ids"), options)
    assert sorted(taken) == [(name, HERE) for name in ("embeds", "ids", "states", "tokens")]
    assert moved[CACHE] is cache
    assert moved["logits_processor"][1] is grammars, "whose state is no tensor"
    assert options == before
    assert type(suppresses.suppress_tokens) is Traveller


def test_a_condition_of_the_callers_is_asked_at_home():
    taken, named = travellers()
    given = {"stopping_criteria": [lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool)]}
    _, options = taken_abroad(SimpleNamespace(device=HERE), THERE, None, given)
    (called,) = options["stopping_criteria"]
    assert called(named("ids"), (named("scores"),)).device == HERE
    assert taken == [("ids", THERE), ("scores", THERE)]


def test_ids_and_scores_are_brought_home_and_nothing_is_added():
    taken, named = travellers()
    out = ModelOutput(sequences=named("ids"), scores=(named("scores"),), logits=(named("logits"),))
    brought_home(out, THERE)
    assert sorted(taken) == [(name, THERE) for name in ("ids", "logits", "scores")]
    assert list(brought_home(ModelOutput(sequences=named("ids")), THERE)) == ["sequences"]


def as_it_should_be(name, result):
    if name == "mixes devices":
        return result.get("error", "").startswith("MixedDevices")
    if "error" in result or not result["same"]:
        return False
    if name not in KNOWN:
        return result["waits"] == result["rounds"] > 0 and not result["others"]
    known = KNOWN[name]
    return result["waits"] > result["rounds"] > 0 and (known is None or set(result["others"]) <= known)
