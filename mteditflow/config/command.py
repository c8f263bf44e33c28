"""The commands of the program: `mteditflow COMMAND`, or `python -m mteditflow.COMMAND`.

Every parser is here, and torch is imported after a command line is known to be right, so that --help and wrong
arguments answer at once. A command returns its exit code: 0, or 1 where it was followed and not all is well. What is
wrong with its arguments or files is one line on stderr and exit code 2.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from mteditflow.config import DataConfig, cli
from mteditflow.config.errors import fail, suggest
from mteditflow.config.version import describe_version

Command = Callable[[Sequence[str]], int]


def _fails_in_one_line(command: Command) -> Command:
    """Wrap a command: ValueError, and a full disk, become one line on stderr and exit code 2."""

    @wraps(command)
    def run(argv: Sequence[str]) -> int:
        try:
            return command(argv)
        except ValueError as error:
            fail(error)
        except OSError as error:
            from mteditflow.record.files import is_disk_full

            if not is_disk_full(error):
                raise
            fail(f"no room on the disk: free some and run again ({error})")

    return run


@_fails_in_one_line
def train(argv: Sequence[str]) -> int:
    """Train an editor; the same command in the same folder goes on from its newest checkpoint."""
    config, is_dry_run = _read_run(argv, "train", train)
    if is_dry_run:
        from mteditflow.plan.dry_run import dry_run

        plan = dry_run(config)
        print(plan.table)
        if plan.problem:
            raise ValueError(plan.problem)
        return 0
    from mteditflow import distributed
    from mteditflow.guards import GuardError
    from mteditflow.train import train as run_training

    with ExitStack() as stack:
        ranks = distributed.start()
        stack.callback(distributed.stop, ranks)
        try:
            run_training(config, ranks)
        except GuardError as error:
            raise ValueError(error) from None
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
    parser.add_argument(
        "subjects", nargs="+", metavar="SUBJECT",
        help=f"a run's folder (its newest checkpoint), a folder with {cli.LORA_FILE}, or '{cli.BASE}', the editor "
        "without any",
    )  # fmt: skip
    parser.add_argument("--out", type=str, default="runs/comparison", metavar="FOLDER",
                        help="where comparison.html and the figures and pictures of each subject go")  # fmt: skip
    values = cli.parse(parser, argv)
    from mteditflow.evaluate.compare_editors import evaluate_all, resolve

    out = Path(values.out)
    subjects, config = resolve(values.subjects, out, lambda run: cli.evaluation_config(parser, argv, run))
    cli.print_if_asked(values, config)
    evaluate_all(subjects, out, config)
    return 0


@_fails_in_one_line
def export(argv: Sequence[str]) -> int:
    """Write what a run trained in a form that others load."""
    parser = _parser("export", export)
    parser.add_argument("run", metavar="RUN", help="the run's folder; its newest checkpoint is exported")
    parser.add_argument("--out", type=str, metavar="FOLDER",
                        help="folder to write; left out: RUN/export/FORMAT-DTYPE-ADAPTER")  # fmt: skip
    parser.add_argument("--format", type=Literal["diffusers", "comfyui", "merged"], default="diffusers",
                        help="a LoRA for diffusers or for ComfyUI, or a whole pipeline with it merged in")  # fmt: skip
    parser.add_argument("--dtype", type=Literal["float32", "bfloat16"],
                        help="left out: float32 of a LoRA, model.dtype of whole weights")  # fmt: skip
    parser.add_argument("--adapter", type=Literal["ema", "current"], default="ema",
                        help="the average, which the run evaluates, or the newest weights")  # fmt: skip
    parser.add_argument("--push_to", type=str, metavar="OWNER/NAME",
                        help="upload to this model of the hub, new ones are private")  # fmt: skip
    values = cli.parse(parser, argv)
    from mteditflow.export.weights import export_run

    export_run(
        Path(values.run), Path(values.out) if values.out else None, form=values.format, dtype=values.dtype,
        adapter=values.adapter, hub_name=values.push_to,
    )  # fmt: skip
    return 0


@_fails_in_one_line
def study(argv: Sequence[str]) -> int:
    """Train a grid of configs and seeds, and write what it says; the same command goes on where it was stopped."""
    parser = _parser("study", study)
    parser.add_argument("study", metavar="STUDY", help="YAML file of comparisons; configs/study.yaml is the paper's")
    parser.add_argument("--folder", type=str, default="runs/study", help="where the runs and the page are kept")
    parser.add_argument("--only", type=str, nargs="+", metavar="COMPARISON", help="run these comparisons alone")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="run these seeds, not the file's")
    parser.add_argument("--jobs", type=int, help="runs at a time; left out: one per GPU, or without GPUs one per core")
    parser.add_argument("--dry_run", action="store_true", help="show the runs and what is finished, and stop")
    values = cli.parse(parser, argv)
    from mteditflow.study.runner import run_study

    return run_study(
        Path(values.study), Path(values.folder), only=values.only, seeds=values.seeds, num_jobs=values.jobs,
        is_dry_run=values.dry_run, command=" ".join([parser.prog, *argv]),
    )  # fmt: skip


@_fails_in_one_line
def profile(argv: Sequence[str]) -> int:
    """Measure where the time of an iteration goes on this machine."""
    config, is_dry_run = _read_run(argv, "profile", profile)
    if is_dry_run:
        from mteditflow.plan.dry_run import dry_run

        print(dry_run(config).table)
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
    what = "as data.path: .jsonl, EdiVal's .csv, .parquet, a folder, or owner/name of the hub"
    parser.add_argument("path", metavar="PATH", help=what)
    parser.add_argument("--num_turns", type=int, default=DataConfig().num_turns, help="data.num_turns")
    parser.add_argument("--max_bad_share", type=float, default=0.05,
                        help="damaged sessions that are too many; a run stops above the default")  # fmt: skip
    values = cli.parse(parser, argv)
    from mteditflow.data.check import check as check_sessions

    return check_sessions(values.path, num_turns=values.num_turns, max_bad_share=values.max_bad_share)


@_fails_in_one_line
def generate(argv: Sequence[str]) -> int:
    """Write K-turn sessions from a COCO file of images and objects."""
    parser = _parser("data", generate, "generate")
    parser.add_argument("coco", metavar="COCO", help="JSON with images, annotations (bbox) and categories")
    parser.add_argument("--images", type=str, required=True, metavar="FOLDER", help="folder of the images")
    parser.add_argument("--out", type=str, required=True, metavar="FILE",
                        help="JSONL file to write; must not be there yet")  # fmt: skip
    parser.add_argument("--turns", type=int, default=DataConfig().num_turns, help="instructions per session")
    parser.add_argument("--per_image", type=int, default=1, help="sessions per image")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    values = cli.parse(parser, argv)
    from mteditflow.data.coco import write_sessions

    print(
        write_sessions(
            values.coco, images=values.images, out=values.out, num_turns=values.turns, seed=values.seed,
            per_image=values.per_image,
        )
    )  # fmt: skip
    return 0


@_fails_in_one_line
def report(argv: Sequence[str]) -> int:
    """Write the HTML page of a run, also of one that is still at work."""
    parser = _parser("report", report)
    parser.add_argument("folder", metavar="RUN", help="the run's folder")
    folder = Path(cli.parse(parser, argv).folder)
    from mteditflow.report.run_report import write_report

    print(write_report(folder))
    return 0


@_fails_in_one_line
def pretrain(argv: Sequence[str]) -> int:
    """Make the embedded editor from nothing."""
    parser = _parser("world.pretrain", pretrain)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder for the checkpoints")
    parser.add_argument("--vae", type=str, metavar="FOLDER", help="take this trained autoencoder, train none")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--vae_batches", type=int, default=2000, help="of 32 pictures")
    parser.add_argument("--num_pairs", type=int, default=120_000, help="single edits to learn from")
    parser.add_argument("--editor_batches", type=int, default=8000, help="of the editor's training")
    parser.add_argument("--flawed_batches", type=int, default=1500, help="the last of them, with flawed targets")
    parser.add_argument("--batch_size", type=int, default=64, help="edits in one of them")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3, help="the highest, of the editor")
    parser.add_argument("--save_every", type=int, default=500, help="batches of the editor between checkpoints")
    parser.add_argument("--num_sessions", type=int, default=400, help="held-out edits per measurement")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the editor: 1.6 times as fast on a CPU, needs a C++ compiler")  # fmt: skip
    values = cli.parse(parser, argv)
    from mteditflow.world.pretrain import pretrain as make_editor

    make_editor(values)
    return 0


COMMANDS: Mapping[str, Command] = {
    "train": train, "evaluate": evaluate, "export": export, "study": study, "profile": profile, "data": data,
    "report": report, "pretrain": pretrain,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, and return its exit code; without words, list the commands."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] == "--version":
        print(describe_version())
        return 0
    return _dispatch("", COMMANDS, words, "Reinforcement learning of multi-turn image editing (MT-EditFlow).")


def _dispatch(name: str, commands: Mapping[str, Command], words: Sequence[str], title: str) -> int:
    """Run the command that the first word names; --help, or no word, lists the commands."""
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {_program(name)} COMMAND ...   (COMMAND --help says more)\n\n{title}\n")
        for word, command in commands.items():
            print(f"  {word:<10}{_sentence(command)}")
        return 0
    if words[0] not in commands:
        fail(f"{words[0]} is no command: {suggest(words[0], list(commands))}")
    return commands[words[0]](words[1:])


def _program(name: str) -> str:
    """Return what the user typed to come to a command: the console script, or a module."""
    if Path(sys.argv[0]).name == "mteditflow" or not name:
        return f"mteditflow {name.removeprefix('world.')}".strip()
    return f"python -m mteditflow.{name}"


def _sentence(command: Command) -> str:
    return (command.__doc__ or "").splitlines()[0]


def _parser(name: str, command: Command, sub_command: str = "") -> ArgumentParser:
    return cli.bare_parser(f"{_program(name)} {sub_command}".strip(), _sentence(command))


def _read_run(argv: Sequence[str], name: str, command: Command) -> tuple[Any, bool]:
    """Return the Config of a command line, and whether it has --dry_run; --print_config ends the program."""
    parser = cli.run_parser(_program(name), _sentence(command))
    values = cli.parse(parser, argv)
    config = cli.to_config(values)
    cli.print_if_asked(values, config)
    return config, values.dry_run
