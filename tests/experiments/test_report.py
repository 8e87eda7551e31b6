"""The page parsed back: one file, nothing loaded from elsewhere, headers on every table; resuming; reasons."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from helpers import TINY, image_folder
from pdae_fast import cli
from pdae_fast.experiments import report as reports
from pdae_fast.experiments.report import Result
from pdae_fast.experiments.report_experiments import EXPERIMENTS, Experiment, choose

CONFIG = TINY

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Everything a test asks about: pictures, tables, addresses, ids, text."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.images, self.tables, self.addresses = [], [], [], []
        self.ids, self.words, self.styles = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.addresses += [
            (tag, values[k]) for k in ("src", "href", "srcset", "action", "data", "poster") if k in values
        ]
        if "style" in values:
            self.styles.append(values["style"])
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "img":
            self.images.append(values)
        elif tag == "table":
            self.tables.append(
                {"columns": 0, "rows": [], "scrolls": "scroll" in (self.stack[-1][1].get("class") or "")}
            )
        elif tag == "tr" and self.inside("tbody"):
            self.tables[-1]["rows"].append(0)
        elif tag == "th" and self.inside("thead"):
            assert values["scope"] == "col"
            self.tables[-1]["columns"] += 1
        elif tag in ("td", "th"):
            self.tables[-1]["rows"][-1] += 1
        if tag not in VOID:
            self.stack.append((tag, values))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        (self.styles if self.inside("style") else self.words).append(data)

    def inside(self, tag):
        return any(name == tag for name, _ in self.stack)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def check(path):
    """What every page must be; returns it parsed."""
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert page.stack == [] and "<script" not in source
    for tag, address in page.addresses:
        assert address.startswith(("data:", "#")), (tag, address[:80])
    assert page.styles and not any(re.search(r"url\(|@import|//", style) for style in page.styles)
    assert {a[1:] for _, a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    for image in page.images:
        kind, _, content = image["src"].partition(",")
        assert kind == "data:image/png;base64" and image["alt"]
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            assert picture.size == (int(image["width"]), int(image["height"]))
    for table in page.tables:
        assert table["columns"] and table["scrolls"]
        assert all(cells == table["columns"] for cells in table["rows"]), table
    return page


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (70, 40), 128).save(path)


def test_a_page_of_everything(tmp_path):
    results = []
    for experiment in EXPERIMENTS:
        folder = tmp_path / experiment.name
        for name in experiment.pictures:
            picture(folder / name)
        values = {
            "rows": [{"name": "<b>", "x": 0.25, "deep": {"y": -1e-9}}],
            "pairs": {"rows": [{"name": "p", "mse": 1}]},
            "ranges": [{"from": 0, "to": 99}],
            "features": [{"name": "z", "accuracy": {"value": 0.5}}],
        }
        (folder / "metrics.json").write_text(json.dumps(values))
        for name in experiment.tables:
            if name.endswith(".csv"):
                lines = "".join(f"{i},{i / 3},,a b\n" for i in range(20))
                (folder / name).write_text("t,with_long_name,empty,word\n" + lines)
        results.append(Result(experiment, f"python -m pdae_fast.{experiment.module}", "done", "", "a < b & c", 1.5))
    skipped = Experiment("other", "Other", "About.", "other")
    results.append(Result(skipped, "python -m pdae_fast.other", "skipped", 'needs <a href="http://x">'))
    found = reports.sections(results, tmp_path)
    reports.write_page(tmp_path / "page.html", "A <title>", {"model": "m", "command": "python -m x"}, found)
    page = check(tmp_path / "page.html")
    assert len(page.images) == sum(len(e.pictures) for e in EXPERIMENTS) > 15
    assert len(page.tables) == 2 + sum(len(e.tables) for e in EXPERIMENTS)
    assert "A <title>" in page.text and 'needs <a href="http://x">' in page.text and "a < b & c" in page.text
    assert f"{len(EXPERIMENTS)} of {len(EXPERIMENTS) + 1} experiments" in page.text
    assert "deep y" in page.text and "\u22121e\u221209" in page.text and "with long name" in page.text
    assert "empty" not in page.text  # a column without a value


def test_tables_and_cells():
    rows = [{"t": 1, "value": 0.123456, "note": None, "ok": True}, {"t": 2, "value": "1e-7", "more": "x"}]
    table = reports.make_table("title", rows)
    assert table.header == ["t", "value", "ok", "more"]
    assert table.rows == [["1", "0.1235", "yes", ""], ["2", "1e\u221207", "", "x"]]
    assert table.numeric == [True, True, False, False] and not table.folded
    long = reports.make_table("long", [{"t": i} for i in range(400)])
    assert long.folded and len(long.rows) == 300 and long.left_out == 100
    assert reports.flatten({"a": {"b_c": 1, "d": {"e": 2}}, "f": [1], "g": "h"}) == {"a b c": 1, "a d e": 2, "g": "h"}


def test_what_can_be_chosen():
    names = [e.name for e in EXPERIMENTS]
    assert len(set(names)) == len(names)
    assert [e.name for e in choose(None)] == [n for n in names if n != "pareto"]
    assert [e.name for e in choose(["pareto", "gap"])] == ["gap", "pareto"]
    with pytest.raises(cli.UserError, match="no experiment 'gaps'; there are evaluate, "):
        choose(["gaps"])


# -- the command ---------------------------------------------------------------------------------------------------


def command(model_dir, folder, out, *more):
    arguments = ["--model", model_dir, "--input", folder, "--out", out, "--device", "cpu", *more]
    return cli.run(reports.main, [str(a) for a in arguments])


def test_report_runs_skips_and_resumes(model_dir, tmp_path, capsys):
    folder, out = image_folder(tmp_path / "in", 3), tmp_path / "out"
    chosen = ("--quick", "--only", "gap", "sample")
    assert command(model_dir, folder, out, *chosen) == 0
    printed = capsys.readouterr().out
    assert "needs a latent DPM" in printed and "found finished" not in printed
    page = check(out / "index.html")
    assert len(page.images) == 1 and "1 of 2 experiments" in page.text
    assert "--times 12 --model" in page.text and "skipped: sample needs a latent DPM" in page.text
    for word in ("M parameters, images 1 x 32 x 32, z of 16", "3 images", "cpu", "--quick --only gap sample"):
        assert word in page.text, word
    # The user's own options win over those of a quick report, and only a change of what is done runs it again.
    state = out / "gap" / reports.STATE
    assert json.loads((out / "gap" / "metrics.json").read_text())["images"] == 3
    stamp = state.stat().st_mtime_ns
    moved = tmp_path / "moved"
    out.rename(moved)
    assert command(model_dir, folder, moved, *chosen) == 0
    assert (moved / "gap" / reports.STATE).stat().st_mtime_ns == stamp
    assert "found finished" in capsys.readouterr().out
    assert command(model_dir, folder, moved, "--quick", "--only", "gap", "--limit", 2, "--quiet") == 0
    assert json.loads((moved / "gap" / "metrics.json").read_text())["images"] == 2
    assert (moved / "gap" / reports.STATE).stat().st_mtime_ns != stamp
    assert capsys.readouterr().out == ""


def test_a_crash_is_shown_and_the_rest_goes_on(model_dir, tmp_path, monkeypatch, capsys):
    broken = Experiment("broken", "Broken", "About.", "crashes")
    absent = Experiment("absent", "Absent", "About.", "nowhere")
    fine = Experiment("fine", "Fine", "About.", "prints")
    monkeypatch.setattr(reports, "choose", lambda names: [broken, absent, fine])
    done = {"crashes": (1, "", "Traceback\nZeroDivisionError: division by zero\n"), "prints": (0, "all well", "")}

    def start(argv, **options):
        code, out, err = done[argv[2].removeprefix("pdae_fast.")]
        (tmp_path / "out" / "fine").mkdir(parents=True, exist_ok=True)
        return reports.subprocess.CompletedProcess(argv, code, out, err)

    real = reports.importlib.util.find_spec
    monkeypatch.setattr(
        reports.importlib.util, "find_spec", lambda n: None if "nowhere" in n else real("pdae_fast.cli")
    )
    monkeypatch.setattr(reports.subprocess, "run", start)
    assert command(model_dir, image_folder(tmp_path / "in", 2), tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "broken (ZeroDivisionError: division by zero)" in captured.err and captured.err.count("error:") == 1
    page = check(tmp_path / "out" / "index.html")
    assert "failed: ZeroDivisionError: division by zero" in page.text
    assert "skipped: this version has no pdae_fast.nowhere" in page.text and "all well" in page.text


def test_an_interrupted_experiment_interrupts_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(
        reports.subprocess, "run", lambda argv, **o: reports.subprocess.CompletedProcess(argv, 130, "", "")
    )
    with pytest.raises(KeyboardInterrupt):
        reports.run(EXPERIMENTS[0], [], tmp_path, {}, False, False)


@pytest.mark.parametrize(
    "more, line",
    [
        (["--only", "gaps"], "--only: no experiment 'gaps'; there are evaluate"),
        (["--limit", 0], "--limit must be at least 1"),
        (["--dtype", "int8"], "int8"),
        (["--input", "nothing"], "no such input: nothing"),
        (["--model", "nothing"], "nothing"),
    ],
)
def test_mistakes_are_one_line(more, line, model_dir, tmp_path, capsys):
    assert command(model_dir, image_folder(tmp_path / "in", 2), tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
