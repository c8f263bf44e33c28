"""What the ops refuse, before anything runs: the argument, what it is, what it must be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from mteditflow_kernels import (
    attend_cache,
    counter_normal,
    grpo_loss,
    nft_loss,
    noise_keys,
    norm_rope,
    quantise_rows,
    sde_log_prob,
    sde_step,
    use_backend,
)
from mteditflow_kernels.backend import is_triton
from mteditflow_kernels.reference import RopePart
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mteditflow.flow import sigma_schedule, step_table

ROWS = torch.arange(3)
KEYS = noise_keys(seed=0, step=0, task=ROWS, trajectory=ROWS, turn=0, denoising_step=0)
TABLE = step_table(sigma_schedule(4, 16), noise_level=0.9)
X = torch.randn(3, 4, 5)
ROW = torch.zeros(3)
CACHE = torch.zeros(3, 2, 7, 5)


class _Calls(TorchDispatchMode):
    """The names of the ops that are dispatched."""

    names: tuple[str, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += (str(func),)
        return func(*args, **(kwargs or {}))


def parts_of(*tokens: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[RopePart]:
    """Streams of two rows and three heads of 16."""
    random = torch.Generator().manual_seed(0)

    def part(n: int) -> RopePart:
        x, weight, angle = (torch.randn(shape, generator=random) for shape in ((2, n, 3, 16), (16,), (n, 8)))
        return x.to(dtype), weight.to(dtype), torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1)

    return [part(n) for n in tokens]


def log_prob(**changed: object) -> Callable[[], object]:
    own = {"velocity": X, "latents": X, "next_latents": X, "table": TABLE, "step": 0} | changed
    return lambda: sde_log_prob(**own)  # pyright: ignore[reportArgumentType]


def grpo(**changed: object) -> Callable[[], object]:
    own = {"velocity": X, "latents": X, "next_latents": X, "old_log_prob": ROW, "advantage": ROW, "table": TABLE}
    own |= {"step": 0, "clip_range": 1e-3} | changed
    return lambda: grpo_loss(**own)  # pyright: ignore[reportArgumentType]


def nft(**changed: object) -> Callable[[], object]:
    own = {"velocity": X, "old_velocity": X, "clean_latents": X, "noise": X, "sigma": ROW, "reward_probability": ROW}
    own |= {"beta": 1.0} | changed
    return lambda: nft_loss(**own)  # pyright: ignore[reportArgumentType]


def attend(**changed: object) -> Callable[[], object]:
    own = {"query": X, "key": X[:, :2], "value": X[:, :2], "keys": CACHE, "values": CACHE, "places": ROWS}
    own |= {"weights": (X[0, 0], X[0, 0]), "angles": (X[:, 0], X[:, 0]), "eps": 1e-6} | changed
    return lambda: attend_cache(**own)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (log_prob(velocity=X.int()), r"velocity is torch.int32: must be float32, bfloat16, float16 or float64"),
        (log_prob(velocity=X[:2]), r"velocity is \(2, 4, 5\): must be \(B, ...\), here \(3, 4, 5\)"),
        (log_prob(latents=ROW, velocity=ROW, next_latents=ROW), r"latents is \(3,\): must be \(B, ...\)"),
        (log_prob(next_latents=X.mT.contiguous().mT), r"next_latents has strides .*: must be contiguous"),
        (log_prob(velocity=X.to("meta")), r"velocity is on meta: must be on cpu"),
        (log_prob(table=TABLE.double()), r"table is torch.float64 \(4, 7\): must be float32 of shape \(S, 7\)"),
        (log_prob(table=TABLE[:, :5]), r"table is torch.float32 \(4, 5\): must be float32 of shape \(S, 7\)"),
        (log_prob(table=TABLE.to("meta")), r"table is on meta: must be on cpu"),
        (log_prob(step=4), r"step is 4: must lie in 0 to 3"),
        (log_prob(step=-1), r"step is -1: must lie in 0 to 3"),
        (log_prob(step=torch.tensor([0, 1, 7])), r"step is 7: must lie in 0 to 3"),
        (log_prob(step=torch.tensor([0, 1])), r"step is torch.int64 \(2,\) on cpu: must be an int, or int64 of shape"),
        (log_prob(step=ROW), r"step is torch.float32 \(3,\) on cpu: must be an int, or int64 of shape \(3,\) on cpu"),
        (lambda: sde_step(X, X, TABLE, 0, KEYS[:2]), r"keys are torch.int64 \(2, 5\) on cpu: must be int64 of shape"),
        (lambda: counter_normal(KEYS.int(), (2,)), r"keys are torch.int32 \(3, 5\) on cpu: must be int64 of shape"),
        (grpo(advantage=ROW[:2]), r"advantage is torch.float32 \(2,\): must be floating-point of shape \(3,\)"),
        (grpo(old_log_prob=ROWS), r"old_log_prob is torch.int64 \(3,\): must be floating-point of shape \(3,\)"),
        (grpo(weight=ROW.to("meta")), r"weight is on meta: must be on cpu"),
        (grpo(kl_beta=0.1), r"kl_beta is 0.1: the penalty needs ref_velocity"),
        (grpo(kl_form="other"), r"kl_form is 'other': must be 'published' or 'exact'"),
        (grpo(ref_velocity=X[:1]), r"ref_velocity is \(1, 4, 5\): must be \(B, ...\), here \(3, 4, 5\)"),
        (nft(noise=X[..., :4]), r"noise is \(3, 4, 4\): must be \(B, ...\), here \(3, 4, 5\)"),
        (nft(sigma=ROWS), r"sigma is torch.int64 \(3,\): must be floating-point of shape \(3,\)"),
        (nft(kl_beta=0.1), r"kl_beta is 0.1: the penalty needs ref_velocity"),
        (lambda: use_backend("cuda"), r"backend is 'cuda': must be one of auto, triton, reference"),
        (
            lambda: norm_rope([(X, ROW, X)], 1e-6),
            r"x is torch.float32 \(3, 4, 5\), its weight \(3,\): must be \(B, S, H, D\) and \(D,\)",
        ),
        (
            lambda: norm_rope([parts_of(4)[0], parts_of(4, dtype=torch.bfloat16)[0]], 1e-6),
            r"x is torch.bfloat16 \(2, 4, 3, 16\): must differ from \(2, 4, 3, 16\) in tokens alone",
        ),
        (
            lambda: norm_rope([(*parts_of(4)[0][:2], parts_of(5)[0][2])], 1e-6),
            r"angles are \(5, 16\): must be \(4, 16\)",
        ),
        (attend(query=X[:, :3]), r"query is \(3, 3, 5\), key \(3, 2, 5\): must be \(B, H, D\) and \(B, h, D\)"),
        (attend(values=CACHE[:, :, :6]), r"values are \(3, 2, 6, 5\): must be \(B, h, L, D\), alike in memory, here"),
        (attend(keys=CACHE.mT, values=CACHE.mT), r"keys are \(3, 2, 5, 7\): must be \(B, h, L, D\)"),
        (attend(places=ROW), r"places are torch.float32 \(3,\): must be int64 of shape \(3,\)"),
        (attend(angles=(ROW, ROW)), r"weights must be \(5,\) and angles \(3, 5\)"),
        (lambda: quantise_rows(ROWS), r"x is torch.int64 \(3,\): must be floating-point of shape \(..., K\)"),
    ],
)
def test_arguments_that_do_not_go_together(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_without_triton_only_the_reference_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mteditflow_kernels.backend.HAS_TRITON", False)
    with pytest.raises(ValueError, match="backend is 'triton': triton is not installed"):
        use_backend("triton")
    for name in ("reference", "auto"):
        use_backend(name)
        assert log_prob()() is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_rows(dtype: torch.dtype) -> None:
    """A number is off by at most a sixteenth of itself or half of the smallest step; a row is itself in every batch."""
    x = (X * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]).to(dtype)
    x[1, 2] = 0
    q, scale = quantise_rows(x)
    largest = x.float().abs().amax(-1, keepdim=True)
    assert q.shape == x.shape and torch.equal(scale, largest.clamp(min=1e-12) / 448)
    # 3 bits of mantissa; subnormal below 2^-6, where a step is 2^-9; float32 roundings of scale, inverse and product
    allowed = torch.maximum(x.float().abs() * (2.0**-4 + 4 * 2.0**-24), scale * 2.0**-10)
    assert ((q.float() * scale - x.float()).abs() <= allowed).all()
    assert torch.equal(q.float().abs().amax(-1, keepdim=True), 448.0 * (largest > 0))
    for row in range(3):
        alone = quantise_rows(x[row])
        assert torch.equal(alone[0].float(), q[row].float()) and torch.equal(alone[1], scale[row])


def test_norm_rope_has_the_bits_of_diffusers() -> None:
    """FLUX's joined streams with real angles, Qwen's with complex ones; float32."""
    text, image = parts_of(5, 7)
    found = norm_rope([text, image], 1e-6)
    flux, qwen = [], []
    for x, weight, turns in (text, image):
        cosine, sine = turns.unflatten(1, (-1, 2)).unbind(-1)
        norms = torch.nn.RMSNorm(16, eps=1e-6), RMSNorm(16, eps=1e-6)
        for norm in norms:
            norm.weight = torch.nn.Parameter(weight)
        flux.append((norms[0](x), cosine.repeat_interleave(2, 1), sine.repeat_interleave(2, 1)))
        qwen.append(apply_rotary_emb_qwen(norms[1](x), torch.complex(cosine, sine), use_real=False))
    joined, cosines, sines = zip(*flux, strict=True)
    angles: Any = torch.cat(cosines), torch.cat(sines)
    expected: Any = apply_rotary_emb(torch.cat(joined, dim=1), angles, sequence_dim=1)
    assert torch.equal(found, expected)
    assert torch.equal(found, torch.cat(qwen, dim=1))


def test_triton_is_for_a_gpus_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and pictures on the host beside a GPU are eager; without a GPU it cannot be had."""
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="backend is 'triton': it needs a GPU, and there is none; take 'auto'"):
        use_backend("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    expected = counter_normal(KEYS, (5,)), quantise_rows(X)
    use_backend("triton")
    try:
        found = counter_normal(KEYS, (5,)), quantise_rows(X)
        with FakeTensorMode():
            assert is_triton(torch.empty(3, device="cuda")) and not is_triton(torch.empty(3))
    finally:
        use_backend("auto")
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(part.float(), other.float()) for part, other in zip(found[1], expected[1], strict=True))


def test_a_trained_norm_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the reference, whatever the backend: the kernel's weight is frozen."""
    ((x, weight, angles),) = parts_of(4)
    weight.requires_grad_()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    use_backend("triton")
    try:
        norm_rope([(x, weight, angles)], 1e-6).sum().backward()
    finally:
        use_backend("auto")
    assert weight.grad is not None and weight.grad.any()


def test_what_a_fake_tensor_of_a_gpu_gets() -> None:
    """The registered ops with their outputs and no others, so that memory is counted as it will be."""
    with FakeTensorMode(), _Calls() as calls:
        q, scale = quantise_rows(torch.empty(3, 4, 64, dtype=torch.bfloat16, device="cuda"))
        x, weight = (torch.empty(*s, dtype=torch.bfloat16, device="cuda") for s in ((2, 7, 3, 16), (16,)))
        angles = torch.empty(7, 16, device="cuda")
        turned = norm_rope([(x, weight, angles)] * 2, 1e-6)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.float8_e4m3fn, (3, 4, 64), torch.float32, (3, 4, 1))
    assert (turned.shape, turned.dtype, turned.is_contiguous()) == ((2, 14, 3, 16), torch.bfloat16, True)
    assert q.is_cuda and turned.is_cuda
    names = [name for name in calls.names if name.split(".")[1] not in ("empty", "detach", "device")]
    assert names == ["mteditflow.quantise_rows.default", "mteditflow.norm_rope.default"]


def test_the_documentation_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text()
    exec(text.split("```python\n")[1].split("```")[0], {})
