"""Full fine-tuning: copies of the transformer beside the base, in the base's precision, through whole runs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import TINY_MAX_TEXT_TOKENS
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from timed import is_timed
from torch import Tensor

from mteditflow.config import Config, LoraConfig, ModelConfig
from mteditflow.config.command import train as main
from mteditflow.plan.memory import memory_plan, read_sizes
from mteditflow.policy import Policy, build_policy
from mteditflow.record.metrics import read_lines
from mteditflow.types import Condition

SIZE = 64
ALL = LoraConfig(is_full=True, targets=())


def policy_of(folder: Path, dtype: Any = "float32", lora: LoraConfig = ALL, *, has_old: bool = True) -> Policy:
    model = ModelConfig(path=str(folder), max_text_tokens=TINY_MAX_TEXT_TOKENS, base=dtype)
    return build_policy(model, lora, seed=0, has_old=has_old)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(policy: Policy, num: int = 2) -> tuple[Tensor, Tensor, Condition]:
    source = draw(num, 3, SIZE, SIZE, seed=5).clamp(-1, 1)
    text = policy.encode_text(["make the red square blue"] * num, source, has_cfg=False)
    condition = Condition(text=text, image=policy.encode_image(source))
    return draw(num, policy.num_tokens, policy.num_channels), torch.linspace(1, 0.3, num), condition


def perturb(policy: Policy, name: Any, scale: float = 0.05) -> None:
    state = policy.adapters.state(name)
    policy.adapters.load(name, {key: w + scale * draw(*w.shape, seed=i) for i, (key, w) in enumerate(state.items())})


def velocity(policy: Policy, name: Any) -> Tensor:
    with policy.adapters.use(name), torch.no_grad():
        return policy.velocity(*inputs(policy))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_are_apart_from_each_other_and_from_the_base(tiny_pipeline_folder: Path, dtype: str) -> None:
    policy = policy_of(tiny_pipeline_folder, dtype)
    base = velocity(policy, "off")
    before = {key: weight.clone() for key, weight in policy.pipeline.transformer.state_dict().items()}
    assert all(torch.equal(velocity(policy, name), base) for name in ("current", "ema", "old"))
    perturb(policy, "current")
    changed = velocity(policy, "current")
    assert (changed - base).abs().max() > 1e-2
    assert all(torch.equal(velocity(policy, name), base) for name in ("off", "ema", "old"))
    policy.adapters.copy("current", "old")
    assert torch.equal(velocity(policy, "old"), changed)
    mixed, current = policy.adapters.state("ema"), policy.adapters.state("current")
    policy.adapters.copy("current", "ema", decay=0.75)
    for key, weight in policy.adapters.state("ema").items():
        assert weight.dtype == torch.float32
        # lerp: a difference, a product, a sum; each rounded once, of values below 4
        expected = 0.75 * mixed[key].double() + 0.25 * current[key].double()
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=3 * 4 * 2**-24)
    after = policy.pipeline.transformer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert current.keys() == before.keys()  # the names of the transformer itself, all of them
    with pytest.raises(ValueError, match="does not fit the model"):
        policy.adapters.load("current", {"proj_out.weight": torch.zeros(1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_stock_transformer_with_the_rounded_weights(
    tiny_pipeline_folder: Path, dtype: torch.dtype
) -> None:
    """The same bits with and without a gradient, and as the plain transformer that an export gives; the gradient is the
    plain one's, float32.
    """
    policy = policy_of(tiny_pipeline_folder, str(dtype).removeprefix("torch."))
    perturb(policy, "current")
    plain = copy.deepcopy(policy.pipeline.transformer).requires_grad_(True)
    plain.load_state_dict(policy.adapters.state("current"))  # rounds to dtype
    sampled, trained = velocity(policy, "current"), policy.velocity(*inputs(policy))
    assert trained.requires_grad and torch.equal(sampled, trained)
    other = policy_of(tiny_pipeline_folder, str(dtype).removeprefix("torch."))
    other.adapters.transformer = plain
    expected = other.velocity(*inputs(policy))
    assert torch.equal(trained, expected)
    for output in (trained, expected):
        output.square().mean().backward()
    own, reference = dict(policy.adapters.trainable), dict(plain.named_parameters())
    assert own.keys() == reference.keys()
    for key, weight in own.items():
        gradient, other_gradient = weight.grad, reference[key].grad
        assert gradient is not None and other_gradient is not None and gradient.dtype == torch.float32
        assert torch.equal(gradient, other_gradient.float())
    assert sum(bool(weight.grad is not None and weight.grad.any()) for weight in own.values()) > 0.9 * len(own)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_switching_leaves_a_pending_graph(tiny_pipeline_folder: Path, is_checkpointed: bool) -> None:
    """Other weights are used between forward and backward, and are still selected in it, where blocks may be run
    again.
    """

    def gradients(is_switched: bool) -> list[Tensor]:
        policy = policy_of(tiny_pipeline_folder)
        perturb(policy, "current")
        num_calls = 0

        def count(*_: Any) -> None:
            nonlocal num_calls
            num_calls += 1

        policy.adapters.transformer.transformer_blocks[0].attn.register_forward_hook(count)
        if is_checkpointed:
            policy.adapters.transformer.enable_gradient_checkpointing()
        loss = policy.velocity(*inputs(policy)).square().mean()
        if is_switched:
            for name in ("ema", "old", "off"):
                assert not velocity(policy, name).requires_grad
            with policy.adapters.use("off"):
                assert not policy.velocity(*inputs(policy)).requires_grad
                loss.backward()
        else:
            loss.backward()
        assert num_calls == (2 if is_checkpointed else 1)
        others = set(policy.pipeline.transformer.parameters())
        assert all(weight.grad is None and not weight.requires_grad for weight in others)
        return [weight.grad for _, weight in policy.adapters.trainable if weight.grad is not None]

    plain, switched = gradients(False), gradients(True)
    assert len(plain) == len(switched) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, switched, strict=True))


def test_targets_are_trained_and_the_rest_is_shared(tiny_pipeline_folder: Path) -> None:
    policy = policy_of(tiny_pipeline_folder, lora=LoraConfig(is_full=True, targets=("attn.to_q",)), has_old=False)
    assert policy.adapters.targets == ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q"]
    names = [f"{target}.{leaf}" for target in policy.adapters.targets for leaf in ("weight", "bias")]
    assert [name for name, _ in policy.adapters.trainable] == names and policy.adapters.num_modules == 2
    base, own = dict(policy.pipeline.transformer.named_parameters()), policy.adapters.transformer.named_parameters()
    assert {name for name, weight in own if weight is not base[name]} == set(names)
    with pytest.raises(AssertionError, match="no adapter 'old'"), policy.adapters.use("old"):
        pass
    with pytest.raises(ValueError, match=r"'attn.to_qq' matches no linear"):
        policy_of(tiny_pipeline_folder, lora=LoraConfig(is_full=True, targets=("attn.to_qq",)))


def test_without_targets_every_weight_is_trained(tiny_pipeline_folder: Path) -> None:
    policy = policy_of(tiny_pipeline_folder)
    total = sum(weight.numel() for weight in policy.pipeline.transformer.parameters())
    assert sum(weight.numel() for _, weight in policy.adapters.trainable) == total
    model = ModelConfig(path=str(tiny_pipeline_folder), max_text_tokens=TINY_MAX_TEXT_TOKENS)
    config = Config(model=model, lora=ALL)
    assert read_sizes(config).num_trained == total
    memory = memory_plan(config, read_sizes(config))
    assert memory["adapter, averages"] + memory["gradient, optimizer"] == total * 4 * 6 / 2**30


def arguments(model: Path, folder: Path, num_iterations: int, **overrides: Any) -> list[str]:
    values = {
        "model.path": model, "model.max_text_tokens": TINY_MAX_TEXT_TOKENS, "model.base": "float32",
        "lora.is_full": True, "lora.targets": "[]", "data.num_turns": 2, "rollout.num_tasks": 1,
        "rollout.group_size": 3, "rollout.num_steps": 3, "optimizer.learning_rate": 1e-4,
        "optimizer.schedule": "constant", "objective.kl_beta": 0.01, "evaluation.num_sessions": 2,
        "evaluation.num_sessions_short": 1, "evaluation.num_strips": 1, "evaluation.num_steps": 1,
        "evaluation.every": 0, "run.num_iterations": num_iterations, "run.folder": folder,
    } | {name.replace("__", "."): value for name, value in overrides.items()}  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_a_bfloat16_run_has_ratio_1_and_exports_its_rounded_average(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    main(arguments(tiny_pipeline_folder, tmp_path, 1, objective__name="grpo", model__base="bfloat16"))
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line["update/first_ratio_error"] == 0 and line["update/grad_norm"] > 0
    average = safetensors.torch.load_file(tmp_path / "checkpoints/iteration-000001/ema.safetensors")
    exported = FluxTransformer2DModel.from_pretrained(tmp_path / "weights", subfolder="transformer")
    assert all(torch.equal(w, average[key].bfloat16().float()) for key, w in exported.named_parameters())


@pytest.mark.parametrize("objective", ["grpo", "nft"])
def test_a_run_trains_and_resumes(tiny_pipeline_folder: Path, tmp_path: Path, objective: str) -> None:
    """The ratio is exactly 1 before the first update (a guard stops the run otherwise), and a resume has equal bits."""
    own = {"objective__name": objective}
    if objective == "nft":
        own["objective__nft_old_decay"] = "ramp"
    main(arguments(tiny_pipeline_folder, tmp_path / "whole", 2, **own))
    main(arguments(tiny_pipeline_folder, tmp_path / "parts", 1, **own))
    main(arguments(tiny_pipeline_folder, tmp_path / "parts", 2, **own))
    lines = [
        {key: value for key, value in line.items() if not is_timed(key)}
        for line in read_lines(tmp_path / "whole" / "metrics.jsonl")
    ]
    assert lines == [
        {key: value for key, value in line.items() if not is_timed(key)}
        for line in read_lines(tmp_path / "parts" / "metrics.jsonl")
    ]
    if objective == "grpo":
        assert [line["update/first_ratio_error"] for line in lines] == [0, 0]
    manifest = json.loads((tmp_path / "whole/checkpoints/iteration-000002/checkpoint.json").read_text())
    groups = {"current", "ema", "optimizer"} | ({"old"} if objective == "nft" else set())
    assert {name.removesuffix(".safetensors") for name in manifest["files"]} == groups
    for group in groups:
        path = f"checkpoints/iteration-000002/{group}.safetensors"
        assert (tmp_path / "parts" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
    first, second = (
        safetensors.torch.load_file(tmp_path / "whole/checkpoints" / name / "current.safetensors")
        for name in ("iteration-000001", "iteration-000002")
    )
    moved = [key for key in first if not torch.equal(first[key], second[key])]
    assert len(moved) > 0.9 * len(first) and all(weight.dtype == torch.float32 for weight in second.values())
