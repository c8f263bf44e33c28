"""Compiled blocks: the bits of the rollout in training, the graphs there are, and what is said where there can be none.

Inductor's C++ takes 20 CPU seconds for a graph, so it compiles one bfloat16 block; the pipelines are traced by Dynamo,
and run as they are or as AOTAutograd has them. MTEDITFLOW_TEST_INDUCTOR=1 gives all of them to Inductor. What one test
traced serves the next of the same sizes.
"""

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from flux2_parts import MAX_TEXT_TOKENS, save_tiny
from test_graph import Capturing, Graph, graphs  # noqa: F401
from tiny_qwen import PROMPTS, save, without_torchvision
from torch import Tensor, nn
from update_parts import ONE_RANK, as_nft, assert_same_adapter, build, change, in_chunks, roll, step

from mteditflow import guards, rollout
from mteditflow.config import Config, LoraConfig, ModelConfig
from mteditflow.config.cli import to_yaml
from mteditflow.config.command import train
from mteditflow.data import held_out_tasks, training_tasks
from mteditflow.evaluate.held_out import evaluate
from mteditflow.flow import make_schedule
from mteditflow.guards import check_adapter
from mteditflow.noise import NoiseSource
from mteditflow.plan.compiling import choose_compile, first_microbatch, num_graphs, settle_bits
from mteditflow.policy import Policy
from mteditflow.rollout import roll_out
from mteditflow.transformer import compiled
from mteditflow.transformer.compiled import compile_blocks, count_graphs, is_compiled
from mteditflow.transformer.lora import lora_adapters
from mteditflow.types import Rollout

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module", autouse=True)
def module_setup() -> Iterator[None]:
    """Dynamo begins with nothing, and leaves nothing; pytest would keep all that its log says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def compile_by(backend: str, patch: pytest.MonkeyPatch) -> None:
    if os.environ.get("MTEDITFLOW_TEST_INDUCTOR") != "1":
        patch.setattr(compiled, "BACKEND", backend)
        patch.setattr(compiled, "OPTIONS", None)


@pytest.fixture
def by_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are traced, and run as they are."""
    compile_by("eager", monkeypatch)


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """A task of two trajectories and one turn, in one chunk; the reference is asked too."""
    config = change(tiny_config, "rollout", num_tasks=1)
    config = change(change(config, "data", num_turns=1), "objective", kl_beta=0.1)
    return change(in_chunks(config, 2), "model", compile="blocks")


def eager(config: Config) -> Config:
    return change(config, "model", compile="off")


def advantage_of(rows: int) -> Tensor:
    return torch.linspace(1, -1, rows)[:, None]


def updated(policy: Policy, config: Config) -> tuple[Rollout, dict[str, float], list[Tensor]]:
    made = roll(policy, config)
    return made, *step(policy, made, advantage_of(len(made.group)), config)


def near(found: Tensor, expected: Tensor) -> None:
    """Compiled sums and products are rounded in another order: some 100 roundings of the largest element."""
    torch.testing.assert_close(found, expected, rtol=0, atol=100 * 2**-24 * expected.abs().max().item())


def test_one_graph_serves_all_adapters(config: Config, by_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three iterations of NFT with an old policy that lags and a reference, and evaluations: after the first, no graph
    is made. Chunks of 2 rows and of 1, with and without gradients, for a double and a single block.
    """
    torch._dynamo.reset()
    sizes = {"num_sessions": 3, "num_sessions_short": 3, "num_strips": 1, "num_steps": 2}
    config = change(as_nft(config), "rollout", group_size=3)
    config = change(change(config, "objective", nft_old_decay="ramp"), "evaluation", **sizes)
    policy, before = build(config), count_graphs()[0]
    reference = build(eager(config))
    found = []
    for _ in range(3):
        made, _, gradients = updated(policy, config)
        assert all(gradient.any() for gradient in gradients)
        evaluate(policy, held_out_tasks(config), config, "ema", ONE_RANK)
        evaluate(policy, held_out_tasks(config), config, "off", ONE_RANK)
        check_adapter(policy, made, config)
        found.append(count_graphs()[0] - before)
    assert found == [num_graphs(config)] * 3 == [2 * 2 * 2] * 3
    # Traced blocks are the eager ones, `off` with the adapter times 0 included.
    again = updated(build(config), config)
    expected = updated(reference, eager(config))
    near(again[0].turns[0].latents, expected[0].turns[0].latents)
    near(again[2][0], expected[2][0])
    assert found[-1] == count_graphs()[0] - before


def test_untrained_blocks_need_no_gradient(config: Config, by_dynamo: None) -> None:
    """Adapters in the single blocks alone: the double ones have one graph, and are not gone through backwards."""
    config = change(config, "lora", targets=("proj_mlp",))
    policy, before = build(config), count_graphs()[0]
    _, _, gradients = updated(policy, config)
    assert count_graphs()[0] - before == 1 + 2
    expected = updated(build(eager(config)), eager(config))
    near(gradients[0], expected[2][0])
    replayed = build(config)
    replayed.replay()
    _, figures, again = updated(replayed, config)
    near(again[0], gradients[0])
    assert figures["update/first_ratio_error"] == 0 and count_graphs()[0] - before == 1 + 2


def test_a_cuda_graph_takes_in_compiled_blocks(
    config: Config,
    by_dynamo: None,
    monkeypatch: pytest.MonkeyPatch,
    graphs: list[Graph],  # noqa: F811
) -> None:
    """By the stand-in of test_graph: replays have the bits of the loop, of the adapter and of the reference."""
    monkeypatch.setattr(Capturing, "is_infra_mode", classmethod(lambda _: True))  # else Dynamo compiles nothing in it
    policy, tasks = build(config), training_tasks(config, 0, ONE_RANK)
    schedule, made = make_schedule(policy.sigmas(2)), {}
    for is_by_graph in (False, True):
        monkeypatch.setattr(rollout, "is_captured", lambda *_, by_graph=is_by_graph: by_graph)
        for name in ("current", "off", "current"):
            with policy.adapters.use(name):
                sizes = {"num_turns": 1, "group_size": 2}
                rolled = roll_out(policy, tasks, schedule, NoiseSource(seed=0, step=0), config.rollout, **sizes)
                made[is_by_graph, name] = rolled.turns[0].latents
    assert len(graphs) == 2
    assert not torch.equal(made[True, "current"], made[True, "off"])
    assert all(torch.equal(made[True, name], made[False, name]) for name in ("current", "off"))


def test_a_block_that_cannot_be_traced_is_one_line(
    config: Config, by_dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = build(config)
    for module in policy.pipeline.transformer.modules():
        if hasattr(module, "processor"):
            own = module.processor
            monkeypatch.setattr(
                module, "processor", lambda *a, own=own, **k: torch._dynamo.graph_break() or own(*a, **k)
            )
    with pytest.raises(
        ValueError, match=r"^model.compile: a FluxTransformerBlock cannot be compiled \(.*\); set model"
    ):
        roll(policy, config)


def test_where_blocks_are_compiled() -> None:
    lora, full = LoraConfig(), LoraConfig(is_full=True)
    assert is_compiled(ModelConfig(), lora, CUDA) and not is_compiled(ModelConfig(), lora, CPU)
    assert not is_compiled(ModelConfig(), full, CUDA) and not is_compiled(ModelConfig(compile="off"), lora, CUDA)
    assert is_compiled(ModelConfig(compile="blocks"), lora, CPU)
    with pytest.raises(ValueError, match=r"^model.compile is 'blocks': with lora.is_full each copy"):
        is_compiled(ModelConfig(compile="blocks"), full, CUDA)


def test_a_long_run_on_a_cpu_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = (change(Config(), "run", num_iterations=count) for count in (60, 10_000))
    assert choose_compile(short, "cpu")[0].model.compile == "off"
    chosen, line = choose_compile(long, "cpu")
    assert chosen.model.compile == "blocks" and line.startswith("model.compile auto: blocks, since it saves about ")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert choose_compile(long, "cpu")[1] == "model.compile auto: off, no C++ compiler"
    assert choose_compile(long, "cuda") == (long, "model.compile auto")
    assert num_graphs(short) == 4  # 128 trajectories, 256 and 64 sessions in chunks of 32
    assert num_graphs(change(short, "evaluation", num_sessions=250)) == 6


def model_of(family: str, folder: Path, patch: pytest.MonkeyPatch) -> ModelConfig:
    if family == "flux2":
        return ModelConfig(path=str(save_tiny(folder, "klein")), max_text_tokens=MAX_TEXT_TOKENS["klein"])
    without_torchvision(patch)
    return ModelConfig(path=str(save("2509", PROMPTS, folder)), max_text_tokens=5, vision_pixels=64 * 64)


@pytest.mark.parametrize("family", ["flux2", "qwen"])
def test_the_first_ratio_is_1(family: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_by("aot_eager_decomp_partition", monkeypatch)
    config = replace(config, model=replace(model_of(family, tmp_path / family, monkeypatch), compile="blocks"))
    policy = build(config)
    _, figures, gradients = updated(policy, config)
    assert figures["update/first_ratio_error"] == 0.0 and gradients[0].any()


def test_training_has_the_bits_of_the_rollout(config: Config, by_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By compiled blocks alone, with checkpointing, and by replay where the bits are said to differ."""
    reference = updated(build(eager(config)), eager(config))
    policy, before = build(config), count_graphs()[0]
    microbatch = first_microbatch(policy, training_tasks(config, 0, ONE_RANK), config)
    state = policy.adapters.state("current")
    assert settle_bits(policy, *microbatch, has_ratio=True) == "as it is"
    assert_same_adapter(policy, state)
    compiled_run = updated(policy, config)
    num_graphs = count_graphs()[0] - before
    assert num_graphs <= 4  # or of an earlier test
    checkpointed = updated(build(change(config, "model", is_checkpointed=True)), config)

    answers = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "equal", lambda *_: next(answers))
        replayed = build(config)
        assert settle_bits(replayed, *microbatch, has_ratio=True) == "replayed"
    with monkeypatch.context() as patch:
        answers = iter([False, True])
        patch.setattr(torch, "equal", lambda *_: next(answers))
        chosen = build(config)
        chosen.config = replace(chosen.config, compile="auto")  # as on a GPU
        assert settle_bits(chosen, *microbatch, has_ratio=True) == "eager" and not chosen.is_compiled
    assert torch.equal(updated(chosen, config)[0].turns[0].latents, reference[0].turns[0].latents)
    state = replayed.adapters.state("current")
    replay = updated(replayed, config)
    for made, figures, gradients in (compiled_run, checkpointed, replay):
        assert figures["update/first_ratio_error"] == 0.0
        assert torch.equal(made.turns[0].latents, compiled_run[0].turns[0].latents)
        near(made.turns[0].latents, reference[0].turns[0].latents)
        near(gradients[0], reference[2][0])
    assert any(not torch.equal(value, state[key]) for key, value in replayed.adapters.state("current").items())
    assert count_graphs()[0] - before == num_graphs


def test_bits_that_differ_are_replayed_or_stop_the_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build(eager(config))
    microbatch = first_microbatch(policy, training_tasks(config, 0, ONE_RANK), config)
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    assert settle_bits(policy, *microbatch, has_ratio=False) == "as it is"
    with pytest.raises(guards.GuardError, match=r"set model.compile off or model.attention native"):
        settle_bits(policy, *microbatch, has_ratio=True)
    monkeypatch.setattr(policy, "velocity", lambda *_: microbatch[1].clone().requires_grad_())
    with pytest.raises(guards.GuardError, match="no gradient reaches the adapter"):
        settle_bits(policy, *microbatch, has_ratio=True)


class OneBlock(nn.Module):
    """A transformer of one single block, in bfloat16."""

    _repeated_blocks = ("FluxSingleTransformerBlock",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = FluxSingleTransformerBlock(32, 2, 16, 2.0).bfloat16().requires_grad_(False)

    def forward(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        image, text, time = (
            torch.randn(2, *shape, generator=generator).bfloat16() for shape in ((24, 32), (8, 32), (32,))
        )
        return torch.cat(self.block(image, text, time), dim=1)


def test_bfloat16_has_the_bits_of_the_rollout_and_of_eager() -> None:
    def velocity(is_fast: bool, has_grad: bool) -> Tensor:
        model = OneBlock()
        lora = LoraConfig(rank=4, alpha=8, targets=("attn.to_q", "proj_mlp"))
        adapters = lora_adapters(model, lora, (), seed=0, has_old=False, is_compiled=is_fast)
        adapters.load("current", {key: weight + 0.1 for key, weight in adapters.state("current").items()})
        if is_fast:
            compile_blocks(model)
        with torch.set_grad_enabled(has_grad):
            return model().detach()

    expected = velocity(False, False)
    assert torch.equal(velocity(True, False), expected) and torch.equal(velocity(True, True), expected)


def test_a_run_says_what_it_compiled_once(
    config: Config, by_dynamo: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the start: the backend of the attention, why blocks are compiled, and the graphs; then nothing more."""
    torch._dynamo.reset()
    sizes = {"num_sessions": 2, "num_sessions_short": 2, "num_strips": 1, "num_steps": 2, "every": 1}
    config = change(change(config, "evaluation", **sizes), "run", num_iterations=2, folder=str(tmp_path))
    (file := tmp_path / "given.yaml").write_text(to_yaml(config))
    assert train(["--config", str(file)]) in (0, None)
    told = " ".join("".join(capsys.readouterr()).split())
    assert "attention native, model.compile blocks" in told
    assert re.findall(r"(at the start|iteration \d): (\d+) graphs compiled in \d+ s", told) == [("at the start", "4")]
