"""`python -m mteditflow.study`: see `mteditflow.config.command`."""

import sys

from mteditflow.config import command

sys.exit(command.main(["study", *sys.argv[1:]]))
