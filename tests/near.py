"""What the tests of the Triton ops share with bench/: inputs, and how near an output has to be."""

from collections.abc import Callable

import torch
from mteditflow_kernels import noise_keys
from torch import Tensor

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
ROW_ROUNDING = 16 * 2.0**-24  # log-probs and losses of a row are below 16 here, and a ratio has their absolute error


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers on the default device, the same on every device."""
    numbers = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return numbers.to(torch.get_default_device(), dtype)


def make_keys(num_rows: int, first: int = 0) -> Tensor:
    """No two of the five words are equal, and one has its highest bit."""
    rows = torch.arange(first, first + num_rows)
    return noise_keys(seed=-7, step=1, task=rows + 1000, trajectory=rows + 2000, turn=2, denoising_step=3)


def gradient(loss_of: Callable[[Tensor], Tensor], velocity: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    velocity = velocity.clone().requires_grad_()
    loss = loss_of(velocity)
    loss.backward()
    assert velocity.grad is not None
    return loss.detach(), velocity.grad


def assert_near(actual: Tensor, eager: Tensor, exact: Tensor, rounding: float = 2.0**-24, extra: float = 0.0) -> None:
    """No element off by more than twice the worst of the same computation in eager float32 and two roundings of the
    largest number, by which eager may have been lucky.
    """
    error, allowed = ((each.double() - exact.double()).abs().max().item() for each in (actual, eager))
    scale = max(1.0, exact.abs().max().item())
    assert not actual.isnan().any()
    assert error <= 2 * allowed + 4 * rounding * scale + extra, (error, allowed)
