"""The memory that a run will take on each GPU, by part, from shapes alone: nothing is allocated.

Sizes come from a pipeline's folder, or from the hub's cache, or, for a published model that is not there yet, from
`policy/published.py`. The transformer is built on the meta device, so that parameters and targets are counted on the
model itself.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import nn

from mteditflow.config import Config, ModelConfig
from mteditflow.config.model import MINIATURES
from mteditflow.data import count_references
from mteditflow.evaluate.parts import part_size
from mteditflow.objective import build_objective
from mteditflow.plan.activations import Kept, Pass, bytes_kept
from mteditflow.plan.sharding import Cut, at_training, cut_units
from mteditflow.policy import DTYPES, Family, configured_family, family_of
from mteditflow.policy.encoding import rows_at_a_time
from mteditflow.policy.family import width_of
from mteditflow.policy.pipelines import WHOLE, loading
from mteditflow.policy.published import JUDGES, MODELS, RANDOM
from mteditflow.transformer.adapters import find_targets
from mteditflow.transformer.base import linears_to_quantise, stored
from mteditflow.transformer.compiled import is_compiled

GIB = 2**30


CONTEXT_GIB = 0.6  # CUDA, cuBLAS and cuDNN in a process; ours, not measured yet
QUESTION_TOKENS = 1500  # of 4 images of 512 px, and the rubric; measured at 1,467 (docs/results/gpu.md)
READING_BYTES = 0.16 * GIB  # activations of a row while Qwen3-VL-8B reads its question; an estimate
FRAGMENTATION = 0.05  # of what is allocated, by torch's allocator; ours, not measured yet
MARGIN = f"margin: context {CONTEXT_GIB} GiB, fragmentation {FRAGMENTATION:.0%}"
OPTIMIZER_STEP = 1  # copies of the trained weights that AdamW makes for all of them at once
INT8_TEXT_ENCODER = 1.13  # bytes a weight, with its embeddings in 16 bits (Qwen2.5-VL, the most)
TRAINING = "activations of a training microbatch"
GATHERED = "base: blocks gathered from all ranks"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a pipeline's files, or its published configs, say of its size. Numbers of weights by part."""

    family: Family
    transformer: dict[str, Any]  # its config
    num_transformer: int
    stored: dict[str, tuple[int, int]]  # rows, and bytes of a row, of its tensors as `model.base` stores them
    num_largest: int  # weights of the largest linear that is quantised
    num_text_encoders: int
    num_autoencoder: int
    num_trained: int
    trained: dict[str, int]  # weights that are trained of each linear, by full name


def read_sizes(config: Config) -> Sizes:
    """Sizes of `model.path`; no weight is read. ValueError: neither a folder nor a model whose sizes are known."""
    path = config.model.path
    folder = folder_of(path)
    if folder is None:
        if path not in MODELS:
            raise ValueError(
                f"model.path is {path!r}: no folder, not in the hub's cache here, and none of {', '.join(MODELS)}; "
                f"give a folder or download it"
            )
        known = MODELS[path]
        family, transformer = family_of(known.pipeline), known.transformer
        assert family is not None, known
        others = {"text_encoder": round(1e9 * known.text_encoders), "vae": round(1e9 * known.autoencoder)}
    else:
        family, others = configured_family(replace(config.model, path=str(folder))), _weights_by_part(folder)
        try:
            transformer = json.loads((folder / "transformer" / "config.json").read_text())
        except OSError:
            raise ValueError(
                f"model.path is {path!r}, without transformer/config.json: must be the folder of a diffusers pipeline"
            ) from None
        except (ValueError, RecursionError):
            raise ValueError(f"model.path is {path!r}: its transformer/config.json is not JSON; {WHOLE}") from None
    with loading(f"model.path {path!r}", WHOLE), torch.device("meta"):
        model: nn.Module = getattr(diffusers, family.transformer).from_config(transformer)
    trained = _trained(config, model, family)
    is_whole = config.lora.is_full and not config.lora.targets
    return Sizes(
        family=family,
        transformer=transformer,
        num_transformer=sum(weight.numel() for weight in model.parameters()),
        stored=stored(model, config.model.base),
        num_largest=_largest_quantised(config, model),
        num_text_encoders=sum(count for part, count in others.items() if part.startswith("text_encoder")),
        num_autoencoder=others.get("vae", 0),
        num_trained=sum(weight.numel() for weight in model.parameters()) if is_whole else sum(trained.values()),
        trained=trained,
    )


def _largest_quantised(config: Config, model: nn.Module) -> int:
    """Weights of the largest linear that `model.base` quantises; 0 where it quantises none."""
    if config.model.quantised is None:
        return 0
    quantised = linears_to_quantise(model, config.model.quantised).values()
    return max(linear.in_features * linear.out_features for linear, _ in quantised)


def _trained(config: Config, model: nn.Module, family: Family) -> dict[str, int]:
    """Weights that are trained of each linear that is a target: of its adapter, or with lora.is_full its own."""
    lora = config.lora
    names = set(find_targets(model, lora.targets, ("*",) if lora.is_full else family.targets))
    linears = {
        name: module for name, module in model.named_modules() if name in names and isinstance(module, nn.Linear)
    }
    if lora.is_full:
        return {name: sum(weight.numel() for weight in module.parameters()) for name, module in linears.items()}
    return {name: lora.rank * (module.in_features + module.out_features) for name, module in linears.items()}


def memory_plan(config: Config, sizes: Sizes) -> dict[str, float]:
    """GiB by part, on each of `run.num_gpus` ranks; the sum is what the run needs: for pictures of the size that needs
    most.
    """
    plans = [_plan_one_size(config.at(*size), sizes) for size in config.sizes]
    return max(plans, key=lambda plan: sum(plan.values()))


def _plan_one_size(config: Config, sizes: Sizes) -> dict[str, float]:
    """GiB by part, where all pictures have the model's size.

    What stays: weights; trained weights, gradients and two moments of AdamW, four float32 each, `ema` and NFT's `old`
    one more each; a rollout's latents of S+1 noise levels, conditions and images. Phases follow each other: where
    another takes more than a training pass, what it takes beyond that is a part of its own. Last the margin. Of a
    transformer that is cut over ranks, a rank's part, and what is gathered.
    """
    model, copies = config.model, 2 + build_objective(config).has_old
    cut = cut_units(config, sizes.stored, sizes.trained)
    parts: dict[str, float] = {
        "base: transformer": cut.base.kept,
        GATHERED: _gathered_in_training(config, sizes, cut),
        "base: a weight dequantised": sizes.num_largest * (4 if model.base == "nf4" else 2),
        "base: text encoders": 0 if model.text_encoder == "offload" else _text_encoders(config, sizes),
        "base: autoencoder": sizes.num_autoencoder * _num_bytes(config),
        "adapter, averages": copies * (cut.copy.kept if cut.copy else 4 * sizes.num_trained),
        "gradient, optimizer": 3 * (cut.gradients.kept if cut.gradients else 4 * sizes.num_trained),
        "latents of a rollout": _latents(config, sizes),
        TRAINING: _training(config, sizes),
        "judge": _judge(config),
        "judge, at work": _judging(config),
        "reward models": _reward_models(config),
    }
    phases = _other_phases(config, sizes, cut)
    largest, in_training = max(phases, key=lambda name: phases[name]), parts[TRAINING] + parts[GATHERED]
    if phases[largest] > in_training:
        parts[f"{largest}, beyond a training pass"] = phases[largest] - in_training
    if is_of_gpu(config):
        parts[MARGIN] = CONTEXT_GIB * GIB + FRAGMENTATION * sum(parts.values())
    return {part: size / GIB for part, size in parts.items()}


def _gathered_in_training(config: Config, sizes: Sizes, cut: Cut) -> float:
    """Bytes of blocks gathered at the peak of a training microbatch; passes of the old policy or the reference run when
    all is kept.
    """
    rows, kept = _rows(config, config.optimizer.microbatch_size), _kept(config, sizes)
    gathered = at_training(cut.at_work, cut.gradients, kept, rows)
    return max(gathered, cut.at_work.gathered) if build_objective(config).num_forwards > 1 else gathered


def is_of_gpu(config: Config) -> bool:
    """Whether the plan is for a GPU: one that the config names by its memory, or that is here."""
    return config.run.gpu_gib > 0 or torch.cuda.is_available()


def _num_bytes(config: Config) -> int:
    """Of a number in the forward pass."""
    return DTYPES[config.model.dtype].itemsize


def _text_encoders(config: Config, sizes: Sizes) -> float:
    """Bytes of the text encoders where they encode."""
    each = INT8_TEXT_ENCODER if config.model.text_encoder == "int8" else _num_bytes(config)
    return sizes.num_text_encoders * each


def _rows(config: Config, microbatch_size: int) -> int:
    """Rows of a microbatch on a rank."""
    return min(microbatch_size, math.ceil(config.rollout.num_tasks * config.rollout.group_size / config.run.num_gpus))


def _latents(config: Config, sizes: Sizes) -> float:
    """Bytes that the trajectories of a rank hold: its turns, and the turn that is being put together once more."""
    rollout = config.rollout
    rows = math.ceil(rollout.num_tasks * rollout.group_size / config.run.num_gpus)
    return rows * (config.data.num_turns + 1) * _turn(config, sizes, rollout.num_steps)


def _turn(config: Config, sizes: Sizes, num_steps: int) -> float:
    """Bytes of a turn of a trajectory: latents of all noise levels, the condition, the picture, the text."""
    model, (_, most) = config.model, count_references(config)
    text_tokens = num_text_tokens(model, sizes.family, most)
    tokens, condition_tokens = num_image_tokens(model, sizes.family, most)
    numbers = ((num_steps + 1) * tokens + condition_tokens) * sizes.transformer["in_channels"]
    numbers += 3 * model.height * model.width
    return 4 * numbers + text_tokens * sizes.transformer["joint_attention_dim"] * _num_bytes(config)


def _one_width(config: Config, sizes: Sizes) -> int:
    """Bytes of a row's tokens at the width of the blocks."""
    of = config.model, sizes.family, count_references(config)[1]
    return (sum(num_image_tokens(*of)) + num_text_tokens(*of)) * width_of(sizes.transformer) * _num_bytes(config)


def training_pass(config: Config, sizes: Sizes) -> Pass:
    """A training pass of a run through its transformer."""
    lora, most = config.lora, count_references(config)[1]
    return Pass(
        saved=sizes.family.saved,
        transformer=sizes.transformer,
        trained=sizes.trained,
        num_trained=sizes.num_trained,
        is_whole=lora.is_full and not lora.targets,
        is_compiled=is_compiled(config.model, lora, torch.device("cuda" if is_of_gpu(config) else "cpu")),
        rank=0 if lora.is_full else lora.rank,
        num_bytes=_num_bytes(config),
        image_tokens=sum(num_image_tokens(config.model, sizes.family, most)),
        text_tokens=num_text_tokens(config.model, sizes.family, most),
    )


def _kept(config: Config, sizes: Sizes) -> Kept:
    return bytes_kept(training_pass(config, sizes), is_checkpointed=config.model.is_checkpointed)


def _training(config: Config, sizes: Sizes) -> float:
    """Bytes of a training microbatch at its peak: what autograd keeps of each pass, and what lives beside it: of a
    block's backward pass, or of a forward pass of the old policy or the reference.
    """
    rows, kept = _rows(config, config.optimizer.microbatch_size), _kept(config, sizes)
    others = sizes.family.saved.forward * _one_width(config, sizes) if build_objective(config).num_forwards > 1 else 0
    per_row = num_passes(config) * kept.per_row + max(kept.at_peak, others)
    return rows * per_row + num_passes(config) * kept.per_pass


def _other_phases(config: Config, sizes: Sizes, cut: Cut) -> dict[str, float]:
    """Bytes that come and go in each phase outside of training, by its name."""
    model, evaluation, numbers = config.model, config.evaluation, _num_bytes(config)
    pictures = rows_at_a_time(model.height, model.width)
    forward = _rows(config, config.rollout.microbatch_size) * sizes.family.saved.forward * _one_width(config, sizes)
    forward += cut.at_work.gathered
    num, num_turns, rows = evaluation.num_sessions, config.num_held_out_turns, config.rollout.microbatch_size
    evaluated = [(num, num_turns), (num * (num_turns - 1) * evaluation.has_true_inputs, 1)]  # sessions, turns of each
    sessions = max(min(2 * part_size(many, rows), many) * (turns + 1) for many, turns in evaluated)
    return {
        "forward pass of a rollout": forward,
        "autoencoder": pictures * sizes.family.picture_numbers * model.height * model.width * numbers,
        "encoders, to encode": _text_encoders(config, sizes) if model.text_encoder == "offload" else 0,
        "evaluation": forward + sessions * _turn(config, sizes, evaluation.num_steps),
        "optimizer step": OPTIMIZER_STEP * (cut.gradients.kept if cut.gradients else 4 * sizes.num_trained),
    }


def num_passes(config: Config) -> int:
    """Forward passes for a velocity in training: two with guidance."""
    return 2 if config.model.cfg_scale != 1 and config.rollout.is_guided else 1


def num_image_tokens(model: ModelConfig, family: Family, num_references: float = 0) -> tuple[int, int]:
    """L of the output and L' of the condition, with references that are as large."""
    height, width = model.condition_size
    area = family.pixels_per_token**2
    return model.height * model.width // area, round((1 + num_references) * (height * width // area))


def num_text_tokens(model: ModelConfig, family: Family, num_references: float = 0) -> int:
    """T, with what the text encoder sees of references."""
    return family.num_text_tokens(model) + round(num_references * family.text_tokens_of_image(model))


def _judge(config: Config) -> float:
    """Bytes of a VLM judge in this process, in bfloat16."""
    reward = config.reward
    if reward.judge != "vlm" or reward.url:
        return 0.0
    folder = folder_of(reward.vlm_path, "reward.vlm", "config.json")
    if folder is None:
        if reward.vlm not in JUDGES:
            raise ValueError(f"reward.vlm is {reward.vlm!r}: no folder, and its size is not known; give a folder")
        return 2e9 * JUDGES[reward.vlm]
    return 2.0 * sum(_num_weights(path) for path in folder.glob("*.safetensors"))


def _judging(config: Config) -> float:
    """Bytes of a VLM judge's batch in this process: keys and values of question and answer, and reading the question.
    By Qwen3-VL-8B's 36 layers with 8 heads of 128, in a judge of another folder by its own.
    """
    reward, rollout = config.reward, config.rollout
    if reward.judge != "vlm" or reward.url:
        return 0.0
    layers, heads, width, share = 36, 8, 128, 1.0
    folder = folder_of(reward.vlm_path, "reward.vlm", "config.json")
    if folder is not None and (folder / "config.json").is_file():
        text = json.loads((folder / "config.json").read_text()).get("text_config", {})
        layers, heads = text.get("num_hidden_layers", layers), text.get("num_key_value_heads", heads)
        width, share = text.get("head_dim", width), text.get("hidden_size", 4096) / 4096
    wave = -(-(rollout.wave_size or rollout.group_size) // rollout.microbatch_size) * rollout.microbatch_size
    rows = 2 ** math.ceil(math.log2(min(reward.num_parallel, wave)))  # the cache has whole powers of two
    tokens = QUESTION_TOKENS + (reward.max_answer_tokens if reward.readout != "expected" else 0)
    return rows * (2 * 2 * layers * heads * width * tokens + share * READING_BYTES)


def _reward_models(config: Config) -> float:
    """Bytes of the models of reward.also, in float32; those that a class of the user's loads are not known."""
    size = 0.0
    for also in config.reward.also_rewards:
        if not also.module:
            name = f"reward.also {also.text!r}"
            folder = folder_of(also.path, name, "config.json")
            if folder is None:
                raise ValueError(f"{name} is {also.path!r}: no folder, and its size is not known; download it first")
            size += 4.0 * sum(_num_weights(path) for path in folder.glob("*.safetensors"))
    return size


def folder_of(path: str, name: str = "model.path", file: str = "model_index.json") -> Path | None:
    """Where a model's files are on this machine, `file` among them; None: a hub name that is not in the cache. `name`
    is the field's.
    """
    if path in MINIATURES:
        return MINIATURES[path]
    if Path(path).is_dir():
        return Path(path)
    if path.count("/") != 1:
        if path != RANDOM:
            raise ValueError(f"{name} is {path!r}: no folder, and no hub name, which is owner/name")
        return None
    found = try_to_load_from_cache(path, file)
    return Path(found).parent if isinstance(found, str) else None


def _weights_by_part(folder: Path) -> dict[str, int]:
    """Numbers of weights of a pipeline's parts, from the headers of its safetensors files."""
    counts: dict[str, int] = {}
    for path in folder.glob("*/*.safetensors"):
        if len(path.name.split(".")) == 2:  # model.fp16.safetensors is the same weights once more
            counts[path.parent.name] = counts.get(path.parent.name, 0) + _num_weights(path)
    return counts


def _num_weights(path: Path) -> int:
    """Count the numbers of a safetensors file, by its header."""
    with loading(f"model.path: {path}", WHOLE), safe_open(path, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
