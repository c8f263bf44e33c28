"""From `model.path` to a diffusers pipeline, frozen and on its device; a path that is wrong is one line."""

import importlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub.errors import GatedRepoError
from torch import Tensor, nn

from mteditflow.config import ModelConfig
from mteditflow.config.errors import first_line
from mteditflow.config.model import MINIATURES
from mteditflow.record import ending
from mteditflow.transformer.base import quantise
from mteditflow.transformer.sharded import local

WHOLE = "give the whole folder of a diffusers pipeline, with its transformer"
NOT_REACHED = "is no folder, and no hub name that can be reached"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of `ModelConfig.dtype`


def model_path(config: ModelConfig) -> str:
    """Return the folder or hub name of the configured pipeline."""
    return str(MINIATURES.get(config.path, config.path))


def read_index(path: str) -> dict[str, Any]:
    """Read a pipeline's model_index.json, from a folder or the hub. ValueError where there is none."""
    folder, remedy = Path(path), "give the folder of a diffusers pipeline, or its name on the hub"
    try:
        is_folder, is_there = folder.is_dir(), folder.exists()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise ValueError(f"model.path {path!r} cannot be read ({error.strerror}): {remedy}") from None
    if is_folder:
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                f"model.path {path!r} is not a diffusers pipeline: the folder has no model_index.json; {remedy}"
            )
    elif is_there:
        raise ValueError(f"model.path {path!r} is a file: {remedy}")
    elif path.startswith((".", "/", "~")) or path.count("/") != 1:  # a hub name is owner/name
        raise ValueError(f"model.path {path!r} does not exist: {remedy}")
    try:
        index: Any = DiffusionPipeline.load_config(path)
    except (OSError, RecursionError) as error:
        if any(isinstance(cause, GatedRepoError) for cause in (error, error.__cause__, error.__context__)):
            raise ValueError(
                f"model.path {path!r} is gated: accept its licence on huggingface.co/{path}, then log in with hf auth "
                f"login"
            ) from error
        where = "has a model_index.json that cannot be read" if is_folder else NOT_REACHED
        raise ValueError(f"model.path {path!r} {where}: {first_line(error)}") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError(f"model.path {path!r} has a model_index.json that names no pipeline: {remedy}")
    return index


@contextmanager
def loading(name: str, remedy: str) -> Iterator[None]:
    """Have whatever a library raises over files of another shape be a ValueError of one line; not what tells of memory
    that runs out.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | ValueError) and ending.explain(error) is not None:
            raise
        raise ValueError(f"{name} cannot be loaded ({first_line(error)}): {remedy}") from error


def stock_class(config: ModelConfig) -> Any:
    """Return the diffusers class of the configured pipeline. ValueError: diffusers has none of that name."""
    path = model_path(config)
    name = read_index(path)["_class_name"]
    if not hasattr(diffusers, name):
        raise ValueError(f"model.path {path!r} is a {name}, which this diffusers does not have: update it")
    return getattr(diffusers, name)


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every linear of the editor's transformer, by full name; no weight is read."""
    path = model_path(config)
    index = read_index(path)
    with loading(f"model.path {path!r}", WHOLE), torch.device("meta"):
        transformer_class: Any = getattr(diffusers, index["transformer"][1])
        transformer = transformer_class.from_config(transformer_class.load_config(path, subfolder="transformer"))
    return {
        name: (module.out_features, module.in_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    }


def load_pipeline(config: ModelConfig, packages: tuple[str, ...] = ()) -> Any:
    """Load the configured pipeline on the host. ValueError where it needs a package that is not installed."""
    path = model_path(config)
    _check_packages(path, packages)
    stock: Any = stock_class(config)
    with warnings.catch_warnings(), loading(f"model.path {path!r}", WHOLE):
        # `dtype` is its new name; the old one is known to every diffusers that pyproject.toml allows.
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        logging.disable_progress_bar()  # the run has its own, and none where output is piped
        return stock.from_pretrained(path, torch_dtype=DTYPES[config.dtype])


def load_tokenizers(config: ModelConfig) -> Any:
    """Load the configured pipeline without its models, which are not read: tokenizers and templates are left."""
    path = model_path(config)
    stock: Any = stock_class(config)
    models = {name: None for name in read_index(path) if name.startswith(("transformer", "vae", "text_encoder"))}
    with loading(f"model.path {path!r}", WHOLE):
        logging.disable_progress_bar()
        return stock.from_pretrained(path, **models)


def _check_packages(path: str, packages: tuple[str, ...]) -> None:
    """transformers has a stand-in for a class whose packages are missing, of which diffusers says nothing useful."""
    for package in packages:
        if not find_spec(package):
            raise ValueError(f"model.path {path!r} needs {package}: install the {package} that goes with this torch")
    library = importlib.import_module("transformers")
    for value in read_index(path).values():
        if isinstance(value, (list, tuple)) and value[0] == "transformers":
            missing = ", ".join(getattr(getattr(library, value[1], None), "_backends", ()))
            if missing:
                raise ValueError(f"model.path {path!r} has a {value[1]}, which needs {missing}: install it with pip")


def check_finite(pipeline: Any, path: str) -> None:
    """Raise ValueError for a pipeline with weights that are not finite, for which a judge would be blamed."""
    for part, module in pipeline.components.items():
        for name, weight in module.named_parameters() if isinstance(module, nn.Module) else ():
            if weight.dtype in (torch.float16, *DTYPES.values()) and not local(weight).isfinite().all():
                raise ValueError(f"model.path {path!r}: {name} of its {part} is not finite: get these weights anew")


def prepare_pipeline(
    pipeline: Any, config: ModelConfig, device: torch.device, *, keeps_originals: bool = False, is_cut: bool = False
) -> dict[str, Tensor]:
    """Freeze a pipeline and move it to the device; its text encoders stay on the host where they are 'offload', and
    its transformer where it is to be cut.

    What is quantised is moved linear by linear. Returns the transformer's weights as they were, on the host by name,
    where they are to be kept and it is quantised.
    """
    pipeline.set_progress_bar_config(disable=True)
    originals = {}
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
            is_text = name.startswith("text_encoder")
            if is_text and config.text_encoder == "int8":
                quantise(module, "int8", device)
            if name == "transformer" and config.quantised:
                originals = quantise(
                    module, config.quantised, device, keeps_originals=keeps_originals, is_returned=is_cut
                )
            if not ((is_text and config.text_encoder == "offload") or (name == "transformer" and is_cut)):
                module.to(device)
    if config.is_checkpointed:
        pipeline.transformer.enable_gradient_checkpointing()
    return originals


def is_slow_in_bfloat16(device: torch.device) -> bool:
    """Whether the device is a processor without bfloat16: its convolutions then take some 50 times as long."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def check_scheduler(pipeline: Any, config: ModelConfig, constants: Mapping[str, object]) -> None:
    """ValueError where the scheduler would sample at other noise levels than those that are trained."""
    for name, value in constants.items():
        found = pipeline.scheduler.config.get(name, value)
        if found != value:
            raise ValueError(
                f"scheduler of {model_path(config)!r} has {name} {found!r}: the schedule of its family has {value!r}"
            )


def token_grids(config: ModelConfig, pixels: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of tokens of the output, and of the condition, at `pixels` per side of a token."""
    for name in ("height", "width", "condition_height", "condition_width"):
        value = getattr(config, name)
        if value % pixels:
            raise ValueError(
                f"model.{name} is {value}: must be a multiple of {pixels} for the autoencoder of {model_path(config)!r}"
            )
    height, width = config.condition_size
    return (config.height // pixels, config.width // pixels), (height // pixels, width // pixels)
