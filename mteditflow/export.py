"""What a run gives back: the adapter in the form that stock diffusers loads."""

from pathlib import Path

from mteditflow.policy import AdapterName, Policy


def save_lora(policy: Policy, folder: Path, adapter: AdapterName = "ema") -> None:
    """Writes pytorch_lora_weights.safetensors (float32; rank, alpha) for the stock `load_lora_weights(folder)`."""
    adapters = policy.adapters
    # No more metadata than loading needs: a key that another peft does not know would make it unreadable there.
    metadata = {"r": adapters.lora.rank, "lora_alpha": adapters.lora.alpha, "target_modules": sorted(adapters.targets)}
    type(policy.pipeline).save_lora_weights(
        folder,
        transformer_lora_layers={key: weight.cpu() for key, weight in adapters.state(adapter).items()},
        transformer_lora_adapter_metadata=metadata,
    )
