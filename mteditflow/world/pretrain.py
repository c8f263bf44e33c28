"""Makes the embedded editor from nothing: `python -m mteditflow.world.pretrain --output FOLDER`.

Two stages: a KL autoencoder on rendered scenes, then a FLUX.1-Kontext transformer with its text encoders by flow
matching on *single-turn* edits; the editor never sees its own output, which is the gap that multi-turn RL closes. The
last `flawed_batches` batches have flawed targets, as collections of edits from the web do: in 15 % the instruction was
ignored, in 10 % another edit was made. So the editor knows how to edit and does it not every time, and there is
something for RL to find: an edit that never succeeds gives groups without spread.

The transformer learns suddenly, so its averaged weights are kept every `save_every` batches, with their held-out
success per edit type, and the one that leaves room for RL is the one to ship: copy its folder to
`mteditflow/world/editor`. The same command goes on after a kill. On two cores without other work stage one takes 10
minutes, the pairs 2.5 and every 1,000 batches of stage two 3.5 with `--compile`; docs/log.md says how the editor that
ships came to be.
"""

import sys

from mteditflow.config import command

if __name__ == "__main__":  # before torch is imported: --help and wrong arguments answer at once
    sys.exit(command.main(["pretrain", *sys.argv[1:]]))

import math
import time
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from einops import rearrange
from jsonargparse import Namespace
from torch import Tensor

from mteditflow.flow import sigma_schedule
from mteditflow.world.edits import EDIT_TYPES, Edit, is_held_out_scene, make_session, sample_edit, vocabulary
from mteditflow.world.render import atlas, compose, render
from mteditflow.world.scenes import BACKGROUNDS, Scene, sample_scene
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
# How often an edit type is drawn: those that redraw an object in place are learned last.
LEARNED_LAST = ("subject_replace", "color_alter", "material_alter", "count_change")
TYPE_WEIGHTS = {t: 2.0 if t in LEARNED_LAST else 1.0 for t in EDIT_TYPES}
# Shares of flawed pairs, as collections of edits from the web have them: the instruction ignored, another edit made.
IGNORED, MISTAKEN = 0.15, 0.1


def new_pipeline(seed: int) -> FluxKontextPipeline:
    """Make the editor before training."""
    return build_pipeline(
        vocabulary=vocabulary(), vae=VAE, transformer=TRANSFORMER, max_text_tokens=TEXT_TOKENS, seed=seed
    )


def random_pictures(num: int, generator: torch.Generator) -> Tensor:
    """Draw pictures of random objects on random backgrounds, (num, 3, 64, 64) in [-1, 1]; faster than by scenes."""
    items = torch.randint(1, len(atlas().items), (num, 4), generator=generator)
    items[torch.rand(num, 4, generator=generator) < 0.35] = 0
    return compose(items, torch.randint(len(BACKGROUNDS), (num,), generator=generator))


def train_vae(vae: AutoencoderKL, num_batches: int, batch_size: int, seed: int) -> None:
    """Train stage one by squared and absolute error and a little KL; then set the latents' shift and scale so that
    they have mean 0 and variance 1.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-3)
    start = time.monotonic()
    for batch in range(num_batches):
        pictures = random_pictures(batch_size, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean, log_var = vae.encoder(pictures).float().chunk(2, dim=1)
            latents = mean + torch.exp(0.5 * log_var) * torch.randn(mean.shape, generator=generator)
            error = vae.decoder(latents).float() - pictures
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
        (error.square().mean() + 0.1 * error.abs().mean() + 5e-5 * kl).backward()
        _step(optimizer, 2e-3 * min(1.0, (batch + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * batch / num_batches)))
        if (batch + 1) % 100 == 0:
            rate, square = (batch + 1) / (time.monotonic() - start), error.square().mean()
            print(f"vae {batch + 1}/{num_batches}: squared error {square:.5f}, {rate:.1f} batches/s", flush=True)
    with torch.no_grad():
        latents = vae.encoder(random_pictures(512, generator)).chunk(2, dim=1)[0]
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def _step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encode pictures (N, 3, 64, 64) to packed, scaled latents (N, 16, 32), as the stock pipeline does."""
    with torch.no_grad():
        mean = torch.cat([vae.encoder(part).chunk(2, dim=1)[0] for part in pictures.split(64)])
    latents = (mean - vae.config["shift_factor"]) * vae.config["scaling_factor"]
    return rearrange(latents, "n c (h p) (w q) -> n (h w) (c p q)", p=2, q=2)


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode packed latents to pictures in [-1, 1]."""
    latents = rearrange(latents, "n (h w) (c p q) -> n c (h p) (w q)", h=4, p=2, q=2)
    with torch.no_grad():
        return vae.decoder(latents / vae.config["scaling_factor"] + vae.config["shift_factor"]).clamp(-1, 1)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Single-turn edits: rows `source`, `target`, `flawed` (target) (M,) of `latents` (., 16, 32), and instructions."""

    latents: Tensor
    source: Tensor
    target: Tensor
    flawed: Tensor
    instructions: list[str]


def _draw_edit(scene: Scene, random: Random) -> Edit:
    """Draw an edit of a type drawn by TYPE_WEIGHTS, again until it is feasible."""
    while (edit := sample_edit(scene, random.choices(EDIT_TYPES, list(TYPE_WEIGHTS.values()))[0], random)) is None:
        pass
    return edit


def make_pairs(vae: AutoencoderKL, num_pairs: int, seed: int, chain: int = 8) -> Pairs:
    """Make pairs from chains of edits of true renders, so that a picture is encoded once and serves as target and as
    source. A flawed target is the source in a share IGNORED of the pairs, shows another edit in a share MISTAKEN.
    """
    random, scenes = Random(f"pretrain/{seed}"), list[Scene]()
    rows, instructions = list[tuple[int, int, int]](), list[str]()
    while len(instructions) < num_pairs:
        scene = sample_scene(random)
        if is_held_out_scene(scene):
            continue
        scenes.append(scene)
        for _ in range(chain):
            flaw, edit, mistake = random.random(), _draw_edit(scene, random), _draw_edit(scene, random)
            source, is_flawed = len(scenes) - 1, flaw < IGNORED + MISTAKEN
            if is_flawed and flaw >= IGNORED:
                scenes.append(mistake.after)
            target = len(scenes)
            rows.append((source, target, target - 1 if is_flawed else target))  # before the target: source or mistake
            instructions.append(edit.instruction)
            scene = edit.after
            scenes.append(scene)
    latents = torch.cat([encode(vae, render(scenes[i : i + 512])) for i in range(0, len(scenes), 512)])
    source, target, flawed = torch.tensor(rows).unbind(1)
    return Pairs(latents=latents, source=source, target=target, flawed=flawed, instructions=instructions)


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


def success(pipeline: FluxKontextPipeline, num_sessions: int, num_steps: int = 8) -> dict[str, float]:
    """Measure the share of held-out first edits that the verifier passes, per edit type and overall ('all')."""
    editor = Editor(pipeline).eval()
    sessions = [make_session(f"pretrain/{i}", 1, held_out=True) for i in range(num_sessions)]
    before, edits = render([session.source for session in sessions]), [session.edits[0] for session in sessions]
    t5_ids, clip_ids = tokenize(pipeline, [edit.instruction for edit in edits])
    condition = encode(pipeline.vae, before)
    latents = torch.randn(condition.shape, generator=torch.Generator().manual_seed(0))
    sigmas = sigma_schedule(num_steps, TOKENS).float()
    with torch.no_grad():
        for sigma, sigma_next in pairwise(sigmas):
            velocity = editor(latents, condition, sigma.expand(num_sessions), t5_ids, clip_ids)
            latents = latents + (sigma_next - sigma) * velocity
    grades = grade(edits, read(before), read(decode(pipeline.vae, latents)))
    passed = [(edit.edit_type, score >= MIN_SCORE_DONE) for edit, score in zip(edits, grades, strict=True)]
    by_type = {name: [is_done for found, is_done in passed if found == name] for name in EDIT_TYPES}
    shares = {name: sum(is_done) / max(len(is_done), 1) for name, is_done in by_type.items()}
    return {"all": sum(is_done for _, is_done in passed) / num_sessions} | shares


def train_editor(pipeline: FluxKontextPipeline, pairs: Pairs, args: Namespace) -> None:
    """Train stage two by flow matching on single edits; save the averaged weights as pipeline folders, and the state to
    go on from, on the way.
    """
    averaged, shift = deepcopy(pipeline), math.exp(FLUX_MU)
    editor, average = Editor(pipeline).train(), Editor(averaged)  # modules of the two pipelines
    velocity = cast(Editor, torch.compile(editor) if args.compile else editor)
    t5_ids, clip_ids = tokenize(pipeline, pairs.instructions)
    optimizer = torch.optim.AdamW(
        editor.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=1e-2, fused=True
    )
    state, first = args.output / "state.pt", 1
    if state.exists():
        saved = torch.load(state, weights_only=True)
        editor.load_state_dict(saved["editor"])
        average.load_state_dict(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["batch"] + 1
    start, smooth = time.monotonic(), 1.0
    for number in range(first, args.editor_batches + 1):
        generator = torch.Generator().manual_seed(args.seed * 2**32 + number)
        index = torch.randint(len(pairs.source), (args.batch_size,), generator=generator)
        is_flawed = number > args.editor_batches - args.flawed_batches
        clean = pairs.latents[(pairs.flawed if is_flawed else pairs.target)[index]]
        noise = torch.randn(clean.shape, generator=generator)
        uniform = torch.rand(args.batch_size, generator=generator).clamp_min(1e-3)
        sigma = shift / (shift + 1 / uniform - 1)
        mix = sigma[:, None, None]
        condition = pairs.latents[pairs.source[index]]
        predicted = velocity((1 - mix) * clean + mix * noise, condition, sigma, t5_ids[index], clip_ids[index])
        loss = (predicted - (noise - clean)).square().mean()
        loss.backward()
        decay = min(1.0, (args.editor_batches - number) / (0.3 * args.editor_batches) + 0.05)
        _step(optimizer, args.learning_rate * min(1.0, number / 200) * decay)
        with torch.no_grad():
            for old, new in zip(average.parameters(), editor.parameters(), strict=True):
                old.lerp_(new, 1 - min(0.998, number / (number + 10)))
        smooth += 0.02 * (loss.item() - smooth)
        if number % 100 == 0:
            rate = (time.monotonic() - start) / (number - first + 1)
            print(f"editor {number}/{args.editor_batches}: loss {smooth:.4f}, {rate:.3f} s/batch", flush=True)
        if number % args.save_every == 0 or number == args.editor_batches:
            shares = success(averaged, args.num_sessions)
            print(f"editor {number}: " + ", ".join(f"{k} {v:.0%}" for k, v in shares.items()), flush=True)
            save(averaged, args.output / f"editor-{number:06d}")
            states = {"editor": editor, "averaged": average, "optimizer": optimizer}
            saved = {name: module.state_dict() for name, module in states.items()} | {"batch": number}
            torch.save(saved, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)


def save(pipeline: FluxKontextPipeline, folder: Path) -> None:
    """Write the pipeline folder, transformer and autoencoder in float16, which halves its size.

    Diffusers loads float16 files as float32 unless told otherwise; transformers keeps the type that it finds, so the
    text encoders are written as they are.
    """
    small = deepcopy(pipeline)
    for part in (small.transformer, small.vae):
        part.to(torch.float16)
    small.save_pretrained(folder)


def pretrain(args: Namespace) -> None:
    """Train from nothing, or from a trained autoencoder; the same command goes on after a kill."""
    pipeline = new_pipeline(args.seed)
    if args.vae:
        pipeline.vae = AutoencoderKL.from_pretrained(args.vae)
        pipeline.vae.register_to_config(_name_or_path="")  # what is shipped names no folder of this machine
    else:
        train_vae(pipeline.vae, args.vae_batches, 32, args.seed)
        pipeline.vae.save_pretrained(args.output / "vae")
    pipeline.vae.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    started = time.monotonic()
    pairs = make_pairs(pipeline.vae, args.num_pairs, args.seed)
    print(f"{len(pairs.instructions)} single edits made in {time.monotonic() - started:.0f} s", flush=True)
    train_editor(pipeline, pairs, args)
