"""What a run that goes on may change, what it evaluates again, and how it goes back to an older checkpoint."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from train_runs import Arguments, lora, metrics, refused
from update_parts import change

from mteditflow.config import Config, DataConfig
from mteditflow.config.cli import settings
from mteditflow.config.command import train as main
from mteditflow.config.resume import OPERATIONAL, check_resume, meaning
from mteditflow.data import held_out_tasks
from mteditflow.evaluate.kept import compare_contents, name_contents, problem_of
from mteditflow.policy import build_policy
from mteditflow.record.checkpoint import config_dict
from mteditflow.report.live import live_contents
from mteditflow.report.run_report import report_contents

GRPO = change(change(Config(), "objective", name="grpo"), "optimizer", schedule="constant")


def is_refused(before: Config, now: Config) -> bool:
    try:
        check_resume(config_dict(before), config_dict(now), Path("run"))
    except ValueError as error:
        assert str(error).endswith("set these back, or use another run.folder") and "\n" not in str(error)
        return True
    return False


@pytest.mark.parametrize(
    ("key", "value"),
    {
        "reward.url": "http://host:8000/v1", "reward.timeout_s": 7.0, "reward.max_wait_s": 7.0,
        "reward.max_answer_tokens": 7, "reward.num_retries": 7, "reward.num_parallel": 7, "reward.overlap": "off",
        "model.is_checkpointed": True, "model.text_encoder": "offload", "rollout.wave_size": 7,
        "run.num_checkpoints": 7, "run.num_gpus": 7, "run.gpu_gib": 7.0, "run.num_iterations": 7,
        "evaluation.num_steps": 7, "data.allowed_folder": "a",
        "distributed.timeout_s": 77, "objective.nft_beta": 7.0,
    }.items(),
)  # fmt: skip
def test_how_it_is_carried_out_may_change(key: str, value: Any) -> None:
    section, name = key.split(".")
    assert not is_refused(GRPO, change(GRPO, section, **{name: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    {
        "model.guidance_scale": 7.0, "model.base": "int8", "model.text_encoder": "int8", "lora.rank": 7,
        "data.path": "a.jsonl", "data.seed": 7, "data.num_turns": 2, "rollout.group_size": 7,
        "rollout.noise_level": 0.7, "rollout.window_size": 1, "reward.temperature": 0.1, "reward.scale": "binary",
        "objective.clip_range": 0.7,
        "objective.name": "nft", "optimizer.learning_rate": 0.7, "run.seed": 7,
    }.items(),
)  # fmt: skip
def test_what_is_done_may_not(key: str, value: Any) -> None:
    section, name = key.split(".")
    assert is_refused(GRPO, change(GRPO, section, **{name: value}))


def test_fields_without_effect_stop_nothing() -> None:
    """A window as long as the schedule, CPS with too much noise, and a resume, of NFT."""
    nft = change(Config(), "rollout", window_size=999, rule="cps", noise_level=2.0, window_placement="progressive")
    assert nft.objective.name == "nft" and not is_refused(Config(), nft)
    with pytest.raises(ValueError, match=r"^rollout\.window_size is 999: must be below num_steps, 3$"):
        dataclasses.replace(nft, objective=GRPO.objective)


def test_a_longer_run_is_the_same_where_nothing_moves_over_all_of_it() -> None:
    constant = change(GRPO, "optimizer", schedule="constant")
    for iters_per_window, is_other in ((0, True), (5, False)):
        moving = change(constant, "rollout", window_placement="progressive", iters_per_window=iters_per_window)
        assert is_refused(moving, change(moving, "run", num_iterations=120)) is is_other
    assert not is_refused(constant, change(constant, "run", num_iterations=120))


def test_operational_fields_are_fields() -> None:
    assert settings().keys() >= OPERATIONAL
    assert not meaning(config_dict(Config())).keys() & OPERATIONAL - {"run.num_iterations"}


def test_what_is_behind_a_name_counts(tiny_config: Config, tmp_path: Path) -> None:
    """An editor's folder that moved is the same; one whose weights are others is not."""
    moved = tmp_path / "moved"
    shutil.copytree(tiny_config.model.path, moved)
    before, now = name_contents(tiny_config), name_contents(change(tiny_config, "model", path=str(moved)))
    difference = compare_contents(before, now)
    assert difference == {"model.path": ""}
    config = config_dict(tiny_config)
    check_resume(config, config_dict(change(tiny_config, "model", path=str(moved))), Path("run"), difference)
    (weights,) = (moved / "transformer").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    difference = compare_contents(before, name_contents(change(tiny_config, "model", path=str(moved))))
    with pytest.raises(ValueError, match=r"model\.path: another content is behind the name than before\): set these"):
        check_resume(config, config, Path("run"), difference)


def sessions(path: Path, numbers: range) -> Config:
    lines = [json.dumps({"image": f"{n}.png", "instructions": ["Remove the ball"]}) for n in numbers]
    path.write_text("\n".join(lines))
    for n in numbers:
        (path.parent / f"{n}.png").touch()
    return Config(data=DataConfig(path=str(path), num_turns=1))


def test_data_without_a_bad_row_are_the_same(tmp_path: Path) -> None:
    first = sessions(tmp_path / "a.jsonl", range(105))  # a tenth of which is ten, with one more or less, too
    known = name_contents(first)
    for numbers, difference in (
        (range(104), ""), (range(106), "1 of its sessions were not trained on before"),
        (range(1, 106), "1 of its sessions"), (range(50), "sessions are gone, more than 5%"),
    ):  # fmt: skip
        now = sessions(tmp_path / f"{numbers}.jsonl", numbers)
        found = compare_contents(known, name_contents(now))["data.path"]
        assert difference in found and bool(found) == bool(difference)
        if not difference:
            check_resume(config_dict(first), config_dict(now), Path("run"), {"data.path": found})
        else:
            with pytest.raises(ValueError, match=rf"data\.path: {found[:9]}"):
                check_resume(config_dict(first), config_dict(now), Path("run"), {"data.path": found})


def test_the_base_is_evaluated_again_for_another_problem_alone(tiny_config: Config, tmp_path: Path) -> None:
    config = change(tiny_config, "evaluation", num_sessions=2, num_sessions_short=1, num_strips=1)
    contents, tasks = name_contents(config), held_out_tasks(config)
    before = problem_of(tasks, config, contents)
    for section, values in (
        ("reward", {"num_parallel": 3}), ("reward", {"temperature": 0.2}), ("run", {"seed": 3}),
        ("model", {"is_checkpointed": True}), ("model", {"text_encoder": "offload"}), ("lora", {"rank": 3}),
        ("model", {"path": "elsewhere"}), ("data", {"seed": 3}), ("rollout", {"group_size": 3}),
    ):  # fmt: skip
        assert problem_of(tasks, change(config, section, **values), contents) == before, (section, values)
    for section, values in (
        ("model", {"guidance_scale": 3.0}), ("model", {"base": "bfloat16"}), ("evaluation", {"num_steps": 5}),
        ("rollout", {"hand_off": "latents"}),
    ):  # fmt: skip
        assert problem_of(tasks, change(config, section, **values), contents) != before, (section, values)
    assert problem_of(tasks, config, {"model.path": "another"}) != before
    assert problem_of(tasks[:1], config, contents) != before
    starts = [problem_of(tasks, change(config, "lora", init_from=name), contents) for name in ("hub/a", "hub/b")]
    assert len({before, *starts}) == 3  # names on the hub, whose content cannot be told
    unseen = [dataclasses.replace(task, truth=None) for task in tasks]
    judged = problem_of(unseen, config, contents)
    assert problem_of(unseen, change(config, "reward", url="http://a/v1"), contents) == judged
    assert problem_of(unseen, change(config, "reward", temperature=0.2), contents) != judged


@pytest.fixture(scope="module")
def whole(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four iterations that keeps all checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main(arguments(folder, run__num_checkpoints=9, evaluation__every=0))
    return folder


@pytest.mark.parametrize("damage", ["cut", "no JSON", "other tensors", "other keys", "other guidance"])
def test_a_damaged_evaluation_of_the_base_is_made_again(
    damage: str, whole: Path, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    verdicts, figures = (folder / f"evaluation_before.{suffix}" for suffix in ("safetensors", "json"))
    expected, other = figures.read_bytes(), {}
    match damage:
        case "cut":
            verdicts.write_bytes(verdicts.read_bytes()[:-100])
        case "no JSON":
            figures.write_text('{"turns": [')
        case "other tensors":
            safetensors.torch.save_file({"verdict": torch.ones(3)}, verdicts)
        case "other keys":
            figures.write_text('{"turns": 3}')
        case _:  # before there is a checkpoint, nothing of the problem is fixed
            shutil.rmtree(folder / "checkpoints")
            other = {"model__guidance_scale": 3.5, "run__num_iterations": 1}
    main(arguments(folder, run__num_checkpoints=9, evaluation__every=0, **other))
    said = capsys.readouterr().err
    assert said.count("the base is evaluated again: ") == 1 and str(folder / "evaluation_before") in said
    assert (figures.read_bytes() == expected) == (damage != "other guidance")


def test_going_back_loses_nothing_and_repeats_the_bits(
    whole: Path, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    again = arguments(folder, run__num_checkpoints=9, evaluation__every=0, reward__num_parallel=3)
    line = refused(capsys, [*again, "--resume_from=7"])
    assert "--resume_from is 7: " in line and "has 1, 2, 3, 4; run.num_checkpoints says" in line
    assert not (folder / "set_aside").exists() and (folder / "checkpoints" / "iteration-000004").is_dir()
    refused(capsys, [*again, "--resume_from=2", "--lora.rank=4"])  # nothing is moved for a run that is refused
    assert not (folder / "set_aside").exists()

    main([*again, "--resume_from=2"])
    (aside,) = (folder / "set_aside").iterdir()
    assert f"--resume_from 2: going back; what came after it is in {aside}\n" in capsys.readouterr().err
    assert aside.name == "iteration-000004-to-000002"
    made = ("lora", "judge/compared.json", "report.html")
    for path in ("checkpoints/iteration-000003", "checkpoints/iteration-000004", "judge/training.jsonl", *made):
        assert (aside / path).exists(), path
    assert len(metrics(aside)) == 4
    assert metrics(folder) == metrics(whole)
    assert all(torch.equal(weight, lora(whole)[key]) for key, weight in lora(folder).items())

    newest = folder / "checkpoints" / "iteration-000004"
    before = newest.stat().st_mtime_ns
    main([*again, "--resume_from=2"])  # as a restart has it: it goes on, and does not go back once more
    assert "--resume_from 2: went back there before, and goes on" in capsys.readouterr().err
    assert newest.stat().st_mtime_ns == before and [*(folder / "set_aside").iterdir()] == [aside]


RESULTS = {
    "comparison.json", "evaluation_after.json", "evaluation_after.safetensors", "report.html", "lora",
    "judge/compared.json", "evaluating_after",
}  # fmt: skip


class Killed(BaseException):
    """Nobody catches it."""


def test_a_finished_run_that_goes_on_is_not_finished(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in its third iteration, too: nothing says that it is finished, what it had made before is set aside once,
    and in the end it is as one that was not finished in between.
    """

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    def words(name: str, num: int) -> list[str]:
        constant = {"optimizer__schedule": "constant", "evaluation__every": 0}
        return arguments(tmp_path / name, run__num_iterations=num, **constant)

    folder, whole = tmp_path / "run", tmp_path / "three"
    main(words("run", 2))
    (folder / "evaluating_after").mkdir()  # of a killed evaluation
    made = {name: (folder / name).read_bytes() for name in RESULTS - {"lora", "evaluating_after"}}
    assert live_contents(folder)["state"] == "Finished." and len(made) == 5
    with monkeypatch.context() as patch:
        patch.setattr("mteditflow.train.update", die)
        with pytest.raises(Killed):
            main(words("run", 3))
    (aside,) = (folder / "set_aside").iterdir()
    assert f"training goes on: the results after iteration 2 are in {aside}\n" in capsys.readouterr().err
    assert aside.name == "results-000002" and {name for name in RESULTS if (aside / name).exists()} == RESULTS
    assert all((aside / name).read_bytes() == content for name, content in made.items())
    assert not any((folder / name).exists() for name in RESULTS)
    shown = live_contents(folder)
    assert shown["state"] != "Finished." and shown["refresh"] > 0
    page = report_contents(folder)
    assert page["missing"] == ["after training", "paired gain"] and page["compared"] == []
    assert not any(row["title"] == "Judge against truth" for row in page["alarms"])
    main(words("run", 3))
    main(words("three", 3))
    assert [*(folder / "set_aside").iterdir()] == [aside] and metrics(folder) == metrics(whole)
    assert (folder / "comparison.json").read_bytes() == (whole / "comparison.json").read_bytes()
    assert all(torch.equal(weight, lora(whole)[key]) for key, weight in lora(folder).items())
    main(words("run", 3))  # finished: its results are made again in their place
    assert [*(folder / "set_aside").iterdir()] == [aside]


def test_going_back_to_a_damaged_one_is_refused(
    whole: Path, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "checkpoints" / "iteration-000002" / "ema.safetensors").unlink()
    words = arguments(folder, run__num_checkpoints=9, evaluation__every=0)
    line = refused(capsys, [*words, "--resume_from=2"])
    assert "every checkpoint in " in line and "is damaged (ema.safetensors" in line
    assert not (folder / "set_aside").exists()


def test_weights_that_broke_are_neither_saved_nor_scored(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def overflow(self: torch.optim.AdamW, *_: Any) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.fill_(torch.inf)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", overflow)
        words = arguments(folder, evaluation__every=0, optimizer__num_updates=1, objective__kl_beta=0)
        line = refused(capsys, [*words, "--optimizer.learning_rate=0.5"])
    assert "not finite" in line and "optimizer.learning_rate is 0.5" in line and "judge" not in line
    assert not (folder / "checkpoints").exists() and not metrics(folder)


def test_weights_that_are_broken_are_refused(tiny_config: Config, tmp_path: Path) -> None:
    policy = build_policy(tiny_config.model, tiny_config.lora, 0, has_old=False)
    state = policy.adapters.state("current")
    key = next(iter(state))
    state[key][0, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"^adapter 'ema': {key} is not finite \(1 of {len(state)} are not\): take"):
        policy.adapters.load("ema", state)
    broken = tmp_path / "editor"
    shutil.copytree(tiny_config.model.path, broken)
    (file,) = (broken / "vae").glob("*.safetensors")
    weights = safetensors.torch.load_file(file)
    name = next(iter(weights))
    weights[name].view(-1)[0] = torch.inf
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    model = dataclasses.replace(tiny_config.model, path=str(broken))
    with pytest.raises(ValueError, match=rf"^model\.path .*: {name} of its vae is not finite: get these weights anew$"):
        build_policy(model, tiny_config.lora, 0, has_old=False)
