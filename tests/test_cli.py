"""What the command line promises: fields, ranges, one line for anything wrong, and --help without torch."""

import math
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest

from mteditflow.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig, RolloutConfig, RunConfig, command
from mteditflow.config.cli import from_yaml, parse, run_parser, settings, to_config, to_yaml
from mteditflow.config.distributed import DistributedConfig
from mteditflow.config.ranges import ranges
from mteditflow.config.reward import RewardConfig
from mteditflow.distributed import check_world
from mteditflow.plan.dry_run import dry_run
from mteditflow.plan.duration import RowSeconds, batch_plan, check_timeout, duration_plan

ROOT = Path(__file__).parent.parent
MODULES = ("train", "evaluate", "export", "study", "profile", "data", "judge", "report", "world.pretrain")


def write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def read(arguments: list[str]) -> tuple[Config, bool]:
    """The Config of a command line of `train`, and whether it has --dry_run."""
    values = parse(run_parser(), arguments)
    return to_config(values), values.dry_run


def test_no_argument_is_the_default() -> None:
    assert read([]) == (Config(), False)


def test_override_comes_after_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "rollout:\n  group_size: 4\n  num_tasks: 3\noptimizer:\n  learning_rate: 1e-4\n")
    arguments = ["--rollout.group_size", "8", "--config", path, "--lora.targets", "[to_q, to_k]", "--dry_run"]
    config, is_dry_run = read(arguments)
    assert (config.rollout.group_size, config.rollout.num_tasks) == (8, 3)
    assert (config.optimizer.learning_rate, config.lora.targets, is_dry_run) == (1e-4, ("to_q", "to_k"), True)


def test_a_later_file_comes_after_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("rollout:\n  group_size: 4\n  num_tasks: 3\n")
    path = write(tmp_path, "rollout:\n  num_tasks: 5\n")
    config, _ = read(["--config", str(tmp_path / "first.yaml"), "--config", path])
    assert (config.rollout.group_size, config.rollout.num_tasks) == (4, 5)


WRONG_COMMANDS = {
    "train --rollout.group_size 1": "rollout.group_size is 1: must lie in [2, 4096]; the advantage",
    "train --rollout.group_size many": "rollout.group_size is 'many': must be a whole number",
    "train --rollout.group_size 2.5": "rollout.group_size is '2.5': must be a whole number",
    "train --rollout.group_size": "--rollout.group_size: expected one argument",
    "train --rollout.group_siz 4": "--rollout.group_siz is no argument: did you mean --rollout.group_size?",
    "train --model.dtype bfloat16": "--model.dtype is no argument: write model.base, one of float32, bfloat16, float8",
    "train --lora.is_full true --model.base int8": "model.base is 'int8': lora.is_full trains the weights: must be",
    "train --rollout.group 4": "--rollout.group is no argument",
    "train --objective.name ppo": "objective.name is 'ppo': must be one of grpo, nft",
    "train --optimizer.learning_rate nan": "optimizer.learning_rate is 'nan': must be a number",
    "train --optimizer.learning_rate .nan": "optimizer.learning_rate is nan: must lie in (0, 1]",
    "train --rollout.is_guided 3": "rollout.is_guided is '3': must be true or false",
    "train --lora.targets 3": "lora.targets is '3': must be a list of texts",
    "train --lora.rank 0": "lora.rank is 0: must lie in [1, 4096]; lora.is_full true trains the weights themselves",
    "train --config nowhere.yaml": "config file nowhere.yaml cannot be read (No such file or directory)",
    "train --config=nowhere.yaml": "config file nowhere.yaml cannot be read",
    "train --config": "--config: expected one argument",
    "train word": "word is no argument: --help lists what there is",
    "trian": "trian is no command: did you mean train?",
    "--nope": "--nope is no command: known are train, evaluate",
    "evaluate": "SUBJECT is missing: a run's folder",
    "evaluate base --ouf x": "--ouf is no argument: did you mean --out?",
    "evaluate base --evaluation.num_steps 0": "evaluation.num_steps is 0: must lie in [1, 1000]",
    "export": "RUN is missing: a run's folder",
    "export run --format zip": "--format is 'zip': must be one of diffusers, comfyui, merged",
    "export run --dtype float": "--dtype is 'float': must be one of float32, bfloat16",
    "study": "STUDY is missing: YAML file",
    "study a.yaml --jobs two": "--jobs is 'two': must be a whole number",
    "study a.yaml --seeds 0 x": "--seeds is 'x': must be a whole number",
    "study a.yaml --only": "--only: expected at least one argument",
    "profile --model.width 65": "model.width is 65: must lie in [16, 8192] and be a multiple of 16",
    "data chek": "chek is no command: did you mean check?",
    "data check": "PATH is missing: as data.path",
    "data check a.csv --max_bad_share x": "--max_bad_share is 'x': must be a number",
    "data generate a.json --out b.jsonl": "--images is missing: folder of the images",
    "judge chek": "chek is no command: did you mean check?",
    "judge check --num_sessions x": "--num_sessions is 'x': must be a whole number",
    "judge serve --reward.url gpu:8000": "reward.url is 'gpu:8000': must begin with http:// or https://",
    "report": "RUN is missing: the run's folder",
    "pretrain": "--output is missing: where the editor and its states go",
    "pretrain --output a --seed x": "--seed is 'x': must be a whole number",
}


@pytest.mark.parametrize(("words", "message"), WRONG_COMMANDS.items())
def test_wrong_argument_is_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_line(words.split(), message, capsys)


WRONG_FILES = {
    "rollout:\n  group_size: 1\n": "rollout.group_size is 1: must lie in [2, 4096]",
    "rollout:\n  group_sise: 4\n": "rollout.group_sise is no field, in {path}: did you mean group_size?",
    "model:\n  dtype: bfloat16\n": "model.dtype is no field, in {path}: write model.base, one of float32, bfloat16",
    "rolout:\n  group_size: 4\n": "rolout is no section, in {path}: did you mean rollout?",
    "rollout: 3\n": "rollout is 3, in {path}: must be a section",
    "rollout:\n": "rollout is None, in {path}: must be a section",
    "rollout: [\n": "is not valid YAML",
    "": "holds no sections",
    "- 1\n": "holds no sections",
    "run:\n  folder:\n": "run.folder is None, in {path}: give it a value, or leave it out",
    "run:\n  folder: 2024-01-01\n": "run.folder is datetime.date(2024, 1, 1), in {path}: give it a value",
    "rollout:\n  is_guided: 3\n": "rollout.is_guided is '3': must be true or false",
    "optimizer:\n  learning_rate: .inf\n": "optimizer.learning_rate is 'Infinity': must be a number",
}


@pytest.mark.parametrize(("text", "message"), WRONG_FILES.items())
def test_wrong_file_is_one_line(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, text)
    assert_one_line(["train", "--config", path], message.format(path=path), capsys)


def test_unreadable_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_line(["train", "--config", str(tmp_path)], "cannot be read (Is a directory)", capsys)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert_one_line(["train", "--config", str(tmp_path / "binary.yaml")], "is not text in UTF-8", capsys)


def assert_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.startswith("mteditflow: ") and err.endswith("\n") and err.count("\n") == 1
    assert message in err


NUMBERS = {
    f"{section}.{field.name}": (section_class, field.name)
    for section, section_class in get_type_hints(Config).items()
    for field in fields(section_class)
    if get_type_hints(section_class)[field.name] in (int, float)
}


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_a_range_and_is_refused_outside(key: str) -> None:
    section_class, name = NUMBERS[key]
    allowed = ranges(section_class).get(name)
    assert allowed is not None, f"{key} has no range: annotate it, as its neighbours are"
    assert 0 <= allowed.low <= settings()[key].default <= allowed.high <= 2**31
    below = allowed.low if allowed.is_above else allowed.low - max(1, allowed.step)
    above = allowed.high + max(1, allowed.step)
    between = [allowed.low + 1] if allowed.step else []
    for value in (below, above, float("nan"), float("inf"), -float("inf"), *between):
        with pytest.raises(ValueError) as error:
            section_class(**{name: value})
        assert str(error.value).startswith(f"{key} is {value!r}: must lie in ") and "\n" not in str(error.value)


def test_every_field_has_a_sentence() -> None:
    for section_class in get_type_hints(Config).values():
        assert section_class.__doc__
    missing = [key for key, setting in settings().items() if not setting.sentence.endswith((".", "?"))]
    assert missing == []


def run_help(words: list[str]) -> str:
    """What a command prints in a process of its own, which must not import torch, diffusers or transformers."""
    code = (
        "import atexit, runpy, sys\n"
        "heavy = ('torch', 'diffusers', 'transformers')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules], file=sys.stderr))\n"
        f"sys.argv = {words!r}\n"
        "module = sys.argv[0]\n"
        "if module == 'mteditflow':\n"
        "    from mteditflow.config.command import main\n"
        "    sys.exit(main())\n"
        "runpy.run_module(module, run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "[]\n"
    return done.stdout


@pytest.mark.parametrize("module", MODULES)
def test_help_of_every_module_imports_no_torch(module: str) -> None:
    text = run_help([f"mteditflow.{module}", "--help"])
    assert text.startswith(f"usage: python -m mteditflow.{module} ")


def test_help_of_the_command_lists_the_commands() -> None:
    text = run_help(["mteditflow", "--help"])
    for name, function in command.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape((function.__doc__ or '').splitlines()[0])}$", text, re.MULTILINE)
    assert list(command.COMMANDS) == [*(module.removeprefix("world.") for module in MODULES), "pretrain-judge"]
    assert run_help(["mteditflow", "data", "generate", "--help"]).startswith("usage: mteditflow data generate ")
    assert run_help(["mteditflow", "--version"]).startswith("mteditflow")


def test_the_console_script_is_the_command() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'mteditflow = "mteditflow.config.command:main"' in text.split("[project.scripts]\n")[1]


def test_help_of_train_names_every_field() -> None:
    text = " ".join(run_help(["mteditflow", "train", "--help"]).replace("-\n", "-").split()).replace("- ", "-")
    for key, setting in settings().items():
        assert f"--{key} " in text
        assert " ".join(setting.sentence.split()[:3]) in text


def print_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        command.main(["train", *arguments, "--print_config"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_print_config_of_mini_is_that_of_no_argument_but_for_its_turns(capsys: pytest.CaptureFixture[str]) -> None:
    text = print_config([], capsys)
    assert (
        print_config(["--config", str(ROOT / "configs" / "mini.yaml"), "--evaluation.num_turns", "0"], capsys) == text
    )
    lines = text.splitlines()
    for key, setting in settings().items():
        section = lines[lines.index(f"{setting.section}:") :]
        place = next(i for i, line in enumerate(section) if line.startswith(f"  {setting.name}:"))
        assert section[place - 1].startswith("  # "), key


def test_print_config_and_to_yaml_are_read_back_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--optimizer.learning_rate", "3e-5", "--lora.targets", "[to_q]", "--run.folder", "runs/a: b #c"]
    config, _ = read(arguments)
    for text in (print_config(arguments, capsys), to_yaml(config)):
        assert from_yaml(write(tmp_path, text)) == config


GRPO = replace(
    Config(),
    objective=ObjectiveConfig(name="grpo"),
    rollout=RolloutConfig(num_tasks=8, group_size=16, num_steps=8, window_size=2, microbatch_size=128),
    optimizer=OptimizerConfig(microbatch_size=128),
)


def test_batch_arithmetic() -> None:
    """P 8, G 16, K 3, S 8, window 2: N 128, turn-images 384."""
    batches = batch_plan(GRPO)
    assert (batches.trajectories, batches.turn_images, batches.rollout_rows) == (128, 384, 3072)
    assert (batches.rollout_microbatches, batches.transitions, batches.train_microbatches) == (24, 768, 6)
    assert batches.train_forward_rows == 768

    every_step = replace(GRPO, rollout=replace(GRPO.rollout, window_size=0, microbatch_size=100))
    assert batch_plan(every_step).transitions == 384 * 7
    assert batch_plan(every_step).rollout_microbatches == 3 * 8 * 2

    objective = ObjectiveConfig(name="nft", kl_beta=1e-4, nft_num_times=3, nft_old_decay="ramp")
    nft = replace(GRPO, objective=objective)
    assert batch_plan(nft).transitions == 384 * 3
    assert batch_plan(nft).train_forward_rows == 384 * 3 * 3  # trained, old, reference
    on_policy = replace(GRPO, objective=replace(objective, nft_old_decay="on_policy"))
    assert batch_plan(on_policy).train_forward_rows == 384 * 3 * 2  # the trained one is the old one


def test_duration_is_extrapolated() -> None:
    config = replace(
        GRPO,
        run=replace(Config().run, num_iterations=20),
        evaluation=replace(Config().evaluation, every=10, num_sessions=100, num_sessions_short=10, num_steps=4),
    )
    seconds = RowSeconds(forward=1.0, forward_backward=3.0, guided=2.0, decode=0.25, encode=0.25)
    plan = duration_plan(config, seconds)
    assert plan["rollout of an iteration"] == 3072 + 384 * 0.5
    assert plan["updates of an iteration"] == 768 * 3.0
    evaluations = (2 * 100 + 10) * 3 * (4 * 2.0 + 0.5)  # a short one after 10 iterations: that after 20 is the last
    assert plan["run, without scoring and saving"] == 20 * (3072 + 192 + 2304) + evaluations
    eight = duration_plan(replace(config, run=replace(config.run, num_gpus=8)), replace(seconds, judge=0.5, text=0.1))
    assert eight["rollout of an iteration"] == (3072 + 192 + 8 * 3 * 0.1) / 8
    assert eight["scores of an iteration"] == 128 * 0.5 / 8
    sessions = 2 * 100 + 10  # of the busiest rank, of one part
    judged = sessions * (3 * (4 * 2.0 + 0.5 + 0.1) + 0.5)
    assert eight["evaluations: before, after, 1 short"] == pytest.approx(judged)
    many = replace(config, run=replace(config.run, num_gpus=3), rollout=replace(config.rollout, microbatch_size=16))
    sessions = 2 * 48 + 10  # 7 parts of 16, of which the first rank has three; a short one is one part
    assert duration_plan(many, seconds)["evaluations: before, after, 1 short"] == sessions * 3 * (4 * 2.0 + 0.5)


def test_a_limit_below_what_a_rank_does_alone_is_said() -> None:
    """GRPO's rollout is 3072 forwards of a second and 192 s of pictures, on 8 GPUs; an update half of 768 x 8 s / 8."""
    config = replace(GRPO, run=replace(Config().run, num_gpus=8))
    seconds = RowSeconds(forward=1.0, forward_backward=8.0, guided=0.01, decode=0.25, encode=0.25)

    def found(seconds: RowSeconds, timeout_s: int) -> str | None:
        return check_timeout(replace(config, distributed=DistributedConfig(timeout_s=timeout_s)), seconds)

    updates = 768 * 8 / 8 / GRPO.optimizer.num_updates
    assert found(seconds, math.ceil(updates)) is None
    assert f"an update may take {updates:.0f} s" in str(found(seconds, math.ceil(updates) - 1))
    rollout = (3072 + 192) / 8
    slow = replace(seconds, forward_backward=0.1)
    line = found(slow, 400)
    assert line is not None and line.endswith("set it to 600 or more")
    assert f"distributed.timeout_s is 400: a rollout and its scores may take {rollout:.0f} s" in line
    assert found(slow, 408) is None
    slow = replace(slow, guided=10.0)
    part = 128 * 3 * (Config().evaluation.num_steps * 10 + 0.5)  # a microbatch of sessions
    assert f"a part of an evaluation may take {part:.0f} s" in str(found(slow, 1800))
    config = replace(config, run=replace(config.run, num_gpus=1))
    assert found(slow, 30) is None


def test_a_server_is_not_waited_for_longer_than_ranks_wait_for_each_other() -> None:
    reward = RewardConfig(judge="vlm", url="http://host:8000/v1", max_wait_s=60)
    config = replace(GRPO, reward=reward, distributed=DistributedConfig(timeout_s=60))
    check_world(config, 1)
    with pytest.raises(ValueError, match=r"^reward.max_wait_s is 60: the other ranks give up .*timeout_s, 60 s: must"):
        check_world(config, 2)
    check_world(replace(config, distributed=DistributedConfig(timeout_s=61)), 2)
    check_world(replace(config, reward=replace(reward, judge="exact")), 2)


def test_dry_run(tiny_pipeline_folder: Path) -> None:
    model = ModelConfig(path=str(tiny_pipeline_folder), max_text_tokens=8)
    config = replace(Config(), model=model, rollout=RolloutConfig(num_tasks=1, group_size=2, num_steps=4))
    plan = dry_run(config)
    assert plan.problem is None and "turn-images N K" in plan.table and "6 = 2 x 3" in plan.table
    assert "run, without scoring and saving" in plan.table
    away = dry_run(replace(config, model=replace(model, path="Qwen/Qwen-Image-Edit"), run=RunConfig(gpu_gib=1e3)))
    assert away.problem is None and "the model is not on this machine" in away.table


def test_a_run_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from mteditflow.config.command import train as main

    with pytest.raises(SystemExit) as caught:
        main(["--dry_run", "--run.gpu_gib=0.1", "--optimizer.microbatch_size=128"])
    output = capsys.readouterr()
    assert caught.value.code == 2 and "activations of a training microbatch" in output.out
    assert re.search(
        r"needs about \d+\.\d GiB of a GPU's 0\.1: lower optimizer\.microbatch_size or set model\.is_checkpointed",
        output.err,
    )


def test_dry_run_of_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path .* is not a diffusers pipeline: .* no model_index\.json"):
        dry_run(replace(Config(), model=ModelConfig(path=str(tmp_path))))
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxKontextPipeline"}')
    with pytest.raises(ValueError, match=r"model\.path is .*without transformer/config\.json"):
        dry_run(replace(Config(), model=ModelConfig(path=str(tmp_path))))
    with pytest.raises(ValueError, match=r"model\.path is 'nowhere': no folder"):
        dry_run(replace(Config(), model=ModelConfig(path="nowhere")))
    with pytest.raises(ValueError, match=r"model\.path is 'some/editor': .* none of black-forest-labs/FLUX\.1"):
        dry_run(replace(Config(), model=ModelConfig(path="some/editor")))
