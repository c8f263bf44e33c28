"""Drift is measured as it was applied, whatever else a few pixels show, and where no instruction has touched."""

import pytest
import torch
from rollouts import rollout_of
from torch import Tensor
from update_parts import change

from mteditflow.config import Config
from mteditflow.data import training_tasks
from mteditflow.distributed import alone
from mteditflow.record.alarms import rollout_figures
from mteditflow.record.drift import KINDS, knows_untouched, measure_drift, measure_rollout, untouched_masks
from mteditflow.types import EditTask, Region, Scores
from mteditflow.world.drift import AXES, drifted
from mteditflow.world.edits import make_session
from mteditflow.world.render import render

SIGNS = {"cast": ("cast", 1), "fade": ("contrast", -1), "saturation": ("saturation", -1), "blur": ("sharpness", -1)}


def pictures(num: int = 8) -> Tensor:
    """Sources of the world at 0.6 of their contrast: no drift of 0.2 clips a pixel."""
    return 0.6 * render([make_session(f"drift/{n}", 1, held_out=False).source for n in range(num)])


def everywhere(images: Tensor) -> Tensor:
    return torch.ones_like(images[:, 0], dtype=torch.bool)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def measured(before: Tensor, after: Tensor) -> dict[str, Tensor]:
    return dict(zip(KINDS, measure_drift(before, after, everywhere(before)).T, strict=True))


def test_the_source_itself_has_not_drifted() -> None:
    x = pictures()
    assert measure_drift(x, x, everywhere(x)).abs().max() < 1e-4


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("size", [0.2, 0.05, -0.1])
def test_what_was_applied_is_read(axis: str, size: float) -> None:
    """RIDGE takes 1e-5 of a variance, of which the smoothest three quarters of a picture have some 1e-3: 1 %."""
    x, drift = pictures(), torch.zeros(8, 4)
    drift[:, AXES.index(axis)] = size
    found, (kind, sign) = measured(x, drifted(x, drift)), SIGNS[axis]
    assert found[kind].tolist() == pytest.approx([sign * size] * 8, rel=0.02)
    if axis == "cast":
        assert found["tint"].tolist() == pytest.approx([size / 4] * 8, rel=0.02)
    others = [found[name].abs().max().item() for name in KINDS if name not in (kind, "tint" if axis == "cast" else "")]
    assert max(others) < 0.04 * abs(size)  # of a blur, the grain: it is no multiple of the source's detail


def test_several_drifts_at_once_are_told_apart() -> None:
    x, drift = pictures(), torch.tensor([0.1, 0.15, -0.1, 0.2]).expand(8, 4)
    found = measured(x, drifted(x, drift))
    for axis, size in zip(AXES, drift[0].tolist(), strict=True):
        kind, sign = SIGNS[axis]
        assert found[kind].mean().item() == pytest.approx(sign * size, abs=0.005), axis


def test_a_few_changed_pixels_do_not_count() -> None:
    """A fifth of the picture is another picture's: what an edit has changed that nobody knows of."""
    x, drift = pictures(), torch.tensor([0.15, 0.1, 0.0, 0.0]).expand(8, 4)
    after = drifted(x, drift)
    after[:, :, 10:40, 20:47] = x.roll(1, 0)[:, :, 10:40, 20:47] - 0.3
    found = measured(x, after)
    assert (found["cast"] - 0.15).abs().mean() < 0.02 and (found["contrast"] + 0.1).abs().mean() < 0.03


def test_white_noise_is_grain() -> None:
    """Of standard deviation 0.1 in each colour: 0.1 |LUMA| in the luma."""
    x = pictures()
    found = measured(x, x + 0.1 * noise(*x.shape))
    luma = 0.1 * (0.299**2 + 0.587**2 + 0.114**2) ** 0.5
    assert found["grain"].mean().item() == pytest.approx(luma, rel=0.05)
    assert all(found[kind].abs().max() < 0.1 for kind in KINDS if kind != "grain")  # 3 x 0.067 / sqrt(1,000 x 0.005)


def test_what_a_source_does_not_have_it_cannot_lose() -> None:
    grey = torch.full((2, 3, 64, 64), 0.2)
    found = measured(grey, grey + 0.05 * noise(2, 3, 64, 64))
    assert max(found[kind].abs().max().item() for kind in KINDS if kind != "grain") < 0.02


def test_a_large_picture_is_sampled() -> None:
    """At 512 px a drift is the same, and every picture's figures are its own, whatever is measured with it."""
    x = pictures(3).repeat_interleave(8, 2).repeat_interleave(8, 3) + 0.05 * noise(3, 3, 512, 512)
    after = drifted(x, torch.tensor([[0.1, 0.0, 0.2, 0.3]] * 3))
    whole = measure_drift(x, after, everywhere(x))
    assert whole[:, KINDS.index("sharpness")].tolist() == pytest.approx([-0.3] * 3, rel=0.1)
    assert whole[:, KINDS.index("saturation")].tolist() == pytest.approx([-0.2] * 3, rel=0.1)
    assert torch.equal(measure_drift(x[1:2], after[1:2], everywhere(x)[1:2]), whole[1:2])


def test_a_picture_that_is_not_finite_and_too_few_pixels_are_unknown() -> None:
    x = pictures(4)
    after, mask = x.clone(), everywhere(x)
    after[1, 0, 3, 3] = torch.nan
    mask[2] = False
    mask[3] = False
    mask[3, :8, :8] = True  # 64 pixels, of which every third is looked at
    found = measure_drift(x, after, mask)
    assert found.isnan().all(1).tolist() == [False, True, True, True] and not found[0].isnan().any()


def test_the_world_is_measured_where_nothing_was_touched() -> None:
    """The pictures that the instructions ask for have not drifted, however much was edited; drifted ones have, by as
    much at every turn that still has something untouched; grain needs more of it.
    """
    sessions = [make_session(f"masks/{n}", 4, held_out=False) for n in range(12)]
    tasks = [
        EditTask(id=n, source=render([s.source])[0], instructions=("",) * 4, edit_types=("",) * 4, truth=s)
        for n, s in enumerate(sessions)
    ]
    truth = torch.stack([render([s.scenes()[turn + 1] for s in sessions]) for turn in range(4)])  # (K, N, ...)
    found = measure_rollout(rollout_of(tasks, truth))
    assert found.shape == (12, 4, 6) and found.nan_to_num().abs().max() < 1e-3
    is_known = ~found[..., 0].isnan()
    assert is_known[:, 0].all() and is_known.float().mean() > 0.8
    assert torch.equal(found[..., :5].isnan().any(2), ~is_known) and found[..., 5].isnan().float().mean() < 0.4
    warm = torch.stack([drifted(picture, torch.tensor([0.1, 0, 0, 0]).expand(12, 4)) for picture in truth])
    cast = measure_rollout(rollout_of(tasks, warm))[..., 0]
    alone = measure_rollout(rollout_of(tasks, warm[:, 3:5], group=torch.arange(3, 5)))[..., 0]
    assert torch.equal(alone.nan_to_num(), cast[3:5].nan_to_num())  # whatever is measured beside it
    assert torch.equal(cast.isnan(), ~is_known) and cast.nanmean(0).tolist() == pytest.approx([0.1] * 4, abs=0.02)


def test_users_pictures_are_measured_outside_of_what_is_touched() -> None:
    """Boxes in shares of width and height; the whole picture where no box is known."""
    ball, tree = Region(name="ball", box=(0, 0, 0.5, 0.5)), Region(name="tree", box=(0.5, 0.5, 1, 1))

    def task(*edit_types: str, **what: tuple) -> EditTask:
        return EditTask(
            id=0, source=torch.zeros(3, 8, 8), instructions=("",) * len(edit_types), edit_types=edit_types, **what
        )

    known = task("color_alter", "background_change", objects=(ball, tree), untouched=((tree,), (tree,)))
    first, second = untouched_masks(known)
    assert knows_untouched(known) and not first[:4, :4].any() and first.sum() == 48
    assert second[4:, 4:].all() and second.sum() == 16
    nothing = task("background_change", objects=(ball, tree), untouched=((),))
    assert not untouched_masks(nothing).any()
    for unknown in (task("color_alter"), task("color_alter", objects=(Region(name="ball"),), untouched=((),))):
        assert not knows_untouched(unknown) and untouched_masks(unknown).all()


def test_drifts_of_both_signs_show_in_their_size() -> None:
    tasks = training_tasks(change(Config(), "data", num_turns=1), 0, alone())
    x = torch.stack([task.source for task in tasks])
    drift = torch.zeros(len(x), 4)
    drift[:, 0] = torch.tensor([0.15, -0.15] * (len(x) // 2))
    scores = Scores(rewards={"instruction": torch.ones(len(x), 1)}, weights={}, valid=torch.ones(len(x)).bool())
    figures = rollout_figures(rollout_of(tasks, drifted(x, drift)[None]), scores, alone())
    assert abs(figures["drift/cast_1"]) < 0.05 < 0.1 < figures["drift/cast_size_1"] < 0.17
