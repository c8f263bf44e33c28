"""The registered ops on the reference: opcheck, finite differences, torch.compile without a graph break."""

import shutil

import pytest
import torch
from registered_cases import DIFFERENTIABLE, B, D, calls, check_compiled, check_op, draw, first, registered_arguments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", registered_arguments(torch.float32))
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    check_op(name, dtype)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name: str) -> None:
    """Eager, where autograd goes through the reference, and compiled, where the closed form of the backward op runs."""
    call = calls(torch.float64)[name]
    velocity = draw(0, B, D, dtype=torch.float64).requires_grad_()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for run in (call, compiled):
        if "NFT" not in name:  # whose adaptive weight is held constant, which finite differences do not do
            assert torch.autograd.gradcheck(lambda v, run=run: first(run(v)), velocity)
    own, closed = (torch.autograd.grad(first(run(velocity)).sum(), velocity)[0] for run in (call, compiled))
    # float64 rounding, 2^-53, of a few products and of sums of 65 terms
    assert (own - closed).abs().max() <= 100 * 2**-53 * own.abs().max()


@pytest.mark.parametrize("name", calls())
def test_compiled_without_a_graph_break(name: str) -> None:
    if name in DIFFERENTIABLE:
        pytest.skip("its gradient is autograd's in eager, the closed form compiled: test_gradcheck compares them")
    check_compiled(name, "aot_eager")


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor() -> None:
    check_compiled("step", "inductor")
