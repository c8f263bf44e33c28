"""CUDA tensors without a GPU: true shapes, layouts, dtypes and devices, no numbers, forwards and backwards.

Under FakeTensorMode an op that mixes devices or wants another layout raises as on a GPU, and a host sync (`.item()`, a
tensor in an `if`) raises DataDependentOutputException. A CPU build of torch lacks two things for that: a guard of the
CUDA device, which indexing and initialisers ask for, and streams, which the autograd engine asks for. The first is
lent from the meta device, the second is done without: `walk` runs the graph's nodes from Python.
"""

import ctypes
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = torch.device("cuda", 0)  # with its index: a guard would be asked for it
_CUDA, _META, _NUM_DEVICE_TYPES = 1, 14, 22  # c10/core/DeviceType.h


@contextmanager
def _cuda_guard() -> Iterator[None]:
    """Lend the meta device's guard, which does nothing, to CUDA. A build with CUDA has its own."""
    if torch.version.cuda:
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * _NUM_DEVICE_TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    registry[_CUDA] = registry[_META]
    try:
        yield
    finally:
        registry[_CUDA] = None


def _grad_like(grad: Tensor, expected: Any) -> Tensor:
    """A gradient as the engine hands it on: on the device of its tensor, of its shape (broadcasting summed), cast."""
    assert grad.device == expected.device, f"a gradient on {grad.device} of a tensor on {expected.device}"
    return grad.sum_to_size(tuple(expected.shape)).to(expected.dtype)


def _run(node: Any, likes: Sequence[Any], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Gradients of a node's inputs; a leaf's accumulates in it."""
    if hasattr(node, "variable"):
        leaf = node.variable
        leaf.grad = grads[0] if leaf.grad is None else leaf.grad + grads[0]
        return ()
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # of an autograd.Function, which wants them all
        made = node.apply(
            *(
                torch.zeros(tuple(like.shape), dtype=like.dtype, device=like.device) if grad is None else grad
                for grad, like in zip(grads, likes, strict=True)
            )
        )
    else:
        made = node(*grads)
    return made if isinstance(made, tuple) else (made,)


def _num_uses(roots: Sequence[Any]) -> Counter[Any]:
    """How many edges lead to each node behind the roots, and to them."""
    uses, queue = Counter(roots), [*dict.fromkeys(roots)]
    while queue:
        for node, _ in queue.pop().next_functions:
            if node is not None:
                if node not in uses:
                    queue.append(node)
                uses[node] += 1
    return uses


def walk(roots: Sequence[Tensor], grads: Sequence[Tensor | None] | None = None) -> None:
    """Accumulate gradients in the leaves, as `torch.autograd.backward(roots, grads)` does."""
    uses = _num_uses([root.grad_fn for root in roots])
    given: dict[Any, list[Tensor | None]] = {node: [None] * len(node._input_metadata) for node in uses}
    ready: list[Any] = []

    def send(node: Any, place: int, grad: Tensor | None) -> None:
        if grad is not None:
            grad, before = _grad_like(grad, node._input_metadata[place]), given[node][place]
            given[node][place] = grad if before is None else before + grad
        uses[node] -= 1
        if not uses[node]:
            ready.append(node)

    for root, grad in zip(roots, grads or [None] * len(roots), strict=True):
        send(root.grad_fn, root.output_nr, torch.ones_like(root) if grad is None else grad)
    with torch.no_grad():
        while ready:
            node = ready.pop()
            grads_of_node = given.pop(node)
            made = (
                _run(node, node._input_metadata, grads_of_node)
                if any(grad is not None for grad in grads_of_node)
                else ()
            )
            for edge, grad in zip_longest(node.next_functions, made):
                if edge is not None and edge[0] is not None:
                    send(edge[0], edge[1], grad)


def _backward(self: Tensor, gradient: Tensor | None = None) -> None:
    walk([self], None if gradient is None else [gradient])


def _replace_tensors(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, with new parameters: fake ones cannot be changed in place to another device."""
    for module in self.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                made = function(weight.detach())
                module._parameters[name] = nn.Parameter(made, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return self


@contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """Within it, tensors on the device that it gives are fake CUDA tensors, of an H100 where somebody asks."""
    with (
        _cuda_guard(),
        patch.object(torch.autograd, "backward", walk),
        patch.object(Tensor, "backward", _backward),
        patch.object(nn.Module, "_apply", _replace_tensors),
        patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield DEVICE
