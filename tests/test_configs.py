"""The files in configs/ say only what differs, every value has its source, and every run fits where it is meant to."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mteditflow.config.cli import changed_fields, from_yaml, settings
from mteditflow.config.distributed import DistributedConfig
from mteditflow.plan.dry_run import dry_run
from mteditflow.plan.memory import MARGIN, read_sizes
from mteditflow.policy import FAMILIES, family_of
from mteditflow.policy.published import MODELS
from mteditflow.study.cells import read_study, runs_of

FOLDER = Path(__file__).parent.parent / "configs"
STUDIES = sorted(FOLDER.glob("study*.yaml"))
CONFIGS = sorted({*FOLDER.glob("*.yaml")} - {*STUDIES})
MODEL_CONFIGS = sorted([*FOLDER.glob("*gpu.yaml"), *FOLDER.glob("*gb.yaml")])
NAMES = ("folder", "name", "num_gpus")  # say what they are by themselves
JUDGE = "how a judge that serves others is asked"
WITHOUT_USER = {
    "data.held_out_share": "docs/data.md sets it, for a data set of four images",
    "data.allowed_folder": "where a user's pictures lie: docs/data.md",
    "rollout.iters_per_window": "MixGRPO's, of 25 iterations a step: longer runs than those of the configs",
    "rollout.is_start_shared": "MixGRPO's choice, where Flow-GRPO, which the configs follow, has the other",
    "rollout.hand_off": "ours: what a multi-turn editor hands on is a decision, not a constant",
    "rollout.cuda_graph": "the switch of a speed-up, which bench/ turns",
    "lora.init_from": "a user's LoRA: docs/export.md",
    "lora.is_full": "full fine-tuning, on the command line: docs/export.md",
    "model.attention": "what a GPU has and is installed on it decides",
    "model.compile": "the switch of a speed-up, which bench/ turns",
    "reward.rubric": "a user's text: docs/judge.md",
    "reward.num_retries": JUDGE,
    "reward.temperature": JUDGE,
    "reward.max_answer_tokens": JUDGE,
    "reward.num_parallel": JUDGE,
    "reward.timeout_s": JUDGE,
    "reward.max_wait_s": JUDGE,
    "reward.overlap": "the switch of a speed-up, which `profile --overlap` and bench/ turn",
    "reward.green_sms": "goes with reward.overlap green, which a GPU and torch 2.12 decide",
    "reward.also": "a user's function: docs/judge.md",
    "evaluation.has_true_inputs": "a diagnosis that doubles an evaluation, on the command line: README",
    "evaluation.num_strips": "must be at most num_sessions: lower in a run with few",
    "distributed.timeout_s": "how long the slowest rank may work alone: docs/scaling.md",
    "run.backend": "names the implementation where auto is not wanted",
    "run.num_checkpoints": "how far --resume_from can go back: as many as the disk has room for",
    "run.patience": "how long a run may go on without a clear gain is its user's to say: README",
    "run.log_to": "boards of the user's own, on the command line: README",
    "run.num_judged": "what is kept of a run to be looked at: more where pictures are small",
    "run.max_ratio_error": "above 0 where microbatches of rollout and update differ",
}
"""Fields that no file sets, and why they are no constants all the same."""


def given(path: Path) -> dict[str, Any]:
    """What a file sets, by 'section.field'."""
    tree = yaml.safe_load(path.read_text())
    return {f"{section}.{name}": value for section, fields in tree.items() for name, value in fields.items()}


def source_of(path: Path, key: str) -> str:
    """The comment behind a value of a file."""
    section, name = key.split(".")
    pattern = rf"^{section}:\n(?:  .*\n)*?  {name}: *\S.*?(?:  # (.*))?$"
    return re.findall(pattern, path.read_text(), re.MULTILINE)[0]


def test_every_field_has_a_user() -> None:
    """A config, or a cell of a study; a field that nobody needs is a constant."""
    used = {key for path in CONFIGS for key in given(path)}
    for run in (run for path in STUDIES for run in runs_of(read_study(path), Path("study"))):
        used |= changed_fields(run.config).keys()
    assert settings().keys() - used == WITHOUT_USER.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_value_has_its_source(path: Path) -> None:
    for key in given(path):
        assert key.split(".")[1] in NAMES or source_of(path, key), f"{key}: write behind it where its value is from"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_value_is_the_default_without_need(path: Path) -> None:
    """A default may change with the miniature. What a paper or a stock pipeline sets for a real editor is therefore
    said, default or not; what is ours is said only where it differs.
    """
    changed = changed_fields(from_yaml(path))
    for key in given(path):
        if key in changed or key.split(".")[1] in NAMES:
            continue
        assert not path.name.startswith(("mini", "profile")), f"{key} is the default: leave it out"
        assert not re.match(r"ours|memory", source_of(path, key)), f"{key} is the default, and ours: leave it out"


@pytest.mark.parametrize("path", [*CONFIGS, *STUDIES], ids=lambda path: path.stem)
def test_it_says_how_it_is_started(path: Path) -> None:
    assert re.search(rf"^# .*\bmteditflow\S* .*configs/{path.name}", path.read_text(), re.MULTILINE)


def test_every_family_has_one() -> None:
    names = {MODELS[from_yaml(path).model.path].pipeline for path in MODEL_CONFIGS}
    assert {family_of(name) for name in names} == {*FAMILIES}
    assert {from_yaml(path).objective.name for path in MODEL_CONFIGS} == {"grpo", "nft"}


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=lambda path: path.stem)
def test_its_name_is_what_it_is(path: Path) -> None:
    """The file's name says model, objective, and GPUs or the size of the one; the first ratio is 1."""
    config = from_yaml(path)
    end = (
        f"{config.run.num_gpus}gpu" if path.stem.endswith("gpu") else f"{math.ceil(config.run.gpu_gib / 8) * 8}gb"
    )  # cards come in 8
    assert path.stem == f"{path.stem.rsplit('_', 2)[0]}_{config.objective.name}_{end}"
    assert path.stem.endswith("gpu") or config.run.num_gpus == 1
    assert config.run.folder == f"runs/{path.stem}"
    assert config.rollout.microbatch_size == config.optimizer.microbatch_size
    assert config.rollout.num_tasks % config.run.num_gpus == 0 and config.lora.targets == ()


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=lambda path: path.stem)
def test_it_fits(path: Path) -> None:
    config = from_yaml(path)
    plan = dry_run(config)
    assert plan.problem is None and "the model is not on this machine" in plan.table
    total = float(re.findall(r"sum +([\d.]+)", plan.table)[0])
    assert MARGIN in plan.table and 0.5 * config.run.gpu_gib < total <= config.run.gpu_gib
    assert read_sizes(config).num_trained > 1e7


def test_what_does_not_fit_names_the_levers() -> None:
    config = from_yaml(FOLDER / "kontext_grpo_1gpu.yaml")
    problem = dry_run(replace(config, optimizer=replace(config.optimizer, microbatch_size=16))).problem
    assert problem is not None and "lower optimizer.microbatch_size or set model.is_checkpointed true" in problem
    assert "serve the judge elsewhere and set reward.url" in problem
    assert "distributed.shard" not in problem
    config = from_yaml(FOLDER / "flux2_dev_80gb_grpo_8gpu.yaml")
    problem = dry_run(replace(config, distributed=DistributedConfig())).problem
    assert problem is not None and "set distributed.shard full, or take model.base" in problem
    with pytest.raises(
        ValueError, match=r"distributed\.shard is 'full': cuts .* run\.num_gpus is 1: take none, or more"
    ):
        dry_run(replace(config, run=replace(config.run, num_gpus=1)))
    with pytest.raises(ValueError, match=r"rollout\.num_tasks is 16: .* 256 trajectories must be a multiple of the 24"):
        dry_run(replace(config, run=replace(config.run, num_gpus=24)))


def test_how_long_a_rank_may_wait() -> None:
    """A checkpoint takes longer to write than ranks wait for it."""
    config = from_yaml(FOLDER / "kontext_grpo_8gpu.yaml")
    table = dry_run(config).table
    assert "a checkpoint, by the main rank" in table and "distributed.timeout_s" in table
    large = replace(
        config,
        reward=replace(config.reward, judge="vlm", max_wait_s=20),
        lora=replace(config.lora, rank=256),
        run=replace(config.run, gpu_gib=139),
    )
    problem = dry_run(replace(large, distributed=DistributedConfig(timeout_s=30))).problem
    seconds = 4 * 4 * read_sizes(large).num_trained / 0.2e9  # current, ema and two moments, float32
    assert problem is not None and problem.endswith("for one (a checkpoint, by the main rank): raise it")
    assert problem.startswith(f"distributed.timeout_s is 30: ranks may wait {seconds:.0f} s")


def test_the_study_of_methods() -> None:
    """Every cell of a comparison has its reference's objective and judge, and every K is judged at five turns."""
    for comparison in read_study(FOLDER / "study_methods.yaml"):
        configs = [cell.config for cell in comparison.cells.values()]
        assert len({(config.objective.name, config.reward.judge) for config in configs}) == 1
        assert {config.num_held_out_turns for config in configs} == {5}
