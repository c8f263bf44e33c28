"""`python -m mteditflow.evaluate`: see `mteditflow.evaluate.command`."""

from mteditflow.evaluate.command import main

if __name__ == "__main__":
    main()
