"""`python -m mteditflow.judge`: see `mteditflow.config.command`."""

import sys

from mteditflow.config import command

sys.exit(command.main(["judge", *sys.argv[1:]]))
