"""Two ranks on two cores beside one rank on one core, the same total batch: `python bench/ranks.py [ROUNDS]`.

The embedded editor's default training. They take turns, so that both have the machine as it is; a round's ratio is that
of the seconds of an iteration (the first, which warms up, and what is saved left out), and the median of the rounds
counts. Goal: 1.6. The machine has to be idle. Ranks take the first two cores that the process may use; where that is
one, both are on it, and the ratio says nothing.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mteditflow.record.metrics import read_lines

NUM_ITERATIONS, GOAL, SAVING = 4, 1.6, "time/save_s"
SETTINGS = {
    "evaluation.num_sessions": 2, "evaluation.num_sessions_short": 2, "evaluation.num_strips": 1, "evaluation.every": 0,
    "evaluation.num_steps": 1, "run.num_iterations": NUM_ITERATIONS, "run.num_judged": 0, "model.compile": "off",
}  # fmt: skip
RANK = (  # a rank keeps to a core of its own
    "import os, sys; cores = sorted(os.sched_getaffinity(0)); "
    "os.sched_setaffinity(0, [cores[int(os.environ.get('LOCAL_RANK', 0)) % len(cores)]]); "
    "from mteditflow.config.command import main; sys.exit(main(['train', *sys.argv[1:]]))"
)


def seconds_of(num_ranks: int, folder: Path, words: list[str]) -> float:
    """Train, and return the median seconds of an iteration."""
    script = folder / "rank.py"
    script.write_text(RANK)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    run = folder / f"{num_ranks}-ranks"
    overrides = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    program = [sys.executable, *(torchrun if num_ranks > 1 else []), str(script)]
    command = [*program, *overrides, "--run.folder", str(run), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    iterations = [
        sum(value for name, value in line.items() if name.startswith("time/") and name != SAVING)
        for line in read_lines(run / "metrics.jsonl")
    ]
    return statistics.median(iterations[1:])


def main(num_rounds: int, words: list[str]) -> None:
    """Print each round, and the median ratio. words: further overrides, such as a smaller batch."""
    ratios = []
    for number in range(num_rounds):
        with tempfile.TemporaryDirectory() as folder:
            one, two = (seconds_of(num_ranks, Path(folder), words) for num_ranks in (1, 2))
        ratios.append(one / two)
        print(f"round {number + 1}: {one:.2f} s on one rank, {two:.2f} s on two, ratio {ratios[-1]:.2f}", flush=True)
    print(f"median {statistics.median(ratios):.2f}, goal {GOAL}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, sys.argv[2:])
