"""Every setting of a run, and the command line that reads them."""

from mteditflow.config.model import EMBEDDED, LoraConfig, ModelConfig
from mteditflow.config.reward import RewardConfig
from mteditflow.config.settings import (
    AdvantageConfig,
    AlarmConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
)  # fmt: skip

__all__ = [
    "EMBEDDED", "AdvantageConfig", "AlarmConfig", "Config", "DataConfig", "EvaluationConfig", "LoraConfig",
    "ModelConfig", "ObjectiveConfig", "OptimizerConfig", "RewardConfig", "RolloutConfig", "RunConfig",
]  # fmt: skip
