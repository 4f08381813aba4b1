"""The benchmarks run from end to end, on tiny models: what they print is complete and adds up."""

import importlib
import io
import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec.layouts import compiled
from specdec.testing import lively, noisy_copy, ragged_prompt, tiny_llama

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
PROMPTS = sorted((FOLDER / "prompts").glob("*.toml"))


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts import one another as they do when run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # a third of a second each time, in a process as big as this
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (FOLDER / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a tiny target and of its draft, with a tokenizer trained on the prompts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<pad>", "<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train([str(path) for path in PROMPTS], trainer)
    target = tiny_llama(vocabulary=512, max_position_embeddings=2048)
    folders = []
    for name, model in {"target": target, "draft": noisy_copy(target, 0.05)}.items():
        folders.append(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[-1])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folders[-1])
    return [str(folder) for folder in folders]


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# --- the prompts ---


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_prompts_are_well_formed(path):
    import workload

    content = tomllib.loads(path.read_text())
    assert content["about"]
    prompts = workload.prompts_of(path.stem)
    assert 4 <= len(prompts) <= 6
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    for entry, prompt in zip(content["prompt"], prompts, strict=True):
        assert entry.keys() in ({"text"}, {"instruction", "passage"}, {"instruction", "language", "file"})
        assert (prompt.prediction is not None) == ("file" in entry)
        if prompt.prediction is not None:
            assert prompt.prediction in prompt.text
            assert 25 <= len(entry["file"].strip().splitlines()) <= 40
        if path.stem == "summarising":
            assert 200 <= len(entry["passage"].split()) <= 350


def test_the_classes_are_those_of_the_readme():
    import workload

    readme = (FOLDER / "README.md").read_text()
    assert len(workload.classes()) == 7
    assert not [name for name in workload.classes() if f"`{name}`" not in readme]


def test_batches_are_full():
    import workload

    assert workload.batches("abcde", 2) == [["a", "b"], ["c", "d"], ["e", "a"]]
    assert workload.batches("ab", 3) == [["a", "b", "a"]]


def test_a_context_stands_before_every_prompt():
    import workload

    class Words:
        """A token a word."""

        def __call__(self, text, add_special_tokens):
            return {"input_ids": text.split()}

        def decode(self, ids):
            return " ".join(ids)

    asked = workload.prompts_of("code_editing", 2)
    for prompt, longer in zip(asked, workload.behind(3000, asked, Words()), strict=True):
        assert longer.text.endswith(prompt.text)
        assert longer.prediction == prompt.prediction
        assert 3000 < len(longer.text.split()) - len(prompt.text.split()) < 3020
        assert longer.text.count(prompt.text) == 1  # nothing is asked twice


# --- run.py ---


def test_the_whole_contest(saved, capsys, tmp_path):
    import run

    command = [*saved, "--drafts", "model,ngram", "--k", "3", "--k", "auto", "--classes", "chat,code_editing"]
    command += ["--prompts", "1", "--new", "12", "--dtype", "float32", "--noise"]
    assert run.main([*command, "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "plots")]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out.splitlines()[-1])
    assert document == json.loads((tmp_path / "out.json").read_text())
    assert "x plain" in printed.out
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"speed.png", "cost.png"}
    assert document["provenance"]["versions"]["torch"] == torch.__version__
    assert set(document["cost_curve"]["target"]) == {str(width) for width in range(1, 17)}
    names = {"plain", "assisted", "assisted, k=3", "prompt lookup, k=3", "specdec none"}
    names |= {f"specdec {draft}, k={k}" for draft in ("model", "ngram") for k in (3, "auto")}
    assert document["skipped"] == {}
    assert not document["arguments"]["sample"]
    for kind in ("chat", "code_editing", "all"):
        summary = document["summary"][kind]
        assert set(summary) == names
        for name, figures in summary.items():
            assert figures["divergences"] == [], name  # float32: the same text
            assert figures["tokens"] == (24 if kind == "all" else 12)
            assert 0 < figures["of_model_bound"] < 1
            assert figures["ratio"]["low"] <= figures["ratio"]["median"] <= figures["ratio"]["high"]
            assert figures["gap_seconds"]["p50"] <= figures["gap_seconds"]["p99"]
        plain, model = summary["plain"], summary["specdec model, k=3"]
        assert plain["ratio"]["each"] == [1.0] * plain["batches"]
        assert plain["target_forwards_per_token"] == 1
        assert plain["acceptance_rate"] is None
        assert model["acceptance_rate"] > 0
        assert model["target_forwards_per_token"] < 1 < model["tokens_per_round"]
        assert model["draft_forwards_per_token"] > 0
        assert model["operations_per_token"] > plain["operations_per_token"]
        assert summary["assisted, k=3"]["acceptance_rate"] > 0


def test_a_batch_of_samples(saved, capsys):
    import run

    command = [*saved, "--drafts", "ngram,model+prediction", "--classes", "structured", "--prompts", "2"]
    rest = ["--useless-draft", "--no-stream"]
    assert run.main([*command, "--new", "6", "--batch", "3", "--sample", "--repeats", "2", *rest]) == 0
    document = last_line(capsys)
    skipped, summary = document["skipped"], document["summary"]["structured"]
    assert document["arguments"]["sample"]
    assert "batch" in skipped["assisted"]
    assert "prediction" in skipped["specdec model+prediction"]
    assert set(summary) == {"plain", "specdec ngram", "specdec none"}
    assert summary["specdec ngram"]["tokens"] == 36  # three rows of six, twice
    assert summary["specdec ngram"]["first_token_seconds"] is None


def test_words_are_handed_on(saved, capsys):
    import run

    drafts = ["suffix", "prediction", "ngram+prediction"]
    command = [*saved, "--drafts", ",".join(drafts), "--classes", "code_editing,chat", "--prompts", "1"]
    assert run.main([*command, "--new", "8", "--ours-only", "--dtype", "float32"]) == 0
    document = last_line(capsys)
    assert document["skipped"] == {}
    summary = document["summary"]
    assert set(summary["code_editing"]) == {"plain", "specdec none", *(f"specdec {word}" for word in drafts)}
    assert set(summary["chat"]) == {"plain", "specdec none", "specdec suffix"}
    assert not [f for f in summary["all"].values() if f["divergences"]]


@pytest.mark.parametrize("packs", [[], ["--pack", "--pack-draft", "--repeats", "2"]], ids=["plain", "packed"])
@pytest.mark.filterwarnings("error:specdec runs")
def test_compiled_contestants_race_beside_eager_ones(saved, capsys, monkeypatch, packs):
    """Packed ones keep their graphs, though the contestants that find plain weights have had their turn between."""
    import run

    monkeypatch.setattr(compiled, "BACKEND", "eager")
    command = [*saved, "--drafts", "model,none", "--classes", "chat", "--prompts", "1", "--new", "8"]
    assert run.main([*command, "--ours-only", "--k", "2", "--dtype", "float32", "--compile", *packs]) == 0
    shown = capsys.readouterr().out.splitlines()
    summary = json.loads(shown[-1])["summary"]["chat"]
    assert any("compiled" in line for line in shown[:-1])
    ours = {"specdec model, k=2", "specdec model, k=2, compiled", "specdec none, k=2"}
    assert set(summary) == {"plain", *ours} | ({"packed plain"} if packs else set())
    eager, graphs = summary["specdec model, k=2"], summary["specdec model, k=2, compiled"]
    assert graphs["tokens_per_round"] == eager["tokens_per_round"]
    assert eager["model_bound"] > 0
    assert graphs["model_bound"] is graphs["bytes_per_token"] is None, "no forward is seen inside a graph"


def test_an_unknown_word_is_the_librarys_error(saved, capsys):
    import run

    assert run.main([saved[0], "--drafts", "nonsense"]) == 2
    assert "draft='nonsense'" in capsys.readouterr().err
    assert run.main([saved[0], "--drafts", "model"]) == 2
    assert "DRAFT" in capsys.readouterr().err
    assert run.main([saved[0], "--classes", "nonsense"]) == 2
    assert "chat" in capsys.readouterr().err


# --- the parts that no run would show to be wrong ---


def test_tokens_that_came_together_are_no_time_apart():
    from measure import Run

    steps = [(1.0, 1), (3.0, 3), (4.0, 1)]
    run = Run(torch.zeros(1, 5), 0, [[7] * 5], 4.0, steps, [], [], None, None, None)
    assert run.first_token == 1.0
    assert run.gaps == [2.0, 0.0, 0.0, 1.0]


def test_new_tokens_end_at_the_end():
    from measure import new_tokens

    rows = torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [9, 5, 5, 5]])
    assert new_tokens(rows, [2, 9]) == [[5, 2], [5, 6, 7, 8], [9]]
    assert new_tokens(rows, None) == rows.tolist()


def test_time_outside_the_models():
    from costs import outside_per_round
    from measure import Forward

    target = [Forward(1, 9, 0.0, 1.0), Forward(1, 3, 2.0, 3.0), Forward(1, 3, 5.0, 5.5)]
    draft = [Forward(1, 9, -1.0, 0.0), Forward(1, 1, 1.25, 1.75), Forward(1, 1, 3.0, 4.5)]
    assert outside_per_round(target, draft) == [0.5, 0.5]


def test_noise_is_half_a_step():
    from models import GROUP, add_noise

    layer = torch.nn.Sequential(torch.nn.Linear(2 * GROUP + 5, 40))
    layer.requires_grad_(False)
    before = layer[0].weight.clone()
    add_noise(layer)
    noise = (layer[0].weight - before).abs()
    group = before[:, GROUP : 2 * GROUP]
    half = (group.amax(1) - group.amin(1))[:, None] / 30
    inside = noise[:, GROUP : 2 * GROUP]
    assert (inside <= half * 1.001).all()
    assert float((inside / half).mean()) == pytest.approx(0.5, abs=0.05)


def test_energy_is_that_of_the_packages(monkeypatch, tmp_path):
    import machine

    def write(zone, energy, most=1000):
        (tmp_path / zone).mkdir(exist_ok=True)
        (tmp_path / zone / "energy_uj").write_text(f"{energy}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text(f"{most}\n")

    monkeypatch.setattr(machine, "RAPL", tmp_path)
    meter = machine.Meter(torch.device("cpu"))
    meter.start()
    assert meter.stop()[1] is None  # nothing to read
    write("intel-rapl:0", 900)
    write("intel-rapl:1", 100)
    write("intel-rapl:0:0", 10)  # a part of the first package
    meter.start()
    write("intel-rapl:0", 50)  # ran over
    write("intel-rapl:1", 300)
    write("intel-rapl:0:0", 500)
    assert meter.stop()[1] == pytest.approx((150 + 200) / 1e6)


def test_memory_is_the_peak():
    import machine

    meter = machine.Meter(torch.device("cpu"))
    meter.start()
    torch.ones(50_000_000)  # 200 MB, gone at once
    peak = meter.stop()[0]
    assert peak is None or 150e6 < peak < 400e6


def test_both_models_are_packed(monkeypatch, saved, capsys):
    import models
    import run

    packed = []
    right = models.pack_weights
    monkeypatch.setattr(models, "pack_weights", lambda model: packed.append(right(model)))
    command = [*saved, "--drafts", "model", "--classes", "chat", "--prompts", "1", "--new", "3", "--ours-only"]
    assert run.main([*command, "--pack", "--pack-draft", "--dtype", "float32"]) == 0
    assert len(packed) >= 2
    assert set(last_line(capsys)["summary"]["chat"]) == {"plain", "packed plain", "specdec model", "specdec none"}


def test_what_cannot_be_packed_is_said_at_once(saved, capsys):
    import run

    command = [*saved, "--drafts", "model", "--classes", "chat", "--prompts", "1", "--new", "3", "--ours-only"]
    assert run.main([*command, "--pack-draft", "--draft-bits", "int8", "--dtype", "bfloat16"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("The benchmark cannot start: LlamaForCausalLM has no")


def test_an_oracle_copies_the_longest_that_there_is():
    from summary import oracle

    assert oracle([1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 4, 5]) == 3.0  # 1 2 3 and 4; 5 and 6
    assert oracle([7, 8], [1, 2]) == 1.0
    assert oracle([1] * 12, [1]) == 12.0  # goes on from its own guesses
    assert oracle([5] * 40, [5] * 30, most=3) == 10 / 2.5
    assert oracle([], [1]) is None


def test_shares_of_8grams():
    from summary import copied, percentiles, repeated

    assert repeated([*range(8), *range(8)]) == pytest.approx(1 / 9)
    assert repeated([1] * 16) == pytest.approx(8 / 9)
    assert copied(range(10), range(5, 30)) == 0
    assert copied(range(10), range(1, 9)) == pytest.approx(1 / 3)
    assert percentiles(range(1, 101)) == {"p50": 50, "p90": 90, "p99": 99}


# --- the two smaller scripts ---


def test_overhead(saved, capsys):
    import overhead

    command = [*saved, "--new", "16", "--repeats", "1", "--dtype", "float32", "--vocabulary", "300", "--batch", "2"]
    assert overhead.main(command) == 0
    document = last_line(capsys)
    assert set(document["round"]) == {"specdec", "assisted"}
    for figures in document["round"].values():
        assert 0 < figures["outside_ms"] <= figures["p90_ms"]
        assert figures["guesses"] > 1
    assert {f["against"] for f in document["verification"].values()} == {"softmax", "argmax"}
    with pytest.raises(SystemExit, match="--new"):
        overhead.of_rounds([])


def test_drafts_without_a_model(capsys):
    import proposers

    proposers.main(["--rounds", "3", "--guesses", "4", "--vocabulary", "300", "--lengths", "64"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["proposer", "batch", "length", "text", "round", "token", "observe"]
    assert len(lines) == 10
    for line in lines:
        *_, batch, length, text, a_round, token, observe = line.split()
        assert batch in "18"
        assert length == "64"
        assert float(observe) >= 0
        assert min(map(float, (text, a_round, token))) >= 0


def test_useless(saved, capsys):
    import useless

    command = [*saved, "--k", "3", "--new", "24", "--repeats", "2", "--batch", "2", "--dtype", "float32"]
    assert useless.main(command) == 0
    document = last_line(capsys)
    found = document["useless"]
    assert found["divergences"] == []
    assert found["plain_forwards"] == 24
    # with a fixed number of guesses it must show the loss: nearly every round drafts in vain
    assert found["counted_cost"] > 1.5
    assert found["lowest"] <= found["ratio"] <= found["highest"]
    # and a draft that is never given up is used again at once
    assert document["switching"]["switched_at"] == 12
    assert 0 <= document["switching"]["used_again_after"] <= 4
    assert document["switching"]["rounds_with_guesses_before"] == document["switching"]["rounds_before"]


def test_compiled_steps(saved, monkeypatch, capsys):
    import compiled_steps

    graphs = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **settings: graphs(step, backend="aot_eager", **settings))
    monkeypatch.setattr(compiled_steps, "PROMPT", 24)
    for pack in ([], ["--pack"]):
        compiled_steps.main([saved[0], "--dtype", "float32", "--widths", "1", "5", "--room", "64", *pack])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines] == ["width 1", "width 5"]
        assert all(line.endswith("equal in 100%") for line in lines)


def test_another_tokenizer(saved, capsys):
    import another_tokenizer

    command = [*saved, "--dtype", "float32", "--k", "3"]
    another_tokenizer.main([*command, "--classes", "chat", "--prompts", "1", "--new", "10"])
    found = last_line(capsys)["summary"]
    assert found.keys() == {"plain", "tokens", "strings"}
    for name in ("tokens", "strings"):
        assert found[name]["parted"] == []
        assert found[name]["tokens_per_round"] >= 1
    another_tokenizer.main([*command, "--classes", "chat", "--prompts", "1", "--new", "1"])
    assert last_line(capsys)["summary"]["tokens"]["first"] == 0, "one token has no guess before it"
    another_tokenizer.main([*command, "--law", "100"])
    printed = capsys.readouterr().out
    assert printed.count("degrees, p = ") == 9
    assert printed.count(" guesses") == printed.count("asked for") == 2
    assert " of 0 guesses" not in printed


def test_exits(saved, capsys):
    import exits

    command = [saved[0], "--exit", "1", "--skip", "0", "--k", "2", "--new", "12", "--dtype", "float32"]
    assert exits.main([*command, "--classes", "chat,code", "--rounds", "2"]) == 0
    drafts = last_line(capsys)["drafts"]
    assert [found["draft"] for found in drafts] == ["exit after 1", "without 0"]
    for found in drafts:
        assert found["step"] > 0
        assert 0 < found["lowest"] <= found["ratio"] <= found["highest"]
        assert 0 <= found["kept"] <= 1
        assert found["divergences"] == []
    assert exits.main([saved[0], "--search", "0", "--least", "1", "--new", "8", "--dtype", "float32"]) == 0
    assert last_line(capsys)["found"]["1"] in ([0], [1])


@pytest.mark.parametrize("name", ["another_tokenizer", "exits"])
def test_a_device_is_waited_for_and_warm_before_it_is_timed(name, saved, capsys, monkeypatch):
    script, what = importlib.import_module(name), []
    one = [*saved, "--k", "2"] if name == "another_tokenizer" else [saved[0], "--exit", "1"]
    monkeypatch.setattr(script.Clock, "wait", lambda clock: what.append("wait"))
    right = LlamaForCausalLM.generate
    monkeypatch.setattr(LlamaForCausalLM, "generate", lambda *a, **b: what.append("call") or right(*a, **b))
    script.main([*one, "--classes", "chat,code" if name == "exits" else "chat", "--new", "4", "--dtype", "float32"])
    what = what[what.index("call") :]
    first = what.index("wait")
    assert what[:first] == ["call"] * (2 if name == "exits" else 3), "everybody once"
    assert what[first:] == ["wait", "call", "wait"] * (len(what[first:]) // 3)


def test_where_texts_part_and_how_near_the_scores_are():
    from exactness import divergences

    # positions that are looked up, so that it matters where a row begins
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, eos_token_id=None)
    target, prompt = lively(GPT2LMHeadModel(config).eval()), ragged_prompt((6, 3, 4))
    plain = target.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    other = plain[:, :-1].clone()  # one may be shorter
    other[0, 9:11] += 1
    other[2, 6] += 1
    found = divergences(target, prompt, plain, other)
    assert [(one["row"], one["token"]) for one in found] == [(0, 3), (2, 0)]
    for one in found:
        # padding makes no difference to a row
        start = int((prompt["attention_mask"][one["row"]] == 0).sum())
        with torch.no_grad():
            scores = target(plain[one["row"], start : 6 + one["token"]][None]).logits[0, -1]
        best = scores.sort(descending=True).values
        assert one["gap"] == pytest.approx(float(best[0] - best[1]), abs=1e-3)


def test_a_target_is_changed_for_a_while():
    from one_draft import changed

    model = tiny_llama(dtype=torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for size in (0.25, 0.0):
        with changed(model, size, 2):
            for name, weight in model.named_parameters():
                difference = (weight - before[name]).float()
                if "proj" not in name:  # embeddings, norms, the head
                    assert not difference.any()
                else:
                    moved, wanted = float(difference.norm()), size * float(before[name].float().norm())
                    assert moved == pytest.approx(wanted, rel=0.02)
                    assert torch.linalg.svdvals(difference)[2:].sum() <= 0.1 * moved
        assert all(weight.equal(before[name]) for name, weight in model.named_parameters())
    with pytest.raises(KeyError), changed(model, 1.0, 2):
        raise KeyError  # whatever happens in between
    assert all(weight.equal(before[name]) for name, weight in model.named_parameters())


def test_one_draft(saved, capsys, monkeypatch):
    import one_draft

    command = ["one_draft.py", saved[0], saved[0], "--sizes", "0,0.8", "--rank", "2", "--new", "10", "--k", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--dtype", "float32", "--classes", "chat"])
    one_draft.main()
    heading, same, changed = (line.split() for line in capsys.readouterr().out.splitlines()[-3:])
    assert heading[:2] == ["size", "accepted"]
    # the target's own twin: every guess is kept, until the target is another
    assert same[:3] == ["0", "1.00", "1.00"]
    assert same[-1] == "10"
    assert changed[0] == "0.8"
    assert float(changed[1]) < 1
    assert int(changed[-1]) < 10


def test_the_table():
    from report import COLUMNS, show

    figures = dict.fromkeys((
        "tokens_per_second", "ratio_after_first_token", "model_bound", "of_model_bound", "acceptance_rate",
        "tokens_per_round", "first_token_seconds", "gap_seconds", "bytes_per_second", "operations_per_token",
        "bytes_per_token", "peak_memory_bytes", "repeated_8grams", "copied_8grams", "oracle_tokens_per_round",
        "joules_per_token",
    ))  # fmt: skip
    figures |= {"ratio": {"median": 1.5, "low": 1.25, "high": 2.0, "geometric_mean": 1.6}, "batches": 2}
    parted = {"batch": 1, "row": 2, "token": 3, "gap": 0.5}
    plain = {**figures, "tokens_per_second": 10.0, "batches": 1, "divergences": []}
    ours = {
        **figures, "tokens_per_second": 15.0, "of_model_bound": 0.987, "first_token_seconds": {"p50": 0.02},
        "gap_seconds": {"p50": 0.001, "p90": 0.01, "p99": 0.1}, "peak_memory_bytes": 3e6, "bytes_per_second": 4e9,
        "operations_per_token": 5e9, "bytes_per_token": 6e9, "acceptance_rate": 0.0, "tokens_per_round": 1.125,
        "divergences": [parted],
    }  # fmt: skip
    both = {"plain": plain, "ours": ours}
    out = io.StringIO()
    show({"summary": {"chat": both, "all": both}, "skipped": {"assisted": "no [draft]"}}, out)
    lines = out.getvalue().splitlines()
    heading = lines[0]
    # what nobody has is left out
    shown = ("tokens/s", "x plain", "spread", "geo. mean", "reached", "accepted", "a round", "first ms")
    shown += ("gap ms 50/90/99", "GB/s", "Gop", "GB", "MB")
    assert heading.split() == " ".join(shown).split()
    assert len(shown) < len(COLUMNS)
    assert lines[1].strip() == "chat (1 batches)"
    assert lines[2].split() == ["plain", "10.00", "1.50", "1.60"]  # no spread of one batch
    assert lines[3].split() == [
        "ours", "15.00", "1.50", "1.25–2.00", "1.60", "99%", "0.00", "1.12", "20", "1/10/100", "4.0", "5.0", "6.00",
        "3",
    ]  # fmt: skip
    assert "Energy is not readable here." in lines
    assert "assisted did not take part: no [draft]" in lines
    # the same text is not told again for all classes together
    (told,) = (line for line in lines if "parts from plain" in line)
    assert told.startswith("chat, batch 1, row 2: ours parts from plain at new token 3, where")
    assert told.endswith("are 0.5 apart")
    figures["joules_per_token"] = 0.5
    out = io.StringIO()
    show({"summary": {"all": {"plain": {**figures, "divergences": []}}}, "skipped": {}}, out)
    assert "J/token" in out.getvalue().splitlines()[0]
    assert "not readable" not in out.getvalue()


def test_first_use():
    from useless import first_use

    tokens = [0, 1, 2, 3, 4, 6, 8, 10, 12]
    drafted = [True, True, True, False, True, True, True, True, True]
    assert first_use(tokens, drafted, 2) == 4
    assert first_use(tokens, drafted, 7) is None


# --- the attacker ---


def test_the_attacker(saved, capsys, tmp_path):
    """Recorded in pieces, with and without the release; the released traces name nobody."""
    import attacker

    out = tmp_path / "traces.json"
    record = ["record", saved[0], "--classes", "chat,code", "--prompts", "2", "--samples", "4", "--new", "12"]
    record += ["--out", str(out), "--dtype", "float32", "--live", "2", "--interval", "0.01"]
    attacker.main([*record, "--seconds", "0"])
    assert "24 missing" in capsys.readouterr().out
    attacker.main(record)
    assert "24 traces of 4 prompts, complete" in capsys.readouterr().out
    traces = json.loads(out.read_text())["traces"]
    assert {sum(trace["sizes"]) for trace in traces if trace["kind"] == "rounds"} == {12}
    assert {size for trace in traces if trace["kind"] == "live" for size in trace["sizes"]} == {19}
    attacker.main(["classify", str(out)])
    rows = {row["seen"]: row for row in last_line(capsys)["results"]}
    released = rows["released, slowest round, bucket 1"]
    assert released["neighbours"] == released["centroid"] == released["chance"] == 0.25
    assert released["bytes"] == round(19 / 16, 4)
    assert rows["released live, number"]["traces"] == 8


def test_the_attackers_tools():
    import attacker

    rng = np.random.default_rng(0)
    traces = [
        {"prompt": p, "sample": n, "sizes": [1 + p] * 3, "times": np.cumsum(rng.random(3)).tolist()}
        for p in range(4)
        for n in range(6)
    ]
    assert attacker.attack("sizes", traces, attacker.counts)["neighbours"] == 1
    assert attacker.attack("times", traces, attacker.times)["neighbours"] < 0.7
    low, high = attacker.wilson(5, 10)
    assert (round(low, 3), round(high, 3)) == (0.237, 0.763)
