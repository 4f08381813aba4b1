"""Sampling that can be repeated: with verification="coupled" the draft does not change the text.

Draft and target draw with the same noise, made from the seed, the prompt and the place in the text.
The text is then a function of target, seed and prompt: any draft, any number of guesses and any
batch give the same sample, and no draft at all gives it too.
"""

from specdec import SpeculativeGenerator
from specdec.testing import noisy_copy, ragged_prompt, tiny_llama


def main():
    """Sample with every draft and count the different texts."""
    target = tiny_llama()
    inputs = ragged_prompt((8, 5))
    drafts = {
        "no draft": None,
        "good draft": noisy_copy(target, 0.02),
        "poor draft": noisy_copy(target, 0.5),
        "n-grams": "ngram",
    }
    texts = set()
    for name, draft in drafts.items():
        for guesses in (2, 6):
            gen = SpeculativeGenerator(target, draft, num_draft_tokens=guesses, verification="coupled", seed=7)
            out = gen.generate(**inputs, do_sample=True, temperature=0.8, max_new_tokens=24)
            texts.add(str(out.tolist()))
            print(f"{name}, {guesses} guesses: {gen.stats.rounds} rounds")
    print("different texts:", len(texts))

    # one seed a row: each row is what it would be alone with that seed
    gen = SpeculativeGenerator(target, drafts["good draft"], verification="coupled")
    options = {"do_sample": True, "max_new_tokens": 24}
    both = gen.generate(**inputs, seed=[1, 2], **options)
    alone = gen.generate(inputs["input_ids"][:1], seed=1, **options)
    print("row 0 alone is row 0 of the batch:", both[0].tolist() == alone[0].tolist())


if __name__ == "__main__":
    main()
