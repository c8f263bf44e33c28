"""The plan of a rank's memory where the transformer is cut, against torch's own account: FSDP2 over eight ranks, of
which one is there, on fake tensors, every family at its true width.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_activations import DEV, KLEIN, KONTEXT, QWEN, one_width
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from true_width import SIDE, TEXT, build, fake_tensors

from mteditflow.plan.memory import GATHERED, GIB, TRAINING, memory_plan

NUM_RANKS = 8
CUT: dict[str, Any] = {"distributed__shard": "full", "run__num_gpus": NUM_RANKS}
CHECKPOINTED: dict[str, Any] = {"model__is_checkpointed": True}
WHOLE: dict[str, Any] = {"lora__is_full": True}
CASES: list[tuple[str, str, int, int, dict[str, Any]]] = [
    (KONTEXT, "bfloat16", 2, 2, {}),
    (KONTEXT, "float8", 1, 2, {}),
    (KLEIN, "nf4", 0, 2, CHECKPOINTED),
    (DEV, "bfloat16", 2, 2, {}),
    (QWEN, "int8", 2, 0, CHECKPOINTED),
    (KONTEXT, "float32", 1, 2, WHOLE),
    (QWEN, "float32", 2, 0, WHOLE | CHECKPOINTED),
]


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=0, world_size=NUM_RANKS, store=FakeStore())
    yield init_device_mesh("cpu", (NUM_RANKS,))
    dist.destroy_process_group()


@pytest.mark.parametrize(("path", "base", "num_double", "num_single", "fields"), CASES)
def test_a_rank(
    path: str, base: str, num_double: int, num_single: int, fields: dict[str, Any], mesh: DeviceMesh
) -> None:
    """What stays to the byte, and the peak of a training pass within 10 %."""
    with fake_tensors():
        blocks = build(path, base, num_double, num_single, mesh, **CUT, **fields)
        weights = [weight for weight in blocks.transformer.parameters() if isinstance(weight, DTensor)]
        for weight in weights:
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight)
        account = blocks.account()
        at_start = account.live()
        with account:
            blocks.forward().float().square().mean().backward()
        kept = sum(weight.to_local().untyped_storage().nbytes() for weight in weights)
    plan = {part: size * GIB for part, size in memory_plan(blocks.config, blocks.sizes).items()}
    is_full = blocks.config.lora.is_full
    assert kept == (plan["adapter, averages"] / 3 if is_full else plan["base: transformer"])
    text, is_qwen, unit = TEXT / (2 * SIDE**2 + TEXT), "Qwen" in path, one_width(blocks)
    ends = (1 + is_qwen * text * 11) * unit * (not blocks.config.model.is_checkpointed)
    peak = account.live("peak") - at_start
    planned = plan[GATHERED] + plan[TRAINING] - ends
    assert peak == pytest.approx(planned, rel=0.1)
