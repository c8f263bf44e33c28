"""The command line of `python -m mteditflow.evaluate`: see `mteditflow.evaluate.compare_editors`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mteditflow.config import cli

if TYPE_CHECKING:
    from mteditflow.config import Config
    from mteditflow.evaluate.lora_files import Subject

PROG = "python -m mteditflow.evaluate"


def resolve(argv: Sequence[str] | None) -> tuple[list["Subject"], Path, "Config"]:
    """Subjects, folder of results and Config of a command line.

    ValueError where a subject is none, and where runs among them disagree on what they are evaluated on.
    """
    namespace = cli.parse_evaluation(argv, prog=PROG)
    from mteditflow.evaluate.held_out import check_held_out
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


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 and one line on stderr for a wrong argument, subject or file."""
    try:
        arguments = resolve(argv)
        from mteditflow.evaluate.compare_editors import evaluate_all

        evaluate_all(*arguments)
    except ValueError as error:
        cli.fail(error)
