"""Files are whole or not there, and JSON files hold an object."""

import errno
from pathlib import Path

import pytest

from mteditflow.config.errors import first_line
from mteditflow.record.files import is_disk_full, read_json, replace_file, retire, write_json


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    for content in (b"first", b"second"):
        replace_file(path, content, is_durable=True)
        assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError) as caught:
        replace_file(path, b"third", is_durable=True)
    assert is_disk_full(caught.value) and path.read_bytes() == b"second"
    replace_file(path, b"fourth")  # promises nothing, syncs nothing
    assert path.read_bytes() == b"fourth"


def test_what_is_retired_takes_no_other_place(tmp_path: Path) -> None:
    """Once more, or after a kill in between, it lies beside what was set aside before."""
    for name in ("results", "results-2"):
        for path in (tmp_path / "lora" / "card", tmp_path / "page"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(name)
        found = retire(tmp_path, "results", [tmp_path / "lora", tmp_path / "page", tmp_path / "nothing"])
        aside = tmp_path / "set_aside" / name
        assert found == aside and (aside / "lora" / "card").read_text() == name
        assert (aside / "page").read_text() == name and [*tmp_path.iterdir()] == [tmp_path / "set_aside"]
    assert retire(tmp_path, "results", [tmp_path / "lora"]) is None


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    assert read_json(path) == {}
    write_json(path, {"name": "é", "values": [0.1 + 0.2, None]})
    assert read_json(path) == {"name": "é", "values": [0.1 + 0.2, None]}
    for content, message in ((b'{"a', "is not JSON"), (b"\xff", "is not JSON"), (b"[1]", "is not a JSON object")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"value\.json {message}.*: delete it, or evaluate again") as caught:
            read_json(path)
        assert "\n" not in str(caught.value)


def test_first_line() -> None:
    assert first_line(ValueError("\n  no such model:\nmore")) == "no such model"
    assert first_line(KeyError()) == "KeyError"
