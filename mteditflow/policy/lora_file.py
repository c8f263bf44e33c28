"""LoRAs of others: the file that a word names, what it adds to which linear, and the adapter that can hold it.

    diffusers            transformer.MODULE.lora_A.weight, lora_B; alpha in the metadata
    peft                 base_model.model.MODULE.lora_A.weight; alpha in adapter_config.json beside the file
    kohya, musubi        lora_unet_MODULE.lora_down.weight, lora_up, alpha of each module
    ai-toolkit, ComfyUI  diffusion_model.MODULE.lora_A.weight or lora_down; alpha of each module, or none

MODULE is diffusers' name or the model's original one (lora_names.py). Where nothing says what alpha is, it is the rank,
as in diffusers and ComfyUI. What is no plain LoRA, scale B A on linears of the transformer, is refused by its name.

A LoRA of rank r and scale s (alpha / r) goes into an adapter of rank R and scale S as

    A' = [A; any]  (R, in)      B' = [B s / S, 0]  (out, R)      S B' A' = s B A

which is the same function, to rounding; where rank, scale and modules are the adapter's own, to the bit.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.errors import HTTPError as ConnectionFailed  # pyright: ignore[reportPrivateImportUsage]
from peft.utils.other import get_pattern_key
from torch import Tensor

from mteditflow.config import LoraConfig
from mteditflow.config.cli import LORA_FILE
from mteditflow.config.errors import first_line
from mteditflow.policy.lora_names import SWAPPED, Names, flat, spellings, without_prefixes

KEY = re.compile(r"(.+?)\.(?:lora_(A|B)(?:\.default)?|lora[_.](down|up)|lora_linear_layer\.(down|up))\.weight")
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
OTHERS = {  # what a key with this in it is of; the names of LyCORIS, kohya, peft and ComfyUI
    r"^(text_encoder|lora_te|te\d?[_.]|.*\.text_model\.)": "the text encoder, which is not trained here",
    r"\.dora_scale$|\.lora_magnitude_vector": "a DoRA",
    r"\.lokr_": "a LoKr",
    r"\.hada_": "a LoHa",
    r"\.b?oft_": "an OFT",
    r"\.vera_lambda": "a VeRA",
    r"\.ia3_l|\.on_input$": "an (IA)^3",
    r"\.[ab][12]\.weight$": "a GLoRA",
    r"\.lora_mid\.": "a LoRA of convolutions (Tucker)",
    r"\.lora_(A|B|up|down)(\.default)?\.bias$|\.lora[_.](up|down)\.bias$": "a LoRA with biases",
    r"\.(diff|diff_b|set_weight|reshape_weight)$": "differences of whole weights",
}
SETTINGS = {  # of peft's config, that make another function of the weights
    "use_dora": "a DoRA",
    "lora_bias": "a LoRA with biases",
    "use_qalora": "a QA-LoRA",
    "alora_invocation_tokens": "an aLoRA",
    "arrow_config": "an Arrow router",
    "use_bdlora": "a BD-LoRA",
    "kasa_config": "a KaSA",
    "monteclora_config": "a MonteCLoRA",
    "modules_to_save": "a LoRA beside whole weights",
    "layer_replication": "a LoRA of repeated layers",
    "target_parameters": "a LoRA of what is no linear",
    "trainable_token_indices": "a LoRA beside tokens",
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of peft's init_lora_weights that also subtract from the base's weights."""
REMEDY = "only a plain LoRA can be read: merge it into its base, and set model.path to that"


@dataclass(frozen=True, kw_only=True)
class Module:
    """What a LoRA adds to a linear: scale * up @ down."""

    down: Tensor  # (r, in)
    up: Tensor  # (out, r)
    scale: float


Lora = dict[str, Module]
"""By full name of the module in the transformer."""


def is_hub_word(word: str) -> bool:
    """Whether a word may be OWNER/NAME of the hub, or OWNER/NAME/FILE."""
    return not Path(word).exists() and word.count("/") >= 1 and not word.startswith((".", "/", "~"))


def find_lora(word: str) -> Path:
    """Find the file of a LoRA: itself, in a folder, or on the hub. ValueError where it is none, or one of several."""
    path = Path(word).expanduser()
    if path.is_dir():
        return path / _choose([file.name for file in path.iterdir()], f"the folder {word!r}")
    if path.exists():
        if path.suffix != ".safetensors":
            raise ValueError(f"{word!r} is a file: give a .safetensors file; others may run code when they are loaded")
        return path
    if not is_hub_word(word):
        raise ValueError(f"{word!r} does not exist: give a .safetensors file, a folder with one, or OWNER/NAME")
    return _from_hub(word)


def _from_hub(word: str) -> Path:
    """Download the LoRA that a hub name, or a file's below it, names; without a network what is there already."""
    owner, name, *rest = word.split("/")
    repo, file = f"{owner}/{name}", "/".join(rest)
    try:
        try:
            names = HfApi().list_repo_files(repo)
        except (OfflineModeIsEnabled, ConnectionFailed, OSError) as error:
            if isinstance(error, HfHubHTTPError):  # it was reached, and refused
                raise
            names = [str(found.relative_to(folder)) for folder in [Path(snapshot_download(repo, local_files_only=True))]
                     for found in folder.rglob("*") if found.is_file()]  # fmt: skip
        file = file or _choose(names, f"{repo} on the hub")
        beside = str(Path(file).parent / PEFT_FILES[1])
        if beside in names:
            hf_hub_download(repo, beside)
        return Path(hf_hub_download(repo, file))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionFailed, OSError) as error:
        raise ValueError(f"{word!r} is no file or folder, and nothing on the hub: {first_line(error)}") from None


def _choose(names: Sequence[str], where: str) -> str:
    """Choose a folder's LoRA: by diffusers' name of it or peft's, else the only file."""
    found = sorted(name for name in names if name.endswith(".safetensors"))
    for usual in (LORA_FILE, PEFT_FILES[0]):
        if usual in found:
            return usual
    if len(found) == 1:
        return found[0]
    if not found:
        hint = "; it is a run, whose LoRA is in its folder lora" if "config.yaml" in names else ""
        raise ValueError(f"{where} has no .safetensors file{hint}: give a LoRA")
    raise ValueError(f"{where} has {len(found)} .safetensors files: name one, such as {found[0]}")


def parse_lora(word: str, model_path: str, shapes: Mapping[str, tuple[int, int]], originals: Names) -> Lora:
    """Read the LoRA that `word` names, for a transformer of linears of these shapes (out, in).

    ValueError: one line; there is none, it cannot be read, is no plain LoRA, or is of another model.
    """
    path = find_lora(word)
    tensors, settings = _load(path)
    _check_kind(path, tensors, settings)
    halves, alphas = _halves(path, tensors)
    names, found = spellings(originals, shapes), Lora()
    unknown = [stem for stem in halves if _linears(stem, names) is None]
    if unknown:
        key = next(key for key in tensors if key.startswith(f"{unknown[0]}."))
        raise ValueError(
            f"{word!r} does not fit model.path {model_path!r}: it adapts {key}, no linear of the model "
            f"({len(unknown)} of its {len(halves)} are not); set model.path to the editor it was trained on"
        )
    is_bare_peft = not settings and not alphas and all(key.startswith("base_model.model.") for key in tensors)
    if is_bare_peft and all(_peft_name(stem) in shapes for stem in halves):
        raise ValueError(f"{path} has peft's keys, but no {PEFT_FILES[1]} beside it, which says alpha: put it there")
    for stem, (down, up) in halves.items():
        parts = _linears(stem, names)
        assert parts is not None
        sizes, num_in = [shapes[part][0] for part in parts], shapes[parts[0]][1]
        if (len(up), down.shape[1]) != (sum(sizes), num_in):
            raise ValueError(
                f"{word!r} does not fit model.path {model_path!r}: {parts[0] if len(parts) == 1 else stem} is "
                f"{down.shape[1]} to {len(up)} in it and {num_in} to {sum(sizes)} in the model; set model.path to the "
                f"editor it was trained on"
            )
        if flat(stem).endswith(flat(SWAPPED)):
            up = torch.cat(up.chunk(2)[::-1])
        for part, module in zip(parts, _split(down, up, sizes, _scale(stem, len(down), settings, alphas)), strict=True):
            if part in found:
                raise ValueError(f"{path} has two changes of {part}: the file is of no known form")
            found[part] = module
    return found


def _linears(stem: str, names: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Find the linears that a file's name means; None for one that is not known."""
    return next((names[left] for left in without_prefixes(stem) if left in names), None)


def _peft_name(stem: str) -> str:
    return stem.removeprefix("base_model.model.").removeprefix("transformer.")


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file's tensors, and peft's settings of the transformer, from its metadata or beside it."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it is not a whole safetensors file") from None
    beside, text, where = (
        path.parent / PEFT_FILES[1],
        metadata.get("lora_adapter_metadata"),
        "its lora_adapter_metadata",
    )
    if text is None and beside.is_file() and any(key.startswith("base_model.") for key in tensors):
        text, where = beside.read_text(encoding="utf-8", errors="replace"), str(beside)
    try:
        everything = json.loads(text or "{}")
        settings = {key.removeprefix("transformer."): value for key, value in everything.items()}
        float(settings.get("lora_alpha", 1))
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path}: {where} is not peft's settings as JSON: save it again") from None
    return tensors, settings


def _check_kind(path: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Raise ValueError, with its name, for what is no plain LoRA of the transformer, or has numbers that are none."""
    for pattern, kind in OTHERS.items():
        if key := next((key for key in tensors if re.search(pattern, key)), None):
            raise ValueError(f"{path} has {key!r}, of {kind}: {REMEDY}")
    kinds = [f"{kind} ({name})" for name, kind in SETTINGS.items() if settings.get(name)]
    if (peft_type := str(settings.get("peft_type", "LORA"))) != "LORA":
        kinds.append(f"of peft_type {peft_type}")
    if str(settings.get("init_lora_weights", "")).startswith(CHANGES_BASE):
        kinds.append(f"for a base that was changed with it (init_lora_weights {settings['init_lora_weights']})")
    if settings.get("bias", "none") != "none":
        kinds.append(f"beside biases (bias {settings['bias']})")
    if kinds:
        raise ValueError(f"{path} is {kinds[0]}: {REMEDY}")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path} has {key!r} of {tensor.dtype}: must be floating point, save it in bfloat16")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{path} has NaN or infinity in {key!r}: take an earlier save of it")


def _halves(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """Put together A and B (float32) of each module, and its alpha where it has one, by the file's names."""
    found: dict[str, dict[bool, Tensor]] = {}
    alphas = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match and tensor.ndim == 2:
            half = next(filter(None, match.groups()[1:]))
            found.setdefault(match[1], {})[half in ("A", "down")] = tensor.float()
        elif key.endswith(".alpha") and tensor.numel() == 1:
            alphas[key.removesuffix(".alpha")] = float(tensor)
        else:
            raise ValueError(
                f"{path} has {key!r}, which is no part of a LoRA of linears: MODULE.lora_A.weight and lora_B, or "
                f"lora_down and lora_up, are"
            )
    broken = [stem for stem, both in found.items() if len(both) < 2 or len(both[True]) != both[False].shape[1]]
    if broken := broken or [stem for stem in alphas if stem not in found]:
        key = next(key for key in tensors if key.startswith(f"{broken[0]}."))
        raise ValueError(f"{path}: lora_A and lora_B of {broken[0]} ({key}) do not go together: the file is not whole")
    if not found:
        raise ValueError(f"{path} holds no LoRA of a transformer")
    return {stem: (both[True], both[False]) for stem, both in found.items()}, alphas


def _scale(stem: str, rank: int, settings: dict[str, Any], alphas: dict[str, float]) -> float:
    """Find what B A is multiplied by: of alpha tensors, else of peft's settings, else 1."""
    if stem in alphas or not settings:
        return alphas.get(stem, rank) / rank
    pattern, name = settings.get("alpha_pattern") or {}, _peft_name(stem)
    alpha = pattern.get(get_pattern_key(list(pattern), name), settings.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _split(down: Tensor, up: Tensor, sizes: Sequence[int], scale: float) -> list[Module]:
    """Cut what is several linears of diffusers into theirs, (out, in) of `sizes` rows: all have the same A, or, where B
    is zero but for a block of each, as of linears that were trained apart and put together, a part of it.
    """
    num, rows, rank = len(sizes), list(up.split(list(sizes))), len(down)
    if num > 1 and rank % num == 0:
        blocks = [part.chunk(num, dim=1) for part in rows]
        if not any(block.any() for i, part in enumerate(blocks) for j, block in enumerate(part) if i != j):
            downs = down.chunk(num)
            return [Module(down=downs[i], up=blocks[i][i].contiguous(), scale=scale) for i in range(num)]
    return [Module(down=down, up=part, scale=scale) for part in rows]


def adapter_for(loras: Collection[Lora], lora: LoraConfig) -> LoraConfig:
    """Describe the adapter that can hold each LoRA, as wide as the widest; `lora` where none has any module."""
    modules = [module for item in loras for module in item.values()]
    if not modules:
        return replace(lora, init_from="")
    widest = max(modules, key=lambda module: len(module.down))
    rank, alpha = len(widest.down), widest.scale * len(widest.down)
    names = sorted({name for item in loras for name in item})
    is_whole = alpha >= 1 and math.isclose(alpha, round(alpha))
    return replace(lora, rank=rank, alpha=round(alpha) if is_whole else rank, targets=tuple(names), init_from="")


def padded_state(lora: Lora, wide: LoraConfig, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make weights for `Adapters.load` that hold a LoRA; `like` stands where it has none, with B zero: an adapter that
    is new, or zeros.
    """
    state = {key: weight.clone() for key, weight in like.items()}
    for name, module in lora.items():
        rank, factor = len(module.down), module.scale * wide.rank / wide.alpha
        state[f"{name}.lora_A.weight"][:rank] = module.down
        state[f"{name}.lora_B.weight"][:, :rank] = module.up if math.isclose(factor, 1) else module.up * factor
    return state
