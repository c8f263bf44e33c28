"""`python -m mteditflow.data`: see `mteditflow.config.command`."""

import sys

from mteditflow.config import command

sys.exit(command.main(["data", *sys.argv[1:]]))
