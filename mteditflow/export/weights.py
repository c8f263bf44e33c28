"""What a run gives back, in the forms that others load: `python -m mteditflow.export RUN`.

    diffusers  pytorch_lora_weights.safetensors for `load_lora_weights`; of a run that trained the weights themselves
               (lora.rank 0), the folder `transformer`
    comfyui    the LoRA as one file, with ComfyUI's keys
    merged     a whole pipeline, W + (alpha / r) B A computed in float32, that `from_pretrained` loads

The source is the run's newest checkpoint, so a run that is not finished can be exported too, or its final LoRA where
the checkpoints are gone. Each export has a model card beside it.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
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

from mteditflow.config import Config, cli
from mteditflow.config.cli import LORA_FILE
from mteditflow.export.card import TAG, Card, Format, write_card
from mteditflow.export.comfyui import comfyui_keys
from mteditflow.policy import DTYPES, AdapterName, Policy, model_path, stock_class
from mteditflow.record import checkpoint

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The trained weights of a run after an iteration, float32, as `Adapters.state` names them."""

    config: Config
    iteration: int
    adapter: AdapterName
    state: dict[str, Tensor]


def read_run(folder: Path, adapter: AdapterName) -> Trained:
    """ValueError: no run folder, nothing saved in it, or one of another version."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is no run folder: it has no config.yaml; give the run.folder of a training")
    try:
        config = cli.from_yaml(folder / "config.yaml")
    except ValueError as error:
        raise ValueError(f"{folder} is of another version, export it with the one that trained it: {error}") from None
    saved = checkpoint.load_latest(folder, config, lambda line: print(line, file=sys.stderr), groups=(adapter,))
    if saved:
        return Trained(config=config, iteration=saved.iteration, adapter=adapter, state=saved.state[adapter])
    final = folder / "lora" / LORA_FILE
    if not final.is_file():
        raise ValueError(f"{folder} has no checkpoint to export yet: train at least run.save_every iterations")
    if adapter != "ema":
        raise ValueError(f"{folder} has no checkpoint, only its final LoRA, which is the average: take --adapter ema")
    prefix = "transformer."
    state = {key.removeprefix(prefix): weight for key, weight in safetensors.torch.load_file(final).items()}
    return Trained(config=config, iteration=config.run.num_iterations, adapter=adapter, state=state)


def save_lora(policy: Policy, folder: Path, adapter: AdapterName = "ema") -> None:
    """Writes pytorch_lora_weights.safetensors (float32; rank, alpha) for the stock `load_lora_weights(folder)`."""
    lora = policy.adapters.lora
    _write_lora(type(policy.pipeline), policy.adapters.state(adapter), folder, rank=lora.rank, alpha=lora.alpha)


def save_result(policy: Policy, config: Config, run: Path) -> str:
    """At the end of a run, its average with a card: RUN/lora, or RUN/weights. Returns the line that uses it."""
    state = policy.adapters.state("ema")
    trained = Trained(config=config, iteration=config.run.num_iterations, adapter="ema", state=state)
    if config.lora.rank:
        write(trained, run, run / "lora", "diffusers", "float32")
        return f"pipe.load_lora_weights('{run / 'lora'}')"
    write(trained, run, run / "weights", "diffusers", config.model.dtype)
    folder = run / "weights"
    return f"{type(policy.pipeline.transformer).__name__}.from_pretrained('{folder}', subfolder='transformer')"


def write(trained: Trained, run: Path, out: Path, form: Format, dtype: Dtype, hub_name: str | None = None) -> None:
    """Writes an export and its card into `out`. ValueError: a base that cannot be had, or has no such export."""
    config, lora = trained.config, trained.config.lora
    pipeline, file = stock_class(config.model), ""
    if form == "comfyui" and not lora.rank:
        raise ValueError("--format comfyui is a LoRA, but this run trained the weights: take --format merged")
    if form == "diffusers" and lora.rank:
        state = {key: weight.to(DTYPES[dtype]) for key, weight in trained.state.items()}
        _write_lora(pipeline, state, out, rank=lora.rank, alpha=lora.alpha)
    elif form == "comfyui":
        state = {key: weight.to(DTYPES[dtype]).cpu() for key, weight in trained.state.items()}
        keys = comfyui_keys(pipeline.__name__, state, alpha=lora.alpha)
        out.mkdir(parents=True, exist_ok=True)
        file = f"{run.resolve().name}.safetensors"
        safetensors.torch.save_file(keys, out / file, metadata={"format": "pt"})
    else:
        folder = base_folder(config)
        transformer = merged_transformer(trained, folder)
        _cast(transformer, DTYPES[dtype])
        transformer.save_pretrained(out / "transformer")
        if form == "merged":
            _copy_rest(folder, out)
    card = Card(
        config=config, iteration=trained.iteration, adapter=trained.adapter, form=form, dtype=dtype,
        pipeline=pipeline.__name__, file=file, source=hub_name or str(out),
    )  # fmt: skip
    write_card(card, run, out)


def base_folder(config: Config) -> Path:
    """The folder of the base pipeline, from the hub where it must be. ValueError where it cannot be had."""
    path = model_path(config.model)
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(DiffusionPipeline.download(path))
    except (OSError, ConnectionFailed) as error:
        raise ValueError(f"the base {path!r} cannot be had, which this export needs: {_reason(error)}") from None


def merged_transformer(trained: Trained, folder: Path) -> Any:
    """The base's transformer with what was trained, float32, on the CPU."""
    _, name = json.loads((folder / "model_index.json").read_text())["transformer"]
    logging.disable_progress_bar()
    transformer = getattr(diffusers, name).from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
    lora, state = trained.config.lora, {key: weight.cpu() for key, weight in trained.state.items()}
    new, changes = state, {}
    if lora.rank:
        modules = sorted({key.rsplit(".lora_", 1)[0] for key in state})
        new = {}
        changes = {f"{it}.weight": state[f"{it}.lora_B.weight"] @ state[f"{it}.lora_A.weight"] for it in modules}
    weights = dict(transformer.named_parameters())
    for key, weight in (new | changes).items():
        if key not in weights or weights[key].shape != weight.shape:
            raise ValueError(
                f"what was trained does not fit the base in {folder}: it has no {key} of shape {tuple(weight.shape)}; "
                f"model.path must be the base that was trained"
            )
    with torch.no_grad():
        for key, weight in new.items():
            weights[key].copy_(weight)
        for key, change in changes.items():
            weights[key].add_(change, alpha=lora.alpha / lora.rank)
    return transformer


def _cast(transformer: Any, dtype: torch.dtype) -> None:
    """All weights but those that the class keeps in float32 whatever it is loaded in."""
    kept = set(transformer._keep_in_fp32_modules or ())
    for name, weight in transformer.named_parameters():
        if kept.isdisjoint(name.split(".")):
            weight.data = weight.data.to(dtype)


def _write_lora(pipeline: Any, state: dict[str, Tensor], folder: Path, *, rank: int, alpha: int) -> None:
    # No more metadata than loading needs: a key that another peft does not know would make it unreadable there.
    targets = sorted({key.rsplit(".lora_", 1)[0] for key in state})
    pipeline.save_lora_weights(
        folder,
        transformer_lora_layers={key: weight.cpu() for key, weight in state.items()},
        transformer_lora_adapter_metadata={"r": rank, "lora_alpha": alpha, "target_modules": targets},
    )


def _copy_rest(folder: Path, out: Path) -> None:
    """Everything of the pipeline but the transformer, file by file."""
    shutil.copy(folder / "model_index.json", out / "model_index.json")
    for name in json.loads((folder / "model_index.json").read_text()):
        if name != "transformer" and (folder / name).is_dir():
            shutil.copytree(folder / name, out / name, dirs_exist_ok=True)


def check_hub(name: str) -> None:
    """ValueError, before any work is done, for what is no hub name, or where there is no token."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise ValueError("--push_to must be a name on the hub, OWNER/NAME, of letters, digits, '-', '_' and '.'")
    if not get_token():
        raise ValueError(f"--push_to {name}: there is no token; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str) -> None:
    """Uploads the folder to the model `name`, made private where it is not there. ValueError where that fails."""
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except OfflineModeIsEnabled:
        raise ValueError(f"--push_to {name}: HF_HUB_OFFLINE is set; unset it, {folder} is ready") from None
    except HfHubHTTPError as error:
        raise ValueError(
            f"--push_to {name}: refused ({_reason(error)}); the token must be allowed to write there, {folder} is ready"
        ) from None
    except (OSError, ConnectionFailed) as error:
        raise ValueError(
            f"--push_to {name}: the hub cannot be reached ({_reason(error)}); try again, {folder} is ready"
        ) from None


def _reason(error: Exception) -> str:
    """The first line that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")


def _check_out(out: Path) -> None:
    """An earlier export may be replaced; what is anything else must not be written to, nor uploaded."""
    if out.is_file():
        raise ValueError(f"--out {out} is a file: give a folder")
    card = out / "README.md"
    if out.is_dir() and any(out.iterdir()) and not (card.is_file() and f"- {TAG}\n" in card.read_text()):
        raise ValueError(f"--out {out} holds something else than an export: choose a folder that is new or empty")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mteditflow.export", description="What a run trained, for others.")
    parser.add_argument("run", type=Path, help="the run's folder; its newest checkpoint is exported")
    parser.add_argument("--out", type=Path, help="folder to write; left out: RUN/export/FORMAT-DTYPE-ADAPTER")
    parser.add_argument("--format", choices=["diffusers", "comfyui", "merged"], default="diffusers",
                        help="a LoRA for diffusers or for ComfyUI, or a whole pipeline with it merged in")  # fmt: skip
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        help="left out: float32 of a LoRA, model.dtype of whole weights")  # fmt: skip
    parser.add_argument("--adapter", choices=["ema", "current"], default="ema",
                        help="the average, which the run evaluates, or the newest weights")  # fmt: skip
    parser.add_argument("--push_to", metavar="OWNER/NAME", help="upload to this model of the hub, new ones are private")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exits with code 2 after one line for what is wrong."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.push_to is not None:
            check_hub(arguments.push_to)
        trained = read_run(arguments.run, arguments.adapter)
        is_lora = trained.config.lora.rank > 0 and arguments.format != "merged"
        dtype: Dtype = arguments.dtype or ("float32" if is_lora else trained.config.model.dtype)
        default = arguments.run / "export" / f"{arguments.format}-{dtype}-{arguments.adapter}"
        out = arguments.out or default
        _check_out(out)
        write(trained, arguments.run, out, arguments.format, dtype, arguments.push_to)
        print(f"exported {trained.adapter} of iteration {trained.iteration}: {out}")
        if arguments.push_to is not None:
            push(out, arguments.push_to)
            print(f"uploaded: https://huggingface.co/{arguments.push_to}")
    except ValueError as error:
        cli.fail(error)
    except OSError as error:
        if not checkpoint.is_no_room(error):
            raise
        cli.fail(f"no room on the disk for the export: free some, or choose another --out ({error})")
