"""How a run waits and how many threads it takes: a user's own setting first."""

import os
import subprocess
import sys

import pytest
import torch

from mteditflow.policy.pipelines import is_slow_in_bfloat16

CODE = """
import mteditflow, os, torch
from mteditflow import config, distributed
distributed.start(config.Config())
print(os.environ["OMP_WAIT_POLICY"], torch.get_num_threads())
"""


def run(**settings: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=clean | settings
    )
    return done.stdout.split()


@pytest.mark.parametrize("policy", ["ACTIVE", ""])
def test_threads_wait_passively_unless_a_user_says_otherwise(policy: str) -> None:
    settings = {"OMP_WAIT_POLICY": policy} if policy else {}
    assert run(**settings)[0] == (policy or "PASSIVE")


def test_one_thread_that_a_user_asks_for_is_one() -> None:
    """Also where torchrun started the process alone."""
    assert run(OMP_NUM_THREADS="1", LOCAL_WORLD_SIZE="1")[1] == "1"


def test_a_processor_that_is_slow_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, is_slow in (("AVX2", True), ("AVX512", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert is_slow_in_bfloat16(torch.device("cpu")) == is_slow
        assert not is_slow_in_bfloat16(torch.device("cuda", 0))
