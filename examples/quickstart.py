"""Generate with a target and a draft, and compare with the target's own ``generate()``.

    python examples/quickstart.py TARGET DRAFT     # two ids or directories of the same family
    python examples/quickstart.py                  # two tiny random models: no download

Greedy text of the tiny float32 models is the same token for token. In half precision two tokens
with nearly equal scores may fall the other way: docs/numerics.md.
"""

import sys

import torch

from specdec import SpeculativeGenerator


def load(names):
    """The target, the draft, and inputs for the target."""
    if len(names) == 2:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(names[0])
        target, draft = (AutoModelForCausalLM.from_pretrained(name) for name in names)
        return target, draft, tokenizer("The capital of France is", return_tensors="pt")
    from specdec.testing import noisy_copy, ragged_prompt, tiny_llama

    target = tiny_llama()
    return target, noisy_copy(target, 0.05), ragged_prompt((8,))


def main():
    """Generate once with the draft and once without, and compare."""
    target, draft, inputs = load(sys.argv[1:])
    options = {"max_new_tokens": 48, "do_sample": False}

    gen = SpeculativeGenerator(target, draft, num_draft_tokens=5)
    ours = gen.generate(**inputs, **options)
    plain = target.generate(**inputs, **options)

    stats = gen.stats
    print("tokens:", ours[0].tolist())
    print("same as generate():", torch.equal(ours, plain))
    print(f"{stats.emitted} tokens in {stats.rounds} rounds, layout {stats.layout}")
    print(f"accepted {stats.accepted} of {stats.drafted} guesses ({stats.acceptance_rate:.0%})")


if __name__ == "__main__":
    main()
