"""The policy against the stock FluxKontextPipeline, on a random-weight editor in the true format."""

import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import TINY_MAX_TEXT_TOKENS
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline, calculate_shift
from huggingface_hub.errors import GatedRepoError
from torch import Tensor

from mteditflow.config import Config, LoraConfig, ModelConfig, RolloutConfig
from mteditflow.export.weights import write_lora
from mteditflow.pictures import round_to_8_bit
from mteditflow.policy import Policy, build_policy, encoding
from mteditflow.policy.encoding import resize
from mteditflow.policy.flux_kontext import FAMILY
from mteditflow.policy.pipelines import token_grids
from mteditflow.policy.published import FLUX_KONTEXT
from mteditflow.transformer.adapters import find_targets
from mteditflow.types import Condition

HEIGHT, WIDTH, NUM_STEPS = 64, 48, 5  # not square: a swap of height and width would show
LORA = LoraConfig(rank=4, alpha=16, targets=())  # a power of two apart: the bits are peft's
PROMPTS = ("make the red square blue", "remove the circle", "add a blue circle left of the square")
# One image through the editor differs from the same within a batch by the order of float32 sums. Of 1e3 operations in
# sequence, each of relative error 2^-24 at values of at most about 4 before the final clamp: 1e3 * 2^-24 * 4 < 3e-4.
GEOMETRY_TOLERANCE = 3e-4


@pytest.fixture(scope="module")
def config(tiny_pipeline_folder: Path) -> ModelConfig:
    return ModelConfig(
        path=str(tiny_pipeline_folder),
        height=HEIGHT,
        width=WIDTH,
        max_text_tokens=TINY_MAX_TEXT_TOKENS,
        base="float32",
    )


@pytest.fixture
def policy(config: ModelConfig) -> Policy:
    return build_policy(config, LORA, seed=3, has_old=True)


def stock(folder: Path) -> Any:
    pipeline: Any = FluxKontextPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(num: int) -> Tensor:
    return draw(num, 3, HEIGHT, WIDTH, seed=5).clamp(-1, 1)


def condition_of(policy: Policy, num: int) -> Condition:
    return condition_on(policy, [PROMPTS[n % len(PROMPTS)] for n in range(num)], images(num))


def condition_on(policy: Policy, prompts: list[str], source: Tensor, microbatch_size: int = 16) -> Condition:
    text = policy.encode_text(prompts, source, has_cfg=False)
    return Condition(text=text, image=policy.encode_image(source, microbatch_size=microbatch_size))


def perturb(policy: Policy, name: Any, seed: int = 1) -> None:
    state = policy.adapters.state(name)
    policy.adapters.load(
        name, {key: weight + 0.2 * draw(*weight.shape, seed=seed + i) for i, (key, weight) in enumerate(state.items())}
    )


@torch.no_grad()
def rollout(policy: Policy, condition: Condition, latents: Tensor, sigmas: Tensor) -> Tensor:
    """An ODE rollout of one turn: images (N, 3, H, W) in [0, 1]."""
    for sigma, sigma_next in pairwise(sigmas):
        velocity = policy.velocity(latents, sigma.expand(len(latents)), condition)
        latents = latents + velocity * (sigma_next - sigma)
    return policy.decode(latents, microbatch_size=len(latents)) * 0.5 + 0.5


def generate(
    pipeline: Any, prompts: list[str], source: Tensor, latents: Tensor, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> Tensor:
    """The stock pipeline's images (N, 3, H, W) in [0, 1] for sources in [-1, 1]."""
    return pipeline(
        image=source * 0.5 + 0.5,
        prompt=prompts,
        height=size[0],
        width=size[1],
        max_area=size[0] * size[1],
        _auto_resize=False,
        latents=latents,
        num_inference_steps=NUM_STEPS,
        guidance_scale=2.5,
        max_sequence_length=TINY_MAX_TEXT_TOKENS,
        output_type="pt",
    ).images


def test_shapes(policy: Policy) -> None:
    assert (policy.num_tokens, policy.num_channels) == (HEIGHT * WIDTH // 256, 16)
    condition = condition_of(policy, 2)
    text, pooled = condition.text["text"], condition.text["pooled"]
    assert text.shape == (2, TINY_MAX_TEXT_TOKENS, 32) and pooled.shape == (2, 16)
    assert condition.image.shape == (2, policy.num_tokens, policy.num_channels)
    # Double block: 4 + 4 attention, 2 + 2 feed-forward; single block: q, k, v, proj_mlp.
    assert policy.adapters.num_modules == 12 + 4
    assert len(policy.adapters.trainable) == 2 * policy.adapters.num_modules
    assert all(weight.dtype == torch.float32 and weight.requires_grad for _, weight in policy.adapters.trainable)


@pytest.mark.parametrize("num_steps", [1, 5, 8, 28])
def test_sigmas_are_the_scheduler_s(policy: Policy, num_steps: int) -> None:
    scheduler = policy.pipeline.scheduler
    mu = calculate_shift(policy.num_tokens)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / num_steps, num_steps).tolist(), mu=mu)
    sigmas = policy.sigmas(num_steps)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (num_steps + 1,)
    # The scheduler computes e^mu / (e^mu + 1/s - 1) in float32: four roundings of values that are of the order of 1,
    # and 1/s (at most 28) - 1 magnifies no relative error by more than 2.
    torch.testing.assert_close(sigmas, scheduler.sigmas.double(), rtol=8 * 2**-24, atol=0)


@pytest.mark.parametrize("num", [1, 2])
def test_ode_rollout_is_a_stock_generation_bit_for_bit(policy: Policy, tiny_pipeline_folder: Path, num: int) -> None:
    """With the scheduler's own float32 sigmas, the same batch for each stage: equal bits."""
    pipeline, latents, prompts = stock(tiny_pipeline_folder), draw(num, policy.num_tokens, 16), [str(PROMPTS[0])] * num
    source = images(num)
    condition = condition_on(policy, prompts, tripped(source), microbatch_size=num)
    expected = generate(pipeline, prompts, source, latents)
    assert torch.equal(rollout(policy, condition, latents, pipeline.scheduler.sigmas), expected)
    # Own sigmas are other roundings of the same numbers.
    own = rollout(policy, condition, latents, policy.sigmas(NUM_STEPS).float())
    torch.testing.assert_close(own, expected, rtol=0, atol=GEOMETRY_TOLERANCE)


def tripped(source: Tensor) -> Tensor:
    """Sources as the stock pipeline sees them: it is given [0, 1], a trip whose rounding is not the policy's doing."""
    return (source * 0.5 + 0.5) * 2 - 1


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@pytest.mark.parametrize("condition_size", [(0, 0), (32, 48)])
def test_three_turns_are_three_stock_generations_bit_for_bit(
    config: ModelConfig, tiny_pipeline_folder: Path, size: tuple[int, int], condition_size: tuple[int, int]
) -> None:
    """Square and not; the condition of the output's size, or resized to its own, in 8 bits from turn to turn."""
    own = replace(
        config, height=size[0], width=size[1], condition_height=condition_size[0], condition_width=condition_size[1]
    )
    policy, pipeline = build_policy(own, LORA, seed=3, has_old=False), stock(tiny_pipeline_folder)
    assert policy.num_condition_tokens == math.prod(own.condition_size) // 256
    source = expected = draw(1, 3, *size, seed=5).clamp(-1, 1)
    for turn, prompt in enumerate(PROMPTS):
        latents = draw(1, policy.num_tokens, 16, seed=turn)
        condition = condition_on(policy, [prompt], tripped(resize(source, own.condition_size)), microbatch_size=1)
        expected = generate(pipeline, [prompt], resize(expected, own.condition_size), latents, size)
        edit = rollout(policy, condition, latents, pipeline.scheduler.sigmas)
        assert torch.equal(edit, expected)
        source, expected = round_to_8_bit(edit * 2 - 1), round_to_8_bit(expected * 2 - 1)


def test_encoders_on_the_host(config: ModelConfig, policy: Policy) -> None:
    """Where the encoders are changes nothing."""
    away = build_policy(replace(config, text_encoder="offload"), LORA, seed=3, has_old=True)
    own, expected = condition_of(away, 2).text, condition_of(policy, 2).text
    assert all(torch.equal(own[name], value) for name, value in expected.items())


def test_large_images_go_one_at_a_time(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """One costs one, not a batch of 16; and its bits are the same with others, which change the order of sums at most
    where images are small and go together.
    """
    encoded, decoded = policy.encode_image(images(3)), policy.decode(policy.encode_image(images(3)))
    monkeypatch.setattr(encoding, "LARGE_PIXELS", HEIGHT * WIDTH)
    rows: list[int] = []
    hook = policy.pipeline.vae.decoder.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    latents = policy.encode_image(images(3))
    torch.testing.assert_close(latents, encoded, rtol=0, atol=GEOMETRY_TOLERANCE)
    torch.testing.assert_close(policy.decode(encoded), decoded, rtol=0, atol=GEOMETRY_TOLERANCE)
    assert torch.equal(policy.decode(encoded[1:2]), policy.decode(encoded)[1:2])
    assert torch.equal(policy.encode_image(images(3)[2:]), latents[2:])
    hook.remove()
    assert rows == [1] * 7


def test_sizes_and_guidance_that_cannot_be(config: ModelConfig) -> None:
    expect_error(replace(config, cfg_scale=4.0), config.path, r"cfg_scale is 4: .* guidance embedded, so it must be 1")
    with pytest.raises(ValueError, match=r"model\.condition_width is 40: must lie in .* and be a multiple of 16"):
        replace(config, condition_width=40)
    with pytest.raises(ValueError, match=r"rollout\.hand_off is 'latents': the condition has a size of its own"):
        Config(model=replace(config, condition_width=32), rollout=RolloutConfig(hand_off="latents"))


def test_export_gives_the_stock_pipeline_the_same_editor(
    policy: Policy, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    perturb(policy, "ema")
    write_lora(type(policy.pipeline), policy.adapters.state("ema"), LORA, tmp_path)
    pipeline = stock(tiny_pipeline_folder)
    latents, source, prompt = draw(1, policy.num_tokens, 16), tripped(images(1)), PROMPTS[2]
    base = generate(pipeline, [prompt], images(1), latents)
    pipeline.load_lora_weights(tmp_path)
    exported = generate(pipeline, [prompt], images(1), latents)
    condition = condition_on(policy, [prompt], source, microbatch_size=1)
    with policy.adapters.use("ema"):
        assert torch.equal(rollout(policy, condition, latents, pipeline.scheduler.sigmas), exported)
    assert torch.equal(rollout(policy, condition, latents, pipeline.scheduler.sigmas), base)  # current: B is 0
    assert (exported - base).abs().max() > 1e-2
    loaded = next(iter(pipeline.transformer.peft_config.values()))
    assert (loaded.r, loaded.lora_alpha) == (LORA.rank, LORA.alpha)


def test_adapters(policy: Policy) -> None:
    condition, latents, sigma = condition_of(policy, 3), draw(3, policy.num_tokens, 16), torch.tensor([1.0, 0.6, 0.1])

    def velocity(name: Any) -> Tensor:
        with policy.adapters.use(name), torch.no_grad():
            return policy.velocity(latents, sigma, condition)

    base = velocity("off")
    assert all(torch.equal(velocity(name), base) for name in ("current", "old", "ema"))
    perturb(policy, "current")
    changed = velocity("current")
    assert (changed - base).abs().max() > 1e-2
    assert torch.equal(velocity("off"), base) and torch.equal(velocity("old"), base)
    policy.adapters.copy("current", "old")
    assert torch.equal(velocity("old"), changed)  # the same weights, the same bits
    assert torch.equal(velocity("ema"), base)
    before = policy.adapters.state("ema")
    policy.adapters.copy("current", "ema", decay=0.75)
    for key, weight in policy.adapters.state("ema").items():
        expected = 0.75 * before[key].double() + 0.25 * policy.adapters.state("current")[key].double()
        # lerp: a difference, a product, a sum; each rounded once, of values below 4.
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=3 * 4 * 2**-24)


def test_switching_leaves_requires_grad_and_the_graph(policy: Policy) -> None:
    condition, latents, sigma = condition_of(policy, 2), draw(2, policy.num_tokens, 16), torch.tensor([0.9, 0.3])
    perturb(policy, "current")
    loss = policy.velocity(latents, sigma, condition).square().mean()
    for name in ("off", "old", "ema"):
        with policy.adapters.use(name):
            assert all(weight.requires_grad for _, weight in policy.adapters.trainable)
            assert not policy.velocity(latents, sigma, condition).requires_grad
    with policy.adapters.use("off"):
        loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for name, weight in policy.adapters.trainable)
    others = set(policy.pipeline.transformer.parameters()) - {weight for _, weight in policy.adapters.trainable}
    assert all(weight.grad is None and not weight.requires_grad for weight in others)


def test_rollout_and_training_have_the_same_bits(policy: Policy) -> None:
    condition, latents, sigma = condition_of(policy, 4), draw(4, policy.num_tokens, 16), torch.full((4,), 0.7)
    perturb(policy, "current")
    with torch.no_grad():
        sampled = policy.velocity(latents, sigma, condition)
    trained = policy.velocity(latents, sigma, condition)
    assert trained.requires_grad and torch.equal(sampled, trained)


def test_rows_of_a_microbatch(policy: Policy) -> None:
    """A row's bits do not depend on its companions or its place; on the number of rows they may, within rounding."""
    condition, latents = condition_of(policy, 6), draw(6, policy.num_tokens, 16)
    sigma = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.1])
    perturb(policy, "current")
    with torch.no_grad():
        whole = policy.velocity(latents, sigma, condition)
        order = torch.tensor([5, 3, 1, 0, 2, 4])
        assert torch.equal(policy.velocity(latents[order], sigma[order], condition.rows(order)), whole[order])
        one = torch.tensor([2])
        alone = policy.velocity(latents[one], sigma[one], condition.rows(one))
    torch.testing.assert_close(alone, whole[one], rtol=0, atol=GEOMETRY_TOLERANCE)


def test_encoding_does_not_depend_on_the_batch(policy: Policy) -> None:
    pixels = images(7)
    text, pooled = policy.encode_text(PROMPTS + PROMPTS[:1], pixels[:4], has_cfg=False).values()
    assert torch.equal(text[0], text[3]) and torch.equal(pooled[0], pooled[3]) and not torch.equal(text[0], text[1])
    alone = policy.encode_text([PROMPTS[1]], pixels[:1], has_cfg=False)
    assert torch.equal(alone["text"][0], text[1]) and torch.equal(alone["pooled"][0], pooled[1])
    latents = policy.encode_image(pixels, microbatch_size=3)
    assert torch.equal(policy.encode_image(pixels[4:5], microbatch_size=3), latents[4:5])
    decoded = policy.decode(latents, microbatch_size=3)
    assert torch.equal(policy.decode(latents[[6, 1]], microbatch_size=3), decoded[[6, 1]])
    assert decoded.dtype == torch.float32 and decoded.abs().max() <= 1


def test_adapter_is_a_function_of_the_seed(config: ModelConfig) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again, other = (build_policy(config, LORA, seed=seed, has_old=False) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)  # the global random state is untouched
    a, b, c = (policy.adapters.state("current") for policy in (first, again, other))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a if "lora_A" in key)
    with pytest.raises(AssertionError, match="no adapter 'old'"), first.adapters.use("old"):
        pass


def test_bfloat16_base_has_a_float32_adapter(config: ModelConfig) -> None:
    policy = build_policy(
        ModelConfig(path=config.path, height=HEIGHT, width=WIDTH, max_text_tokens=8, base="bfloat16"),
        LORA,
        3,
        has_old=False,
    )
    assert policy.pipeline.transformer.x_embedder.weight.dtype == torch.bfloat16
    assert all(weight.dtype == torch.float32 for _, weight in policy.adapters.trainable)
    condition, latents, sigma = condition_of(policy, 2), draw(2, policy.num_tokens, 16), torch.tensor([0.9, 0.3])
    assert condition.image.dtype == torch.float32
    perturb(policy, "current")
    with torch.no_grad():
        sampled = policy.velocity(latents, sigma, condition)
    trained = policy.velocity(latents, sigma, condition)
    assert trained.dtype == torch.float32 and torch.equal(sampled, trained)
    trained.square().mean().backward()
    gradients = [weight.grad for _, weight in policy.adapters.trainable]
    assert all(own is not None and own.dtype == torch.float32 for own in gradients)


def test_state_of_another_adapter_is_refused(policy: Policy, config: ModelConfig) -> None:
    other = build_policy(config, LoraConfig(rank=2, alpha=4), seed=0, has_old=False)
    with pytest.raises(ValueError, match=r"does not fit the model: .* lora\.rank"):
        policy.adapters.load("current", other.adapters.state("current"))


def expect_error(config: ModelConfig, path: Path | str, match: str, lora: LoraConfig = LORA) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        build_policy(replace(config, path=str(path)), lora, seed=0, has_old=False)
    assert "\n" not in str(caught.value)


def test_errors_of_the_path(config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_error(config, tmp_path / "nowhere", "does not exist")
    expect_error(config, tmp_path, "is not a diffusers pipeline")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    expect_error(config, tmp_path, "is a StableDiffusionPipeline, .* supported are FluxKontextPipeline")
    expect_error(config, tmp_path / "model_index.json", "is a file")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expect_error(config, "nobody/no-such-editor", "no hub name that can be reached")


def test_a_gated_model_names_the_remedy(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As diffusers says it: an OSError of its own, raised while the hub's is at hand."""
    response: Any = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/owner/gated"))
    refusal = GatedRepoError("gated", response=response)

    def download(*_: object, **__: object) -> None:
        raise refusal

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", download)
    expect_error(config, "owner/gated", r"is gated: accept its licence on huggingface\.co/owner/gated, then log in")


def test_errors_of_the_targets(config: ModelConfig) -> None:
    expect_error(
        config, config.path, r"'attn.to_qq' matches no linear .* attn\.to_q", LoraConfig(targets=("attn.to_qq",))
    )
    expect_error(config, config.path, "'attn' matches no linear", LoraConfig(targets=("attn.to_q", "attn")))
    expect_error(config, config.path, r"'\*\.to_qq' matches no linear", LoraConfig(targets=("*.to_qq",)))
    for targets, num in ((("proj_mlp",), 1), (("single_*to_[qk]",), 2), (("*.to_q", "attn.to_q"), 2)):
        policy = build_policy(config, LoraConfig(targets=targets), seed=0, has_old=False)
        assert policy.adapters.num_modules == num


def test_the_published_size() -> None:
    """FLUX.1-Kontext-dev: 11.9 billion parameters; 12 targets in each of 19 double blocks, 4 in each of 38 single."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**FLUX_KONTEXT)
    assert sum(weight.numel() for weight in transformer.parameters()) == 11_901_408_320
    names = find_targets(transformer, (), FAMILY.targets)
    assert len(names) == 19 * 12 + 38 * 4
    for size, num_tokens in ((512, 1024), (1024, 4096)):
        assert token_grids(ModelConfig(height=size, width=size), 16)[0] == (size // 16,) * 2
        assert (size // 16) ** 2 == num_tokens


def test_another_schedule_is_refused(config: ModelConfig, tmp_path: Path) -> None:
    folder = tmp_path / "editor"
    shutil.copytree(config.path, folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"max_shift": 1.15', '"max_shift": 0.9'))
    expect_error(config, folder, r"has max_shift 0\.9: .* has 1\.15")
