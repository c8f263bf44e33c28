"""`python -m mteditflow.data`: see `mteditflow.data`."""

import sys

from mteditflow.data import main

sys.exit(main())
