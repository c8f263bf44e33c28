"""The register of counted randomness: no two uses of a key are the same numbers."""

from itertools import combinations

import pytest
import torch
from mteditflow_kernels import counter_uniform

from mteditflow.noise import EVALUATION, NUM_PLACES, TURN_SHIFT, NoiseSource, Place, row_keys


def test_places_are_disjoint_and_within_a_turn() -> None:
    # by name: an Enum takes two names of one value for one member
    places = {name: {place.at(i) for i in range(place.value[1])} for name, place in Place.__members__.items()}
    assert all(min(of_place) >= 0 and max(of_place) < NUM_PLACES for of_place in places.values())
    for (a, of_a), (b, of_b) in combinations(places.items(), 2):
        assert not of_a & of_b, (a, b)
    assert NUM_PLACES == 1 << TURN_SHIFT


@pytest.mark.parametrize("place", Place)
def test_a_place_has_no_more_draws_than_it_says(place: Place) -> None:
    for number in (-1, place.value[1]):
        with pytest.raises(AssertionError):
            place.at(number)


def test_keys_differ_in_everything_that_they_depend_on() -> None:
    """Every key of a small run is another, and so are the numbers that it counts."""
    sources = [NoiseSource(seed=seed, step=step) for seed in (0, 1) for step in (0, 1)] + [EVALUATION]
    keys = torch.cat([
        row_keys([4, 4, 4, 7, 7, 7], torch.arange(6) % 3, source, turn=turn, place=place, number=number)
        for source in sources for turn in (0, 1) for place in Place for number in range(min(2, place.value[1]))
    ])  # fmt: skip
    assert len(torch.unique(keys, dim=0)) == len(keys)
    assert len(torch.unique(counter_uniform(keys, 4), dim=0)) == len(keys)


def test_a_row_does_not_depend_on_the_other_tasks() -> None:
    source = NoiseSource(seed=3, step=5)
    both, alone = (
        row_keys(ids, torch.arange(len(ids)) % 2, source, turn=1, place=Place.NFT_NOISE, number=9)
        for ids in ([8, 8, 2, 2], [2, 2])
    )
    assert torch.equal(both[2:], alone)
    assert both[:, 3].tolist() == [0, 1, 0, 1] and both[:, 4].tolist() == [8, 8, 2, 2]
