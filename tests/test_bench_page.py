"""`gradmill bench` and the page that it writes."""
import html.parser
import importlib.util
import json
import os
import re
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
    assert bench("--from", str(tmp_path / "a.json"), "--html", str(tmp_path / "b.html")).returncode == 0
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
    assert tree.count("figure", "ratios") == len({r["family"] for r in data["results"]})
    for r in data["results"]:
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
    for said in ("<script>alert(1)</script> & co", "a <b> note", "20000x faster", "1000x slower", "tie (1.01x)", "absent: not run, <absent> is not installed",
                 "30% of the processors", "stopped before its end", "gradmill: not run, broken", "125% of copy"):
        assert said in tree.said, said
    assert [tree.count("rect", kind) for kind in ("good", "bad", "even")] == [2, 1, 1]
    data["results"] = []
    checked(page(data))
