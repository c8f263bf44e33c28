"""What the command line and the files in configs/ promise."""

import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from mteditflow.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig, RolloutConfig, RunConfig
from mteditflow.config.cli import DEFAULT_TITLE, from_yaml, settings, to_commented_yaml, to_yaml
from mteditflow.plan.dry_run import RowSeconds, batch_plan, dry_run, duration_plan

ROOT = Path(__file__).parent.parent


def write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def parse(arguments: list[str]) -> tuple[Config, bool]:
    """The Config of a command line of `train`, and whether it has --dry_run."""
    values = cli.parse(cli.run_parser(), arguments)
    return cli.to_config(values), values.dry_run


def test_no_argument_is_the_default() -> None:
    assert parse([]) == (Config(), False)


def test_override_comes_after_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "rollout:\n  group_size: 4\n  num_tasks: 3\noptimizer:\n  learning_rate: 1e-4\n")
    arguments = ["--config", path, "--rollout.group_size", "8", "--lora.targets", "[to_q, to_k]", "--dry_run"]
    config, is_dry_run = parse(arguments)
    assert (config.rollout.group_size, config.rollout.num_tasks) == (8, 3)
    assert (config.optimizer.learning_rate, config.lora.targets, is_dry_run) == (1e-4, ("to_q", "to_k"), True)


WRONG_ARGUMENTS = {
    "--rollout.group_size 1": "rollout.group_size is 1: must be at least 2",
    "--rollout.group_size many": "rollout.group_size is 'many': must be a whole number",
    "--rollout.group_size 2.5": "rollout.group_size is '2.5': must be a whole number",
    "--rollout.group_size": "--rollout.group_size: expected one argument",
    "--rollout.group_siz 4": "--rollout.group_siz is no argument: did you mean --rollout.group_size?",
    "--rollout.group 4": "--rollout.group is no argument",
    "--objective.name ppo": "objective.name is 'ppo': must be one of grpo, nft",
    "--optimizer.learning_rate nan": "optimizer.learning_rate is 'nan': must be a number",
    "--data.num_turns 11": "data.num_turns is 11: a session of the world has 1 to 10 instructions",
    "--config nowhere.yaml": "config file nowhere.yaml cannot be read (No such file or directory)",
    "--config=nowhere.yaml": "config file nowhere.yaml cannot be read",
    "--config": "expected one argument",
    "word": "word is no argument",
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_ARGUMENTS.items())
def test_wrong_argument_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_line(arguments.split(), message, capsys)


WRONG_FILES = {
    "rollout:\n  group_size: 1\n": "rollout.group_size is 1: must be at least 2",
    "rollout:\n  group_sise: 4\n": "rollout.group_sise is no field, in {path}: did you mean group_size?",
    "rolout:\n  group_size: 4\n": "rolout is no section, in {path}: did you mean rollout?",
    "rollout: 3\n": "rollout is 3, in {path}: must be a section",
    "rollout:\n": "rollout is None, in {path}: must be a section",
    "rollout: [\n": "is not valid YAML",
    "": "holds no sections",
    "- 1\n": "holds no sections",
    "advantage:\n  is_whitened: 3\n": "advantage.is_whitened is '3': must be true or false",
    "optimizer:\n  learning_rate: .inf\n": "optimizer.learning_rate is inf: must be a finite number",
}


@pytest.mark.parametrize(("text", "message"), WRONG_FILES.items())
def test_wrong_file_is_one_line(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, text)
    assert_one_line(["--config", path], message.format(path=path), capsys)


def test_unreadable_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_line(["--config", str(tmp_path)], "cannot be read (Is a directory)", capsys)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert_one_line(["--config", str(tmp_path / "binary.yaml")], "is not text in UTF-8", capsys)


def assert_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.train(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.startswith("mteditflow: ") and err.endswith("\n") and err.count("\n") == 1
    assert message in err


def test_help_names_every_field_and_imports_no_torch() -> None:
    """torch takes seconds to import; what --help needs does not."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from mteditflow.config.cli import parse\n"
        "parse(['--help'], prog='train')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "False\n"
    text = " ".join(done.stdout.replace("-\n", "-").split()).replace("- ", "-")
    for key, setting in settings().items():
        assert f"--{key} " in text
        assert " ".join(setting.sentence.split()[:3]) in text


def test_every_field_has_a_sentence() -> None:
    for section_class in get_type_hints(Config).values():
        assert section_class.__doc__
    missing = [key for key, setting in settings().items() if not setting.sentence.endswith((".", "?"))]
    assert missing == []


def test_mini_is_the_default() -> None:
    text = (ROOT / "configs" / "mini.yaml").read_text()
    assert from_yaml(ROOT / "configs" / "mini.yaml") == Config()
    assert text == to_commented_yaml(Config()), "regenerate it: python -m mteditflow.train --print_config"
    assert text.startswith(f"# {DEFAULT_TITLE}"[:80])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("mini*.yaml")), ids=lambda path: path.name)
def test_config_file_has_every_field_with_its_comment(path: Path) -> None:
    from_yaml(path)
    lines = path.read_text().splitlines()
    tree = yaml.safe_load(path.read_text())
    for section, section_class in get_type_hints(Config).items():
        assert list(tree[section]) == [field.name for field in fields(section_class)]
        start = lines.index(f"{section}:")
        for field in fields(section_class):
            place = next(i for i in range(start, len(lines)) if lines[i].startswith(f"  {field.name}:"))
            assert lines[place - 1].startswith("  # ")


def test_print_config_and_to_yaml_are_read_back_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--optimizer.learning_rate", "3e-5", "--lora.targets", "[to_q]", "--run.folder", "runs/a: b #c"]
    config, _ = parse(arguments)
    with pytest.raises(SystemExit) as stop:
        command.train([*arguments, "--print_config"])
    assert stop.value.code == 0
    for text in (capsys.readouterr().out, to_yaml(config)):
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
    plan = duration_plan(config, RowSeconds(forward=1.0, forward_backward=3.0, decode=0.25, encode=0.25))
    assert plan["rollout of an iteration"] == 3072 + 384 * 0.5
    assert plan["updates of an iteration"] == 768 * 3.0
    evaluations = (2 * 100 + 2 * 10) * 3 * (4 + 0.5)
    assert plan["run, without scoring and saving"] == 20 * (3072 + 192 + 2304) + evaluations


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
    with pytest.raises(ValueError, match=r"model\.path is .*without transformer/config\.json"):
        dry_run(replace(Config(), model=ModelConfig(path=str(tmp_path))))
    with pytest.raises(ValueError, match=r"model\.path is 'nowhere': no folder"):
        dry_run(replace(Config(), model=ModelConfig(path="nowhere")))
    with pytest.raises(ValueError, match=r"model\.path is 'some/editor': .* none of black-forest-labs/FLUX\.1"):
        dry_run(replace(Config(), model=ModelConfig(path="some/editor")))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("mini_long", {"run.folder", "run.num_iterations"}),
        ("mini_nft", {"run.folder"}),
        ("mini_grpo", {"objective.name", "optimizer.epsilon", "run.folder"}),
        (
            "mini_mixgrpo",
            {
                *("objective.name", "optimizer.epsilon", "run.folder"),
                *("rollout.num_steps", "rollout.window_size", "rollout.window_placement"),
            },
        ),
        (
            "profile_kontext",
            {
                *("model.path", "model.height", "model.width", "model.max_text_tokens", "model.dtype"),
                *("lora.rank", "lora.alpha", "lora.targets", "rollout.num_tasks", "rollout.num_steps"),
                *("rollout.microbatch_size", "objective.name", "objective.clip_range", "optimizer.learning_rate"),
                *("optimizer.epsilon", "optimizer.schedule", "optimizer.microbatch_size", "run.folder"),
            },
        ),
    ],
)
def test_the_other_configs_differ_where_they_say(name: str, changed: set[str]) -> None:
    own, default = asdict(from_yaml(ROOT / "configs" / f"{name}.yaml")), asdict(Config())
    different = {f"{s}.{f}" for s, fields in own.items() for f, value in fields.items() if value != default[s][f]}
    assert different == changed
