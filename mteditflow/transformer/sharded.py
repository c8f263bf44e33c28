"""A transformer cut over GPUs by FSDP2: block by block, and what is outside the blocks; each is gathered when it is
called, forwards and backwards, and let go.

What is given as `whole` stays so on every rank: a LoRA, whose gradients `Ranks` sums once per optimizer step. Weights
that are trained and cut have their gradients summed over ranks by FSDP at every backward pass, and belong to the
optimizer as they are after the cut. Sums, not FSDP's averages: a loss is normalised by the count of all ranks, and
gloo has no scaled sum. No MixedPrecisionPolicy: it would round a LoRA to bfloat16. Weights are brought to the GPU one
block at a time, so that a transformer that fits no GPU can be cut. A quantised linear's weight and scales become
parameters, which is what FSDP cuts.

Nothing of the root is left gathered after a forward pass: it would not see what an optimizer step writes to its shard.
Every forward and every backward pass is a collective: all ranks have to make equally many.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mteditflow.config.distributed import DistributedConfig
from mteditflow.distributed import Ranks
from mteditflow.transformer.base import QuantisedLinear

Units = Iterator[tuple[str, nn.Module]]


def make_mesh(config: DistributedConfig, ranks: Ranks) -> DeviceMesh | None:
    """Lay out the ranks of a run as `distributed.shard` says: one axis, or nodes by the ranks of a node; None where
    nothing is cut. ValueError where nodes have no ranks to cut over, or not equally many.
    """
    if config.shard == "none":
        return None
    kind, node = ranks.device.type, int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
    if config.shard == "full" or node == ranks.world_size:
        return init_device_mesh(kind, (ranks.world_size,), mesh_dim_names=("shard",))
    if node == 1 or ranks.world_size % node:
        raise ValueError(
            f"distributed.shard is 'hybrid': cuts over the {node} ranks of a node, of {ranks.world_size} in all; start "
            f"equally many on every node, two at least, or take full"
        )
    mesh = init_device_mesh(kind, (ranks.world_size // node, node), mesh_dim_names=("replicate", "shard"))
    for name in ("replicate", "shard"):  # else they have torch's own limit, not the run's
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=config.timeout_s), mesh.get_group(name))
    return mesh


def repeated_blocks(transformer: Any) -> Units:
    """Names and modules of the repeated blocks, in the order in which they are called, whatever wraps their class."""
    names = set(transformer._repeated_blocks)
    for name, module in transformer.named_modules():
        if any(base.__name__ in names for base in type(module).__mro__):
            yield name, module


def shard(
    transformer: Any,
    mesh: DeviceMesh,
    whole: set[nn.Parameter] | None = None,
    prepare: Callable[[str, nn.Module], None] | None = None,
) -> None:
    """Cut a transformer that is on the host, or anywhere, in place; what is left of it is on the mesh's device.

    whole: parameters that are not cut, nor moved. prepare: called with the name ('' for what is outside of blocks) and
    module of each unit before it is cut. Compiled blocks stay compiled.
    """
    # of an addition in place to what a block returns, which neither diffusers nor a LoRA does
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in transformer.modules():
        if isinstance(module, QuantisedLinear):
            module.make_parameters()
    units: list[tuple[str, Any]] = [*repeated_blocks(transformer), ("", transformer)]
    for name, unit in units:
        if prepare is not None:
            prepare(name, unit)
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def local(weight: Tensor) -> Tensor:
    """What this rank holds of a tensor, to be read and written."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def uncut(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Those that FSDP has not summed over ranks."""
    return [gradient for gradient in gradients if not isinstance(gradient, DTensor)]


def cut_like(weight: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, equal on all ranks, as another is cut; no communication."""
    if not isinstance(weight, DTensor) or isinstance(value, DTensor):
        return value
    on_device = value.to(weight.device)
    return distribute_tensor(on_device, weight.device_mesh, weight.placements, src_data_rank=None)


def whole_on_host(tensors: Mapping[str, Tensor], *, is_kept: bool) -> dict[str, Tensor]:
    """Put tensors together on the host, one after the other, which takes all ranks where they are cut; empty where
    they are not to be kept.
    """
    kept = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_kept:
            kept[name] = whole.detach().to("cpu", copy=True)
    return kept


def clip_(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients, cut or not, to a norm of at most `max_norm`; returns the norm before, of all of them whole."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
