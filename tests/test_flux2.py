"""FLUX.2 against the stock pipelines, on random-weight editors in the true format.

Bit-equal means max |delta| 0: with the scheduler's own float32 sigmas and the same batch at each stage, the order of
operations is the pipeline's. What goes through a batch of another size, or by sigmas rounded otherwise, differs by the
order of float32 sums: 1e3 operations in sequence, each of relative error 2^-24, at values below 4 before the final
clamp, give 1e3 * 2^-24 * 4 < 3e-4 (as in test_policy.py).
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline, compute_empirical_mu
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from einops import rearrange
from flux2_parts import MAX_TEXT_TOKENS, pixtral_processor_class, save_tiny
from torch import Tensor

from mteditflow.config import (
    Config,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    RolloutConfig,
    RunConfig,
)
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks
from mteditflow.export.weights import write_lora
from mteditflow.flow import make_schedule, noisy_steps
from mteditflow.guards import check_adapter
from mteditflow.noise import NoiseSource
from mteditflow.objective import build_objective
from mteditflow.pictures import round_to_8_bit
from mteditflow.policy import Policy, build_policy
from mteditflow.policy.flux2 import FAMILY
from mteditflow.rollout import roll_out, sample_rollout
from mteditflow.run import Run
from mteditflow.types import Condition, EditTask
from mteditflow.update import update

NUM_STEPS = 4
LORA = LoraConfig(rank=4, alpha=16, targets=())  # a power of two apart: the bits are peft's
PROMPTS = ("make the red square blue", "remove the circle", "add a blue circle")
TOLERANCE = 3e-4
ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
# (height, width) of the output, then of the condition (the pipeline takes none below 64 px), and trajectories
SIZES = [((64, 64), (64, 64), 1), ((64, 80), (64, 80), 2), ((64, 80), (96, 64), 1)]


@pytest.fixture(scope="module", autouse=True)
def processor() -> Any:
    """FLUX.2-dev's processor is loaded by the name that its model_index.json has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["transformers"], "PixtralProcessor", pixtral_processor_class())
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, processor: None) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flux2")
    return {
        "klein": save_tiny(root / "klein", "klein"),
        "distilled": save_tiny(root / "distilled", "klein", is_distilled=True),
        "dev": save_tiny(root / "dev", "dev"),
    }


def config_of(folders: dict[str, Path], kind: str, **values: Any) -> ModelConfig:
    tokens = MAX_TEXT_TOKENS["dev" if kind == "dev" else "klein"]
    given: dict[str, Any] = {"path": str(folders[kind]), "width": 80, "max_text_tokens": tokens} | values
    return ModelConfig(**given)


@pytest.fixture(scope="module")
def klein(folders: dict[str, Path]) -> Policy:
    return build_policy(config_of(folders, "klein"), LORA, seed=3, has_old=True)


def stock(folder: Path) -> Any:
    kind: Any = Flux2Pipeline if folder.name == "dev" else Flux2KleinPipeline
    pipeline: Any = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.requires_grad_(False)  # a convolution takes another kernel where its weights require a gradient
    return pipeline


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(num: int, size: tuple[int, int] = (64, 80)) -> Tensor:
    """8-bit pictures (N, 3, H, W) in [-1, 1]."""
    return round_to_8_bit(draw(num, 3, *size, seed=5).mul(0.5).clamp(-1, 1))


def to_pil(image: Tensor) -> PIL.Image.Image:
    levels = ((image + 1) * 127.5).round().to(torch.uint8)
    return PIL.Image.fromarray(levels.permute(1, 2, 0).numpy())


def condition_on(policy: Policy, prompts: Sequence[str], source: Tensor, cfg_scale: float = 1.0) -> Condition:
    """As the stock pipeline, which encodes one image, alone, and from a picture: in memory, channels come last."""
    text = policy.encode_text(prompts, source, has_cfg=cfg_scale != 1)
    source = source.contiguous(memory_format=torch.channels_last)
    return Condition(text=text, image=policy.encode_image(source, microbatch_size=1), cfg_scale=cfg_scale)


@torch.no_grad()
def rollout(policy: Policy, condition: Condition, latents: Tensor, sigmas: Tensor) -> Tensor:
    """An ODE rollout of one turn: images (N, 3, H, W) in [-1, 1]."""
    for sigma, sigma_next in pairwise(sigmas):
        velocity = policy.velocity(latents, sigma.expand(len(latents)), condition)
        latents = latents + velocity * (sigma_next - sigma)
    return policy.decode(latents, microbatch_size=len(latents))


def generate(pipeline: Any, prompts: Sequence[str], source: Any, latents: Tensor, policy: Any, scale: float) -> Tensor:
    """The stock pipeline's images (N, 3, H, W) in [0, 1] of one source, (3, H, W) in [-1, 1] or a picture."""
    height, width = policy.config.height, policy.config.width
    given = {
        "image": source if isinstance(source, PIL.Image.Image) else to_pil(source),
        "prompt": list(prompts) if len(prompts) == 1 else None,
        "height": height,
        "width": width,
        "latents": rearrange(latents, "n (h w) c -> n c h w", h=height // 16),
        "num_inference_steps": NUM_STEPS,
        "guidance_scale": scale,
        "max_sequence_length": policy.config.max_text_tokens,
    }
    if len(prompts) > 1:  # each encoded alone, as the policy does, so that it does not depend on the others
        length = policy.config.max_text_tokens
        each = {name: pipeline.encode_prompt(name, max_sequence_length=length)[0] for name in ("", *prompts)}
        given["prompt_embeds"] = torch.cat([each[prompt] for prompt in prompts])
        if isinstance(pipeline, Flux2KleinPipeline):
            given["negative_prompt_embeds"] = torch.cat([each[""]] * len(prompts))
    made: Any = pipeline(**given, output_type="pt")
    return made.images


def perturb(policy: Policy, name: Any, seed: int = 1) -> None:
    state = policy.adapters.state(name)
    policy.adapters.load(
        name, {key: weight + 0.2 * draw(*weight.shape, seed=seed + i) for i, (key, weight) in enumerate(state.items())}
    )


@pytest.mark.parametrize("size,condition_size,num", SIZES)
@pytest.mark.parametrize("kind,scale", [("klein", 1.0), ("klein", 4.0), ("dev", 2.5), ("dev", 4.0), ("distilled", 1.0)])
def test_ode_rollout_is_a_stock_generation_bit_for_bit(
    folders: dict[str, Path], kind: str, scale: float, size: tuple[int, int], condition_size: tuple[int, int], num: int
) -> None:
    config = config_of(
        folders, kind, height=size[0], width=size[1], guidance_scale=scale if kind == "dev" else 2.5,
        condition_height=condition_size[0], condition_width=condition_size[1],
    )  # fmt: skip
    policy, pipeline = build_policy(config, LORA, seed=3, has_old=False), stock(folders[kind])
    latents, source, prompts = draw(num, policy.num_tokens, 16), pictures(1, condition_size), list(PROMPTS[:num])
    condition = condition_on(policy, prompts, source.expand(num, -1, -1, -1), scale if kind == "klein" else 1.0)
    assert condition.image.shape == (num, policy.num_condition_tokens, 16)
    expected = generate(pipeline, prompts, source[0], latents, policy, scale)
    own = rollout(policy, condition, latents, pipeline.scheduler.sigmas)
    assert expected.shape == (num, 3, *size) and torch.equal(own * 0.5 + 0.5, expected)
    other = generate(pipeline, prompts, source[0], latents, policy, 1.5)
    assert ((other - expected).abs().max() > 1e-3) == (kind != "distilled")  # guidance matters where there is any
    near = rollout(policy, condition, latents, policy.sigmas(NUM_STEPS).float()) * 0.5 + 0.5
    torch.testing.assert_close(near, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind,scale", [("klein", 4.0), ("dev", 2.5)])
def test_three_turns_are_three_stock_calls(folders: dict[str, Path], kind: str, scale: float) -> None:
    """Handed over as 8-bit pictures: a level l is l / 127.5 - 1 here and 2 (l / 255) - 1 there, the same float32."""
    policy = build_policy(config_of(folders, kind, guidance_scale=2.5), LORA, seed=3, has_old=False)
    pipeline, image = stock(folders[kind]), pictures(1)
    picture = to_pil(image[0])
    for turn, prompt in enumerate(PROMPTS):
        latents = draw(1, policy.num_tokens, 16, seed=turn)
        condition = condition_on(policy, [prompt], image, scale if kind == "klein" else 1.0)
        image = rollout(policy, condition, latents, stock_sigmas(policy))
        expected = generate(pipeline, [prompt], picture, latents, policy, scale)
        assert torch.equal(image * 0.5 + 0.5, expected)
        image, picture = round_to_8_bit(image), pipeline.image_processor.postprocess(expected * 2 - 1)[0]


def stock_sigmas(policy: Policy) -> Tensor:
    scheduler = policy.pipeline.scheduler
    mu = compute_empirical_mu(policy.num_tokens, NUM_STEPS)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / NUM_STEPS, NUM_STEPS).tolist(), mu=mu)
    return scheduler.sigmas


def test_a_rollout_s_turns_are_stock_calls(folders: dict[str, Path], klein: Policy) -> None:
    """`roll_out` itself, whose stages have other batch sizes: one turn within the tolerance."""
    tasks = [EditTask(id=0, source=pictures(1)[0], instructions=(PROMPTS[0],), edit_types=("color",))]
    made = roll_out(
        klein, tasks, make_schedule(klein.sigmas(NUM_STEPS)), NoiseSource(seed=0, step=0),
        RolloutConfig(microbatch_size=2), num_turns=1, group_size=2, cfg_scale=4.0,
    ).turns[0]  # fmt: skip
    expected = generate(stock(folders["klein"]), [PROMPTS[0]] * 2, tasks[0].source, made.latents[0], klein, 4.0)
    # rounded to 8 bits, which may go either way
    assert (made.image * 0.5 + 0.5 - expected).abs().max() <= 0.5 / 255 + TOLERANCE


@pytest.mark.parametrize("num_steps", [1, 4, 12, 50])
def test_sigmas_are_the_scheduler_s(klein: Policy, num_steps: int) -> None:
    scheduler = klein.pipeline.scheduler
    mu = compute_empirical_mu(klein.num_tokens, num_steps)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / num_steps, num_steps).tolist(), mu=mu)
    sigmas = klein.sigmas(num_steps)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (num_steps + 1,) and sigmas[0] == 1
    # As in test_policy.py: the scheduler's four roundings in float32, and 1/s - 1 with 1/s at most 50.
    torch.testing.assert_close(sigmas, scheduler.sigmas.double(), rtol=8 * 2**-24, atol=0)


def test_last_step_is_an_ode_step(tiny_config: Config, folders: dict[str, Path]) -> None:
    assert noisy_steps(4, 0, (0, 1, 2)) == (0, 1, 2, 3)
    assert noisy_steps(4, 0, (0, 1, 2), "ode") == (0, 1, 2)
    assert noisy_steps(4, 2, (1, 2), "ode") == (1, 2)
    config = replace(
        tiny_config,
        model=config_of(folders, "klein", width=64),
        rollout=replace(tiny_config.rollout, last_step="ode", window_size=0),
    )
    policy = build_policy(config.model, config.lora, seed=0, has_old=False)
    made = sample_rollout(policy, build_objective(config), training_tasks(config, 0, ONE_RANK), config, 0)
    assert made.schedule.trained_steps == (0, 1) and (made.schedule.table[:, 2] > 0).tolist() == [True, True, False]
    turn = made.turns[0]
    with torch.no_grad():
        velocity = policy.velocity(turn.latents[-2], made.schedule.sigmas[-2].expand(len(turn.image)), turn.condition)
    assert torch.equal(
        turn.latents[-1], made.schedule.table[-1, 0] * turn.latents[-2] + made.schedule.table[-1, 1] * velocity
    )


@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_what_is_cut_is_known(kind: str, folders: dict[str, Path]) -> None:
    """By the chat template and the instruction together: what comes after it has no part in the embedding."""
    config = config_of(folders, kind)
    policy = build_policy(config, LORA, seed=0, has_old=False)
    long = " ".join(["red"] * config.max_text_tokens)
    count = policy.family.count_tokens(policy.pipeline)
    assert count(long) > config.max_text_tokens >= count(PROMPTS[0])
    one, two = policy.encode_text([long, f"{long} circle"], pictures(2), has_cfg=False)["text"]
    assert torch.equal(one, two)


def test_text_is_encoded_once(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build_policy(config_of(folders, "klein", text_encoder="offload"), LORA, seed=0, has_old=False)
    seen, encode = [], policy.pipeline.encode_prompt
    monkeypatch.setattr(policy.pipeline, "encode_prompt", lambda p, **given: seen.append(p) or encode(p, **given))
    asked = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    policy.encode_text(asked, pictures(3), has_cfg=True)
    both = policy.encode_text(asked, pictures(3), has_cfg=True)["text"]
    assert sorted(seen) == sorted(["", *PROMPTS[:2]]) and both.shape == (3, MAX_TEXT_TOKENS["klein"], 48)
    assert torch.equal(both[0], both[2]) and not torch.equal(both[0], both[1])
    alone = policy.encode_text([PROMPTS[1]], pictures(1), has_cfg=False)["text"]
    assert torch.equal(alone[0], both[1])


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_rows_of_a_microbatch(folders: dict[str, Path], cfg_scale: float) -> None:
    """A row's bits do not depend on its companions or its place; on the number of rows they may, within rounding."""
    policy = build_policy(config_of(folders, "klein"), LORA, seed=3, has_old=False)
    perturb(policy, "current")
    prompts = [PROMPTS[n % 3] for n in range(6)]
    condition, latents = condition_on(policy, prompts, pictures(6), cfg_scale), draw(6, policy.num_tokens, 16)
    sigma = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.1])
    order, one = torch.tensor([5, 3, 1, 0, 2, 4]), torch.tensor([2])
    whole = policy.velocity(latents, sigma, condition)
    assert whole.requires_grad and whole.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(policy.velocity(latents, sigma, condition), whole)  # the ratio is exactly 1
        assert torch.equal(policy.velocity(latents[order], sigma[order], condition.rows(order)), whole[order])
        alone = policy.velocity(latents[one], sigma[one], condition.rows(one))
    torch.testing.assert_close(alone, whole[one].detach(), rtol=0, atol=cfg_scale * TOLERANCE)


@pytest.mark.parametrize("kind,scale", [("klein", 4.0), ("dev", 2.5)])
def test_export_gives_the_stock_pipeline_the_same_editor(
    folders: dict[str, Path], kind: str, scale: float, tmp_path: Path
) -> None:
    policy, pipeline = build_policy(config_of(folders, kind), LORA, seed=3, has_old=False), stock(folders[kind])
    perturb(policy, "ema")
    write_lora(type(policy.pipeline), policy.adapters.state("ema"), LORA, tmp_path)
    latents, source = draw(1, policy.num_tokens, 16), pictures(1)
    base = generate(pipeline, [PROMPTS[2]], source[0], latents, policy, scale)
    pipeline.load_lora_weights(tmp_path)
    exported = generate(pipeline, [PROMPTS[2]], source[0], latents, policy, scale)
    condition = condition_on(policy, [PROMPTS[2]], source, scale if kind == "klein" else 1.0)
    with policy.adapters.use("ema"):
        own = rollout(policy, condition, latents, pipeline.scheduler.sigmas)
    assert torch.equal(own * 0.5 + 0.5, exported) and (exported - base).abs().max() > 1e-2
    loaded = next(iter(pipeline.transformer.peft_config.values()))
    assert (loaded.r, loaded.lora_alpha, len(loaded.target_modules)) == (4, 16, 14)


@pytest.mark.parametrize("objective", ["grpo", "nft"])
@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_an_iteration(folders: dict[str, Path], tiny_config: Config, kind: str, objective: Any) -> None:
    config = replace(
        tiny_config,
        model=config_of(folders, kind, width=64, cfg_scale=3.0 if kind == "klein" else 1.0),
        objective=ObjectiveConfig(name=objective, kl_beta=0.01),
    )
    policy = build_policy(config.model, config.lora, seed=0, has_old=objective == "nft")
    optimizer = torch.optim.AdamW([weight for _, weight in policy.adapters.trainable], lr=1e-3)
    made = sample_rollout(policy, build_objective(config), training_tasks(config, 0, ONE_RANK), config, 0)
    assert made.turns[0].condition.cfg_scale == config.model.cfg_scale
    advantage = torch.tensor([[1.0], [-1.0], [0.5], [-0.5]]).expand(4, 2)
    figures = update(policy, optimizer, build_objective(config), made, advantage, config, ONE_RANK)
    assert figures["update/grad_norm"] > 0
    check_adapter(policy, made, config)  # the velocity has changed
    if objective == "grpo":
        assert figures["update/first_ratio_error"] == 0


@pytest.mark.parametrize("kind", ["klein", "distilled"])
def test_a_distilled_model_under_nft_is_warned_of(
    folders: dict[str, Path], tiny_config: Config, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(
        tiny_config,
        model=config_of(folders, kind, width=64),
        objective=ObjectiveConfig(name="nft"),
        evaluation=EvaluationConfig(num_sessions=2, num_sessions_short=2, num_strips=1, num_steps=1),
        run=RunConfig(folder=str(tmp_path)),
    )
    with Run(config, build_objective(config), ONE_RANK):
        pass
    warning = "is distilled, and objective.name nft blurs such a model"
    assert (warning in " ".join("".join(capsys.readouterr()).split())) == (kind == "distilled")


def expect_error(config: ModelConfig, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        build_policy(config, LORA, seed=0, has_old=False)
    assert "\n" not in str(caught.value)


def test_errors(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_error(config_of(folders, "dev", cfg_scale=4.0), r"cfg_scale is 4: .* embedded, .* model\.guidance_scale")
    expect_error(config_of(folders, "distilled", cfg_scale=4.0), r"cfg_scale is 4: .* distilled .* must be 1")
    expect_error(
        config_of(folders, "klein", max_text_tokens=12), r"max_text_tokens is 12: the chat template .* 25 .* 512"
    )
    expect_error(config_of(folders, "dev", max_text_tokens=64), r"max_text_tokens is 64: the chat template")
    folder = tmp_path / "klein"
    shutil.copytree(folders["klein"], folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"use_dynamic_shifting": true', '"use_dynamic_shifting": false'))
    expect_error(config_of({"klein": folder}, "klein"), r"has use_dynamic_shifting False: .* has True")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "Flux2KleinKVPipeline"}))
    expect_error(config_of({"klein": folder}, "klein"), "is a Flux2KleinKVPipeline, which cannot be trained here")
    monkeypatch.setattr(
        sys.modules["transformers"], "PixtralProcessor", type("Missing", (), {"_backends": ["torchvision"]})
    )
    expect_error(config_of(folders, "dev"), "has a PixtralProcessor, which needs torchvision: install it")


def test_a_size_that_the_autoencoder_cannot_divide(folders: dict[str, Path], tmp_path: Path) -> None:
    """An autoencoder of five stages: a token has 32 x 32 pixels."""
    folder = tmp_path / "klein"
    shutil.copytree(folders["klein"], folder, ignore=shutil.ignore_patterns("vae"))
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 5,
        "up_block_types": ("UpDecoderBlock2D",) * 5,
    }
    vae = AutoencoderKLFlux2(**blocks, block_out_channels=(4,) * 5, latent_channels=4, norm_num_groups=4)
    vae.save_pretrained(folder / "vae")
    expect_error(config_of({"klein": folder}, "klein"), r"model\.width is 80: must be a multiple of 32")


def test_targets_name_all_linears_of_the_blocks(klein: Policy) -> None:
    linears = {
        name.removesuffix(".base")
        for name, module in klein.pipeline.transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and "blocks." in name
    }
    assert set(klein.adapters.targets) == linears and len(FAMILY.targets) == 14
