"""integrations/: each script runs and prints what it promises, where the library that it serves is installed."""

import json
import re
import runpy
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specdec.construction import NAMES
from specdec.testing import tiny_llama

FOLDER = Path(__file__).resolve().parent.parent / "integrations"
pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries ask of transformers

PROMISES = {
    "trl_rollouts": (
        "trl",
        [
            r"^3 steps; the last rollout: [1-9]\d* guesses, [1-9]\d* kept$",
            r"^the same rewards: True$",
            r"^weights moved by up to 0\.0*[1-9]\d*, both the same way: True$",
        ],
    ),
    "lm_eval_task": ("lm_eval", [r"^4 answers; the last call: [1-9]\d* guesses,", r"^the same answers: True$"]),
}


@pytest.mark.parametrize("name", PROMISES)
def test_script(name, monkeypatch, capsys):
    library, promises = PROMISES[name]
    pytest.importorskip(library)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for promise in promises:
        assert re.search(promise, printed, re.MULTILINE), f"{promise!r} is not in:\n{printed}"


@pytest.fixture
def folder(tmp_path):
    """A tiny model as a server loads it."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("word", NAMES)
def test_every_word_for_a_draft_is_one_for_the_server(word, monkeypatch):
    manager = SimpleNamespace(process_model_name=str, load_model_and_processor=lambda _: (tiny_llama(), None))
    server = SimpleNamespace(_model_manager=manager, kill_server=lambda: None)
    # the server's own libraries need not be there for it
    monkeypatch.setitem(sys.modules, "transformers.cli.serve", SimpleNamespace(Serve=lambda **_: server))
    with runpy.run_path(str(FOLDER / "serve.py"))["serving"]("here", word, 0) as (_, generator):
        assert generator.draft == word


def test_the_server_of_transformers(folder):
    """Real requests to the real server, on this machine; with and without the draft."""
    for library in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(library)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    serving = runpy.run_path(str(FOLDER / "serve.py"))["serving"]

    def asked(door, **body):
        request = urllib.request.Request(
            f"http://localhost:{port}/v1/{door}",
            json.dumps({"model": folder, "temperature": 0, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    def ready():
        for _ in range(200):
            with socket.socket() as door:
                if door.connect_ex(("localhost", port)) == 0:
                    return
            time.sleep(0.05)

    def answers():
        chat = {"messages": [{"role": "user", "content": "w5 w9 w13 w5 w9"}], "max_tokens": 12}
        whole = json.loads(asked("chat/completions", **chat))["choices"][0]["message"]["content"]
        streamed = asked("chat/completions", stream=True, **chat)
        parts = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        deltas = [choice["delta"].get("content") or "" for part in parts for choice in part["choices"]]
        text = json.loads(asked("completions", prompt="w7 w8 w40", max_tokens=12))["choices"][0]["text"]
        return whole, "".join(deltas), text

    with serving(folder, "ngram", port) as (_, generator):
        ready()
        ours = answers()
        assert generator.stats.rounds > 0
        assert generator.stats.emitted == 12
        plain = type(generator.target).generate
        generator.target.generate, kept = plain.__get__(generator.target), generator.target.generate
        assert answers() == ours
        generator.target.generate = kept
    assert ours[0] == ours[1] != ""
    assert not [thread for thread in threading.enumerate() if thread.name == "uvicorn-thread"]
