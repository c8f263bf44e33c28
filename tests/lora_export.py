"""The average of a policy as the file that a run exports."""

from pathlib import Path

from mteditflow.config import Config, LoraConfig
from mteditflow.export.weights import Trained, write
from mteditflow.policy import Policy


def export_average(policy: Policy, lora: LoraConfig, folder: Path) -> None:
    """Write pytorch_lora_weights.safetensors, and its card, into a folder."""
    config = Config(model=policy.config, lora=lora)
    write(
        Trained(config=config, iteration=1, adapter="ema", state=policy.adapters.state("ema")),
        folder, folder, "diffusers", "float32",
    )  # fmt: skip
