"""Settings for all tests: no network, one thread, tiny models made once."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

from specdec.testing import noisy_copy, ragged_prompt, tiny_llama

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target():
    """A tiny Llama; tests must leave it as it was."""
    return tiny_llama()


@pytest.fixture(scope="session")
def draft(target):
    """A noisy copy of the target, which agrees now and then."""
    return noisy_copy(target, 0.15)


@pytest.fixture
def batch():
    """Three left-padded rows."""
    return ragged_prompt()
