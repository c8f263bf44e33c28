"""`python -m mteditflow.export`: see `mteditflow.config.command`."""

import sys

from mteditflow.config import command

sys.exit(command.main(["export", *sys.argv[1:]]))
