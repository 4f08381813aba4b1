"""Streaming: text as it is written, with a streamer of transformers or one of your own.

A streamer hears what it hears in ``generate()``: the prompt, then one token a row at every step.
With speculation the steps of a round arrive together.
"""

from threading import Thread

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from specdec import SpeculativeGenerator
from specdec.testing import noisy_copy, ragged_prompt, tiny_llama


class Columns(BaseStreamer):
    """A streamer for a whole batch: keeps one list of tokens a step."""

    def __init__(self):
        self.steps, self.ended = [], False

    def put(self, value):
        """Take the prompt (B, P) first, then (B,) tokens a step."""
        self.steps.append(value.tolist())

    def end(self):
        """Hear that nothing more will come."""
        self.ended = True


def main():
    """Stream text from one row, then token ids from three."""
    target = tiny_llama()
    gen = SpeculativeGenerator(target, noisy_copy(target, 0.05))
    words = {f"w{i}": i for i in range(64)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)))

    # one row, text: generate() runs in a thread and this one reads
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {**ragged_prompt((8,)), "max_new_tokens": 16, "do_sample": False}
    thread = Thread(target=gen.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    for piece in streamer:
        print(piece, end="", flush=True)
    thread.join()

    # three rows, token ids
    columns = Columns()
    out = gen.generate(**ragged_prompt(), max_new_tokens=8, do_sample=False, streamer=columns)
    prompt, *steps = columns.steps
    print(f"\n{len(prompt)} rows, {len(steps)} steps, ended: {columns.ended}")
    print("steps are the columns of the output:", steps == out[:, -8:].T.tolist())


if __name__ == "__main__":
    main()
