"""lm-eval: an ``HFLM`` around a model object whose ``generate`` is attached; a tiny task, without a download.

    python -m pip install . lm_eval
    python integrations/lm_eval_task.py

Only tasks that generate call ``model.generate()``; tasks of log-likelihoods call the model itself: nothing changes
for them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specdec import SpeculativeGenerator
from specdec.testing import noisy_copy, tiny_llama


def task(folder: str) -> Any:
    """Four questions, answered with up to twelve words."""
    path = Path(folder) / "questions.jsonl"
    questions = ["w5 w9 w13", "w7 w8 w40 w41", "w20", "w33 w34 w35"]
    path.write_text("\n".join(json.dumps({"question": q, "answer": "w3"}) for q in questions))
    return ConfigurableTask(
        config={
            "task": "words", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}", "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["w3"], "max_gen_toks": 12, "do_sample": False},
        }
    )  # fmt: skip


def answers(lm: Any) -> list[Any]:
    """What the model says to each question."""
    with tempfile.TemporaryDirectory() as folder:
        found = simple_evaluate(lm, tasks=[task(folder)], bootstrap_iters=0, log_samples=True)
    return [sample["resps"] for sample in found["samples"]["words"]]


def main() -> None:
    """The task twice, plain and attached."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", padding_side="left")
    target = tiny_llama()
    lm = HFLM(pretrained=target, tokenizer=tokenizer, batch_size=2, max_length=128, device="cpu")
    plain = answers(lm)
    gen = SpeculativeGenerator(target, noisy_copy(target, 0.05), num_draft_tokens=3)
    with gen.attached():
        ours = answers(lm)
    print(f"{len(ours)} answers; the last call: {gen.stats.drafted} guesses, {gen.stats.accepted} kept")
    print("the same answers:", ours == plain)


if __name__ == "__main__":
    main()
