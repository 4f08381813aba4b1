"""`verify` as an operator: against a slow twin, on damaged input, in every dtype, compiled and
fake."""

import math
from importlib import import_module
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from specdec.verify import choose, keyed_gumbel, match, sample, verify
from specdec.verify.reference import verify_reference

RULES = ("token", "block")
Case = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]


def case(
    seed: int = 0,
    *,
    batch: int = 24,
    guesses: int = 4,
    vocabulary: int = 6,
    dtype: torch.dtype = torch.float64,
    shown: bool = True,
) -> Case:
    """A random ragged batch: rows, guesses drawn from the draft's rows, lengths 0 .. K, noise."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(batch, guesses + 1, vocabulary, generator=generator, dtype=torch.float64)
    draft = target[:, :guesses] + torch.randn(batch, guesses, vocabulary, generator=generator, dtype=torch.float64)
    target[torch.rand(target.shape, generator=generator) < 0.2] = -math.inf
    target[..., 0] = target[..., 0].clamp(min=-3)
    target, draft = target.to(dtype), draft.to(dtype)
    tokens = sample(draft, torch.rand(batch, guesses, generator=generator, dtype=torch.float64))
    lengths = torch.randint(0, guesses + 1, (batch,), generator=generator)
    uniforms = torch.rand(batch, guesses + 1, generator=generator, dtype=torch.float64)
    return target, tokens, lengths, draft if shown else None, uniforms


def judged(parts: Case, rule: str) -> tuple[Tensor, Tensor]:
    *rows, uniforms = parts
    return verify(*rows, rule=rule, uniforms=uniforms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("guesses", [0, 1, 4])
@pytest.mark.parametrize("rule", RULES)
def test_the_lean_form_decides_as_the_reference(rule, guesses, shown, dtype):
    """On a CPU the operator is the lean form; ties to rounding aside it must not differ anywhere."""
    for seed in range(4):
        parts = case(seed, batch=64, guesses=guesses, vocabulary=30, dtype=dtype, shown=shown)
        *rows, uniforms = parts
        wanted = verify_reference(*rows, rule, uniforms)
        for mine, theirs in zip(judged(parts, rule), wanted, strict=True):
            assert (mine == theirs).float().mean() > (0.98 if dtype == torch.bfloat16 else 0.999)


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_sequences_that_share_memory_are_judged_as_all_at_once(rule, shown, batch, monkeypatch):
    """Long rows are taken a few sequences at a time, here three, three and one."""
    parts = case(15, batch=batch, shown=shown)
    together = judged(parts, rule)
    lean = import_module("specdec.verify.lean")
    monkeypatch.setattr(lean, "AT_ONCE", 3 * 5 * 6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    made = []
    memory = lean._memory
    monkeypatch.setattr(lean, "_memory", lambda *given: made.append(memory(*given)) or made[-1])
    for one, other in zip(judged(parts, rule), together, strict=True):
        assert torch.equal(one, other)
        assert one.shape == (batch,)
    assert [len(rows) for rows in made] == [min(batch, 3)] * (1 + shown)


def twin(parts: Case, rule: str) -> tuple[list[int], list[int]]:
    """The rules as the papers print them: one row at a time, lists and floats."""
    accepted, next_tokens = [], []
    target_rows = parts[0].softmax(-1).tolist()
    draft_rows = None if parts[3] is None else parts[3].softmax(-1).tolist()
    for b, length in enumerate(parts[2].tolist()):
        p, x = target_rows[b], parts[1][b].tolist()
        u = parts[4][b].tolist()
        vocabulary = range(len(p[0]))
        one_hot = [[float(v == x[i]) for v in vocabulary] for i in range(length)]
        q = one_hot if draft_rows is None else draft_rows[b]
        kept, scale = 0, 1.0
        if rule == "block" and draft_rows is not None:
            running = 1.0
            for i in range(1, length + 1):
                running = min(1.0, running * p[i - 1][x[i - 1]] / q[i - 1][x[i - 1]])
                chance = running
                if i < length:
                    mass = sum(max(running * p[i][v] - q[i][v], 0.0) for v in vocabulary)
                    room = mass + 1 - running
                    chance = mass / room if room > 0 else 1.0
                if u[i - 1] < chance:
                    kept, scale = i, running
        else:
            while kept < length and u[kept] < p[kept][x[kept]] / q[kept][x[kept]]:
                kept += 1
        weights = p[kept]
        if kept < length:
            weights = [max(scale * p[kept][v] - q[kept][v], 0.0) for v in vocabulary]
        accepted.append(kept)
        next_tokens.append(next(v for v in vocabulary if sum(weights[: v + 1]) > u[-1] * sum(weights)))
    return accepted, next_tokens


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_agrees_with_a_slow_twin(rule: str, shown: bool) -> None:
    for seed in range(8):
        parts = case(seed, shown=shown)
        accepted, next_token = judged(parts, rule)
        assert (accepted.tolist(), next_token.tolist()) == twin(parts, rule)
        assert accepted.dtype == next_token.dtype == torch.int64


@pytest.mark.parametrize("rule", RULES)
def test_rows_do_not_see_each_other(rule: str) -> None:
    parts = case(3)
    together = judged(parts, rule)
    for b in range(len(parts[2])):
        alone = judged(tuple(part[b : b + 1] for part in parts), rule)  # type: ignore[arg-type, index, union-attr]
        assert [one.item() for one in alone] == [many[b].item() for many in together]


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("junk_token", [-1, 999, 2**40, -(2**40)])
def test_what_stands_past_the_length_is_ignored(rule: str, shown: bool, junk_token: int) -> None:
    parts = case(4, shown=shown)
    clean = judged(parts, rule)
    target, tokens, lengths, draft, uniforms = parts
    past = torch.arange(tokens.shape[1]) >= lengths[:, None]
    tokens[past] = junk_token
    target[:, 1:][past] = math.nan
    uniforms[:, :-1][past] = 0.0
    if draft is not None:
        draft[past] = math.nan
    for before, after in zip(clean, judged(parts, rule), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("rule", RULES)
def test_inputs_are_left_as_they_were(rule: str) -> None:
    parts = case(5)
    before = [part.clone() for part in parts if part is not None]
    judged(parts, rule)
    for was, now in zip(before, parts, strict=True):
        assert now is not None
        assert torch.equal(was, now)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_gives_minus_one_and_only_there(rule: str, bad: float) -> None:
    good = judged(case(6), rule)
    lengths = case(6)[2]
    for place, argument in product(range(5), (0, 3)):
        parts = case(6)
        rows = parts[argument]
        assert rows is not None
        if place >= rows.shape[1]:
            continue
        rows[:, place, 2] = bad
        needed = place <= lengths if argument == 0 else place < lengths
        if argument == 0:  # nothing is needed behind a guess that the target forbids
            before = parts[0][:, :place].gather(-1, parts[1][:, :place].clamp(min=0)[..., None])[..., 0]
            needed &= (before > -math.inf).all(dim=1)
        accepted, next_token = judged(parts, rule)
        assert torch.equal(next_token, torch.where(needed, -1, good[1]))
        assert torch.equal(accepted, torch.where(needed, 0, good[0]))


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_what_stands_behind_a_forbidden_guess_decides_nothing(rule: str, bad: float, shown: bool) -> None:
    parts = case(6, shown=shown)
    parts[0][:, 1].scatter_(1, parts[1][:, 1:2].clamp(min=0), -math.inf)
    good = judged(parts, rule)
    parts[0][:, 2:] = torch.where((parts[2] > 1)[:, None, None], bad, parts[0][:, 2:])
    found = judged(parts, rule)
    assert torch.equal(found[0], good[0])
    assert torch.equal(found[1], good[1])
    assert (good[1] >= 0).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("argument", [0, 3])
def test_a_row_that_forbids_everything_gives_minus_one(rule: str, argument: int) -> None:
    parts = case(7)
    rows = parts[argument]
    assert rows is not None
    rows[:, 0] = -math.inf
    needed = parts[2] >= 0 if argument == 0 else parts[2] > 0
    assert torch.equal(judged(parts, rule)[1] == -1, needed)


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("token", [-1, 6, 2**40])
def test_a_guess_outside_the_vocabulary_gives_minus_one(rule: str, shown: bool, token: int) -> None:
    parts = case(8, shown=shown)
    parts[1][:, 1] = token
    assert torch.equal(judged(parts, rule)[1] == -1, parts[2] > 1)


@pytest.mark.parametrize("rule", RULES)
def test_a_guess_that_its_own_row_forbids_gives_minus_one(rule: str) -> None:
    parts = case(9)
    assert parts[3] is not None
    parts[3][:, 0].scatter_(1, parts[1][:, :1], -math.inf)
    assert torch.equal(judged(parts, rule)[1] == -1, parts[2] > 0)


@pytest.mark.parametrize("rule", RULES)
def test_equal_rows_keep_everything(rule: str) -> None:
    target, tokens, lengths, draft, uniforms = case(10)
    assert draft is not None
    target = torch.cat([draft, draft[:, :1]], 1)
    accepted, _ = judged((target, tokens, lengths, draft, uniforms), rule)
    assert torch.equal(accepted, lengths)


def test_nothing_left_of_the_residual_falls_back_to_the_target() -> None:
    """A guess of probability 1 refused by a uniform that no generator gives: still a token, not
    NaN."""
    target = torch.tensor([[[0.0, -math.inf], [0.0, -math.inf]]])
    for draft in (None, target[:, :1]):
        accepted, next_token = verify(
            target,
            torch.tensor([[0]]),
            torch.tensor([1]),
            draft,
            rule="token",
            uniforms=torch.tensor([[1.0, 0.7]]),
        )
        assert (accepted.item(), next_token.item()) == (0, 0)


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_no_guesses_at_all(rule: str, shown: bool) -> None:
    target, *_, uniforms = case(11, guesses=0)
    batch, _, vocabulary = target.shape
    accepted, next_token = verify(
        target,
        torch.empty(batch, 0, dtype=torch.int64),
        torch.zeros(batch, dtype=torch.int64),
        torch.empty(batch, 0, vocabulary, dtype=target.dtype) if shown else None,
        rule=rule,
        uniforms=uniforms,
    )
    assert (accepted == 0).all()
    assert torch.equal(next_token, sample(target[:, 0], uniforms[:, 0]))


@pytest.mark.parametrize("rule", RULES)
def test_one_hot_rows_are_the_index_form(rule: str) -> None:
    """At temperature 0 the rows are one-hot, and `verify` does what `match` does with the
    argmax."""
    target, tokens, lengths, draft, uniforms = case(12)
    sharp = torch.full_like(target, -math.inf).scatter(-1, target.argmax(-1, keepdim=True), 0.0)
    for shown in (draft, None):
        result = judged((sharp, tokens, lengths, shown, uniforms), rule)
        for one, other in zip(result, match(choose(target), tokens, lengths), strict=True):
            assert torch.equal(one, other)


# --- dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_half_precision_rows_are_judged_in_float32(rule: str, dtype: torch.dtype) -> None:
    parts = case(13, dtype=dtype)
    target, tokens, lengths, draft, uniforms = parts
    assert draft is not None
    wide = (target.float(), tokens, lengths, draft.float(), uniforms)
    for one, other in zip(judged(parts, rule), judged(wide, rule), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("noise", [torch.float32, torch.float64])
def test_float64_rows_are_judged_in_float64(rule: str, noise: torch.dtype) -> None:
    """An acceptance of 1/2 - 1e-12 is told from 1/2, which float32 cannot."""
    target = torch.tensor([[0.5 - 1e-12, 0.5 + 1e-12]], dtype=torch.float64).log().repeat(2, 1)[None]
    for guess, kept in ((0, 0), (1, 1)):
        accepted, _ = verify(
            target,
            torch.tensor([[guess]]),
            torch.tensor([1]),
            rule=rule,
            uniforms=torch.tensor([[0.5, 0.5]], dtype=noise),
        )
        assert accepted.item() == kept


# --- misuse ------------------------------------------------------------------------------------


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="rule is 'lenient'; it must be one of token, block"):
        judged(case(), "lenient")


@pytest.mark.parametrize("argument", [1, 2, 3, 4])
def test_nothing_is_broadcast(argument: int) -> None:
    parts = list(case())
    short = parts[argument]
    assert short is not None
    parts[argument] = short[:1]
    with pytest.raises(ValueError, match=r"has shape \(1,"):
        judged(tuple(parts), "token")  # type: ignore[arg-type]


# --- compiled, captured, fake ------------------------------------------------------------------


def test_the_operator_keeps_its_promises_to_torch() -> None:
    for rule, shown in product(RULES, (True, False)):
        target, tokens, lengths, draft, uniforms = case(14, shown=shown)
        arguments = target, tokens, lengths, draft, rule, uniforms
        torch.library.opcheck(torch.ops.specdec.verify.default, arguments)


def everything(target: Tensor, tokens: Tensor, lengths: Tensor, draft: Tensor, *noise: Tensor) -> list[Tensor]:
    """Every function of the room that runs on the device, in one graph."""
    uniforms, keys = noise
    positions = torch.arange(target.shape[1], device=target.device) + lengths[:, None]
    gumbel = keyed_gumbel(keys, positions, target.shape[-1], target.dtype)
    results: list[Tensor] = [sample(target[:, 0], uniforms[:, -1])]
    results += match(choose(target), tokens, lengths)
    results += match(choose(target, gumbel), tokens, lengths)
    for rule in RULES:
        for rows in (draft, None):
            results += verify(
                target,
                tokens,
                lengths,
                rows,
                rule=rule,
                uniforms=uniforms,
            )
    return results


def test_compiles_whole_and_once() -> None:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    for seed in range(4):
        parts = (*case(seed), torch.arange(24) * seed)
        for one, other in zip(compiled(*parts), everything(*parts), strict=True):
            assert torch.equal(one, other)
    assert backend.frame_count == 1
    torch._dynamo.reset()


class _WithoutGuard(TorchFunctionMode):
    """`tensor[...]` and `~tensor` in other words.

    Torch's own words for them ask for a CUDA guard, fake tensor or not, and a CPU build has none.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.Tensor.__invert__:
            return args[0].logical_not()
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        result, index = args
        dim = 0
        for item in index if isinstance(index, tuple) else (index,):
            if item is None:
                result = result.unsqueeze(dim)
            elif isinstance(item, int):
                result, dim = result.select(dim, item), dim - 1
            elif item is Ellipsis:
                named = [one for one in index if one is not None and one is not Ellipsis]
                dim += args[0].dim() - len(named) - 1
            else:
                start, stop, _ = item.indices(result.shape[dim])
                result = result.narrow(dim, start, max(stop - start, 0))
            dim += 1
        return result


def test_never_reads_a_value_from_the_device() -> None:
    """Fake CUDA tensors have shapes and no values: anything that reads one raises."""
    with FakeTensorMode(), _WithoutGuard():
        batch, guesses, vocabulary = 3, 4, 50
        rows = torch.empty(batch, guesses + 1, vocabulary, device="cuda", dtype=torch.bfloat16)
        tokens = torch.empty(batch, guesses, device="cuda", dtype=torch.int64)
        lengths = torch.empty(batch, device="cuda", dtype=torch.int64)
        uniforms = torch.empty(batch, guesses + 1, device="cuda", dtype=torch.float64)
        results = everything(rows, tokens, lengths, rows[:, :guesses], uniforms, lengths)
        arguments = rows, tokens, lengths, rows[:, :guesses]
        for rule in RULES:  # the operator hides it from fake tensors, so look inside as well
            results += verify_reference(*arguments, rule, uniforms)
        for result in results:
            assert result.shape == (batch,)
            assert result.dtype == torch.int64
            assert result.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            lengths.max().item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_cuda_agrees_with_the_reference(rule: str, shown: bool) -> None:
    for seed in range(8):
        parts = case(seed, shown=shown, vocabulary=5000)
        moved = tuple(None if part is None else part.cuda() for part in parts)
        for one, other in zip(judged(moved, rule), judged(parts, rule), strict=True):  # type: ignore[arg-type]
            assert torch.equal(one.cpu(), other)
