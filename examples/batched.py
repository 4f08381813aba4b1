"""A left-padded batch: every row keeps its own guesses, and ends where it would end alone.

Without a draft model: "ngram" guesses what followed the last tokens of a row earlier in that row.
"""

import torch

from specdec import SpeculativeGenerator
from specdec.testing import noisy_copy, ragged_prompt, tiny_llama

END = 34  # an id that plays the end-of-sequence token


def main():
    """Greedy, with a draft model, with n-grams and without a draft."""
    target = tiny_llama()
    inputs = ragged_prompt((9, 6, 3, 7))  # rows of different lengths, padded on the left
    options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": END, "pad_token_id": 0}
    plain = target.generate(**inputs, **options)

    for draft in (noisy_copy(target, 0.05), "ngram", None):
        gen = SpeculativeGenerator(target, draft, num_draft_tokens=4)
        ours = gen.generate(**inputs, **options)
        name = "draft model" if hasattr(draft, "config") else draft or "no draft"
        print(f"{name}: same as generate(): {torch.equal(ours, plain)}")
        stats = gen.stats
        rows = zip(stats.row_emitted, stats.row_accepted, stats.row_drafted, strict=True)
        for row, (emitted, accepted, drafted) in enumerate(rows):
            print(f"  row {row}: {emitted} tokens, {accepted} of {drafted} guesses kept")
        print(f"  {stats.rounds} rounds for {stats.emitted} tokens")


if __name__ == "__main__":
    main()
