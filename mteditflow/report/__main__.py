"""`python -m mteditflow.report`: see `mteditflow.config.command`."""

import sys

from mteditflow.config import command

sys.exit(command.main(["report", *sys.argv[1:]]))
