"""Makes the small VLM judge from nothing: `mteditflow pretrain-judge --output FOLDER`.

First the pictures (judge/sessions.py), then `look_batches` in which the vision part alone learns to read them, then
`batches` of whole sessions (judge/lessons.py). The same command goes on after a kill, with the bits it would have had.
What ships is FOLDER/judge, copied to mteditflow/judge/small; docs/judge.md says how well it judges.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from torch import Tensor

from mteditflow.config.reward import RewardConfig
from mteditflow.distributed import local_device
from mteditflow.judge.agreement import held_out_sessions, measure, table
from mteditflow.judge.lessons import Batch, Teacher, draw_pictures, draw_readings, item_targets, make_batch, to_patches
from mteditflow.judge.sessions import (
    Judged,
    compose_session,
    judge_sessions,
    make_cells,
    roll_out_editor,
)
from mteditflow.judge.small import build_model, build_tokenizer, save_processor
from mteditflow.reward.vlm import DIRECT, RUBRIC, THINKING
from mteditflow.reward.vlm_local import LocalVlm
from mteditflow.watch.progress import track
from mteditflow.world.edits import vocabulary
from mteditflow.world.render import atlas
from mteditflow.world.scenes import BACKGROUNDS, IMAGE
from mteditflow.world.verify import Reading, read

TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True, "initializer_range": 0.04,
    "rope_parameters": {"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 10000.0},
}  # fmt: skip
VISION = {
    "depth": 3, "hidden_size": 128, "intermediate_size": 320, "num_heads": 4, "patch_size": 16,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [1], "initializer_range": 0.04,
}  # fmt: skip
NUM_TURNS = 5  # of the sessions that are made; lessons take turns out of them
TURNS = {1: 0.2, 2: 0.3, 3: 0.4, 4: 0.05, 5: 0.05}  # how often a lesson has so many turns
FIRST_SHARE = 0.4  # of the lessons, the first, which have one turn: there is one picture to compare with
JOINT_SHARE = 0.15  # of the lessons, the last, in which the vision part learns too
READOUTS: tuple[Literal["direct", "expected", "thinking"], ...] = ("direct", "expected", "thinking")
ARGUMENTS = ("seed", "num_rollouts", "num_composed", "look_batches", "batches", "batch_size", "learning_rate")
WEIGHTS = {
    "answer": 1.0,
    "digits": 0.0,
    "before": 0.3,
    "wanted": 0.3,
    "change": 1.0,
    "outcome": 0.5,
    "items": 0.2,
}  # of the losses
EMPTY_SHARE = 0.35  # of the places of a composed picture to look at
EDITOR_SHARE, THINKING_SHARE = 0.5, 0.15  # of lessons: sessions of the editor, read-out thinking


def question_texts() -> list[str]:
    """What gets one token each: the sentences around a question, tags, and the words of instructions and thoughts."""
    lines = [RUBRIC, *(line for line in RUBRIC.split("\n") if line), "system\n", "user\n", "assistant\n"]
    around = ["Source image:", "Turn ", ". Instruction:", "\nImage after turn "]
    around += [text for turn in range(1, 10) for text in (f"Turn {turn}. Instruction:", f"\nImage after turn {turn}:")]
    tags = [f"<{end}Turn{turn}Score>" for turn in range(1, 10) for end in ("", "/")]
    thought = ["<Thought>", "</Thought>", " is done", " is half done", " is done wrongly", " is not done", " lost."]
    return [*lines, THINKING, DIRECT, *around, *tags, *thought, *(f" {word}" for word in vocabulary())]


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What is learnt from, and how a batch is drawn of it."""

    cells: Tensor
    editor: list[Judged]
    composed: list[Judged]
    tokenizer: Any

    def draw(self, size: int, random: Random, *, is_first: bool) -> Batch:
        """Draw `size` sessions of one length and read-out, about half of them the editor's; first of one turn."""
        num_turns = 1 if is_first else random.choices(list(TURNS), list(TURNS.values()))[0]
        readout = "thinking" if random.random() < THINKING_SHARE else "direct"
        sessions = []
        for _ in range(size):
            session = random.choice(self.editor if random.random() < EDITOR_SHARE else self.composed)
            first = random.randrange(NUM_TURNS - num_turns + 1)
            sessions.append(session.part(first, first + num_turns))
        return make_batch(self.tokenizer, sessions, draw_pictures(sessions, self.cells, random), readout, random)

    def draw_look(self, size: int, random: Random) -> tuple[Tensor, Tensor]:
        """Draw N pictures to read, (16 N, 1536), and what is in them, (N, 4, 7): composed and the editor's."""
        objects, readings, pictures = atlas().items, list[Reading](), list[Tensor]()
        for _ in range(size // 2):
            cells = tuple(None if random.random() < EMPTY_SHARE else random.choice(objects) for _ in range(4))
            readings.append(Reading(background=random.choice(BACKGROUNDS), cells=cells))
        pictures.append(draw_readings(self.cells, readings))
        for _ in range(size - size // 2):
            session, turn = random.choice(self.editor), random.randrange(NUM_TURNS + 1)
            assert session.pictures is not None
            readings.append(session.readings[turn])
            pictures.append(session.pictures[turn][None])
        return to_patches(torch.cat(pictures)), item_targets(readings)


def make_lessons(tokenizer: Any, args: Namespace) -> Lessons:
    """Make the pictures, or take them from the output folder, and compose sessions."""
    sessions = judge_sessions("editor", args.num_rollouts, NUM_TURNS)
    file = args.output / "pictures.pt"
    if not file.exists():
        started = time.monotonic()
        rolled = [session.pictures for session in roll_out_editor(sessions, args.seed)]
        made = {"cells": make_cells(args.seed), "editor": torch.stack([seen for seen in rolled if seen is not None])}
        _save(made, file)
        print(f"pictures made in {time.monotonic() - started:.0f} s", flush=True)
    made = torch.load(file, weights_only=True)
    found = read(made["editor"].flatten(0, 1) / 127.5 - 1)
    editor = [
        Judged.graded(session.edits, pictures, found[(NUM_TURNS + 1) * i : (NUM_TURNS + 1) * (i + 1)])
        for i, (session, pictures) in enumerate(zip(sessions, made["editor"], strict=True))
    ]
    random = Random(f"judge/{args.seed}")
    composed = [
        compose_session(session, random) for session in judge_sessions("composed", args.num_composed, NUM_TURNS)
    ]
    return Lessons(cells=made["cells"], editor=editor, composed=composed, tokenizer=tokenizer)


def _save(state: dict[str, Any], file: Path) -> None:
    """Write a file whole or not."""
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


def learning_rate(args: Namespace, batch: int) -> float:
    """The rate of a batch: a short warm-up of each part, then a cosine to a twentieth."""
    is_look = batch < args.look_batches
    place, length = (batch, args.look_batches) if is_look else (batch - args.look_batches, args.batches)
    return args.learning_rate * min(1.0, (place + 1) / 100) * (0.525 + 0.475 * math.cos(math.pi * place / length))


def train(vlm: Any, tokenizer: Any, args: Namespace) -> list[dict[str, float]]:
    """Train on looks, then on lessons; gives the curve. Goes on from the state in the output folder."""
    torch.manual_seed(args.seed)
    teacher = Teacher(vlm, tokenizer).train()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    file, total = args.output / "state.pt", args.look_batches + args.batches
    saved: dict[str, Any] = {"batch": 0, "curve": [], "seconds": 0.0, "smooth": {}}
    if file.exists():
        saved = torch.load(file, weights_only=True)
        teacher.load_state_dict(saved["teacher"])
        optimizer.load_state_dict(saved["optimizer"])
    curve, smooth, started = saved["curve"], saved["smooth"], time.monotonic() - saved["seconds"]
    lessons = make_lessons(tokenizer, args) if saved["batch"] < total else None
    for batch in track(range(total), "trained", "batches", first=saved["batch"]):
        assert lessons is not None
        random = Random(f"lesson/{args.seed}/{batch}")
        if batch < args.look_batches:
            losses = {"items": teacher.look(*lessons.draw_look(4 * args.batch_size, random))}
        else:
            progress = (batch - args.look_batches) / args.batches
            lesson = lessons.draw(args.batch_size, random, is_first=progress < FIRST_SHARE)
            losses = teacher.losses(lesson, is_looking=progress >= 1 - JOINT_SHARE)
        _step(optimizer, sum((WEIGHTS[name] * loss for name, loss in losses.items()), torch.zeros(())), args, batch)
        for name, loss in losses.items():
            smooth[name] = 0.98 * smooth.get(name, loss.item()) + 0.02 * loss.item()
        if (batch + 1) % 100 == 0:
            seconds = round(time.monotonic() - started)
            curve.append({"batch": batch + 1, "seconds": seconds, **{n: round(smooth[n], 4) for n in losses}})
            print(", ".join(f"{name} {value}" for name, value in curve[-1].items()), flush=True)
        if (batch + 1) % args.save_every == 0 or batch + 1 == total:
            state = {"teacher": teacher.state_dict(), "optimizer": optimizer.state_dict(), "batch": batch + 1}
            _save(state | {"curve": curve, "smooth": smooth, "seconds": time.monotonic() - started}, file)
            save(vlm, tokenizer, args.output / "judge")
    return curve


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, args: Namespace, batch: int) -> None:
    loss.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        group["lr"] = learning_rate(args, batch)
    optimizer.step()
    optimizer.zero_grad()


def save(vlm: Any, tokenizer: Any, folder: Path) -> None:
    """Write the judge's folder, in bfloat16, which halves it; transformers loads it in the type that is asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    small = build_model(tokenizer, TEXT, VISION, 0)
    small.load_state_dict(vlm.state_dict())
    small.to(torch.bfloat16).save_pretrained(folder)
    save_processor(folder, tokenizer, VISION["patch_size"], (IMAGE**2, IMAGE**2))


def pretrain(args: Namespace) -> None:
    """Make the judge, and measure it; the same command goes on after a kill."""
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(question_texts())
    vlm = build_model(tokenizer, TEXT, VISION, args.seed)
    num_weights = sum(weight.numel() for weight in vlm.parameters())
    print(f"{num_weights} weights, {len(tokenizer)} tokens", flush=True)
    curve, folder = train(vlm, tokenizer, args), args.output / "judge"
    found = measure_judge(str(folder), args.num_sessions)
    said = {name: getattr(args, name) for name in ARGUMENTS}
    record = {"arguments": said, "weights": num_weights, "curve": curve, "agreement": found}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def measure_judge(name: str, num_sessions: int) -> dict[str, dict[str, dict[str, float]]]:
    """Print how far a judge (`reward.vlm`) agrees with the verifier, by each of its read-outs, and give the numbers."""
    sessions, found = held_out_sessions(num_sessions), {}
    for readout in READOUTS:
        started = time.monotonic()
        config = RewardConfig(judge="vlm", vlm=name, readout=readout, temperature=0, num_retries=0)
        agreement = measure(LocalVlm(config, local_device()), sessions, readout)
        seconds = time.monotonic() - started
        print(f"\n{readout}, {seconds / num_sessions * 1000:.0f} ms a session:\n{table(agreement)}", flush=True)
        found[readout] = {name: asdict(part) for name, part in agreement.items()}
    return found
