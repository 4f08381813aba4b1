"""TRL's rollouts: ``GRPOTrainer`` with ``with generator.attached():`` around ``train()``, and nothing else changed.

    python -m pip install . trl
    python integrations/trl_rollouts.py

Trains a tiny model twice for a few steps. Completions are sampled with ``verification="coupled"`` and a seed, so
that they are the same with every draft and with none: both runs must have the same rewards and end in the same
weights. In earnest leave ``verification`` and ``seed`` out: each completion then has the law of plain sampling. A
draft that is a model stays as it was while the target learns, and so guesses worse with time; ``"suffix"`` does
not. Weights that were packed refuse to be trained.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from specdec import SpeculativeGenerator, Stats
from specdec.testing import tiny_llama


def variety(completions: list[str], **_: Any) -> list[float]:
    """More for completions with more different words."""
    return [float(len(set(text.split()))) + 0.01 * len(text) for text in completions]


def train(draft: Any) -> tuple[list[float], torch.Tensor, Stats]:
    """Rewards a step, all weights at the end, and what the last rollout did."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", padding_side="left")
    model = tiny_llama()
    for weight in model.parameters():
        weight.requires_grad_(True)
    prompts = Dataset.from_dict({"prompt": ["w5 w9 w13", "w7 w8 w40 w41", "w20", "w33 w34"]})
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, max_steps=3, per_device_train_batch_size=4, num_generations=2, logging_steps=1,
            max_completion_length=16, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False,
            generation_kwargs={"top_k": 0}, disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model, reward_funcs=variety, args=settings, train_dataset=prompts, processing_class=tokenizer
        )
        generator = SpeculativeGenerator(model, draft, num_draft_tokens=3, verification="coupled", seed=0)
        with generator.attached():
            trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    return rewards, weights, generator.stats


def main() -> None:
    """Both runs, compared."""
    rewards, weights, _ = train(None)
    ours, trained, stats = train("suffix")
    print(f"{len(ours)} steps; the last rollout: {stats.drafted} guesses, {stats.accepted} kept")
    print("the same rewards:", ours == rewards)
    before = torch.cat([weight.flatten() for weight in tiny_llama().parameters()])
    moved = float((trained - before).abs().max())
    print(f"weights moved by up to {moved:.3f}, both the same way:", moved > 0 and torch.equal(trained, weights))


if __name__ == "__main__":
    main()
