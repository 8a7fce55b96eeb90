"""The report of a run: what its files hold is there, nothing in them can run, and a browser shows each chart."""

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from launch.common.errors import UserError
from launch.reporting import page as page_module
from launch.reporting.about import write_about
from launch.reporting.read import read_run
from launch.reporting.write import report_at_the_end, write_report
from tests.support.data import prepared
from tests.support.tokenizers import byte_level

CHROMIUM = shutil.which("chromium")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)></pre></svg>{{ 7*7 }} \u202egnp.exe"
STEPS = range(2, 41, 2)
BINS = {"confidence": [0.2, 0.5, 0.9], "accuracy": [0.3, 0.5, 0.8], "tokens": [10, 10, 10]}
FIGURES = {"nll": 1.5, "ece_equal_mass": 0.07, "confidence_minus_accuracy": 0.05, "reliability": BINS}


def made(folder: Path, smoothing: float = 0.1) -> Path:
    """Write the directory of a run whose texts are hostile."""
    folder.mkdir()
    source = folder.parent / "rows.jsonl"
    rows = [{"prompt": f"{HOSTILE} {i}\n", "completion": f" {i} {HOSTILE}"} for i in range(20)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_level("<|im_end|>")
    write_about(folder, prepared(str(source), tokenizer), tokenizer, seed=0)
    recipe = {"model": HOSTILE, "smoothing": smoothing, "data": [str(source)]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    metrics = [
        {"step": s, "loss": 9 / s, "nll": 8 / s, "tokens_per_second": 9e3, "peak_memory_gib": 1} for s in STEPS
    ]
    calibration = {f"eval_{key}": value for key, value in FIGURES.items()}
    metrics += [{"step": s, "eval_accuracy": 0.4, "eval_confidence": 0.45} | calibration for s in (0, 20, 40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics) + '{"step": 42, "lo')
    sample = {"where": "a:1", "prompt": HOSTILE, "completion": "yes", "wanted": "no"}
    sample["tokens"] = [[" y", 0.917], ["es\n", 0.204], [HOSTILE, 1.0]]
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    dropped = [f"a.jsonl:{i}: broken JSON (Expecting {HOSTILE}, column {i})\n" for i in range(30)]
    (folder / "dropped.txt").write_text("".join(dropped) + "b.jsonl:7: prompt shortened\n")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("reported")
    return [made(folder / "plain", 0.0), made(folder / "smoothed", 0.1)]


@pytest.fixture(scope="module")
def pages(runs, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    write_report(runs[:1], folder / "one.html")
    write_report(runs, folder / "two.html")
    return {"one": folder / "one.html", "two": folder / "two.html"}


class Elements(HTMLParser):
    """The elements of a page, and the text outside of its style."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.found)


@pytest.mark.parametrize("name", ["one", "two"])
def test_nothing_in_a_page_runs_or_is_loaded(pages, name):
    text = pages[name].read_text()
    page = Elements(text)
    assert not {tag for tag, _ in page.found} & {"script", "img", "link", "iframe", "object"}
    attributes = [(key, value) for _, attrs in page.found for key, value in attrs.items()]
    assert not [key for key, _ in attributes if key.startswith("on")]
    assert all(value.startswith("#") for key, value in attributes if key in ("href", "xlink:href", "src"))
    assert "@import" not in text and "default-src 'none'" in text
    assert "\u202e" not in text


@pytest.mark.parametrize("name", ["one", "two"])
def test_each_id_is_one_elements_and_each_reference_leads_to_one(pages, name):
    text = pages[name].read_text()
    ids = [attrs["id"] for _, attrs in Elements(text).found if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_what_the_files_hold_is_told(pages):
    page = Elements(pages["one"].read_text())
    text = " ".join(page.text.split())
    titles = ["Loss and nll", "Held-out nll", "Confidence minus accuracy", "ECE", "Throughput", "Peak memory"]
    assert all(title in text for title in [*titles, "before training", "after training"])
    assert page.count("figure") == page.count("svg") == 9
    assert page.count("ruby") == 3 and all(number in text for number in ("92", "20", "100"))
    levels = [attrs["class"] for tag, attrs in page.found if tag == "ruby"]
    assert levels == ["p0", "p4", "p0"]
    assert "broken JSON30" in page.text.replace("\n", "") and "and 18 more in dropped.txt" in text
    assert "prompt shortened1" in page.text.replace("\n", "")
    assert "overconfident by 0.050" in text and "held-out nll, last1.5000" in text
    assert page.count("mark") >= 4 and "transformers" in text


def test_several_runs_stand_side_by_side(pages):
    page = Elements(pages["two"].read_text())
    text = " ".join(page.text.split())
    assert "Settings that differ plainsmoothed smoothing0.00.1" in text and "Unsmoothed nll" in text
    assert "plain: after training" in text and "smoothed: after training" in text
    assert page.count("svg") == page.count("figure") == 12


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    shutil.copytree(runs[1], tmp_path / "plain")
    write_report([runs[0], tmp_path / "plain"], tmp_path / "report.html")
    text = Elements((tmp_path / "report.html").read_text()).text
    assert f"{runs[0].parent.name}/plain{tmp_path.name}/plain" in text  # heads of a table


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "recipe.yaml").write_text("smoothing: 0.1\n")
    write_report([tmp_path], tmp_path / "report.html")
    text = Elements((tmp_path / "report.html").read_text()).text
    assert "No charts: no step was logged." in text and "smoothing" in text


def test_without_matplotlib_the_page_says_so(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = page_module.page([read_run(runs[0])])
    assert "No charts: they need matplotlib" in text and "<ruby" in text


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not the directory of a run: it has no recipe"):
        write_report([tmp_path], tmp_path / "report.html")


@pytest.mark.parametrize("broken", ["samples.jsonl", "about.json", "report.html"])
def test_a_report_that_fails_is_a_sentence(runs, tmp_path, broken, capsys):
    run = shutil.copytree(runs[0], tmp_path / "run")
    (run / broken).unlink(missing_ok=True)
    (run / broken).mkdir()
    report_at_the_end(run)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("no report was written: ") and "launch/report.py" in said


MEASURE = """<!doctype html><body><script>
const seen = [], pages = %s
const look = (frame, name, width) => {
  const page = frame.contentDocument, root = page.documentElement
  const boxes = [...page.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect())
  seen.push({name, width, scroll: root.scrollWidth, charts: boxes.map(box => [box.left, box.right, box.height]),
             drawn: [...page.querySelectorAll("figure svg")].map(svg => svg.getBBox().width)})
  document.title = JSON.stringify(seen)
}
for (const name of pages) for (const width of [390, 1280]) {
  const frame = document.createElement("iframe")
  frame.style = `width:${width}px;height:900px;border:0`
  frame.onload = () => look(frame, name, width)
  frame.src = name
  document.body.append(frame)
}
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_each_chart_on_a_phone_and_on_a_desk(pages, tmp_path):
    folder = pages["one"].parent
    (folder / "look.html").write_text(MEASURE % json.dumps([path.name for path in pages.values()]))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
    ]
    flags += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--window-size=1400,4000", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, f"file://{folder / 'look.html'}"], capture_output=True, text=True, timeout=300
    )
    assert "CONSOLE" not in done.stderr, done.stderr[-3000:]
    seen = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    assert {(page["name"], page["width"]) for page in seen} == {
        (p.name, w) for p in pages.values() for w in (390, 1280)
    }
    for page in seen:
        assert page["scroll"] <= page["width"], page
        assert len(page["charts"]) == (9 if page["name"] == "one.html" else 12)
        assert all(0 <= left < right <= page["width"] and height > 100 for left, right, height in page["charts"])
        assert min(page["drawn"]) > 100
