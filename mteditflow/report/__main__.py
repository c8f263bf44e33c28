"""`python -m mteditflow.report`: see `mteditflow.report.run_report`."""

import sys

from mteditflow.report.run_report import main

if __name__ == "__main__":
    sys.exit(main())
