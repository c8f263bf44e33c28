"""`python -m mteditflow.profile`: see `mteditflow.profile.command`."""

from mteditflow.profile.command import main

if __name__ == "__main__":
    main()
