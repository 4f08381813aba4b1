"""docs/options.md against the installed transformers: every argument and field has a verdict."""

import inspect
import re
from pathlib import Path

import pytest
from transformers import GenerationConfig, GenerationMixin

from specdec import SpeculativeGenerator
from specdec.options import ASSISTANCE, REFUSED

from .contract import NEW, llama, plain, prompts, speculative

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "options.md"
VERDICTS = {"honoured", "refused", "no effect"}


def rows(heading: str) -> dict[str, str]:
    """Name -> verdict of the table under ``heading``."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| `([*\w]+)` \| ([^|]+) \|", section, re.MULTILINE)
    names = [name for name, _ in found]
    assert len(names) == len(set(names)), "a name stands twice"
    return dict(found)


@pytest.fixture(scope="module")
def fields():
    return rows("Fields of GenerationConfig")


@pytest.fixture(scope="module")
def arguments():
    return rows("Arguments")


def test_every_field_of_the_installed_config_has_a_row(fields):
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known - fields.keys() == set(), "fields that the page does not name"
    assert fields.keys() - known == set(), "fields that transformers does not have"


def test_every_argument_has_a_row(arguments):
    for function in (GenerationMixin.generate, SpeculativeGenerator.generate):
        named = set(inspect.signature(function).parameters) - {"self", "kwargs"}
        assert named <= arguments.keys()


def test_arguments_of_the_constructor_have_a_row():
    section = PAGE.read_text().split("\n## Arguments of SpeculativeGenerator\n")[1]
    named = set(inspect.signature(SpeculativeGenerator).parameters) - {"target"}
    assert named == set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| [^|]+", section, re.M))))


def test_what_the_page_says_is_refused_is_refused(fields, arguments):
    verdicts = {**fields, **arguments}
    assert set(verdicts.values()) == VERDICTS
    refused = {name for name, verdict in verdicts.items() if verdict == "refused"}
    assert refused == {*REFUSED, *ASSISTANCE, "num_beams", "cache_implementation"}


def named_tests():
    """(file, function) of every test that the page names."""
    return re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE.read_text())


def test_every_row_names_a_test(fields, arguments):
    rows_with_tests = re.findall(r"^\| `[*\w]+` \|.*\| `test_\w+\.py::\w+` \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows_with_tests) == len(fields) + len(arguments)


def test_tests_that_the_page_names_exist():
    missing = [
        f"{file}::{function}"
        for file, function in named_tests()
        if f"\ndef {function}(" not in (TESTS / file).read_text()
    ]
    assert not missing
    assert len(named_tests()) > 100


WITHOUT_EFFECT = {
    "early_stopping": True,
    "length_penalty": 3.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "low_memory": True,
    "cache_config": {},
    "disable_compile": True,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "trust_remote_code": True,
}
# what generate() itself takes no value for, or fails with
WITHOUT_VALUE = {"continuous_batching_config", "is_assistant", "transformers_version"}


def test_fields_without_effect(fields, arguments):
    verdicts = {**fields, **arguments}
    named = {name for name, verdict in verdicts.items() if verdict == "no effect"}
    assert named == WITHOUT_EFFECT.keys() | WITHOUT_VALUE
    wanted = plain(llama(), prompts(3))
    for name, value in WITHOUT_EFFECT.items():
        for run in (llama().generate, speculative(llama(), "noisy").generate):
            got = run(**prompts(3), **{name: value}, max_new_tokens=NEW, do_sample=False)
            assert got.tolist() == wanted.tolist(), name
