"""EdiVal metrics of runs, LoRAs and the base on the same held-out sessions. `python -m mteditflow.evaluate`

    python -m mteditflow.evaluate base runs/mini path/to/lora --evaluation.num_turns 10 --out runs/comparison

writes, below --out, SUBJECT/metrics.json, SUBJECT/evaluation.safetensors (the verdicts) and SUBJECT/strips.png for each
subject, and comparison.html and comparison.json of all: paired gains over the first. metrics.json is written last: a
subject that has one by the same settings and of the same adapter is finished, and is kept when the command is repeated.
Under torchrun every rank takes its share of the sessions; what a killed command has evaluated of a subject is kept too.

A session of K = 10 turns of the embedded world is another session than that of the same number with K = 3, since what
is drawn for later turns decides which sessions are passed over: their figures at turns 1 to 3 agree in distribution,
not session by session. What is drawn for a turn, noise or edit, never depends on the turns after it.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mteditflow_kernels import use_backend
from rich.console import Console
from safetensors import SafetensorError

from mteditflow.config import Config
from mteditflow.config.rubric import check_rubric
from mteditflow.config.version import git_commit
from mteditflow.data import check_data, held_out_tasks
from mteditflow.distributed import Ranks
from mteditflow.evaluate.comparison_page import terminal_table, write_comparison
from mteditflow.evaluate.edival import Evaluation, compare, session_scores, summary
from mteditflow.evaluate.exposure import evaluate_editor, num_sessions
from mteditflow.evaluate.held_out import (
    check_held_out,
    evaluate,
    has_truth,
    list_settings,
    load_verdicts,
    part_folder,
    save_verdicts,
)
from mteditflow.evaluate.kept import kept_evaluation, name_contents, problem_of
from mteditflow.evaluate.lora_files import (
    Subject,
    check_fit,
    check_names,
    common_lora,
    is_run,
    read_subject,
)
from mteditflow.evaluate.parts import PartFolder
from mteditflow.objective import build_objective
from mteditflow.policy import (
    AdapterName,
    Policy,
    build_policy,
    check_references,
    configured_family,
    linear_shapes,
    start_adapter,
)
from mteditflow.policy.lora_file import padded_state
from mteditflow.record.figures import read_figures
from mteditflow.record.files import check_folder, read_json, write_json
from mteditflow.report.seen import MAX_JUDGED, Seen, choose_changed, save_compared
from mteditflow.report.strips import draw_sessions
from mteditflow.reward import build_reward, check_judge
from mteditflow.reward.overlap import Overlap
from mteditflow.transformer.sharded import make_mesh
from mteditflow.types import EditTask
from mteditflow.watch.boards import check_boards
from mteditflow.watch.progress import show_sessions, start_bars

EXPOSURE = ("MT_true", "MT_true_interval", "compounding", "compounding_interval")


def resolve(words: list[str], out: Path, read_config: Callable[[Path | None], Config]) -> tuple[list[Subject], Config]:
    """Return the subjects that `words` name, and their Config; `read_config` gives that of a run's folder, or of none.

    ValueError where a subject is none, and where runs among them disagree on what they are evaluated on.
    """
    check_names(words)
    configs = {f"run {word!r}": read_config(Path(word)) for word in words if is_run(word)}
    if configs:
        check_held_out(configs, "set it by an override, for all")
    config = next(iter(configs.values())) if configs else read_config(None)
    check_folder(out, "--out")
    return [read_subject(word, config.model) for word in words], config


def check(config: Config, *, is_main: bool, is_training: bool) -> None:
    """Raise ValueError for what is wrong with a run, or an evaluation, and can be known before ranks join and anything
    is loaded; the main rank names what of the data is skipped.
    """
    check_judge(config)
    check_rubric(config)
    if is_training:
        build_objective(config)
    if is_training and is_main:
        check_boards(config.run.log_to)
        check_folder(Path(config.run.folder), "run.folder")
    check_data(config, is_speaking=is_main, is_training=is_training)
    configured_family(config.model)
    check_references(config)


def evaluate_all(subjects: list[Subject], out: Path, config: Config, ranks: Ranks) -> None:
    """Evaluate what is not finished yet, on all ranks; the main rank shows the table, and writes the page."""
    use_backend(config.run.backend)
    tasks, console = held_out_tasks(config), Console(quiet=not ranks.is_main)
    contents = {name: content for name, content in name_contents(config).items() if name != "lora.init_from"}
    how = {
        "settings": list_settings(config, is_by_truth=has_truth(tasks)), "problem": problem_of(tasks, config, contents),
        "judge": "the exact verifier" if has_truth(tasks) else f"the judge {config.reward.judge!r}",
    }  # fmt: skip
    is_done = ranks.from_main([is_finished(out / subject.slug, subject, how) for subject in subjects])
    pending = [subject for subject, done in zip(subjects, is_done, strict=True) if not done]
    console.print(f"{len(subjects) - len(pending)} of {len(subjects)} evaluated already", highlight=False)
    if pending:
        _evaluate_pending(pending, subjects, out, tasks, config, how, console, ranks)
    if ranks.is_main:
        _present(subjects, out, tasks, console)
    ranks.barrier()


def is_finished(folder: Path, subject: Subject, how: dict[str, Any]) -> bool:
    """Whether a folder has, whole, the evaluation of that very adapter by these settings, on this very data."""
    report = read_json(folder / "metrics.json")
    if any(report.get(key) != value for key, value in (how | {"adapter": subject.fingerprint}).items()):
        return False
    try:
        load_verdicts(folder / "evaluation.safetensors")
    except (OSError, SafetensorError):
        return False
    return True


def _evaluate_pending(
    pending: list[Subject], subjects: list[Subject], out: Path, tasks: list[EditTask], config: Config,
    how: dict[str, Any], console: Console, ranks: Ranks,
) -> None:  # fmt: skip
    """Evaluate subjects one after the other, in the adapter that can hold each of `subjects`."""
    is_by_truth, shapes = has_truth(tasks), linear_shapes(config.model)
    for subject in subjects:
        check_fit(subject, shapes, config.model.path)
    wide = common_lora(subjects, config)
    mesh = make_mesh(config.distributed, ranks)
    policy = build_policy(config.model, wide, config.run.seed, has_old=False, mesh=mesh)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    def make(adapter: AdapterName, folder: PartFolder) -> Evaluation:
        with show_sessions(num_sessions(tasks, config), bars, say) as show:
            return evaluate_editor(policy, tasks, config, adapter, ranks, judge, folder=folder, show=show)

    with ExitStack() as stack:
        judge = None
        if not is_by_truth:
            rewards = build_reward(replace(config, reward=replace(config.reward, also=())))
            judge = stack.enter_context(Overlap(rewards, config.reward, ranks.device))
        bars = start_bars() if ranks.is_main else None
        if bars is not None:
            stack.callback(bars.stop)
        for subject in pending:
            folder = out / subject.slug
            what = f"{subject.fingerprint} of {how['problem']}"
            parts = part_folder(folder / "evaluating", policy, tasks, config, what)
            if subject.lora:
                say(f"evaluating {subject.word}: {subject.what}")
                zeros = {key: weight.zero_() for key, weight in policy.adapters.state("ema").items()}
                policy.adapters.load("ema", padded_state(subject.lora, wide, zeros))
                evaluation = make("ema", parts)
            else:
                evaluation = kept_evaluation(policy, tasks, config, ranks, partial(make, "off", parts), say)
            if ranks.is_main:
                save_subject(folder, subject, evaluation, tasks, how)
                parts.remove()


def compare_sessions(
    folder: Path, policy: Policy, tasks: list[EditTask], before: Evaluation, after: Evaluation, config: Config,
    ranks: Ranks, judge: Overlap,
) -> None:  # fmt: skip
    """Keep, in a run's folder, the sessions that are worst after training, or that it changed most, as they were before
    and after. They are made once more, on all ranks: the pictures of all sessions are not kept. One that gets no score
    this time is shown without.
    """
    num = config.run.num_judged
    chosen = ranks.from_main(choose_changed(session_scores(before), session_scores(after), num))
    if not chosen:
        return
    mine = [tasks[place] for place in chosen]
    shown = replace(config, run=replace(config.run, num_judged=MAX_JUDGED))  # all of them

    def see(adapter: AdapterName) -> list[Seen]:
        seen: list[Seen] = []
        evaluate(policy, mine, shown, adapter, ranks, judge, see=seen.extend, is_counted=False)
        return seen

    with start_adapter(policy, config.lora) as adapter:
        seen_before = see(adapter)
    seen_after = see("ema")
    if ranks.is_main:
        by_truth = "exact" if has_truth(mine) else config.reward.judge
        reasons = {tasks[place].id: reason for place, reason in chosen.items()}
        save_compared(folder, by_truth, reasons, seen_before, seen_after)


def save_subject(
    folder: Path, subject: Subject, evaluation: Evaluation, tasks: list[EditTask], how: dict[str, Any]
) -> None:
    """Write the files of a finished subject, metrics.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)  # of other settings: must not stand beside new verdicts
    save_verdicts(folder / "evaluation.safetensors", evaluation)
    draw_sessions(tasks, {subject.word: evaluation}, range(evaluation.images.shape[1])).save(folder / "strips.png")
    figures = summary(evaluation)
    exposure = [
        {"turn": turn["turn"], "success": turn["MT"], "interval": turn["MT_interval"]}
        | {name: turn[name] for name in EXPOSURE if name in turn}
        for turn in figures["turns"]
    ]
    what = {"subject": subject.word, "what": subject.what, "adapter": subject.fingerprint, "commit": git_commit()}
    write_json(folder / "metrics.json", what | how | figures | {"exposure_bias": exposure})


def _present(subjects: list[Subject], out: Path, tasks: list[EditTask], console: Console) -> None:
    """Write comparison.json and the page of finished subjects, and show their table."""
    reports = {subject.word: read_figures(out / subject.slug / "metrics.json") for subject in subjects}
    evaluations = {subject.word: load_verdicts(out / subject.slug / "evaluation.safetensors") for subject in subjects}
    (first, before), *others = evaluations.items()
    gains = {word: compare(before, after) for word, after in others}
    write_json(out / "comparison.json", {"over": first, "gains": gains})
    strips = [draw_sessions(tasks, evaluations, [session]) for session in range(before.images.shape[1])]
    page = write_comparison(out, reports, gains, strips)
    console.print(terminal_table(reports, gains))
    console.print(f"page: {page}", soft_wrap=True, highlight=False, markup=False)
