"""The reference loop computes what the trainer does, and `profile --compare` puts the two side by side."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch
from mteditflow_kernels import counter_normal, counter_uniform
from torch import Tensor

from mteditflow.config import Config
from mteditflow.config.command import profile as main
from mteditflow.noise import Place
from mteditflow.profile.command import Case, build_case
from mteditflow.profile.reference_loop import Noise, build_reference
from mteditflow.rollout import sample_rollout
from mteditflow.types import Rollout
from mteditflow.update import update

S = 3  # denoising steps of tiny_config, all of them trained but GRPO's last


def case_of(config: Config, name: str) -> Case:
    """A case whose adapter changes something."""
    objective = replace(config.objective, name=name, kl_beta=0.5, nft_num_times=S)
    case = build_case(replace(config, objective=objective))
    generator = torch.Generator().manual_seed(1)
    for _, weight in case.policy.adapters.trainable:
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    if case.objective.has_old:
        case.policy.adapters.copy("current", "old")
    return case


def counted(made: Rollout) -> Noise:
    """The trainer's own noise, in the places where the reference loop asks for it."""
    shape = tuple(made.turns[0].latents.shape[2:])

    def normal(turn: int, place: Place, number: int = 0) -> Tensor:
        return counter_normal(made.keys(turn=turn, place=place, number=number), shape)

    def noise(turn: int, draw: int, rows: Tensor) -> Tensor:
        if draw == 0:
            return normal(turn, Place.INITIAL_LATENTS)[rows]
        if draw <= S:
            return normal(turn, Place.DENOISING_STEP, draw - 1)[rows]
        order = counter_uniform(made.keys(turn=turn, place=Place.NFT_TIMES), S).argsort(dim=1)  # of times, per row
        numbers = (order == draw - S - 1).int().argmax(dim=1)
        drawn = torch.stack([normal(turn, Place.NFT_NOISE, number) for number in range(S)])
        return drawn[numbers[rows], rows]

    return noise


@pytest.fixture(params=["grpo", "nft"])
def case(request: pytest.FixtureRequest, tiny_config: Config) -> Case:
    return case_of(tiny_config, request.param)


@pytest.fixture
def made(case: Case) -> Rollout:
    return sample_rollout(case.policy, case.objective, case.tasks, case.config, 0)


def test_the_same_latents_on_the_same_noise(case: Case, made: Rollout) -> None:
    """float32 sums in another order: 1e-5 after the steps of a turn; a pixel may fall on the other side of a half."""
    theirs = build_reference(case).roll_out(counted(made))
    for turn, (ours, their) in enumerate(zip(made.turns, theirs.turns, strict=True)):
        assert ours.latents.std() > 0.5
        torch.testing.assert_close(their.latents, ours.latents, rtol=0, atol=1e-5 * 10**turn)
        if case.objective.has_old:
            continue
        torch.testing.assert_close(their.old_log_prob, ours.old_log_prob, rtol=0, atol=1e-5 * 10**turn)


def test_the_same_gradient(case: Case, made: Rollout) -> None:
    """A step of SGD with rate 1 moves the weights by the gradient."""
    reference = build_reference(case)
    weights = [weight for _, weight in case.policy.adapters.trainable]
    theirs = [weight for weight in reference.transformer.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    assert all(torch.equal(mine, their) for mine, their in zip(weights, theirs, strict=True))
    advantages = torch.tensor([[1.0, -0.5], [-2.0, 1.5], [0.25, 1.0], [-1.0, 0.75]])
    update(case.policy, torch.optim.SGD(weights, lr=1.0), case.objective, made, advantages, case.config, case.ranks)
    replace(reference, optimizer=torch.optim.SGD(theirs, lr=1.0)).update(made, advantages, counted(made))
    ours = torch.cat([(weight - start).flatten() for weight, start in zip(weights, before, strict=True)])
    their = torch.cat([(weight - start).flatten() for weight, start in zip(theirs, before, strict=True)])
    assert ours.norm() > 1e-3
    assert (their - ours).norm() < 1e-4 * ours.norm()


def test_the_frozen_weights_are_shared(tiny_config: Config) -> None:
    """No second base is held, and the copy has none of our modules, nor a block that is compiled."""
    compiled = replace(tiny_config, model=replace(tiny_config.model, compile="blocks", is_checkpointed=True))
    case = case_of(compiled, "grpo")
    transformer = build_reference(case).transformer
    ours = {weight.data_ptr() for weight in case.policy.pipeline.transformer.parameters()}
    frozen = [weight for name, weight in transformer.named_parameters() if ".lora_" not in name]
    assert frozen and {weight.data_ptr() for weight in frozen} <= ours
    assert not any(type(module).__module__.startswith("mteditflow") for module in transformer.modules())
    assert any("forward" in module.__dict__ for module in case.policy.pipeline.transformer.modules())
    assert not any("forward" in module.__dict__ for module in transformer.modules())
    assert transformer.is_gradient_checkpointing


def test_the_command(tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2 turns x 2 trajectories, GRPO: 1 step trained of 3, and all but the last."""
    arguments = [f"--model.path={tiny_pipeline_folder}", "--model.max_text_tokens=8", "--objective.name=grpo"]
    arguments += ["--rollout.num_tasks=1", "--rollout.group_size=2", "--data.num_turns=2", "--rollout.num_steps=3"]
    main(["--compare", *arguments, "--rollout.window_size=1", f"--run.folder={tmp_path}"])
    figures = json.loads((tmp_path / "compare.json").read_text())
    assert figures["transitions"] == {"ours": 4, "reference": 8}
    for part in ("rollout", "update", "all"):
        ratios = [one["reference"][part] / one["ours"][part] for one in figures["rounds"]]
        assert len(ratios) == 3 and figures["ratio"][part] == median(ratios)
    for one in figures["rounds"]:
        for seconds in one.values():
            assert seconds["all"] == pytest.approx(seconds["rollout"] + seconds["update"])
    ours, reference = (figures["short"][name]["rollout"] for name in ("ours", "reference"))
    assert ours["launches"] is None and ours["host syncs"] is None
    assert reference["host reads"] - ours["host reads"] >= 2 * (2 + 1)  # at a step one for each of 2 rows, and one
    printed = capsys.readouterr().out
    assert "reference / ours" in printed and "no GPU" in printed


def test_full_fine_tuning_has_no_reference(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--compare", "--lora.is_full=true", "--rollout.num_tasks=1"])
    assert "lora.is_full is True: the reference loop trains peft's LoRA: must be false" in capsys.readouterr().err
