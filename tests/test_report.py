"""The report of a run: its figures and curves, the code that loads the result, what is missing; nothing but itself."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from finished_runs import Page

from mteditflow.config.cli import from_yaml
from mteditflow.config.command import report as command
from mteditflow.export.card import read_usage
from mteditflow.record.drift import KINDS
from mteditflow.record.figures import METRICS, figure, turns_of
from mteditflow.record.files import read_json
from mteditflow.report.charts import ticks
from mteditflow.report.run_report import write_report


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def copy_run(run: Path, folder: Path, *names: str) -> Path:
    """Copy these files of a run, as if it had been killed before it wrote the others."""
    folder.mkdir()
    for name in names:
        shutil.copy(run / name, folder / name)
    return folder


@pytest.mark.parametrize("name", ["lora_run", "weights_run", "klein_run"])
def test_every_figure_of_a_run_is_on_its_page(name: str, request: pytest.FixtureRequest) -> None:
    """Of any family, objective and K, LoRA or whole weights, with and without sessions that could not be scored."""
    folder: Path = request.getfixturevalue(name)
    config, page = from_yaml(folder / "config.yaml"), Page(folder / "report.html")
    assert "Not there yet" not in page.text and "None" not in page.text
    assert f"objective {config.objective.name}" in page.text and "2 of 2 iterations in" in page.text
    before, after, gain = (
        read_json(folder / f"{file}.json") for file in ("evaluation_before", "evaluation_after", "comparison")
    )
    num_turns = len(before["turns"])
    assert num_turns == config.data.num_turns and len(read_lines(folder)) == 2
    rows = [
        f"{metric}{turn + 1} {''.join(cells)}".replace(" ", "")
        for metric in METRICS
        for turn in range(num_turns)
        if (
            cells := [
                str(figure(turns_of(before)[turn], metric)),
                str(figure(turns_of(after)[turn], metric)),
                str(figure(turns_of(gain)[turn], f"{metric}_gain")),
            ]
        )
    ]
    squeezed = page.text.replace(" ", "")
    assert all(row in squeezed for row in rows)
    assert f"{before['num_sessions']} sessions" in page.text
    assert ("could not be scored" in page.text) == (name == "klein_run") == bool(before["num_invalid"])
    for turn in range(num_turns):
        point = read_lines(folder)[0][f"heldout/O_{turn + 1}"]
        assert point is None or f"<title>turn {turn + 1}, iteration 0: {point:.4g}</title>" in page.html
    assert all(kind.replace("_", " ") in page.text for kind in before["edit_types"])


def test_the_code_is_that_of_the_card(lora_run: Path, weights_run: Path, klein_run: Path) -> None:
    for folder, out, words in (
        (lora_run, "lora", ("FluxKontextPipeline", "pipe.load_lora_weights")),
        (weights_run, "weights", ("FluxKontextPipeline", 'subfolder="transformer"')),
        (klein_run, "lora", ("Flux2KleinPipeline", "pipe.load_lora_weights")),
    ):
        code = read_usage(folder / out, from_yaml(folder / "config.yaml").model.path)
        text = Page(folder / "report.html").text
        assert " ".join(code.split()) in text and all(word in text for word in (*words, str(folder / out)))


def test_charts_are_of_what_the_objective_gives(lora_run: Path, klein_run: Path) -> None:
    """GRPO has a ratio; nothing else has, and no page misses it."""
    ours, other = (Page(folder / "report.html") for folder in (lora_run, klein_run))
    num, others = (page.tags.count("svg") - page.html.count(">iterations done</text>") for page in (ours, other))
    assert num == 13 + len(KINDS) and others == 11 + len(KINDS)  # those of types of edits aside
    assert "Clip fraction" in ours.text and "Clip fraction" not in other.text


def test_it_needs_nothing_but_itself(lora_run: Path) -> None:
    page = Page(lora_run / "report.html")
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not any(word in page.html for word in ('="http', "url(", "@import"))
    prefix = "data:image/png;base64,"
    pictures = [base64.b64decode(reference.removeprefix(prefix)) for reference in page.references]
    assert pictures[:2] == [(lora_run / "strips" / f"iteration-00000{i}.png").read_bytes() for i in (0, 2)]
    judged = [
        *(lora_run / "judge" / f"compared-{n}-{when}.png" for n in range(4) for when in ("before", "after")),
        *sorted((lora_run / "judge").glob("training-*.png")),
        *sorted((lora_run / "judge").glob("*-000002-*.png")),
    ]
    assert judged and pictures[2:] == [path.read_bytes() for path in judged]
    assert "prefers-color-scheme: dark" in page.html and 'name="viewport"' in page.html


def test_a_killed_run_says_what_is_missing(weights_run: Path, tmp_path: Path) -> None:
    folder = copy_run(weights_run, tmp_path / "run", "config.yaml", "evaluation_before.json")
    first = (weights_run / "metrics.jsonl").read_text().splitlines()[0]
    (folder / "metrics.jsonl").write_text(f'{first}\n{{"iteration": 1, "re')  # torn
    text = Page(write_report(folder)).text
    assert "1 of 2 iterations" in text and "The run is not finished" in text
    for what in ("held-out sessions: after training, paired gain", "strips of images", "the exported weights"):
        assert f"Not there yet: {what}" in text
    assert "Held-out O by turn" in text and "Clip fraction" not in text  # K = 1 has its curve, NFT misses no ratio
    assert not (folder / ".report.html.new").exists()


def test_a_curve_that_never_comes_is_not_missed(lora_run: Path, tmp_path: Path) -> None:
    """Two iterations with an evaluation after each second one: the last is not a short one."""
    folder = copy_run(lora_run, tmp_path / "run", "config.yaml")
    line = json.dumps({"iteration": 0, "reward/mean": 0.5}) + "\n"
    (folder / "metrics.jsonl").write_text(line)
    assert "Held-out O by turn" in Page(write_report(folder)).text
    text = (folder / "config.yaml").read_text()
    for every in (0, 2):
        (folder / "config.yaml").write_text(text.replace("  every: 1\n", f"  every: {every}\n"))
        assert "Held-out O by turn" not in Page(write_report(folder)).text


def test_rewards_of_a_run_are_curves_and_others_are_not_missed(lora_run: Path, tmp_path: Path) -> None:
    """A user's function has its curve; a run without consistency is not told that it is not there yet."""
    folder = copy_run(lora_run, tmp_path / "run", "config.yaml", "metrics.jsonl")
    lines = [{k: v for k, v in line.items() if k != "reward/consistency"} for line in read_lines(folder)]
    text = "".join(json.dumps(line | {"reward/sharp_edges": 0.25}) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    page = Page(write_report(folder))
    assert "Further rewards" in page.text and "sharp edges" in page.text and "Consistency" not in page.text
    assert "Further rewards" not in Page(lora_run / "report.html").text


def test_a_config_that_cannot_be_had(lora_run: Path, tmp_path: Path) -> None:
    """The page says why, and shows the rest."""
    folder = copy_run(lora_run, tmp_path / "run", "metrics.jsonl")
    assert "What was run is not known: config.yaml is missing." in Page(write_report(folder)).text
    text = (lora_run / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("  height:", "  <hoehe>:"))
    page = Page(write_report(folder))
    assert "model.<hoehe> is no field" in page.text and "&lt;hoehe&gt;" in page.html and "2 iterations" in page.text
    (folder / "metrics.jsonl").write_text("")
    assert "0 iterations." in Page(write_report(folder)).text


def test_gain_is_coloured_only_where_the_interval_is_clear_of_0() -> None:
    for interval, css in (([3.5, 9.0], "good"), ([-4.0, -1.0], "bad"), ([-4.0, 1.0], ""), (None, "")):
        assert figure({"O_gain": 1.0, "O_gain_interval": interval}, "O_gain").css == css
    assert figure({"O": 1.0, "O_interval": [3.5, 9.0]}, "O").css == ""
    gain = figure({"O_gain": -1.25, "O_gain_interval": [-4.0, 1.0]}, "O_gain")
    assert str(gain) == "\N{MINUS SIGN}1.2 [\N{MINUS SIGN}4.0, +1.0]"
    assert str(figure({"O": None, "O_interval": None}, "O")) == str(figure({}, "O")) == "\N{EN DASH}"


def test_curve_passes_through_its_values(tmp_path: Path) -> None:
    """Two points of [0, 1] over iterations 0 to 1: corners of the plot; the gap at a missing value splits the path."""
    values = [0.0, 1.0, None, 1.0, 0.0]
    lines = [json.dumps({"iteration": i, "reward/consistency": value}) for i, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    html = write_report(tmp_path).read_text()
    assert '<path d="M54.0 196.0 L142.5 10.0 M319.5 10.0 L408.0 196.0"/>' in html


@pytest.mark.parametrize(("num_turns", "expected"), [(1, [1]), (6, [1, 2, 3, 4, 5, 6]), (10, [1, 5, 10])])
def test_held_out_curves(tmp_path: Path, num_turns: int, expected: list[int]) -> None:
    """Of every turn; of more turns than there are colours, of the first, the middle and the last."""
    line = {"iteration": 4, **{f"heldout/O_{turn}": 10.0 * turn for turn in range(1, num_turns + 1)}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    html = write_report(tmp_path).read_text()
    found = [turn for turn in range(1, 11) if f"<title>turn {turn}, iteration 4: {10 * turn}</title>" in html]
    assert found == expected


def test_a_long_run_stays_light(lora_run: Path, tmp_path: Path) -> None:
    line = read_lines(lora_run)[0]
    lines = "".join(json.dumps(line | {"iteration": n}) + "\n" for n in range(3000))
    (tmp_path / "metrics.jsonl").write_text(lines)
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
    def refused() -> str:
        with pytest.raises(SystemExit, match="2"):
            command([str(tmp_path)])
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "it has no metrics.jsonl" in refused()
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "evaluation_after.json").write_text("{")
    assert "evaluation_after.json is not JSON" in refused()
    (tmp_path / "evaluation_after.json").unlink()
    assert command([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"


def test_alarms_have_a_table(lora_run: Path, tmp_path: Path) -> None:
    """Drift passes its threshold, 0.12, at iteration 4: 0.1 + 3 / 128 is the first above it."""
    folder = copy_run(lora_run, tmp_path / "run", "config.yaml")
    lines = [{"iteration": i, "alarm/sharpness_drift": 0.1 + i / 128, "alarm/no_edit_share": 0.05} for i in range(40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = write_report(folder).read_text()
    assert html.count("since iteration 4<") == 1 and html.count("quiet") == 1


TIMES = {"time/denoise_s": 6.0, "time/score_s": 1.0, "time/forward_backward_s": 3.0, "time/evaluate_s": 0.0}
SPEEDS = {"speed/denoise_tflop_per_second": 500.0, "speed/denoise_ceiling_share": 0.625}


def test_the_account_of_a_run(tmp_path: Path) -> None:
    """Phases of two iterations add up to their mean; what a run lacks, such as a GPU's power, has no row."""
    lines = [TIMES | SPEEDS, TIMES | {"time/evaluate_s": 10.0, "speed/denoise_tflop_per_second": None}]
    write = (tmp_path / "metrics.jsonl").write_text
    write("".join(json.dumps({"iteration": i, **line}) + "\n" for i, line in enumerate(lines)))
    text = Page(write_report(tmp_path)).text
    assert "Mean of 2 iterations, first rank: the phases add up to 15 s." in text and "beside" not in text
    rows = "denoise 6 40.0 % 500 62 % score 1 6.7 % forward backward 3 20.0 % evaluate 5 33.3 %"
    assert rows in text and "turn-images" not in text and "power" not in text and "Power" not in text
    judged = {"beside/score_s": 7.5, "gpu/power_w": 650.0, "gpu/energy_kwh": 0.25, "gpu/throttled_by_power_share": 0.5}
    write("".join(json.dumps({"iteration": i, **line, **judged}) + "\n" for i, line in enumerate(lines)))
    text = Page(write_report(tmp_path)).text
    assert "what another thread did meanwhile stands beside them" in text and "score 1 7.5 6.7 %" in text
    assert "energy of the first GPU, kWh 0.5 power, W 650 clocks held down by the power limit, % of the time 50" in text
    assert "Power" in text and "bfloat16" not in text
    write(
        "".join(json.dumps({"iteration": i, **TIMES, **d}) + "\n" for i, d in enumerate(({"base/velocity": 0.033}, {})))
    )
    assert "error of the base against bfloat16: velocity, % 3.3" in Page(write_report(tmp_path)).text
    write(json.dumps({"iteration": 0, "reward/mean": 0.5}) + "\n")
    assert "Not there yet: seconds by phase." in Page(write_report(tmp_path)).text
