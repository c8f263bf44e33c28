"""docs/add_a_model.md, followed literally: its file and its line are a family that is planned, trained and exported."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode

from mteditflow import policy as policies
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
from mteditflow.export.card import Card, usage, write_card
from mteditflow.export.comfyui import comfyui_keys
from mteditflow.guards import check_adapter
from mteditflow.objective import build_objective
from mteditflow.plan.dry_run import dry_run
from mteditflow.plan.flops import forward_flops
from mteditflow.plan.memory import memory_plan, read_sizes
from mteditflow.policy.cuda_graph import is_captured
from mteditflow.rollout import sample_rollout
from mteditflow.types import Condition
from mteditflow.update import update
from mteditflow.world.tiny_kontext import flux_scheduler

ROOT = Path(__file__).parent.parent
RANKS = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


class PatchPipeline(DiffusionPipeline):
    """What diffusers has of a family: its pipeline, loaded by the name of its class."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)


@pytest.fixture
def guide(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The guide's file as a module, and its line in place."""
    text = (ROOT / "docs" / "add_a_model.md").read_text()
    code, line, check = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    patch = ModuleType("mteditflow.policy.patch")
    monkeypatch.setitem(sys.modules, patch.__name__, patch)
    exec(compile(code + check, "docs/add_a_model.md", "exec"), patch.__dict__)
    assert line.replace(", patch.FAMILY", "") in (ROOT / "mteditflow" / "policy" / "__init__.py").read_text()
    monkeypatch.setattr(policies, "patch", patch, raising=False)
    monkeypatch.setattr(policies, "FAMILIES", eval(line.removeprefix("FAMILIES = "), dict(vars(policies))))
    monkeypatch.setattr(diffusers, "PatchPipeline", PatchPipeline, raising=False)
    return patch


@pytest.fixture
def folder(guide: Any, tmp_path: Path) -> Path:
    """A pipeline of the family, whose scheduler and transformer are stock classes."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=192, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    PatchPipeline(transformer, flux_scheduler()).save_pretrained(tmp_path / "patch")
    return tmp_path / "patch"


def config_of(folder: Path, objective: Any) -> Config:
    return Config(
        model=ModelConfig(path=str(folder), max_text_tokens=24), lora=LoraConfig(rank=2, alpha=4, targets=()),
        data=DataConfig(num_turns=2),
        rollout=RolloutConfig(num_tasks=2, group_size=2, num_steps=3, microbatch_size=2, window_size=0),
        objective=ObjectiveConfig(name=objective), optimizer=OptimizerConfig(microbatch_size=2, learning_rate=1e-3),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_it_rolls_out_and_learns(guide: Any, folder: Path, name: str) -> None:
    config = config_of(folder, name)
    objective = build_objective(config)
    policy = policies.build_policy(config.model, config.lora, 0, has_old=objective.has_old)
    assert isinstance(policy.editor, guide.PatchEditor)
    tasks = training_tasks(config, 0, RANKS)
    rollout = sample_rollout(policy, objective, tasks, config, iteration=0)
    guide.check(policy, rollout, tasks[0].source)
    assert not is_captured(policy, 2, rollout.turns[0].condition, "auto")
    optimizer = torch.optim.AdamW([weight for _, weight in policy.adapters.trainable], lr=1e-3)
    advantages = (1.0 - 2.0 * (torch.arange(4) % 2))[:, None].repeat(1, 2)
    figures = update(policy, optimizer, objective, rollout, advantages, config, RANKS)
    assert figures.get("update/first_ratio_error", 0.0) == 0 and figures["update/grad_norm"] > 0
    check_adapter(policy, rollout, config)
    assert policy.adapters.num_modules == 3 + 4  # to_q, to_k, to_v of both blocks, proj_mlp of the single one


def test_it_is_planned(guide: Any, folder: Path) -> None:
    """Memory by the family's own tokens, 64 of 8 x 8 pixels where others have 16; FLOPs as torch counts them."""
    config = config_of(folder, "grpo")
    policy: Any = policies.build_policy(config.model, config.lora, 0, has_old=False)
    sizes = read_sizes(config)
    assert sizes.family is guide.FAMILY and policy.num_tokens == 64
    assert sizes.num_trained == sum(weight.numel() for _, weight in policy.adapters.trainable)
    tokens, heads = 2 * 64 + 24, policy.pipeline.transformer.config.num_attention_heads
    double = 2 * 64 * ((12 + 1) * 32 + 3 * 2) + 24 * 12 * 32  # nothing is trained of the text's stream
    single = tokens * ((11 + 1) * 32 + 4 * 2)
    numbers = double + single + 2 * 64 * 32 + tokens * (11 * 32 + 2 * 3 * heads)
    assert memory_plan(config, sizes)["activations of a training microbatch"] * 2**30 == pytest.approx(2 * numbers * 4)
    plan = dry_run(config)
    assert plan.problem is None and "run, without scoring and saving" in plan.table
    policy.editor._ids = policy.editor._ids.to("meta")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        transformer = FluxTransformer2DModel.from_config(policy.pipeline.transformer.config)
        text = {"text": torch.empty(1, 24, 32), "pooled": torch.empty(1, 32)}
        latents, condition = torch.empty(1, 64, 192), Condition(text=text, image=torch.empty(1, 64, 192))
        policy.editor.velocity(transformer, latents, torch.empty(1), condition)
    flops = forward_flops(policy.family, policy.pipeline.transformer.config, text_tokens=24, image_tokens=128)
    assert counter.get_total_flops() == flops.total


def test_it_is_exported(guide: Any, folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, "grpo")
    card = Card(
        config=config, iteration=1, adapter="ema", form="diffusers", dtype="float32", pipeline="PatchPipeline",
        file="", source="out",
    )  # fmt: skip
    code = usage(card)
    assert f'pipe = PatchPipeline.from_pretrained("{folder}"' in code and "    guidance_scale=2.5," in code
    compile(code, "card", "exec")
    write_card(card, tmp_path / "run", tmp_path)
    assert f"{guide.FAMILY.note}; it was trained with 64 x 64." in (tmp_path / "README.md").read_text()
    state = policies.build_policy(config.model, config.lora, 0, has_old=False).adapters.state("ema")
    assert len(comfyui_keys("PatchPipeline", state, alpha=4)) == 3 * 7
    with pytest.raises(ValueError, match=r"no keys for 1 of the adapted modules, such as 'proj_out'"):
        comfyui_keys("PatchPipeline", {"proj_out.lora_A.weight": torch.zeros(1)}, alpha=4)


def test_only_its_own_file_knows_a_family() -> None:
    """Names of classes and flags; published sizes, the embedded editor and the profile's random one have some too."""
    allowed = ("policy/published.py", "world/", "profile/random_kontext.py")
    package = ROOT / "mteditflow"
    paths = [path for path in package.rglob("*") if path.suffix in (".py", ".jinja")]
    files = {str(path.relative_to(package)): path.read_text() for path in paths}
    for family in policies.FAMILIES:
        home = f"policy/{family.editor.__module__.rsplit('.', 1)[-1]}.py"
        for name in (*family.pipelines, family.transformer, *family.uncapturable):
            known = {file for file, text in files.items() if re.search(rf"\b{name}\b", text)}
            assert home in known and all(file == home or file.startswith(allowed) for file in known), (name, known)
