"""What the project's texts point at is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted([
    *PAGES, *(ROOT / "configs").glob("*.yaml"), *(ROOT / "mteditflow").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")
])  # fmt: skip

MEANT_TO_BE_ABSENT = {"kernels/__init__.py", "mteditflow/policy/patch.py"}  # a rule of the house; a guide's example


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def is_broken(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = page.parent / path if path else page
    return not file.exists() or bool(anchor and file.suffix == ".md" and anchor not in anchors(file))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert [it for it in targets if not it.startswith(("http://", "https://")) and is_broken(page, it)] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(ROOT)))
def test_files_that_a_text_names_are_there(source: Path) -> None:
    """Names from the root of the repository: docs/..., configs/..., tests/..., mteditflow/..., bench/..."""
    names = re.findall(
        r"(?<![\w/.-])((?:docs|configs|tests|bench|mteditflow|kernels)/[\w/.-]*\.(?:md|yaml|py))", source.read_text()
    )
    assert [it for it in set(names) - MEANT_TO_BE_ABSENT if not (ROOT / it).exists()] == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title, `code`\n")
    assert [is_broken(page, it) for it in ("page.md#a-title-code", "#a-title-code", "#other", "gone.md")] == [
        False, False, True, True
    ]  # fmt: skip
