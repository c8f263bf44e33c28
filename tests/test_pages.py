"""What a page shows and in which order: O, then pictures; no interval of few sessions, no -0.0, a colour for each."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import Page
from PIL import Image

from mteditflow.evaluate.comparison_page import terminal_table, write_comparison
from mteditflow.evaluate.edival import Evaluation, compare, session_scores, success_by_type, summary
from mteditflow.record.figures import SHOWN, align_turns, figure, fixed, turns_of
from mteditflow.report.charts import Curve, chart, data_uri
from mteditflow.report.run_report import write_report
from mteditflow.report.seen import choose_changed, read_compared
from mteditflow.report.strips import draw_grid, draw_sessions, draw_tiles
from mteditflow.types import EditTask

NAN = math.nan


def evaluation(num: int, num_done: int, consistency: float = 0.8) -> Evaluation:
    verdict = (torch.arange(num) < num_done)[:, None].expand(num, 2).clone()
    return Evaluation(
        verdict=verdict, consistency=torch.full((num, 2), consistency), valid=torch.ones(num, dtype=torch.bool),
        edit_types=[("subject_add", "color_alter")] * num, images=torch.zeros(2, 1, 3, 4, 4), num_steps=3,
    )  # fmt: skip


def test_few_sessions_have_no_interval() -> None:
    """9 have none, 10 have one; of 10 sessions of which 9 have a consistency, O and CC have none."""
    for num, has_interval in ((4, False), (9, False), (10, True)):
        before, after = evaluation(num, num // 2), evaluation(num, num)
        (_, old, new, gain), _ = align_turns(summary(before), summary(after), compare(before, after))
        assert bool(figure(old, "O").interval) == bool(figure(gain, "MT_gain").interval) == has_interval
        assert str(figure(new, "MT")) == ("100.0 [100.0, 100.0]" if has_interval else "100.0")
        assert figure(gain, "O_gain").css == ("good" if has_interval else "")
    some = evaluation(10, 5)
    some.consistency[0] = NAN
    turn = turns_of(summary(some))[0]
    assert [bool(figure(turn, name).interval) for name in ("MT", "IF", "CC", "O")] == [True, True, False, False]
    assert figure({"O": 1.0, "O_interval": [0.5, 2.0]}, "O").interval == "[0.5, 2.0]"  # a file of before


def test_no_page_of_few_sessions_has_an_interval(lora_run: Path, tmp_path: Path) -> None:
    """A run of 4 held-out sessions: its page and card; and a comparison, with its table on the terminal."""
    number = r"\[[+\N{MINUS SIGN}]?[\d.]+, [+\N{MINUS SIGN}]?[\d.]+\]"
    text = Page(lora_run / "report.html").text
    assert "4 sessions, too few for intervals" in text and not re.search(number, text.split("Configuration")[0])
    assert not re.search(number, (lora_run / "lora" / "README.md").read_text().split("## Recipe")[0])
    for num, has_interval in ((4, False), (12, True)):
        both = {"one": evaluation(num, 2), "two": evaluation(num, 3)}
        about = {"settings": SETTINGS, "judge": "the judge", "what": "it", "commit": "abc"}
        reports: dict[str, dict[str, Any]] = {name: summary(it) | about for name, it in both.items()}
        gains = {"two": compare(both["one"], both["two"])}
        page = Page(write_comparison(tmp_path, reports, gains, []))
        assert bool(re.search(number, page.text)) == has_interval == ("band" in page.html.split("</style>")[1])
        cells = [cell for column in terminal_table(reports, gains).columns for cell in column.cells]
        assert any("[" in str(cell) for cell in cells) == has_interval


SETTINGS = {
    "model.path": "editor", "model.width": 64, "model.height": 64, "evaluation.num_steps": 2, "data.num_turns": 2,
}  # fmt: skip


def test_without_consistency_the_page_leads_with_if(tmp_path: Path) -> None:
    """O is then not defined: a dash would stand where the first figure is. Percent of nothing ends at 0."""
    about = {"settings": SETTINGS, "judge": "the judge", "what": "it", "commit": "abc"}
    for consistency, lead in ((NAN, "IF"), (0.8, "O")):
        both = {name: evaluation(12, num, consistency) for name, num in (("one", 0), ("two", 6))}
        reports = {name: summary(it) | about for name, it in both.items()}
        gains = {"two": compare(both["one"], both["two"])}
        text = Page(write_comparison(tmp_path, reports, gains, [])).text
        assert f"{lead} at turn 2, one" in text and f"{lead} at turn 2, two" in text and "\N{EN DASH} %" not in text
    flat = chart("MT", "", [Curve(name="a", points=[(1, 0.0), (2, 0.0)])], x_name="turn")
    assert flat is not None and flat["y_ticks"][0]["label"] == "0"


def test_nothing_is_minus_zero() -> None:
    assert fixed(-0.0004, 3) == "0.000" and fixed(-0.0005, 3) == "-0.001" and fixed(-0.0, 0) == "0"
    before, after = evaluation(40, 20, consistency=0.8), evaluation(40, 20, consistency=0.8 - 1e-6)
    assert "-0.0," not in json.dumps(compare(before, after)) and "-0.0]" not in json.dumps(compare(before, after))
    drawn = chart("title", "", [Curve(name="a", points=[(0, -0.0), (1, -0.3), (2, 0.2)])], x_name="x")
    assert drawn is not None
    assert [tick["label"] for tick in drawn["y_ticks"] if tick["label"].strip("\N{MINUS SIGN}") == "0"] == ["0"]
    assert drawn["curves"][0]["points"][0]["title"] == "a, x 0: 0"


def test_the_seventh_and_the_twelfth_have_a_look_of_their_own(tmp_path: Path) -> None:
    """Twelve subjects: ten colours, then dashes; each colour is defined for light and for dark."""
    about = {"settings": SETTINGS, "judge": "the judge", "what": "it", "commit": "abc"}
    reports = {f"subject {n}": summary(evaluation(12, n)) | about for n in range(12)}
    html = write_comparison(tmp_path, reports, {}, []).read_text()
    looks = set(re.findall(r'<th class="(c\d(?: again)?)">', html))
    assert len(looks) == 12 and {"c6", "c9", "c0 again", "c1 again"} <= looks
    for n in range(10):
        assert len(re.findall(rf"--c{n}: #", html)) == 2 and f".c{n} {{ color: var(--c{n}); }}" in html
    assert ".again path { stroke-dasharray" in html
    curves = [Curve(name=str(n), points=[(0, n), (1, n)]) for n in range(12)]
    assert len((chart("all", "", curves, x_name="x") or {})["curves"]) == 12


def test_the_order_of_a_run(lora_run: Path) -> None:
    """What O is, before any figure of it; the pictures, then tables, in which O is first."""
    text = Page(lora_run / "report.html").text
    places = [text.index(words) for words in (
        "O, in percent, is how well", "O at turn 2, before", "The same sessions, before and after",
        "Held-out sessions, before and after", "Curves", "Success by type of edit",
    )]  # fmt: skip
    assert places == sorted(places)
    table = text[places[3] : places[4]]
    assert re.findall(r" (O|IF|CC|MT) 1 ", table) == list(SHOWN) == ["O", "IF", "CC", "MT"]


def test_worst_and_most_changed() -> None:
    """Of six sessions: 3 is worst after, 0 gained most, 4 lost most; then 5 is next worst, 1 gained less."""
    before = torch.tensor([0.0, 0.25, 0.5, 0.0, 1.0, 0.25])
    after = torch.tensor([1.0, 0.75, 0.5, 0.0, 0.5, 0.25])
    wanted = {3: "worst after training", 0: "gained most", 4: "lost most", 5: "worst after training", 1: "gained most"}
    for num in range(7):
        chosen = choose_changed(before, after, num)
        assert list(chosen.items()) == [*wanted.items(), (2, "worst after training")][:num]
    unscored = choose_changed(before, torch.full((6,), NAN), 4)
    assert unscored == {}
    assert list(choose_changed(torch.zeros(3), torch.zeros(3), 2)) == [0, 1]  # nothing changed: the worst


def test_scores_of_sessions() -> None:
    found = evaluation(3, 2)
    found.consistency[0, 1] = NAN
    found.valid[1] = False
    assert session_scores(found)[[0, 2]].tolist() == pytest.approx([(0.8 + 1) / 2, 0.0])
    assert session_scores(found)[1].isnan()
    assert success_by_type(found)["subject_add"] == {"success": 0.5, "count": 2}


def test_a_run_keeps_them_as_they_were_before_and_after(lora_run: Path) -> None:
    """Of its 4 held-out sessions, all: with pictures, a tick or a cross and a score under each."""
    sessions = read_compared(lora_run)
    assert {session["after"]["task"] for session in sessions} == {0, 1, 2, 3}
    assert all(session["before"]["task"] == session["after"]["task"] for session in sessions)
    assert all(len(session[when]["turns"]) == 2 for session in sessions for when in ("before", "after"))
    text = Page(lora_run / "report.html").text
    part = text.split("The worst, and those that training changed most")[1].split("Held-out sessions, before")[0]
    assert part.count("before training") == part.count("worst after training") + part.count("gained most") + part.count(
        "lost most"
    )
    assert len(re.findall(r"[✓✗] [01]\.\d\d", part)) == 2 * 2 * len(sessions)
    names = {path.name for path in (lora_run / "judge").glob("compared-*.png")}
    assert names == {f"compared-{n}-{when}.png" for n in range(4) for when in ("before", "after")}


def test_a_strip_says_what_was_carried_out() -> None:
    """A green tick before the instruction, or a red cross; nothing where the session could not be scored."""
    task = EditTask(id=0, source=torch.zeros(3, 64, 64), instructions=("x", "x"), edit_types=("", ""))
    found = evaluation(2, 1)
    found.valid[1] = True
    colours = []
    for n, valid in ((0, True), (1, True), (1, False)):
        found.valid[n] = valid
        images = torch.zeros(2, 2, 3, 64, 64)
        shown = Evaluation(**{**vars(found), "images": images})
        picture = draw_sessions([task, task], {"editor": shown}, [n])
        pixels = {picture.getpixel((x, y)) for x in range(148, 163) for y in range(140, picture.height)}
        colours.append(((24, 121, 78) in pixels, (192, 51, 43) in pixels))
    assert colours == [(True, False), (False, True), (False, False)]


@pytest.mark.parametrize(
    ("width", "tile"), [(4, 8), (64, 128), (128, 256), (200, 200), (512, 256), (768, 384), (2048, 512)]
)
def test_a_tile_is_as_large_as_its_picture_needs(width: int, tile: int) -> None:
    height = max(width // 2, 2)
    drawn = draw_tiles([torch.zeros(3, height, width)] * 2)
    assert drawn.width == 10 + 2 * (tile + 10) and drawn.height == pytest.approx(20 + tile * height / width, abs=1)
    assert draw_grid([[torch.zeros(3, 8, 8)]], [[""]], scale=2).size == (36, 36)


def test_heavy_pictures_are_made_light() -> None:
    """Noise of 800 x 800 pixels: about 2 MB of PNG, less as WebP; a small picture stays to the bit."""
    noise = torch.randint(0, 256, (800, 800, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(noise.numpy())
    from mteditflow.pictures import png_bytes

    heavy, light = png_bytes(picture), png_bytes(picture.resize((40, 40)))
    assert data_uri(light).startswith("data:image/png;base64,")
    assert data_uri(heavy).startswith("data:image/webp;base64,") and len(data_uri(heavy)) < 4 / 3 * len(heavy) * 0.7


def test_types_of_edits_over_the_iterations(lora_run: Path, tmp_path: Path) -> None:
    """Before, after 5 and 10 iterations, and after: a chart for each type; what a run does not have, has none."""
    write = (tmp_path / "metrics.jsonl").write_text
    values = {4: {"color_alter": 25.0, "subject_add": 50.0}, 9: {"color_alter": 75.0}}
    lines = [
        {"iteration": n} | {f"heldout/success_{kind}": value for kind, value in values.get(n, {}).items()}
        for n in range(12)
    ]
    write("".join(json.dumps(line) + "\n" for line in lines))
    for name, success in (("before", 0.125), ("after", 0.875)):
        report = {"edit_types": {"color_alter": {"success": success, "count": 8}}, "turns": []}
        (tmp_path / f"evaluation_{name}.json").write_text(json.dumps(report))
    page = Page(write_report(tmp_path))
    titles = re.findall(r"<title>(\w+), iterations done (\d+): ([\d.]+)</title>", page.html)
    assert titles == [
        ("color_alter", "0", "12.5"), ("color_alter", "5", "25"), ("color_alter", "10", "75"),
        ("color_alter", "12", "87.5"), ("subject_add", "5", "50"),
    ]  # fmt: skip
    assert "Percent of 8 edits before and after." in page.text
    recorded = json.loads((lora_run / "metrics.jsonl").read_text().splitlines()[0])
    kinds = set(json.loads((lora_run / "evaluation_before.json").read_text())["edit_types"])
    assert {name.removeprefix("heldout/success_") for name in recorded if "heldout/success_" in name} <= kinds
    write(json.dumps({"iteration": 0}) + "\n")
    assert "Over the iterations" not in Page(write_report(tmp_path)).text
