"""Real runs of a few seconds, from which every page is tested; conftest.py makes each of them once."""

from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from flux2_parts import MAX_TEXT_TOKENS, save_tiny
from rollouts import GivenRewards

from mteditflow import run
from mteditflow.config import command
from mteditflow.evaluate import held_out
from mteditflow.noise import EVALUATION
from mteditflow.types import Rollout, Scores

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers text, tags and what the page refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(self.html)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def failing(reward: Callable[[Rollout], Scores]) -> Callable[[Rollout], Scores]:
    """A reward that gives every third held-out session no scores."""

    def judge(rollout: Rollout) -> Scores:
        scores = reward(rollout)
        ids = torch.tensor([rollout.tasks[g].id for g in rollout.group.tolist()])
        return replace(scores, valid=scores.valid & ((ids % 3 > 0) | (rollout.noise != EVALUATION)))

    return judge


def judged_by_a_failing_reward(patch: pytest.MonkeyPatch, *modules: Any) -> None:
    """Take the truth away from held-out evaluation, so that the failing reward of the modules judges."""
    for module in (held_out, *modules):
        patch.setattr(module, "has_truth", lambda _: False, raising=False)
    for module in modules:
        patch.setattr(
            module, "build_reward", lambda config, build=module.build_reward: GivenRewards(failing(build(config)))
        )


def train(folder: Path, model: Path, **overrides: Any) -> Path:
    """Train a tiny editor for two iterations with a short evaluation between them; returns the run's folder."""
    values = {
        "model.path": model, "model.max_text_tokens": 8, "lora.rank": 2, "lora.alpha": 4,
        "data.num_turns": 2, "rollout.num_tasks": 1, "rollout.group_size": 2, "rollout.num_steps": 2,
        "rollout.window_size": 1, "rollout.microbatch_size": 4, "optimizer.microbatch_size": 4,
        "evaluation.num_sessions": 4, "evaluation.num_sessions_short": 2,
        "evaluation.num_strips": 2, "evaluation.num_steps": 2, "evaluation.every": 1, "run.num_iterations": 2,
        "run.folder": folder,
    } | {name.replace("__", "."): value for name, value in overrides.items()}  # fmt: skip
    assert command.train([word for name, value in values.items() for word in (f"--{name}", str(value))]) == 0
    return folder


def train_lora(folder: Path, model: Path) -> Path:
    """GRPO of a LoRA on FLUX.1-Kontext, K = 2."""
    return train(folder, model, objective__name="grpo")


def train_weights(folder: Path, model: Path) -> Path:
    """NFT of the weights themselves, K = 1."""
    return train(
        folder, model, objective__name="nft", data__num_turns=1, lora__is_full=True, lora__targets="[]",
        optimizer__learning_rate=1e-4,
    )  # fmt: skip


def train_klein(folder: Path) -> Path:
    """NFT of a LoRA on FLUX.2, with held-out sessions that a judge scores, and some that it cannot score."""
    model = save_tiny(folder.parent / "klein", "klein")
    with pytest.MonkeyPatch.context() as patch:
        judged_by_a_failing_reward(patch, run)
        return train(folder, model, objective__name="nft", model__max_text_tokens=MAX_TEXT_TOKENS["klein"])
