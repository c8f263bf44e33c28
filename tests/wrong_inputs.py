"""What a user can get wrong, by kind: words of a command line, and what its one line has to name.

`{here}` is a folder that `wrong_folders` fills. A case is (words, what the line holds); a word may hold spaces.
"""

from collections.abc import Iterator
from itertools import cycle
from typing import get_origin

from mteditflow.config.cli import settings
from mteditflow.config.ranges import ranges
from mteditflow.config.settings import Config

Case = tuple[list[str], str]

COMMANDS = {
    "trian": "trian is no command: did you mean train?",
    "": "'' is no command: known are train",
    "Train": "Train is no command: did you mean train?",
    "train.yaml": "train.yaml is no command",
    "--train": "--train is no command: did you mean train?",
    "-v": "-v is no command: known are train",
    "data chek": "chek is no command: did you mean check?",
    "data --path a": "--path is no command",
    "judge chek": "chek is no command: did you mean check?",
    "judge rubric x": "x is no argument",
    "train word": "word is no argument",
    "train configs/mini.yaml": "configs/mini.yaml is no argument",
    "train -c a.yaml": "-c is no argument",
    "train --rollout.group_siz 4": "--rollout.group_siz is no argument: did you mean --rollout.group_size?",
    "train --rollout.group 4": "--rollout.group is no argument",
    "train --rollout 4": "--rollout is no argument",
    "train --group_size 4": "--group_size is no argument",
    "train --rollout.group_size.x 4": "--rollout.group_size.x is no argument",
    "train --model.dtype bfloat16": "--model.dtype is no argument: write model.base",
    "train --rollout.group_size": "--rollout.group_size: expected one argument",
    "train --rollout.group_size --dry_run": "--rollout.group_size: expected one argument",
    "train --config": "--config: expected one argument",
    "train --dry_run=yes": "--dry_run",
    "train --gpu h100": "--gpu is 'h100': is of a plan: give --dry_run with it",
    "train --price 2": "--price is 2.0: is of an hour of a GPU",
    "train --calibration a.json": "--calibration is 'a.json': is of a GPU",
    "train --dry_run --gpu h101": "--gpu is 'h101': known are h100",
    "train --dry_run --gpu h100 --price nan": "--price is 'nan': must be a number",
    "train --dry_run --gpu h100 --price -1": "--price is -1.0: must be what an hour of one GPU costs",
    "evaluate": "SUBJECT is missing: a run's folder",
    "evaluate nowhere": "'nowhere' is no folder that exists: give a run's folder",
    "evaluate base base": "subjects 'base' and 'base' would both be 'base' in --out: name each once",
    "evaluate base --ouf x": "--ouf is no argument: did you mean --out?",
    "evaluate base --dry_run": "--dry_run is no argument",
    "export": "RUN is missing: a run's folder",
    "export nowhere": "nowhere is no run folder: it has no config.yaml",
    "export run --format zip": "--format is 'zip': must be one of diffusers, comfyui, merged",
    "export run --dtype half": "--dtype is 'half': must be one of float32, bfloat16",
    "export run --adapter old": "--adapter is 'old': must be one of ema, current",
    "export run --push_to name": "--push_to must be a name on the hub, OWNER/NAME",
    "export run --push_to a/b/c": "--push_to must be a name on the hub, OWNER/NAME",
    "export a b": "b is no argument",
    "study": "STUDY is missing: YAML file",
    "study nowhere.yaml": "study nowhere.yaml cannot be read (No such file or directory)",
    "study {here}/study.yaml --only x": "--only x is no comparison of the study: did you mean x1?",
    "study {here}/study.yaml --only": "--only: expected at least one argument",
    "study {here}/study.yaml --jobs 0": "--jobs is 0: must be at least 1",
    "study {here}/study.yaml --seeds 0 0": "--seeds is [0, 0]: must be a list of different whole numbers",
    "study {here}/study.yaml --seeds -1": "--seeds is [-1]: must be a list of different whole numbers",
    "report": "RUN is missing: the run's folder",
    "report nowhere": "nowhere is not the folder of a run: it has no metrics.jsonl",
    "pretrain": "--output is missing: where",
    "data check": "PATH is missing: as data.path",
    "data check {here}/one.jsonl --model nowhere": "model.path 'nowhere' does not exist",
    "data check {here}/one.jsonl --model=": "--model is '': give it a value, or leave it out",
    "data check nowhere.jsonl": "'nowhere.jsonl': cannot be read (No such file",
    "data generate a.json --out b.jsonl": "--images is missing: folder of the images",
    "data generate a.json --images {here}": "--out is missing: JSONL file to write",
    "judge check": "reward.judge is 'exact': must be 'vlm': no other can be asked",
    "judge serve": "reward.judge is 'exact': must be 'vlm': no other is served",
}

EMPTY = {
    "train --run.folder|": "run.folder is '': give it a value, or leave it out",
    "train --run.folder=": "run.folder is '': give it a value, or leave it out",
    "train --run.folder| ": "run.folder is ' ': give it a value, or leave it out",
    "train --model.path|": "model.path is '': give it a value, or leave it out",
    "train --data.path|": "data.path is '': give it a value, or leave it out",
    "train --reward.vlm|": "reward.vlm is '': give it a value, or leave it out",
    "train --reward.consistency|": "reward.consistency is '': give it a value, or leave it out",
    "train --rollout.group_size|": "rollout.group_size is '': give it a value, or leave it out",
    "train --optimizer.learning_rate=": "optimizer.learning_rate is '': give it a value, or leave it out",
    "train --objective.name|": "objective.name is '': give it a value, or leave it out",
    "train --rollout.is_guided|": "rollout.is_guided is '': give it a value, or leave it out",
    "train --lora.targets|": "lora.targets is '': give it a value, or leave it out",
    "train --data.held_out| ": "data.held_out is ' ': give it a value, or leave it out",
    "train --reward.url| ": "reward.url is ' ': give it a value, or leave it out",
    "train --config|": "--config is '': give it a value, or leave it out",
    "train --resume_from|": "--resume_from is '': give it a value, or leave it out",
    "train --dry_run --gpu|": "--gpu is '': give it a value, or leave it out",
    "train|": "an argument is '': give it a value, or leave it out",
    "evaluate|": "SUBJECT is '': give it a value, or leave it out",
    "evaluate base|": "SUBJECT is '': give it a value, or leave it out",
    "evaluate base --out|": "--out is '': give it a value, or leave it out",
    "export|": "RUN is '': give it a value, or leave it out",
    "export run --out|": "--out is '': give it a value, or leave it out",
    "export run --out=": "--out is '': give it a value, or leave it out",
    "export run --push_to|": "--push_to is '': give it a value, or leave it out",
    "study|": "STUDY is '': give it a value, or leave it out",
    "study a.yaml --folder|": "--folder is '': give it a value, or leave it out",
    "study a.yaml --only|": "--only is '': give it a value, or leave it out",
    "study a.yaml --only a|": "--only is '': give it a value, or leave it out",
    "report|": "RUN is '': give it a value, or leave it out",
    "data check|": "PATH is '': give it a value, or leave it out",
    "data generate|": "COCO is '': give it a value, or leave it out",
    "data generate a.json --out|": "--out is '': give it a value, or leave it out",
    "data generate a.json --images|": "--images is '': give it a value, or leave it out",
    "pretrain --output|": "--output is '': give it a value, or leave it out",
    "pretrain-judge --output|": "--output is '': give it a value, or leave it out",
    "pretrain-judge --measure|": "--measure is '': give it a value, or leave it out",
    "judge check --reward.vlm|": "reward.vlm is '': give it a value, or leave it out",
}
"""Behind | is one more word as it stands."""

YAML = {
    "": "holds no sections: write some of model",
    "# nothing\n": "holds no sections",
    "null\n": "holds no sections",
    "3\n": "holds no sections",
    "text\n": "holds no sections",
    "- 1\n": "holds no sections",
    "{}\n": "holds no sections",
    "rollout: [\n": "is not valid YAML",
    "rollout: {a: 1\n": "is not valid YAML",
    "rollout:\n\tgroup_size: 4\n": "is not valid YAML",
    "rollout: 'a\n": "is not valid YAML",
    "rollout: group_size: 4\n": "is not valid YAML",
    "rollout:\n  group_size: 4\n num_tasks: 3\n": "is not valid YAML",
    "a: 1\n---\nb: 2\n": "is not valid YAML",
    "rollout: *no\n": "is not valid YAML",
    "rollout: !!python/object:os.system {}\n": "is not valid YAML",
    "rollout: !mine {}\n": "is not valid YAML",
    "? [a, b]\n: 3\n": "is not valid YAML",
    "run:\n  folder: 2024-13-45\n": "is not valid YAML",
    "run: " + 2000 * "[" + "\n": "is not valid YAML",
    "run: " + 2000 * "[" + 2000 * "]" + "\n": "nested too deep",
    "run: " + 5000 * "{a: " + "\n": "is not valid YAML",
    "run: &a\n  folder: *a\n": "nested too deep, or within itself",
    "lora:\n  targets: &a [*a]\n": "nested too deep, or within itself",
    "rollout:\n  group_size: 4\nrollout:\n  num_tasks: 3\n": "has 'rollout' twice, in the map that begins at line 1",
    "rollout:\n  group_size: 4\n  group_size: 8\n": "has 'group_size' twice, in the map that begins at line 2",
    "rollout: {group_size: 4, group_size: 4}\n": "has 'group_size' twice",
    "rollout: {group_size: 4, 'group_size': 4}\n": "has 'group_size' twice",
    "rolout:\n  group_size: 4\n": "rolout is no section, in {path}: did you mean rollout?",
    "1:\n  group_size: 4\n": "1 is no section",
    "null:\n  group_size: 4\n": "None is no section",
    "rollout.group_size: 4\n": "rollout.group_size is no section",
    "rollout: 3\n": "rollout is 3, in {path}: must be a section",
    "rollout: [group_size]\n": "rollout is ['group_size'], in {path}: must be a section",
    "rollout:\n": "rollout is None, in {path}: must be a section",
    "rollout:\n  group_sise: 4\n": "rollout.group_sise is no field, in {path}: did you mean group_size?",
    "rollout:\n  1: 4\n": "rollout.1 is no field",
    "rollout:\n  rollout: {group_size: 4}\n": "rollout.rollout is no field",
    "model:\n  dtype: bfloat16\n": "model.dtype is no field, in {path}: write model.base",
    "<<: {rollout: {group_size: 1}}\n": "rollout.group_size is 1: must lie in [2, 4096]",
    "run:\n  folder:\n": "run.folder is None, in {path}: give it a value, or leave it out",
    "run:\n  folder: ''\n": "run.folder is '': give it a value, or leave it out",
    "run:\n  folder: ' '\n": "run.folder is ' ': give it a value, or leave it out",
    "run:\n  folder: 2024-01-01\n": "run.folder is datetime.date(2024, 1, 1), in {path}: give it a value",
    "run:\n  folder: 12\n": "run.folder is 12, in {path}: must be a text, in quotes",
    "run:\n  folder: true\n": "run.folder is True, in {path}: must be a text, in quotes",
    "run:\n  folder: [a, b]\n": "run.folder is ['a', 'b'], in {path}: must be one value",
    "run:\n  folder: {a: b}\n": "run.folder is {'a': 'b'}, in {path}: give it a value",
    'run:\n  folder: "a\\0b"\n': "run.folder is 'a\\x00b': must be a text without control characters",
    'run:\n  folder: "a\\nb"\n': "run.folder is 'a\\nb': must be a text without control characters",
    'run:\n  folder: "\\e[31mred"\n': "run.folder is '\\x1b[31mred': must be a text without control characters",
    'lora:\n  targets: ["a\\0"]\n': "lora.targets is 'a\\x00': must be a text without control characters",
    "rollout:\n  group_size:\n": "rollout.group_size is None, in {path}: give it a value, or leave it out",
    "rollout:\n  group_size: ''\n": "rollout.group_size is '': give it a value, or leave it out",
    "rollout:\n  group_size: many\n": "rollout.group_size is 'many': must be a whole number",
    "rollout:\n  group_size: 2.5\n": "rollout.group_size is '2.5': must be a whole number",
    "rollout:\n  group_size: 8.0\n": "rollout.group_size is '8.0': must be a whole number",
    "rollout:\n  group_size: true\n": "rollout.group_size is 'True': must be a whole number",
    "rollout:\n  group_size: [4]\n": "rollout.group_size is [4], in {path}: must be one value",
    "rollout:\n  group_size: 010\n": "rollout.group_size is '010': must be a number, written in tens",
    "rollout:\n  group_size: 0x10\n": "rollout.group_size is '0x10': must be a number, written in tens",
    "rollout:\n  group_size: 1:30\n": "rollout.group_size is '1:30': must be a number, written in tens",
    "rollout:\n  group_size: 8 # GPUs: 4\n  num_tasks: 4 4\n": "rollout.num_tasks is '4 4': must be a whole number",
    "rollout:\n  group_size: 1\n": "rollout.group_size is 1: must lie in [2, 4096]",
    "rollout:\n  is_guided: 3\n": "rollout.is_guided is '3': must be true or false",
    "rollout:\n  is_guided: nope\n": "rollout.is_guided is 'nope': must be true or false",
    "optimizer:\n  learning_rate: .inf\n": "optimizer.learning_rate is 'Infinity': must be a number",
    "optimizer:\n  learning_rate: .nan\n": "optimizer.learning_rate is 'NaN': must be a number",
    "optimizer:\n  learning_rate: 1e308\n": "optimizer.learning_rate is 1e+308: must lie in (0, 1]",
    "optimizer:\n  learning_rate: 1,5\n": "optimizer.learning_rate is '1,5': must be a number",
    "optimizer:\n  learning_rate: 3e-4 # a\n  epsilon: -1.0e-8\n": "optimizer.epsilon is -1e-08: must lie in (0, 1]",
    "objective:\n  name: [nft]\n": "objective.name is ['nft'], in {path}: must be one value",
    "objective:\n  name: NFT\n": "objective.name is 'NFT': must be one of grpo, nft",
    "lora:\n  targets: to_q\n": "lora.targets is 'to_q': must be a list of texts",
    "lora:\n  targets: [1, 2]\n": "lora.targets is [1, 2], in {path}: must be a list of texts",
    "lora:\n  targets: [[to_q]]\n": "lora.targets is [['to_q']], in {path}: must be a list of texts",
    "lora:\n  targets: {to_q: 1}\n": "lora.targets is {'to_q': 1}, in {path}: give it a value",
    "reward:\n  also: [1]\n": "reward.also is [1], in {path}: must be a list of texts",
}

BYTES = {
    b"\xff\xfe\x00": "is not text in UTF-8",
    "run:\n  folder: a\n".encode("utf-16"): "is not text in UTF-8",
    "run:\n  folder: é\n".encode("latin-1"): "is not text in UTF-8",
    b"run:\n  folder: a\x00b\n": "is not valid YAML",
    b"#" * (2**20 + 1): "has more than 1048576 bytes",
    b"\x89PNG\r\n\x1a\n\x00": "is not text in UTF-8",
}

MEANINGLESS = {
    "rollout.window_size=4": "rollout.window_size is 4: must be below num_steps, 3",
    "rollout.rule=cps rollout.noise_level=1.5": "rollout.noise_level is 1.5: must be at most 1 with rule 'cps'",
    "objective.name=nft objective.nft_num_times=5": "objective.nft_num_times is 5: must be at most rollout.num_steps",
    "rollout.solver=dpm2": "rollout.solver is 'dpm2': objective 'grpo' takes Euler steps",
    "advantage.aggregate_at=advantage advantage.turn_aggregation=min": "advantage.turn_aggregation is 'min'",
    "advantage.aggregate_at=advantage advantage.credit=per_turn": "advantage.credit is 'per_turn'",
    "advantage.consistency_weight=0.1 reward.consistency=none": "advantage.consistency_weight is 0.1",
    "lora.is_full=true model.base=int8": "model.base is 'int8': lora.is_full trains the weights",
    "model.condition_height=32 rollout.hand_off=latents": "rollout.hand_off is 'latents'",
    "model.height=128": "model.height is 128: must be 64",
    "model.width=128": "model.width is 128: must be 64",
    "model.vision_pixels=100": "model.vision_pixels is 100: must be 0 or at least 3136",
    "distributed.shard=full rollout.cuda_graph=on": "rollout.cuda_graph is 'on'",
    "distributed.shard=full": "distributed.shard is 'full': one rank has nobody to share with",
    "data.held_out=a.jsonl": "data.held_out is 'a.jsonl': the embedded world has its own",
    "data.num_turns=10 reward.judge=vlm": "data.num_turns is 10: must be at most 9 for reward.judge",
    "data.path=a.jsonl evaluation.num_turns=10 reward.judge=vlm": "evaluation.num_turns is 10: must be at most 9",
    "evaluation.num_strips=9 evaluation.num_sessions=8 evaluation.num_sessions_short=8": "evaluation.num_strips is 9",
    "evaluation.num_sessions=8": "evaluation.num_sessions_short is 64: must lie between num_strips, 6",
    "evaluation.num_sessions_short=2": "evaluation.num_sessions_short is 2: must lie between num_strips, 6",
    "reward.leniency=1": "reward.leniency is 1.0: judge 'exact' has none",
    "reward.failure_rate=0.5": "reward.failure_rate is 0.5: judge 'exact' has none",
    "reward.rubric=a.txt": "reward.rubric is 'a.txt': judge 'exact' reads none",
    "reward.temperature=0": "reward.num_retries is 2: without sampling",
    "reward.judge=vlm reward.rubric=nowhere.txt": "reward.rubric is 'nowhere.txt': is no file",
    "reward.url=gpu:8000": "reward.url is 'gpu:8000': must begin with http://",
    "reward.url=ftp://host": "reward.url is 'ftp://host': must begin with http://",
    "reward.url=http://": "reward.url is 'http://': must begin with http://",
    "reward.url=http://host:port": "reward.url is no address",
    "reward.url=http://user:secret@host": "reward.url must hold no user, password",
    "reward.url=http://host/?key=secret": "reward.url must hold no user, password",
    "reward.also=sharpness": "reward.also is 'sharpness': must be module:function",
    "reward.also=a:b=x": "reward.also is 'a:b=x': the weight must be a number",
    "reward.also=a:b=-1": "reward.also is 'a:b=-1': the weight must be a number, not negative",
    "reward.also=a:b=nan": "reward.also is 'a:b=nan': the weight must be a number",
    "reward.also=a:instruction": "reward.also is 'a:instruction': there is a instruction already",
    "reward.also=[a:b,c:b]": "reward.also is ('a:b', 'c:b'): two rewards have one name",
    "data.path=nowhere.jsonl": "data.path 'nowhere.jsonl'",
    "data.path=nowhere.jsonl reward.judge=vlm": "data.path is 'nowhere.jsonl': cannot be read",
    "data.path={here}/empty.jsonl reward.judge=vlm": "holds no session",
    "data.path={here}/one.jsonl reward.judge=vlm data.num_turns=3": "data.num_turns is 3: no session",
    "data.path={here}/one.jsonl reward.judge=vlm data.num_turns=1 reward.consistency=exact": "reward.consistency",
    "model.path=nowhere": "model.path 'nowhere' does not exist",
    "model.path=./nowhere": "model.path './nowhere' does not exist",
    "model.path=a/b/c": "model.path 'a/b/c' does not exist",
    "model.path={here}/file": "/file' is a file: give the folder",
    "model.path={here}/folder": "/folder' is not a diffusers pipeline",
}
"""Fields that are right one by one; of GRPO unless said. Cases with `objective.name=nft` replace it."""

SHAPES = {
    "nothing": b"",
    "bytes": b"\xff\xfe\x00\x01",
    "a list": b"[]",
    "a number": b"3",
    "a text": b'"a"',
    "null": b"null",
    "half of it": b'{"turns": [',
    "nested": b"[" * 100_000,
    "other keys": b'{"a": 1}',
}
"""JSON files that no program of ours wrote."""

FIGURES = ("evaluation_before.json", "evaluation_after.json", "comparison.json")
FIGURE_SHAPES = {
    "turns of a number": b'{"turns": 3}',
    "turns of numbers": b'{"turns": [1]}',
    "a turn without number": b'{"turns": [{}]}',
    "a turn of text": b'{"turns": [{"turn": "x"}]}',
    "a figure of text": b'{"turns": [{"turn": 1, "O": "high"}]}',
    "an interval of one": b'{"turns": [{"turn": 1, "O": 1, "O_interval": [1]}]}',
    "an interval of texts": b'{"turns": [{"turn": 1, "O": 1, "O_interval": ["a", "b"]}]}',
    "edit types of numbers": b'{"turns": [], "edit_types": {"a": 3}}',
}


def wrong_types() -> Iterator[Case]:
    """A value of another type for every field, and for numbers two forms of what is none, of all forms in turn."""
    some = cycle([("many", "nan"), ("1,5", "[1]"), ("true", "eight"), ("8 8", "8;8"), ("1e", "inf")])
    for key, setting in settings().items():
        kind = get_origin(setting.type) or setting.type
        if setting.choices:
            yield ["train", f"--{key}", "nonsense"], f"{key} is 'nonsense': must be one of {setting.choices[0]}"
        elif kind in (int, float):
            must, forms = "must be a whole number" if kind is int else "must be a number", next(some)
            for value in forms:
                yield ["train", f"--{key}={value}"], f"{key} is '{value.replace('true', 'True')}': {must}"
        elif kind is bool:
            for value in ("3", "maybe"):
                yield ["train", f"--{key}", value], f"{key} is '{value}': must be true or false"
        elif kind is tuple:
            items = "whole numbers" if key == "rollout.window_range" else "texts"
            yield ["train", f"--{key}", "3"], f"{key} is '3': must be a list of {items}"


def out_of_range() -> Iterator[Case]:
    """Numbers below or above what their field takes, in turn; those that take all are in test_cli.py."""
    side, huge = cycle([min, max]), cycle([{"1e308": "1e+308"}, {".nan": "nan"}, {".inf": "inf"}, {"-.inf": "-inf"}])
    for key, setting in settings().items():
        allowed = ranges(type(getattr(Config(), setting.section))).get(setting.name)
        if allowed is None:
            continue
        below = allowed.low if allowed.is_above else allowed.low - max(1, allowed.step)
        value = next(side)(below, 10 * allowed.high + 1)
        shown = float(value) if setting.type is float else int(value)
        yield ["train", f"--{key}={shown}"], f"{key} is {shown!r}: must lie in "
        if setting.type is float:
            for text, shown in next(huge).items():
                yield ["train", f"--{key}={text}"], f"{key} is {shown}: must lie in "


def numbers_of_commands() -> Iterator[Case]:
    """Numbers that are no field, below and above what their argument takes."""
    for words in ("pretrain --output {here}/out", "pretrain-judge --output {here}/out"):
        for name in ("seed", "batch_size", "save_every", "num_sessions"):
            for value in ("-1", "99999999999"):
                yield [*words.split(), f"--{name}={value}"], f"--{name} is {value}: must lie in "
        for value, shown in {"-1": "-1.0", "0": "0.0", "1e308": "1e+308", ".inf": "inf", ".nan": "nan"}.items():
            yield [*words.split(), f"--learning_rate={value}"], f"--learning_rate is {shown}: must lie in (0, 1]"
    for words, name in (
        ("data check {here}/one.jsonl", "num_turns"), ("data check {here}/one.jsonl", "max_text_tokens"),
        ("judge check --reward.judge=vlm", "num_sessions"),
        ("data generate {here}/coco.json --images {here} --out {here}/new.jsonl", "turns"),
        ("data generate {here}/coco.json --images {here} --out {here}/new.jsonl", "per_image"),
        ("data generate {here}/coco.json --images {here} --out {here}/new.jsonl", "seed"),
        ("train", "resume_from"),
    ):  # fmt: skip
        for value in ("-1", "99999999999"):
            yield [*words.split(), f"--{name}={value}"], f"--{name} is {value}"
    for value in ("-0.1", "1.5"):
        yield ["data", "check", "{here}/one.jsonl", f"--max_bad_share={value}"], f"--max_bad_share is {value}"


def wrong_words() -> Iterator[Case]:
    """Commands, arguments and empty values."""
    for text, expected in COMMANDS.items():
        yield text.split() or [""], expected
    for text, expected in EMPTY.items():
        words, *rest = text.split("|")
        yield [*words.split(), *rest], expected


def meaningless() -> Iterator[Case]:
    """Combinations."""
    for text, expected in MEANINGLESS.items():
        words = [f"--{word}" for word in text.split()]
        base = ["--objective.name=grpo", "--rollout.window_size=0", "--run.folder={here}/run"]
        yield ["train", *base, *words], expected
