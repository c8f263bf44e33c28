"""`python -m mteditflow.export`: see `mteditflow.export.weights`."""

from mteditflow.export.weights import main

if __name__ == "__main__":
    main()
