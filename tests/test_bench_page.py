"""`gradmill bench` and the page that it writes."""
import html.parser
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VOID = {"meta"}


class Tree(html.parser.HTMLParser):
    """Start tags as (name, attributes), with a check that all close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.said = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said += data

    def count(self, tag, kind=None):
        return sum(t == tag and (kind is None or kind in a.get("class", "").split()) for t, a in self.tags)


def checked(text) -> Tree:
    """The page is whole, has no script and nothing to fetch, and every drawn number is one."""
    tree = Tree(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<img|<iframe|javascript:", text, re.I)
    assert not any(name in ("src", "href", "srcset", "xlink:href") or name.startswith("on") for _, attributes in tree.tags for name in attributes)
    assert "nan" not in re.sub(r"\w*nan\w+|\w+nan\w*", "", text) and "inf%" not in text
    for tag, attributes in tree.tags:
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width"):
            if tag in ("line", "rect", "circle") and name in attributes:
                assert -0.01 <= float(attributes[name].rstrip("%")) <= 100.01, (tag, attributes)
    assert "prefers-color-scheme: dark" in text and "max-width: 40rem" in text and 'name="viewport"' in text
    return tree


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("bench_run_under_test", ROOT / "bench" / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    run.package()
    return importlib.import_module("gradmill_bench.page").page


def bench(*arguments):
    return subprocess.run([sys.executable, "-m", "gradmill", "bench", *arguments], capture_output=True, text=True, timeout=240,
                          env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8"})


def test_the_command_measures_and_writes_the_page(tmp_path):
    result = bench("quant", "--tiny", "--no-peers", "--case", "quantize_int8", "--threads", "1", "--json", str(tmp_path / "a.json"),
                   "--html", str(tmp_path / "a.html"))
    assert result.returncode == 0, result.stderr
    data, text = json.loads((tmp_path / "a.json").read_text()), (tmp_path / "a.html").read_text()
    tree = checked(text)
    others = sum(e["kind"] != "ours" and "not_run" not in e for r in data["results"] for e in r["entries"])
    assert others and tree.count("rect", "good") + tree.count("rect", "bad") + tree.count("rect", "even") == others + len(data["results"])
    assert [tree.count("figure", kind) for kind in ("limits", "roofline", "ratios")] == [1, 1, 1]
    assert tree.count("circle", "point") == len(data["results"]) and tree.count("line", "limit") >= 2
    assert "--tiny" in tree.said and data["machine"]["command"].startswith("python bench/run.py quant")
    assert bench("--from", str(tmp_path / "a.json"), "--html", str(tmp_path / "b.html"), "--png", str(tmp_path / "b.png")).returncode == 0
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "b.html").read_text() == text


def test_the_command_passes_on_help_and_errors(tmp_path):
    shown = bench("--help")
    assert shown.returncode == 0 and "--html" in shown.stdout and "FAMILY" in shown.stdout
    assert bench("no_such_family").returncode == 2
    (tmp_path / "a.json").write_text("[]")
    for name in ("a.json", "b.json"):
        refused = bench("--from", str(tmp_path / name))
        assert refused.returncode == 2 and name in refused.stderr and not (tmp_path / name).with_suffix(".html").exists()


@pytest.mark.parametrize("name", ["cpu-zen4-2core", "cpu-zen4-2core-avx2"])
def test_pages_of_the_committed_results(page, name):
    data = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
    tree = checked(page(data))
    jobs, points = [r for r in data["results"] if not r.get("point")], [r for r in data["results"] if r.get("point")]
    assert tree.count("figure", "ratios") == len({r["family"] for r in jobs}) and tree.count("figure", "curves") == len({tuple(r["point"][:2]) for r in points})
    for r in jobs:
        assert r["title"] in tree.said
        assert all(e["label"] in tree.said and e.get("not_run", "") in tree.said for e in r["entries"] if e["kind"] != "ours")


def test_hostile_text_ties_losses_and_what_did_not_run(page):
    data = json.loads((ROOT / "bench" / "results" / "cpu-zen4-2core.json").read_text())
    one = data["results"][0]
    ours = {"kind": "ours", "label": "gradmill", "median_s": 1e-3, "q25_s": 1e-3, "q75_s": 1e-3, "of_limit": 1.25, "tie": False, "ratio": None}

    def other(label, ratio, tie=False):
        return {**ours, "kind": "peer", "label": label, "of_limit": None, "tie": tie, "ratio": dict(zip(("median", "q25", "q75"), ratio))}
    one.update(title="<script>alert(1)</script> & co", others_cpu=0.3, notes=["a <b> note"], entries=[
        ours, other("won", (2e4, 1e4, 3e4)), other("lost", (1e-3, 1e-3, 1e-3)), other("even", (1.01, 0.9, 1.2), True),
        {"kind": "peer", "label": "absent", "not_run": "<absent> is not installed"}])
    data["results"] = [one, {**one, "case": "failed", "title": "ours failed", "entries": [{"kind": "ours", "label": "gradmill", "not_run": "broken"}]}]
    data["settings"].update(complete=False)
    tree = checked(page(data))
    for said in ("<script>alert(1)</script> & co", "a <b> note", "gradmill 20000x faster", "gradmill 1000x slower", "tie (1.01x)", "absent: not run, <absent> is not installed",
                 "30% of the processors", "stopped before its end", "gradmill: not run, broken", "125% of copy"):
        assert said in tree.said, said
    assert [tree.count("rect", kind) for kind in ("good", "bad", "even")] == [2, 1, 1]
    one["notes"] = ["a sentence", "rule   fp32   int8", "SGD    0.49   0.44", "another 1024->1024"]
    text = page(data)
    assert "<p>a sentence</p>" in text and "<pre>rule   fp32   int8\nSGD    0.49   0.44</pre>" in text, "a table keeps its columns"
    data["results"] = []
    checked(page(data))


# --- in a browser -----------------------------------------------------------------------------------------
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

#: The page in a frame of a chosen width (a headless window has a least one), and what the browser made of it.
FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0"><iframe style="border:0;width:%dpx;height:%dpx" srcdoc="%s"></iframe><pre id="seen"></pre><script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument, box = e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  const figures = [...page.querySelectorAll("figure")].map(f => ({kind: f.className, box: box(f),
    svgs: [...f.querySelectorAll("svg")].map(s => ({box: box(s), shapes: [...s.querySelectorAll("rect, line, circle")].map(e => [e.tagName, ...box(e)]), text: [...s.querySelectorAll("text")].map(t => [t.getAttribute("class") || "", ...box(t)])}))}));
  document.getElementById("seen").textContent = JSON.stringify({figures, width: page.documentElement.scrollWidth, paper: getComputedStyle(page.body).backgroundColor});
});
</script>"""


def browsed(text, folder, width, dark=False, height=3000, picture=None):
    """What a browser makes of a page at a width: its figures' boxes; the console must stay clean."""
    file = folder / "frame.html"
    file.write_text(FRAME % (width, height, html.escape(text)), encoding="utf-8")
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
                           f"--window-size={max(width, 500)},{height}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                           f"--screenshot={picture}" if picture else "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return None if picture else json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)[1]))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width, dark", [(1100, False), (1100, True), (360, False)])
def test_every_figure_draws_in_a_browser(page, tmp_path, width, dark):
    text = page(everything())
    seen = browsed(text, tmp_path, width, dark)
    assert {f["kind"] for f in seen["figures"]} == {"limits", "roofline", "ratios", "curves", "memory"}
    assert seen["width"] <= width, "nothing makes the page scroll sideways"
    assert (seen["paper"] == "rgb(26, 26, 25)") == dark
    assert sum(not figure["svgs"] for figure in seen["figures"]) == 1, "the series of which nothing ran"
    for figure in seen["figures"]:
        left, top, right, bottom = figure["box"]
        assert 0 <= left < right <= width and top < bottom, figure["kind"]
        for svg in figure["svgs"]:
            (x0, y0, x1, y1), shapes = svg["box"], svg["shapes"]
            assert x1 - x0 > 15 and y1 - y0 > 5 and shapes, figure["kind"]
            assert any(tag != "line" or (r - l) + (b - t) > 3 for tag, l, t, r, b in shapes), "something is drawn"
            for tag, l, t, r, b in shapes:
                assert x0 - 8 <= l <= r <= x1 + 8 and y0 - 8 <= t <= b <= y1 + 8, (figure["kind"], tag)
            assert all(l >= -1 and r <= width + 1 for _, l, _, r, _ in svg["text"]), "every label is on the page"
            numbers = [box for kind, *box in svg["text"] if kind.startswith("number") and box[2] > box[0]]
            assert not [(a, b) for a, b in itertools.combinations(numbers, 2) if a[2] - 1 > b[0] and b[2] - 1 > a[0] and a[3] - 5 > b[1] and b[3] - 5 > a[1]], "digits are lower than a line's box"
            assert figure["kind"] != "roofline" or len(numbers) >= 0.5 * sum(tag == "circle" for tag, *_ in shapes)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_script_error_would_be_seen(tmp_path):
    with pytest.raises(AssertionError, match="CONSOLE"):
        browsed("<body><script>nothing.here()</script></body>", tmp_path, 600)


def everything():
    """A run's data with every kind of figure: committed results, points of a scaling plot, memory."""
    data = json.loads((ROOT / "bench" / "results" / "cpu-zen4-2core.json").read_text())
    data["results"] = [r for r in data["results"] if r["family"] not in ("scaling", "training")]
    for e in (e for r in data["results"] for e in r["entries"]):
        e.pop("facts", None)  # the figures of memory are of what follows alone
    one = data["results"][0]

    def entry(kind, label, seconds, facts):
        return {"kind": kind, "label": label, "median_s": seconds, "q25_s": seconds, "q75_s": seconds, "of_limit": None, "tie": False, "facts": facts,
                "ratio": None if kind == "ours" else {"median": 1.5, "q25": 1.4, "q75": 1.7}}
    points = [{**one, "family": "scaling", "case": f"p{n}", "title": f"a step, parameters {n}", "point": ["a step", "parameters", n], "entries": [
        entry("ours", "gradmill", 1e-6 * n ** 0.9, {}), entry("torch", "torch", 3e-5 + 2e-6 * n, {}), entry("peer", "another <peer>", 1e-3 + 1e-7 * n, {}),
        {"kind": "peer", "label": "absent", "not_run": "not installed"}]} for n in (1 << 10, 1 << 16, 1 << 25)]
    alone = {**points[0], "case": "alone", "point": ["alone", "threads", 2]}
    nothing = {**points[0], "case": "nothing", "point": ["nothing ran", "batch", 3], "entries": points[0]["entries"][-1:]}
    training = {**one, "family": "training", "case": "t", "title": "train a model", "per_call": [1024, "tokens"], "entries": [
        entry("ours", "gradmill", 0.05, {"peak memory bytes": 5e7, "loss after 20 steps": 2.25}), entry("torch", "torch", 0.06, {"peak memory bytes": 9e7})]}
    data["results"] += [*points, alone, nothing, training]
    return data


def test_scaling_and_memory(page):
    tree = checked(page(everything()))
    assert [tree.count("figure", kind) for kind in ("curves", "memory")] == [3, 1]
    assert tree.count("circle", "p0") == 4 and tree.count("line", "l0") == 2 + 2   # points, pieces and keys of gradmill's lines
    for said in ("32M", "64k", "another <peer>", "nothing ran", "50 MB", "20.5 k", "tokens/s", "2.25", "peak memory"):
        assert said in tree.said, said
