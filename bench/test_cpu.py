"""The miniature on a CPU: a rollout and an update of 16 rows and 8 SDE steps, beside the stock pipeline, another tree
of this program, and a busy process. `pytest bench/test_cpu.py`; `BASELINE=PATH` names the other tree, a git worktree.

Each side is a process of its own and they are asked in turn, so that a change of clock or load meets all of them; what
is compared is their seconds of processor time, by the median of the rounds' ratios; on a machine with other work the
fastest rounds, whose ratio stands beside it, say more. Beside a busy process it is wall
time on all cores. Nothing is asserted of times.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
ROUNDS = 8
THIS, COMPILED, BASELINE = "this tree", "this tree, compiled blocks", "baseline"
STOCK = "stock pipeline, no LoRA, noise or log-prob"


class Worker:
    """A process that rolls out and updates with one tree of the program, as it is told."""

    def __init__(self, tree: Path, environment: Mapping[str, str]) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_"))}
        paths = os.pathsep.join([str(tree), str(tree / "kernels")])
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree,
            env=clean | dict(environment) | {"PYTHONPATH": paths},
        )  # fmt: skip

    def __call__(self, task: str) -> dict[str, Any]:
        """Do a task, 'rollout', 'update' or 'stock': its wall and processor seconds, and a hash of what was made."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{task}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@contextmanager
def workers(trees: Mapping[str, Path], environment: Mapping[str, str]) -> Iterator[dict[str, Worker]]:
    """One worker for each tree, warmed up."""
    modes = {name: {"BLOCKS": "blocks"} if name == COMPILED else {} for name in trees}
    started = {name: Worker(tree, {**environment, **modes[name]}) for name, tree in trees.items()}
    try:
        for worker in started.values():
            worker("rollout")
            worker("update")
        yield started
    finally:
        for worker in started.values():
            worker.close()


def compare(baseline: Path | None, rounds: int) -> dict[str, Any]:
    """Processor seconds by side and task, and whether both trees roll out the same bits; one thread each."""
    trees = {THIS: ROOT, COMPILED: ROOT} | ({BASELINE: baseline} if baseline else {})
    with workers(trees, {"OMP_NUM_THREADS": "1"}) as sides:
        sides[THIS]("stock")
        cases = [(name, task) for task in ("rollout", "update") for name in sides]
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for _ in range(rounds):
            for name, task in cases:
                found.setdefault((name, task), []).append(sides[name](task))
            found.setdefault((STOCK, "rollout"), []).append(sides[THIS]("stock"))
    seconds = {case: [result["processor_s"] for result in results] for case, results in found.items()}
    made = {found[name, "rollout"][0]["sha256"] for name in trees if name != COMPILED}
    return {"seconds": seconds, "has_same_bits": len(made) == 1}


def busy_speed(rounds: int) -> dict[str, float]:
    """Share of the idle speed of a rollout and an update, by wall time on all cores, that is left beside a process that
    keeps a core busy.
    """
    shares: dict[str, list[float]] = {"rollout": [], "update": []}
    with workers({THIS: ROOT}, {}) as sides:
        for _ in range(rounds):
            idle = {task: sides[THIS](task)["wall_s"] for task in shares}
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            try:
                for task, values in shares.items():
                    values.append(idle[task] / sides[THIS](task)["wall_s"])
            finally:
                busy.kill()
                busy.wait()
    return {task: statistics.median(values) for task, values in shares.items()}


def ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(one / other for one, other in zip(seconds, others, strict=True))


def test_rollout_and_update(capsys: pytest.CaptureFixture[str]) -> None:
    baseline = os.environ.get("BASELINE")
    result = compare(Path(baseline) if baseline else None, ROUNDS)
    seconds, against = result["seconds"], BASELINE if baseline else THIS
    lines = [
        f"{task:8} {name:42} {1e3 * statistics.median(values):7.0f} ms   "
        f"{ratio(values, seconds[against, task]):.3f} of {against}, "
        f"fastest {min(values) / min(seconds[against, task]):.3f}"
        for (name, task), values in seconds.items()
    ]
    bits = f"; the same bits as the baseline: {result['has_same_bits']}" if baseline else ""
    with capsys.disabled():
        title = f"16 rows, 8 SDE steps, processor time of one thread, medians of {ROUNDS} rounds"
        print(f"\n{title}, load {os.getloadavg()[0]:.1f}{bits}", *lines, sep="\n")
    assert all(value > 0 for values in seconds.values() for value in values)


def test_beside_a_busy_process(capsys: pytest.CaptureFixture[str]) -> None:
    shares = busy_speed(3)
    with capsys.disabled():
        cores = len(os.sched_getaffinity(0))
        print(f"\nbeside a busy process, {cores} cores, load {os.getloadavg()[0]:.1f} (goal 60 %):", end=" ")
        print(", ".join(f"{task} at {share:.0%} of its speed" for task, share in shares.items()))
    assert set(shares) == {"rollout", "update"}


def serve() -> None:
    """What a worker does: a line on stdin names a task, a line on stdout tells of it. Imports this tree or an older."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    importlib.import_module("mteditflow")  # says how threads wait, before torch is loaded
    tasks, answers = _tasks(), sys.stdout
    for line in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        made = tasks[line.strip()]()
        seconds = {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}
        print(json.dumps(seconds | {"sha256": made}), file=answers, flush=True)


def _tasks() -> dict[str, Callable[[], str]]:
    import hashlib
    import warnings

    import torch
    from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
    from mteditflow_kernels import use_backend

    from mteditflow import config as settings
    from mteditflow.config.model import MINIATURES
    from mteditflow.data import training_tasks
    from mteditflow.distributed import Ranks
    from mteditflow.objective import build_objective
    from mteditflow.policy import build_policy
    from mteditflow.policy.optimizer import build_optimizer
    from mteditflow.rollout import sample_rollout
    from mteditflow.update import update

    use_backend("reference")
    warnings.filterwarnings("ignore", category=FutureWarning)
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    config = settings.Config(  # editor and targets by name: a tree of before has other defaults
        lora=settings.LoraConfig(targets=("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_k_proj", "attn.add_v_proj")),
        model=settings.ModelConfig(path="embedded"), data=settings.DataConfig(num_turns=1),
        rollout=settings.RolloutConfig(num_tasks=4, group_size=4, num_steps=8, window_size=0, microbatch_size=16),
        optimizer=settings.OptimizerConfig(microbatch_size=16, learning_rate=1e-12, weight_decay=0.0),
        objective=settings.ObjectiveConfig(name="grpo"))  # fmt: skip
    if "BLOCKS" in os.environ:
        config = replace(config, model=replace(config.model, compile="blocks"))
    objective = build_objective(config)
    policy = build_policy(config.model, config.lora, 0, has_old=False)
    optimizer, edits = build_optimizer(policy, config), training_tasks(config, 0, ranks)
    advantage, made = (1.0 - 2.0 * (torch.arange(16) % 2))[:, None], list[Any]()

    def rollout() -> str:
        made[:] = [sample_rollout(policy, objective, edits, config, 0)]
        return hashlib.sha256(made[0].turns[0].latents.numpy().tobytes()).hexdigest()

    def train() -> str:
        update(policy, optimizer, objective, made[0], advantage, config, ranks)
        return ""

    pipeline = FluxKontextPipeline.from_pretrained(MINIATURES["embedded"])
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.vae, pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        module.requires_grad_(False).eval()
    prompts = [edit.instructions[0] for edit in edits for _ in range(4)]
    text, pooled, _ = pipeline.encode_prompt(prompts, None, device=ranks.device, max_sequence_length=12)
    images = torch.stack([edit.source for edit in edits for _ in range(4)]) / 2 + 0.5

    def stock() -> str:
        with torch.no_grad():
            pipeline(
                image=images, prompt_embeds=text, pooled_prompt_embeds=pooled, height=64, width=64, max_area=64 * 64,
                _auto_resize=False, guidance_scale=2.5, num_inference_steps=8, output_type="pt",
            )  # fmt: skip
        return ""

    return {"rollout": rollout, "update": train, "stock": stock}


if __name__ == "__main__":
    serve()
