"""The Qwen-Image-Edit policy by itself: shapes, rows, errors, an iteration of training, and the true shapes."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from PIL import Image
from tiny_qwen import PROMPTS, WIDE, build, condition_on, config_of, draw, editor_of, images, noise, perturb
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

from mteditflow.config import Config, DataConfig, LoraConfig, ObjectiveConfig, OptimizerConfig, RolloutConfig
from mteditflow.distributed import Ranks
from mteditflow.guards import check_adapter
from mteditflow.objective import build_objective
from mteditflow.policy import build_policy, qwen_image_edit
from mteditflow.policy.cuda_graph import is_captured
from mteditflow.policy.published import QWEN_IMAGE_EDIT
from mteditflow.policy.qwen_image_edit import FAMILY, calculate_dimensions
from mteditflow.rollout import sample_rollout
from mteditflow.transformer.adapters import find_targets
from mteditflow.types import Condition, EditTask
from mteditflow.update import update

folders = tiny_qwen.folders
# One row differs from the same within a batch by the order of float32 sums: see test_qwen.PADDING_TOLERANCE.
GEOMETRY_TOLERANCE = 2e-3


@pytest.mark.parametrize("variant", tiny_qwen.VARIANTS)
def test_shapes(folders: dict[str, Path], variant: str) -> None:
    policy = build(config_of(folders[variant], condition=(32, 48), vision_pixels=4096, max_text_tokens=9))
    assert (policy.num_tokens, policy.num_condition_tokens, policy.num_channels) == (4 * 6, 2 * 3, 16)
    # 4096 pixels of 64 x 96's aspect are 52 x 78, 64 x 64 in whole tiles of 32, 56 x 56 in tiles of 28: 2 x 2 tokens.
    assert editor_of(policy).vision_sizes == [(64, 64)]
    # <|vision_start|>, 4 tokens, <|vision_end|>; before it 'Picture 1: ' of 5 tokens where there may be several; after
    # the instruction <|im_end|>, line, <|im_start|>, 'assistant', line.
    picture = 0 if variant == "edit" else 5
    assert editor_of(policy).num_text_tokens == picture + 6 + 9 + 5
    condition = condition_on(policy, list(PROMPTS), images(3))
    shapes = {name: tuple(value.shape) for name, value in condition.text.items()}
    tokens = editor_of(policy).num_text_tokens
    assert shapes == {"text": (3, tokens, 32), "mask": (3, tokens), "negative": (3, tokens - 8, 32)}
    assert condition.text["mask"].sum(dim=1).tolist() == [tokens - 4, tokens - 4, tokens - 5]
    assert condition.image.shape == (3, 6, 16)
    assert "negative" not in policy.encode_text(PROMPTS, images(3), has_cfg=False)
    assert policy.adapters.num_modules == 2 * 12
    with pytest.raises(AssertionError):
        policy.velocity(noise(policy, 3)[:, 1:], torch.full((3,), 0.5), condition)


def test_the_stock_sizes_are_the_default(folders: dict[str, Path]) -> None:
    assert editor_of(build(config_of(folders["edit"], (64, 64), vision_pixels=0))).vision_sizes == [(1024, 1024)]
    assert editor_of(build(config_of(folders["2511"], (64, 64), vision_pixels=0))).vision_sizes == [(384, 384)]


@pytest.mark.parametrize("variant", tiny_qwen.VARIANTS)
def test_rows_of_a_microbatch(folders: dict[str, Path], variant: str) -> None:
    """A row's bits do not depend on its companions or its place; on the number of rows they may, within rounding."""
    policy = build(config_of(folders[variant], max_text_tokens=20))
    condition = condition_on(policy, [PROMPTS[n % 3] for n in range(6)], images(6))
    latents, sigma = noise(policy, 6), torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.1])
    perturb(policy, "current")
    with torch.no_grad():
        whole = policy.velocity(latents, sigma, condition)
        order = torch.tensor([5, 3, 1, 0, 2, 4])
        assert torch.equal(policy.velocity(latents[order], sigma[order], condition.rows(order)), whole[order])
        others = torch.tensor([0, 0, 2, 0, 0, 0])
        assert torch.equal(policy.velocity(latents[others], sigma[others], condition.rows(others))[2], whole[2])
        one = torch.tensor([2])
        alone = policy.velocity(latents[one], sigma[one], condition.rows(one))
    torch.testing.assert_close(alone, whole[one], rtol=0, atol=GEOMETRY_TOLERANCE)


def test_guidance_keeps_the_norm_of_the_conditional_velocity(folders: dict[str, Path]) -> None:
    policy = build(config_of(folders["2509"]))
    condition, latents, sigma = condition_on(policy, [PROMPTS[0]], images(1)), noise(policy, 1), torch.tensor([0.6])
    plain = Condition(text=condition.text, image=condition.image, cfg_scale=1.0)
    negative = {"text": condition.text["negative"], "mask": torch.ones(condition.text["negative"].shape[:2]).bool()}
    with torch.no_grad():
        guided, own = policy.velocity(latents, sigma, condition), policy.velocity(latents, sigma, plain)
        other = policy.velocity(latents, sigma, Condition(text=negative, image=condition.image))
    expected = (other + 4 * (own - other)).double()
    expected *= own.double().norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
    # ten roundings of values below 4, and the mask's order of sums four-fold
    torch.testing.assert_close(guided.double(), expected, rtol=0, atol=GEOMETRY_TOLERANCE)
    assert (guided - own).abs().max() > 1e-2


def test_encoding_does_not_depend_on_the_batch(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    policy, pixels = build(config_of(folders["2511"], condition=(96, 96), max_text_tokens=20)), images(7)
    calls: list[str] = []
    editor = editor_of(policy)
    embed = editor._embed
    monkeypatch.setattr(editor, "_embed", lambda prompt, seen: calls.append(prompt) or embed(prompt, seen))
    repeated = torch.tensor([0, 1, 2, 0, 3])
    text = policy.encode_text([*PROMPTS, PROMPTS[0], PROMPTS[0]], pixels[repeated], has_cfg=True)
    assert len(calls) == 2 * 4  # rows 0 and 3 are one
    assert all(torch.equal(value[0], value[3]) for value in text.values())
    assert not torch.equal(text["text"][0], text["text"][4])  # the same instruction on another image
    assert not torch.equal(text["negative"][0], text["negative"][4])
    alone = policy.encode_text([PROMPTS[1]], pixels[1:2], has_cfg=True)
    assert all(torch.equal(value[0], text[name][1]) for name, value in alone.items())
    latents = policy.encode_image(pixels, microbatch_size=3)
    assert torch.equal(policy.encode_image(pixels[4:5], microbatch_size=3), latents[4:5])
    clean = noise(policy, 7)
    decoded = policy.decode(clean, microbatch_size=3)
    assert torch.equal(policy.decode(clean[[6, 1]], microbatch_size=3), decoded[[6, 1]])
    assert decoded.dtype == torch.float32 and decoded.abs().max() <= 1


def test_a_long_instruction_is_cut(folders: dict[str, Path]) -> None:
    policy = build(config_of(folders["2509"], max_text_tokens=4))
    assert editor_of(policy)._cut("remove the big blue circle") == "remove the big blue"
    assert editor_of(policy)._cut("add a blue circle") == "add a blue circle"
    count = policy.family.count_tokens(policy.pipeline)
    assert [count(it) > 4 for it in ("remove the big blue circle", "add a blue circle")] == [True, False]
    assert (
        len(policy.pipeline.tokenizer(editor_of(policy)._cut("\U0001f3a8" * 3))["input_ids"]) <= 4
    )  # 4 bytes each, 3 tokens cut
    text = policy.encode_text(["remove the big blue circle"], images(1), has_cfg=False)
    assert text["mask"].all()


def test_encoders_come_and_go_once_per_call(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    policy, moves = build(config_of(folders["2511"], text_encoder="offload")), []

    @contextmanager
    def counted(pipeline: Any, device: torch.device) -> Iterator[None]:
        moves.append(device)
        yield
        moves.append("back")

    expected = policy.encode_text(PROMPTS, images(3), has_cfg=True)
    monkeypatch.setattr(qwen_image_edit, "encoders_on", counted)
    text = policy.encode_text(PROMPTS, images(3), has_cfg=True)
    assert moves == [policy.device, "back"]
    assert all(torch.equal(text[name], expected[name]) for name in expected)


def iteration_config(folder: Path, name: Any, **model: Any) -> Config:
    return Config(
        model=config_of(folder, (32, 48), vision_pixels=4096, max_text_tokens=8, **model),
        lora=LoraConfig(rank=2, alpha=4, targets=()),
        data=DataConfig(num_turns=2),
        rollout=RolloutConfig(num_tasks=2, group_size=2, num_steps=3, window_size=0, microbatch_size=2),
        objective=ObjectiveConfig(name=name),
        optimizer=OptimizerConfig(weight_decay=0.0, microbatch_size=2),
    )


@pytest.mark.parametrize("name", ["grpo", "nft"])
@pytest.mark.parametrize(("variant", "is_guided"), [("edit", True), ("2511", True), ("2511", False)])
def test_an_iteration_of_training(folders: dict[str, Path], variant: str, is_guided: bool, name: Any) -> None:
    """The ratio is 1 exactly before the first update, and the update moves the policy."""
    config = iteration_config(folders[variant], name)
    config = replace(config, rollout=replace(config.rollout, is_guided=is_guided))
    policy = build_policy(config.model, config.lora, seed=0, has_old=name == "nft")
    objective = build_objective(config)
    tasks = [
        EditTask(id=n, source=images(2, (32, 48))[n], instructions=PROMPTS[:2], edit_types=("", "")) for n in (0, 1)
    ]
    perturb(policy, "current")
    policy.adapters.copy("current", "old" if name == "nft" else "ema")
    rollout = sample_rollout(policy, objective, tasks, config, iteration=0)
    assert ("negative" in rollout.turns[0].condition.text) == is_guided
    texts = rollout.turns[0].condition.text["text"], rollout.turns[1].condition.text["text"]
    assert torch.equal(texts[0][0], texts[0][1]) and not torch.equal(texts[1][0], texts[1][1])
    before = policy.adapters.state("current")
    optimizer = torch.optim.SGD([own for _, own in policy.adapters.trainable], lr=1e-3)
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.5, 0.5], [-0.5, -0.5]])
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    figures = update(policy, optimizer, objective, rollout, advantages, config, ranks)
    if name == "grpo":
        assert figures["update/first_ratio_error"] == 0
    assert figures["update/grad_norm"] > 0
    moved = {key for key, own in policy.adapters.state("current").items() if not torch.equal(own, before[key])}
    # What the last block makes of the text is thrown away.
    idle = {key for key in before if "blocks.1." in key and ("add_q" in key or "to_add" in key or "txt_mlp" in key)}
    assert moved == before.keys() - idle and len(idle) == 2 * 4
    check_adapter(policy, rollout, config)


def test_bfloat16_base_has_a_float32_adapter(folders: dict[str, Path]) -> None:
    policy = build(config_of(folders["2511"], (32, 48), base="bfloat16"))
    condition, latents, sigma = condition_on(policy, [PROMPTS[0]], images(1, (32, 48))), noise(policy, 1), draw(1).abs()
    assert (condition.image.dtype, condition.text["text"].dtype) == (torch.float32, torch.bfloat16)
    perturb(policy, "current")
    with torch.no_grad():
        sampled = policy.velocity(latents, sigma, condition)
    trained = policy.velocity(latents, sigma, condition)
    assert trained.dtype == torch.float32 and torch.equal(sampled, trained)
    trained.square().mean().backward()
    assert all(own.dtype == torch.float32 for _, own in policy.adapters.trainable)
    assert policy.decode(latents, 1).dtype == torch.float32


def test_2511_is_not_captured(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its transformer makes a tensor of Python numbers in every forward pass, which waits for the host."""
    policy = build(config_of(folders["2511"], (32, 48)))
    condition = condition_on(policy, [PROMPTS[0]], images(1, (32, 48)))
    monkeypatch.setattr(policy, "device", torch.device("cuda"))
    assert not is_captured(policy, 1, condition, "auto")
    with pytest.raises(ValueError, match=r"rollout\.cuda_graph is 'on'.* take 'auto' or 'off'"):
        is_captured(policy, 1, condition, "on")
    other = build(config_of(folders["2509"], (32, 48)))
    monkeypatch.setattr(other, "device", torch.device("cuda"))
    assert is_captured(other, 1, condition, "auto")


class _Numbers(TorchFunctionMode):
    """Counts the tensors that are made of Python numbers, which on a GPU are copied from the host."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.tensor, torch.as_tensor)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", tiny_qwen.VARIANTS)
def test_a_forward_pass_waits_for_the_host_only_where_it_is_said(folders: dict[str, Path], variant: str) -> None:
    """A model without a flag that forbids a CUDA graph makes no tensor of Python numbers, with a mask or without."""
    policy = build(config_of(folders[variant], (32, 48)))
    condition, latents = condition_on(policy, [PROMPTS[0]], images(1, (32, 48))), noise(policy, 1)
    sigma = draw(1).abs()
    assert condition.cfg_scale != 1 and "negative" in condition.text
    with torch.no_grad():
        policy.velocity(latents, sigma, condition)  # places of tokens are kept from then on
        with _Numbers() as numbers:
            policy.velocity(latents, sigma, condition)
    is_capturable = not any(policy.pipeline.transformer.config.get(flag) for flag in FAMILY.uncapturable)
    assert is_capturable == (variant != "2511") and is_capturable == (numbers.count == 0)


def expect_error(match: str, folder: Path, size: tuple[int, int] = WIDE, **fields: Any) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        build(config_of(folder, size, **fields))
    assert "\n" not in str(caught.value)


def test_errors(
    folders: dict[str, Path], tmp_path: Path, tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_error(r"model\.vision_pixels is 100: must be 0 or at least 3136", folders["edit"], vision_pixels=100)
    expect_error(r"model\.height is 72: must lie in .* and be a multiple of 16", folders["edit"], (72, 64))
    expect_error("sees no image; it must be 0", tiny_pipeline_folder, cfg_scale=1.0)
    folder = tmp_path / "editor"
    shutil.copytree(folders["2509"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "QwenImagePipeline"}))
    expect_error("is a QwenImagePipeline, which cannot be trained here", folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(
        scheduler.read_text().replace('"time_shift_type": "exponential"', '"time_shift_type": "linear"')
    )
    expect_error("has time_shift_type 'linear': .* has 'exponential'", folder)
    monkeypatch.setattr("mteditflow.policy.pipelines.find_spec", lambda name: None)
    expect_error("install the torchvision", folders["2511"])


def num_weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_the_true_transformer(zero_cond_t: bool) -> None:
    """At the published shape, nothing allocated; -2511 adds zero_cond_t."""
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(**QWEN_IMAGE_EDIT, zero_cond_t=zero_cond_t)
    # Two bytes each in bfloat16: the 40,860,802,176 bytes of its safetensors index.
    assert num_weights(transformer) == 20_430_401_088
    bound = find_targets(transformer, (), FAMILY.targets)
    assert len(bound) == 60 * 12
    assert all(sum(name.endswith(f".{target}") for name in bound) == 60 for target in FAMILY.targets)
    # d = 3072: eight linears of attention d x d, four of the feed-forwards d x 4d
    sizes = (sum(transformer.get_submodule(name).weight.shape) for name in bound)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert sum(sizes) == 60 * 3072 * (8 * 2 + 4 * 5)


def test_the_true_text_encoder() -> None:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4,
        },
        vision_config={"hidden_size": 1280, "out_hidden_size": 3584},
    )  # fmt: skip
    with torch.device("meta"):
        encoder = Qwen2_5_VLForConditionalGeneration(config)
    assert num_weights(encoder) == 8_292_166_656  # 16,584,333,312 bytes in bfloat16, as published


@pytest.mark.parametrize(
    ("pixels", "aspect", "tokens"), [(1024**2, 1, 37**2), (384**2, 1, 14**2), (384**2, 1.5, 11 * 17)]
)
def test_vision_tokens(pixels: int, aspect: float, tokens: int) -> None:
    """With Qwen2.5-VL's published limits of 3136 and 12845056 pixels; whole tiles of 28 x 28 pixels."""
    width, height = calculate_dimensions(pixels, aspect)
    processor = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056)
    patches = processor(images=[Image.new("RGB", (int(width), int(height)))], return_tensors="pt")["image_grid_thw"]
    assert patches.prod() // 4 == tokens


@pytest.mark.parametrize(("side", "tokens"), [(512, 1024), (1024, 4096)])
def test_true_token_counts(folders: dict[str, Path], side: int, tokens: int) -> None:
    policy = build(config_of(folders["2511"], (side, side), vision_pixels=4096))
    assert policy.num_tokens == policy.num_condition_tokens == tokens
    assert policy.encode_image(torch.zeros(1, 3, side, side), microbatch_size=1).shape[1] == tokens
