"""The model card beside an export: what it is, how to use it, how it was trained, what it scored, what it draws."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml

from mteditflow.config import EMBEDDED, Config
from mteditflow.config.cli import to_yaml
from mteditflow.policy import family_of

TAG = "mt-editflow"
"""By which an export is known as one."""
METRICS = {
    "MT": "success of each turn",
    "IF": "success of all turns so far",
    "CC": "consistency of what no instruction touched",
    "O": "square root of IF x CC",
}
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

    @property
    def is_lora(self) -> bool:
        return self.config.lora.rank > 0 and self.form != "merged"


def write_card(card: Card, run: Path, out: Path) -> None:
    """Writes README.md, and strips.png where the run has drawn some."""
    strips = sorted((run / "strips").glob("iteration-*.png"))
    (out / "strips.png").unlink(missing_ok=True)  # of an export that this one replaces
    if strips:
        shutil.copy(strips[-1], out / "strips.png")
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, trim_blocks=True, undefined=jinja2.StrictUndefined)
    recipe = replace(card.config, run=replace(card.config.run, folder=f"runs/{run.resolve().name}"))
    page = template.get_template("card.md.jinja").render(
        matter=yaml.safe_dump(front_matter(card), sort_keys=False),
        title=run.resolve().name,
        card=card,
        config=card.config,
        code=usage(card),
        notes=_notes(card),
        base=_base_in_words(card.config),
        rows=_rows(run),
        metrics=METRICS,
        num_sessions=_json(run / "evaluation_before.json").get("num_sessions"),
        has_strips=bool(strips),
        recipe=to_yaml(recipe),
    )
    (out / "README.md").write_text(page, encoding="utf-8")


def front_matter(card: Card) -> dict[str, Any]:
    """The YAML that the hub reads. The base is named where it has a hub name."""
    path = card.config.model.path
    matter: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "image-to-image"}
    if path.count("/") == 1 and not Path(path).exists() and not path.startswith((".", "/", "~")):
        relation = "adapter" if card.is_lora else "merge" if card.config.lora.rank else "finetune"
        matter |= {"base_model": path, "base_model_relation": relation}
    tags = ["lora"] if card.is_lora else []
    return matter | {"tags": [*tags, "image-to-image", "image-editing", "diffusers", "reinforcement-learning", TAG]}


def usage(card: Card) -> str:
    """Python that loads the export and edits a picture at the size, steps and guidance of the run's evaluation."""
    model, dtype = card.config.model, f"torch.{card.config.model.dtype}"
    base = f'"{model.path}"' if model.path != EMBEDDED else 'str(files("mteditflow") / "world" / "editor")'
    lines = ["from importlib.resources import files", ""] if model.path == EMBEDDED and card.form != "merged" else []
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
    """What goes wrong when it is left out."""
    height, width = card.config.model.condition_size
    family, lora = family_of(card.pipeline), card.config.lora
    notes = [f"{family.note}; it was trained with {width} x {height}."] if family and family.note else []
    return notes + ([f"alpha / rank is {lora.alpha} / {lora.rank}, and the file says so."] if card.is_lora else [])


def _base_in_words(config: Config) -> str:
    return "the miniature editor that ships with mteditflow" if config.model.path == EMBEDDED else config.model.path


def _rows(run: Path) -> list[dict[str, str]]:
    """A row per metric and turn: before, after and paired gain with 95 % intervals; what is not there is a dash."""
    before, after, gain = (
        {turn["turn"]: turn for turn in _json(run / f"{name}.json").get("turns", [])}
        for name in ("evaluation_before", "evaluation_after", "comparison")
    )
    return [
        {
            "metric": metric,
            "turn": str(turn),
            "before": _cell(before[turn], metric),
            "after": _cell(after.get(turn, {}), metric),
            "gain": _cell(gain.get(turn, {}), f"{metric}_gain", "+"),
        }
        for metric in METRICS
        for turn in before
    ]


def _cell(turn: dict[str, Any], name: str, sign: str = "") -> str:
    value, interval = turn.get(name), turn.get(f"{name}_interval")
    if value is None:
        return "\N{EN DASH}"
    return f"{value:{sign}.1f}" + (f" [{interval[0]:{sign}.1f}, {interval[1]:{sign}.1f}]" if interval else "")


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
