"""Consistency by DINO features: against the formula written out in float64, and what each part sees."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_judge import PREPARATION, save_dino
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import AutoModel, LlamaConfig, LlamaModel

from mteditflow.reward.dino import DinoConsistency, background_weights, boxes, nearest_grid
from mteditflow.types import EditTask, Region

CPU = torch.device("cpu")
FAMILIES = {"dinov3": (4, "bilinear"), "dinov2": (0, "bicubic")}  # registers, interpolation
# Two layers of width 32 in float32: features are off by some 30 roundings, a cosine by no more.
TOLERANCE = 30 * 2.0**-24 * 4
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.6, 0.2, 0.9, 0.7)
CAT, DOG, SKY = Region(name="cat", box=LEFT), Region(name="dog", box=RIGHT), Region(name="sky")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family."""
    paths = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, path in paths.items():
        save_dino(path, family)
    return paths


def measure_of(folder: Path, **values: Any) -> DinoConsistency:
    return DinoConsistency(str(folder), CPU, **values)


def photograph() -> Tensor:
    """(3, 36, 48) in [-1, 1], of an astronaut's face and the flag behind her."""
    data = pytest.importorskip(
        "skimage.data", reason="scikit-image has the photographs: pip install 'mteditflow[test]'"
    )
    picture = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[:, 0:288, 96:480] / 127.5 - 1
    return interpolate(picture[None], (36, 48), mode="area")[0]


def task_of(source: Tensor, **values: Any) -> EditTask:
    return EditTask(id=0, source=source, instructions=("a", "b"), edit_types=("color_alter", "color_alter"), **values)


def edited(source: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """Another picture within a box (a part of its mirrored negative is added), the same outside of it."""
    height, width = source.shape[1:]
    picture, (x0, y0, x1, y1) = source.clone(), box
    rows, columns = slice(round(y0 * height), round(y1 * height)), slice(round(x0 * width), round(x1 * width))
    picture[:, rows, columns] = 0.6 * source[:, rows, columns] - 0.4 * source[:, rows, columns].flip(1)
    return picture


# The reference, written out in float64, one picture at a time


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


class Reference:
    def __init__(
        self, folder: Path, family: str, num_skipped: int | None = None, grid: tuple[int, int] = (6, 6)
    ) -> None:
        num_registers, self.mode = FAMILIES[family]
        self.num_skipped = num_skipped or 1 + num_registers
        self.model, self.grid = AutoModel.from_pretrained(folder).double().eval(), grid

    def tokens(self, picture: Tensor) -> Tensor:
        mean, std = (torch.tensor(PREPARATION[name]).double()[:, None, None] for name in ("image_mean", "image_std"))
        small = interpolate((picture.double()[None] + 1) / 2, (24, 24), mode=self.mode, antialias=True)
        with torch.no_grad():
            return self.model((small - mean) / std).last_hidden_state[0]

    def background(self, before: Tensor, after: Tensor, taken: list[tuple[float, float, float, float]]) -> float:
        rows, columns = self.grid
        pooled = [torch.zeros(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)]
        for which, picture in enumerate((before, after)):
            for place, token in enumerate(self.tokens(picture)[self.num_skipped :]):
                top, left = divmod(place, columns)
                y = [int(top * 24 / rows), -int(-(top + 1) * 24 / rows // 1)]
                x = [int(left * 24 / columns), -int(-(left + 1) * 24 / columns // 1)]
                pixels = [((i + 0.5) / 24, (j + 0.5) / 24) for i in range(*y) for j in range(*x)]
                free = [not any(b[0] <= u < b[2] and b[1] <= v < b[3] for b in taken) for v, u in pixels]
                weight = sum(free) / len(free)
                if weight >= 0.5:
                    pooled[which] += weight * token / token.norm()
        return cosine(*pooled)

    def object(self, before: Tensor, after: Tensor, box: tuple[float, float, float, float]) -> float:
        height, width = before.shape[1:]
        x0, x1 = int(box[0] * width), int(box[2] * width)
        y0, y1 = int(box[1] * height), int(box[3] * height)
        a, b = (self.tokens(picture[:, y0:y1, x0:x1]) for picture in (before, after))
        return (cosine(a[0], b[0]) + cosine(a[self.num_skipped :].mean(0), b[self.num_skipped :].mean(0))) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_against_the_formula_in_float64(folders: dict[str, Path], family: str) -> None:
    """Two tasks, three rows, two turns: background and objects, after the second turn one object alone."""
    source = photograph()
    tasks = [
        task_of(source, untouched=((CAT, DOG, SKY), (DOG,))),
        task_of(source.flip(2), untouched=((DOG,), (DOG,)), objects=(CAT, SKY)),
    ]
    group = torch.tensor([0, 0, 1])
    turns = [
        [edited(source, RIGHT), edited(source, LEFT), edited(source.flip(2), (0.5, 0.0, 1.0, 0.4))],
        [edited(source, (0.0, 0.0, 1.0, 0.5)), source, edited(source.flip(2), LEFT)],
    ]
    found = measure_of(folders[family]).score(tasks, group, torch.stack([torch.stack(turn) for turn in turns]))
    reference = Reference(folders[family], family)
    for row, g in enumerate(group.tolist()):
        for turn, regions in enumerate([(LEFT, RIGHT), (RIGHT,)] if g == 0 else [(RIGHT,), (RIGHT,)]):
            before, after = tasks[g].source, turns[turn][row]
            background = reference.background(before, after, [LEFT, RIGHT])
            objects = [reference.object(before, after, box) for box in regions]
            expected = (background + sum(objects) / len(objects)) / 2
            assert abs(found[row, turn].item() - expected) <= TOLERANCE, (row, turn)
    assert found[1, 1] == pytest.approx(1, abs=TOLERANCE) and found.min() < 0.97  # the source itself; others differ


def test_the_parts_see_their_own_places(folders: dict[str, Path]) -> None:
    """An edit within the object's box costs its part; one outside costs the background's."""
    source, measure = photograph(), measure_of(folders["dinov3"])
    reference = Reference(folders["dinov3"], "dinov3")
    task = task_of(source, untouched=((DOG,), (DOG,)))
    pictures = torch.stack([torch.stack([edited(source, RIGHT), edited(source, LEFT)])] * 2)
    found = measure.score([task], torch.zeros(2, dtype=torch.int64), pictures)
    outside = replace(task, edit_types=("background_change", "color_alter"))  # objects alone count
    alone = measure.score([outside], torch.zeros(2, dtype=torch.int64), pictures)
    assert alone[0, 0] == pytest.approx(reference.object(source, pictures[0, 0], RIGHT), abs=TOLERANCE)
    assert alone[1].tolist() == pytest.approx([1, 1], abs=TOLERANCE)  # nothing within its box has changed
    background = 2 * found - alone
    expected = [reference.background(source, picture, [RIGHT]) for picture in pictures[0]]
    assert background[:, 0].tolist() == pytest.approx(expected, abs=3 * TOLERANCE)
    assert background[0, 0] > background[1, 0]


def test_where_a_part_is_undefined(folders: dict[str, Path]) -> None:
    source, measure = photograph(), measure_of(folders["dinov3"])
    reference, group = Reference(folders["dinov3"], "dinov3"), torch.tensor([0])
    picture = edited(source, LEFT)
    pictures = torch.stack([picture[None], picture[None]])
    whole = reference.background(source, picture, [])
    unknown = task_of(source)  # no boxes: the whole picture
    assert measure.score([unknown], group, pictures)[0].tolist() == pytest.approx([whole] * 2, abs=TOLERANCE)
    nameless = task_of(source, untouched=((SKY,), (SKY,)))
    assert measure.score([nameless], group, pictures)[0].tolist() == pytest.approx([whole] * 2, abs=TOLERANCE)
    lost = replace(unknown, edit_types=("color_alter", "background_change"))
    found = measure.score([lost], group, pictures)[0]
    assert found[0].item() == pytest.approx(whole, abs=TOLERANCE) and found[1].isnan()
    everything = task_of(source, objects=(Region(name="all", box=(0.0, 0.0, 1.0, 1.0)),), untouched=((DOG,), ()))
    found = measure.score([everything], group, pictures)[0]
    assert found[0].item() == pytest.approx(reference.object(source, picture, RIGHT), abs=TOLERANCE)
    assert found[1].isnan()
    assert boxes(replace(nameless, objects=(CAT, DOG), untouched=((DOG,), (SKY,)))) == [LEFT, RIGHT]


def test_registers_for_patches_as_the_public_evaluator(folders: dict[str, Path]) -> None:
    """40 tokens for 36 patches: a grid of 5 x 8, whose weights are of other places."""
    source, path = photograph(), folders["dinov3"]
    assert nearest_grid(200, 1.0) == (10, 20) and nearest_grid(196, 1.0) == (14, 14) and nearest_grid(40, 1.0) == (5, 8)
    task = task_of(source, untouched=((DOG,), (DOG,)))
    picture = edited(source, LEFT)
    pictures, group = torch.stack([picture[None]] * 2), torch.tensor([0])
    found = measure_of(path, is_edival_compat=True).score([task], group, pictures)[0, 0].item()
    reference = Reference(path, "dinov3", num_skipped=1, grid=(5, 8))
    expected = (reference.background(source, picture, [RIGHT]) + reference.object(source, picture, RIGHT)) / 2
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert abs(found - measure_of(path).score([task], group, pictures)[0, 0].item()) > 10 * TOLERANCE


def test_background_weights() -> None:
    half = background_weights([LEFT], (24, 24), (6, 6)).reshape(6, 6)
    assert half[:, :3].eq(0).all() and half[:, 3:].eq(1).all()
    quarter = background_weights([(0.0, 0.0, 1 / 24, 1.0), (0.0, 0.0, 1 / 24, 1.0)], (24, 24), (6, 6)).reshape(6, 6)
    assert quarter[:, 0].eq(0.75).all() and quarter[:, 1:].eq(1).all()  # boxes that overlap count once
    most = background_weights([(0.0, 0.0, 3 / 24, 1.0)], (24, 24), (6, 6)).reshape(6, 6)
    assert most[:, 0].eq(0).all()  # a quarter is left: below a half


def test_bits_do_not_depend_on_the_batch(folders: dict[str, Path]) -> None:
    source, measure = photograph(), measure_of(folders["dinov3"])
    tasks = [task_of(source, untouched=((CAT, DOG), (DOG,))), task_of(source.flip(1), untouched=((DOG,), ()))]
    pictures = torch.stack([edited(source, box) for box in (LEFT, RIGHT, LEFT, RIGHT)]).expand(2, 4, 3, 36, 48)
    sizes: set[int] = set()
    measure.model.register_forward_pre_hook(
        lambda _module, _args, inputs: sizes.add(len(inputs["pixel_values"])), with_kwargs=True
    )
    whole = measure.score(tasks, torch.tensor([0, 0, 1, 1]), pictures)
    assert torch.equal(measure.score(tasks[1:], torch.tensor([0]), pictures[:, 3:]), whole[3:])
    assert torch.equal(measure.score(tasks[::-1], torch.tensor([1, 0]), pictures[:, [1, 2]]), whole[[1, 2]])
    assert sizes == {8}  # so small a model may have the same bits in any batch; a large one has not


def test_models_that_have_no_such_features(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"cannot be loaded .* accept its licence .* or take facebook/dinov2-small"
    ) as e:
        measure_of(tmp_path)
    assert "\n" not in str(e.value)
    small: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaModel(LlamaConfig(vocab_size=9, **small)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a llama: must be one of dinov2"):
        measure_of(tmp_path)
