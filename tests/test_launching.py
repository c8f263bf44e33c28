"""The commands of docs/scaling.md, as they stand there but for the number of GPUs, host, port and config: one node, two
nodes and SLURM train, two torchrun agents on this machine for two nodes, and get the figures of one rank.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from train_runs import Arguments, metrics

from mteditflow.plan import scaling

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
STUBS = {  # what a cluster has; srun starts a task on each node
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    "srun": '"$@" & first=$!; "$@" & wait $first && wait $!',
    "scontrol": 'test "$1 $2 $3" = "show hostnames nodes[0-1]" && printf "localhost\\nlocalhost\\n"',
}
PATIENCE = 300  # seconds after which a launch counts as hung


def commands() -> list[str]:
    """The page's commands that start a training: one node, two nodes, SLURM."""
    return [text for _, text in re.findall(r"```(bash|slurm)\n(.*?)```", PAGE.read_text(), re.S)]


def test_the_tables_are_those_that_the_module_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PAGE.parent.parent)
    assert scaling.page() in PAGE.read_text()


@pytest.fixture(scope="module")
def start(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Start a command of the page on so many nodes, and return the metrics of its run."""
    folder = tmp_path_factory.mktemp("launching")
    for name, text in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    cluster = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "nodes[0-1]"}
    environment = os.environ | cluster | {"PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(name: str, command: str, num_nodes: int) -> list[dict[str, Any]]:
        words = arguments(folder / name, run__num_iterations=2, evaluation__every=0, optimizer__num_updates=1)
        tree: dict[str, dict[str, Any]] = {}
        for key, value in zip(words[::2], words[1::2], strict=True):
            section, field = key.removeprefix("--").split(".")
            tree.setdefault(section, {})[field] = yaml.safe_load(value)
        tree["optimizer"]["learning_rate"] = 1e-3
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        changes = {"--nproc-per-node 8": "--nproc-per-node 1", "node0": "localhost", "29500": port, "=eth0": "=lo"}
        changes["configs/kontext_grpo_8gpu.yaml"] = str(folder / f"{name}.yaml")
        for old, new in changes.items():
            command = command.replace(old, new)
        script = folder / f"{name}.sh"
        script.write_text(command)
        agents = [
            subprocess.Popen(["bash", str(script)], env=environment, stderr=subprocess.PIPE, text=True)
            for _ in range(num_nodes)
        ]
        for agent in agents:
            _, said = agent.communicate(timeout=PATIENCE)
            assert agent.returncode == 0, said
        return metrics(folder / name)

    return run


def test_one_node_two_nodes_and_slurm(start: Any) -> None:
    one_node, two_nodes, slurm = commands()
    assert all("-m mteditflow.train --config configs/kontext_grpo_8gpu.yaml" in text for text in commands())
    one = start("one", one_node, 1)
    assert len(one) == 2 and one[0]["update/grad_norm"] > 0
    for name, command, num_agents in (("two", two_nodes, 2), ("slurm", slurm, 1)):
        found = start(name, command, num_agents)
        assert len(found) == 2 and found[0].keys() == one[0].keys()
        for key in ("reward/mean", "update/loss", "update/grad_norm", "update/num_transitions"):
            assert found[0][key] == pytest.approx(one[0][key], rel=1e-5), (name, key)
