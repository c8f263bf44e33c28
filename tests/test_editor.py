"""The embedded editor: a stock pipeline folder that edits, and the command that makes one."""

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline

from mteditflow.config import Config, DataConfig, EvaluationConfig, LoraConfig, ModelConfig
from mteditflow.config.model import MINIATURES
from mteditflow.data import held_out_tasks
from mteditflow.pictures import from_pil, round_to_8_bit, to_pil
from mteditflow.policy import build_policy
from mteditflow.types import EditTask
from mteditflow.world.render import render
from mteditflow.world.verify import grade, read

FOLDER = MINIATURES["embedded"]


def held_out(num_sessions: int) -> list[EditTask]:
    """The first held-out sessions, of one turn."""
    evaluation = EvaluationConfig(num_sessions=num_sessions, num_sessions_short=num_sessions)
    return held_out_tasks(Config(data=DataConfig(num_turns=1), evaluation=evaluation))


@pytest.mark.parametrize("name", list(MINIATURES))
def test_folder_is_small_enough_to_ship(name: str) -> None:
    assert sum(path.stat().st_size for path in MINIATURES[name].rglob("*") if path.is_file()) <= 10 * 2**20


def test_stock_pipeline_loads_it_and_edits() -> None:
    """At least half of 24 first edits pass the verifier: 75 % did at release, and 12 of 24 at 75 % is 3 sigma off."""
    pipeline = FluxKontextPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    tasks, size = held_out(24), Config().model.height
    edits = []
    for task in tasks:
        noise = torch.Generator().manual_seed(task.id)
        edit = pipeline(
            image=to_pil(task.source), prompt=task.instructions[0], height=size, width=size, max_area=size * size,
            _auto_resize=False, max_sequence_length=Config().model.max_text_tokens, guidance_scale=2.5,
            num_inference_steps=8, generator=noise, return_dict=False,
        )[0][0]  # fmt: skip
        edits.append(from_pil(edit))
    before = read(torch.stack([task.source for task in tasks]))
    grades = grade([task.truth.edits[0] for task in tasks], before, read(torch.stack(edits)))
    assert sum(g >= 4 for g in grades) >= 12


def test_verifier_reads_through_the_autoencoder() -> None:
    """True renders of edits, once through encoder, decoder and 8 bits, still pass: what fails is the editor's doing."""
    policy = build_policy(ModelConfig(), LoraConfig(), seed=0, has_old=False)
    tasks = held_out(100)
    edits = [task.truth.edits[0] for task in tasks]
    with torch.no_grad():
        pictures = round_to_8_bit(policy.decode(policy.encode_image(render([edit.after for edit in edits]))))
    grades = grade(edits, read(torch.stack([task.source for task in tasks])), read(pictures))
    assert sum(g >= 4 for g in grades) >= 97
