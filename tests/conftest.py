"""Fixtures shared by the tests."""

from pathlib import Path

import pytest
import torch

from mteditflow.world.parts import build_pipeline

TINY_MAX_TEXT_TOKENS = 8
TINY_WORDS = ("make", "the", "red", "blue", "square", "circle", "remove", "add", "a", "left", "right", "of")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests compare bits and run beside other work: one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random-weight FluxKontextPipeline in the true format, of about 100 thousand parameters."""
    pipeline = build_pipeline(
        vocabulary=TINY_WORDS,
        vae={
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        },
        transformer={
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
        text_width=32,
        pooled_width=16,
        max_text_tokens=TINY_MAX_TEXT_TOKENS,
        seed=0,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny_kontext"
    pipeline.save_pretrained(folder)
    return folder
