"""From command line and YAML file to a Config; a wrong value is one line on stderr and exit code 2.

The arguments are added field by field, not class by class: jsonargparse then has no `--section FILE` options to show,
and the type of a field is at hand, so that messages can name field, value and remedy. Nothing here imports torch.
"""

import difflib
import json
import math
import subprocess
import sys
import textwrap
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser

from mteditflow.config import Config

HELP_WIDTH = 118
BASE = "base"
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name of it
DEFAULT_TITLE = "Every setting and its default: equal to no argument at all. Override any: --section.field value"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of one section of a Config, as a user sees it."""

    section: str
    name: str
    type: Any
    default: Any
    sentence: str

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal; empty for any other type."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def remedy(self) -> str:
        """What a value of the wrong type should have been."""
        if self.choices:
            return f"must be one of {', '.join(self.choices)}"
        kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        return f"must be {kinds.get(self.type, 'a list of texts, such as [a, b]')}"


@cache
def settings() -> dict[str, Setting]:
    """Every 'section.field', in the order of config.py; the sentence is the docstring under the field."""
    found = {}
    for section, section_class in get_type_hints(Config).items():
        types = get_type_hints(section_class)
        docs = {
            param.arg_name: param.description or ""
            for param in docstring_parser.parse_from_object(section_class).params
        }
        for field in fields(section_class):
            sentence = " ".join(docs.get(field.name, "").split())
            found[f"{section}.{field.name}"] = Setting(
                section=section, name=field.name, type=types[field.name], default=field.default, sentence=sentence
            )
    return found


def section_titles() -> dict[str, str]:
    """The first docstring line of each section of a Config."""
    return {section: (cls.__doc__ or "").splitlines()[0] for section, cls in get_type_hints(Config).items()}


def fail(message: object) -> NoReturn:
    """Say what is wrong in one line on stderr and exit with code 2."""
    print(f"mteditflow: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def commit() -> str:
    """The commit of the program, with a mark where files differ from it; 'unknown' outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def parse(argv: Sequence[str] | None, *, prog: str) -> tuple[Config, bool]:
    """The Config of a command line (None: sys.argv), and whether `--dry_run` was given.

    Exits with code 0 after --help and --print_config, with code 2 after one line on stderr when something is wrong.
    """
    try:
        namespace = _namespace(_words(argv), _parser(prog))
        config = _config(namespace)
    except ValueError as error:
        fail(error)
    if namespace.print_config:
        print_and_stop(config)
    return config, namespace.dry_run


def print_and_stop(config: Config) -> NoReturn:
    """What --print_config asks for."""
    print(commented_yaml(config), end="")
    raise SystemExit(0)


def parse_evaluation(argv: Sequence[str] | None, *, prog: str) -> Any:
    """The namespace of a command line of `evaluate`: `subjects`, `out`, `print_config`, and the settings as they stand.

    Exits with code 0 after --help. ValueError: one line that names what is wrong.
    """
    return _namespace(_words(argv), _evaluation_parser(prog))


def evaluation_config(argv: Sequence[str] | None, *, prog: str, run: Path | None) -> Config:
    """The Config of a command line of `evaluate`; config.yaml of a run's folder sets what it leaves open.

    ValueError: one line that names what is wrong.
    """
    first = [] if run is None else ["--config", str(run / "config.yaml")]
    namespace = _namespace([*first, *_words(argv)], _evaluation_parser(prog))
    # What only training has must not stand in the way of few sessions.
    namespace.evaluation.num_sessions_short = namespace.evaluation.num_sessions
    return _config(namespace)


def from_yaml(path: str | Path) -> Config:
    """The Config of a YAML file. ValueError: one line that names file or field, value and remedy."""
    return _config(_namespace(["--config", str(path)], _parser("mteditflow")))


def as_arguments(overrides: dict[str, Any]) -> list[str]:
    """Dotted overrides such as {"rollout.num_tasks": 4} as words of a command line."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]


def from_overrides(overrides: dict[str, Any]) -> Config:
    """The default Config with dotted overrides. ValueError: one line that names field, value and remedy."""
    for key in overrides:
        if key not in settings():
            raise ValueError(f"{key} is no field: {suggest(str(key), list(settings()))}")
    return _config(_namespace(as_arguments(overrides), _parser("mteditflow")))


def to_yaml(config: Config) -> str:
    """A Config as plain YAML, every field written out; `from_yaml` reads it back equal."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def commented_yaml(config: Config, title: str = DEFAULT_TITLE) -> str:
    """A Config as YAML with each field's sentence above it; how the files in configs/ are made."""
    values, titles = asdict(config), section_titles()
    lines = textwrap.wrap(title, HELP_WIDTH, initial_indent="# ", subsequent_indent="# ")
    for key, setting in settings().items():
        if f"{setting.section}:" not in lines:
            lines += ["", f"# {titles[setting.section]}", f"{setting.section}:"]
        comment = setting.sentence + (f" [{', '.join(setting.choices)}]" if setting.choices else "")
        lines += textwrap.wrap(comment, HELP_WIDTH, initial_indent="  # ", subsequent_indent="  # ")
        section, name = key.split(".")
        value = yaml.safe_dump(values[section][name], default_flow_style=True, width=10**6).removesuffix("...\n")
        lines.append(f"  {name}: {value.strip()}")
    return "\n".join(lines) + "\n"


def _parser(prog: str) -> ArgumentParser:
    """The parser of every command that trains by a Config."""
    usage = "%(prog)s [--config FILE.yaml] [--section.field VALUE ...] [--print_config] [--dry_run]"
    parser = _bare_parser(
        prog, usage, "The file is read first, overrides come after it; what neither names keeps its default."
    )
    parser.add_argument("--dry_run", action="store_true", help="Print batch arithmetic, memory and duration, and stop.")
    _add_settings(parser)
    return parser


def _evaluation_parser(prog: str) -> ArgumentParser:
    """The parser of `evaluate`: what is evaluated, where to, and how by a Config."""
    parser = _bare_parser(
        prog,
        "%(prog)s SUBJECT [SUBJECT ...] [--out FOLDER] [--config FILE.yaml] [--section.field VALUE ...]",
        "EdiVal metrics of editors on the same held-out sessions and noise, by the ODE; every gain is over the first "
        "subject. Settings come from config.yaml of the runs among the subjects, then from the file, then from "
        "overrides, such as --evaluation.num_turns 10 --evaluation.num_steps 28; what none names keeps its default. "
        "The same command again keeps what is finished.",
    )
    parser.add_argument(
        "subjects",
        nargs="+",
        type=str,
        metavar="SUBJECT",
        help=f"A run's folder (its newest checkpoint), a folder with {LORA_FILE}, or '{BASE}', the editor without any.",
    )
    parser.add_argument(
        "--out",
        type=str,
        default="runs/comparison",
        metavar="FOLDER",
        help="Where comparison.html and each subject's metrics.json and strips.png are written.",
    )
    _add_settings(parser)
    return parser


def _bare_parser(prog: str, usage: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        usage=usage,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_argument("--config", action="config", metavar="FILE.yaml", help="YAML file of sections and fields.")
    parser.add_argument(
        "--print_config", action="store_true", help="Print the resolved configuration, commented, and stop."
    )
    return parser


def _add_settings(parser: ArgumentParser) -> None:
    """An option for every field of a Config."""
    groups = {section: parser.add_argument_group(title.rstrip(".")) for section, title in section_titles().items()}
    for key, setting in settings().items():
        metavar = None if setting.choices else "VALUE"
        groups[setting.section].add_argument(
            f"--{key}",
            type=setting.type,
            default=setting.default,
            metavar=metavar,
            help=setting.sentence.replace("%", "%%"),
        )


def _words(argv: Sequence[str] | None) -> list[str]:
    return list(sys.argv[1:] if argv is None else argv)


def _namespace(arguments: list[str], parser: ArgumentParser) -> Any:
    """The parser's namespace, whose sections are not checked yet. ValueError for what the parser finds wrong."""
    paths = [value for flag, value in pairwise(arguments) if flag == "--config"]
    for path in paths + [word.removeprefix("--config=") for word in arguments if word.startswith("--config=")]:
        _check_file(path)
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(_explain(str(error))) from None


def _config(namespace: Any) -> Config:
    """The Config in a namespace. ValueError for anything that a user can get wrong."""
    sections = {}
    for section, section_class in get_type_hints(Config).items():
        values = vars(namespace[section])
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{section}.{name} is {value}: must be a finite number")
        sections[section] = section_class(**values)
    return Config(**sections)


def _check_file(path: str) -> None:
    """ValueError unless `path` is a readable YAML file of known sections and fields."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"config file {path} cannot be read ({error.strerror}): give the path of a YAML file"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"config file {path} is not text in UTF-8: give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config file {path} is not valid YAML: {error}") from None
    known = settings()
    sections = list(section_titles())
    if not isinstance(tree, dict) or not tree:
        raise ValueError(
            f"config file {path} holds no sections: write some of {', '.join(sections)}, or leave out --config"
        )
    for section, values in tree.items():
        if section not in sections:
            raise ValueError(f"{section} is no section, in {path}: {suggest(str(section), sections)}")
        if not isinstance(values, dict):
            raise ValueError(f"{section} is {values!r}, in {path}: must be a section with fields below it")
        for name in values:
            if f"{section}.{name}" not in known:
                names = [setting.name for setting in known.values() if setting.section == section]
                raise ValueError(f"{section}.{name} is no field, in {path}: {suggest(str(name), names)}")


def suggest(word: str, known: Sequence[str]) -> str:
    """The known word nearest to a wrong one, or all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"


def _explain(message: str) -> str:
    """jsonargparse's message in the words of the house: field, value, remedy."""
    key = message.removeprefix("Parser key ").split('"')[1] if message.startswith('Parser key "') else ""
    if key in settings() and "Got value: " in message:
        value = message.rsplit("Got value: ", 1)[1]
        return f"{key} is {value!r}: {settings()[key].remedy}"
    if message.endswith("arguments are required: subjects"):
        return f"there is nothing to evaluate: name run folders, folders with {LORA_FILE}, or '{BASE}'"
    if message.startswith("unrecognized arguments: "):
        word = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
        options = [f"--{key}" for key in settings()] + ["--config", "--print_config", "--dry_run", "--help"]
        near = difflib.get_close_matches(word, options, n=1)
        remedy = f"did you mean {near[0]}?" if near else "--help lists what there is"
        return f"{word} is no argument: {remedy}"
    return message
