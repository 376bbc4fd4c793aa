"""What a run says: a table per family, a summary, JSON, Markdown. All of it fits 100 columns."""
from __future__ import annotations

import json
import pathlib
import statistics

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradmill._files import replacing

from . import limits as machine
from .runner import LATER, Result, Timed

SCHEMA = 1


# --- numbers as people read them --------------------------------------------------------------------------
def seconds(t: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if t >= scale or unit == "us":
            x = t / scale
            return f"{x:.0f} {unit}" if x >= 100 else f"{x:.1f} {unit}" if x >= 10 else f"{x:.2f} {unit}"


def amount(x: float, unit: str) -> str:
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= scale:
            return f"{x / scale:.3g} {prefix}{unit}"
    return f"{x:.3g} {unit}"


def verdict(timed: Timed) -> str:
    """What gradmill is, compared with ``timed``."""
    ratio = timed.ratio[0]
    if timed.tie:
        return f"tie ({times(ratio)})"
    return f"{times(ratio)} faster" if ratio >= 1 else f"{times(1 / ratio)} slower"


def times(x: float) -> str:
    return f"{x:.0f}x" if x >= 100 else f"{x:.1f}x" if x >= 10 else f"{x:.2f}x"


def spread(timed: Timed) -> str:
    low, high = timed.quartiles
    return f"±{100 * (high - low) / 2 / timed.median:.0f}%"


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.0f}%"


def counted(result: Result) -> str:
    if not result.work.bound:
        return "not counted"
    return f"{amount(result.work.bytes, 'B')} moved, {amount(result.work.ops, 'op')} counted; bound by {result.work.bound}"


def has_columns(note: str) -> bool:
    """A note that is a row of a table: its spaces count."""
    return "  " in note


# --- the terminal -----------------------------------------------------------------------------------------
def machine_lines(facts: dict, limits: dict[str, float]) -> list[str]:
    gpu = facts.get("gpu")
    lines = [f"{facts['cpu']}, {facts['threads']} of {facts['cores']} cores, {facts['isa']} in gradmill, {facts['torch_isa']} in torch"]
    if gpu:
        lines.append(f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, CUDA {gpu['cuda']}")
    lines.append(f"gradmill {facts['gradmill']} ({facts['commit'] or 'no commit'}), torch {facts['torch']}, Python {facts['python']}")
    if facts["load"] is not None and facts["load"] > 0.7:
        lines.append(f"! The load average was {facts['load']:.1f} before this began: something else runs here. Trust no number below.")
    if facts["environment"]:
        lines.append("environment: " + " ".join(f"{k}={v}" for k, v in facts["environment"].items()))
    lines.append("limits measured now:")
    lines += [f"  {name:<12} {amount(value, machine.MEANING[name][0]):>12}   {machine.MEANING[name][1]}" for name, value in limits.items()]
    return lines


def cap_lines(level: str, rates: dict) -> list[str]:
    """Whether the cap on the instruction set held torch too."""
    if not rates:
        return [f"! What --isa {level} does to torch could not be measured."]
    lines = [f"--isa {level}, with the cap and without, each in its own process:"]
    for name, rate in rates.items():
        unit = "el/s" if "erf" in name else "FLOP/s" if "fp32" in name else "OP/s"
        change = rate["capped"] / rate["free"]
        said = "as fast" if 0.9 < change < 1.1 else f"{1 / change:.2f}x slower" if change < 1 else f"{change:.2f}x faster"
        lines.append(f"  {name:<18} {amount(rate['capped'], unit):>14}   without {amount(rate['free'], unit):>14}   {said}")
    matmul, peak = rates["torch fp32 matmul"], rates.get("fp32 in registers")
    if matmul["capped"] > 0.9 * matmul["free"]:
        if peak and peak["capped"] > 0.9 * peak["free"]:
            lines.append("  torch's fp32 matmul does not slow down, nor could it: fp32 peaks alike at both widths here.")
        else:
            lines.append("! torch's fp32 matmul ignores the cap (MKL does so on AMD): ratios to it are unfair to gradmill.")
    return lines


def known(e: dict, per_call) -> str:
    """What an entry (as data) says besides its time: rates, memory, what its run found."""
    said = [f"{amount(per_call[0] / e['median_s'], per_call[1])}/s"] if per_call else []
    return ", ".join(said + [f"{name.removesuffix(' bytes')} {amount(value, 'B')}" if name.endswith("bytes") else f"{name} {value:.4g}" for name, value in e.get("facts", {}).items()])


def _line(*cells, style=""):
    """One row of a family's table: figures have fixed widths, so that rows printed one by one line up, and names what is left."""
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(ratio=1, overflow="fold")
    for width in (8, 7, 15, 13):
        grid.add_column(width=width, justify="right", no_wrap=True)
    grid.add_row(*cells, style=style)
    return grid


def _indented(text: str, by: int, style: str) -> Padding:
    return Padding(Text(text, style=style), (0, 0, 0, by))


def header(family: str) -> list:
    return [_line(Text(family, style="bold underline"), "median", "spread", "gradmill is", "of its limit", style="bold")]


def block(result: Result) -> list:
    """What is printed for one case."""
    out = [Text(result.title, style="bold")]
    for e in result.entries:
        if e.reason:
            out.append(_indented(f"{e.label}: not run, {e.reason}", 2, "red" if e.kind == "ours" else "dim"))
            continue
        said = "" if e.ratio is None else verdict(e)
        style = "" if not said or e.tie or e.kind == "ours" else "green" if e.ratio[0] > 1 else "red"
        out.append(_line(Text("  " + e.label), seconds(e.median), spread(e), Text(said, style=style), percent(e.of_limit)))
        if len(e.parts) > 1:
            out.append(_indented(parts(e), 4, "dim"))
        if more := known(_entry(e), result.per_call):
            out.append(_indented(more, 4, "dim"))
    if result.disturbed:
        out.append(_indented(f"! Other processes had {percent(result.others)} of the processors meanwhile: no result.", 2, "bold red"))
    return [*out, _indented(counted(result), 2, "dim"), *(_indented(note, 2, "dim") for note in result.notes)]


def parts(e: Timed) -> str:
    return ", ".join(f"{name} {seconds(statistics.median(values))}" for name, values in e.parts.items())


def _row(result: Result) -> list[str]:
    mine, base, best = result.ours, result.torch, result.best_peer
    goal = ""
    if result.goal is not None:
        goal = f"{aim(*result.goal)} {result.goal_said}"
    title = ("! " if result.disturbed else "") + result.title
    if mine is None:
        return [title, "failed", "", "", "", goal]
    return [title, seconds(mine.median), verdict(base) if base else "not run", verdict(best) if best else "",
            f"{percent(mine.of_limit)} {result.work.bound}" if mine.of_limit is not None else "", goal]


def aim(against: str, value: float) -> str:
    return f"+{seconds(value)}" if against == LATER else f"{value:.3g}x"


HEADER = ["job", "gradmill", "than torch", "than best peer", "of limit", "goal"]


def summary(results: list[Result]) -> Table:
    out = Table(title="[bold]summary[/bold]", title_justify="left", box=None, padding=(0, 1), header_style="bold", expand=True)
    for name, width in zip(HEADER, (None, 8, 13, 13, 8, 11)):
        out.add_column(name, width=width, ratio=None if width else 1, overflow="fold", justify="left" if name in ("job", "goal") else "right")
    for result in results:
        row = _row(result)
        out.add_row(*row[:-1], Text(row[-1], style="bold red" if "MISSED" in row[-1] else ""))
    return out


# --- files ------------------------------------------------------------------------------------------------
def as_data(facts, limits, limits_after, cap, settings, results: list[Result]) -> dict:
    return {"schema": SCHEMA, "machine": facts, "limits": limits, "limits_after": limits_after, "isa_check": cap, "settings": settings, "results": [{
        "family": r.case.family, "case": r.case.name, "title": r.title,
        "work": {"bytes": r.work.bytes, "ops": r.work.ops, "bound": r.work.bound},
        "goal": None if r.goal is None else {"against": r.goal[0], "ratio": r.goal[1], "said": r.goal_said},
        "point": r.point, "per_call": r.per_call, "others_cpu": r.others, "notes": r.notes, "entries": [_entry(e) for e in r.entries]} for r in results]}


def _entry(e: Timed) -> dict:
    if e.reason:
        return {"kind": e.kind, "label": e.label, "not_run": e.reason}
    low, high = e.quartiles
    return {"kind": e.kind, "label": e.label, "median_s": e.median, "q25_s": low, "q75_s": high, "samples_s": list(e.by_round.values()),
            "parts_s": e.parts if len(e.parts) > 1 else None, "of_limit": e.of_limit, "tie": e.tie,
            "facts": e.facts, "ratio": None if e.ratio is None else dict(zip(("median", "q25", "q75"), e.ratio))}


def markdown(facts, limits, limits_after, cap_notes: list[str], settings, results: list[Result]) -> str:
    lines = [f"Command: `{facts['command']}`, {facts['date']}.", "", "```", *machine_lines(facts, limits), *cap_notes,
             *drift_lines(limits, limits_after), "```", "", "| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    lines += ["| " + " | ".join(_row(r)) + " |" for r in results]
    for family in dict.fromkeys(r.case.family for r in results):
        lines += ["", f"### {family}", "", "| | median | spread | gradmill is | of its limit |", "|---|---:|---:|---:|---:|"]
        for r in results:
            if r.case.family != family:
                continue
            lines.append(f"| **{r.title}** ({counted(r)}) | | | | |")
            for e in r.entries:
                if e.reason:
                    lines.append(f"| {e.label}: not run, {e.reason.replace('|', '/')} | | | | |")
                else:
                    lines.append(f"| {e.label} | {seconds(e.median)} | {spread(e)} | {verdict(e) if e.ratio else ''} | {percent(e.of_limit)} |")
                    if len(e.parts) > 1:
                        lines[-1] = lines[-1].replace(e.label, f"{e.label} ({parts(e)})", 1)
                    if more := known(_entry(e), r.per_call):
                        lines.append(f"| {more} | | | | |")
            lines += [f"| `{note}` | | | | |" if has_columns(note) else f"| {note} | | | | |" for note in r.notes]
            if r.disturbed:
                lines.append(f"| Other processes had {percent(r.others)} of the processors meanwhile: no result. | | | | |")
    return "\n".join(lines) + "\n"


def drift_lines(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Limits that the end of the run saw differently: the machine was not quiet."""
    moved = [f"{name} {100 * (after[name] / value - 1):+.0f}%" for name, value in before.items()
             if name in after and value and abs(after[name] / value - 1) > 0.15]
    return [f"! The limits moved during the run ({', '.join(moved)}): the machine was not quiet; fractions of a limit are off."] if moved else []


def write(path: str, text: str):
    """Whole or not at all."""
    target = pathlib.Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def dumps(data: dict) -> str:
    return json.dumps(data, indent=1, allow_nan=False) + "\n"
