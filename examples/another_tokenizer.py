"""A draft with another tokenizer: give both tokenizers, and guesses are translated.

Two families of models seldom share their token ids; what their tokens stand for they do share.

    python examples/another_tokenizer.py TARGET DRAFT     # two ids or directories of any two families
    python examples/another_tokenizer.py                  # two tiny random models: no download
"""

import sys

import torch

from specdec import SpeculativeGenerator

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"


def load(names):
    """Target, draft, their tokenizers, and inputs for the target."""
    if len(names) == 2:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        target, draft = (AutoModelForCausalLM.from_pretrained(name) for name in names)
        ours, theirs = (AutoTokenizer.from_pretrained(name) for name in names)
        return target, draft, ours, theirs, ours("The capital of France is", return_tensors="pt")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from specdec.testing import noisy_copy, tiny_llama

    def tokenizer(letters):
        ids = {letter: number for number, letter in enumerate(letters)}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=ids, merges=[])))

    target = tiny_llama(vocabulary=len(LETTERS))
    draft = noisy_copy(target, 0.05)
    for part in (draft.model.embed_tokens, draft.lm_head):  # the draft counts its letters from the end
        part.weight.copy_(part.weight.flip(0))
    ours = tokenizer(LETTERS)
    inputs = ours("once upon a time", return_tensors="pt", return_token_type_ids=False)
    return target, draft, ours, tokenizer(LETTERS[::-1]), inputs


def main():
    """Greedy and sampled text."""
    target, draft, ours, theirs, inputs = load(sys.argv[1:])
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=5, tokenizer=ours, draft_tokenizer=theirs)
    plain = target.generate(**inputs, max_new_tokens=48, do_sample=False)
    for sample in (False, True):
        out = gen.generate(**inputs, max_new_tokens=48, do_sample=sample)
        print("guesses by", gen.stats.drafting)
        print(f"accepted {gen.stats.accepted} of {gen.stats.drafted} guesses")
        if not sample:
            print("same as generate():", torch.equal(out, plain))


if __name__ == "__main__":
    main()
