"""Fixtures shared by the tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before a library reads it: a hub asked in vain is asked again for a minute
os.environ["MTEDITFLOW_CACHE"] = ""  # a test neither reads nor leaves an evaluation; those that do say where

import signal
from functools import partial
from pathlib import Path

import finished_runs
import pytest
import torch
import train_runs
from judge_server import ask, server  # noqa: F401, fixtures

from mteditflow.config import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
)
from mteditflow.world.tiny_kontext import build_pipeline

TINY_MAX_TEXT_TOKENS = 8
TINY_WORDS = ("make", "the", "red", "blue", "square", "circle", "remove", "add", "a", "left", "right", "of")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests compare bits and run beside other work: one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def heeded_interrupt() -> None:
    """A shell has its background jobs ignore SIGINT, and a run then leaves it so."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
        max_text_tokens=TINY_MAX_TEXT_TOKENS,
        seed=0,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny_kontext"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tiny_pipeline_folder: Path) -> Config:
    """GRPO on that folder: 2 tasks x 2 trajectories, 2 turns, 3 noisy steps of which 2 are trained."""
    return Config(
        model=ModelConfig(path=str(tiny_pipeline_folder), max_text_tokens=TINY_MAX_TEXT_TOKENS),
        lora=LoraConfig(rank=2, alpha=4),
        data=DataConfig(num_turns=2),
        rollout=RolloutConfig(num_tasks=2, group_size=2, num_steps=3, window_size=0),
        objective=ObjectiveConfig(name="grpo"),
        optimizer=OptimizerConfig(weight_decay=0.0),
    )


@pytest.fixture(scope="session")
def arguments(tiny_pipeline_folder: Path) -> train_runs.Arguments:
    """The command line of a short run of that folder, by run folder and overrides."""
    return partial(train_runs.arguments, tiny_pipeline_folder, model__max_text_tokens=TINY_MAX_TEXT_TOKENS)


@pytest.fixture(scope="session")
def lora_run(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: GRPO of a LoRA on FLUX.1-Kontext, K = 2."""
    return finished_runs.train_lora(tmp_path_factory.mktemp("runs") / "lora-run", tiny_pipeline_folder)


@pytest.fixture(scope="session")
def weights_run(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: NFT of the weights themselves, K = 1."""
    return finished_runs.train_weights(tmp_path_factory.mktemp("runs") / "weights-run", tiny_pipeline_folder)


@pytest.fixture(scope="session")
def klein_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: NFT of a LoRA on FLUX.2, of whose held-out sessions some could not be scored."""
    return finished_runs.train_klein(tmp_path_factory.mktemp("runs") / "klein-run")
