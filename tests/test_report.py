"""The report shows the figures, says what is missing, and needs nothing but itself."""

import base64
import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from mteditflow.config import Config, ObjectiveConfig, RolloutConfig, RunConfig
from mteditflow.config.command import report as main
from mteditflow.record.metrics import strip
from mteditflow.report.html import ticks
from mteditflow.report.run_page import write_report

VOID = {"meta", "img", "br", "link", "input"}
EDIT_TYPES = {"color_alter": {"success": 0.5, "count": 70}, "text_change": {"success": 0.0, "count": 9}}


class Page(HTMLParser):
    """Checks that tags nest, and gathers what the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "xlink:href", "data")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def evaluation(shift: float) -> dict[str, object]:
    turns = []
    for turn in (1, 2, 3):
        values = {name: 90 - 15 * turn + shift + place for place, name in enumerate(("MT", "IF", "CC", "O"))}
        turns.append({"turn": turn, **values, **{f"{name}_interval": [v - 2.5, v + 2.5] for name, v in values.items()}})
    types = {name: {**value, "success": value["success"] + shift / 50} for name, value in EDIT_TYPES.items()}
    return {"num_sessions": 256, "turns": turns, "edit_types": types}


def lines_of(num: int, iteration_0: int = 0) -> list[dict[str, float | None]]:
    lines: list[dict[str, float | None]] = []
    for i in range(iteration_0, num):
        line: dict[str, float | None] = {
            "iteration": i,
            "reward/mean": 0.5 + 0.2 * math.tanh(i / 20) + 0.02 * math.sin(7 * i),
            "reward/std": 0.1,
            "reward/instruction": 0.6,
            "reward/consistency": None if i == 5 else 0.9 + 0.001 * i,
            **{f"reward/turn_{k}": 0.8 - 0.1 * k + 0.002 * i for k in (1, 2, 3)},
            **{f"reward/success_{k}": 0.7 - 0.1 * k + 0.002 * i for k in (1, 2, 3)},
            "reward/zero_spread_share": 0.125,
            "update/ratio_error": 1e-3 * (1 + math.sin(i) ** 2),
            "update/first_ratio_error": 0.0,
            "update/clip_fraction": 0.2,
            "update/grad_norm": 0.03 + 0.01 * math.cos(i),
            "alarm/edge_density_drift": 0.1 + 0.005 * i,
            "alarm/no_edit_share": 0.05,
            "alarm/over_edit_share": 0.01,
            "time/rollout_s": 4.0,
            "time/score_s": 0.5,
            "time/update_s": 3.0,
        }
        if i % 10 == 9:
            line["heldout/O_3"] = 40 + 0.2 * i
        lines.append(line)
    return lines


def write_run(folder: Path, *, is_finished: bool) -> Path:
    folder.mkdir()
    config = dataclasses.asdict(
        Config(
            rollout=RolloutConfig(num_steps=8),
            objective=ObjectiveConfig(name="grpo"),
            run=RunConfig(num_iterations=40),
        )
    )
    config["lora"]["targets"] = ["<to_q & to_k>"]  # must be escaped
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = lines_of(40 if is_finished else 12)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 99, "re')
    if not is_finished:
        return folder
    (folder / "evaluation_before.json").write_text(json.dumps(evaluation(0)))
    (folder / "evaluation_after.json").write_text(json.dumps(evaluation(6.25)))
    gain = {"turn": 3, "O_gain": 6.25, "O_gain_interval": [3.5, 9.0], "IF_gain": -1.5, "IF_gain_interval": [-4.0, 1.0]}
    (folder / "comparison.json").write_text(json.dumps({"turns": [gain]}))
    (folder / "strips").mkdir()
    for iteration in (0, 20, 40):
        images = [[torch.rand(3, 16, 16) * 2 - 1 for _ in range(4)] for _ in range(2)]
        captions = [["source", "make it blue", "remove it", "add two"]] * 2
        strip(images, captions, 6).save(folder / "strips" / f"iteration-{iteration:06d}.png")
    (folder / "lora").mkdir()
    (folder / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    return folder


def test_a_finished_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", is_finished=True)
    path = write_report(folder)
    assert path == folder / "report.html" and not (folder / ".report.html.new").exists()
    html = path.read_text()
    page = Page(html)
    text = " ".join(page.text.split())
    assert "Not there yet" not in text
    for figure in ("48.0 %", "54.2 %", "+6.2", "+3.5 to +9.0", "\N{MINUS SIGN}1.5", "45.5 to 50.5", "256 sessions"):
        assert figure in text, figure
    assert "P = 8 tasks, G = 16 trajectories of each, K = 3 turns, S = 8 denoising steps" in text
    assert "40 of 40 iterations in 5.0 minutes" in text and "objective grpo" in text
    assert f'pipe.load_lora_weights("{folder.resolve() / "lora"}")' in text
    assert "held-out O" in text.lower() or "Held-out O" in text
    assert html.count("<svg") == 12 and "<to_q" not in html and "&lt;to_q &amp; to_k&gt;" in html
    assert "color alter (70 edits)" in text and "50.0 %" in text and "62.5 %" in text
    assert re.search(r"<title>O 3, iteration 39: 47.8</title>", html)


def test_it_needs_nothing_but_itself(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", is_finished=True)
    html = write_report(folder).read_text()
    page = Page(html)
    assert "http" not in html and "url(" not in html and "@import" not in html
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    prefix = "data:image/png;base64,"
    assert [reference.startswith(prefix) for reference in page.references] == [True, True]
    shown = [base64.b64decode(reference.removeprefix(prefix)) for reference in page.references]
    assert shown == [(folder / "strips" / f"iteration-0000{i}.png").read_bytes() for i in ("00", "40")]
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_gain_is_coloured_only_where_the_interval_is_clear_of_0(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path / "run", is_finished=True)).read_text()
    assert html.count('<td class="good">') == 1 and html.count('<td class="bad">') == 0


def test_a_killed_run_says_what_is_missing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", is_finished=False)
    text = " ".join(Page(write_report(folder).read_text()).text.split())
    assert "12 of 40 iterations" in text and "The run is not finished" in text
    for what in ("the evaluations of held-out", "strips of images", "success by type", "the exported adapter"):
        assert f"Not there yet: {what}" in text
    (folder / "evaluation_before.json").write_text(json.dumps(evaluation(0)))
    text = " ".join(Page(write_report(folder).read_text()).text.split())
    assert "Not there yet: after training, paired gain" in text and "48.0 %" in text


def test_a_run_killed_before_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    text = " ".join(Page(write_report(tmp_path).read_text()).text.split())
    assert "0 iterations." in text and "Not there yet: Reward, Instruction score by turn" in text
    assert "config.yaml is missing" in text


def test_curve_passes_through_its_values(tmp_path: Path) -> None:
    """Two points of [0, 1] over iterations 0 to 1: corners of the plot; the gap at a missing value splits the path."""
    values = [0.0, 1.0, None, 1.0, 0.0]
    lines = [json.dumps({"iteration": i, "reward/consistency": value}) for i, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    html = write_report(tmp_path).read_text()
    assert '<path d="M54.0 196.0 L142.5 10.0 M319.5 10.0 L408.0 196.0"/>' in html


def test_a_long_run_stays_light(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_of(3000)))
    assert write_report(tmp_path).stat().st_size < 2e6


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.91, 0.93, [0.91, 0.915, 0.92, 0.925, 0.93]), (2.0, 2.0, [1.8, 2.2])],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and len(found) <= 8
    assert found[0] == expected[0] and found[-1] == expected[-1]


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "it has no metrics.jsonl" in error
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "evaluation_after.json").write_text("{")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "evaluation_after.json is not JSON" in error
    (tmp_path / "evaluation_after.json").unlink()
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"


def test_what_never_comes_is_not_missed(tmp_path: Path) -> None:
    """NFT has no ratio, and a run without evaluations on the way no curve of them."""
    folder = write_run(tmp_path / "run", is_finished=False)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    lines = [{"iteration": 0, "reward/mean": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    missed = "Held-out O at turn 3", "Ratio error", "Clip fraction"
    text = " ".join(Page(write_report(folder).read_text()).text.split())
    assert all(title in text for title in missed)
    config["objective"]["name"], config["evaluation"]["every"] = "nft", 0
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    text = " ".join(Page(write_report(folder).read_text()).text.split())
    assert not any(title in text for title in missed) and "Gradient norm" in text


def test_alarms_have_a_table(tmp_path: Path) -> None:
    """Drift passes its threshold, 0.2, at iteration 22: 0.1 + 0.005 * 21 is the first above it."""
    folder = write_run(tmp_path / "run", is_finished=True)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["alarms"] = {"max_drift": 0.2, "max_no_edit_share": 0.5}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    page = write_report(folder).read_text()
    assert page.count("since iteration 22") == 1 and page.count("quiet") == 1  # no threshold, no row
