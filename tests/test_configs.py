"""The configs of the published models: every number has its source, and every run fits where it is meant to."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mteditflow.config.cli import from_yaml, settings
from mteditflow.plan.dry_run import dry_run
from mteditflow.plan.memory import read_sizes
from mteditflow.policy import FAMILIES, family_of
from mteditflow.policy.published import MODELS

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(path for path in FOLDER.glob("*.yaml") if not path.name.startswith(("mini", "profile", "study")))
OWN = ("folder", "name", "num_gpus")  # say what they are by themselves


def test_every_family_has_one() -> None:
    families = [family_of(MODELS[from_yaml(path).model.path].pipeline) for path in FILES]
    assert all(family in families for family in FAMILIES) and None not in families
    assert {from_yaml(path).objective.name for path in FILES} == {"grpo", "nft"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_value_has_its_source(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line.startswith("  ")]
    assert len(lines) > 20
    for line in lines:
        name = line.split(":")[0].strip()
        assert name in OWN or re.search(r"  # \S+", line), line


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_says_only_what_it_means(path: Path) -> None:
    """Fields are known; the file's name says model, objective and GPUs; the first ratio is 1."""
    given = {f"{section}.{name}" for section, fields in yaml.safe_load(path.read_text()).items() for name in fields}
    assert given <= settings().keys()
    config = from_yaml(path)
    assert path.stem == f"{path.stem.rsplit('_', 2)[0]}_{config.objective.name}_{config.run.num_gpus}gpu"
    assert config.run.folder == f"runs/{path.stem}" and path.name in path.read_text().splitlines()[2]
    assert config.rollout.microbatch_size == config.optimizer.microbatch_size
    assert config.rollout.num_tasks % config.run.num_gpus == 0 and config.lora.targets == ()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_fits(path: Path) -> None:
    config = from_yaml(path)
    plan = dry_run(config)
    assert plan.problem is None and "the model is not on this machine" in plan.table
    total = float(re.findall(r"sum +([\d.]+)", plan.table)[0])
    assert 0.5 * config.run.gpu_gib < total < 0.95 * config.run.gpu_gib
    assert read_sizes(config).num_trained > 1e7


def test_what_does_not_fit_names_the_levers() -> None:
    config = from_yaml(FOLDER / "kontext_grpo_1gpu.yaml")
    problem = dry_run(replace(config, optimizer=replace(config.optimizer, microbatch_size=16))).problem
    assert problem is not None and "lower optimizer.microbatch_size or set model.is_checkpointed true" in problem
    assert "serve the judge elsewhere and set reward.url" in problem
