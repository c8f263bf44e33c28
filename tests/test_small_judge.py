"""The embedded world's small VLM judge: its lessons, the command that makes it, and the one that ships."""

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from jsonargparse import Namespace
from scipy.stats import spearmanr
from torch import Tensor

from mteditflow.config import RewardConfig
from mteditflow.config.model import MINIATURES
from mteditflow.config.reward import SMALL_FOLDER
from mteditflow.judge import pretrain
from mteditflow.judge.agreement import Agreement, ask_about, compare, held_out_sessions, rank_correlation
from mteditflow.judge.lessons import CELLS, Teacher, draw_readings, make_batch, positions, to_patches
from mteditflow.judge.sessions import (
    Judged,
    carry_out,
    compose_session,
    judge_sessions,
    paint_cells,
    roll_out_editor,
    see,
)  # fmt: skip
from mteditflow.judge.small import build_model, build_tokenizer
from mteditflow.pictures import to_uint8
from mteditflow.reward.vlm import Question
from mteditflow.reward.vlm_local import LocalVlm
from mteditflow.world.autoencoder import decode, encode
from mteditflow.world.edits import EDIT_TYPES
from mteditflow.world.render import atlas, compose, render
from mteditflow.world.scenes import BACKGROUNDS
from mteditflow.world.verify import grade, read

CPU = torch.device("cpu")
MARGIN, MIN_RANK = 2.0, 0.6  # points between done and failed turns, and Spearman's correlation


def composed(num: int, num_turns: int) -> list[Judged]:
    random = Random(0)
    return [compose_session(session, random) for session in judge_sessions("test", num, num_turns)]


# Sessions


def test_what_carries_an_edit_out_is_graded_as_done() -> None:
    """Every edit type, in the scene that it was made for."""
    seen = Counter()
    for session in judge_sessions("test", 40, 4):
        for edit, scene in zip(session.edits, session.scenes(), strict=False):
            assert grade([edit], [see(scene)], [see(carry_out(edit, scene))]) == [5], edit
            seen[edit.edit_type] += 1
    assert seen.keys() == {*EDIT_TYPES}


def test_composed_grades_are_all_frequent() -> None:
    """A tenth of 400 turns each, at least: a fifth was wanted, where the edit allows it."""
    counts = Counter(score for session in composed(100, 4) for score in session.grades)
    assert counts.keys() == {1, 2, 3, 4, 5} and min(counts.values()) >= 40


def test_cells_are_those_of_pictures_through_the_autoencoder() -> None:
    vae = FluxKontextPipeline.from_pretrained(MINIATURES["embedded"]).vae
    scenes = [session.source for session in judge_sessions("test", 2, 1)]
    readings, items = [see(scene) for scene in scenes], atlas().rows(scenes)
    cells = torch.zeros(len(BACKGROUNDS), 4, len(atlas().items), 3, 32, 32, dtype=torch.uint8)
    for rows, scene in zip(items.split(1), scenes, strict=True):
        paint_cells(vae, cells, rows, BACKGROUNDS.index(scene.background))
    with torch.no_grad():
        expected = torch.cat([to_uint8(decode(vae, encode(vae, render([scene])))) for scene in scenes])
    assert torch.equal(draw_readings(cells, readings), expected)
    assert read(expected / 127.5 - 1) == readings


# Lessons


def test_a_lesson_is_what_the_processor_makes(tmp_path: Path) -> None:
    """Tokens, patches and positions of a batch are those of a question that is asked, answer and padding apart."""
    tokenizer = build_tokenizer(pretrain.question_texts())
    vlm = build_model(tokenizer, pretrain.TEXT, pretrain.VISION, seed=0)
    pretrain.save(vlm, tokenizer, tmp_path)
    judge = LocalVlm(local_config(str(tmp_path)), CPU)
    sessions = [
        Judged(edits=s.edits, pictures=draw_readings(None, s.readings), readings=s.readings, grades=s.grades)
        for s in composed(3, 2)
    ]
    pictures = torch.cat([s.pictures for s in sessions if s.pictures is not None])
    batch = make_batch(tokenizer, sessions, pictures, "direct", Random(0))
    image = Teacher(vlm, tokenizer).image
    for row, session in enumerate(sessions):
        asked = judge.prepare([question(session)])
        length = asked["input_ids"].shape[1]
        assert batch.ids[row, :length].tolist() == asked["input_ids"][0].tolist()
        assert torch.equal(batch.pixels.unflatten(0, (3, -1))[row], asked["pixel_values"])
        expected, _ = vlm.model.get_rope_index(
            asked["input_ids"], mm_token_type_ids=asked["mm_token_type_ids"], image_grid_thw=asked["image_grid_thw"]
        )
        assert torch.equal(positions(batch.ids, image)[:, row, :length], expected[:, 0])
        said = batch.target[row][batch.target[row] >= 0]
        assert tokenizer.decode(said) == f"{answer_of(session)}<|im_end|>"
        assert tokenizer.decode(batch.target[row][batch.is_digit[row]]) == "".join(map(str, session.grades))
        assert batch.ids.shape[1] - length < 20 and length < 70  # what a question of two turns costs
    assert (batch.ids == image).sum() == 3 * 3 * CELLS and torch.equal(batch.pixels, to_patches(pictures))


def answer_of(session: Judged) -> str:
    return "\n".join(f"<Turn{turn}Score>{score}</Turn{turn}Score>" for turn, score in enumerate(session.grades, 1))


def question(session: Judged, order: list[int] | None = None) -> Question:
    assert session.pictures is not None
    pictures = session.pictures if order is None else session.pictures[order]
    return Question(
        images=tuple(pictures), instructions=tuple(edit.instruction for edit in session.edits), readout="direct",
        key=torch.zeros(5, dtype=torch.int64),
    )  # fmt: skip


# Training


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of a small training: two sessions of the editor, and clean cells, which take no autoencoder."""
    file = tmp_path_factory.mktemp("pictures") / "pictures.pt"
    items = torch.arange(len(atlas().items))[:, None].expand(-1, 4)
    cells = [to_uint8(compose(items, torch.full((len(items),), b))) for b in range(len(BACKGROUNDS))]
    cut = torch.stack(cells).unflatten(-1, (2, 32)).unflatten(-3, (2, 32))  # (8, M, 3, 2, 32, 2, 32)
    rolled = roll_out_editor(judge_sessions("editor", 2, pretrain.NUM_TURNS), seed=0)
    seen = [session.pictures for session in rolled if session.pictures is not None]
    torch.save({"cells": cut.permute(0, 3, 5, 1, 2, 4, 6).flatten(1, 2), "editor": torch.stack(seen)}, file)
    return file


def run(folder: Path, pictures: Path) -> dict[str, Tensor]:
    """Train for two looks and four lessons, or for what is left of them: the weights."""
    folder.mkdir(exist_ok=True)
    if not (folder / "pictures.pt").exists():
        (folder / "pictures.pt").symlink_to(pictures)
    args = Namespace(
        output=folder, seed=3, num_rollouts=2, num_composed=6, look_batches=2, batches=4, batch_size=3,
        learning_rate=1e-3, save_every=1,
    )  # fmt: skip
    tokenizer = build_tokenizer(pretrain.question_texts())
    vlm = build_model(tokenizer, pretrain.TEXT, pretrain.VISION, args.seed)
    pretrain.train(vlm, tokenizer, args)
    return vlm.state_dict()


def test_training_goes_on_with_the_bits_it_would_have_had(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the third of six batches."""
    whole, saved = run(tmp_path / "whole", pictures), []

    def kill(*_: object) -> None:
        saved.append(0)
        if len(saved) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "save", kill)
        run(tmp_path / "cut", pictures)
    cut = run(tmp_path / "cut", pictures)
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


# Agreement


def test_agreement_by_hand() -> None:
    grades, scores = torch.tensor([1, 5, 3, 4]), torch.tensor([2.0, 5.0, 2.6, torch.nan])
    found = compare(grades, scores)
    expected = Agreement(num=3, bias=0.2, std=0.52**0.5, rank=1.0, exact=2 / 3, faults=1)
    for name in ("num", "bias", "std", "exact", "faults"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-6)
    a, b = torch.randint(5, (200,)), torch.randint(3, (200,)) + torch.arange(200) / 50
    expected_rank: Any = spearmanr(a, b)
    assert rank_correlation(a, b) == pytest.approx(expected_rank.statistic, abs=1e-6)


# The judge that ships


def local_config(vlm: str) -> RewardConfig:
    return RewardConfig(judge="vlm", vlm=vlm, readout="direct", temperature=0, num_retries=0, num_parallel=32)


@pytest.fixture(scope="module")
def small() -> LocalVlm:
    return LocalVlm(local_config("small"), CPU)


def test_the_shipped_judge_is_small_enough() -> None:
    assert sum(path.stat().st_size for path in SMALL_FOLDER.iterdir()) <= 15 * 2**20


def test_the_shipped_judge_tells_done_from_failed(small: LocalVlm) -> None:
    """On 24 held-out sessions of 3 turns, half the editor's."""
    sessions = [session for part in held_out_sessions(24).values() for session in part]
    scores, answers = ask_about(small, sessions, "direct")
    assert all(answer.fault == "" for answer in answers)
    grades = torch.tensor([session.grades for session in sessions])
    assert scores[grades == 5].mean() - scores[grades == 1].mean() >= MARGIN
    found = compare(grades.flatten(), scores.flatten())
    assert found.rank >= MIN_RANK


def test_the_shipped_judge_sees_pictures_in_their_order(small: LocalVlm) -> None:
    """The edits of two turns swapped: neither turn shows what its instruction asked for."""
    sessions = [s for part in held_out_sessions(24).values() for s in part if s.grades[:2] == (5, 5)]
    cut = [session.part(0, 2) for session in sessions]
    assert len(cut) >= 2
    right = [sum(answer.grades or ()) for answer in small([question(session) for session in cut])]
    wrong = [sum(answer.grades or ()) for answer in small([question(session, [0, 2, 1]) for session in cut])]
    assert sum(right) > sum(wrong)
