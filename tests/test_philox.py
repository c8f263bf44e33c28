"""The random numbers: published vectors, independence of everything but key and element, moments."""

import math

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


def test_moments() -> None:
    normals = counter_normal(make_keys(64), (4096,)).double()
    num = normals.numel()  # 262144; every tolerance is five standard errors
    assert abs(normals.mean()) < 5 / math.sqrt(num)
    assert abs(normals.square().mean() - 1) < 5 * math.sqrt(2 / num)
    assert abs(normals.pow(3).mean()) < 5 * math.sqrt(15 / num)
    assert abs(normals.pow(4).mean() - 3) < 5 * math.sqrt(96 / num)
    assert abs((normals[:, 0::2] * normals[:, 1::2]).mean()) < 5 / math.sqrt(num / 2)  # cosine against sine
    assert abs((normals[:-1] * normals[1:]).mean()) < 5 / math.sqrt(num * 63 / 64)  # neighbouring keys
    uniforms = counter_uniform(make_keys(64), 4096).double()
    assert uniforms.min() >= 0 and uniforms.max() < 1
    assert abs(uniforms.mean() - 0.5) < 5 * math.sqrt(1 / 12 / num)


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
