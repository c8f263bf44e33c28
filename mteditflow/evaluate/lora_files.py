"""What can be evaluated: a run, a LoRA in any form that is known (policy/lora_file.py), or the base.

Several LoRAs share one editor in memory, through one adapter that is as wide as the widest and binds the modules of
all.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from mteditflow.config import Config, LoraConfig, ModelConfig
from mteditflow.config.cli import BASE, LORA_FILE
from mteditflow.export.weights import read_run
from mteditflow.policy import read_lora
from mteditflow.policy.lora_file import Lora, Module, adapter_for, find_lora, is_hub_word


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Something to evaluate; `word` is what the user called it, `what` says what was found there."""

    word: str
    what: str
    lora: Lora

    @property
    def slug(self) -> str:
        """Name of its folder among the results."""
        return re.sub(r"[^\w.]+", "-", self.word).strip("-.") or "here"

    @property
    def fingerprint(self) -> str:
        """Hash of all numbers of the adapter."""
        content = {f"{name}.{half}": value for name, it in self.lora.items() for half, value in vars(it).items()}
        tensors = {key: torch.as_tensor(value).clone() for key, value in content.items()}
        return hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()


def is_run(word: str) -> bool:
    """Whether a word names a run's folder. ValueError for what is nothing that can be evaluated."""
    folder = Path(word)
    if word == BASE or is_hub_word(word) or (folder.suffix == ".safetensors" and folder.is_file()):
        return False
    wanted = f"a run's folder, a LoRA (a .safetensors file, a folder with {LORA_FILE}, a hub name), or '{BASE}'"
    if not folder.is_dir():
        is_what = "a file" if folder.exists() else "no folder that exists"
        raise ValueError(f"{word!r} is {is_what}: give {wanted}")
    if (folder / "config.yaml").is_file() and not (folder / LORA_FILE).is_file():
        return True
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{word!r} has neither a run's config.yaml nor {LORA_FILE}: give {wanted}")
    find_lora(word)
    return False


def check_names(words: Sequence[str]) -> None:
    """ValueError where two subjects would share a folder of results."""
    taken: dict[str, str] = {}
    for word in words:
        slug = Subject(word=word, what="", lora={}).slug
        if slug in taken:
            raise ValueError(f"subjects {taken[slug]!r} and {word!r} would both be '{slug}' in --out: name each once")
        taken[slug] = word


def read_subject(word: str, model: ModelConfig) -> Subject:
    """Read the adapter of a subject, for an editor. ValueError: one line, where there is none, or none that fits."""
    if word == BASE:
        return Subject(word=word, what="the editor without adapter", lora={})
    if not is_run(word):
        return Subject(word=word, what="LoRA", lora=read_lora(word, model))
    trained = read_run(Path(word), "ema")
    config = trained.config
    if config.lora.is_full:
        raise ValueError(
            f"{word!r} trained whole weights, not a LoRA: export it (python -m mteditflow.export {word} --format "
            f"merged) and evaluate base with model.path set to the exported folder"
        )
    scale, state = config.lora.alpha / config.lora.rank, trained.state
    names = sorted({key.rsplit(".lora_", 1)[0] for key in state})
    lora = {
        name: Module(down=state[f"{name}.lora_A.weight"], up=state[f"{name}.lora_B.weight"], scale=scale)
        for name in names
    }
    what = f"run, averaged adapter after iteration {trained.iteration} of {config.run.num_iterations}"
    return Subject(word=word, what=what, lora=lora)


def check_fit(subject: Subject, shapes: dict[str, tuple[int, int]], path: str) -> None:
    """ValueError, naming what does not fit, unless the adapter of a run fits linears of these shapes (out, in)."""
    for name, module in subject.lora.items():
        if (found := (module.up.shape[0], module.down.shape[1])) != shapes.get(name):
            raise ValueError(
                f"{subject.word!r} does not fit model.path {path!r}: its {name}, of {found[1]} to {found[0]}, is no "
                f"linear of the model; set model.path to the editor it was trained on"
            )


def common_lora(subjects: Sequence[Subject], config: Config) -> LoraConfig:
    """Describe the adapter that can hold each subject's; that of `config` where none has any."""
    return adapter_for([subject.lora for subject in subjects], config.lora)
