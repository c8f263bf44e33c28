"""Pictures doubled by copies are those of diffusers' own module, to the bit and in its layout; what is cut is known."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers.models.upsampling import Upsample2D

from mteditflow.config import Config
from mteditflow.policy import build_policy
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


def test_what_is_cut_is_known(tiny_config: Config) -> None:
    """T tokens, of which one ends the text: one word more has the embedding of what fits."""
    for limit in (4, 8):
        model = replace(tiny_config.model, max_text_tokens=limit)
        policy = build_policy(model, tiny_config.lora, seed=0, has_old=False)
        words, images = ["make"] * (limit - 1), torch.zeros(3, 3, 64, 64)
        texts = [" ".join(words[1:]), " ".join(words), " ".join([*words, "red"])]
        assert [policy.family.count_tokens(policy.pipeline)(text) > limit for text in texts] == [False, False, True]
        short, whole, cut = policy.encode_text(texts, images, has_cfg=False)["text"]
        assert torch.equal(cut, whole) and not torch.equal(short, whole)
