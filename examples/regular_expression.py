"""Text that matches a regular expression, in a batch, sampled: each row ends where its match does.

    python examples/regular_expression.py TARGET      # a hub id or a directory
    python examples/regular_expression.py             # a tiny random model: no download

No draft at all: what the expression leaves no choice about is guessed, the rest is decoded plainly.
Needs llguidance or xgrammar: pip install '.[llguidance]'.
"""

import re
import sys

from specdec import SpeculativeGenerator
from specdec.structured import regex

DATE = r"(Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday), (19|20)[0-9]{2}-(0[1-9]|1[0-2])-[0-2][0-9]"


def real(name, questions=("When did the Titanic sink?", "When was Ada Lovelace born?")):
    """A model, its tokenizer and a batch of questions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    texts = [f"Question: {question}\nAnswer (weekday, year-month-day): " for question in questions]
    return (
        AutoModelForCausalLM.from_pretrained(name),
        tokenizer,
        tokenizer(texts, padding=True, return_tensors="pt"),
    )


def tiny():
    """The same, made in the process."""
    from specdec.testing import byte_tokenizer, ragged_prompt, tiny_llama

    tokenizer = byte_tokenizer("day, ", "20", "19")
    target = tiny_llama(vocabulary=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    return target, tokenizer, ragged_prompt((8, 5), len(tokenizer))


target, tokenizer, inputs = real(sys.argv[1]) if len(sys.argv) > 1 else tiny()
gen = SpeculativeGenerator(target, seed=7)
out = gen.generate(
    **inputs, max_new_tokens=60, do_sample=True, num_return_sequences=2, logits_processor=[regex(DATE, tokenizer)]
)
texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print("\n".join(texts))
print("all match:", all(re.fullmatch(DATE, text) for text in texts))
print(f"accepted {gen.stats.accepted} of {gen.stats.drafted} guesses, without a draft")
