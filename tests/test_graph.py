"""Denoising by CUDA graph, on the CPU: a stand-in records the ops of the capture and runs them again on the same memory
at each replay. And no step of the loop needs the host.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from mteditflow_kernels import noise_keys
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mteditflow import rollout
from mteditflow.config import Config
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks
from mteditflow.flow import make_schedule
from mteditflow.noise import NoiseSource
from mteditflow.objective import build_objective
from mteditflow.policy import Policy, build_policy
from mteditflow.policy.cuda_graph import is_captured, is_launch_bound
from mteditflow.rollout import denoise, roll_out, sample_rollout
from mteditflow.types import Condition, Rollout

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class Graph:
    """Stand-in for torch.cuda.CUDAGraph."""

    captured: ClassVar[list["Graph"]] = []

    def __init__(self) -> None:
        self.ops: list[tuple[Any, Any, Any, list[Tensor]]] = []  # op, arguments, and what it made, views left out
        self.captured.append(self)

    def replay(self) -> None:
        for op, args, kwargs, made in self.ops:
            again = own_results(op(*args, **kwargs), (args, kwargs))
            for own, new in zip(made, again, strict=True):
                own.copy_(new)


def own_results(results: Any, arguments: Any) -> list[Tensor]:
    """Those that do not lie in the memory of an argument."""
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors(arguments)}
    return [tensor for tensor in tensors(results) if tensor.untyped_storage().data_ptr() not in given]


class Capturing(TorchDispatchMode):
    """Stand-in for torch.cuda.graph. What was computed on the way is spoilt at the end: a capture computes nothing."""

    def __init__(self, graph: Graph, *, pool: object, stream: object, capture_error_mode: str) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = op(*args, **(kwargs or {}))
        self.graph.ops.append((op, args, kwargs or {}, own_results(results, (args, kwargs))))
        return results

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for *_, made in self.graph.ops:
            for tensor in made:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 0)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Graph]]:
    """Rollouts go by the stand-in; the list of what was captured."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": nullcontext,
        "graph_pool_handle": lambda: (0, 0),
        "CUDAGraph": Graph,
        "graph": Capturing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    Graph.captured.clear()
    yield Graph.captured
    Graph.captured.clear()


@pytest.fixture
def policy(tiny_config: Config) -> Policy:
    return build_policy(tiny_config.model, tiny_config.lora, seed=0, has_old=True)


def move(policy: Policy, amount: float) -> None:
    """An update of the weights, in place as the optimizer's."""
    with torch.no_grad():
        for _, parameter in policy.adapters.trainable:
            parameter.add_(amount)


def assert_equal(found: Rollout, expected: Rollout) -> None:
    for own, other in zip(found.turns, expected.turns, strict=True):
        assert torch.equal(own.latents, other.latents) and torch.equal(own.image, other.image)
        assert torch.equal(own.old_log_prob.nan_to_num(), other.old_log_prob.nan_to_num())


def test_a_replay_has_the_bits_of_the_loop(
    policy: Policy, tiny_config: Config, graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tasks, weights, noise, windows and adapters; chunks of 2, 2 and 1 rows."""
    sizes = {"num_tasks": 1, "group_size": 5, "window_size": 1, "microbatch_size": 2}
    config = replace(tiny_config, rollout=replace(tiny_config.rollout, **sizes))
    nft = replace(config, objective=replace(config.objective, name="nft"))
    sigmas = policy.sigmas(config.rollout.num_steps)
    before = policy.adapters.state("current")

    def roll(is_by_graph: bool) -> list[Rollout]:
        policy.adapters.load("current", before)
        monkeypatch.setattr(rollout, "is_captured", lambda *_: is_by_graph)
        found = []
        for iteration in range(3):
            move(policy, 0.1)
            tasks = training_tasks(config, iteration, ONE_RANK)
            found.append(sample_rollout(policy, build_objective(config), tasks, config, iteration))
        tasks = training_tasks(config, 0, ONE_RANK)
        found.append(sample_rollout(policy, build_objective(nft), tasks, nft, 0))
        ode = roll_out(
            policy, tasks, make_schedule(sigmas), NoiseSource(seed=0, step=0), config.rollout, num_turns=2,
            group_size=5,
        )  # fmt: skip
        return [*found, ode]

    eager, replayed = roll(False), roll(True)
    assert len({made.schedule.trained_steps for made in eager[:3]}) == 2  # windows
    assert len(graphs) == 4 * 2  # two windows, the ODE of the old adapter and of the trained; two sizes of a chunk
    for own, other in zip(replayed, eager, strict=True):
        assert_equal(own, other)
    assert not torch.equal(eager[0].turns[0].latents[1], eager[1].turns[0].latents[1])
    assert not torch.equal(eager[3].turns[0].latents[1], eager[4].turns[0].latents[1])


class OnMeta(TorchDispatchMode):
    """Every tensor of every op is on the device that holds no data, so that neither a number came from it, which it
    refuses, nor one from the host was sent there.
    """

    num_ops = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = op(*args, **(kwargs or {}))
        devices = {str(tensor.device) for tensor in tensors((args, kwargs, results))}
        assert devices <= {"meta"}, f"{op} on {devices}"
        self.num_ops += 1
        return results


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("a number of the host's is sent to the device")


def test_no_step_needs_the_host(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of a tensor's value, or an upload, would be a sync on a GPU, and has no place in a graph."""
    noisy, rows = make_schedule(policy.sigmas(4), noise_level=0.9, noisy_steps=(0, 2)), torch.arange(2)
    keys = noise_keys(seed=0, step=0, task=rows, trajectory=rows, turn=0, denoising_step=0)
    image = torch.randn(2, policy.num_tokens, policy.num_channels)
    pictures = torch.zeros(2, 3, 64, 64)
    text = policy.encode_text(["make the red square blue", "remove the circle"], pictures, has_cfg=False)
    given = [*text.values(), image, keys]
    policy.pipeline.transformer.to("meta")
    policy.device = torch.device("meta")
    editor = policy.editor
    editor._text_ids, editor._image_ids = (ids.to("meta") for ids in (editor._text_ids, editor._image_ids))
    first, second, image, keys = (tensor.to("meta") for tensor in given)
    schedule = noisy.to(policy.device)
    with monkeypatch.context() as patch, torch.no_grad(), OnMeta() as seen:
        for name in ("tensor", "as_tensor", "from_numpy"):  # no op of theirs is seen on this device
            patch.setattr(torch, name, refuse)
        condition = Condition(text=dict(zip(text, (first, second), strict=True)), image=image)
        path, log_prob = denoise(policy, condition, image, schedule, [keys, None, keys, None])
    assert path.shape == (5, *image.shape) and log_prob.shape == (4, 2) and seen.num_ops > 1000
    with OnMeta(), pytest.raises(RuntimeError):
        bool(path.sum() > 0)
    with OnMeta(), pytest.raises(AssertionError):
        torch.zeros(1).to("meta")


def test_launches_are_weighed_against_arithmetic(policy: Policy) -> None:
    """FLUX.1-Kontext by its true shape, 504 linears: no graph at 512 px, one below a quarter of it."""
    with torch.device("meta"):
        flux = FluxTransformer2DModel(guidance_embeds=True)
    assert sum(isinstance(module, torch.nn.Linear) for module in flux.modules()) == 504
    # 24 d^2 FLOP per token and stream of a block: 2 streams in 19 blocks, 1 in 38; 504 * 9 launches of 5 us
    limit = 504 * 9 * 5e-6 * 770e12 / (24 * 3072**2 * (2 * 19 + 38))  # 1015 tokens; the embedders take off 0.3 %
    assert not is_launch_bound(flux, 2560, torch.bfloat16)
    assert not is_launch_bound(flux, round(limit), torch.bfloat16)
    assert is_launch_bound(flux, round(0.99 * limit), torch.bfloat16)
    assert is_launch_bound(policy.pipeline.transformer, 32 * 44, torch.float32)


def test_where_graphs_are_used(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Condition(text={"text": torch.zeros(2, 8, 32)}, image=torch.zeros(2, 16, 16))
    assert not is_captured(policy, 2, text, "auto") and not is_captured(policy, 2, text, "off")
    with pytest.raises(
        ValueError, match=r"rollout.cuda_graph is 'on': there are no graphs on cpu, take 'auto' or 'off'"
    ):
        is_captured(policy, 2, text, "on")
    monkeypatch.setattr(policy, "device", torch.device("cuda"))
    assert is_captured(policy, 2, text, "auto") and is_captured(policy, 2, text, "on")
    assert not is_captured(policy, 10**9, text, "auto") and is_captured(policy, 10**9, text, "on")
    assert not is_captured(policy, 2, text, "off")
