"""Every wrong verifier is rejected, by the question that should expose it, and with a margin."""

import pytest

from .law import Findings, Kind, World, examine, world
from .mutants import MUTANTS, SHIPPED

KINDS: tuple[Kind, ...] = ("sampled", "certain", "unknown")
VISIBLE = 1e-3  # a mutant seen only by rounding would be no proof of the test's power


def worlds() -> list[World]:
    return [
        world(family, seed, vocabulary=3, guesses=guesses, ragged=ragged)
        for family, guesses in (("free", 2), ("holes", 2), ("free", 3))
        for ragged, seed in ((False, 1), (True, 1), (True, 2), (True, 3))
    ]


def exposed(findings: Findings, question: str) -> bool:
    answers = {
        "law": not findings.law_error < VISIBLE,
        "misdrawn": findings.misdrawn > 0,
        "forbidden": findings.forbidden > 0,
    }
    return answers[question]


@pytest.mark.parametrize("rule", ["token", "block"])
def test_unchanged_parts_are_lossless(rule: str) -> None:
    for place in worlds():
        for kind in KINDS:
            findings = examine(SHIPPED.assembled(rule), place, kind)
            assert findings.lossless, findings


@pytest.mark.parametrize(
    ("name", "rule"), [(name, rule) for name, (_, rules, _) in MUTANTS.items() for rule in rules]
)
def test_mutant_is_rejected(name: str, rule: str) -> None:
    parts, _, question = MUTANTS[name]
    candidate = parts.assembled(rule)
    assert any(exposed(examine(candidate, place, kind), question) for place in worlds() for kind in KINDS)
