"""`pytest bench/`, the day a GPU is at hand: what is missing is said first, the parts run by value, each within seconds
of its own, and what was found is on the disk at once.
"""

import gc
import os
import signal
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded

import pytest
import torch
from packaging.requirements import Requirement

FOLDER = Path(__file__).parent
SECONDS = {  # of each part on a GPU, in the order of its value; 11 minutes in all
    "test_iteration": 180,
    "test_answers": 45,
    "test_overlap": 90,
    "test_kernels": 95,
    "test_blocks": 140,
    "test_compare": 50,
    "test_pairs": 40,
    "test_bits": 30,
    "test_update": 5,
}
NEEDED = ("triton", "pytest", "pytest-benchmark")  # of what tests need
_spent: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    help = f"seconds on a GPU for all parts together, shared out as {sum(SECONDS.values())} would be"
    parser.addoption("--seconds", type=float, default=float(sum(SECONDS.values())), help=help)


def seconds_of(part: str, config: pytest.Config) -> float:
    """What a part may take on a GPU."""
    return SECONDS[part] * float(config.getoption("--seconds") or 0) / sum(SECONDS.values())


def missing_packages() -> list[str]:
    """What of pyproject.toml's requirements is not there, or in another version."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in project["dependencies"]]
    of_tests = [Requirement(text) for text in project["optional-dependencies"]["test"]]
    wanted += [requirement for requirement in of_tests if requirement.name in NEEDED]
    problems = []
    for requirement in wanted:
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            problems.append(f"{requirement} (absent)")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement} (here: {found})")
    return problems


def pytest_configure(config: pytest.Config) -> None:
    problems = missing_packages()
    if problems:
        pytest.exit(f"missing: {', '.join(problems)}; bench/README.md says which wheels to carry", returncode=2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By value; what has no budget (figures of a CPU) comes last."""
    order = {name: place for place, name in enumerate(SECONDS)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def record(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The session's file: in bench/results/ on a GPU, else it is thrown away."""
    import measure

    device, is_cuda = measure.device_and(True, False)
    if not is_cuda:
        measure.COPY_BYTES, measure.PRODUCT_SIZE = 2**24, 128
    made = measure.Record(FOLDER / "results" if is_cuda else tmp_path_factory.mktemp("bench"), measure.session(device))
    yield made
    print(f"\nwritten to {made.path}")


@pytest.fixture(autouse=True)
def budget(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU: skips what its part has no time left for, and stops what takes longer."""
    part = request.node.path.stem
    if not torch.cuda.is_available() or part not in SECONDS:
        yield
        return
    seconds = seconds_of(part, request.config)
    left = seconds - _spent.get(part, 0.0)
    if left <= 0:
        pytest.skip(f"the {seconds:.0f} s of {part} are spent")

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the {seconds:.0f} s of {part} are spent")

    before, start = signal.signal(signal.SIGALRM, stop), time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _spent[part] = _spent.get(part, 0.0) + time.perf_counter() - start
        gc.collect()
        torch.cuda.empty_cache()
