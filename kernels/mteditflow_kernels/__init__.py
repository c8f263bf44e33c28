"""The ops of the trainer. `backend` chooses the implementation, nothing else does; `reference` defines each."""

from mteditflow_kernels.backend import use_backend
from mteditflow_kernels.ops import (
    attend_cache,
    counter_normal,
    grpo_loss,
    nft_loss,
    norm_rope,
    quantise_rows,
    sde_log_prob,
    sde_step,
)
from mteditflow_kernels.philox import counter_uniform, noise_keys, philox_4x32
from mteditflow_kernels.reference import (
    C_V,
    C_X,
    KL_EXACT,
    KL_PUBLISHED,
    LOG_PROB_CONST,
    LOG_PROB_SCALE,
    NUM_COLUMNS,
    STD,
    noised,
)

__all__ = [
    "C_V",
    "C_X",
    "KL_EXACT",
    "KL_PUBLISHED",
    "LOG_PROB_CONST",
    "LOG_PROB_SCALE",
    "NUM_COLUMNS",
    "STD",
    "attend_cache",
    "counter_normal",
    "counter_uniform",
    "grpo_loss",
    "nft_loss",
    "noise_keys",
    "noised",
    "norm_rope",
    "philox_4x32",
    "quantise_rows",
    "sde_log_prob",
    "sde_step",
    "use_backend",
]
