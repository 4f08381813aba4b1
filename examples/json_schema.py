"""JSON by a schema: the text is always valid, and much of it is guessed for nothing.

    python examples/json_schema.py TARGET DRAFT ["what to describe"]   # hub ids or directories
    python examples/json_schema.py                                     # tiny random models: no download

The same object serves plain generate(). Needs llguidance or xgrammar: pip install '.[llguidance]'.
"""

import json
import sys

import torch

from specdec import SpeculativeGenerator
from specdec.structured import json_schema

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Za-z ]{1,30}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "is_alive": {"type": "boolean"},
    },
    "required": ["name", "age", "is_alive"],
    "additionalProperties": False,
}


def real(target, draft, wish="Describe a famous physicist as JSON with name, age, is_alive."):
    """Target, draft, tokenizer and inputs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    chat = [{"role": "user", "content": wish}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return *(AutoModelForCausalLM.from_pretrained(name) for name in (target, draft)), tokenizer, inputs


def tiny():
    """The same, made in the process."""
    from specdec.testing import byte_tokenizer, noisy_copy, ragged_prompt, tiny_llama

    tokenizer = byte_tokenizer('{"', '": "', '", "', "name", "age", "is_alive")
    target = tiny_llama(vocabulary=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    return target, noisy_copy(target), tokenizer, ragged_prompt((8,), len(tokenizer))


target, draft, tokenizer, inputs = real(*sys.argv[1:]) if len(sys.argv) > 2 else tiny()
options = {"max_new_tokens": 120, "do_sample": False, "logits_processor": [json_schema(SCHEMA, tokenizer)]}
gen = SpeculativeGenerator(target, draft)
out = gen.generate(**inputs, **options)
text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(text)
print("keys:", ", ".join(json.loads(text)))
print("same as generate():", torch.equal(out, target.generate(**inputs, **options)))
print(
    f"accepted {gen.stats.accepted} of {gen.stats.drafted} guesses, {gen.stats.draft_forwards} passes of the draft"
)
