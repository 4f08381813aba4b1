"""Structured text: JSON by a schema with and without guesses, beside free text with the same draft.

    python benchmarks/structured.py TARGET [DRAFT] --prompts 4 --new 96 --threads 2

Greedy, one row. Every JSON text is parsed and checked against its schema; tokens are compared with those of plain
constrained generate(), and free text with plain free generate(). Ratios are of tokens a second, in one run.
"""

import argparse
import json
import time

import torch
from jsonschema import Draft202012Validator
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import SpeculativeGenerator
from specdec.structured import json_schema

TEXT = {"type": "string", "maxLength": 40}
FLAG = {"type": "boolean"}


def number(most):
    return {"type": "integer", "minimum": 0, "maximum": most}


def record(**properties):
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


PLACE = record(name=TEXT, is_harbour=FLAG)
KINDS = {"enum": ["tool", "toy", "food", "book"]}
SIGHTS = {"type": "array", "items": TEXT, "minItems": 2, "maxItems": 3}
SCHEMAS = {
    "person": record(first_name=TEXT, last_name=TEXT, age=number(120), occupation=TEXT, is_married=FLAG),
    "product": record(
        product_name=TEXT, manufacturer=TEXT, price_in_cents=number(9999), available=FLAG, category=KINDS
    ),
    "city": record(city_name=TEXT, country=TEXT, population_in_thousands=number(99999), sights=SIGHTS),
    "route": record(origin=PLACE, destination=PLACE, distance_in_km=number(9999)),
}
SUBJECTS = {
    "person": ["a famous physicist", "a young painter", "a retired sailor", "a chess champion", "a village doctor"],
    "product": ["a cordless drill", "a wooden train", "a jar of honey", "a cookbook", "a pocket knife"],
    "city": ["Kyoto", "Porto", "Nairobi", "Oslo", "Lima"],
    "route": [
        "a ferry to Crete",
        "a walk to Siena",
        "a flight to Bergen",
        "a train to Lyon",
        "a boat to Heligoland",
    ],
}


def prompts(tokenizer, count):
    """``count`` questions, their schemas in turn."""
    for i in range(count):
        name = list(SCHEMAS)[i % len(SCHEMAS)]
        subject = SUBJECTS[name][i // len(SCHEMAS) % 5]
        ask = f"Describe {subject} as JSON with the keys of this schema: {json.dumps(SCHEMAS[name]['properties'])}"
        chat = [{"role": "user", "content": ask}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        yield name, inputs


def timed(generate, inputs, options):
    start = time.perf_counter()
    out = generate(**inputs, **options)
    return out[0, inputs["input_ids"].shape[1] :].tolist(), time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("draft", nargs="?")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--backend", default=None)
    parser.add_argument("--k", default="auto", help="guesses a round, or auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--free", action="store_true", help="free text too")
    parser.add_argument("--gaps", action="store_true", help="say how close plain's scores were where texts part")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no prompt after so many")
    parser.add_argument("--whitespace", action="store_true", help="any white space between the parts")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=args.dtype)
    k = args.k if args.k == "auto" else int(args.k)
    drafts = {"no draft": None}
    if args.draft:
        drafts["draft"] = AutoModelForCausalLM.from_pretrained(args.draft, dtype=args.dtype)
    gens = {name: SpeculativeGenerator(target, draft, num_draft_tokens=k) for name, draft in drafts.items()}
    made = {
        name: json_schema(schema, tokenizer, backend=args.backend, whitespace=args.whitespace)
        for name, schema in SCHEMAS.items()
    }
    limit = {"max_new_tokens": args.new, "do_sample": False}
    runs = {}  # (structured, contestant) -> [tokens, seconds, texts as plain's, prompts]
    valid = ended = texts = 0
    warm = next(iter(prompts(tokenizer, 1)))[1]
    for generate in (target.generate, *(gen.generate for gen in gens.values())):
        generate(**warm, max_new_tokens=8, do_sample=False)
    start = time.perf_counter()
    for name, inputs in prompts(tokenizer, args.prompts):
        if time.perf_counter() - start > args.seconds:
            break
        for structured in (True, False) if args.free else (True,):
            options = {**limit, "logits_processor": [made[name]]} if structured else limit
            plain, seconds = timed(target.generate, inputs, options)
            note(runs, (structured, "plain"), plain, seconds, plain)
            for contestant, gen in gens.items():
                if not structured and contestant == "no draft":
                    continue
                ids, seconds = timed(gen.generate, inputs, options)
                note(runs, (structured, contestant), ids, seconds, plain, gen.stats)
                if args.gaps and ids != plain:
                    print(f"{name}, {contestant}: parts from plain where its best two scores differ by ", end="")
                    print(f"{gap(target, inputs, options, ids, plain):.4f}")
                if structured:
                    texts += 1
                    text = tokenizer.decode(ids, skip_special_tokens=True)
                    ended += ids[-1] == tokenizer.eos_token_id
                    valid += is_valid(text, SCHEMAS[name])
                    if not is_valid(text, SCHEMAS[name]):
                        print("not valid:", repr(text))
    print(f"{texts} structured texts, {ended} ended within {args.new} tokens, {valid} valid by their schema")
    for (structured, contestant), run in runs.items():
        base = runs[structured, "plain"]
        ratio = (run["tokens"] / run["seconds"]) / (base["tokens"] / base["seconds"])
        kind = "structured" if structured else "free"
        print(
            f"{kind:10} {contestant:9} {ratio:5.2f} x plain; {run['tokens'] / run['seconds']:5.1f} tokens/s; "
            f"same text {run['same']} of {run['count']}; accepted {run['accepted']} of {run['drafted']}; "
            f"tokens a round {run['tokens'] / max(run['rounds'], 1):.2f}; passes of the draft {run['passes']}"
        )


def gap(target, inputs, options, ids, plain):
    """How far apart plain's best two scores are where ``ids`` first differ: a tie, or a fault."""
    place = next((i for i, (one, other) in enumerate(zip(ids, plain, strict=False)) if one != other), 0)
    asked = {**options, "return_dict_in_generate": True, "output_scores": True}
    first, second = target.generate(**inputs, **asked).scores[place][0].topk(2).values.tolist()
    return first - second


def note(runs, key, ids, seconds, plain, stats=None):
    run = runs.setdefault(
        key, dict.fromkeys(("tokens", "seconds", "same", "count", "accepted", "drafted", "rounds", "passes"), 0)
    )
    run["tokens"] += len(ids)
    run["seconds"] += seconds
    run["same"] += ids == plain
    run["count"] += 1
    run["rounds"] += len(ids) if stats is None else stats.rounds
    if stats is not None:
        run["accepted"] += stats.accepted
        run["drafted"] += stats.drafted
        run["passes"] += stats.draft_forwards


def is_valid(text, schema):
    try:
        return Draft202012Validator(schema).is_valid(json.loads(text))
    except ValueError:
        return False


if __name__ == "__main__":
    main()
