"""The memory plan against what the policies really hold and keep."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flux2_parts
import pytest
import tiny_qwen
import torch
from conftest import TINY_MAX_TEXT_TOKENS
from torch import Tensor

from mteditflow.config import Config, LoraConfig, ModelConfig, RewardConfig, RolloutConfig
from mteditflow.plan.activations import bytes_kept as planned_bytes
from mteditflow.plan.memory import MARGIN, memory_plan, num_image_tokens, read_sizes, training_pass
from mteditflow.policy import Policy, build_policy, family_of
from mteditflow.policy.published import JUDGES, MODELS
from mteditflow.types import Condition

GIB = 2**30
LORA = LoraConfig(rank=4, alpha=4, targets=())


def bytes_kept(policy: Policy, run: Callable[[], Tensor]) -> int:
    """Of what autograd keeps for the backward pass, weights aside."""
    own = {weight.untyped_storage().data_ptr() for weight in policy.pipeline.transformer.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values())


@pytest.fixture(scope="module", params=["kontext", "klein", "qwen"])
def config(request: pytest.FixtureRequest, tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        tiny_qwen.without_torchvision(patch)
        match request.param:
            case "kontext":
                folder, tokens = tiny_pipeline_folder, TINY_MAX_TEXT_TOKENS
            case "klein":
                flux2_parts.save_tiny(folder, "klein")
                tokens = flux2_parts.MAX_TEXT_TOKENS["klein"]
            case _:
                tiny_qwen.build_pipeline("2509", tiny_qwen.PROMPTS).save_pretrained(folder)
                tokens = 8
        yield Config(
            model=ModelConfig(path=str(folder), max_text_tokens=tokens), lora=LORA,
            rollout=RolloutConfig(num_tasks=1, group_size=2),
        )  # fmt: skip


def condition_of(policy: Policy, rows: int) -> Condition:
    images = torch.zeros(rows, 3, 64, 64)
    text = policy.encode_text(["add a blue circle"] * rows, images, has_cfg=False)
    return Condition(text=text, image=policy.encode_image(images))


def test_plan_is_what_a_policy_holds(config: Config) -> None:
    sizes = read_sizes(config)
    policy = build_policy(config.model, config.lora, 0, has_old=True)
    trained = [weight for _, weight in policy.adapters.trainable]
    in_transformer = sum(weight.numel() for weight in policy.pipeline.transformer.parameters())
    assert sizes.num_trained == sum(weight.numel() for weight in trained)
    assert sizes.num_transformer == in_transformer - sizes.num_trained  # the adapter that is selected
    parts = {n: m for n, m in policy.pipeline.components.items() if isinstance(m, torch.nn.Module)}
    counts = {name: sum(weight.numel() for weight in module.parameters()) for name, module in parts.items()}
    text = sum(count for name, count in counts.items() if name.startswith("text_encoder"))
    # A file holds a tied weight once; running statistics of the autoencoder are no parameters.
    assert sizes.num_text_encoders == pytest.approx(text, rel=0.05)
    assert sizes.num_autoencoder == pytest.approx(counts["vae"], rel=0.01)
    assert sum(num_image_tokens(config.model, policy.family)) == policy.num_tokens + policy.num_condition_tokens


def test_what_a_backward_pass_keeps(config: Config) -> None:
    """Within 30 %: the embedders and the last layer, and what acts once per row, are not in the formula, and weigh much
    in a model of width 32; they are nothing at 3072.
    """
    policy, rows = build_policy(config.model, config.lora, 0, has_old=False), 2
    condition, latents = condition_of(policy, rows), torch.randn(rows, policy.num_tokens, policy.num_channels)
    kept = bytes_kept(policy, lambda: policy.velocity(latents, torch.full((rows,), 0.5), condition))
    pass_kept = planned_bytes(training_pass(config, read_sizes(config)), is_checkpointed=False)
    planned = rows * pass_kept.per_row + pass_kept.per_pass
    num_text = next(iter(condition.text.values())).shape[1]
    num_image = sum(num_image_tokens(config.model, policy.family))
    tokens, estimated = num_image + num_text, num_image + config.model.max_text_tokens
    assert kept == pytest.approx(planned * tokens / estimated, rel=0.3) or kept == pytest.approx(planned, rel=0.3)


def test_published_models_are_planned_without_a_file() -> None:
    for path, known in MODELS.items():
        config = Config(
            model=ModelConfig(path=path, height=512, width=512, max_text_tokens=512, base="bfloat16"), lora=LORA
        )
        sizes = read_sizes(config)
        assert family_of(known.pipeline) == sizes.family and sizes.num_trained > 0
        plan = memory_plan(config, sizes)
        assert plan["base: transformer"] == sizes.num_transformer * 2 / GIB
        assert plan["base: text encoders"] == round(1e9 * known.text_encoders) * 2 / GIB


def test_levers_lower_what_they_say() -> None:
    def plan(config: Config) -> dict[str, float]:
        return memory_plan(config, read_sizes(config))

    path = "black-forest-labs/FLUX.1-Kontext-dev"
    model = ModelConfig(path=path, height=512, width=512, max_text_tokens=512, base="bfloat16")
    config = Config(model=model, lora=LORA)
    whole, part = plan(config), "activations of a training microbatch"
    double, single = 19 * 3072 + 6 * 4, 12 * 3072 + 4 * 4
    blocks = 19 * double + 38 * single + 57 * 2 * 3 * 24  # three float32 numbers a head
    tokens, rounded = 2560, 2 * read_sizes(config).num_trained
    assert whole[part] == pytest.approx((32 * 2 * (tokens * (blocks + 11 * 3072) + 2048 * 3072) + rounded) / GIB)
    checkpointed = plan(replace(config, model=replace(model, is_checkpointed=True)))
    again = single + 2 * 3 * 24 + 11.1 * 3072
    assert checkpointed[part] == pytest.approx((32 * 2 * tokens * (57 * 3072 + again) + rounded / 57) / GIB)
    away = plan(replace(config, model=replace(model, text_encoder="offload")))
    assert whole["base: text encoders"] > 9 and away["base: text encoders"] == 0
    in_8_bits = plan(replace(config, model=replace(model, text_encoder="int8")))
    assert in_8_bits["base: text encoders"] == pytest.approx(1.13 / 2 * whole["base: text encoders"])
    encoding = "encoders, to encode, beyond a training pass"
    small_model = replace(model, text_encoder="offload", is_checkpointed=True)
    one_row = {name: replace(getattr(config, name), microbatch_size=1) for name in ("optimizer", "rollout")}
    few = replace(config, model=small_model, **one_row)
    assert plan(few)[encoding] + plan(few)[part] == pytest.approx(whole["base: text encoders"])
    assert encoding not in away
    for base, share in (("float8", 0.51), ("int8", 0.5), ("nf4", 0.34)):
        small = plan(replace(config, model=replace(model, base=base)))
        assert small["base: transformer"] == pytest.approx(share * whole["base: transformer"], rel=0.03)
        assert small[part] == whole[part] and small["base: a weight dequantised"] > 0.05
    sized = plan(replace(config, run=replace(config.run, gpu_gib=79)))
    assert sized[MARGIN] == pytest.approx(0.6 + 0.05 * sum(whole.values()))
    judged = replace(config, reward=RewardConfig(judge="vlm"))
    assert plan(judged)["judge"] == 2e9 * JUDGES["Qwen/Qwen3-VL-8B-Instruct"] / GIB
    assert plan(replace(judged, reward=RewardConfig(judge="vlm", url="http://judge/v1")))["judge"] == 0
    with pytest.raises(ValueError, match=r"reward\.vlm is 'some/judge': .* its size is not known"):
        plan(replace(config, reward=RewardConfig(judge="vlm", vlm="some/judge")))
    with pytest.raises(ValueError, match=r"reward\.vlm is 'judge': no folder, and no hub name"):
        plan(replace(config, reward=RewardConfig(judge="vlm", vlm="judge")))
    with pytest.raises(ValueError, match=r"reward\.also 'model:some/model=2' is 'some/model': .* size is not known"):
        plan(replace(config, reward=RewardConfig(also="model:some/model=2")))
    eight = replace(config, rollout=replace(config.rollout, num_tasks=8), run=replace(config.run, num_gpus=8))
    assert plan(eight)["latents of a rollout"] == pytest.approx(whole["latents of a rollout"] / 8)
