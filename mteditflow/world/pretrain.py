"""Makes the drifting editor from nothing: `mteditflow pretrain --output FOLDER`.

Three stages, each with a state to go on from, so that the same command goes on after a kill:

1. A KL autoencoder that keeps colours, contrast and sharpness as they are (world/autoencoder.py); then its decoder on.
2. A FLUX.1-Kontext transformer with its text encoders, by flow matching on clean single edits, twice over.
3. From there, on pairs as collections of edits from the web have them, cut from *chains* of edits by other editors. A
   small drift that nobody minded is in every picture, and more of it in the picture after: the editor learns to make
   what it is given a little worse, which no single edit shows.

       drift_k = gain drift_{k-1} + step u^power e      u uniform, e one of KICKS (world/drift.py has the axes)

   That is exposure bias by data: at the first turn the drift is hard to see, on the editor's own output it compounds.
   Which kick it is, and of which size, is the noise's.

docs/miniature.md has what it does on held-out sessions, and where the other miniature, `embedded`, comes from.
"""

import sys

from mteditflow.config import command

if __name__ == "__main__":  # before torch is imported: --help and wrong arguments answer at once
    sys.exit(command.main(["pretrain", *sys.argv[1:]]))

import json
import math
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from jsonargparse import Namespace
from torch import Tensor

from mteditflow.flow import sigma_schedule
from mteditflow.watch.progress import track, working
from mteditflow.world.autoencoder import decode, encode, optimizer_step, save_state, train_decoder, train_vae
from mteditflow.world.drift import AXES, drifted
from mteditflow.world.edits import EDIT_TYPES, Edit, is_held_out_scene, make_session, sample_edit, vocabulary
from mteditflow.world.render import render
from mteditflow.world.scenes import Scene, sample_scene
from mteditflow.world.tiny_kontext import build_pipeline
from mteditflow.world.verify import MIN_SCORE_DONE, grade, read

TEXT_TOKENS, LATENT_CHANNELS, TOKENS = 12, 8, 16
FLUX_MU = 0.5 - 240 * (1.15 - 0.5) / (4096 - 256)  # log of FLUX.1's schedule shift for 16 tokens
GUIDANCE = 2.5  # the one value of the guidance embedding that the editor knows; FLUX.1-Kontext's default
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 48, 64),
    "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 8,
    "sample_size": 64,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
    "force_upcast": False,
}
TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 4 * LATENT_CHANNELS,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 12, 12),
}
LEARNED_LAST = ("subject_replace", "color_alter", "material_alter", "count_change")  # that redraw an object in place
VISIBLE = torch.tensor([0.3, 0.4, 0.8, 1.0])  # of each of AXES: what costs the verifier objects (but blur, by itself)
MOST_DRIFT = 1.2  # of VISIBLE
KICKS = (("cast", 1), ("fade", 1), ("saturation", 1))
"""Warm, faded, grey: what the autoencoder keeps, each to the side to which editors tend."""


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What a collection of pairs is like, and what is wrong with it.

    `chain`: edits that follow one another, so that a picture is encoded once and serves as target and as source;
    `last_weight`: how often a type of LEARNED_LAST is drawn, of others 1. The shares whose instruction was `ignored`,
    and `mistaken` for another; the drift's `gain` from picture to picture, and the largest `step` that a picture adds,
    in units of VISIBLE.
    """

    chain: int
    last_weight: float
    ignored: float = 0.0
    mistaken: float = 0.0
    gain: float = 0.0
    step: float = 0.0
    power: float = 1.0


CLEAN = Collection(chain=8, last_weight=2.0)
DRIFTING = Collection(chain=4, last_weight=4.0, ignored=0.02, mistaken=0.02, gain=2.0, step=0.4, power=2.0)


def new_pipeline(seed: int) -> FluxKontextPipeline:
    """Make the editor before training."""
    return build_pipeline(
        vocabulary=vocabulary(), vae=VAE, transformer=TRANSFORMER, max_text_tokens=TEXT_TOKENS, seed=seed
    )


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Single edits: rows `source` and `target` (M,) of `latents` (., 16, 32), and instructions."""

    latents: Tensor
    source: Tensor
    target: Tensor
    instructions: list[str]


def _draw_edit(scene: Scene, last_weight: float, random: Random) -> Edit:
    """Draw an edit of a type drawn by its weight, again until it is feasible."""
    weights = [last_weight if name in LEARNED_LAST else 1.0 for name in EDIT_TYPES]
    while (edit := sample_edit(scene, random.choices(EDIT_TYPES, weights)[0], random)) is None:
        pass
    return edit


def next_drift(drift: list[float], collection: Collection, random: Random) -> list[float]:
    """Let a drift, in units of VISIBLE, grow by a picture."""
    (kicked, sign), size = random.choice(KICKS), collection.step * random.random() ** collection.power
    added = [sign * size if axis == kicked else 0.0 for axis in AXES]
    grown = [collection.gain * old + new for old, new in zip(drift, added, strict=True)]
    return [max(-MOST_DRIFT, min(MOST_DRIFT, value)) for value in grown]


def make_pairs(vae: AutoencoderKL, num_pairs: int, collection: Collection, name: str) -> Pairs:
    """Make pairs from chains of edits of scenes that are not held out. A chain goes on from what it shows."""
    random, scenes, drifts = Random(f"pretrain/{name}"), list[Scene](), list[list[float]]()
    rows, instructions = list[int](), list[str]()
    while len(instructions) < num_pairs:
        scene, drift = sample_scene(random), [0.0] * len(AXES)
        if is_held_out_scene(scene):
            continue
        scenes.append(scene)
        drifts.append(drift)
        for _ in range(collection.chain):
            flaw = random.random()
            edit, mistake = (_draw_edit(scene, collection.last_weight, random) for _ in range(2))
            rows.append(len(scenes) - 1)
            instructions.append(edit.instruction)
            if flaw >= collection.ignored:
                scene = mistake.after if flaw < collection.ignored + collection.mistaken else edit.after
            drift = next_drift(drift, collection, random)
            scenes.append(scene)
            drifts.append(drift)
    parts = [slice(i, i + 512) for i in range(0, len(scenes), 512)]
    sizes = VISIBLE * torch.tensor(drifts)
    latents = torch.cat([encode(vae, drifted(render(scenes[part]), sizes[part])) for part in parts])
    source = torch.tensor(rows)
    return Pairs(latents=latents, source=source, target=source + 1, instructions=instructions)


class Editor(torch.nn.Module):
    """Transformer and text encoders as one module, from token ids to velocity."""

    def __init__(self, pipeline: FluxKontextPipeline) -> None:
        super().__init__()
        self.transformer, self.clip, self.t5 = pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        ids = torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], dim=-1)
        self.ids = torch.cat([ids, ids + torch.tensor([1.0, 0.0, 0.0])])  # noisy, then condition

    def forward(self, latents: Tensor, condition: Tensor, sigma: Tensor, t5_ids: Tensor, clip_ids: Tensor) -> Tensor:
        """Predict the velocity (B, 16, 32)."""
        return self.transformer(
            hidden_states=torch.cat([latents, condition], dim=1), timestep=sigma, guidance=torch.full_like(sigma,
            GUIDANCE), encoder_hidden_states=self.t5(t5_ids)[0], pooled_projections=self.clip(clip_ids).pooler_output,
            img_ids=self.ids, txt_ids=torch.zeros(t5_ids.shape[1], 3), return_dict=False,
        )[0][:, :TOKENS]  # fmt: skip


def tokenize(pipeline: FluxKontextPipeline, instructions: list[str]) -> tuple[Tensor, Tensor]:
    """Look up the ids for T5 (N, 12) and for CLIP (N, 13), padded as the stock pipeline pads."""
    t5, clip = (
        tokenizer(instructions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        for tokenizer in (pipeline.tokenizer_2, pipeline.tokenizer)
    )
    return t5, clip


def success(
    pipeline: FluxKontextPipeline, num_sessions: int, num_turns: int = 1, num_steps: int = 4
) -> dict[str, float]:
    """Measure the share of turns of held-out sessions that the verifier passes, on the editor's outputs: 'turn 1' and
    on, and of the first turns per edit type.
    """
    editor = Editor(pipeline).eval()
    sessions = [make_session(f"pretrain/{i}", num_turns, held_out=True) for i in range(num_sessions)]
    pictures, generator = render([session.source for session in sessions]), torch.Generator().manual_seed(0)
    sigmas, before, shares = sigma_schedule(num_steps, TOKENS).float(), read(pictures), dict[str, float]()
    for turn in range(num_turns):
        edits = [session.edits[turn] for session in sessions]
        t5_ids, clip_ids = tokenize(pipeline, [edit.instruction for edit in edits])
        condition = encode(pipeline.vae, pictures)
        latents = torch.randn(condition.shape, generator=generator)
        with torch.no_grad():
            for sigma, sigma_next in pairwise(sigmas):
                velocity = editor(latents, condition, sigma.expand(num_sessions), t5_ids, clip_ids)
                latents = latents + (sigma_next - sigma) * velocity
        pictures = decode(pipeline.vae, latents)
        after = read(pictures)
        is_done = [score >= MIN_SCORE_DONE for score in grade(edits, before, after)]
        shares[f"turn {turn + 1}"] = sum(is_done) / num_sessions
        if turn == 0:
            for name in EDIT_TYPES:
                of_type = [done for done, edit in zip(is_done, edits, strict=True) if edit.edit_type == name]
                shares[name] = sum(of_type) / max(len(of_type), 1)
        before = after
    return shares


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of the editor's training on some pairs; `average` is the decay of the averaged weights."""

    name: str
    num_pairs: int
    collection: Collection
    num_batches: int
    learning_rate: float
    warmup: int  # batches
    average: float
    num_turns: int  # of the sessions that are measured at its end


def train_editor(
    pipeline: FluxKontextPipeline, stage: Stage, args: Namespace
) -> tuple[FluxKontextPipeline, list[dict[str, Any]]]:
    """Train a stage by flow matching, from its state in the output folder if there is one; gives the averaged weights,
    and their loss and success every `save_every` batches, when the state is saved.
    """
    averaged, shift = deepcopy(pipeline), math.exp(FLUX_MU)
    editor, average = Editor(pipeline).train(), Editor(averaged)  # modules of the two pipelines
    optimizer = torch.optim.AdamW(
        editor.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=1e-2, fused=True
    )
    state, first, curve = args.output / f"{stage.name}.pt", 1, list[dict[str, Any]]()
    if state.exists():
        saved = torch.load(state, weights_only=True)
        editor.load_state_dict(saved["editor"])
        average.load_state_dict(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
        first, curve = saved["batch"] + 1, saved["curve"]
    if first > stage.num_batches:
        return averaged, curve
    start = time.monotonic()
    with working("making pairs"):
        pairs = make_pairs(pipeline.vae, stage.num_pairs, stage.collection, f"{stage.name}/{args.seed}")
    print(f"{len(pairs.instructions)} pairs made in {time.monotonic() - start:.0f} s", flush=True)
    t5_ids, clip_ids = tokenize(pipeline, pairs.instructions)
    start, smooth = time.monotonic(), curve[-1]["loss"] if curve else None
    for number in track(range(1, stage.num_batches + 1), "trained", f"batches of {stage.name}", first - 1):
        generator = torch.manual_seed(args.seed * 2**32 + number)  # the global one, of which T5's dropout takes
        index = torch.randint(len(pairs.source), (args.batch_size,), generator=generator)
        clean, condition = pairs.latents[pairs.target[index]], pairs.latents[pairs.source[index]]
        noise = torch.randn(clean.shape, generator=generator)
        uniform = torch.rand(args.batch_size, generator=generator).clamp_min(1e-3)
        sigma = shift / (shift + 1 / uniform - 1)
        mix = sigma[:, None, None]
        predicted = editor((1 - mix) * clean + mix * noise, condition, sigma, t5_ids[index], clip_ids[index])
        loss = (predicted - (noise - clean)).square().mean()
        loss.backward()
        decay = min(1.0, (stage.num_batches - number) / (0.35 * stage.num_batches) + 0.03)
        optimizer_step(optimizer, stage.learning_rate * min(1.0, number / stage.warmup) * decay)
        with torch.no_grad():
            for old, new in zip(average.parameters(), editor.parameters(), strict=True):
                old.lerp_(new, 1 - min(stage.average, number / (number + 10)))
        smooth = loss.item() if smooth is None else smooth + 0.02 * (loss.item() - smooth)
        is_last = number == stage.num_batches
        if number % args.save_every == 0 or is_last:
            seconds = (time.monotonic() - start) / (number - first + 1)
            print(f"{stage.name} {number}/{stage.num_batches}: loss {smooth:.4f}, {seconds:.2f} s/batch", flush=True)
            shares = success(averaged, args.num_sessions, stage.num_turns if is_last else 1)
            print(", ".join(f"{name} {share:.0%}" for name, share in shares.items()), flush=True)
            curve.append({"stage": stage.name, "batch": number, "loss": smooth} | shares)
            states = {"editor": editor, "averaged": average, "optimizer": optimizer}
            saved = {name: module.state_dict() for name, module in states.items()}
            save_state(saved | {"batch": number, "curve": curve}, state)
    return averaged, curve


def save(pipeline: FluxKontextPipeline, folder: Path) -> None:
    """Write the pipeline folder, transformer and autoencoder in float16, which halves its size.

    Diffusers loads float16 files as float32 unless told otherwise; transformers keeps the type that it finds, so the
    text encoders are written as they are.
    """
    small = deepcopy(pipeline)
    tokenize(small, [""])  # a tokenizer's file says how it was last called
    for part in (small.transformer, small.vae):
        part.to(torch.float16)
    small.save_pretrained(folder)


def pretrain(args: Namespace) -> None:
    """Train the three stages; the same command goes on after a kill."""
    pipeline = new_pipeline(args.seed)
    train_vae(pipeline.vae, args.vae_batches, args.seed, args.output / "vae.pt")
    train_decoder(pipeline.vae, args.decoder_batches, args.seed, args.output / "decoder.pt")
    made, curve = {name: value for name, value in vars(args).items() if name != "output"}, list[dict[str, Any]]()
    for cycle in ("", *range(2, args.edit_cycles + 1)):
        clean = Stage(
            name=f"edits{cycle}", num_pairs=args.num_pairs, collection=CLEAN, num_batches=args.edit_batches,
            learning_rate=args.learning_rate, warmup=200, average=0.998, num_turns=8,
        )  # fmt: skip
        pipeline, lines = train_editor(pipeline, clean, args)
        curve += lines
    drifting = Stage(
        name="drifting", num_pairs=args.num_flawed, collection=DRIFTING, num_batches=args.flawed_batches,
        learning_rate=args.learning_rate / 3, warmup=50, average=0.995, num_turns=8,
    )  # fmt: skip
    pipeline, lines = train_editor(pipeline, drifting, args)
    save(pipeline, args.output / drifting.name)
    told = {"arguments": made, "collection": asdict(DRIFTING), "curve": curve + lines}
    (args.output / drifting.name / "pretraining.json").write_text(json.dumps(told, indent=1) + "\n")
