"""The cache: returned as plain generate() returns it, and honoured when the caller gives one.

Conversations of several turns are held twice, by plain generate() and by ours, each going on from its own
cache; texts must be equal, and plain generate() must be able to go on from a cache of ours.
"""

import copy

import pytest
import torch
from transformers import DynamicCache

from specdec.layouts.forget import own_cache

from .contract import NEW, bart, gemma, llama, mamba2, mistral, oracle, plain, prompts, qwen3_next, speculative, t5

DICT = {"return_dict_in_generate": True, "do_sample": False, "max_new_tokens": NEW}
DRAFTS = ("noisy", "ngram", None)
START = 9


def states(cache):
    """Everything that a cache holds, in order."""
    found = []
    for layer in own_cache(cache).layers:
        for name in ("keys", "values"):
            if getattr(layer, name, None) is not None:
                found.append(getattr(layer, name))
        for name in ("conv_states", "recurrent_states"):
            found += [s for s in getattr(layer, name, {}).values() if s is not None]
    return found


def assert_same_cache(ours, theirs, columns=None):
    assert type(ours) is type(theirs)
    assert [type(a) for a in own_cache(ours).layers] == [type(b) for b in own_cache(theirs).layers]
    assert len(states(ours)) == len(states(theirs)) > 0
    for mine, wanted in zip(states(ours), states(theirs), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)
    for layer in own_cache(ours).layers:
        assert not getattr(layer, "record_past", False)
    if columns is not None:
        assert ours.get_seq_length() == theirs.get_seq_length() == columns


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("make", [llama, mistral, gemma])
@pytest.mark.parametrize("layout", ["slots", "columns", "snapshot", "plain"])
def test_returned_cache(layout, make, draft, batch):
    inputs = prompts(batch)
    free = plain(make(), inputs)
    for eos in (None, [int(free[0, START + 1]), int(free[-1, START + 4])]):
        wanted = make().generate(**inputs, eos_token_id=eos, **DICT)
        gen = speculative(make(), draft, layout=layout)
        got = gen.generate(**inputs, eos_token_id=eos, **DICT)
        assert got.sequences.tolist() == wanted.sequences.tolist()
        assert type(got.past_key_values) is DynamicCache
        assert_same_cache(got.past_key_values, wanted.past_key_values, got.sequences.shape[1] - 1)
