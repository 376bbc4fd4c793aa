"""One self-contained HTML page of a run's JSON: ratios, rooflines, goals. Inline SVG in percentages, so that it fits any
width without scaling its text; colours are the reader's light or dark scheme. No script, no network."""
from __future__ import annotations

import math
from html import escape

from . import report
from .limits import MEANING
from .runner import DISTURBED

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1c1b1a; --soft: #5c5a55; --line: #dddbd6; --good: #2a78d6; --bad: #d64545; --even: #94918a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #1a1a19; --ink: #f1efea; --soft: #b0ada5; --line: #3b3a37; --good: #4a96ee; --bad: #ee6f6f; --even: #7d7a74; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; } h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; font-weight: 600; }
p, pre, figcaption { color: var(--soft); } pre { overflow-x: auto; font-size: 13px; } .warn { color: var(--bad); font-weight: 600; }
figure { margin: 0; } figcaption { margin-bottom: .5rem; }
.bar { display: grid; grid-template-columns: 15rem minmax(0, 1fr) 10rem; column-gap: .75rem; align-items: center; }
.bar > :first-child { overflow-wrap: anywhere; } .bar > :last-child { text-align: right; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; overflow: visible; } .row { height: 20px; } .roof { height: 24rem; margin: 1rem 0 2.5rem; }
svg text { fill: var(--soft); font-size: 12px; }
.good { fill: var(--good); } .bad { fill: var(--bad); } .even { fill: var(--even); } .track { fill: var(--line); }
.grid { stroke: var(--line); } .axis, .whisker { stroke: var(--ink); } .limit { stroke: var(--even); stroke-width: 2; }
.point { fill: var(--good); stroke: var(--paper); stroke-width: 2; } svg .number { fill: var(--ink); font-weight: 600; }
@media (max-width: 40rem) {
  .bar { grid-template-columns: minmax(0, 1fr) auto; margin-top: .35rem; } .bar > svg { grid-row: 2; grid-column: 1 / 3; }
  .roof { height: 20rem; }
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
        parts.append(ratios(family, [r for r in results if r["family"] == family]))
    return ("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"
            f"<title>gradmill's benchmarks</title><style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n")


def peer_lines(facts: dict) -> list[str]:
    return ["peers:", *(f"  {name:<20} {said}" for name, said in facts["peers"].items())] if facts.get("peers") else []


def ours(result: dict) -> dict | None:
    return next((e for e in result["entries"] if e["kind"] == "ours" and "not_run" not in e), None)


def disturbed(result: dict) -> bool:
    return result["others_cpu"] is not None and result["others_cpu"] > DISTURBED


def bar(label: str, drawing: str, said: str) -> str:
    return f'<div class="bar"><span>{escape(label)}</span><svg class="row" role="img" aria-label="{escape(said)}">{drawing}</svg><span>{escape(said)}</span></div>'


# --- ratios -----------------------------------------------------------------------------------------------
def ratios(family: str, results: list[dict]) -> str:
    """A bar for each other way to do each job: its time by gradmill's, on a logarithmic axis that the family shares."""
    known = [abs(math.log(x)) for r in results for e in r["entries"] if e.get("ratio") for x in e["ratio"].values()]
    reach = max([math.log(2.0), *known]) * 1.05

    def x(ratio):
        return 50 + 50 * math.log(ratio) / reach

    out = [f'<h2>{escape(family)}</h2><figure class="ratios"><figcaption>Time of each other way by gradmill\'s; to the right gradmill is faster. '
           f"Logarithmic, from 1/{report.times(math.exp(reach))} to {report.times(math.exp(reach))}; the thin line spans the middle half of the rounds. "
           "Gray: a tie.</figcaption>"]
    for r in results:
        mine = ours(r)
        out.append(f"<h3>{escape(r['title'])}</h3>")
        goal = r["goal"] and r["goal"]["said"] and f"; goal {r['goal']['ratio']:g}x of {r['goal']['against']}: {r['goal']['said']}" or ""
        if mine is not None:
            out.append(f"<p>gradmill: {report.seconds(mine['median_s'])}{escape(goal)}</p>")
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
                said = f"tie ({report.times(middle)})" if e["tie"] else f"{report.times(max(middle, 1 / middle))} {'faster' if middle >= 1 else 'slower'}"
                out.append(bar(e["label"], drawing, f"{said}, {report.seconds(e['median_s'])}"))
        out += [f"<p>{escape(note)}</p>" for note in r["notes"]]
    return "\n".join([*out, "</figure>"])


# --- limits -----------------------------------------------------------------------------------------------
def rooflines(data: dict) -> list[str]:
    """What gradmill reaches of each job's limit, as a plot of rates over operations per byte and as bars."""
    jobs = [(r, e) for r in data["results"] if (e := ours(r)) is not None and e["of_limit"]]
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
    left, right = 10 ** math.floor(math.log10(left / 1.5)), 10 ** math.ceil(math.log10(right * 1.5))
    top = 10 ** math.ceil(math.log10(1.2 * max([y for *_, y in points] + list(peaks.values()))))
    bottom = 10 ** math.floor(math.log10(min(y for *_, y in points) / 1.2))

    def x(value):
        return 100 * math.log(value / left) / math.log(right / left)

    def y(value):
        return 100 - 100 * math.log(value / bottom) / math.log(top / bottom)

    def line(kind, x1, y1, x2, y2):
        return f'<line class="{kind}" x1="{x(x1):.2f}%" y1="{y(y1):.2f}%" x2="{x(x2):.2f}%" y2="{y(y2):.2f}%"/>'

    out = ['<svg class="roof" role="img" aria-label="roofline">']
    for power in range(round(math.log10(left)), round(math.log10(right)) + 1):
        anchor = "start" if 10.0 ** power == left else "end" if 10.0 ** power == right else "middle"
        out.append(line("grid", 10.0 ** power, bottom, 10.0 ** power, top))
        out.append(f'<text x="{x(10.0 ** power):.2f}%" y="100%" dy="16" text-anchor="{anchor}">{10.0 ** power:g}</text>')
    for power in range(round(math.log10(bottom)), round(math.log10(top)) + 1):
        out.append(line("grid", left, 10.0 ** power, right, 10.0 ** power))
        out.append(f'<text x="0" y="{y(10.0 ** power):.2f}%" dy="-3">{escape(report.amount(10.0 ** power, "op/s"))}</text>')
    roof = max(peaks.values(), default=top)
    for name, value in bandwidths.items():  # from where it enters the plot to where it meets the highest peak
        start, end = max(left, bottom / value), min(right, roof / value)
        if start < end:
            out.append(f"<g><title>{escape(name)}: {escape(report.amount(value, 'B/s'))}</title>{line('limit', start, start * value, end, end * value)}</g>")
    for name, value in peaks.items():
        start = max(left, value / max(bandwidths.values(), default=value / left))
        if start < right:
            out.append(f"<g><title>{escape(name)}: {escape(report.amount(value, MEANING[name][0]))}</title>{line('limit', start, value, right, value)}</g>")
    for number, r, across, up in points:
        place = f'x="{x(across):.2f}%" y="{y(up):.2f}%"'
        out.append(f'<g><title>{number}. {escape(r["title"])}</title><circle class="point" c{place.replace(" y", " cy")} r="6"/>'
                   f'<text class="number" {place} dx="9" dy="4">{number}</text></g>')
    roofs = ", ".join(f"{name} {report.amount(value, MEANING[name][0])}" for name, value in limits.items())
    return ('<figure class="roofline"><figcaption>Roofline: operations per second over operations per byte moved, both counted and logarithmic; numbers as '
            f"above. Slanted lines are bandwidths, level ones peaks: {escape(roofs)}.</figcaption>\n" + "".join(out) + "</svg></figure>")
