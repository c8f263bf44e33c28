"""Every setting of a run, and the command line that reads them."""

from mteditflow.config.settings import (
    EMBEDDED,
    AdvantageConfig,
    AlarmConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)

__all__ = [
    "EMBEDDED",
    "AdvantageConfig",
    "AlarmConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
]
