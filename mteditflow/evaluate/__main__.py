"""`python -m mteditflow.evaluate`: see `mteditflow.config.command`."""

import sys

from mteditflow.config import command

sys.exit(command.main(["evaluate", *sys.argv[1:]]))
