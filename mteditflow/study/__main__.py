"""`python -m mteditflow.study`: see `mteditflow.study.runner`."""

import sys

from mteditflow.study.runner import main

if __name__ == "__main__":
    sys.exit(main())
