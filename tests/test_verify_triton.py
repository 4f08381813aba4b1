"""The fused kernels against the reference, in Triton's interpreter, which runs them on a CPU.

Triton decides on import whether it compiles or interprets, so the comparison runs in a process of
its own: this very file as a program. It shows that the kernels compute the right tokens, and
nothing about a GPU.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product

import pytest
import torch


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (extra: test)")
def test_kernels_agree_with_the_reference_in_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip().endswith("cases agree"), result.stdout


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (extra: test)")
@pytest.mark.parametrize("kernel", ["_measure", "_judge", "_weigh", "_draw"])
def test_kernels_compile_to_machine_code(kernel: str) -> None:
    """For compute capability 9.0, with the compiler that Triton brings; nothing is run."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from specdec.verify import triton as fused

    whole = ("tokens", "lengths", "usable", "accepted_out", "next_token_out")
    numbers = ("positions", "extra", "vocabulary", "width", "position_stride")
    constants = {"WORK": tl.float32, "COLUMNS": 4096, "HAS_DRAFT": True, "BY_BLOCK": True}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("rows", "target", "draft"):
            return "*bf16"
        if name in whole:
            return "*i64"
        if name in numbers or name.endswith("_stride"):
            return "i64" if name.endswith("row_stride") else "i32"
        return "*fp64" if name == "uniforms" else "*fp32"

    function = getattr(fused, kernel)
    source = triton.compiler.ASTSource(
        fn=function,
        signature={name: kind(name) for name in function.arg_names},
        constexprs={name: constants[name] for name in function.arg_names if name in constants},
    )
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def compare() -> int:
    """Random ragged batches with damage in some rows; returns how many were compared."""
    from specdec.verify import sample
    from specdec.verify import triton as fused
    from specdec.verify.reference import verify_reference

    fused._COLUMNS = 8  # several blocks a row, the last one ragged
    generator = torch.Generator().manual_seed(0)
    cases = 0
    shapes = ((torch.float64, 3), (torch.float32, 1), (torch.bfloat16, 3), (torch.float32, 0))
    for rule, shown, (dtype, guesses) in product(("token", "block"), (True, False), shapes):
        batch, vocabulary = 10, 19
        target = torch.randn(batch, guesses + 1, vocabulary + 2, generator=generator)
        draft = target[:, :guesses] + torch.randn(batch, guesses, vocabulary + 2, generator=generator)
        target[torch.rand(target.shape, generator=generator) < 0.3] = -torch.inf
        target[..., 1] = 0.0
        draft[1] = target[1, :guesses]  # equal rows: the residual is exactly empty
        # Rows cut out of a larger tensor, as a model's padded vocabulary gives them.
        target, draft = target.to(dtype)[..., :vocabulary], draft.to(dtype)[..., :vocabulary]
        tokens = sample(draft, torch.rand(draft.shape[:2], generator=generator))
        lengths = torch.randint(0, guesses + 1, (batch,), generator=generator)
        lengths[1:6] = guesses
        past = torch.arange(guesses) >= lengths[:, None]
        tokens[past], draft[past], target[:, 1:][past] = -1, torch.nan, torch.nan
        uniforms = torch.rand(batch, guesses + 1, generator=generator, dtype=torch.float64)
        uniforms[0], uniforms[6, -1] = 0.0, 1 - 2**-53
        target[2, 0] = -torch.inf
        target[3] = torch.randn(guesses + 1, vocabulary, generator=generator).to(dtype)
        target[3, guesses, 4] = torch.nan
        if guesses:  # nothing is needed behind a guess that the target forbids
            target[8, 0, 1 : vocabulary - 1] = 0.0
            target[8, 0, tokens[8, 0].clamp(min=0)] = -torch.inf
            target[8, 1:] = -torch.inf
        if guesses > 1:
            tokens[4, 1], draft[5, 1, 4] = vocabulary, torch.nan

        arguments = target, tokens, lengths, draft if shown else None, rule, uniforms
        expected, found = verify_reference(*arguments), fused.verify_fused(*arguments)
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other), (rule, shown, dtype, guesses, one, other)
        assert expected[1][2] == expected[1][3] == -1
        assert expected[1][8] >= 0 or not lengths[8]
        cases += 1
    return cases


if __name__ == "__main__":
    print(f"{compare()} cases agree")
