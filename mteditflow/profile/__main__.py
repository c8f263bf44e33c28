"""`python -m mteditflow.profile`: see `mteditflow.config.command`."""

import sys

from mteditflow.config import command

sys.exit(command.main(["profile", *sys.argv[1:]]))
