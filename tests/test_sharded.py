"""FSDP2: a transformer that is cut over ranks computes what a whole one does, to the bit; sharded_checks.py has the
checks, which run once for all tests here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_checks
import torch

from mteditflow.config import Config, RolloutConfig
from mteditflow.config.distributed import DistributedConfig
from mteditflow.distributed import Ranks
from mteditflow.transformer.sharded import make_mesh

PATIENCE = 900  # seconds, after which ranks that wait for each other count as hung


@pytest.fixture(scope="module")
def results(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where each check has left what it raised."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "kontext").symlink_to(tiny_pipeline_folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, sharded_checks.__file__, str(folder)], capture_output=True, text=True, timeout=PATIENCE,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("name", "world_size"),
    [(name, world_size) for world_size, checks in sharded_checks.PHASES for name in checks],
)
def test_ranks(results: Path, name: str, world_size: int) -> None:
    assert (results / f"{name}-{world_size}.txt").read_text() == ""


def test_a_node_of_one_rank_has_nobody_to_share_with(monkeypatch: pytest.MonkeyPatch) -> None:
    config, ranks = DistributedConfig(shard="hybrid"), Ranks(rank=0, world_size=4, device=torch.device("cpu"))
    for node in (1, 3):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
        with pytest.raises(ValueError, match=rf"distributed.shard is 'hybrid': cuts over the {node} ranks of a node"):
            make_mesh(config, ranks)


def test_no_graph_is_captured_of_what_is_gathered() -> None:
    with pytest.raises(ValueError, match=r"rollout.cuda_graph is 'on': distributed.shard gathers weights"):
        Config(distributed=DistributedConfig(shard="full"), rollout=RolloutConfig(cuda_graph="on"))
