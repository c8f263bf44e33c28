"""The random numbers: published vectors, independence of everything but key and element, statistics."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from mteditflow_kernels import counter_normal, counter_uniform, noise_keys, philox_4x32
from torch import Tensor

ONES = 0xFFFFFFFF
# Random123's kat_vectors, philox4x32 10: counter, key, expected
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def make_keys(num_rows: int, step: int = 3) -> Tensor:
    rows = torch.arange(num_rows)
    return noise_keys(seed=7, step=step, task=rows // 4, trajectory=rows % 4, turn=1, denoising_step=2)


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert philox_4x32(torch.tensor(counter), torch.tensor(key)).tolist() == list(expected)


def test_batched_vectors_broadcast() -> None:
    counters, keys, expected = (torch.tensor([vector[i] for vector in VECTORS]) for i in range(3))
    assert torch.equal(philox_4x32(counters, keys), expected)
    assert torch.equal(philox_4x32(counters[:1].expand(3, 2, 4), keys[:1]), expected[:1].expand(3, 2, 4))


def test_normal_is_box_muller_of_the_words() -> None:
    keys = make_keys(2)
    key0, key1, counter1, counter2, counter3 = keys[1].tolist()
    normals = counter_normal(keys, (3, 4))[1].flatten()
    for block in range(3):
        words = philox_4x32(torch.tensor([block, counter1, counter2, counter3]), torch.tensor([key0, key1])).tolist()
        for pair in range(2):
            radius = math.sqrt(-2 * math.log(((words[2 * pair] >> 8) + 1) / 2**24))
            angle = 2 * math.pi * (words[2 * pair + 1] >> 8) / 2**24
            expected = torch.tensor([radius * math.cos(angle), radius * math.sin(angle)])
            # both are float64 results rounded to float32, up to 5.8: one unit in the last place is 4.8e-7
            torch.testing.assert_close(normals[4 * block + 2 * pair :][:2], expected, rtol=0, atol=5e-7)


def test_uniform_is_the_upper_24_bits() -> None:
    keys = torch.tensor([[0, 0, 0, 0, 0]])
    expected = [(word >> 8) / 2**24 for word in VECTORS[0][2]]
    assert counter_uniform(keys, 4)[0].tolist() == expected  # exact: 24 bits fit float32


@pytest.mark.parametrize("num_elements", [1, 63, 1024, 4097])
def test_element_depends_only_on_key_and_index(num_elements: int) -> None:
    keys = make_keys(16)
    everything = counter_normal(keys, (5000,))
    uniforms = counter_uniform(keys, 5000)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(counter_normal(keys[order], (num_elements,)), everything[order, :num_elements])
    assert torch.equal(counter_uniform(keys[order], num_elements), uniforms[order, :num_elements])
    for num_rows in (1, 3):
        assert torch.equal(
            counter_normal(keys[5 : 5 + num_rows], (num_elements,)), everything[5:, :num_elements][:num_rows]
        )


def test_shape_is_only_a_view() -> None:
    keys = make_keys(3)
    assert torch.equal(counter_normal(keys, (5, 7)), counter_normal(keys, (35,)).reshape(3, 5, 7))


def test_uniform_moments() -> None:
    uniforms = counter_uniform(make_keys(64), 4096).double()
    assert uniforms.min() >= 0 and uniforms.max() < 1
    assert abs(uniforms.mean() - 0.5) < 5 * math.sqrt(1 / 12 / uniforms.numel())


BASE = {"seed": 11, "step": 22, "task": 33, "trajectory": 44, "turn": 5, "denoising_step": 6}
NUM_VALUES, NUM_ELEMENTS = 7, 1 << 18  # of a coordinate, and of a row: 1.1e7 draws


def key_of(place: dict[str, int]) -> Tensor:
    one = {name: torch.tensor([place[name]]) for name in ("task", "trajectory")}
    return noise_keys(**{**place, **one})  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def normals() -> dict[str, Tensor]:
    """Of each coordinate, rows (7, 2^18) whose keys differ in it alone, by one from row to row; no key occurs twice."""
    return {
        name: torch.cat([
            counter_normal(key_of({**BASE, name: BASE[name] + value}), (NUM_ELEMENTS,))
            for value in range(1, NUM_VALUES + 1)
        ])
        for name in BASE
    }  # fmt: skip


def assert_uncorrelated(first: Tensor, second: Tensor) -> None:
    """Neither they nor their squares: of independent normals, x y has variance 1 and (x^2 - 1)(y^2 - 1) has 4. Products
    that share a factor are uncorrelated too, so a mean has exactly 1/n of that; five standard errors are allowed.
    """
    first, second = first.double(), second.double()
    error = 1 / math.sqrt(first.numel())
    assert abs((first * second).mean()) < 5 * error
    assert abs(((first.square() - 1) * (second.square() - 1)).mean()) < 5 * 2 * error


def test_moments_of_ten_million_normals(normals: dict[str, Tensor]) -> None:
    """Five standard errors, from E z^2p - (E z^p)^2. That 24-bit words end at 5.77 takes 3e-4 from the sixth moment,
    whose standard error is 3e-2, and less from the others.
    """
    draws = torch.cat([*normals.values()]).flatten().double()
    assert draws.numel() > 1e7
    moment = [float(math.prod(range(p - 1, 0, -2))) * (p % 2 == 0) for p in range(13)]
    assert moment[:7] == [1, 0, 1, 0, 3, 0, 15]
    power = torch.ones_like(draws)
    for p in range(1, 7):
        power *= draws
        error = math.sqrt((moment[2 * p] - moment[p] ** 2) / draws.numel())
        assert abs(power.mean().item() - moment[p]) < 5 * error, p


def test_kolmogorov_smirnov(normals: dict[str, Tensor]) -> None:
    """The largest distance to the normal distribution function. P(distance > d) <= 2 exp(-2 n d^2) for every n
    (Dvoretzky, Kiefer and Wolfowitz with Massart's constant): d = sqrt(ln(2e6) / 2n) is exceeded once in a million.
    """
    draws = np.sort(torch.cat([*normals.values()]).flatten().numpy())
    expected = torch.special.ndtr(torch.from_numpy(draws).double())
    below = torch.arange(len(draws), dtype=torch.float64) / len(draws)
    distance = max((expected - below).max().item(), (below - expected).max().item() + 1 / len(draws))
    assert distance < math.sqrt(math.log(2e6) / (2 * len(draws)))


@pytest.mark.parametrize("name", BASE)
def test_neighbouring_keys_are_uncorrelated(normals: dict[str, Tensor], name: str) -> None:
    """At the same element, and one pair, one counter and one program of a kernel apart."""
    rows = normals[name]
    for shift in (0, 2, 4, 1024):
        assert_uncorrelated(rows[:-1, shift:], rows[1:, : NUM_ELEMENTS - shift])


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 1024])
def test_neighbouring_elements_are_uncorrelated(normals: dict[str, Tensor], lag: int) -> None:
    rows = torch.cat([*normals.values()])
    assert_uncorrelated(rows[:, lag:], rows[:, :-lag])


def test_words_of_a_key_do_not_change_places() -> None:
    keys = key_of(BASE)
    noise = [counter_normal(keys[:, list(order)], (1024,)) for order in permutations(range(5))]
    correlation = torch.corrcoef(torch.cat(noise)) - torch.eye(len(noise))
    # 7140 pairs: six standard errors, 1/sqrt(n) each, are exceeded once in 70,000 such tables
    assert correlation.abs().max() < 6 / math.sqrt(1024)


def test_every_coordinate_changes_the_noise() -> None:
    base = {"seed": 1, "step": 2, "turn": 1, "denoising_step": 4}
    task, trajectory = torch.tensor([5]), torch.tensor([6])
    variants = [noise_keys(**base, task=task, trajectory=trajectory)]
    variants += [
        noise_keys(**{**base, name: value + 1}, task=task, trajectory=trajectory) for name, value in base.items()
    ]
    variants += [noise_keys(**base, task=task + 1, trajectory=trajectory)]
    variants += [noise_keys(**base, task=task, trajectory=trajectory + 1)]
    normals = counter_normal(torch.cat(variants), (256,))
    correlation = torch.corrcoef(normals) - torch.eye(len(variants))
    assert correlation.abs().max() < 5 / math.sqrt(256)  # five standard errors of a correlation of 256 pairs


def test_keys_are_uint32() -> None:
    keys = noise_keys(
        seed=-1, step=2**32 + 9, task=torch.tensor([-2]), trajectory=torch.tensor([3]), turn=2, denoising_step=1
    )
    assert keys.tolist() == [[ONES, 9, 1 + (2 << 16), 3, ONES - 1]]
