"""The ops of the trainer. This file chooses the implementation, nothing else does; `reference` defines each."""

from mteditflow_kernels.philox import counter_normal, counter_uniform, noise_keys, philox_4x32
from mteditflow_kernels.reference import (
    C_V,
    C_X,
    KL_EXACT,
    KL_PUBLISHED,
    LOG_PROB_CONST,
    LOG_PROB_SCALE,
    NUM_COLUMNS,
    STD,
    grpo_loss,
    nft_loss,
    noised,
    sde_log_prob,
    sde_step,
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
    "counter_normal",
    "counter_uniform",
    "grpo_loss",
    "nft_loss",
    "noise_keys",
    "noised",
    "philox_4x32",
    "sde_log_prob",
    "sde_step",
]
