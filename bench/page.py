"""One self-contained HTML page of a run's JSON: ratios, rooflines, scaling, memory, goals. Inline SVG in percentages, so that it fits any
width without scaling its text; colours are the reader's light or dark scheme. No script, no network."""
from __future__ import annotations

import itertools
import math
import pathlib
import re
from html import escape

from gradmill._files import replacing

from . import report
from .limits import MEANING
from .runner import DISTURBED

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1c1b1a; --soft: #5c5a55; --line: #dddbd6; --good: #2a78d6; --bad: #d64545; --even: #94918a;
  --c1: #1c1b1a; --c2: #c2610c; --c3: #0f8a68; --c4: #8a4fc0; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #1a1a19; --ink: #f1efea; --soft: #b0ada5; --line: #3b3a37; --good: #4a96ee; --bad: #ee6f6f; --even: #7d7a74;
    --c1: #f1efea; --c2: #f0954a; --c3: #3fc79d; --c4: #b98aea; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; } h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; font-weight: 600; }
p, pre, figcaption { color: var(--soft); } pre { overflow-x: auto; font-size: 13px; } .warn { color: var(--bad); font-weight: 600; }
figure { margin: 0; } figure p { margin: .15rem 0; } .roofline { margin-top: 2rem; } figcaption { margin-bottom: .5rem; }
.bar { display: grid; grid-template-columns: 17rem minmax(0, 1fr) 15.5rem; gap: 0 .75rem; align-items: center; padding: .1rem 0; line-height: 1.3; }
.bar > :first-child { overflow-wrap: anywhere; } .bar > :last-child { margin-left: auto; text-align: right; font-variant-numeric: tabular-nums; }
.limits .bar { grid-template-columns: 27rem minmax(0, 1fr) 8rem; } .memory .bar { grid-template-columns: 22rem minmax(0, 1fr) 6rem; } .whole { white-space: nowrap; } .narrow { display: none; }
svg { display: block; width: 100%; overflow: visible; } .row { height: 20px; } .roof { height: 24rem; margin: 1rem 0 2.5rem; }
svg text { fill: var(--soft); font-size: 12px; paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
.good { fill: var(--good); } .bad { fill: var(--bad); } .even { fill: var(--even); } .track { fill: var(--line); }
.grid { stroke: var(--line); } .axis, .whisker { stroke: var(--ink); } .limit { stroke: var(--even); stroke-width: 2; }
.point { fill: var(--good); stroke: var(--paper); stroke-width: 2; } svg .number { fill: var(--ink); font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem 2.5rem; }
.plot { height: 15rem; margin: 1.1rem 0 1.75rem; } .key { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: 13px; }
.key svg { display: inline-block; width: 22px; height: 10px; margin-right: .35rem; }
.l0 { stroke: var(--good); stroke-width: 3; } .l1 { stroke: var(--c1); stroke-width: 1.5; } .l2 { stroke: var(--c2); stroke-width: 1.5; }
.l3 { stroke: var(--c3); stroke-width: 1.5; } .l4 { stroke: var(--c4); stroke-width: 1.5; }
.p0 { fill: var(--good); } .p1 { fill: var(--c1); } .p2 { fill: var(--c2); } .p3 { fill: var(--c3); } .p4 { fill: var(--c4); }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; } th, td { padding: .15rem 1.25rem .15rem 0; text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 400; } th:first-child, td:first-child { text-align: left; }
@media (max-width: 40rem) {
  .bar { display: flex; flex-wrap: wrap; justify-content: space-between; margin-top: .35rem; } .bar > svg { order: 3; flex: 0 0 100%; }
  .roof { height: 20rem; } .wide { display: none; } .narrow { display: inline; } body > pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; }
}
"""


def page(data: dict) -> str:
    """The page of what report.as_data made, or a JSON file of it holds."""
    facts, settings, results = data["machine"], data["settings"], data["results"]
    warnings = [line[2:] for line in report.drift_lines(data["limits"], data["limits_after"])]
    if settings["tiny"]:
        warnings.append("--tiny: these sizes measure overheads; nothing here is a result.")
    if not settings["complete"]:
        warnings.append("The run was stopped before its end.")
    parts = [f"<h1>gradmill's benchmarks</h1><p>{escape(facts['command'])}, {escape(facts['date'])}, {settings['took_s']:.0f} s</p>",
             *(f'<p class="warn">{escape(line)}</p>' for line in warnings),
             f"<pre>{escape(chr(10).join([*report.machine_lines(facts, data['limits']), *peer_lines(facts)]))}</pre>", *rooflines(data)]
    for family in dict.fromkeys(r["family"] for r in results):
        mine = [r for r in results if r["family"] == family]
        jobs = [r for r in mine if not r.get("point")]
        parts += [*([ratios(family, jobs)] if jobs else []), *scaling(family, [r for r in mine if r.get("point")]), *memory(family, jobs)]
    return ("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"
            f"<title>gradmill's benchmarks</title><style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n")


def peer_lines(facts: dict) -> list[str]:
    return ["peers:", *(f"  {name:<20} {said}" for name, said in facts["peers"].items())] if facts.get("peers") else []


def ours(result: dict) -> dict | None:
    return next((e for e in result["entries"] if e["kind"] == "ours" and "not_run" not in e), None)


def disturbed(result: dict) -> bool:
    return result["others_cpu"] is not None and result["others_cpu"] > DISTURBED


def shown(text: str) -> str:
    """Text as HTML in which no line breaks within 1024->4096."""
    return re.sub(r"\S+-&gt;\w+", r'<span class="whole">\g<0></span>', escape(text))


def bar(label: str, drawing: str, said: str) -> str:
    return f'<div class="bar"><span>{shown(label)}</span><svg class="row" role="img" aria-label="{escape(said)}">{drawing}</svg><span>{escape(said)}</span></div>'


# --- ratios -----------------------------------------------------------------------------------------------
def ratios(family: str, results: list[dict]) -> str:
    """A bar for each other way to do each job: its time by gradmill's, on a logarithmic axis that the family shares."""
    logs = [abs(math.log(x)) for r in results for e in r["entries"] if e.get("ratio") for x in e["ratio"].values()]
    reach = max([math.log(2.0), *logs]) * 1.05

    def x(ratio):
        return 50 + 50 * math.log(ratio) / reach

    out = [f'<h2>{escape(family)}</h2><figure class="ratios"><figcaption>Time of each other way by gradmill\'s; to the right gradmill is faster. '
           f"Logarithmic, from 1/{report.times(math.exp(reach))} to {report.times(math.exp(reach))}; the thin line spans the middle half of the rounds. "
           "Gray: a tie.</figcaption>"]
    for r in results:
        mine = ours(r)
        out.append(f"<h3>{shown(r['title'])}</h3>")
        goal = r["goal"] and r["goal"]["said"] and f"; goal, against torch, {report.aim(r['goal']['against'], r['goal']['ratio'])}: {r['goal']['said']}" or ""
        if mine is not None:
            out.append(f"<p>{escape(mine['label'])}: {report.seconds(mine['median_s'])}{escape(goal)}</p>")
        if disturbed(r):
            out.append(f'<p class="warn">Other processes had {report.percent(r["others_cpu"])} of the processors meanwhile: no result.</p>')
        for e in r["entries"]:
            if "not_run" in e:
                out.append(f"<p>{escape(e['label'])}: not run, {escape(e['not_run'])}</p>")
            elif e["ratio"]:
                middle, low, high = (e["ratio"][name] for name in ("median", "q25", "q75"))
                kind = "even" if e["tie"] else "good" if middle >= 1 else "bad"
                drawing = (f'<line class="grid" x1="50%" x2="50%" y1="0" y2="100%"/>'
                           f'<rect class="{kind}" x="{min(50, x(middle)):.2f}%" width="{abs(x(middle) - 50):.2f}%" y="4" height="12" rx="2"/>'
                           f'<line class="whisker" x1="{x(low):.2f}%" x2="{x(high):.2f}%" y1="10" y2="10"/>')
                who = "the first" if e["label"].startswith("gradmill") else "gradmill"
                said = f"tie ({report.times(middle)})" if e["tie"] else f"{who} {report.times(max(middle, 1 / middle))} {'faster' if middle >= 1 else 'slower'}"
                out.append(bar(e["label"], drawing, f"{report.seconds(e['median_s'])}, {said}"))
        out += [*known(r), *notes(r["notes"])]
    return "\n".join([*out, "</figure>"])


def notes(lines: list[str]) -> list[str]:
    """A paragraph each, but lines with columns, which keep their spaces, together."""
    return [f"<pre>{escape(chr(10).join(some))}</pre>" if columns else "\n".join(f"<p>{escape(line)}</p>" for line in some)
            for columns, some in ((columns, list(some)) for columns, some in itertools.groupby(lines, report.has_columns))]


def known(r: dict) -> list[str]:
    """A table of what a job's entries say besides their time, where they do."""
    per_call, timed = r.get("per_call"), [e for e in r["entries"] if "not_run" not in e]
    names = list(dict.fromkeys(name for e in timed for name in e.get("facts", {})))
    if not per_call and all(name.endswith("bytes") for name in names):
        return []   # memory's bars say it
    head = ["", *([f"{per_call[1]}/s"] if per_call else []), *(name.removesuffix(" bytes") for name in names)]
    rows = [[e["label"], *([report.amount(per_call[0] / e["median_s"], "")] if per_call else []), *(_fact(name, e.get("facts", {}).get(name)) for name in names)] for e in timed]
    row = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"
    return ['<div class="table"><table>', row(head, "th"), *(row(cells, "td") for cells in rows), "</table></div>"]


def _fact(name: str, value: float | None) -> str:
    return "" if value is None else report.amount(value, "B") if name.endswith("bytes") else f"{value:.4g}"


# --- scaling and memory -----------------------------------------------------------------------------------
def tick(value: float) -> str:
    for unit, scale in (("M", 1 << 20), ("k", 1 << 10)):
        if value >= scale and value % scale == 0:
            return f"{value // scale}{unit}"
    return f"{value:g}"


def scaling(family: str, results: list[dict]) -> list[str]:
    """A plot for each series of points: time over size, batch or threads, both logarithmic, a line for each way."""
    if not results:
        return []
    series = {}
    for r in results:
        series.setdefault(tuple(r["point"][:2]), []).append((r["point"][2], r))
    return [f"<h2>{escape(family)}: time over size, batch and threads</h2>", '<div class="plots">',
            *(curves(name, varies, sorted(jobs, key=lambda job: job[0])) for (name, varies), jobs in series.items()), "</div>"]


def curves(name: str, varies: str, jobs: list[tuple[float, dict]]) -> str:
    lines = {}
    for value, r in jobs:
        for e in r["entries"]:
            if "not_run" not in e:
                lines.setdefault(e["label"], []).append((value, e["median_s"]))
    left, right = jobs[0][0], jobs[-1][0]
    times = [t for line in lines.values() for _, t in line]
    caption = f"<figcaption>{shown(name)}: time over {escape(varies)}, both logarithmic</figcaption>"
    if not times:
        return f'<figure class="curves">{caption}<p>nothing ran</p></figure>'
    bottom, top = 10 ** math.floor(math.log10(min(times))), 10 ** math.ceil(math.log10(max(times) * 1.01))

    def x(value):   # a margin for the times' labels
        return 12 + 86 * (math.log(value / left) / math.log(right / left) if right > left else 0.5)

    def y(value):
        return 100 - 100 * math.log(value / bottom) / math.log(top / bottom)

    out = [f'<figure class="curves">{caption}<svg class="plot" role="img" aria-label="{escape(name)} over {escape(varies)}">']
    for power in range(round(math.log10(bottom)), round(math.log10(top)) + 1):
        at = f'{y(10.0 ** power):.2f}%'
        out.append(f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/><text x="0" y="{at}" dy="-3">{escape(_decade(power))}</text>')
    out += [f'<text x="{x(value):.2f}%" y="100%" dy="16" text-anchor="middle">{tick(value)}</text>' for value, _ in jobs]
    keys = []
    for number, (label, line) in reversed(list(enumerate(lines.items()))):   # gradmill's, the first, on top
        kind = min(number, 4)
        out += [f'<line class="l{kind}" x1="{x(a):.2f}%" y1="{y(s):.2f}%" x2="{x(b):.2f}%" y2="{y(t):.2f}%"/>' for (a, s), (b, t) in zip(line, line[1:])]
        out += [f'<circle class="p{kind}" cx="{x(a):.2f}%" cy="{y(s):.2f}%" r="{4 if kind == 0 else 3}"><title>{escape(label)}, {tick(a)}: {report.seconds(s)}</title></circle>'
                for a, s in line]
        keys.insert(0, f'<span><svg aria-hidden="true"><line class="l{kind}" x1="0" x2="100%" y1="50%" y2="50%"/></svg>{escape(label)}</span>')
    return "\n".join([*out, '</svg><div class="key">', *keys, "</div></figure>"])


def _decade(power: int) -> str:
    return f"{10 ** (power % 3)} {('ns', 'us', 'ms', 's')[power // 3 + 3]}" if -9 <= power < 3 else f"1e{power} s"


def memory(family: str, results: list[dict]) -> list[str]:
    """Bars of what the ways of a job keep in memory, against the largest."""
    out = []
    for r in results:
        held = {(e["label"], name): value for e in r["entries"] for name, value in e.get("facts", {}).items() if name.endswith("bytes")}
        most = max(held.values(), default=0)
        if most > 0 and len(held) > 1:
            out.append(f"<h3>{shown(r['title'])}: {escape(', '.join(dict.fromkeys(name.removesuffix(' bytes') for _, name in held)))}</h3>")
            mine = ours(r)
            out += [bar(label, f'<rect class="{"good" if mine and label == mine["label"] else "even"}" width="{100 * max(value, 0) / most:.2f}%" y="4" height="12" rx="2"/>',
                        report.amount(value, "B")) for (label, _), value in held.items()]
    return [f'<h2>{escape(family)}: memory</h2><figure class="memory"><figcaption>Blue: gradmill\'s first way. Shorter is better.</figcaption>', *out, "</figure>"] if out else []


# --- limits -----------------------------------------------------------------------------------------------
def rooflines(data: dict) -> list[str]:
    """What gradmill reaches of each job's limit, as a plot of rates over operations per byte and as bars."""
    jobs = [(r, e) for r in data["results"] if not r.get("point") and (e := ours(r)) is not None and e["of_limit"]]
    if not jobs:
        return []
    most = max(1.0, *(e["of_limit"] for _, e in jobs))
    out = ['<h2>Of the machine\'s limits</h2><figure class="limits"><figcaption>Counted bytes or operations per second of gradmill, as a share of the '
           "limit that binds the job. A job whose data partly stay in a cache can pass a memory limit.</figcaption>"]
    for number, (r, e) in enumerate(jobs, 1):
        drawing = (f'<rect class="track" width="{100 / most:.2f}%" y="4" height="12" rx="2"/>'
                   f'<rect class="good" width="{100 * e["of_limit"] / most:.2f}%" y="4" height="12" rx="2"/>')
        mark = "! " if disturbed(r) else ""
        out.append(bar(f"{mark}{number}. {r['family']}: {r['title']}", drawing, f"{report.percent(e['of_limit'])} of {r['work']['bound']}"))
    out.append("</figure>")
    plotted = [(n, r, e) for n, (r, e) in enumerate(jobs, 1) if r["work"]["ops"] > 0 and r["work"]["bytes"] > 0]
    return [*out, *([roofline(data["limits"], plotted)] if plotted else [])]


def roofline(limits: dict[str, float], jobs: list[tuple[int, dict, dict]]) -> str:
    bandwidths = {name: value for name, value in limits.items() if MEANING[name][0] == "B/s"}
    peaks = {name: value for name, value in limits.items() if MEANING[name][0] != "B/s"}
    points = [(n, r, r["work"]["ops"] / r["work"]["bytes"], r["work"]["ops"] / e["median_s"]) for n, r, e in jobs]
    left, right = (f(x for *_, x, _ in points) for f in (min, max))
    left, right = min(0.99, left / 2), max(10.1, right * 4)   # a power of ten or more within; on the right room for the rates
    top, bottom = 1.5 * max([y for *_, y in points] + list(peaks.values())), min(y for *_, y in points) / 2

    def x(value):
        return 100 * math.log(value / left) / math.log(right / left)

    def y(value):
        return 100 - 100 * math.log(value / bottom) / math.log(top / bottom)

    def line(kind, x1, y1, x2, y2):
        return f'<line class="{kind}" x1="{x(x1):.2f}%" y1="{y(y1):.2f}%" x2="{x(x2):.2f}%" y2="{y(y2):.2f}%"/>'

    out, rates, heights = ['<svg class="roof" role="img" aria-label="roofline">'], [], []   # rates: over the lines, under the points
    for power in range(math.ceil(math.log10(left)), math.floor(math.log10(right)) + 1):
        out.append(line("grid", 10.0 ** power, bottom, 10.0 ** power, top))
        out.append(f'<text x="{x(10.0 ** power):.2f}%" y="100%" dy="16" text-anchor="{"middle" if x(10.0 ** power) < 95 else "end"}">{10.0 ** power:g}</text>')
    for power in range(math.ceil(math.log10(bottom)), math.floor(math.log10(top)) + 1):
        out.append(line("grid", left, 10.0 ** power, right, 10.0 ** power))
        heights.append(y(10.0 ** power))
        rates.append(f'<text x="100%" y="{y(10.0 ** power):.2f}%" dy="-3" text-anchor="end">{escape(report.amount(10.0 ** power, "op/s"))}</text>')
    roof = max(peaks.values(), default=top)
    for name, value in bandwidths.items():  # from where it enters the plot to where it meets the highest peak
        start, end = max(left, bottom / value), min(right, roof / value)
        if start < end:
            out.append(f"<g><title>{escape(name)}: {escape(report.amount(value, 'B/s'))}</title>{line('limit', start, start * value, end, end * value)}</g>")
    for name, value in peaks.items():
        start = max(left, value / max(bandwidths.values(), default=value / left))
        if start < right:
            out.append(f"<g><title>{escape(name)}: {escape(report.amount(value, MEANING[name][0]))}</title>{line('limit', start, value, right, value)}</g>")
    out += rates
    for number, r, across, up in points:
        out.append(f'<circle class="point" cx="{x(across):.2f}%" cy="{y(up):.2f}%" r="5"><title>{number}. {escape(r["title"])}</title></circle>')
    places = [(number, x(across), y(up)) for number, _, across, up in points]
    for kind, size in (("narrow", (320, 320)), ("wide", (900, 384))):
        out += [f'<text class="number {kind}" x="{across:.2f}%" y="{up:.2f}%" dx="{dx}" dy="{dy}">{number}</text>' for number, across, up, dx, dy in numbered(places, heights, *size)]
    roofs = ", ".join(f"{name} {report.amount(value, MEANING[name][0])}" for name, value in limits.items())
    return ('<figure class="roofline"><figcaption>Roofline: operations per second over operations per byte moved, both counted and logarithmic; numbers as '
            f"above, where there is room for them. Slanted lines are bandwidths, level ones peaks: {escape(roofs)}.</figcaption>\n" + "".join(out) + "</svg></figure>")


def numbered(points: list[tuple[int, float, float]], rates: list[float], width: float, height: float) -> list[tuple[int, float, float, int, int]]:
    """(number, x, y, dx, dy) of points (number, x, y), in percent of a plot of so many pixels, whose numbers have a place beside them that neither
    another point nor another number takes, nor the axis' labels, on the right above ``rates``."""
    dots, taken, found = [(n, px * width / 100, py * height / 100) for n, px, py in points], [(width - 70, at * height / 100 - 15, width, at * height / 100) for at in rates], []
    for (number, left, top), (_, across, up) in zip(points, dots):
        wide = 9 * len(str(number)) + 1
        for dx, dy in ((8, 4), (-8 - wide, 4), (-wide // 2, -8), (-wide // 2, 17), (6, -5), (6, 14), (-6 - wide, -5), (-6 - wide, 14)):
            box = across + dx, up + dy - 11, across + dx + wide, up + dy
            clear = all(box[0] > d or c > box[2] or box[1] > f or e > box[3] for c, e, d, f in
                        [*taken, *((px - 5, py - 5, px + 5, py + 5) for n, px, py in dots if n != number)])
            if clear and 0 <= box[0] and box[2] <= width and 0 <= box[1] and box[3] <= height:
                taken.append(box)
                found.append((number, left, top, dx, dy))
                break
    return found


# --- one picture ------------------------------------------------------------------------------------------
def picture(data: dict, path: str):
    """A PNG for a README: of every job (points of scaling plots aside) how much faster gradmill is than torch's entry and than its best peer."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = []
    for r in data["results"]:
        kinds = {kind: [e["ratio"]["median"] for e in r["entries"] if e["kind"] == kind and e.get("ratio") and not e["label"].startswith("gradmill")] for kind in ("torch", "peer")}
        if kinds["torch"] and r["work"]["bound"] and not r.get("point") and ours(r):   # call overhead and whole training are other questions
            rows.append((f"{r['family']}: {r['title']}", kinds["torch"][0], min(kinds["peer"], default=None), disturbed(r)))
    rows.reverse()
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.26 * len(rows)), layout="constrained")
    for y, (_, torch_ratio, peer_ratio, unsure) in enumerate(rows):
        axes.plot([1, torch_ratio], [y, y], color="#2a78d6" if torch_ratio >= 1 else "#d64545", linewidth=7, solid_capstyle="butt", alpha=0.4 if unsure else 1)
        if peer_ratio is not None:
            axes.plot([peer_ratio], [y], marker="D", color="#1c1b1a", markersize=5)
    axes.axvline(1, color="#5c5a55", linewidth=1)
    axes.set(xscale="log", yticks=range(len(rows)), ylim=(-0.7, len(rows) - 0.3), xlabel="bars: times as fast as torch; diamonds: as the best other way")
    axes.set_yticklabels([name for name, *_ in rows], fontsize=8)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.grid(axis="x", color="#dddbd6", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    figure.suptitle(f"{data['machine']['cpu']}, {data['machine']['threads']} threads, torch {data['machine']['torch']}, {data['machine']['date'][:10]}", fontsize=10)
    with replacing(pathlib.Path(path).resolve()) as temporary:
        figure.savefig(temporary, format="png", dpi=110, facecolor="#fcfcfb")
    pyplot.close(figure)
