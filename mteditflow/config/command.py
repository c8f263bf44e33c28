"""The commands of the program, `mteditflow COMMAND` or `python -m mteditflow.COMMAND`."""

from collections.abc import Sequence
from contextlib import ExitStack

from mteditflow.config import cli


def main(argv: Sequence[str]) -> int:
    """Run a command line whose first word is the command."""
    assert argv[0] == "train"
    train(argv[1:])
    return 0


def train(argv: Sequence[str] | None = None) -> None:
    """The command line: `python -m mteditflow.train [--config FILE] [--section.field VALUE ...] [--dry_run]`."""
    config, is_dry_run = cli.parse(argv, prog="python -m mteditflow.train")
    from mteditflow import distributed
    from mteditflow.guards import GuardError
    from mteditflow.record.files import is_disk_full

    if is_dry_run:
        from mteditflow.plan.dry_run import dry_run

        try:
            plan = dry_run(config)
        except ValueError as error:
            cli.fail(error)
        print(plan.table)
        if plan.problem:
            cli.fail(plan.problem)
        return
    from mteditflow.train import train

    with ExitStack() as stack:
        ranks = distributed.start()
        stack.callback(distributed.stop, ranks)
        try:
            train(config, ranks)
        except (ValueError, GuardError) as error:
            cli.fail(error)
        except OSError as error:
            if not is_disk_full(error):
                raise
            cli.fail(f"no room on the disk for {config.run.folder}: free some and run again")
