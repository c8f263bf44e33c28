"""`python -m mteditflow.evaluate`: its numbers are the library's, what is finished is kept, errors are one line."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from finished_runs import Page, judged_by_a_failing_reward
from torch import Tensor
from update_parts import ONE_RANK

from mteditflow.config import Config, EvaluationConfig, LoraConfig
from mteditflow.config.cli import LORA_FILE, evaluation_config, from_yaml, settings_parser, to_yaml
from mteditflow.config.command import evaluate as main
from mteditflow.data import held_out_tasks
from mteditflow.evaluate import compare_editors
from mteditflow.evaluate.compare_editors import list_settings
from mteditflow.evaluate.comparison_page import write_comparison
from mteditflow.evaluate.edival import compare, summary
from mteditflow.evaluate.held_out import evaluate, load_evaluation, load_verdicts
from mteditflow.evaluate.lora_files import common_lora, read_subject
from mteditflow.export.weights import write_lora
from mteditflow.policy import Policy, build_policy
from mteditflow.policy.lora_file import padded_state
from mteditflow.record import checkpoint
from mteditflow.record.drift import KINDS
from mteditflow.record.figures import METRICS, figure, turns_of

SESSIONS = EvaluationConfig(num_sessions=3, num_turns=2, num_sessions_short=2, num_strips=2, num_steps=2)


def moved(policy: Policy, seed: int) -> dict[str, Tensor]:
    """Weights of `ema` that change what it does."""
    generator = torch.Generator().manual_seed(seed)
    state = policy.adapters.state("ema")
    return {key: weight + 0.2 * torch.randn(weight.shape, generator=generator) for key, weight in state.items()}


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    return replace(tiny_config, evaluation=SESSIONS)


@pytest.fixture(scope="module")
def run(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has saved iteration 3."""
    folder = tmp_path_factory.mktemp("runs") / "mini"
    policy = build_policy(config.model, config.lora, 0, has_old=False)
    state = {"ema": moved(policy, 1)}
    checkpoint.save(folder, iteration=3, config=config, state=state, keep=1)
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


@pytest.fixture(scope="module")
def other(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA from elsewhere, of another rank, alpha and choice of modules: its scale is 5 / 3, the run's is 2."""
    folder = tmp_path_factory.mktemp("elsewhere")
    lora = LoraConfig(rank=3, alpha=5, targets=("attn.to_v", "transformer_blocks.0.ff.net.2", "proj_mlp"))
    policy = build_policy(config.model, lora, 0, has_old=False)
    policy.adapters.load("ema", moved(policy, 2))
    write_lora(type(policy.pipeline), policy.adapters.state("ema"), lora, folder)
    return folder


@pytest.fixture
def command(config: Config, tmp_path: Path) -> Callable[..., Path]:
    """Runs the command with the settings of `config`, and gives the folder of results."""
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))

    def run_it(*words: Any) -> Path:
        main(["--config", str(path), *map(str, words), "--out", str(tmp_path / "out")])
        return tmp_path / "out"

    return run_it


def slug(folder: Path) -> str:
    return str(folder).strip("/").replace("/", "-")


def test_numbers_are_those_of_the_library(
    command: Callable[..., Path], config: Config, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bit: the adapter that holds a single subject is that subject's own."""
    out = command("base", run)
    policy, tasks = build_policy(config.model, config.lora, 5, has_old=False), held_out_tasks(config)
    policy.adapters.load("ema", moved(build_policy(config.model, config.lora, 0, has_old=False), 1))
    expected = {
        "base": evaluate(policy, tasks, config, "off", ONE_RANK),
        slug(run): evaluate(policy, tasks, config, "ema", ONE_RANK),
    }
    before, after = expected.values()
    assert not torch.equal(before.images, after.images)
    for name, own in expected.items():
        report = json.loads((out / name / "metrics.json").read_text())
        assert {key: report[key] for key in summary(own)} == summary(own)
        assert [point["success"] for point in report["exposure_bias"]] == [turn["MT"] for turn in report["turns"]]
        found = load_verdicts(out / name / "evaluation.safetensors")
        assert torch.equal(found.images, own.images) and torch.equal(found.verdict, own.verdict)
        torch.testing.assert_close(found.consistency, own.consistency, rtol=0, atol=0, equal_nan=True)
        assert report["settings"]["evaluation.num_turns"] == 2 and report["judge"] == "the exact verifier"
        assert (out / name / "strips.png").stat().st_size > 0
    assert json.loads((out / "comparison.json").read_text())["gains"] == {str(run): compare(before, after)}
    said = capsys.readouterr().out
    assert f"averaged adapter after iteration 3 of {Config().run.num_iterations}" in said.replace("\n", " ")
    assert "gain over base" in said.replace("\n", " ")


def test_one_adapter_holds_every_lora(config: Config, run: Path, other: Path) -> None:
    """What it adds to each weight is what stock diffusers adds, to float32's rounding of products of a few terms."""
    subjects = [read_subject(str(run), config.model), read_subject(str(other), config.model)]
    wide = common_lora(subjects, config)
    assert (wide.rank, wide.alpha) == (3, 5) and set(wide.targets) == {n for s in subjects for n in s.lora}
    policy = build_policy(config.model, wide, 0, has_old=False)
    for subject in subjects:
        state = padded_state(subject.lora, wide, policy.adapters.state("ema"))
        for name in policy.adapters.targets:
            added = wide.alpha / wide.rank * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
            own = subject.lora.get(name)
            expected = torch.zeros_like(added) if own is None else own.scale * own.up @ own.down
            torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-6)
    stock: Any = FluxKontextPipeline.from_pretrained(config.model.path)
    before = {name: weight.clone() for name, weight in stock.transformer.named_parameters()}
    stock.load_lora_weights(other)
    stock.fuse_lora()
    stock.unload_lora_weights()
    changed = set()
    for name, weight in stock.transformer.named_parameters():
        if not torch.equal(weight, before[name]):
            changed.add(name.removesuffix(".weight"))
            own = subjects[1].lora[name.removesuffix(".weight")]
            added = own.scale * own.up @ own.down
            torch.testing.assert_close(weight - before[name], added, rtol=1e-5, atol=1e-6)
    assert changed == set(subjects[1].lora)


def test_alpha_comes_from_the_file(config: Config, other: Path, tmp_path: Path) -> None:
    """By metadata, by a pattern in it, by alpha tensors, or as the rank."""
    tensors = safetensors.torch.load_file(other / LORA_FILE)
    name = next(name for name in read_subject(str(other), config.model).lora if name.endswith("proj_mlp"))
    both = {"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {"proj_mlp": 12}}
    plain = {key: value for key, value in both.items() if "pattern" not in key}
    alpha = {f"transformer.{name}.alpha": torch.tensor(1.5)}
    for values, extra, scale in ((both, {}, 4), (plain, {}, 2), ({}, alpha, 0.5), ({}, {}, 1)):
        metadata = {"lora_adapter_metadata": json.dumps(values)} if values else None
        safetensors.torch.save_file(tensors | extra, tmp_path / LORA_FILE, metadata)
        assert read_subject(str(tmp_path), config.model).lora[name].scale == scale


def test_a_run_without_checkpoints_has_its_exported_adapter(run: Path, config: Config, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    policy = build_policy(config.model, config.lora, 0, has_old=False)
    policy.adapters.load("ema", moved(policy, 1))
    write_lora(type(policy.pipeline), policy.adapters.state("ema"), config.lora, tmp_path / "lora")
    exported, saved = read_subject(str(tmp_path), config.model), read_subject(str(run), config.model)
    assert (
        exported.what
        == f"run, averaged adapter after iteration {config.run.num_iterations} of {config.run.num_iterations}"
    )
    assert exported.fingerprint == saved.fingerprint


def test_what_is_finished_is_kept(
    command: Callable[..., Path], run: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(policy: Any, tasks: Any, config: Any, adapter: Any, *rest: Any, **more: Any) -> Any:
        calls.append(adapter)
        if len(calls) == 2:
            raise KeyboardInterrupt  # killed while the second subject is evaluated
        return evaluate(policy, tasks, config, adapter, *rest, **more)

    monkeypatch.setattr(compare_editors, "evaluate_editor", counted)
    with pytest.raises(SystemExit) as caught:
        command("base", run, other)
    assert caught.value.code == 130
    out = command("base", run, other)
    assert calls == ["off", "ema", "ema", "ema"]
    files = {path: path.read_bytes() for path in out.glob("*/*")}
    assert len(files) == 9
    command(other, "base", run)  # another order is another first subject, and no other evaluation
    assert len(calls) == 4 and {path: path.read_bytes() for path in out.glob("*/*")} == files
    verdicts = out / slug(run) / "evaluation.safetensors"
    verdicts.write_bytes(b"torn")  # by a full disk, say
    command("base", run, other)
    whole = files.pop(verdicts)
    assert len(calls) == 5 and len(verdicts.read_bytes()) == len(whole)
    assert {path: path.read_bytes() for path in out.glob("*/*") if path != verdicts} == files
    command("base", "--evaluation.num_steps", 1, "--evaluation.num_turns", 1)
    assert len(calls) == 6
    assert "1 denoising step of the ODE, K = 1 turn, judged by" in Page(out / "comparison.html").text


def test_what_is_of_other_sessions_is_not_kept(
    command: Callable[..., Path], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gains are paired session by session: behind the same name and settings may be other data by now."""
    out = command("base")
    before = json.loads((out / "base" / "metrics.json").read_text())
    monkeypatch.setattr(compare_editors, "held_out_tasks", lambda config: held_out_tasks(config)[::-1])
    reports = [json.loads((command("base", run) / name / "metrics.json").read_text()) for name in ("base", slug(run))]
    assert reports[0]["problem"] == reports[1]["problem"] != before["problem"]
    assert reports[0]["settings"] == before["settings"] and reports[0]["adapter"] == before["adapter"]


def test_a_page_of_its_own(command: Callable[..., Path], run: Path, other: Path) -> None:
    out = command("base", run, other)
    page = Page(out / "comparison.html")
    html = page.html
    names = [*METRICS, *(f"{kind}_size" for kind in KINDS)]
    reports = [json.loads(path.read_text()) for path in out.glob("*/metrics.json")]
    known = [any(turn[name] is not None for report in reports for turn in report["turns"]) for name in names]
    assert page.tags.count("svg") == sum(known) > len(METRICS) and len(reports) == 3
    assert 'class="band"' not in html  # of three sessions
    assert page.tags.count("img") == SESSIONS.num_strips and page.tags.count("table") == 1 + len(METRICS)
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert "http" not in html and "url(" not in html and not {"script", "link", "iframe"} & set(page.tags)
    report = json.loads((out / "base" / "metrics.json").read_text())
    assert "K = 2 turns" in page.text and "3 held-out sessions" in page.text and "not scored" not in page.text
    text = page.text.replace(" ", "")
    assert all(str(figure(turn, metric)).replace(" ", "") in text for turn in turns_of(report) for metric in METRICS)
    assert all(kind.replace("_", " ") in page.text for kind in report["edit_types"])


def test_sessions_that_could_not_be_scored(klein_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another family, judged by a reward: sessions 0 and 3 of 4 have no scores."""
    judged_by_a_failing_reward(monkeypatch, compare_editors)
    assert main(["base", str(klein_run), "--out", str(tmp_path)]) == 0
    page = Page(tmp_path / "comparison.html")
    assert "judged by the judge 'exact'" in page.text and "the same 4 held-out sessions" in page.text
    assert "sessions scored not scored" in page.text and "the editor without adapter 2 2" in page.text
    assert f"{klein_run} run, averaged adapter after iteration 2 of 2 2 2" in page.text


def test_a_metric_that_is_nowhere_defined(klein_run: Path, tmp_path: Path) -> None:
    """As beside a judge without consistency: dashes in the table, no chart, and IF is what leads."""
    evaluation = load_evaluation(klein_run, "after")
    assert evaluation is not None
    evaluation = replace(evaluation, consistency=torch.full_like(evaluation.consistency, torch.nan))
    settings = list_settings(from_yaml(klein_run / "config.yaml"), is_by_truth=False)
    what = {"what": "a run", "commit": "unknown", "judge": "a judge", "settings": settings}
    reports = {name: summary(evaluation) | what for name in ("one", "another")}
    page = Page(write_comparison(tmp_path, reports, {"another": compare(evaluation, evaluation)}, []))
    assert page.tags.count("svg") == 2 + len(KINDS) and "\N{EN DASH}" in page.text
    assert "\N{EN DASH} %" not in page.text and "% IF at turn 2, another" in page.text


def test_ten_turns(config: Config) -> None:
    """A turn's figures do not depend on the turns after it: to the bit those of the same sessions cut at 3 turns."""
    ten = replace(config, evaluation=replace(SESSIONS, num_turns=10, num_steps=1))
    three = replace(config, evaluation=replace(SESSIONS, num_turns=3, num_steps=1))
    policy, tasks = build_policy(config.model, config.lora, 0, has_old=False), held_out_tasks(ten)
    policy.adapters.load("ema", moved(policy, 1))
    cut = [replace(t, instructions=t.instructions[:3], edit_types=t.edit_types[:3]) for t in tasks]
    whole, short = evaluate(policy, tasks, ten, "ema", ONE_RANK), evaluate(policy, cut, three, "ema", ONE_RANK)
    assert whole.verdict.shape == (3, 10) and whole.images.shape[0] == 10
    assert torch.equal(whole.images[:3], short.images)
    assert summary(whole)["turns"][:3] == summary(short)["turns"]


def test_a_file_comes_over_the_runs_settings(config: Config, run: Path, tmp_path: Path) -> None:
    """And an override over both: a benchmark's file says what a run is evaluated on, whatever it was trained on."""
    (tmp_path / "own.yaml").write_text("evaluation: {num_steps: 7, num_sessions: 9}\n")
    words = ["base", str(run), "--config", str(tmp_path / "own.yaml"), "--evaluation.num_sessions", "8"]
    parser = settings_parser("", "", "")
    parser.add_argument("subjects", nargs="+")
    found = evaluation_config(parser, words, run)
    assert found.evaluation == replace(config.evaluation, num_steps=7, num_sessions=8, num_sessions_short=8)
    assert found.data == config.data and found.model == config.model
    patient = replace(config, run=replace(config.run, patience=3), evaluation=EvaluationConfig(num_strips=2))
    (tmp_path / "config.yaml").write_text(to_yaml(patient))
    words[words.index("--evaluation.num_sessions") + 1] = "2"  # fewer than patience in training goes by
    assert evaluation_config(parser, words, tmp_path).evaluation.num_sessions == 2


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom mteditflow.config.command import evaluate as main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 False\n") and "SUBJECT" in done.stdout


def refused(capsys: pytest.CaptureFixture[str], call: Callable[[], Any]) -> str:
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_wrong_subjects_are_one_line(
    command: Callable[..., Path], config: Config, run: Path, weights_run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    neither, empty, file = tmp_path / "neither", tmp_path / "empty", tmp_path / "file"
    neither.mkdir()
    empty.mkdir()
    (empty / "config.yaml").write_text(to_yaml(config))
    file.write_text("")
    expected = {
        (): "SUBJECT is missing: a run's folder",
        (tmp_path / "gone",): "is no folder that exists: give a run's folder",
        (file,): "is a file: give",
        (neither,): "has neither a run's config.yaml nor pytorch_lora_weights.safetensors",
        (empty,): "has no checkpoint yet, and no lora/pytorch_lora_weights.safetensors: train it first",
        ("base", "base"): "subjects 'base' and 'base' would both be 'base' in --out",
        ("base", "--evaluation.num_sessions", 1): "evaluation.num_sessions is 1: must",
        ("base", "--evaluation.num_sessions", "2", "--evaluation.num_strips", "3"): "evaluation.num_strips is 3: must",
    }
    for words, line in expected.items():
        assert line in refused(capsys, lambda words=words: command(*words)), words
    another = tmp_path / "another"
    another.mkdir()
    (another / "config.yaml").write_text(to_yaml(replace(config, evaluation=replace(SESSIONS, num_sessions=4))))
    line = refused(capsys, lambda: main([str(run), str(another), "--out", str(tmp_path / "out")]))
    assert "disagree on held-out data: evaluation.num_sessions is 3 and 4; set it by an override" in line
    line = refused(capsys, lambda: main([str(weights_run), "--out", str(tmp_path / "out")]))
    assert "trained whole weights, not a LoRA: export it" in line
    assert "--out is" in refused(capsys, lambda: main([str(run), "--out", str(file)]))


def test_a_lora_that_does_not_fit_is_one_line(
    command: Callable[..., Path], other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, folder = safetensors.torch.load_file(other / LORA_FILE), tmp_path / "lora"
    folder.mkdir()
    name = "transformer_blocks.0.attn.to_v"
    down, up = (f"transformer.{name}.lora_{half}.weight" for half in "AB")

    def line(changed: dict[str, Tensor], **metadata: str) -> str:
        safetensors.torch.save_file(changed, folder / LORA_FILE, metadata)
        return refused(capsys, lambda: command("base", folder))

    elsewhere = {key.replace("blocks.0.", "blocks.9."): tensor for key, tensor in tensors.items()}
    assert "it adapts" in line(elsewhere) and "model.path to the editor it was trained on" in line(elsewhere)
    wider = line(tensors | {down: torch.zeros(3, 40)})
    assert f"{name} is 40 to 32 in it and 32 to 32 in the model" in wider
    assert "do not go together" in line({down: tensors[down]})
    assert "lora_unet_x.lora_down.weight" in line({"lora_unet_x.lora_down.weight": torch.zeros(3, 3)})
    assert "use_dora" in line(tensors, lora_adapter_metadata=json.dumps({"transformer.use_dora": True}))
    assert "do not go together" in line(tensors | {up: torch.zeros(32, 2)})
    (folder / LORA_FILE).write_bytes(b"nothing")
    assert "cannot be read" in refused(capsys, lambda: command("base", folder))
    assert not (tmp_path / "out").exists()
