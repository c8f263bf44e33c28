"""What a run gives back, or a LoRA of others, in the forms that are loaded: `python -m mteditflow.export RUN`.

    diffusers  pytorch_lora_weights.safetensors for `load_lora_weights`; of a run that trained the weights themselves
               (lora.is_full), the folder `transformer`
    comfyui    the LoRA as one file, with ComfyUI's keys
    merged     a whole pipeline, W + (alpha / r) B A computed in float32, that `from_pretrained` loads

The source is the run's newest checkpoint, so a run that is not finished can be exported too, or its final LoRA where
the checkpoints are gone. Each export has a model card beside it. The same weights give the same bytes, on any day.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import safetensors.torch
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.errors import HTTPError as ConnectionFailed  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

from mteditflow.config import Config, LoraConfig, ModelConfig
from mteditflow.config.cli import LORA_FILE, from_yaml
from mteditflow.config.errors import first_line
from mteditflow.distributed import Ranks
from mteditflow.export.card import TAG, Card, Format, write_card
from mteditflow.export.comfyui import comfyui_keys
from mteditflow.policy import DTYPES, AdapterName, Policy, linear_shapes, model_path, read_lora, stock_class
from mteditflow.policy.lora_file import adapter_for, find_lora, padded_state
from mteditflow.record import checkpoint
from mteditflow.transformer.sharded import whole_on_host

BEST, STANDING = "best", "standing"  # groups of a checkpoint, with run.patience: evaluate/best.py
PREFIX = "transformer."  # of a LoRA's keys in diffusers' format
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The trained weights of a run after an iteration, float32, as `Adapters.state` names them; or those of a LoRA."""

    config: Config
    iteration: int
    adapter: AdapterName
    state: dict[str, Tensor]
    origin: str = ""
    """The LoRA, as the user called it, of which nothing else is known; empty: a run."""
    is_finished: bool = True  # so that it is what was evaluated after training, where it is the average


def read_run(folder: Path, adapter: AdapterName) -> Trained:
    """Read an adapter of a run's newest checkpoint, or its final LoRA where the checkpoints are gone. The average is
    the best one, where the run kept it (run.patience).

    ValueError: no run folder, nothing saved in it, or one of another version.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"{folder} is no run folder: it has no config.yaml; give the run.folder of a training, or a LoRA and --base"
        )
    try:
        config = from_yaml(folder / "config.yaml")
    except ValueError as error:
        raise ValueError(f"{folder} is of another version, use it with the one that trained it: {error}") from None
    groups, run = (adapter, BEST, STANDING), config.run
    saved = checkpoint.load_latest(folder, config, lambda line: print(line, file=sys.stderr), groups=groups)
    if saved:
        names = (*saved.held, *saved.cut)
        standing = saved.read(STANDING) if STANDING in names and run.patience else {}
        is_finished = saved.iteration >= run.num_iterations
        is_finished |= bool(standing) and int(standing["num_stalled"]) >= run.patience
        is_best = adapter == "ema" and bool(standing) and BEST in names
        state = saved.read(BEST if is_best else adapter)
        iteration = int(standing["best"]) if is_best else saved.iteration
        return Trained(config=config, iteration=iteration, adapter=adapter, state=state, is_finished=is_finished)
    final = folder / "lora" / LORA_FILE
    if not final.is_file():
        raise ValueError(
            f"{folder} has no checkpoint yet, and no lora/{LORA_FILE}: train it first, run.save_every iterations"
        )
    if adapter != "ema":
        raise ValueError(f"{folder} has no checkpoint, only its final LoRA, which is the average: take --adapter ema")
    state = {key.removeprefix(PREFIX): weight for key, weight in safetensors.torch.load_file(final).items()}
    return Trained(config=config, iteration=config.run.num_iterations, adapter=adapter, state=state)


def read_origin(word: str, base: str | None) -> Trained:
    """Read a LoRA for the pipeline `base`. ValueError: none is given, or it cannot be had."""
    find_lora(word)
    if not base:
        raise ValueError(f"--base is missing: {word} is a LoRA, give the pipeline that it is for, as model.path")
    model = ModelConfig(path=base)
    lora = read_lora(word, model)
    adapter = adapter_for([lora], LoraConfig())
    shapes = linear_shapes(model)
    zeros = {
        f"{name}.lora_{half}.weight": torch.zeros(size)
        for name in adapter.targets
        for half, size in (("A", (adapter.rank, shapes[name][1])), ("B", (shapes[name][0], adapter.rank)))
    }
    state = padded_state(lora, adapter, zeros)
    return Trained(config=Config(model=model, lora=adapter), iteration=0, adapter="ema", state=state, origin=word)


def save_result(policy: Policy, config: Config, run: Path, ranks: Ranks, iteration: int) -> str:
    """Export a finished run's average, that after `iteration`, with a card, to RUN/lora or RUN/weights; returns the
    line that uses it. All ranks put together what is cut; the main one writes.
    """
    state = whole_on_host(policy.adapters.state("ema"), is_kept=ranks.is_main)
    use = f"{policy.family.transformer}.from_pretrained('{run / 'weights'}', subfolder='transformer')"
    if not ranks.is_main:
        return use
    trained = Trained(config=config, iteration=iteration, adapter="ema", state=state)
    if not config.lora.is_full:
        write_export(trained, run, run / "lora", "diffusers", "float32")
        return f"pipe.load_lora_weights('{run / 'lora'}')"
    write_export(trained, run, run / "weights", "diffusers", config.model.dtype)
    return use


def write_export(
    trained: Trained, run: Path, out: Path, form: Format, dtype: Dtype, hub_name: str | None = None
) -> None:
    """Write an export and its card into `out`. ValueError: a base that cannot be had, or has no such export."""
    config, lora, file = trained.config, trained.config.lora, ""
    pipeline, name = stock_class(config.model), Path(trained.origin).stem or run.resolve().name
    if form == "comfyui" and lora.is_full:
        raise ValueError("--format comfyui is a LoRA, but this run trained the weights: take --format merged")
    if not lora.is_full and form != "merged":
        state = {key: weight.to(DTYPES[dtype]).cpu() for key, weight in trained.state.items()}
        if form == "comfyui":
            keys, file = comfyui_keys(pipeline.__name__, state, alpha=lora.alpha), f"{name}.safetensors"
            out.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(keys, out / file, metadata={"format": "pt"})
        else:
            write_lora(pipeline, state, lora, out)
    else:
        folder = base_folder(config)
        transformer = merged_transformer(trained, folder)
        _cast(transformer, DTYPES[dtype])
        transformer.save_pretrained(out / "transformer")
        if form == "merged":
            _copy_rest(folder, out)
    card = Card(
        config=config, iteration=trained.iteration, adapter=trained.adapter, form=form, dtype=dtype,
        pipeline=pipeline.__name__, file=file, source=hub_name or str(out), origin=trained.origin,
        is_finished=trained.is_finished,
    )  # fmt: skip
    write_card(card, run, out)


def write_lora(pipeline: Any, state: dict[str, Tensor], lora: LoraConfig, folder: Path) -> None:
    """Write pytorch_lora_weights.safetensors for `load_lora_weights` of a pipeline, from what `Adapters.state` gives.

    It has no more metadata than loading needs: a key that another peft does not know would make it unreadable there.
    """
    targets = _module_names(state)
    pipeline.save_lora_weights(
        folder,
        transformer_lora_layers={key: weight.cpu() for key, weight in state.items()},
        transformer_lora_adapter_metadata={"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": targets},
    )
    _sort_metadata(folder / LORA_FILE)


def _sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata in order of their names, in place: it was written in that of a hash map, which
    is another one each time.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size, (path, len(text), size)
        file.seek(8)
        file.write(text)


def _module_names(state: dict[str, Tensor]) -> list[str]:
    """List the modules that a LoRA adapts."""
    return sorted({key.rsplit(".lora_", 1)[0] for key in state})


def base_folder(config: Config) -> Path:
    """Find the folder of the base pipeline, from the hub where it must be. ValueError where it cannot be had."""
    path = model_path(config.model)
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(DiffusionPipeline.download(path))
    except (OSError, ConnectionFailed) as error:
        raise ValueError(f"the base {path!r} cannot be had, which this export needs: {first_line(error)}") from None


def merged_transformer(trained: Trained, folder: Path) -> Any:
    """Load the base's transformer and put in what was trained: float32, on the CPU."""
    _, name = json.loads((folder / "model_index.json").read_text())["transformer"]
    logging.disable_progress_bar()
    transformer = getattr(diffusers, name).from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
    lora, state = trained.config.lora, {key: weight.cpu() for key, weight in trained.state.items()}
    weights = dict(transformer.named_parameters())
    if not lora.is_full:  # changes of weights, else the weights
        state = {f"{n}.weight": state[f"{n}.lora_B.weight"] @ state[f"{n}.lora_A.weight"] for n in _module_names(state)}
    for key, weight in state.items():
        if key not in weights or weights[key].shape != weight.shape:
            raise ValueError(
                f"what was trained does not fit the base in {folder}: it has no {key} of shape {tuple(weight.shape)}; "
                f"model.path must be the base that was trained"
            )
        with torch.no_grad():
            if not lora.is_full:
                weights[key].add_(weight, alpha=lora.alpha / lora.rank)
            else:
                weights[key].copy_(weight)
    return transformer


def _cast(transformer: Any, dtype: torch.dtype) -> None:
    """Cast all weights but those that the class keeps in float32 whatever it is loaded in."""
    kept = set(transformer._keep_in_fp32_modules or ())
    for name, weight in transformer.named_parameters():
        if kept.isdisjoint(name.split(".")):
            weight.data = weight.data.to(dtype)


def _copy_rest(folder: Path, out: Path) -> None:
    """Copy everything of the pipeline but the transformer, file by file."""
    shutil.copy(folder / "model_index.json", out / "model_index.json")
    for name in json.loads((folder / "model_index.json").read_text()):
        if name != "transformer" and (folder / name).is_dir():
            shutil.copytree(folder / name, out / name, dirs_exist_ok=True)


def check_hub(name: str) -> None:
    """Raise ValueError, before any work is done, for what is no hub name, or where there is no token."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise ValueError("--push_to must be a name on the hub, OWNER/NAME, of letters, digits, '-', '_' and '.'")
    if not get_token():
        raise ValueError(f"--push_to {name}: there is no token; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str) -> None:
    """Upload the folder to the model `name`, made private where it is not there. ValueError where that fails."""
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except OfflineModeIsEnabled:
        raise ValueError(f"--push_to {name}: HF_HUB_OFFLINE is set; unset it, {folder} is ready") from None
    except HfHubHTTPError as error:
        raise ValueError(
            f"--push_to {name}: refused ({first_line(error)}); the token must be allowed to write there, "
            f"{folder} is ready"
        ) from None
    except (OSError, ConnectionFailed) as error:
        raise ValueError(
            f"--push_to {name}: the hub cannot be reached ({first_line(error)}); try again, {folder} is ready"
        ) from None


def _check_out(out: Path) -> None:
    """Raise ValueError for a folder with anything else than an earlier export: it is not written to, nor uploaded."""
    if out.is_file():
        raise ValueError(f"--out {out} is a file: give a folder")
    card = out / "README.md"
    if out.is_dir() and any(out.iterdir()) and not (card.is_file() and f"- {TAG}\n" in card.read_text()):
        raise ValueError(f"--out {out} holds something else than an export: choose a folder that is new or empty")


def export_run(
    word: str,
    out: Path | None,
    *,
    form: Format,
    dtype: Dtype | None,
    adapter: AdapterName,
    base: str | None,
    hub_name: str | None,
) -> None:
    """Export a run, or a LoRA, upload it where it has a `hub_name`, and say so. ValueError in one line."""
    run = Path(word)
    if hub_name is not None:
        check_hub(hub_name)
    is_run = (run / "config.yaml").is_file() or not (run.exists() or base)
    if is_run and base:
        raise ValueError(f"--base is {base!r}: a run knows its own, leave it out")
    if not is_run and not out:
        raise ValueError(f"--out is missing: {word} is no run, give the folder to write")
    trained = read_run(run, adapter) if is_run else read_origin(word, base)
    is_lora = not trained.config.lora.is_full and form != "merged"
    dtype = dtype or ("float32" if is_lora else trained.config.model.dtype)
    out = out or run / "export" / f"{form}-{dtype}-{adapter}"
    _check_out(out)
    write_export(trained, run, out, form, dtype, hub_name)
    print(f"exported {f'{trained.adapter} of iteration {trained.iteration}' if is_run else word}: {out}")
    if hub_name is not None:
        push(out, hub_name)
        print(f"uploaded: https://huggingface.co/{hub_name}")
