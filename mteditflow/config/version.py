"""Which program this is."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def git_commit() -> str:
    """Return the commit of the program, with a mark where files differ from it; 'unknown' outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe_version() -> str:
    """Return name, version and commit, as `mteditflow --version` prints them."""
    try:
        return f"mteditflow {version('mteditflow')}, commit {git_commit()}"
    except PackageNotFoundError:
        return f"mteditflow, not installed, commit {git_commit()}"
