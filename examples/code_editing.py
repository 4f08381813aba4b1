"""Predicted outputs: an edit mostly repeats the file, so the file is what the model will probably write.

    python examples/code_editing.py TARGET [FILE] ["what to change"]   # a hub id or a directory
    python examples/code_editing.py                                    # a tiny random model: no download

The prediction decides how fast the text comes, never what it says: where it is wrong, the target's own tokens
are written, and the prediction is taken up again where it fits.
"""

import sys
from pathlib import Path

import torch

from specdec import SpeculativeGenerator


def real(name, file=__file__, wish="Rename the function `main` to `run`. Return only the new code."):
    """A model, its inputs for an edit of a file, and the file as it is."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    code = f"```python\n{Path(file).read_text()}```"
    chat = [{"role": "user", "content": f"{wish}\n\n{code}"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return AutoModelForCausalLM.from_pretrained(name), inputs, tokenizer(code)["input_ids"]


def tiny():
    """A tiny random model, and its own text with two tokens changed as the file before the edit."""
    from specdec.testing import ragged_prompt, tiny_llama

    target, inputs = tiny_llama(), ragged_prompt((8,))
    before = target.generate(**inputs, max_new_tokens=48, do_sample=False)[0, 8:].clone()
    before[[9, 30]] = torch.tensor([3, 4])
    return target, inputs, before


def main():
    """Generate the edited text with the file as the prediction; the draft looks into the text so far."""
    target, inputs, before = real(*sys.argv[1:]) if len(sys.argv) > 1 else tiny()
    options = {"max_new_tokens": max(48, 2 * len(before)) if len(sys.argv) > 1 else 48, "do_sample": False}

    gen = SpeculativeGenerator(target, "suffix", num_draft_tokens=8)
    edited = gen.generate(**inputs, **options, prediction=before)
    plain = target.generate(**inputs, **options)

    stats = gen.stats
    print("same as generate():", torch.equal(edited, plain))
    print(f"{stats.emitted} tokens in {stats.rounds} rounds")
    print(f"of the prediction {stats.prediction_accepted} tokens appeared, {stats.prediction_rejected} did not")


if __name__ == "__main__":
    main()
