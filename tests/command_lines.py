"""Command lines that texts show: whether the program takes them, without doing what they say."""

import shlex
from typing import Any

import pytest

from mteditflow.config import cli
from mteditflow.config.command import COMMANDS


class Parsed(Exception):
    """Raised where a command line was found right, before the command begins."""


def assert_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless `line`, a command and its words, is a command line of the program that is right, or asks for help."""
    parse = cli.parse

    def stop(*args: Any) -> Any:
        parse(*args)
        raise Parsed

    monkeypatch.setattr(cli, "parse", stop)
    name, *words = shlex.split(line)
    try:
        COMMANDS[name](words)
    except Parsed:
        return
    except SystemExit as stopped:
        assert stopped.code == 0 and words[-1] == "--help"
