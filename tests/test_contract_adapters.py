"""Targets and drafts with adapters (PEFT), few bits a weight, weights elsewhere: plain's text, or refused."""

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from specdec import DraftModel, SpeculativeGenerator, UnsupportedModel, UnsupportedOption, quantize_draft
from specdec.attaching import having, own_settings
from specdec.layouts import compiled
from specdec.testing import noisy_copy, tiny_llama
from specdec.weights.adapters import without_adapters

from .contract import NEW, assert_untouched, fingerprint, noisy, plain, prompts
from .test_contract_stopping import text_of
from .test_contract_stopping import tokenizer as letters

GREEDY = {"max_new_tokens": 16, "do_sample": False}


def llama():
    return tiny_llama()


def same_text(target, draft, *, batch=3, tokens=3, **options):
    """Ours is plain's of this very model; returns the call's stats."""
    wanted = target.generate(**prompts(batch), **GREEDY, **options)
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=tokens)
    assert gen.generate(**prompts(batch), **GREEDY, **options).tolist() == wanted.tolist()
    return gen.stats


# peft 0.21 asks transformers 5.23 for a property that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


# --- adapters -------------------------------------------------------------------------------------


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def adapted(peft):
    """Two adapters that change the text."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(llama(), config)
    model.add_adapter("other", config)
    return model.eval()


def test_a_quantised_draft_has_no_adapters(adapted):
    """They come and go with the target's, and a draft would not follow."""
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        wanted = quantize_draft(llama(), "int8")(ids).logits
        assert torch.equal(quantize_draft(adapted, "int8")(ids).logits, wanted)


@pytest.mark.parametrize("draft", ["base", "ngram", "self-int8", "adapted"])
def test_adapters_are_switched_between_calls(draft, adapted):
    """Nothing that is kept from one call to the next belongs to an adapter."""
    drafts = {"base": llama(), "adapted": adapted}
    gen = SpeculativeGenerator(adapted, drafts.get(draft, draft), num_draft_tokens=3)
    texts = []

    def check():
        wanted = adapted.generate(**prompts(3), **GREEDY)
        before = fingerprint(adapted)
        assert gen.generate(**prompts(3), **GREEDY).tolist() == wanted.tolist()
        assert_untouched(adapted, before)
        assert gen.stats.layout == "slots"
        assert gen.stats.drafted > 0
        texts.append(wanted.tolist())

    check()
    adapted.set_adapter("other")
    check()
    with adapted.disable_adapter():
        check()
        if draft == "base":
            assert gen.stats.acceptance_rate == 1
    adapted.set_adapter("default")
    check()
    assert texts[0] == texts[3]
    assert texts[0] != texts[1]
    assert texts[1] != texts[2]


def test_graphs_see_which_adapter_is_on(adapted, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")  # traced and guarded, run as they are
    gen = SpeculativeGenerator(adapted, "ngram", num_draft_tokens=3, compile=True)
    for name in ("default", "other", "default"):
        adapted.set_adapter(name)
        wanted = adapted.generate(**prompts(3), **GREEDY).tolist()
        assert gen.generate(**prompts(3), **GREEDY).tolist() == wanted
    assert gen.stats.layout == "slots+compiled"


def test_a_call_with_an_adapter_for_each_row(adapted):
    stats = same_text(adapted, llama(), adapter_names=["default", "other", "__base__"])
    assert stats.accepted > 0


def test_adapters_attached_streamed_and_stopped(adapted):
    wanted = adapted.generate(**prompts(3), **GREEDY).tolist()
    gen = SpeculativeGenerator(adapted, llama(), num_draft_tokens=3)
    with gen.attached():
        assert adapted.generate(**prompts(3), **GREEDY).tolist() == wanted
    assert gen.stats.rounds > 0
    ids = [[] for _ in range(3)]
    for record in gen.stream(**prompts(3), **GREEDY):
        ids[record.row] += record.ids
    assert ids == [row[9:] for row in wanted]
    with pytest.raises(UnsupportedOption, match="adapter_names"):
        gen.stream(**prompts(3), **GREEDY, adapter_names=["default"] * 3)


def test_stop_strings_in_the_adapted_models_own_config(adapted):
    text = text_of(plain(adapted, prompts(1))[0, 9:])
    inner = adapted.get_base_model()
    inner.generation_config.stop_strings = [text[3:5]]
    wanted = adapted.generate(**prompts(1), **GREEDY, tokenizer=letters())
    before = fingerprint(adapted), id(inner.generation_config)
    gen = SpeculativeGenerator(adapted, llama(), num_draft_tokens=3, tokenizer=letters())
    assert gen.generate(**prompts(1), **GREEDY).tolist() == wanted.tolist()
    assert wanted.shape[1] < 9 + NEW
    assert_untouched(adapted, before[0])
    assert id(inner.generation_config) == before[1]


def test_learnt_prompts(peft):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(llama(), config).eval()
    gen = SpeculativeGenerator(model, llama(), num_draft_tokens=3)
    with pytest.warns(UserWarning, match=r"plainly|Position ids"):
        assert gen.generate(**prompts(3), **GREEDY).tolist() == model.generate(**prompts(3), **GREEDY).tolist()
    assert gen.stats.layout == "plain"
    assert gen.stats.target_forwards > gen.stats.rounds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gen.generate(**prompts(3), **GREEDY)
    assert gen.stats.target_forwards == gen.stats.rounds, "the verdict is known, and not looked for anew"
    with pytest.raises(UnsupportedOption, match="learnt prompts"):
        gen.stream(**prompts(3), **GREEDY)


def test_the_model_without_its_adapters(adapted):
    bare = without_adapters(adapted)
    with adapted.disable_adapter():
        wanted = adapted.generate(**prompts(3), **GREEDY)
    assert plain(bare, prompts(3), **GREEDY).tolist() == wanted.tolist()
    memory = {weight.data_ptr() for weight in adapted.parameters()}
    assert {weight.data_ptr() for weight in bare.parameters()} <= memory
    assert not [name for name, _ in bare.named_modules() if "lora" in name]
    assert without_adapters(llama_ := llama()) is llama_


def test_a_draft_with_adapters_is_as_it_was(adapted):
    before = fingerprint(adapted)
    stats = same_text(llama(), adapted)
    assert stats.drafted > stats.accepted > 0
    assert DraftModel(adapted).model is adapted.get_base_model()
    assert_untouched(adapted, before)


# --- few bits a weight ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_quantised_target(kind, batch):
    target = quantize_draft(llama(), kind, keep=False)
    stats = same_text(target, noisy(llama()), batch=batch, tokens=6)
    assert stats.layout == "slots"
    assert stats.drafted > 0
    assert plain(target, prompts(batch), **GREEDY).tolist() != plain(llama(), prompts(batch), **GREEDY).tolist()


def test_a_target_with_two_sets_of_weights_is_refused():
    with pytest.raises(UnsupportedModel, match="keep=False"):
        SpeculativeGenerator(quantize_draft(llama(), "int8"), "ngram")


def test_a_target_quantised_by_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    target = llama()
    torchao.quantize_(target, torchao.Int8WeightOnlyConfig())
    assert same_text(target, noisy(llama())).drafted > 0


# --- weights elsewhere ----------------------------------------------------------------------------


PLACES = {
    "one place": {"": "cpu"},
    "the last on the disk": {"model.layers.1": "disk"},
    "the first on the disk": {"model.embed_tokens": "disk", "model.layers.0": "disk"},
}


@pytest.fixture
def spread(request, tmp_path):
    """A model by ``device_map``: accelerate's hooks bring the weights that a layer needs."""
    pytest.importorskip("accelerate")
    llama().save_pretrained(tmp_path / "model")
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    places = request.param if "" in request.param else {**dict.fromkeys(parts, "cpu"), **request.param}
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "rest")
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spread", PLACES.values(), ids=PLACES, indirect=True)
@pytest.mark.parametrize("draft", ["noisy", "ngram"])
def test_device_map(spread, draft):
    inner = noisy_copy(llama(), 0.05) if draft == "noisy" else draft
    stats = same_text(spread, inner)
    assert stats.drafted > 0
    one = {"input_ids": prompts(1)["input_ids"]}  # without a mask
    gen = SpeculativeGenerator(spread, inner, num_draft_tokens=3)
    assert gen.generate(**one, **GREEDY).tolist() == spread.generate(**one, **GREEDY).tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spread", [PLACES["the first on the disk"]], ids=["disk"], indirect=True)
def test_a_draft_by_device_map(spread):
    assert same_text(llama(), spread).acceptance_rate == 1


def test_a_copy_of_a_spread_model_is_refused():
    accelerate = pytest.importorskip("accelerate")
    target = copy.deepcopy(llama())
    accelerate.cpu_offload(target, execution_device=torch.device("cpu"))
    assert target.device.type == "meta"
    assert same_text(target, noisy(llama())).drafted > 0
    with pytest.raises(UnsupportedModel, match="quantised"):
        SpeculativeGenerator(target, "self-int8")


def test_settings_of_a_wrapped_model_while_a_call_has_lent_it_others(adapted):
    own = own_settings(adapted)
    with having(adapted, copy.deepcopy(own)):
        assert own_settings(adapted) is own
    assert own_settings(adapted) is own


def test_a_wrapped_model_heals_tokens_with_the_tokenizer_of_the_call(adapted, monkeypatch):
    healed = []
    inner = adapted.get_base_model()
    monkeypatch.setattr(inner, "heal_tokens", lambda ids, given=None: healed.append(given) or ids, raising=False)
    gen = SpeculativeGenerator(adapted, "ngram")
    options = {**prompts(1), **GREEDY, "token_healing": True, "tokenizer": letters()}
    assert gen.generate(**options).tolist() == adapted.generate(**options).tolist()
    assert healed == [options["tokenizer"]] * 2


def test_settings_that_a_wrapper_has_of_its_own(adapted):
    """PEFT hands them to the model inside whenever it generates."""
    text = adapted.generate(**prompts(1), **GREEDY)[0]
    own = adapted.generation_config = GenerationConfig(pad_token_id=0, stop_strings=[text_of(text[12:13])])
    with having(adapted, GenerationConfig()):
        assert own_settings(adapted) is own_settings(torch.compile(adapted, backend="eager")) is own
    options = {**prompts(1), **GREEDY, "tokenizer": letters()}
    wanted = adapted.generate(**options)
    assert wanted.shape[1] < len(text)
    assert SpeculativeGenerator(adapted, "ngram").generate(**options).tolist() == wanted.tolist()
    assert adapted.generation_config is own
