"""Pictures doubled by copies are those of diffusers' own module, to the bit and in its layout."""

import copy

import pytest
import torch
from diffusers.models.upsampling import Upsample2D

from mteditflow.policy.encoding import hasten_upsampling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [None, (9, 7)])
def test_upsampling(dtype: torch.dtype, layout: torch.memory_format, size: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    stock = Upsample2D(4, use_conv=True, out_channels=3).to(dtype).requires_grad_(False)
    hastened = copy.deepcopy(stock)
    hasten_upsampling(torch.nn.Sequential(hastened))
    assert "forward" in vars(hastened)
    x = torch.randn(2, 4, 5, 3, dtype=dtype).contiguous(memory_format=layout)
    expected, found = stock(x, size), hastened(x, size)
    assert torch.equal(found, expected) and found.stride() == expected.stride()


def test_what_is_no_plain_upsampling_stays() -> None:
    others = torch.nn.Sequential(
        Upsample2D(4),
        Upsample2D(4, use_conv_transpose=True),
        Upsample2D(4, use_conv=True, norm_type="rms_norm", eps=1e-6),
    )
    hasten_upsampling(others)
    assert all("forward" not in vars(module) for module in others)
