"""`python -m mteditflow.report`: see `mteditflow.report.run_page`."""

import sys

from mteditflow.report.run_page import main

if __name__ == "__main__":
    sys.exit(main())
