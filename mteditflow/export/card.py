"""The model card beside an export: what it is, how to use it, how it was trained, what it scored, what it draws."""

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from mteditflow.config import Config
from mteditflow.config.cli import to_yaml
from mteditflow.config.model import MINIATURES
from mteditflow.policy import family_of
from mteditflow.record.figures import METRICS, RESULTS, SHOWN, align_turns, read_figures
from mteditflow.record.templates import write_page

TAG = "mt-editflow"
"""By which an export is known as one."""
Format = Literal["diffusers", "comfyui", "merged"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card tells of an export."""

    config: Config
    iteration: int
    adapter: str
    form: Format
    dtype: str
    pipeline: str
    """Name of the diffusers class."""
    file: str
    """Name of ComfyUI's file; else empty."""
    source: str
    """From where the export is loaded: its folder, or its name on the hub."""
    origin: str = ""
    """The LoRA, of which nothing more is known, that the export is another form of; empty: a run."""
    is_finished: bool = True
    """Whether the run came to its end, so that it was evaluated after training."""

    @property
    def is_lora(self) -> bool:
        return not self.config.lora.is_full and self.form != "merged"


def write_card(card: Card, run: Path, out: Path) -> None:
    """Write README.md, and strips.png where the run has drawn some. It names no path of this machine and no server."""
    card = replace(card, config=public_config(card.config), source=public_path(card.source))
    if card.origin:
        values = {"matter": yaml.safe_dump(front_matter(card), sort_keys=False), "card": card, "lora": card.config.lora,
                  "origin": public_path(card.origin), "base": _base_in_words(card.config)}  # fmt: skip
        write_page("export/origin.md.jinja", values, out / "README.md")
        return
    strips = sorted((run / "strips").glob("iteration-*.png"))
    (out / "strips.png").unlink(missing_ok=True)  # of an export that this one replaces
    if strips:
        mine = run / "strips" / f"iteration-{card.iteration:06d}.png"
        shutil.copy(mine if mine in strips else strips[-1], out / "strips.png")
    recipe = replace(card.config, run=replace(card.config.run, folder=f"runs/{run.resolve().name}"))
    before, after, gain = (read_figures(run / f"{name}.json") for name in RESULTS)
    values = {
        "matter": yaml.safe_dump(front_matter(card), sort_keys=False),
        "title": run.resolve().name,
        "card": card,
        "config": card.config,
        "code": usage(card),
        "notes": _notes(card),
        "base": _base_in_words(card.config),
        "metrics": {name: METRICS[name] for name in SHOWN},
        "before": before,
        "turns": align_turns(before, after, gain),
        "has_strips": bool(strips),
        "recipe": to_yaml(recipe),
    }
    write_page("export/card.md.jinja", values, out / "README.md")


def read_usage(out: Path, base: str) -> str:
    """Read the Python of an export's card, as it runs on this machine: with the paths of the export and of the base
    pipeline. Empty where there is no card, or one without Python.
    """
    path = out / "README.md"
    found = re.search(r"^```python\n(.*?)\n```$", path.read_text() if path.is_file() else "", re.DOTALL | re.MULTILINE)
    code = found[1] if found else ""
    for local in (str(out), base):
        code = code.replace(f'"{public_path(local)}"', f'"{local}"')
    return code


def public_config(config: Config) -> Config:
    """The config as others may see it: a path of this machine is its last name alone, a server has no address."""
    sections = {}
    for name, section in vars(config).items():
        texts: dict[str, Any] = {key: public_path(text) for key, text in vars(section).items() if isinstance(text, str)}
        if name == "reward":
            also = (it.text.replace(it.path, public_path(it.path)) for it in config.reward.also_rewards)
            texts |= {"url": "", "also": tuple(also)}
        sections[name] = replace(section, **texts)
    return replace(config, **sections)


def public_path(path: str) -> str:
    """The last name of a path of this machine; what is none, such as a hub name, as it is."""
    is_hub_name = path.count("/") < 2 and not path.startswith((".", "/", "~")) and not Path(path).exists()
    return path if is_hub_name else Path(path).name


def front_matter(card: Card) -> dict[str, Any]:
    """Say in the hub's words what the export is; the base is named where it has a hub name."""
    path = card.config.model.path
    matter: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "image-to-image"}
    if path.count("/") == 1 and public_path(path) == path:
        relation = "adapter" if card.is_lora else "finetune" if card.config.lora.is_full else "merge"
        matter |= {"base_model": path, "base_model_relation": relation}
    tags = ["lora"] if card.is_lora else []
    how = [] if card.origin else ["reinforcement-learning"]
    return matter | {"tags": [*tags, "image-to-image", "image-editing", "diffusers", *how, TAG]}


def usage(card: Card) -> str:
    """Write Python that loads the export and edits a picture at the size, steps and guidance of the evaluation."""
    model, dtype = card.config.model, f"torch.{card.config.model.dtype}"
    folder = MINIATURES.get(model.path)
    base = f'str(files("mteditflow") / "world" / "{folder.name}")' if folder else f'"{model.path}"'
    lines = ["from importlib.resources import files", ""] if folder and card.form != "merged" else []
    lines += ["import torch", f"from diffusers import {card.pipeline}", "from diffusers.utils import load_image", ""]
    load = f"pipe = {card.pipeline}.from_pretrained("
    if card.form == "merged":
        lines += [f'{load}"{card.source}", torch_dtype={dtype})']
    elif card.is_lora:
        lines += [f"{load}{base}, torch_dtype={dtype})", f'pipe.load_lora_weights("{card.source}")']
    else:
        lines += [
            f"{load}{base}, torch_dtype={dtype})",
            f'kind = type(pipe.transformer)\npipe.transformer = kind.from_pretrained("{card.source}", '
            f'subfolder="transformer", torch_dtype={dtype})',
        ]
    height, width = model.condition_size
    lines += [
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
        f'image = load_image("photo.png").resize(({width}, {height}))',
        "edit = pipe(",
        *(f"    {name}={value}," for name, value in arguments(card.pipeline, card.config).items()),
        ").images[0]",
        'edit.save("edit.png")',
    ]
    return "\n".join(lines)


def arguments(pipeline: str, config: Config) -> dict[str, str]:
    """The arguments of a stock call that make it what was trained and evaluated, as Python."""
    model = config.model
    given: dict[str, Any] = {
        "image": "image",
        "prompt": '"make the red car blue"',
        "height": model.height,
        "width": model.width,
        "num_inference_steps": config.evaluation.num_steps,
        "max_sequence_length": model.max_text_tokens,
    }
    family = family_of(pipeline)
    assert family is not None, pipeline
    return {name: str(value) for name, value in (given | family.stock_arguments(pipeline, model)).items()}


def _notes(card: Card) -> list[str]:
    """List what goes wrong when it is left out."""
    height, width = card.config.model.condition_size
    family, lora = family_of(card.pipeline), card.config.lora
    notes = [f"{family.note}; it was trained with {width} x {height}."] if family and family.note else []
    others = " and ".join(f"{wide} x {high}" for high, wide in card.config.data.sizes)
    notes += [f"It was trained on pictures of {others}, too: give each the size of its aspect."] if others else []
    return notes + ([f"alpha / rank is {lora.alpha} / {lora.rank}, and the file says so."] if card.is_lora else [])


def _base_in_words(config: Config) -> str:
    path = config.model.path
    return f"the {path} miniature that ships with mteditflow" if path in MINIATURES else path
