"""`gradmill bench` and the page that it writes."""
import fnmatch
import html.parser
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
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


def test_an_interrupt_keeps_what_was_measured(tmp_path):
    file = tmp_path / "deep" / "a.json"   # a folder that does not exist yet
    run = subprocess.Popen([sys.executable, "-m", "gradmill", "bench", "overhead", "--quick", "--no-peers", "--threads", "1", "--json", str(file)], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8"},
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a suite in the background has it ignored, and children inherit that
    for _ in range(1200):   # written after the first case, and whole whenever it is read
        if file.exists() or run.poll() is not None:
            break
        time.sleep(0.1)
    assert json.loads(file.read_text())["settings"]["complete"] is False
    run.send_signal(signal.SIGINT)
    said, errors = run.communicate(timeout=120)
    data = json.loads(file.read_text())
    assert run.returncode == 130 and "Stopped" in said and "Traceback" not in errors, errors
    assert data["settings"]["complete"] is False and 1 <= len(data["results"]) < 9 and [f.name for f in file.parent.iterdir()] == ["a.json"]


def test_the_command_passes_on_help_and_errors(tmp_path):
    shown = bench("--help")
    assert shown.returncode == 0 and "--html" in shown.stdout and "FAMILY" in shown.stdout
    unknown = bench("quant,optimm")
    assert unknown.returncode == 2 and "optimm: there are quant, matmul" in unknown.stdout and "did you mean optim?" in unknown.stdout
    folder = bench("quant", "--json", str(tmp_path))
    assert folder.returncode == 2 and "it is a folder; name a file" in folder.stderr
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


# --- what README says ----------------------------------------------------------------------------------------
SPEEDS = {"avx512_vnni": "cpu-zen4-2core", "avx2": "cpu-zen4-2core-avx2"}
#: Start of a row of README's table of jobs -> its cells of ratios: (run, case, start of the other way's label) for each number, in order. "vnni" is the whole run.
QUOTED = {
    "quantise 4096x1024": [[("vnni", f"quant.quantize_{c}", "torch expression") for c in ("int8", "int8_stochastic", "int4")],
                           [("avx2", f"quant.quantize_{c}", "torch expression") for c in ("int8", "int8_stochastic", "int4")],
                           [("vnni", f"quant.quantize_{c}", "torch expression, compiled") for c in ("int8", "int8_stochastic", "int4")]],
    "INT8 matmul 2048 cubed": [[("vnni", "matmul.int8_quantizing", "torch fp32")], [("avx2", "matmul.int8_quantizing", "torch fp32")],
                               [("vnni", "matmul.int8_quantizing", "torch quantise"), ("avx2", "matmul.int8_quantizing", "torch quantise"), ("vnni", "matmul.int8_quantizing", "torchao")]],
    "the bare INT8 matmul": [[("vnni", "matmul.int8", "torch fp32")], [("avx2", "matmul.int8", "torch fp32")], [("vnni", "matmul.int8", "torch._int_mm"), ("avx2", "matmul.int8", "torch._int_mm")]],
    "linear forward + backward": [[("vnni", "matmul.linear_training", "torch fp32")], [("avx2", "matmul.linear_training", "torch fp32")], [("vnni", "matmul.linear_training", "torchao")]],
    "8 experts": [[("vnni", "matmul.experts_training", "torch fp32")], [("avx2", "matmul.experts_training", "torch fp32")], [("vnni", "matmul.experts_training", "torch._grouped_mm")]],
    "INT4 weight-only": [[("vnni", f"matmul.weight_only_batch_{n}", "torch fp32") for n in (1, 16)], [("avx2", f"matmul.weight_only_batch_{n}", "torch fp32") for n in (1, 16)],
                         [("vnni", "matmul.weight_only_batch_1", "torch _weight"), ("vnni", "matmul.weight_only_batch_16", "bitsandbytes")]],
    "4-bit codebooks": [[("vnni", f"codebook.four_bits{s}", "torch fp32") for s in ("", "_batch_16")], [("avx2", f"codebook.four_bits{s}", "torch fp32") for s in ("", "_batch_16")], []],
    "int8 convolution": [[("vnni", f"conv.vgg_{n}", "torch fp32") for n in (128, 256)], [("avx2", f"conv.vgg_{n}", "torch fp32") for n in (128, 256)], []],
    "AdamW, 19.9M": [[("vnni", f"optim.adamw_{s}", "torch AdamW(fused") for s in ("fp32", "bf16_states", "int8_states")],
                     [("avx2", f"optim.adamw_{s}", "torch AdamW(fused") for s in ("fp32", "bf16_states", "int8_states")],
                     [("vnni", "optim.adamw_fp32", "torch AdamW, compiled"), ("vnni", "optim.adamw_int8_states", "bitsandbytes")]],
    "AdamW, 10,000 tensors": [[("vnni", "optim.adamw_many_tensors", "torch AdamW(fused")], [("avx2", "optim.adamw_many_tensors", "torch AdamW(fused")],
                              [("vnni", "optim.adamw_many_tensors", "torch AdamW(foreach")]],
    "AdamW, bf16 weights": [[("vnni", "optim.adamw_bf16_weights", "torch AdamW(fused")], [("avx2", "optim.adamw_bf16_weights", "torch AdamW(fused")], [("vnni", "optim.adamw_bf16_weights", "torchao")]],
    "Lion": [[("vnni", "optim.lion_int8_states", "torch foreach")], [("avx2", "optim.lion_int8_states", "torch foreach")], [("vnni", "optim.lion_int8_states", "lion-pytorch")]],
    "Muon": [[("vnni", "optim.muon", "torch Muon")], [("avx2", "optim.muon", "torch Muon")], []],
    "Q-GaLore step": [[("vnni", "projection.qgalore_step", "plain torch, the official")], [("avx2", "projection.qgalore_step", "plain torch, the official")],
                      [("vnni", "projection.qgalore_step", "galore-torch"), ("vnni", "projection.galore_amortised", "galore-torch")]],
    "subspace refresh": [[("vnni", "projection.refresh", "torch.linalg.svd")], [("avx2", "projection.refresh", "torch.linalg.svd")], [("vnni", "projection.refresh", "torch.svd_lowrank")]],
    "DCT columns": [[("vnni", "projection.dct_columns", "torch.linalg.svd")], [("avx2", "projection.dct_columns", "torch.linalg.svd")], [("vnni", "projection.dct_columns", "torch matmul")]],
    "binary matmul": [[("vnni", f"binary.signs{s}", "torch fp32") for s in ("", "_packing")], [("avx2", f"binary.signs{s}", "torch fp32") for s in ("", "_packing")], []],
    "8 tenants": [[("vnni", "binary.tenants", "torch fp32")], [("avx2", "binary.tenants", "torch fp32")], []],
    "`one_bit_fqt`: linear": [[(run, f"binary.one_bit_{c}", "torch fp32") for c in ("linear", "conv_256", "conv_512", "vgg")] for run in ("vnni", "avx2")] + [[]],
    "a step of a LLaMA": [[("vnni", f"training.{c}", "torch fp32, AdamW(fused") for c in ("llama_small", "llama", "cnn_small", "cnn")],
                          [("avx2", f"training.{c}", "torch fp32, AdamW(fused") for c in ("llama_small", "cnn_small")],
                          [("vnni", f"training.{c}", "torch fp32, bitsandbytes") for c in ("llama_small", "llama", "cnn_small", "cnn")]],
    "made for memory": [[(run, c, "torch fp32") for c in ("codebook.training", "codebook.bct_layer", "conv.on_device")] for run in ("vnni", "avx2")] + [[]],
}


def committed(isa):
    return json.loads((ROOT / "bench" / "results" / f"{SPEEDS[isa]}.json").read_text())


def test_readme_quotes_the_committed_runs():
    """Every ratio in README's table of jobs is a committed one, rounded as it is written; "level" stands for a tie."""
    ways = {(run, f"{r['family']}.{r['case']}", e["label"]): (e["ratio"]["median"], e["tie"]) for run, isa in (("vnni", "avx512_vnni"), ("avx2", "avx2"))
            for r in committed(isa)["results"] for e in r["entries"] if e.get("ratio")}
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in (ROOT / "README.md").read_text().splitlines() if line.count("|") == 5}
    wrong = []
    for start, columns in QUOTED.items():
        (cells,) = (cells for name, cells in rows.items() if name.startswith(start))
        for cell, wanted in zip(cells, columns):
            said = re.findall(r"\b(\d+(?:\.\d+)?)x|\b(level)\b", cell)
            assert len(said) == len(wanted), (start, cell)
            for (number, level), (run, case, label) in zip(said, wanted):
                ratio, tie = next(value for (r, c, e), value in ways.items() if (r, c) == (run, case) and e.startswith(label))
                least = 0.5 * 10 ** -len(number.partition(".")[2]) * 1.02
                if tie != bool(level) and not (tie and abs(float(number) - ratio) <= least) or number and abs(float(number) - max(ratio, 1 / ratio)) > least or \
                        number and ratio < 1 and "slower" not in cell:
                    wrong.append((start, case, label, number or level, round(ratio, 3), tie))
    assert not wrong, "\n".join(["README says of (row, case, way) this, and the run that (a ratio, a tie?):", *map(str, wrong)])


def test_the_table_of_recipes_is_that_of_the_speeds():
    """speeds.json is what bench/speeds.py makes of the committed runs, and README's table of recipes is speeds.json, rounded."""
    speeds = json.loads((ROOT / "pyops" / "speeds.json").read_text())
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]] for line in (ROOT / "README.md").read_text().splitlines()
            if re.match(r"\| (`[a-z0-9_*]+`(, )?)+ \|", line) and line.count("|") == 4}
    named, wrong = set(), []
    for row, cells in rows.items():
        patterns = re.findall("`(.*?)`", row)
        if not any(fnmatch.filter(speeds["avx2"], p) for p in patterns):
            continue   # a row of another table
        wanted = []
        for isa in SPEEDS:
            parts = []
            for shape in ("1024x1024", "1024x4096", "256x256"):
                found = [speeds[isa][name][shape] for p in patterns for name in sorted(fnmatch.filter(speeds[isa], p))]
                low, high = f"{min(found):.1f}x", f"{max(found):.1f}x"
                parts.append((low if low == high else f"{low} to {high}") if "*" in row else " and ".join(f"{value:.1f}x" for value in found))
            wanted.append(", ".join(parts))
        if cells != wanted:
            wrong.append(f"| {row} | {' | '.join(wanted)} |")
        named |= {name for p in patterns for name in fnmatch.filter(speeds["avx2"], p)}
    assert not wrong, "\n".join(["README's rows should be:", *wrong])
    assert set(speeds["avx2"]) - named == {"w8", "w4", "w3", "w2"}, "frozen weights are another job: no dW"
    for isa in SPEEDS:
        for result in committed(isa)["results"]:
            if result["case"].startswith("linear_training"):
                shape, times = "x".join(re.search(r"(\d+)->(\d+)", result["title"]).groups()), {e["label"]: e["median_s"] for e in result["entries"] if "median_s" in e}
                for label, time in times.items():
                    if label.startswith("gradmill, recipe "):
                        assert speeds[isa][label.removeprefix("gradmill, recipe ")][shape] == round(times["torch fp32"] / time, 2), (isa, label, shape)
