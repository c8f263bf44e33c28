"""The plan's traffic against the bytes that collectives of an iteration were given, on two and four ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from traffic_ranks import CASES, config_of

from mteditflow.plan import sharding
from mteditflow.plan.memory import read_sizes
from mteditflow.plan.traffic import traffic

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what every case sent."""
    folder = tmp_path_factory.mktemp("traffic")
    (folder / "kontext").symlink_to(tiny_pipeline_folder)
    script = [sys.executable, str(TESTS / "traffic_ranks.py"), str(folder)]
    subprocess.run(script, check=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    return folder


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_that_are_sent(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "GPUS_PER_NODE", 2)  # as traffic_ranks.py has it
    problem = (folder / f"{case}-{CASES[case][0]}.txt").read_text()
    assert problem == ""
    found, config = json.loads((folder / f"{case}.json").read_text()), config_of(folder, case)
    planned = traffic(config, read_sizes(config))
    for kind, num_bytes in found["bytes"].items():
        if kind == "figures":
            assert num_bytes < 1000
            continue
        of_kind = [part for part in planned if part.kind == kind]
        assert sum(part.count * part.num_bytes for part in of_kind) == pytest.approx(num_bytes, abs=0.5)
        assert sum(part.count for part in of_kind) == found["calls"][kind]
