"""The documents: their code runs, their links lead somewhere, the tour of the source is complete.

Every fenced block marked ``python`` is run, the blocks of one document one after the other in one
namespace with a tiny `target`, `draft`, `tokenizer` and `inputs`. Blocks marked ``python no-run``
need a download and are only compiled.
"""

import ast
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from specdec.testing import ragged_prompt

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "specdec"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = [path for path in DOCUMENTS if path.name != "CONTRIBUTING.md"]  # it shows single lines
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, mark: str) -> list[tuple[int, str]]:
    """First line and code of every fenced block marked ``mark``."""
    text = path.read_text()
    found = [match for match in FENCE.finditer(text) if match[1].strip() == mark]
    return [(text[: match.start()].count("\n") + 2, match[2]) for match in found]


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """The anchors that a forge makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.fixture
def namespace(target, draft):
    words = {f"w{i}": i for i in range(64)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)))
    return {
        "target": target,
        "draft": draft,
        "tokenizer": tokenizer,
        "inputs": ragged_prompt(),
        "__name__": "docs",
    }


@pytest.mark.parametrize("path", [p for p in RUNNABLE if blocks(p, "python")], ids=named)
def test_code_runs(path, namespace):
    for line, code in blocks(path, "python"):
        exec(compile("\n" * (line - 1) + code, named(path), "exec"), namespace)


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if blocks(p, "python no-run")], ids=named)
def test_code_that_needs_a_download_is_python(path):
    for _, code in blocks(path, "python no-run"):
        ast.parse(code)


def test_the_proposer_of_the_document_is_the_example():
    example = ast.parse((ROOT / "examples" / "own_proposer.py").read_text())
    (page,) = (d for d in DOCUMENTS if d.name == "your-own-proposer.md")
    shown = [ast.parse(code) for _, code in blocks(page, "python")]
    classes = [
        [ast.dump(node) for node in tree.body if isinstance(node, ast.ClassDef)] for tree in (example, shown[0])
    ]
    assert classes[0] == classes[1] != []


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_resolve(path):
    broken = []
    for link in LINK.findall(prose(path)):
        if re.match(r"https?:|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        goal = (path.parent / file).resolve() if file else path
        if not goal.exists() or (anchor and anchor not in anchors(goal)):
            broken.append(link)
    assert not broken


def test_every_document_is_reached_from_the_readme():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall(prose(ROOT / "README.md"))}
    assert set(DOCUMENTS[1:]) <= linked


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_files_named_in_the_text_exist(path):
    patterns = re.findall(r"`((?:tests|docs|examples|src)/[\w./*-]+)`", prose(path))
    assert not [name for name in patterns if "<" not in name and not list(ROOT.glob(name))]


# --- the tour of the source ---


def test_the_tour_names_every_file():
    text = (ROOT / "docs" / "reading-the-source.md").read_text()
    files = {p.relative_to(SOURCE) for p in SOURCE.rglob("*.py")}
    rooms = {f"{f.parent}/" if f.name == "__init__.py" and f.parent.name else f.name for f in files}
    assert not {room for room in rooms if room not in text}
    tree = re.search(r"^src/specdec/\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert tree is not None
    listed = re.findall(r"^ +(\w+\.py)(?: (\w+\.py))?", tree[1], re.MULTILINE)
    assert {name for pair in listed for name in pair if name} <= {f.name for f in files}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=named)
def test_read_next_leads_to_a_file(path):
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    _, found, after = docstring.partition("Read next:")
    if not found:
        return
    names = re.findall(r"`+([\w./]+)`+", after.split("\n\n")[0])
    places = [name for name in names if name.endswith(".py") or "/" in name]
    assert places
    for place in places:
        assert any((folder / place).exists() for folder in (path.parent, SOURCE)), place
