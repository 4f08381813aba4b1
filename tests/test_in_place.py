"""In place: `target.generate` made speculative for a while, pipelines, and the `custom_generate` folder."""

import copy
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from specdec import LayerSkip, SpeculativeGenerator, TranslatedDraft, UnsupportedOption
from specdec.testing import byte_tokenizer, noisy_copy, tiny_llama

from .contract import NEW, Counted, assert_untouched, fingerprint, llama, noisy, plain, prompts, speculative

FOLDER = Path(__file__).resolve().parent.parent / "integrations" / "custom_generate"
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture
def target():
    return copy.deepcopy(llama())


@pytest.fixture
def gen(target):
    return speculative(target, noisy(llama()))


def test_attached(target, gen):
    before = fingerprint(target)
    wanted = plain(target, prompts(3)).tolist()
    with gen.attached():
        assert target.generate(**prompts(3), **GREEDY).tolist() == wanted
        assert gen.stats.accepted > 0
        out = target.generate(prompts(3)["input_ids"], None, attention_mask=prompts(3)["attention_mask"], **GREEDY)
        assert out.tolist() == wanted
        with pytest.raises(UnsupportedOption, match="num_beams"):
            target.generate(**prompts(1), num_beams=2)
        drafted = gen.stats.drafted
    assert_untouched(target, before)
    assert target.generate(**prompts(3), **GREEDY).tolist() == wanted
    assert gen.stats.drafted == drafted, "plain again"


def test_attached_is_put_back_after_an_exception(target, gen):
    before = fingerprint(target)
    with pytest.raises(ZeroDivisionError), gen.attached():
        raise ZeroDivisionError
    assert_untouched(target, before)


def test_attached_twice(target, gen):
    """The inner one counts; leaving it, the outer one does again."""
    inner = SpeculativeGenerator(target, "ngram")
    before = fingerprint(target)
    wanted = plain(target, prompts(3)).tolist()
    with gen.attached():
        target.generate(**prompts(3), **GREEDY)
        outer = gen.stats
        with inner.attached():
            assert target.generate(**prompts(3), **GREEDY).tolist() == wanted
            assert inner.stats.rounds > 0
            assert gen.stats is outer
        with gen.attached():
            assert target.generate(**prompts(3), **GREEDY).tolist() == wanted
        assert target.generate(**prompts(3), **GREEDY).tolist() == wanted
        assert gen.stats is not outer
    assert_untouched(target, before)


def test_attached_to_a_model_with_a_generate_of_its_own(target):
    calls = []
    own = target.generate

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    target.generate = counted
    gen = speculative(target, noisy(llama()))
    with gen.attached():
        target.generate(**prompts(3), **GREEDY)
    assert target.generate is counted
    assert calls == [1]


def test_a_copy_of_an_attached_target_is_its_own_and_plain():
    target = tiny_llama()  # who was ever asked for hidden states has hooks that cannot be pickled
    gen = speculative(target, noisy_copy(target))
    wanted = plain(target, prompts(3)).tolist()
    with gen.attached():
        copies = [copy.deepcopy(target), pickle.loads(pickle.dumps(target))]
        calls = []
        for one in copies:
            one.register_forward_pre_hook(lambda *_: calls.append(1))
            assert one.generate(**prompts(3), **GREEDY).tolist() == wanted
        # without the target there is nothing else that it could be of
        assert copy.deepcopy([target.generate]) == [target.generate]
    assert len(calls) == 2 * NEW


def test_attached_shows_what_it_stands_for(target, gen):
    """Frameworks ask which arguments generate() takes."""
    wanted = inspect.signature(target.generate)
    with gen.attached():
        assert inspect.signature(target.generate) == wanted
        assert target.generate.__name__ == "generate"


def test_attached_leaves_other_doors_open(target, gen):
    """A `custom_generate` of the caller's is plain generate()'s business."""

    def first(model, input_ids, **kwargs):
        return input_ids[:, :1]

    with gen.attached():
        assert target.generate(**prompts(3), **GREEDY, custom_generate=first).shape == (3, 1)
        assert list(gen.stream(**prompts(1), **GREEDY))
        assert gen.stats.rounds > 0
        gen.stats = None
        target.generate(**prompts(1), **GREEDY, custom_generate=None)  # which is none
    assert gen.stats.rounds > 0


@pytest.fixture
def tokenizer():
    words = {f"w{i}": i for i in range(64)}
    made = Tokenizer(models.WordLevel(words, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", bos_token="w1", padding_side="left")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pipeline(target, gen, tokenizer):
    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer, device="cpu")
    texts = ["w5 w9 w13", "w7 w8 w40 w41 w5 w9"]
    for options in ({}, {"batch_size": 2}):
        wanted = pipe(texts, max_new_tokens=12, do_sample=False, **options)
        with gen.attached():
            got = pipe(texts, max_new_tokens=12, do_sample=False, **options)
        assert got == wanted
        assert gen.stats.rounds > 0
        assert gen.stats.drafted > 0


# --- custom_generate="folder" ---------------------------------------------------------------------


@pytest.fixture
def modules(monkeypatch, tmp_path):
    """transformers copies the folder's code into a cache of modules."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("draft", ["model", "ngram", None])
def test_custom_generate_folder(draft, target, modules):
    given = noisy(llama()) if draft == "model" else draft
    before = fingerprint(target)
    wanted = plain(target, prompts(3))
    door = {"custom_generate": str(FOLDER), "trust_remote_code": True}
    with Counted(noisy(llama())) as counted:
        got = target.generate(**prompts(3), **GREEDY, **door, draft=given, num_draft_tokens=3)
    assert got.tolist() == wanted.tolist()
    assert (counted.calls > 0) == (draft == "model")
    out = target.generate(**prompts(3), **GREEDY, **door, return_dict_in_generate=True)
    assert out.sequences.tolist() == wanted.tolist()
    assert out.speculation.rounds > 0
    assert_untouched(target, before)


def test_custom_generate_of_a_model_that_comes_with_it(target, modules):
    """A repository with the folder beside its weights: transformers replaces the model's generate()."""
    import functools

    function = target.load_custom_generate(str(FOLDER), trust_remote_code=True)
    wanted = plain(target, prompts(3))
    target.generate = functools.partial(function, model=target)
    assert target.generate(**prompts(3), **GREEDY).tolist() == wanted.tolist()
    assert torch.equal(target.generate(**prompts(3), **GREEDY, draft=noisy(llama())), wanted)


@pytest.mark.parametrize("wrapped", ["target", "draft", "both"])
def test_what_torch_compile_wraps(wrapped):
    """Its attributes are its model's: nothing may be lost with the wrapper's, and ``generate()`` runs the model."""
    letters = byte_tokenizer()
    target = tiny_llama(vocabulary=len(letters))
    draft = noisy_copy(target, 0.05)
    free = plain(target, prompts(1))[0]
    target.generation_config.stop_strings = [letters.decode(free[-NEW:])[2:4]]
    wanted = plain(target, prompts(1), tokenizer=letters).tolist()
    assert len(wanted[0]) < len(free)
    given, guessing = (
        torch.compile(model, backend="eager") if wrapped in (name, "both") else model
        for name, model in (("target", target), ("draft", draft))
    )
    own, before = target.generation_config, fingerprint(target)
    for proposer in (guessing, TranslatedDraft(guessing, letters, letters), LayerSkip([0])):
        gen = SpeculativeGenerator(given, proposer, num_draft_tokens=3, tokenizer=letters)
        assert gen.generate(**prompts(1), **GREEDY).tolist() == wanted
        assert gen.stats.drafted > 0
        assert list(gen.stream(**prompts(1), **GREEDY))[-1].ended
        with gen.attached():
            assert given.generate(**prompts(1), **GREEDY).tolist() == wanted
        assert target.generation_config is own
    assert_untouched(target, before)
