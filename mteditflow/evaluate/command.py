"""EdiVal metrics of runs, LoRAs and the base on the same held-out sessions. `python -m mteditflow.evaluate`

    python -m mteditflow.evaluate base runs/mini path/to/lora --evaluation.num_turns 10 --out runs/comparison

writes, below --out, SUBJECT/metrics.json, SUBJECT/evaluation.safetensors (the verdicts) and SUBJECT/strips.png for each
subject, and comparison.html and comparison.json of all: paired gains over the first. metrics.json is written last: a
subject that has one by the same settings and of the same adapter is finished, and is kept when the command is repeated.

A session of K = 10 turns of the embedded world is another session than that of the same number with K = 3, since what
is drawn for later turns decides which sessions are passed over: their figures at turns 1 to 3 agree in distribution,
not session by session. What is drawn for a turn, noise or edit, never depends on the turns after it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mteditflow.config import cli
from mteditflow.evaluate.held_out import check_held_out, held_out

if TYPE_CHECKING:
    from mteditflow.config import Config
    from mteditflow.evaluate.edival import Evaluation
    from mteditflow.evaluate.lora_files import Subject
    from mteditflow.types import EditTask

PROG = "python -m mteditflow.evaluate"


def resolve(argv: Sequence[str] | None) -> tuple[list["Subject"], Path, "Config"]:
    """Subjects, folder of results and Config of a command line.

    ValueError where a subject is none, and where runs among them disagree on what they are evaluated on.
    """
    namespace = cli.parse_evaluation(argv, prog=PROG)
    from mteditflow.evaluate.lora_files import check_names, is_run, read_subject

    check_names(namespace.subjects)
    runs = [word for word in namespace.subjects if is_run(word)]
    configs = {f"run {word!r}": cli.evaluation_config(argv, prog=PROG, run=Path(word)) for word in runs}
    if configs:
        check_held_out(configs, "set it by an override, for all")
    config = next(iter(configs.values())) if configs else cli.evaluation_config(argv, prog=PROG, run=None)
    if namespace.print_config:
        cli.print_and_stop(config)
    out = Path(namespace.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is '{out}': no folder; choose another")
    return [read_subject(word) for word in namespace.subjects], out, config


def settings_of(config: "Config", *, is_by_truth: bool) -> dict[str, Any]:
    """What an evaluation depends on besides the adapter, as JSON gives it back."""
    reward = {} if is_by_truth else {f"reward.{key}": value for key, value in asdict(config.reward).items()}
    return json.loads(json.dumps(held_out(config) | reward))


def load_finished(folder: Path, subject: "Subject", settings: dict[str, Any]) -> "Evaluation | None":
    """The evaluation of that very adapter by these settings, where the folder has it."""
    from mteditflow.evaluate.edival import load_verdicts
    from mteditflow.report.html import read_json

    report = read_json(folder / "metrics.json")
    is_same = report.get("settings") == settings and report.get("adapter") == subject.fingerprint
    path = folder / "evaluation.safetensors"
    return load_verdicts(path) if is_same and path.is_file() else None


def save_subject(
    folder: Path, subject: "Subject", evaluation: "Evaluation", tasks: list["EditTask"], how: dict[str, Any]
) -> None:
    """The files of a finished subject, metrics.json last."""
    from mteditflow.evaluate.edival import save_json, save_verdicts, strips_of, summary

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)  # of other settings: must not stand beside new verdicts
    save_verdicts(folder / "evaluation.safetensors", evaluation)
    strips_of(tasks, {subject.word: evaluation}, range(evaluation.images.shape[1])).save(folder / "strips.png")
    figures = summary(evaluation)
    exposure = [
        {"turn": turn["turn"], "success": turn["MT"], "interval": turn["MT_interval"]} for turn in figures["turns"]
    ]
    what = {"subject": subject.word, "what": subject.what, "adapter": subject.fingerprint, "commit": cli.commit()}
    save_json(folder / "metrics.json", what | how | figures | {"exposure_bias": exposure})


def evaluate_all(subjects: list["Subject"], out: Path, config: "Config") -> Path:
    """Evaluate what is not finished yet, show the table, and write the page. Returns the page's path."""
    from mteditflow_kernels import use_backend
    from rich.console import Console

    from mteditflow.data import check_data, held_out_tasks
    from mteditflow.evaluate.edival import evaluate, has_truth
    from mteditflow.evaluate.lora_files import check_fit, common_lora, state_of
    from mteditflow.policy import build_policy, linear_shapes
    from mteditflow.reward import build_reward, check_judge

    check_judge(config)
    check_data(config, is_speaking=True)
    use_backend(config.run.backend)
    tasks = held_out_tasks(config)
    is_by_truth = has_truth(tasks)
    settings = settings_of(config, is_by_truth=is_by_truth)
    how = {"settings": settings, "judge": "the exact verifier" if is_by_truth else f"judge {config.reward.judge!r}"}
    found = {subject.word: load_finished(out / subject.slug, subject, settings) for subject in subjects}
    pending = [subject for subject in subjects if found[subject.word] is None]
    console = Console()
    console.print(f"{len(subjects) - len(pending)} of {len(subjects)} evaluated already", highlight=False)
    if pending:
        shapes = linear_shapes(config.model)
        for subject in subjects:
            check_fit(subject, shapes, config.model.path)
        wide = common_lora(subjects, config)
        policy = build_policy(config.model, wide, config.run.seed, has_old=False)
        reward = None if is_by_truth else build_reward(replace(config, reward=replace(config.reward, also=())))
        for subject in pending:
            line = f"evaluating {subject.word}: {subject.what}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
            if subject.lora:
                policy.adapters.load("ema", state_of(subject.lora, wide, policy.adapters.state("ema")))
            evaluation = evaluate(policy, tasks, config, "ema" if subject.lora else "off", reward)
            save_subject(out / subject.slug, subject, evaluation, tasks, how)
    return _present(subjects, out, tasks, console)


def _present(subjects: list["Subject"], out: Path, tasks: list["EditTask"], console: Any) -> Path:
    """Table, comparison.json and page of finished subjects."""
    from mteditflow.evaluate.comparison import terminal_table, write_comparison
    from mteditflow.evaluate.edival import compare, load_verdicts, save_json, strips_of
    from mteditflow.report.html import read_json

    reports = {subject.word: read_json(out / subject.slug / "metrics.json") for subject in subjects}
    evaluations = {subject.word: load_verdicts(out / subject.slug / "evaluation.safetensors") for subject in subjects}
    (first, before), *others = evaluations.items()
    gains = {word: compare(before, after) for word, after in others}
    save_json(out / "comparison.json", {"over": first, "gains": gains})
    strips = [strips_of(tasks, evaluations, [session]) for session in range(before.images.shape[1])]
    page = write_comparison(out, reports, gains, strips)
    console.print(terminal_table(reports, gains))
    console.print(f"page: {page}", soft_wrap=True, highlight=False)
    return page


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 and one line on stderr for a wrong argument, subject or file."""
    try:
        evaluate_all(*resolve(argv))
    except ValueError as error:
        cli.fail(error)
