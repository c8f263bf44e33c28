"""From command line and YAML file to a Config, and back; nothing here imports torch.

A YAML file becomes words of a command line that stand before the user's, so that files, overrides of a study and
`--section.field VALUE` are parsed and refused in one way. What is wrong is a ValueError of one line.
"""

import difflib
import json
import re
import sys
import textwrap
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser

from mteditflow.config import Config
from mteditflow.config.errors import fail, suggest
from mteditflow.config.ranges import require, show

Command = Callable[[Sequence[str]], int]
WIDTH = 118
MAX_BYTES = 2**20  # of a YAML file
BASE = "base"  # the subject of `evaluate` that is the editor without any adapter
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name of it
RENAMED = {
    "model.dtype": "write model.base, one of float32, bfloat16, float8, int8, nf4",
    "model.vae_slicing": "leave it out, large pictures go through the autoencoder one by one",
}
REMEDIES = {"'int'": "a whole number", "'float'": "a number", "'bool'": "true or false", "'tuple'": "a list of texts"}

WRONG_TYPE = re.compile(
    r'Parser key "(?P<key>[^"]+)".*?Expected a (<class (?P<kind>.*?)>|typing.Literal\[(?P<choices>.*?)\])', re.DOTALL
)

MISREAD = re.compile(r"[-+]?0[\d_box].*|[-+]?\d[\d_]*:.*", re.IGNORECASE)
"""Numbers that YAML 1.1 reads as others than they look: 010 is 8 there, 1:30 is 90."""


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


@cache
def settings() -> dict[str, Setting]:
    """Return every 'section.field' in the order of settings.py; the sentence is the docstring under the field."""
    found = {}
    for section, section_class in get_type_hints(Config).items():
        types = get_type_hints(section_class)
        docs = {p.arg_name: p.description or "" for p in docstring_parser.parse_from_object(section_class).params}
        for field in fields(section_class):
            found[f"{section}.{field.name}"] = Setting(
                section=section, name=field.name, type=types[field.name], default=field.default,
                sentence=" ".join(docs.get(field.name, "").split()),
            )  # fmt: skip
    return found


def section_titles() -> dict[str, str]:
    """Return the first docstring line of each section of a Config."""
    return {section: (cls.__doc__ or "").splitlines()[0] for section, cls in get_type_hints(Config).items()}


def bare_parser(program: str, description: str, usage: str | None = None) -> ArgumentParser:
    """Return a parser without arguments whose errors `parse` explains."""
    return ArgumentParser(
        prog=program, usage=usage, description=description, exit_on_error=False, allow_abbrev=False, print_config=None
    )


def dispatch(name: str, commands: Mapping[str, Command], words: Sequence[str], title: str) -> int:
    """Run the command that the first word names; --help, or no word, lists the commands."""
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {program_name(name)} COMMAND ...   (COMMAND --help says more)\n\n{title}\n")
        for word, command in commands.items():
            print(f"  {word:<15}{sentence(command)}")
        return 0
    if words[0] not in commands:
        fail(f"{words[0] or repr('')} is no command: {suggest(words[0], list(commands))}")
    return commands[words[0]](words[1:])


def program_name(name: str) -> str:
    """Return what the user typed to come to a command: the console script, or a module."""
    if Path(sys.argv[0]).name == "mteditflow" or not name:
        return f"mteditflow {name.removeprefix('world.')}".strip()
    return f"python -m mteditflow.{name}"


def sentence(command: Command) -> str:
    return (command.__doc__ or "").splitlines()[0]


def command_parser(name: str, command: Command, sub_command: str = "") -> ArgumentParser:
    return bare_parser(f"{program_name(name)} {sub_command}".strip(), sentence(command))


def settings_parser(program: str, description: str, usage: str) -> ArgumentParser:
    """Return a parser of --config, --print_config and an option for every field of a Config."""
    parser = bare_parser(program, description, usage)
    parser.add_argument("--config", type=str, action="append", metavar="FILE.yaml", help="sections and fields as YAML")
    parser.add_argument("--print_config", action="store_true", help="print the settings, each explained, and stop")
    groups = {section: parser.add_argument_group(title.rstrip(".")) for section, title in section_titles().items()}
    for key, setting in settings().items():
        groups[setting.section].add_argument(
            f"--{key}", type=setting.type, default=setting.default, metavar=None if setting.choices else "VALUE",
            help=setting.sentence.replace("%", "%%"),
        )  # fmt: skip
    return parser


def run_parser(program: str = "mteditflow", description: str = "") -> ArgumentParser:
    """Return the parser of the commands whose arguments are a Config alone."""
    parser = settings_parser(
        program,
        f"{description} The file is read first, overrides come after it; what neither names keeps its default.",
        "%(prog)s [--config FILE.yaml] [--section.field VALUE ...] [--print_config] [--dry_run [--gpu NAME ...]]",
    )
    add = parser.add_argument
    add("--dry_run", action="store_true", help="print batch arithmetic, memory and duration, and stop")
    add("--gpu", type=str, metavar="NAME", help="with --dry_run: estimate duration and energy on it, such as h100")
    add("--price", type=float, help="with --gpu: what an hour of one costs, for the cost of the run")
    profile = "with --gpu: a profile.json of that GPU, whose speed is taken"
    add("--calibration", type=Path, metavar="FILE", help=profile)
    return parser


def parse(parser: ArgumentParser, words: Sequence[str], first: Sequence[str] = ()) -> Any:
    """Return the parser's namespace: `first`, over it what the files of --config set, over both the words. ValueError:
    one line of what is wrong.
    """
    try:
        _check_words(parser, words)
        values = parser.parse_args(list(words))
        files = [word for path in values.get("config") or [] for word in as_arguments(read_settings(Path(path)))]
        _check_words(parser, files)
        values = parser.parse_args([*first, *files, *words]) if first or files else values
    except ArgumentError as error:
        raise ValueError(_explain(str(error), parser)) from None
    except RecursionError:
        raise ValueError("a value is nested too deep: give a text, a number or a list of texts") from None
    for action in parser._actions:  # fields have theirs in their sections
        for allowed in getattr(getattr(action, "_typehint", None), "__metadata__", ()):
            value = values[action.dest]
            for number in value if isinstance(value, list) else [value]:
                require(number is None or number in allowed, f"--{action.dest}", number, str(allowed))
    return values


def _check_words(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Raise ValueError for a value that is empty and must not be, or a number that would be read as another."""
    options = {text: action for action in parser._actions for text in action.option_strings}
    places = [str(action.metavar) for action in parser._actions if not action.option_strings]
    option = ""  # whose value comes next
    for word in words:
        name, is_whole, value = word.partition("=") if word.startswith("--") else (option, "=", word)
        action = options.get(name)
        if name.count(".") > 1 and action is None:  # which jsonargparse takes for part of a field
            raise ValueError(f"{name} is no argument: --help lists what there is")
        if not is_whole:
            option = name if action is not None and action.nargs != 0 else ""
            continue
        option = option if action is not None and action.nargs == "+" else ""
        shown = name.removeprefix("--") if "." in name else name or "".join(places[:1]) or "an argument"
        is_right = value.strip() != "" or (value == "" and action is not None and action.default == "")
        require(is_right, shown, value, "give it a value, or leave it out")
        kind = getattr(action, "_typehint", None)
        is_right = getattr(kind, "__origin__", kind) not in (int, float) or not MISREAD.fullmatch(value)
        require(is_right, shown, value, "must be a number, written in tens and without leading zeros")


def to_config(values: Any) -> Config:
    """Return the Config in a namespace. ValueError for a value that its field does not take."""
    return Config(**{section: cls(**vars(values[section])) for section, cls in get_type_hints(Config).items()})


def print_if_asked(values: Any, config: Config) -> None:
    """Print the Config and exit with code 0 where the command line has --print_config."""
    if values.print_config:
        print(to_commented_yaml(config), end="")
        raise SystemExit(0)


def evaluation_config(parser: ArgumentParser, words: Sequence[str], run: Path | None) -> Config:
    """Return the Config of a command line of `evaluate`; config.yaml of a run's folder sets what words and files leave
    open.
    """
    first = as_arguments(read_settings(run / "config.yaml")) if run else []
    values = parse(parser, words, first)
    # What only training has must not stand in the way of few sessions.
    values.evaluation.num_sessions_short, values.run.patience = values.evaluation.num_sessions, 0
    return to_config(values)


def from_yaml(path: str | Path) -> Config:
    """Return the Config of a YAML file. ValueError: one line that names file or field, value and remedy."""
    return from_overrides(read_settings(Path(path)))


def from_overrides(overrides: dict[str, Any]) -> Config:
    """Return the default Config with overrides such as {"rollout.num_tasks": 4}. ValueError: one line."""
    for key, value in overrides.items():
        if key not in settings():
            raise ValueError(f"{key} is no field: {RENAMED.get(key) or suggest(str(key), list(settings()))}")
        _check_kind(settings()[key], value, "")
    return to_config(parse(run_parser(), as_arguments(overrides)))


def as_arguments(overrides: dict[str, Any]) -> list[str]:
    """Return overrides such as {"rollout.num_tasks": 4} as words of a command line."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]


def changed_fields(config: Config) -> dict[str, Any]:
    """Return the fields that are not the default, by 'section.field'."""
    values, default = asdict(config), asdict(Config())
    return {f"{s}.{name}": v for s, section in values.items() for name, v in section.items() if v != default[s][name]}


def to_yaml(config: Config) -> str:
    """Return a Config as plain YAML, every field written out; `from_yaml` reads it back equal."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def to_commented_yaml(config: Config) -> str:
    """Return a Config as YAML with each field's sentence above it."""
    values, lines = asdict(config), ["# Every setting. Override any: --section.field value"]
    for key, setting in settings().items():
        if f"{setting.section}:" not in lines:
            lines += ["", f"# {section_titles()[setting.section]}", f"{setting.section}:"]
        comment = setting.sentence + (f" [{', '.join(setting.choices)}]" if setting.choices else "")
        lines += textwrap.wrap(comment, WIDTH, initial_indent="  # ", subsequent_indent="  # ")
        value = values[setting.section][setting.name]
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n")
        lines.append(f"  {key.split('.')[1]}: {text.strip()}")
    return "\n".join(lines) + "\n"


def read_yaml(path: Path, what: str) -> Any:
    """Return what a YAML file holds; `what` names it in the ValueError where it cannot be read, or says a thing twice.

    As in YAML 1.2, `on`, `off`, `yes`, `no` and 1:30 are texts.
    """
    try:
        with path.open("rb") as file:  # a pipe has no size to ask for
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read ({error.strerror}): give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ValueError(f"{what} {path} is not text in UTF-8: give the path of a YAML file") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"{what} {path} has more than {MAX_BYTES} bytes: give the path of a YAML file")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        twice = [line for found in _nodes(node, (), set()) if (line := _settle_node(found))]
        tree = None if node is None else yaml.constructor.SafeConstructor().construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{what} {path} is not valid YAML: {error}") from None
    except ValueError as error:  # of a date
        raise ValueError(f"{what} {path} is not valid YAML: {error}; write texts in quotes") from None
    except RecursionError:
        raise ValueError(f"{what} {path} is not valid YAML: nested too deep, or within itself") from None
    if twice:
        raise ValueError(f"{what} {path} has {twice[0]}: keep one of them")
    return tree


def _nodes(node: Any, around: tuple[Any, ...], known: set[int]) -> Iterator[Any]:
    """Yield a node of YAML and all below it, each once. RecursionError where one is within itself."""
    if any(node is outer for outer in around):
        raise RecursionError
    if node is None or id(node) in known:
        return
    known.add(id(node))
    yield node
    for value in node.value if isinstance(node, yaml.CollectionNode) else ():
        for inner in value if isinstance(value, tuple) else (value,):
            yield from _nodes(inner, (*around, node), known)


def _settle_node(node: Any) -> str:
    """Say which key of a map is given twice; '' of any other node. A scalar that YAML 1.1 reads as another than it
    looks becomes a text.
    """
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
        if twice is not None:
            return f"{twice!r} twice, in the map that begins at line {node.start_mark.line + 1}"
    elif isinstance(node, yaml.ScalarNode):
        kind, is_odd = node.tag.rsplit(":", 1)[-1], MISREAD.fullmatch(node.value)
        if (kind == "bool" and node.value.lower() not in ("true", "false")) or (kind in ("int", "float") and is_odd):
            node.tag = "tag:yaml.org,2002:str"
    return ""


def read_settings(path: Path) -> dict[str, Any]:
    """Return the fields of a YAML file of sections, by 'section.field'. ValueError for what is no section or field."""
    tree, sections = read_yaml(path, "config file"), list(section_titles())
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f"config file {path} holds no sections: write some of {', '.join(sections)}")
    found = {}
    for section, values in tree.items():
        if section not in sections:
            raise ValueError(f"{section} is no section, in {path}: {suggest(str(section), sections)}")
        if not isinstance(values, dict):
            raise ValueError(f"{section} is {values!r}, in {path}: must be a section with fields below it")
        names = [setting.name for setting in settings().values() if setting.section == section]
        for name, value in values.items():
            if name not in names:
                key = f"{section}.{name}"
                raise ValueError(f"{key} is no field, in {path}: {RENAMED.get(key) or suggest(str(name), names)}")
            _check_kind(settings()[f"{section}.{name}"], value, f", in {path}")
            found[f"{section}.{name}"] = value
    return found


def _check_kind(setting: Setting, value: Any, where: str) -> None:
    """Raise ValueError for a value of YAML that no field has, or that only another kind of field can have."""
    key = f"{setting.section}.{setting.name}"
    if not isinstance(value, str | int | float | list):
        raise ValueError(f"{key} is {show(value)}{where}: give it a value, or leave it out")
    is_right, wanted = isinstance(value, str) or setting.type is not str, "a text, in quotes"
    if isinstance(value, list):
        takes_lists = tuple in (get_origin(setting.type), *map(get_origin, get_args(setting.type)))
        is_of_numbers = setting.type == tuple[int, ...]
        is_right = takes_lists and all(type(part) is (int if is_of_numbers else str) for part in value)
        wanted = f"a list of {'whole numbers' if is_of_numbers else 'texts'}" if takes_lists else "one value"
    if not is_right:
        raise ValueError(f"{key} is {show(value)}{where}: must be {wanted}")


def _explain(message: str, parser: ArgumentParser) -> str:
    """Return jsonargparse's message in the words of the house: field, value, remedy."""
    options = {action.dest: action for action in parser._actions}
    if match := WRONG_TYPE.match(message):
        name = match["key"] if "." in match["key"] else f"--{match['key']}"
        choices = (match["choices"] or "").replace("'", "")
        remedy = f"one of {choices}" if choices else REMEDIES.get(match["kind"], "a text")
        if name in settings() and settings()[name].type == tuple[int, ...]:
            remedy = "a list of whole numbers"
        return f"{name} is {message.rsplit('value: ', 1)[1]!r}: must be {remedy}"
    if "ignored explicit argument" in message:
        return f"{message.split()[1].rstrip(':')} takes no value: leave {message.split()[-1]} out"
    if message.startswith("the following arguments are required: "):
        missing = options[message.split(": ")[1].split(", ")[0]]
        return f"{missing.option_strings[0] if missing.option_strings else missing.metavar} is missing: {missing.help}"
    if message.startswith("unrecognized arguments: "):
        word = message.split(": ")[1].split()[0].split("=")[0]
        near = difflib.get_close_matches(word, [text for it in options.values() for text in it.option_strings], n=1)
        if remedy := RENAMED.get(word.removeprefix("--")):
            return f"{word} is no argument: {remedy}"
        return f"{word} is no argument: {f'did you mean {near[0]}?' if near else '--help lists what there is'}"
    return message
