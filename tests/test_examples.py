"""The examples run without arguments and without a network, and print what they promise."""

import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))

# what each must print, as a regular expression
PROMISES = {
    "quickstart": [r"^same as generate\(\): True$", r"^accepted [1-9]\d* of \d+ guesses"],
    "batched": [
        r"(?s)(same as generate\(\): True.*){3}",
        r"^  row 3: \d+ tokens, [1-9]\d* of \d+ guesses kept$",
    ],
    "sampling_reproducible": [r"^different texts: 1$", r"^row 0 alone .*: True$"],
    "in_place": [
        r"^pipeline: [1-9]\d* guesses, the same text: True$",
        r"^serve: [1-9]\d* guesses, the same pieces: True$",
        r"^plain again: True$",
    ],
    "streaming": [
        r"^(w\d+ ){15}w\d+$",
        r"^3 rows, 8 steps, ended: True$",
        r"^steps are the columns of the output: True$",
    ],
    "code_editing": [
        r"^same as generate\(\): True$",
        r"^48 tokens in (\d|1\d) rounds$",
        r"^of the prediction 4[0-6] tokens appeared, [1-8] did not$",
    ],
    "another_tokenizer": [
        r"^same as generate\(\): True$",
        r"^guesses by strings: .*\naccepted [1-9]\d* of \d+ guesses$",
        r"^guesses by tokens: .*\naccepted [1-9]\d* of \d+ guesses$",
    ],
    "json_schema": [
        r"^keys: name, age, is_alive$",
        r"^same as generate\(\): True$",
        r"^accepted [1-9]\d* of \d+ guesses",
    ],
    "regular_expression": [
        r"^(\w+day, \d{4}-\d\d-\d\d\n){4}",
        r"^all match: True$",
        r"^accepted [1-9]\d* of \d+ guesses",
    ],
    "own_proposer": [r"^same as generate\(\): True$", r"^40 tokens in (\d|1\d) rounds$"],
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_no_example_hides_a_library(path):
    # a script's folder comes first where Python looks for modules: a regex.py there was taken for the library
    # of that name, which transformers imports
    assert find_spec(path.stem) is None


def test_every_example_makes_a_promise():
    assert {path.stem for path in EXAMPLES} == PROMISES.keys()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, monkeypatch, capsys):
    if "specdec.structured" in path.read_text() and not (find_spec("llguidance") or find_spec("xgrammar")):
        pytest.skip("neither llguidance nor xgrammar is installed")
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    for promise in PROMISES[path.stem]:
        assert re.search(promise, printed, re.MULTILINE), f"{promise!r} is not in:\n{printed}"
    assert "False" not in printed


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) < 60
