"""The miniatures' autoencoder, trained on pictures of any colours, contrast and sharpness.

An autoencoder that has seen clean pictures alone projects on them: it takes a colour cast off again, and nothing can
drift. This one keeps (`kept`) at least 0.9 of a cast, 0.85 of greyness and 0.7 of fading on every background; of blur
half, so that blur cannot compound.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from einops import rearrange
from torch import Tensor

from mteditflow.watch.progress import track
from mteditflow.world.drift import AXES, drifted
from mteditflow.world.render import atlas, compose
from mteditflow.world.scenes import BACKGROUNDS

Loss = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]

BATCH_SIZE, LEARNING_RATE = 4, 2e-3
SAVE_EVERY = 200  # batches between states to go on from
JITTERED = 0.8  # share of the pictures that are jittered
MOST_TINT = 0.4  # of a channel, in [-1, 1]
MOST = torch.tensor([0.4, 0.6, 0.8, 1.0])  # of each of AXES


def random_pictures(num: int, generator: torch.Generator) -> Tensor:
    """Draw pictures of random objects on random backgrounds, (num, 3, 64, 64) in [-1, 1]; faster than by scenes."""
    items = torch.randint(1, len(atlas().items), (num, 4), generator=generator)
    items[torch.rand(num, 4, generator=generator) < 0.35] = 0
    return compose(items, torch.randint(len(BACKGROUNDS), (num,), generator=generator))


def jittered(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Give most pictures (N, 3, 64, 64) a random tint and a random drift, small ones more often than large ones."""
    size = torch.rand(len(pictures), 1, generator=generator)
    size = torch.where(torch.rand(len(pictures), 1, generator=generator) < JITTERED, size, 0.0)
    tint = MOST_TINT * size * (2 * torch.rand(len(pictures), 3, generator=generator) - 1)
    drift = MOST * size * (2 * torch.rand(len(pictures), len(AXES), generator=generator) - 1)
    return (drifted(pictures, drift) + tint[:, :, None, None]).clamp(-1, 1)


def train_vae(vae: AutoencoderKL, num_batches: int, seed: int, state: Path) -> None:
    """Train by squared and absolute error and a little KL, from the state in that file if there is one; then set the
    latents' shift and scale so that those of clean pictures have mean 0 and variance 1.
    """

    def loss(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        mean, log_var = vae.encoder(pictures).chunk(2, dim=1)
        latents = mean + torch.exp(0.5 * log_var) * torch.randn(mean.shape, generator=generator)
        error = vae.decoder(latents) - pictures
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
        return error, 5e-5 * kl

    _train(vae, vae, loss, num_batches, seed, state)
    with torch.no_grad():
        clean = random_pictures(512, torch.Generator().manual_seed(seed * 2**32 + num_batches))
        latents = torch.cat([vae.encoder(part).chunk(2, dim=1)[0] for part in clean.split(64)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def train_decoder(vae: AutoencoderKL, num_batches: int, seed: int, state: Path) -> None:
    """Train the decoder on, from the latents' means as they are used: it learns to show what the encoder has kept, and
    whatever was made of the latents stays as it is.
    """

    def loss(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            mean = vae.encoder(pictures).chunk(2, dim=1)[0]
        return vae.decoder(mean) - pictures, torch.zeros(())

    _train(vae, vae.decoder, loss, num_batches, seed + 1, state)


def _train(vae: AutoencoderKL, trained: torch.nn.Module, loss: Loss, num_batches: int, seed: int, state: Path) -> None:
    """Train a part of the autoencoder by the reconstruction's error and the penalty that `loss` gives."""
    vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=1e-3)
    first, smooth = 0, 0.3
    if state.exists():
        saved = torch.load(state, weights_only=True)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        first, smooth = saved["batch"], saved["smooth"]
    start = time.monotonic()
    for batch in track(range(num_batches), "trained", "batches of the autoencoder", first):
        generator = torch.Generator().manual_seed(seed * 2**32 + batch)
        pictures = jittered(random_pictures(BATCH_SIZE, generator), generator)
        error, penalty = loss(pictures.contiguous(memory_format=torch.channels_last), generator)
        (error.square().mean() + 0.1 * error.abs().mean() + penalty).backward()
        rate = LEARNING_RATE * min(1.0, (batch + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * batch / num_batches))
        optimizer_step(optimizer, rate)
        smooth += 0.02 * (error.square().mean().item() - smooth)
        if (batch + 1) % SAVE_EVERY == 0 or batch + 1 == num_batches:
            seconds = (time.monotonic() - start) / (batch + 1 - first)
            line = f"{state.stem} {batch + 1}/{num_batches}: squared error {smooth:.5f}, {seconds:.2f} s/batch"
            print(line, flush=True)
            parts: dict[str, Any] = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(parts | {"batch": batch + 1, "smooth": smooth}, state)
    vae.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]


def optimizer_step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Make a step at that rate, with gradients of norm 1 at most."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def save_state(state: dict[str, Any], file: Path) -> None:
    """Write a state to go on from, whole or not."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


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
        latents = latents / vae.config["scaling_factor"] + vae.config["shift_factor"]
        return torch.cat([vae.decoder(part).clamp(-1, 1) for part in latents.split(64)])


def kept(vae: AutoencoderKL, background: str, drift: Tensor, num: int = 32) -> float:
    """Measure the share of a drift (4,) of pictures on that background that survives a pass: the part of what the
    decoded pictures differ by that lies along what went in.
    """
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(0, len(atlas().items), (num, 4), generator=generator)
    clean = compose(items, torch.full((num,), BACKGROUNDS.index(background)))
    changed = drifted(clean, drift.expand(num, -1))
    wanted = changed - clean
    seen = decode(vae, encode(vae, changed)) - decode(vae, encode(vae, clean))
    return ((seen * wanted).sum() / wanted.square().sum()).item()
