"""docs/add_a_model.md, followed literally: its code is a family that rolls out and learns."""

import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from mteditflow.config import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
)
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks
from mteditflow.update import update

ROOT = Path(__file__).parent.parent
RANKS = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


class PatchPipeline:
    """What the guide's policy asks of a pipeline."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=192, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=False,
            axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        self.components = {"transformer": self.transformer}

    def set_progress_bar_config(self, disable: bool) -> None:
        pass


@pytest.fixture(scope="module")
def guide() -> Any:
    """A module of the guide's code; the case is in place in `build_policy` as the guide says."""
    text = (ROOT / "docs" / "add_a_model.md").read_text()
    code, case, check = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    source = (ROOT / "mteditflow" / "policy" / "__init__.py").read_text()
    assert "        case other:\n" in source
    compile(source.replace("        case other:\n", f"{case}        case other:\n"), "policy", "exec")
    module = types.ModuleType("guide")
    exec(compile(code + check, "docs/add_a_model.md", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("objective", ["grpo", "nft"])
def test_the_guide_s_family_learns(guide: Any, objective: Any) -> None:
    config = Config(
        model=ModelConfig(max_text_tokens=24), lora=LoraConfig(rank=2, alpha=4, targets=()),
        data=DataConfig(num_turns=2),
        rollout=RolloutConfig(num_tasks=2, group_size=2, num_steps=3, microbatch_size=2, window_size=0),
        objective=ObjectiveConfig(name=objective), optimizer=OptimizerConfig(microbatch_size=2, learning_rate=1e-3),
    )  # fmt: skip
    policy = guide.PatchPolicy(
        "", config.model, config.lora, seed=0, has_old=objective == "nft", device=RANKS.device, loaded=PatchPipeline()
    )
    tasks = training_tasks(config, 0, RANKS)
    rollout = guide.check(policy, tasks, config)
    before = policy.adapters.state("current")
    optimizer = torch.optim.AdamW([weight for _, weight in policy.adapters.trainable], lr=1e-3)
    sign = 1.0 - 2.0 * (torch.arange(4) % 2)
    figures = update(policy, optimizer, rollout, sign[:, None].repeat(1, 2), config, RANKS)
    assert figures.get("update/first_ratio_error", 0.0) == 0 and figures["update/grad_norm"] > 0
    after = policy.adapters.state("current")
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())
    assert policy.adapters.num_modules == 3 + 4  # to_q, to_k, to_v of both blocks, proj_mlp of the single one
