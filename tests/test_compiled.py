"""compile=True: the same text through a few graphs, none of them made twice, and a way back where it cannot be.

Mostly with backends that trace and do not compile, so that tests stay quick; one test runs inductor.
"""

import gc
import time
import warnings
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, T5GemmaConfig, T5GemmaForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutputWithPast

from specdec import SpeculativeGenerator, quantize_draft
from specdec.clock import clock
from specdec.errors import InvalidInput
from specdec.layouts import compiled
from specdec.layouts.compiled import WIDTHS, CompiledSteps
from specdec.layouts.facts import CACHE
from specdec.proposers.draft_model import DraftModel
from specdec.testing import lively, noisy_copy, ragged_prompt, tiny_llama

from .architectures import identity
from .architectures.build import Case
from .contract import qwen3_next, t5

GREEDY = {"max_new_tokens": 24, "do_sample": False}
LENGTHS = {"alone": (7,), "padded": (9, 6, 3)}


@pytest.fixture
def traced(monkeypatch):
    """Graphs are traced and run as they are; a recompilation is an error."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def pair(layers=1):
    target = tiny_llama(num_hidden_layers=layers)
    return target, noisy_copy(target, 0.15)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_same_text_through_few_graphs(traced, lengths):
    target, draft = pair()
    prompt = ragged_prompt(lengths)
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=4, compile=True)
    plain = target.generate(**prompt, **GREEDY)
    assert torch.equal(gen.generate(**prompt, **GREEDY), plain)
    assert gen.stats.layout == gen.stats.draft_layout == "slots+compiled"
    assert gen.stats.accepted > 0
    gen.generate(**prompt, **GREEDY)  # without the steps by which the first call settled its layout
    made = counters["stats"]["unique_graphs"]
    assert torch.equal(gen.generate(**prompt, **GREEDY), plain)
    assert counters["stats"]["unique_graphs"] == made, "a second call of the same kind makes no graph"
    # another length of prompt and text is the same shape
    longer = ragged_prompt(tuple(length + 5 for length in lengths))
    gen.generate(**longer, max_new_tokens=31, do_sample=False)
    assert counters["stats"]["unique_graphs"] <= made + 1, "a width may be new, a room is not"
    assert gen._steps.graphs <= len(WIDTHS)
    assert not gen._steps.refused


def test_the_two_passes_that_compare_a_new_graph_are_counted(traced):
    target, prompt = pair()[0], ragged_prompt((7,))
    options = {"num_draft_tokens": 4, "compile": True}
    SpeculativeGenerator(target, "ngram", **options).generate(**prompt, **GREEDY)  # settles the layout
    gen, forwards = SpeculativeGenerator(target, "ngram", **options), []
    for _ in range(2):
        gen.generate(**prompt, **GREEDY)
        forwards.append(gen.stats.target_forwards)
    assert forwards[0] - forwards[1] == 2 * gen._steps.graphs > 0


def test_same_sampled_text(traced):
    target, draft = pair()
    prompt = ragged_prompt()
    options = {"max_new_tokens": 20, "do_sample": True, "temperature": 0.8, "top_k": 20, "seed": 3}
    texts = [
        SpeculativeGenerator(target, d, num_draft_tokens=3, verification="coupled", **more).generate(
            **prompt, **options
        )
        for d, more in ((None, {}), (draft, {"compile": True}))
    ]
    assert torch.equal(*texts)


def test_rows_that_end_in_mid_round(traced):
    target, draft = pair()
    prompt = ragged_prompt()
    text = target.generate(**prompt, **GREEDY)
    ends = [int(text[0, 12]), int(text[1, 17])]
    options = {**GREEDY, "eos_token_id": ends, "pad_token_id": 0}
    plain = target.generate(**prompt, **options)
    gen = SpeculativeGenerator(target, DraftModel(draft), num_draft_tokens=5, compile=True)
    assert torch.equal(gen.generate(**prompt, **options), plain)
    assert gen.stats.layout == "slots+compiled"


@pytest.mark.slow
def test_the_controller_goes_through_graphs_too(traced):
    target, draft = pair()
    prompt = ragged_prompt()
    gen = SpeculativeGenerator(target, draft, compile=True)
    assert torch.equal(gen.generate(**prompt, **GREEDY), target.generate(**prompt, **GREEDY))
    assert gen.stats.layout == "slots+compiled"


@pytest.mark.parametrize("compile", [True, False])
def test_a_position_past_the_end_is_never_read(traced, compile):
    """Columns that fill up a pass, and rows that have ended, would stand past the last position of the model."""
    name = "causal/gpt2"
    model, _ = identity.varied_model(Case(*name.split("/")))
    last = model.config.max_position_embeddings
    prompt = {"input_ids": torch.randint(3, 100, (2, last - 12), generator=torch.Generator().manual_seed(0))}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**prompt, **options)
    gen = SpeculativeGenerator(model, noisy_copy(model, 0.05), num_draft_tokens=6, compile=compile)
    assert torch.equal(gen.generate(**prompt, **options), plain)
    assert gen.stats.layout == ("slots+compiled" if compile else "slots")


def test_a_quantised_draft_has_graphs(traced):
    """In its wide passes it goes through the weights given, which depends on the processor and not on the graph."""
    target, draft = pair()
    prompt = ragged_prompt((9, 6, 3))
    compiled_draft = DraftModel(quantize_draft(draft, "int8"), compile=True)
    gen = SpeculativeGenerator(target, compiled_draft, num_draft_tokens=2)
    ours = gen.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, target.generate(**prompt, max_new_tokens=8, do_sample=False))
    assert gen.stats.draft_layout == "slots+compiled"


QUICK = ("gemma2",)
ALL = (
    "gpt2", "mixtral", "qwen2", "qwen3", "mistral", "gemma3_text", "opt", "gpt_neox", "phi3", "olmo2", "smollm3",
    "cohere2", "gpt_oss", "granite", "deepseek_v3", "bloom", "falcon", "qwen3_moe", "whisper",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # what dynamo does to bloom's activation
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in ALL)])
def test_architectures(traced, name):
    case = Case("causal", name)
    model, _ = identity.varied_model(case)
    for lengths in identity.WIDTHS.values():
        inputs = identity.inputs_for(case, lengths)
        # a twin keeps every guess: few graphs, all of them used
        gen = SpeculativeGenerator(model, DraftModel(model), num_draft_tokens=4, compile=True)
        ours = gen.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert torch.equal(ours, model.generate(**inputs, max_new_tokens=12, do_sample=False))
        assert gen.stats.layout == "slots+compiled", gen._steps.refused


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor(dtype):
    target = tiny_llama(num_hidden_layers=1, dtype=dtype)
    draft = noisy_copy(target, 0.15)
    prompt = ragged_prompt()
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=2, compile=True)
    ours = gen.generate(**prompt, **GREEDY)
    assert gen.stats.layout == gen.stats.draft_layout == "slots+compiled"
    if dtype == torch.float32:
        assert torch.equal(ours, target.generate(**prompt, **GREEDY))


# --- the way back ---


@pytest.mark.parametrize(
    ("model", "reason"), [(qwen3_next, "only slots"), (t5, "did not give the scores")], ids=["layout", "scores"]
)
def test_what_cannot_be_compiled_runs_eagerly_and_says_so(traced, model, reason):
    model = model()
    prompt = ragged_prompt((7,))
    gen = SpeculativeGenerator(model, DraftModel(noisy_copy(model, 0.02)), num_draft_tokens=3, compile=True)
    with pytest.warns(UserWarning, match=f"eagerly.*{reason}"):
        ours = gen.generate(**prompt, **GREEDY)
    assert torch.equal(ours, model.generate(**prompt, **GREEDY))
    assert "compiled" not in gen.stats.layout
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gen.generate(**prompt, **GREEDY)  # once is enough


def test_encoders_with_inputs_of_many_lengths(traced):
    module = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": None,
        "layer_types": ["full_attention"],
    }  # fmt: skip
    parts = {"encoder": dict(module), "decoder": dict(module)}
    config = T5GemmaConfig(**parts, vocab_size=64, pad_token_id=0, eos_token_id=None)
    model = lively(T5GemmaForConditionalGeneration(config).eval())
    model.generation_config.decoder_start_token_id = 1
    gen = SpeculativeGenerator(model, "ngram", num_draft_tokens=2, compile=True)
    for length in (5, 6, 7, 5, 6):
        prompt = ragged_prompt((length,))
        assert torch.equal(gen.generate(**prompt, **GREEDY), model.generate(**prompt, **GREEDY))
        assert gen.stats.layout == "slots+compiled"
    made = gen._steps.graphs
    gen.generate(**ragged_prompt((7,)), **GREEDY)
    assert gen._steps.graphs == made
    prompt = ragged_prompt((8,))
    with pytest.warns(UserWarning, match="eagerly.*many lengths"):
        ours = gen.generate(**prompt, **GREEDY)
    assert torch.equal(ours, model.generate(**prompt, **GREEDY))
    assert gen._steps.graphs == 0


def broken(graph, inputs):
    raise RuntimeError("the compiler is out of order")


def wrong(graph, inputs):
    return lambda *args: [out + 0.1 if out.is_floating_point() else out for out in graph(*args)]


@pytest.mark.parametrize(("backend", "reason"), [(broken, "out of order"), (wrong, "did not give the scores")])
def test_a_compiler_that_fails_or_errs_is_not_used(monkeypatch, backend, reason):
    monkeypatch.setattr(compiled, "BACKEND", backend)
    target, draft = pair()
    prompt = ragged_prompt()
    gen = SpeculativeGenerator(target, DraftModel(draft), num_draft_tokens=3, compile=True)
    with pytest.warns(UserWarning, match="eagerly") as told:
        ours = gen.generate(**prompt, **GREEDY)
    assert torch.equal(ours, target.generate(**prompt, **GREEDY))
    assert gen.stats.layout == "slots"
    assert len([one for one in told if reason in str(one.message)]) == 1


def test_passes_that_no_graph_is_made_for():
    steps, cache = CompiledSteps(), SimpleNamespace(shape=(1, 5, 256), eager=False)
    inputs = {CACHE: None}
    # a graph gives scores only: with None for a model, whatever gets as far as making one is warned about
    for asked in ("output_hidden_states", "output_attentions"):
        assert steps.run(None, {**inputs, asked: True}, cache, 5) is None
    cache.shape = (1, 4, 256)
    assert steps.run(None, inputs, cache, 4) is None
    assert not steps.refused
    cache.shape = (1, 5, 256)
    with pytest.warns(UserWarning, match="runs NoneType eagerly"):
        assert steps.run(None, inputs, cache, 5) is None
    assert steps.run(None, inputs, cache, 5) is None, "once is enough"
    assert steps.width(4) == 4, "nothing has to be filled up any more"


class Small(torch.nn.Module):
    """As much of a model as a graph needs: scores of the one number that it is given."""

    def forward(self, ids, return_dict, cache=None, past_key_values=None):
        return CausalLMOutputWithPast(logits=self.scores(ids))

    def scores(self, ids):
        return ids[..., None].float() * torch.ones(3)


class Breaks(Small):
    """No single graph can be made of it."""

    def scores(self, ids):
        torch._dynamo.graph_break()
        return super().scores(ids)


def test_a_graph_is_of_one_shape_and_whole(traced):
    steps = CompiledSteps()

    def run(model, *shape):
        inputs = {"ids": torch.ones(shape[:2], dtype=torch.int64), CACHE: None}
        cache = SimpleNamespace(shape=shape, place_by_data=lambda: None, device=torch.device("cpu"), eager=False)
        return steps.run(model, inputs, cache, 1)

    shapes = [(1, 2, 256), (3, 2, 256), (3, 2, 512), (3, 5, 256)]
    for shape in [*shapes, *shapes]:
        assert run(Small(), *shape).shape == (*shape[:2], 3)
    assert steps.graphs == len(shapes)
    with pytest.warns(UserWarning, match="eagerly"):
        assert run(Breaks(), 1, 1, 256) is None
    assert steps.graphs == 0, "what will not be used again is not kept"


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)])
def test_every_score_of_a_new_graph_that_means_something_must_be_the_eager_one(monkeypatch, place):
    def backend(graph, inputs):
        def run(*args):
            (scores,) = graph(*args)
            scores[place] += torch.arange(3)
            return [scores]

        return run

    monkeypatch.setattr(compiled, "BACKEND", backend)
    inputs = {"ids": torch.ones(2, 3, dtype=torch.int64), CACHE: None}
    cache = SimpleNamespace(shape=(2, 3, 256), place_by_data=lambda: None, device=torch.device("cpu"), eager=False)
    steps, filled_up = CompiledSteps(), place == (1, 2)
    with nullcontext() if filled_up else pytest.warns(UserWarning, match="did not give the scores"):
        found = steps.run(Small(), inputs, cache, 2)
    assert (found is not None) == (steps.graphs == 1) == filled_up


def test_what_interrupts_a_compiled_pass_is_the_callers(monkeypatch, traced):
    def late(*_):
        raise TimeoutError("deadline")

    target, _ = pair()
    gen = SpeculativeGenerator(target, "ngram", num_draft_tokens=3, compile=True)
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_replay", late)
        with pytest.raises(TimeoutError, match="deadline"):
            gen.generate(**ragged_prompt(), **GREEDY)
    assert torch.equal(gen.generate(**ragged_prompt(), **GREEDY), target.generate(**ragged_prompt(), **GREEDY))
    assert gen.stats.layout == "slots+compiled"


@pytest.mark.parametrize("when", ["compiling", "a pass"])
def test_a_full_memory_says_nothing_of_the_next_call(monkeypatch, when):
    """The call goes on eagerly, and does not compile again for every pass."""
    full = []

    def backend(graph, inputs):
        def run(*args):
            if full and when == "a pass":
                full.append(1)
                raise torch.OutOfMemoryError("full")
            return graph(*args)

        if full and when == "compiling":
            full.append(1)
            raise torch.OutOfMemoryError("full")
        return run

    monkeypatch.setattr(compiled, "BACKEND", backend)
    target, _ = pair()
    prompt = ragged_prompt()
    wanted = target.generate(**prompt, **GREEDY)
    gen = SpeculativeGenerator(target, "ngram", num_draft_tokens=3, compile=True)
    if when == "a pass":
        gen.generate(**prompt, **GREEDY)
    graphs = gen._steps.graphs
    full.append(0)
    assert torch.equal(gen.generate(**prompt, **GREEDY), wanted)
    assert full == [0, 1]
    assert gen._steps.graphs == graphs
    full.clear()
    assert torch.equal(gen.generate(**prompt, **GREEDY), wanted)
    assert gen._steps.graphs > 0
    assert gen.stats.layout == "slots+compiled"


def test_a_pass_that_makes_a_graph_takes_what_later_ones_take(monkeypatch):
    """To whoever asks the clock: neither compiling nor the eager pass to compare with, which may be slower."""

    class Slow(Small):
        def forward(self, *given, **named):
            if not torch.compiler.is_compiling():
                time.sleep(0.8)
            return super().forward(*given, **named)

    def slow(graph, inputs):
        def run(*args):
            time.sleep(0.1)
            return graph(*args)

        time.sleep(0.8)
        return run

    monkeypatch.setattr(compiled, "BACKEND", slow)
    inputs = {"ids": torch.ones(2, 3, dtype=torch.int64), CACHE: None}
    cache = SimpleNamespace(shape=(2, 3, 256), place_by_data=lambda: None, device=torch.device("cpu"), eager=False)
    steps, model = CompiledSteps(), Slow()
    for _ in range(2):
        start = clock()
        assert steps.run(model, inputs, cache, 3) is not None
        assert 0.1 <= clock() - start < 0.5
    assert steps.graphs == 1


# --- what is kept ---


def test_captured_graphs_find_their_buffers_again(traced, monkeypatch):
    monkeypatch.setattr(compiled, "captures", lambda device: True)
    target, draft = pair()
    prompt = ragged_prompt()
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=3, compile=True)
    plain = target.generate(**prompt, **GREEDY)
    places = []
    for _ in range(2):
        assert torch.equal(gen.generate(**prompt, **GREEDY), plain)
        gc.collect()  # tracing leaves cycles behind
        (buffers,) = gen._steps._free.values()
        places.append([one.data_ptr() for one in buffers])
    assert places[0] == places[1]


class Cache:
    """What is lent a buffer."""

    def __init__(self, *held):
        self.held = list(held)

    def buffers(self):
        return self.held

    def move(self, buffers):
        self.held = buffers


def test_two_calls_at_once_do_not_share_buffers(monkeypatch):
    monkeypatch.setattr(compiled, "captures", lambda device: True)

    steps = CompiledSteps()
    first, second = Cache(torch.zeros(2, 3)), Cache(torch.zeros(2, 3))
    steps.lend(first)
    steps.lend(second)
    place = first.held[0].data_ptr()
    assert place != second.held[0].data_ptr()
    del second, first
    third = Cache(torch.zeros(2, 3))
    third.held[0] += 1
    steps.lend(third)
    assert third.held[0].data_ptr() == place
    assert (third.held[0] == 1).all()
    fourth = Cache(torch.zeros(2, 3))
    steps.lend(fourth)
    assert fourth.held[0].data_ptr() != place, "the third has them"
    del fourth, third
    fifth = Cache(torch.zeros(2, 3))
    steps.lend(fifth)
    assert fifth.held[0].data_ptr() == place


def test_buffers_are_lent_to_their_own_kind(monkeypatch):
    monkeypatch.setattr(compiled, "captures", lambda device: True)
    marked = []
    monkeypatch.setattr(torch._dynamo, "mark_static_address", lambda one, guard: marked.append(one.data_ptr()))
    steps = CompiledSteps()
    steps.lend(Cache())  # layers that keep nothing
    kinds = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.float64)]
    for buffer in kinds:
        cache = Cache(buffer)
        steps.lend(cache)
        assert cache.held[0] is buffer
        del cache
        assert len(steps._free) == 1, "the last set only"
    # where a captured graph writes must not move
    assert marked == [buffer.data_ptr() for buffer in kinds]


def test_scores_of_a_captured_graph_are_taken_away_before_the_next_replay(monkeypatch):
    monkeypatch.setattr(compiled, "captures", lambda device: True)
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    cache = SimpleNamespace(place_by_data=lambda: None, device=torch.device("cpu"))
    place = torch.zeros(1)
    scores = [compiled._replay(lambda *_: place.add_(1), None, {}, cache) for _ in range(2)]
    assert [one.item() for one in scores] == [1, 2]
    assert len(begun) == 2


def test_a_model_is_not_kept_alive(traced):
    target, draft = pair()
    gen = SpeculativeGenerator(target, DraftModel(draft), num_draft_tokens=2, compile=True)
    gen.generate(**ragged_prompt(), **GREEDY)
    gone = weakref.ref(target)
    del target, draft, gen
    gc.collect()
    assert gone() is None


# --- refusals ---


def test_where_nothing_would_be_compiled_it_is_refused():
    target, draft = pair()
    for given in ({"num_draft_tokens": 0}, {"layout": "columns"}, {"compile": "max-autotune"}):
        options = {"draft": draft, "compile": True, **given}
        with pytest.raises(InvalidInput, match="compile="):
            SpeculativeGenerator(target, **options)


def test_a_missing_compiler_is_named_at_once(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def absent():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", absent)
    target, draft = pair()
    with pytest.raises(InvalidInput, match=r"C\+\+ compiler.*install g\+\+"):
        SpeculativeGenerator(target, draft, compile=True)
    with pytest.raises(InvalidInput, match=r"C\+\+ compiler"):
        DraftModel(draft, compile=True)


def test_a_missing_triton_is_named_at_once(monkeypatch):
    from torch.utils import _triton

    model = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(_triton, "has_triton", lambda: True)
    compiled.check_compiler(model)
    monkeypatch.setattr(_triton, "has_triton", lambda: False)
    with pytest.raises(InvalidInput, match="Triton on CUDA"):
        compiled.check_compiler(model)


def test_what_a_compiler_says_is_cut_short():
    assert compiled._short(ValueError("a page\n" * 100)) == ("a page " * 100)[:200]


def test_room_for_no_more_than_a_text_may_have(traced):
    """A limit that means "until the end" is no reason to make room for it."""
    target, prompt = tiny_llama(), ragged_prompt(LENGTHS["padded"])
    free = target.generate(**prompt, **GREEDY)
    options = {"do_sample": False, "eos_token_id": [int(row[20]) for row in free], "pad_token_id": 0}
    plain = target.generate(**prompt, max_new_tokens=40, **options)
    gen = SpeculativeGenerator(target, noisy_copy(target), num_draft_tokens=3, compile=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert gen.generate(**prompt, max_new_tokens=10**11, **options).equal(plain)
            assert gen.stats.layout == "slots"
    told = [
        str(one.message) for one in said if "eagerly in a call whose text may have 100000000009" in str(one.message)
    ]
    assert len(told) == 2, "target and draft, once each"
    assert all("32768" in one for one in told)
    assert gen.generate(**prompt, max_new_tokens=40, **options).equal(plain)
    assert gen.stats.layout == "slots+compiled"


def test_a_model_with_many_positions_may_have_room_for_them():
    steps = CompiledSteps()
    wide, narrow = tiny_llama(max_position_embeddings=1 << 17), tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps.fits(wide, 1 << 17)
        assert steps.fits(narrow, 1 << 15)
    with pytest.warns(UserWarning, match="131072"):
        assert not steps.fits(wide, (1 << 17) + 1)
    assert not steps.fits(narrow, (1 << 15) + 1)
    silent = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(max_position_embeddings=None))
    assert steps.fits(SimpleNamespace(config=silent), 1 << 15), "nothing is said of an end"


def test_widths_and_rooms_are_few():
    steps = CompiledSteps()
    assert [steps.width(n) for n in (1, 2, 3, 4, 5, 6, 9, 10, 17, 18)] == [1, 2, 3, 5, 5, 9, 9, 17, 17, 18]
    assert {steps.room(columns) for columns in range(1, 240)} == {256}
    assert all(steps.room(columns) >= columns + WIDTHS[-1] for columns in range(1, 2000))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_caches_and_hidden_states(traced, lengths):
    """What the caller gets of a call, and gives to the next, is plain's with graphs as well."""
    target, draft = pair()
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=4, compile=True)
    asked = {"return_dict_in_generate": True, **GREEDY}
    found = []
    for run in (target.generate, gen.generate):
        prompt, cache = ragged_prompt(lengths), DynamicCache(config=target.config)
        for turn in range(3):
            # a pass that is asked for states is an eager one
            out = run(**prompt, **{CACHE: cache}, output_hidden_states=turn == 2, **asked)
            ids = torch.cat([out.sequences, torch.full((len(lengths), 2), 20 + turn)], dim=1)
            added = ids.shape[1] - prompt["input_ids"].shape[1]
            mask = torch.nn.functional.pad(prompt["attention_mask"], (0, added), value=1)
            prompt = {"input_ids": ids, "attention_mask": mask}
        found.append((ids, cache, out))
    assert gen.stats.layout == "slots+compiled"
    assert gen._steps.graphs > 0
    (ids, cache, out), (our_ids, our_cache, ours) = found
    assert our_ids.tolist() == ids.tolist()
    for one, other in zip(our_cache.layers, cache.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.values, other.values, atol=1e-4, rtol=1e-4)
    for one, other in zip(ours.hidden_states, out.hidden_states, strict=True):
        torch.testing.assert_close(one[-1], other[-1], atol=1e-4, rtol=1e-4)


def test_streams_that_are_closed(traced):
    target, draft = pair()
    gen = SpeculativeGenerator(target, draft, num_draft_tokens=4, compile=True)
    wanted = target.generate(**ragged_prompt(), **GREEDY)
    for number in range(8):
        stream = gen.stream(**ragged_prompt(), **GREEDY)
        for _ in range(3 * number):
            next(stream)
        stream.close()
        assert torch.equal(gen.generate(**ragged_prompt(), **GREEDY), wanted)
