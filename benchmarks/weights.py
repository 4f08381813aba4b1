"""Packed, quantised and pruned weights: seconds a pass, effect on the scores, speed with each kind of draft.

    python benchmarks/weights.py steps TARGET DRAFT
    python benchmarks/weights.py scores TARGET DRAFT
    python benchmarks/weights.py speed TARGET DRAFT [--k 4] [--new 48] [--prompts 3] [--first 0] [--drafts ...]

To both models uniform noise of half a 4-bit step (groups of 32) is added first, so that checkpoints that were
made of 4-bit files are not quantised for free; every contestant has the noise. Tables for people; the last line
is JSON. ``speed`` decodes greedily; "plain" and "packed" are the target's own generate(). Drafts are written
MODEL-KIND[-HEAD][@CONFIDENCE]: 0.5-int4-32768@0 is the small model with 4 bits and a head of 32768 tokens that
never stops, self-int4 the target's own weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import provenance
from transformers import AutoModelForCausalLM, AutoTokenizer
from workload import prompts_of

from specdec import DraftModel, SpeculativeGenerator, pack_weights, prune_head, quantize_draft
from specdec.layouts.facts import CACHE
from specdec.weights.share import shared_copy

# code and chat in turn
PROMPTS = [prompt.text for pair in zip(prompts_of("code"), prompts_of("chat"), strict=False) for prompt in pair]
DRAFTS = "0.5-packed 0.5-int8 0.5-int4 0.5-int4-32768 self-int4"
HEADS = (32768, 16384)
GROUP = 32
ROWS = 16384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "scores", "speed"))
    parser.add_argument("target")
    parser.add_argument("draft")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--drafts", default=DRAFTS)
    parser.add_argument("--no-plain", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    found = {"steps": steps, "scores": scores, "speed": speed}[arguments.what](tokenizer, arguments)
    print(json.dumps({"arguments": vars(arguments), "provenance": provenance(torch.device("cpu")), "found": found}))


def load(name: str, arguments: argparse.Namespace) -> Any:
    """A model with noise of half a 4-bit step on every linear weight."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, arguments.dtype)).eval()
    seen = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            for part in module.weight.split(ROWS):
                groups = part.float().view(len(part), -1, GROUP)
                low, high = groups.aminmax(dim=2, keepdim=True)
                noise = torch.empty_like(groups).uniform_(-0.5, 0.5) * (high - low) / 15
                part.copy_((groups + noise).view_as(part))
    return model


def calibration(tokenizer: Any) -> list[int]:
    """A text that has nothing to do with the prompts: modules of Python's standard library."""
    files = sorted(Path(argparse.__file__).parent.glob("*.py"))
    text = "\n".join(path.read_text(errors="ignore") for path in files)
    return tokenizer(text[:3_000_000], verbose=False)["input_ids"]


def variants(name: str, tokenizer: Any, arguments: argparse.Namespace, heads: tuple[int, ...]) -> Any:
    """(name, model) of every form of one model; one at a time."""
    model = load(name, arguments)
    yield "plain", model
    for kind in ("int8", "int4"):
        yield kind, quantize_draft(model, kind)
    if heads:
        ids = calibration(tokenizer)
        for head in heads:
            yield f"int4, head {head}", quantize_draft(prune_head(model, ids, head), "int4")
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    yield "all but linear layers", shared_copy(model, {layer: Zeros(layer) for layer in layers})
    with pack_weights(model) as packing:
        print(packing, file=sys.stderr)
        yield "packed", model
    yield "plain again", model


class Zeros(torch.nn.Module):
    """Stands in for a linear layer: the right shape, made of nothing."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.width = layer.out_features

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_zeros(1).expand(*states.shape[:-1], self.width)


def steps(tokenizer: Any, arguments: argparse.Namespace) -> Any:
    """Milliseconds of one pass over 1, 2, 5 and 8 tokens behind 128."""
    found: dict[str, Any] = {}
    ids = tokenizer("\n".join(PROMPTS), return_tensors="pt")["input_ids"][:, :128]
    for name, heads in ((arguments.target, ()), (arguments.draft, HEADS)):
        for form, model in variants(name, tokenizer, arguments, heads):
            took = {}
            cache = model(ids)[CACHE]
            for width in (1, 2, 5, 8):
                times = []
                for _ in range(6):
                    start = time.perf_counter()
                    model(ids[:, :width], **{CACHE: cache}, use_cache=True)
                    times.append(time.perf_counter() - start)
                    cache.crop(-width)
                took[width] = round(statistics.median(times[1:]) * 1e3, 1)
            found[f"{Path(name).name} {form}"] = took
            print(f"{Path(name).name:32s} {form:24s}", *(f"{w}: {t:7.1f} ms" for w, t in took.items()), flush=True)
    return found


def scores(tokenizer: Any, arguments: argparse.Namespace) -> Any:
    """How far the scores of a real text move, whole text in one pass and token by token."""
    found: dict[str, Any] = {}
    text = Path(statistics.__file__).read_text()
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :96]
    for name in (arguments.target, arguments.draft):
        reference = None
        for form, model in variants(name, tokenizer, arguments, ()):
            if form in ("all but linear layers", "plain again"):
                continue
            cache, rows = None, []
            for place in range(ids.shape[1]):
                out = model(ids[:, place : place + 1], **{CACHE: cache}, use_cache=True)
                cache = out[CACHE]
                rows.append(out.logits[0, -1].float())
            passes = {"one pass": model(ids).logits[0].float(), "token by token": torch.stack(rows)}
            reference = reference or passes
            for how, logits in passes.items():
                wanted = reference[how]
                chances = wanted.softmax(-1)
                divergence = (chances * (wanted.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
                found[f"{Path(name).name} {form}, {how}"] = numbers = {
                    "largest difference": float((wanted - logits).abs().max()),
                    "other best token": float((wanted.argmax(-1) != logits.argmax(-1)).float().mean()),
                    "KL": float(divergence),
                }
                print(f"{Path(name).name:32s} {form:8s} {how:16s}", numbers, flush=True)
    return found


def speed(tokenizer: Any, arguments: argparse.Namespace) -> Any:
    """Seconds a text: plain, packed, and packed with each draft."""
    target = load(arguments.target, arguments)
    small = load(arguments.draft, arguments)
    chosen = PROMPTS[arguments.first : arguments.first + arguments.prompts]
    inputs = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        for text in chosen
    ]
    options = {"max_new_tokens": arguments.new, "do_sample": False}
    found: dict[str, Any] = {}

    def run(name: str, generate: Any, generator: Any = None) -> None:
        generate(**inputs[0], max_new_tokens=8, do_sample=False)
        seconds = emitted = drafted = accepted = rounds = 0.0
        spent = dict.fromkeys(("drafting", "scoring", "verifying"), 0.0)
        texts = []
        for one in inputs:
            start = time.perf_counter()
            out = generate(**one, **options)
            seconds += time.perf_counter() - start
            emitted += out.shape[1] - one["input_ids"].shape[1]
            texts.append(out[0].tolist())
            if generator is not None:
                stats = generator.stats.as_dict()
                drafted += stats["drafted"]
                accepted += stats["accepted"]
                rounds += stats["rounds"]
                for part in spent:
                    spent[part] += stats[f"seconds_{part}"]
        found[name] = {"ms a token": 1e3 * seconds / emitted, "texts": texts}
        if rounds:
            found[name].update(
                {
                    "accepted": accepted / max(drafted, 1),
                    "tokens a round": emitted / rounds,
                    **{f"{part}, ms a round": 1e3 * value / rounds for part, value in spent.items()},
                    "drafted a round": drafted / rounds,
                }
            )
        base = {key: found[key]["ms a token"] for key in ("plain", "packed") if key in found}
        found[name].update({f"x {key}": value / found[name]["ms a token"] for key, value in base.items()})
        same = [a == b for a, b in zip(texts, found.get("packed", found[name])["texts"], strict=True)]
        found[name]["same text as packed"] = sum(same) / len(same)
        print(f"{name:26s}", {k: round(v, 2) for k, v in found[name].items() if k != "texts"}, flush=True)

    if not arguments.no_plain:
        run("plain", target.generate)
    ids = calibration(tokenizer) if any(one.count("-") > 1 for one in arguments.drafts.split()) else []
    with pack_weights(target), pack_weights(small):
        run("packed", target.generate)
        for word in arguments.drafts.split():
            form, _, confidence = word.partition("@")
            model, kind, *head = form.split("-")
            draft = target if model == "self" else small
            if head:
                draft = prune_head(draft, ids, int(head[0]))
            if kind != "packed":
                draft = quantize_draft(draft, kind)
            proposer = DraftModel(draft, confidence=float(confidence) if confidence else None)
            generator = SpeculativeGenerator(target, proposer, num_draft_tokens=arguments.k)
            run(word, generator.generate, generator)
    for one in found.values():
        del one["texts"]
    return found


if __name__ == "__main__":
    main()
