"""Whole runs with a tiny editor: the folder, kills and resumes, two ranks."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from timed import is_timed
from train_runs import NUM_ITERATIONS, Arguments, lora, metrics, refused

from mteditflow.config import cli
from mteditflow.config.command import train as main
from mteditflow.data import held_out_tasks
from mteditflow.objective.grpo import Grpo
from mteditflow.profile.account import metric
from mteditflow.record import checkpoint, ending
from mteditflow.record.alarms import ALARMS
from mteditflow.record.clock import OTHER, PHASES
from mteditflow.record.drift import KINDS
from mteditflow.watch.pace import CORE_WAIT, core_wait_seconds

PATIENCE = 120  # seconds for another process
RUN = "import sys, torch; torch.set_num_threads(1); from mteditflow.config.command import train; train(sys.argv[1:])"
SCORE_KEYS = {
    *("mean", "std", "instruction", "consistency", "valid_share", "zero_spread_share"),
    *(f"{name}_{turn}" for name in ("turn", "success") for turn in (1, 2)),
}
HELD_OUT_KEYS = {f"heldout/{name}_{turn}" for name in ("MT", "IF", "CC", "O") for turn in (1, 2)}
HELD_OUT_KEYS |= {"alarm/held_out_gap"}
RATES = ("tflop_per_second", "ceiling_share")


@pytest.fixture(scope="module")
def whole(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main(arguments(folder))
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    """The same metrics, adapter, figures, and sessions as the judge saw them, bit for bit."""
    assert metrics(folder) == metrics(whole)
    judged, seen = ({path.name: path.read_bytes() for path in (run / "judge").iterdir()} for run in (folder, whole))
    assert judged == seen
    own, expected = lora(folder), lora(whole)
    assert own.keys() == expected.keys() and all(torch.equal(own[key], expected[key]) for key in own)
    for name in ("evaluation_before", "evaluation_after", "comparison"):
        assert (folder / f"{name}.json").read_text() == (whole / f"{name}.json").read_text()
    newest = f"checkpoints/iteration-{NUM_ITERATIONS:06d}"
    for name in ("current", "ema", "optimizer"):
        path = f"{newest}/{name}.safetensors"
        assert (folder / path).read_bytes() == (whole / path).read_bytes()


def test_a_run_is_a_folder(whole: Path) -> None:
    for name in ("config.yaml", "report.html", "comparison.json", "evaluation_before.json", "evaluation_after.json"):
        assert (whole / name).stat().st_size > 0
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["iteration-000003", "iteration-000004"]
    names = [f"iteration-{n:06d}.png" for n in (0, 3, 4)]
    assert sorted(path.name for path in (whole / "strips").iterdir()) == names
    assert list((whole / "tensorboard").glob("events.*"))
    assert cli.from_yaml(whole / "config.yaml").run.num_iterations == NUM_ITERATIONS


def test_metrics_have_a_line_per_iteration(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    promised = {"iteration"} | {f"update/{name}" for name in ("learning_rate", "num_transitions", "loss", "grad_norm")}
    promised |= {f"reward/{name}" for name in SCORE_KEYS}
    promised |= {f"update/{name}" for name in (*Grpo.figures, *Grpo.worst_figures)}
    promised |= ALARMS.keys() - {"alarm/held_out_gap"}
    promised |= {f"drift/{kind}{size}_{turn}" for kind in KINDS for size in ("", "_size") for turn in (1, 2)}
    promised |= {f"drift/credit_{turn}" for turn in (1, 2)}
    timed = {metric("time", phase) for phase in (*PHASES, OTHER)} | {"memory/rss_gib"}
    timed |= {f"speed/{name}_images_per_second" for name in ("turn", "rollout")} | {"speed/ceiling_tflop_per_second"}
    timed |= {f"speed/{name}_{what}" for name in ("denoise", "training") for what in RATES} | {"beside/score_s"}
    timed |= {f"reward/{name}" for name in ("exposed_s", "judge_s", "overlap_efficiency")}
    timed |= {CORE_WAIT} if core_wait_seconds() is not None else set()
    tasks = held_out_tasks(cli.from_yaml(whole / "config.yaml"))[:2]  # of the short evaluation
    held_out = HELD_OUT_KEYS | {f"heldout/success_{kind}" for task in tasks for kind in task.edit_types}
    for n, line in enumerate(lines):
        assert {key for key in line if not is_timed(key)} == promised | (held_out if n == 2 else set())
        assert {key for key in line if is_timed(key)} == timed  # no GPU: nothing of one
        assert all(isinstance(value, int | float) for value in line.values())
        assert line["update/first_ratio_error"] == 0 and line["update/grad_norm"] > 0
        assert 0 < line["update/num_transitions"] <= 4 * 2 * 3  # denoising steps of the turns whose group has spread
        assert (line["time/evaluate_s"] > 0) == (n == 2)
        assert line["reward/valid_share"] == 1 and 0 <= line["reward/consistency"] <= 1
    rates = [line["update/learning_rate"] for line in lines]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3], rel=1e-12)
    assert [line["time/save_s"] > 0 for line in lines] == [False, True, True, True]  # after the line is written


def test_the_same_command_again_gives_the_same_bits(arguments: Arguments, whole: Path, tmp_path: Path) -> None:
    main(arguments(tmp_path))
    assert_same_run(tmp_path, whole)
    main(arguments(tmp_path))  # finished: evaluated and exported once more, nothing trained
    assert_same_run(tmp_path, whole)
    main(arguments(tmp_path / "other", run__seed=1, run__num_iterations=1, evaluation__every=0))
    assert metrics(tmp_path / "other")[0] != metrics(whole)[0]


def test_the_default_backend_of_a_cpu_has_the_bits_of_the_reference(
    arguments: Arguments, whole: Path, tmp_path: Path
) -> None:
    """Whatever the size of a wave, and whether it is scored beside the next."""
    main(arguments(tmp_path, run__backend="reference", rollout__wave_size=4, reward__overlap="off"))
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("when", ["after iteration 2", "at a random time"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    arguments: Arguments, whole: Path, tmp_path: Path, when: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    file, deadline = tmp_path / "metrics.jsonl", time.monotonic() + PATIENCE
    num_lines = 2 if when == "after iteration 2" else 0
    while not file.exists() or file.read_bytes().count(b"\n") < num_lines:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    if when == "at a random time":
        delay = random.SystemRandom().uniform(0, 1.5)
        print(f"killed {delay} s after the start of the reporter")
        time.sleep(delay)
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)  # 0: the random time was after the end
    main(arguments(tmp_path))
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("where", "number", "num_done"),
    [
        ("mteditflow.rollout.denoise", signal.SIGUSR1, 1),  # in the second iteration, as the next
        ("mteditflow.update.step", signal.SIGTERM, 1),  # between two updates: weights are no iteration's
        ("mteditflow.run.evaluate_editor", signal.SIGINT, 2),  # of the third iteration
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_signal_stops_at_the_next_microbatch_and_the_rest_goes_on(
    arguments: Arguments,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    where: str,
    number: signal.Signals,
    num_done: int,
) -> None:
    """With the last finished iteration saved, though run.save_every is never reached."""
    room, name = where.rsplit(".", 1)
    function = getattr(sys.modules[room], name)

    def ask_and_go_on(*args: Any, **named: Any) -> Any:
        file, is_training = (
            tmp_path / "metrics.jsonl",
            room != "mteditflow.rollout" or args[0].adapters.selected != "off",
        )
        if is_training and file.exists() and file.read_bytes().count(b"\n") == num_done:
            assert not calls, "the next is begun"
            calls.append(os.kill(os.getpid(), number))
        return function(*args, **named)

    calls: list[None] = []
    before = [signal.getsignal(number) for number in ending.SIGNALS]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(where, ask_and_go_on)
        main(arguments(tmp_path, run__save_every=100))
    assert caught.value.code == 128 + number and len(calls) == 1
    assert [signal.getsignal(number) for number in ending.SIGNALS] == before
    line = f"mteditflow: stopped by {number.name}; the same command goes on after iteration {num_done}\n"
    assert capfd.readouterr().err.endswith(f"\n{line}")
    assert [line["iteration"] for line in metrics(tmp_path)] == [*range(num_done)] and not (tmp_path / "lora").exists()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"iteration-{num_done:06d}"]
    main(arguments(tmp_path))
    assert_same_run(tmp_path, whole)


def test_a_second_run_in_the_folder_is_refused(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with checkpoint.lock(tmp_path):
        line = refused(capsys, arguments(tmp_path))
    assert "another run is at work there" in line and str(os.getpid()) in line
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_another_problem_is_refused_and_the_folder_let_go(
    arguments: Arguments, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    files = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and path.name != "lock"}
    line = refused(capsys, arguments(whole, lora__rank=4))
    assert "lora.rank: was 2, is 4" in line and "lora.alpha" not in line
    assert {path: path.read_bytes() for path in files} == files
    assert signal.getsignal(signal.SIGTERM) is before
    with checkpoint.lock(whole):  # free again, in the same process
        pass


def test_nft_runs_and_resumes(arguments: Arguments, tmp_path: Path) -> None:
    nft = {"objective__name": "nft", "optimizer__schedule": "constant", "evaluation__every": 0}
    main(arguments(tmp_path / "whole", run__num_iterations=3, **nft))
    main(arguments(tmp_path / "parts", run__num_iterations=1, **nft))
    main(arguments(tmp_path / "parts", run__num_iterations=3, **nft))
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    own, expected = lora(tmp_path / "parts"), lora(tmp_path / "whole")
    assert all(torch.equal(own[key], expected[key]) for key in expected)
    state = safetensors.torch.load_file(tmp_path / "parts/checkpoints/iteration-000003/old.safetensors")
    current = safetensors.torch.load_file(tmp_path / "parts/checkpoints/iteration-000003/current.safetensors")
    assert all(torch.equal(state[key], current[key]) for key in current)  # on_policy: old is the newest


def test_another_evaluation_on_resume_is_made_for_both(arguments: Arguments, tmp_path: Path) -> None:
    main(arguments(tmp_path, run__num_iterations=1, evaluation__every=0))
    other = {"evaluation__num_steps": 3, "evaluation__num_strips": 2}
    main(arguments(tmp_path, run__num_iterations=1, evaluation__every=0, **other))
    main(arguments(tmp_path / "fresh", run__num_iterations=1, evaluation__every=0, **other))
    for name in ("evaluation_before", "evaluation_after", "comparison"):
        assert (tmp_path / f"{name}.json").read_text() == (tmp_path / "fresh" / f"{name}.json").read_text()


def test_the_adapter_loads_in_the_stock_pipeline(whole: Path, tiny_pipeline_folder: Path) -> None:
    pipeline: Any = FluxKontextPipeline.from_pretrained(tiny_pipeline_folder)
    pipeline.load_lora_weights(whole / "lora")
    loaded = next(iter(pipeline.transformer.peft_config.values()))
    assert (loaded.r, loaded.lora_alpha) == (2, 4)
    assert "held-out sessions, percent" in (whole / "lora" / "README.md").read_text()
    assert (whole / "lora" / "strips.png").stat().st_size > 0
    (adapter,) = pipeline.transformer.peft_config
    saved = safetensors.torch.load_file(whole / "checkpoints/iteration-000004/ema.safetensors")
    weights = dict(pipeline.transformer.named_parameters())
    for key, weight in saved.items():
        assert torch.equal(weights[key.replace(".weight", f".{adapter}.weight")], weight)
    assert max(weight.abs().max().item() for key, weight in saved.items() if "lora_B" in key) > 1e-5
