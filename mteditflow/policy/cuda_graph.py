"""CUDA graphs of functions of tensors: what the host would launch one by one is replayed at once, with the same bits.

Capture freezes every Python value the function uses and every address it reads: the caller's signature has to name the
values, and weights may change in place only.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mteditflow.flow import Schedule
from mteditflow.policy import Policy
from mteditflow.record.clock import phase
from mteditflow.types import Condition

# The embedded editor's forward pass runs 545 ops that are no view for its 62 linears, LoRA included (457 without it).
LAUNCHES_PER_LINEAR = 9
LAUNCH_SECONDS = 5e-6  # of an eager op on the host: an estimate, like the rates below; the order of magnitude decides
FLOP_PER_SECOND = {torch.bfloat16: 770e12, torch.float32: 60e12}  # of an H200's matrix products

Function = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A graph, what it reads and what it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]


class Graphs:
    """One graph for each signature and shape: copy in, replay, clone out.

    All are captured on the stream of their warm-up, where the Triton kernels have their tickets, and share the memory
    of their intermediates and outputs, which nothing outlives.
    """

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._captured: dict[Hashable, Captured] = {}

    def __call__(self, function: Function, inputs: Sequence[Tensor], signature: Hashable) -> tuple[Tensor, ...]:
        """function(inputs), which must not sync with the host nor need a gradient."""
        key = (signature, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if key not in self._captured:
            self._captured[key] = self._capture(function, inputs)
        captured = self._captured[key]
        for copy, given in zip(captured.inputs, inputs, strict=True):
            copy.copy_(given)
        captured.graph.replay()
        return tuple(output.clone() for output in captured.outputs)

    def _capture(self, function: Function, given: Sequence[Tensor]) -> Captured:
        inputs = [tensor.clone() for tensor in given]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function(inputs)  # compiles, and allocates tickets and workspaces
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = function(inputs)
        return Captured(graph=graph, inputs=inputs, outputs=outputs)


Denoise = Callable[[Policy, Condition, Tensor, Schedule, Sequence[Tensor | None]], tuple[Tensor, Tensor]]
"""policy, condition, latents, schedule, and per step the noise keys of its rows or None: latents and log-prob."""
_GRAPHS: WeakKeyDictionary[Policy, Graphs] = WeakKeyDictionary()


def by_graph(denoise: Denoise) -> Denoise:
    """`denoise` as one CUDA graph for each policy, selected adapter, choice of noisy steps, and shapes.

    Optimizer, `copy` and `load` write the adapter's weights in place: a graph sees new ones.
    """

    @phase("denoise")
    def replay(
        policy: Policy, condition: Condition, latents: Tensor, schedule: Schedule, keys: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        names, is_noisy = tuple(condition.text), tuple(key is not None for key in keys)

        def run(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            text = dict(zip(names, inputs, strict=False))
            image, latents, sigmas, table, *noisy_keys = inputs[len(names) :]
            remaining = iter(noisy_keys)
            replayed = Schedule(
                sigmas=sigmas, table=table, corrections=schedule.corrections, is_noisy=is_noisy, trained_steps=()
            )
            rows = Condition(text=text, image=image, cfg_scale=condition.cfg_scale)
            return denoise(policy, rows, latents, replayed, [next(remaining) if noisy else None for noisy in is_noisy])

        inputs = [*condition.text.values(), condition.image, latents, schedule.sigmas, schedule.table]
        inputs += [key for key in keys if key is not None]
        signature = (policy.adapters.selected, condition.cfg_scale, names, is_noisy, schedule.corrections)
        if policy not in _GRAPHS:
            _GRAPHS[policy] = Graphs()
        path, log_prob = _GRAPHS[policy](run, inputs, signature)
        return path, log_prob

    return replay


def is_launch_bound(transformer: nn.Module, num_tokens: int, dtype: torch.dtype) -> bool:
    """Whether the host takes longer to launch a forward pass over `num_tokens` (of all rows) than a GPU to compute it.

    Only then does a graph save time: else launches run ahead of the GPU and cost nothing. FLUX.1-Kontext's 504 linears
    are launched in about 23 ms, and one row at 512 px (2,560 tokens, 37.6 TFLOP) takes 49: no graph. The embedded
    editor's 62 are launched in 2.8 ms, and 32 rows (1,408 tokens) take less than 0.2. A token of FLUX's double blocks
    is counted in both streams, a third too much in all; attention is left out, which is about as much at 512 px.
    """
    linears = [(name, module) for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    # a norm's linear is a modulation, computed once per row
    num_weights = sum(module.in_features * module.out_features for name, module in linears if "norm" not in name)
    seconds = 2 * num_weights * num_tokens / FLOP_PER_SECOND[dtype]
    return seconds < len(linears) * LAUNCHES_PER_LINEAR * LAUNCH_SECONDS


def is_captured(policy: Policy, num_rows: int, condition: Condition, cuda_graph: str) -> bool:
    """Whether chunks of `num_rows` are denoised by graph: not where weights are gathered, nor where the host is waited
    for. ValueError where that is asked for and cannot be.
    """
    is_cuda = policy.device.type == "cuda"
    if policy.is_cut:
        return False
    if cuda_graph == "on" and not is_cuda:
        raise ValueError(f"rollout.cuda_graph is 'on': there are no graphs on {policy.device}, take 'auto' or 'off'")
    transformer = policy.pipeline.transformer
    flag = next((name for name in policy.family.uncapturable if transformer.config.get(name)), None)
    if is_cuda and flag:
        if cuda_graph == "on":
            raise ValueError(f"rollout.cuda_graph is 'on': a model with {flag} has no graph, take 'auto' or 'off'")
        return False
    if cuda_graph != "auto" or not is_cuda:
        return cuda_graph == "on"
    num_text = max(value.shape[1] for value in condition.text.values() if value.ndim == 3)  # (N, T, E)
    num_tokens = num_rows * (policy.num_tokens + policy.num_condition_tokens + num_text)
    return is_launch_bound(transformer, num_tokens, policy.dtype)
