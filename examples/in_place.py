"""In place: code that calls ``model.generate()`` itself becomes speculative, without a change to it.

Here the code is a pipeline of transformers, then the generation manager of ``transformers serve``, which streams
from a thread of its own. ``integrations/`` has the whole server, TRL's rollouts and lm-eval.
"""

import asyncio

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, pipeline
from transformers.cli.serving.utils import GenerateManager

from specdec import SpeculativeGenerator
from specdec.testing import noisy_copy, ragged_prompt, tiny_llama


async def served(target, tokenizer):
    """The text of one row, piece by piece, as the server's handlers get it."""
    inputs, pieces = ragged_prompt((8,)), []
    config = GenerationConfig(max_new_tokens=16, do_sample=False, pad_token_id=0)
    queue, streamer = GenerateManager().generate_streaming(target, tokenizer, inputs, config, "request 1")
    while (piece := await queue.get()) is not None:
        pieces.append(piece)
    return pieces, streamer.total_tokens


def main():
    """Run both twice, plain and attached."""
    target = tiny_llama()
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    gen = SpeculativeGenerator(target, noisy_copy(target, 0.05), num_draft_tokens=3)

    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer, device="cpu")
    texts = ["w5 w9 w13", "w7 w8 w40 w41 w5 w9"]
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    plain = pipe(texts, batch_size=2, generation_config=settings)
    with gen.attached():
        ours = pipe(texts, batch_size=2, generation_config=settings)
    print(f"pipeline: {gen.stats.drafted} guesses, the same text: {ours == plain}")

    plain = asyncio.run(served(target, tokenizer))
    with gen.attached():
        ours = asyncio.run(served(target, tokenizer))
    print(f"serve: {gen.stats.drafted} guesses, the same pieces: {ours == plain}")

    print("plain again:", target.generate.__func__ is type(target).generate)


if __name__ == "__main__":
    main()
