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
        tensors = {key: torch.as_tensor(value).contiguous() for key, value in content.items()}
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
<<<<<<< HEAD
    scale = config.lora.alpha / config.lora.rank
    halves = {f"{PREFIX}{key}": weight for key, weight in trained.state.items()}
    what = f"run, averaged adapter after iteration {trained.iteration} of {config.run.num_iterations}"
    return Subject(word=word, what=what, lora=_pair_halves(halves, Path(word), lambda _: scale))


def read_lora(folder: Path) -> Lora:
    """Read a LoRA in diffusers' format; alpha, as there, by its metadata, or alpha tensors, or else equal to the rank.

    ValueError: one line that names what is not of that format.
    """
    path = folder / LORA_FILE
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it is not a whole safetensors file") from None
    try:
        everything: dict[str, Any] = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} has metadata lora_adapter_metadata that is not JSON: save it again") from None
    if not isinstance(everything, dict):
        raise ValueError(f"{path} has metadata lora_adapter_metadata of another shape than an object: save it again")
    settings = {key.removeprefix(PREFIX): value for key, value in everything.items() if key.startswith(PREFIX)}
    for name in NOT_HAD:
        if settings.get(name):
            raise ValueError(f"{path} has {name}, which cannot be evaluated here: only a plain LoRA can")
    alphas = {
        key.removeprefix(PREFIX).removesuffix(".alpha"): float(tensors.pop(key))
        for key in [key for key in tensors if key.startswith(PREFIX) and key.endswith(".alpha")]
    }

    def scale(module: str) -> float:
        rank = len(tensors[f"{PREFIX}{module}.lora_A.weight"])
        if not settings:
            return alphas.get(module, rank) / rank
        pattern = settings.get("alpha_pattern") or {}
        return pattern.get(get_pattern_key(list(pattern), module), settings["lora_alpha"]) / rank

    return _pair_halves(tensors, path, scale)


def _pair_halves(tensors: dict[str, Tensor], path: Path, scale: Callable[[str], float]) -> Lora:
    """Put A and B of each module together, from tensors by diffusers' keys; `scale` of a module's name."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if not match or tensor.ndim != 2:
            raise ValueError(
                f"{path} has {key!r}: only matrices 'transformer.MODULE.lora_A.weight' and lora_B can be evaluated; "
                "load another format in diffusers and save it with save_lora_weights"
            )
        halves.setdefault(match["module"], {})[match["half"]] = tensor.float()
    for module, pair in halves.items():
        if len(pair) < 2 or len(pair["A"]) != pair["B"].shape[1]:
            raise ValueError(
                f"{path}: lora_A and lora_B of {module} do not go together: the file is not whole, save it again"
            )
    if not halves:
        raise ValueError(f"{path} holds no LoRA of a transformer: give one that does")
    return {name: Module(down=pair["A"], up=pair["B"], scale=scale(name)) for name, pair in halves.items()}
=======
    scale, state = config.lora.alpha / config.lora.rank, trained.state
    names = sorted({key.rsplit(".lora_", 1)[0] for key in state})
    lora = {
        name: Module(down=state[f"{name}.lora_A.weight"], up=state[f"{name}.lora_B.weight"], scale=scale)
        for name in names
    }
    what = f"run, averaged adapter after iteration {trained.iteration} of {config.run.num_iterations}"
    return Subject(word=word, what=what, lora=lora)
>>>>>>> main


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
