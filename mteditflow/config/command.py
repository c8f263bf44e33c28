"""The commands of the program: `mteditflow COMMAND`, or `python -m mteditflow.COMMAND`.

Every parser is here, and torch is imported after a command line is known to be right, so that --help and wrong
arguments answer at once. A command returns its exit code: 0, or 1 where it was followed and not all is well. What is
wrong with its arguments or files is one line on stderr and exit code 2.
"""

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from mteditflow.config import DataConfig, ModelConfig, cli
from mteditflow.config.errors import fail
from mteditflow.config.ranges import Count, CountOrNone, Rate, Seed, Turns
from mteditflow.config.version import describe_version

Command = cli.Command
_dispatch, _program, _sentence, _parser = cli.dispatch, cli.program_name, cli.sentence, cli.command_parser
JUDGE_USAGE = "%(prog)s [--config FILE.yaml] [--section.field VALUE ...]"


def _fails_in_one_line(command: Command) -> Command:
    """Wrap a command: what a user can mend (`explain`) becomes one line on stderr and exit code 2, and Ctrl-C one."""

    @wraps(command)
    def run(argv: Sequence[str]) -> int:
        try:
            return command(argv)
        except KeyboardInterrupt:
            print("mteditflow: stopped by SIGINT", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
        except Exception as error:
            from mteditflow.record.ending import explain

            if (line := explain(error)) is None:
                raise
            fail(line)

    return run


@contextmanager
def _joined(config: Any, *, is_training: bool) -> Iterator[Any]:
    """The ranks of torchrun, all with the same config; one without it. What ends within ends as `Ending` says.

    What is wrong and can be known is said before ranks join, when the first speaks and the others are silent.
    """
    from mteditflow.record.ending import Ending

    with Ending() as ending:  # before torch is imported: a signal is heeded from here on
        from mteditflow import distributed
        from mteditflow.evaluate.compare_editors import check
        from mteditflow.guards import GuardError

        check(config, is_main=distributed.read_environment()[0] == 0, is_training=is_training)
        ranks = distributed.start(config, is_training=is_training)
        ending.meet(ranks)
        distributed.check_same(ranks, config)
        try:
            yield ranks
        except GuardError as error:
            raise ValueError(error) from None
        distributed.stop(ranks)


@_fails_in_one_line
def train(argv: Sequence[str]) -> int:
    """Train an editor; the same command in the same folder goes on from its newest checkpoint."""
    parser = cli.run_parser(_program("train"), _sentence(train))
    back = "go back, once, to the checkpoint of this iteration; what came after it is set aside in the run's folder"
    parser.add_argument("--resume_from", type=Count, metavar="ITERATION", help=back)
    config, values = _read_run(argv, parser)
    if _is_planned(config, values):
        return 0
    with _joined(config, is_training=True) as ranks:
        from mteditflow.train import train as run_training

        run_training(config, ranks, values.resume_from)
    return 0


@_fails_in_one_line
def evaluate(argv: Sequence[str]) -> int:
    """Measure runs, LoRAs and the base on the same held-out sessions; every gain is over the first subject."""
    parser = cli.settings_parser(
        _program("evaluate"),
        f"{_sentence(evaluate)} Settings come from config.yaml of the runs among the subjects, then from --config, "
        "then from overrides, such as --evaluation.num_turns 10 --evaluation.num_steps 28; what none names keeps its "
        "default. The same command again keeps what is finished.",
        usage="%(prog)s SUBJECT [SUBJECT ...] [--out FOLDER] [--config FILE.yaml] [--section.field VALUE ...]",
    )
    subject = f"a run's folder (its newest checkpoint), a LoRA (file, folder, hub name), or '{cli.BASE}' for no adapter"
    parser.add_argument("subjects", nargs="+", metavar="SUBJECT", help=subject)
    out = "where comparison.html and the figures and pictures of each subject go"
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"), metavar="FOLDER", help=out)
    values = cli.parse(parser, argv)
    from mteditflow.evaluate.compare_editors import evaluate_all, resolve

    subjects, config = resolve(values.subjects, values.out, lambda run: cli.evaluation_config(parser, argv, run))
    cli.print_if_asked(values, config)
    with _joined(config, is_training=False) as ranks:
        evaluate_all(subjects, values.out, config, ranks)
    return 0


@_fails_in_one_line
def export(argv: Sequence[str]) -> int:
    """Write what a run trained, or a LoRA of any form, in a form that others load."""
    parser = _parser("export", export)
    add = parser.add_argument
    forms, dtypes = Literal["diffusers", "comfyui", "merged"], Literal["float32", "bfloat16"]
    add(
        "run", type=str, metavar="RUN", help="a run's folder (its newest checkpoint), or a LoRA: file, folder, hub name"
    )
    add("--base", type=str, metavar="PATH", help="of a LoRA: the pipeline that it is for, as model.path")
    add("--out", type=Path, metavar="FOLDER", help="folder to write; left out: RUN/export/FORMAT-DTYPE-ADAPTER")
    add("--format", type=forms, default="diffusers", help="a LoRA for diffusers or for ComfyUI, or a pipeline")
    add("--dtype", type=dtypes, help="left out: float32 of a LoRA, the forward pass's of whole weights")
    add("--adapter", type=Literal["ema", "current"], default="ema", help="the average, or the newest weights")
    add("--push_to", type=str, metavar="OWNER/NAME", help="upload to this model of the hub, new ones are private")
    v = cli.parse(parser, argv)
    from mteditflow.export.weights import export_run

    export_run(v.run, v.out, form=v.format, dtype=v.dtype, adapter=v.adapter, base=v.base, hub_name=v.push_to)
    return 0


@_fails_in_one_line
def study(argv: Sequence[str]) -> int:
    """Train a grid of configs and seeds, and write what it says; the same command goes on where it was stopped."""
    parser = _parser("study", study)
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY", help="YAML file of comparisons; configs/study.yaml is the paper's")
    add("--folder", type=Path, default=Path("runs/study"), help="where the runs and the page are kept")
    add("--only", type=str, nargs="+", metavar="COMPARISON", help="run these comparisons alone")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="run these seeds, not the file's")
    add("--jobs", type=int, help="runs at a time; left out: one per GPU, or without GPUs one per core")
    add("--dry_run", action="store_true", help="show the runs and what is finished, and stop")
    v = cli.parse(parser, argv)
    from mteditflow.study.runner import run_study

    command = " ".join([parser.prog, *argv])
    return run_study(
        v.study, v.folder, only=v.only, seeds=v.seeds, num_jobs=v.jobs, is_dry_run=v.dry_run, command=command
    )


@_fails_in_one_line
def profile(argv: Sequence[str]) -> int:
    """Measure where the time of an iteration goes on this machine."""
    parser = cli.run_parser(_program("profile"), _sentence(profile))
    compare = "time our path beside the loop that users write with diffusers and peft, and stop"
    parser.add_argument("--compare", action="store_true", help=compare)
    overlap = "time the judge beside the rollout against the judge after each wave, and stop"
    parser.add_argument("--overlap", action="store_true", help=overlap)
    config, values = _read_run(argv, parser)
    if _is_planned(config, values):
        return 0
    if values.compare:
        from mteditflow.profile.compare import write_comparison

        write_comparison(config)
        return 0
    if values.overlap:
        from mteditflow.profile.overlap import write_overlap

        write_overlap(config)
        return 0
    from mteditflow.profile.command import write_profile

    write_profile(config)
    return 0


@_fails_in_one_line
def data(argv: Sequence[str]) -> int:
    """Check users' data, or make sessions of photographs."""
    return _dispatch("data", {"check": check, "generate": generate}, argv, _sentence(data))


@_fails_in_one_line
def check(argv: Sequence[str]) -> int:
    """Count what is in the data and name what is wrong; exit code 1 if too much."""
    parser = _parser("data", check, "check")
    what = "as data.path: .jsonl, .csv, .parquet, a folder, or owner/name of the hub"
    parser.add_argument("path", metavar="PATH", help=what)
    parser.add_argument("--num_turns", type=Turns, default=DataConfig().num_turns, help="data.num_turns")
    parser.add_argument("--allowed_folder", type=str, default="", help="data.allowed_folder: that pictures may lie in")
    parser.add_argument("--max_bad_share", type=float, help="damaged sessions that are too many; left out: a run's")
    parser.add_argument("--model", type=str, help="model.path, to count instructions that its text encoder cuts")
    tokens = "with --model: model.max_text_tokens (512; of a miniature 12)"
    parser.add_argument("--max_text_tokens", type=Count, default=512, help=tokens)
    v, count_tokens = cli.parse(parser, argv), None
    if v.model:
        from mteditflow.policy import token_counter

        count_tokens = token_counter(ModelConfig(path=v.model))
    from mteditflow.data.check import check as check_sessions

    limits = {"max_bad_share": v.max_bad_share, "max_text_tokens": v.max_text_tokens}
    return check_sessions(v.path, v.num_turns, v.allowed_folder, count_tokens=count_tokens, **limits)


@_fails_in_one_line
def generate(argv: Sequence[str]) -> int:
    """Write K-turn sessions of photographs with lists of their objects: a COCO file, or Open Images' boxes."""
    parser = _parser("data", generate, "generate")
    add = parser.add_argument
    add("coco", metavar="COCO", nargs="?", default="", help="JSON with images, annotations (bbox) and categories")
    add("--open_images", type=str, default="", metavar="CSV", help="instead of COCO: oidv6-train-annotations-bbox.csv")
    add("--classes", type=str, default="", metavar="CSV", help="its class names; left out: beside the boxes")
    add("--categories", type=str, default="", help="names of its classes, by commas; left out: twelve (docs/data.md)")
    add("--num_images", type=int, help="of Open Images, about as many of each category; left out: 2319, the paper's")
    add("--images", type=str, required=True, metavar="FOLDER", help="folder of the images")
    add("--out", type=str, required=True, metavar="FILE", help="JSONL file to write; must not be there yet")
    add("--turns", type=int, default=DataConfig().num_turns, help="instructions per session")
    add("--per_image", type=int, default=1, help="sessions per image")
    add("--seed", type=Seed, default=0, help="of everything that is drawn")
    lists = "lists: new_objects, colors, materials, backgrounds, texts"
    add("--words", type=str, default="", metavar="YAML", help=lists)
    add("--edit_types", type=str, default="", help="what is drawn, as color_alter=2,subject_add; left out: all alike")
    values = cli.parse(parser, argv)
    from mteditflow.data.coco import Order, write_sessions

    print(write_sessions(Order(**vars(values))))
    return 0


@_fails_in_one_line
def judge(argv: Sequence[str]) -> int:
    """Check the VLM judge of a config, serve it, or print its rubric."""
    commands = {"check": check_judge, "serve": serve_judge, "rubric": judge_rubric}
    return _dispatch("judge", commands, argv, _sentence(judge))


@_fails_in_one_line
def check_judge(argv: Sequence[str]) -> int:
    """Ask the judge about sessions whose grades are known; exit code 1 if it cannot be used."""
    parser = cli.settings_parser(f"{_program('judge')} check", _sentence(check_judge), JUDGE_USAGE)
    parser.add_argument("--num_sessions", type=int, default=8, help="half of them good, half bad")
    v = cli.parse(parser, argv)
    config = cli.to_config(v)
    cli.print_if_asked(v, config)
    from mteditflow.judge.check import check_judge as check_by_sessions

    return check_by_sessions(config, v.num_sessions)


@_fails_in_one_line
def serve_judge(argv: Sequence[str]) -> int:
    """Print the command that serves the judge at reward.url."""
    parser = cli.settings_parser(f"{_program('judge')} serve", _sentence(serve_judge), JUDGE_USAGE)
    parser.add_argument("--start", action="store_true", help="run it, where vLLM or SGLang is installed")
    v = cli.parse(parser, argv)
    config = cli.to_config(v)
    cli.print_if_asked(v, config)
    from mteditflow.judge.serve import serve_judge as serve_by_command

    return serve_by_command(config, is_started=v.start)


@_fails_in_one_line
def judge_rubric(argv: Sequence[str]) -> int:
    """Print the rubric that the VLM judge is told, to be copied and changed for reward.rubric."""
    cli.parse(_parser("judge", judge_rubric, "rubric"), argv)
    from mteditflow.config.rubric import FORM
    from mteditflow.reward.vlm import RUBRIC

    print(f"{RUBRIC}\n\nThe answer has a line for each turn, X one of these numbers:\n{FORM}")
    return 0


@_fails_in_one_line
def report(argv: Sequence[str]) -> int:
    """Write the HTML page of a run, also of one that is still at work."""
    parser = _parser("report", report)
    parser.add_argument("folder", type=Path, metavar="RUN", help="the run's folder")
    live = "show it on a page of this machine that follows the run while it goes on"
    parser.add_argument("--live", action="store_true", help=live)
    parser.add_argument("--port", type=int, default=8321, help="with --live: of the page; 0: any that is free")
    v = cli.parse(parser, argv)
    if v.live:
        from mteditflow.report.live import serve

        serve(v.folder, v.port)
        return 0
    from mteditflow.report.run_report import write_report

    print(write_report(v.folder))
    return 0


@_fails_in_one_line
def pretrain(argv: Sequence[str]) -> int:
    """Make the drifting editor from nothing."""
    parser = _parser("world.pretrain", pretrain)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FOLDER", help="where the editor and its states go")
    add("--seed", type=Seed, default=0, help="of everything that is drawn")
    add("--vae_batches", type=Count, default=10_000, help="of 4 pictures")
    add("--decoder_batches", type=CountOrNone, default=2500, help="of 4 pictures, of the decoder alone")
    add("--num_pairs", type=Count, default=48_000, help="clean single edits to learn from")
    add("--edit_batches", type=Count, default=6500, help="of the editor's training on them")
    add("--edit_cycles", type=Count, default=2, help="times of it, each on edits of its own, its rate falling")
    add("--num_flawed", type=Count, default=48_000, help="drifting edits to learn from after that")
    add("--flawed_batches", type=CountOrNone, default=2500, help="of the training on them")
    add("--batch_size", type=Count, default=48, help="edits in one of them")
    add("--learning_rate", type=Rate, default=1.5e-3, help="the highest, on clean edits; on drifting ones a third")
    add("--save_every", type=Count, default=200, help="batches of the editor between states to go on from")
    add("--num_sessions", type=Count, default=128, help="held-out sessions per measurement")
    values = cli.parse(parser, argv)
    from mteditflow.record.files import check_folder
    from mteditflow.world.pretrain import pretrain as make_editor

    check_folder(values.output, "--output")
    make_editor(values)
    return 0


@_fails_in_one_line
def pretrain_judge(argv: Sequence[str]) -> int:
    """Make the embedded world's small VLM judge from nothing, or measure how far any judge agrees with the truth."""
    parser = _parser("pretrain-judge", pretrain_judge)
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/judge"), metavar="FOLDER", help="where the judge and its states go")
    add("--seed", type=Seed, default=0, help="of everything that is drawn")
    add("--num_rollouts", type=Count, default=1200, help="sessions of the embedded editor to learn from, of 5 turns")
    add("--num_composed", type=Count, default=4000, help="sessions put together to learn from, of 5 turns")
    add("--look_batches", type=CountOrNone, default=300, help="batches in which the vision part learns to read")
    add("--batches", type=Count, default=4500, help="batches of sessions")
    add("--batch_size", type=Count, default=16, help="sessions in one of them; of pictures to read four times as many")
    add("--learning_rate", type=Rate, default=1.5e-3, help="the highest")
    add("--save_every", type=Count, default=250, help="batches between states to go on from")
    add("--num_sessions", type=Count, default=256, help="held-out sessions of 3 turns to measure on")
    measure = "make none, but measure this one: a reward.vlm in this process, such as small"
    add("--measure", type=str, metavar="JUDGE", help=measure)
    values = cli.parse(parser, argv)
    from mteditflow.judge.pretrain import measure_judge, pretrain
    from mteditflow.record.files import check_folder

    check_folder(values.output, "--output")
    measure_judge(values.measure, values.num_sessions) if values.measure else pretrain(values)
    return 0


COMMANDS: Mapping[str, Command] = {
    "train": train, "evaluate": evaluate, "export": export, "study": study, "profile": profile, "data": data,
    "judge": judge, "report": report, "pretrain": pretrain, "pretrain-judge": pretrain_judge,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, and return its exit code; without words, list the commands."""
    if sys.platform == "win32":
        fail("Windows itself has no locks and signals as a run needs them: use WSL 2 (docs/start.md)")
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] == "--version":
        print(describe_version())
        return 0
    return _dispatch("", COMMANDS, words, "Reinforcement learning of multi-turn image editing (MT-EditFlow).")


def _read_run(argv: Sequence[str], parser: ArgumentParser) -> tuple[Any, Any]:
    """Return the Config of a command line, and all of its values; --print_config ends the program. What a LoRA to start
    from says of itself is in the Config.
    """
    values = cli.parse(parser, argv)
    config = cli.to_config(values)
    cli.print_if_asked(values, config)
    if config.lora.init_from:
        from mteditflow.policy import with_start

        config = with_start(config)
    return config, values


def _is_planned(config: Any, values: Any) -> bool:
    """Print the plan, where the command line asks for one. ValueError: it does not fit; --gpu without --dry_run."""
    from mteditflow.plan.gpus import read_target

    target = read_target(values.gpu, values.price, values.calibration)
    if not values.dry_run:
        if target:
            raise ValueError(f"--gpu is {values.gpu!r}: is of a plan: give --dry_run with it, or leave it out")
        return False
    from mteditflow.plan.dry_run import dry_run

    plan = dry_run(config, target)
    print(plan.table)
    if plan.problem:
        raise ValueError(plan.problem)
    return True
