"""What the ops refuse, before anything runs: the argument, what it is, what it must be."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mteditflow_kernels import counter_normal, grpo_loss, nft_loss, noise_keys, sde_log_prob, sde_step, use_backend

from mteditflow.flow import sigma_schedule, step_table

ROWS = torch.arange(3)
KEYS = noise_keys(seed=0, step=0, task=ROWS, trajectory=ROWS, turn=0, denoising_step=0)
TABLE = step_table(sigma_schedule(4, 16), noise_level=0.9)
X = torch.randn(3, 4, 5)
ROW = torch.zeros(3)


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
    ],
)
def test_arguments_that_do_not_go_together(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_without_triton_only_the_reference_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mteditflow_kernels.backend._has_triton", lambda: False)
    with pytest.raises(ValueError, match="backend is 'triton': triton is not installed"):
        use_backend("triton")
    for name in ("reference", "auto"):
        use_backend(name)
        assert log_prob()() is not None


def test_the_documentation_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text()
    exec(text.split("```python\n")[1].split("```")[0], {})
