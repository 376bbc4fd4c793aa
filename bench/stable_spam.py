"""At a rate where AdamW's loss leaves its course in 4-bit training, does Stable-SPAM's?

    python bench/stable_spam.py                     both 4-bit recipes, three seeds, into docs/results/stable_spam.md, .png and .json (the curves)
    python bench/stable_spam.py --redraw            the picture again, of the curves of the last run

Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam", Figure 6, shows Adam's loss leaping at LLaMA-130M; this
is the demo's language model, small. As in the paper's runs no gradient is clipped. The loss is that of one fixed set of held-out windows,
so that it has no sampling noise: a spike is a rise of more than RISE above its running minimum, counted again only after a return
to within half of that.
"""
from __future__ import annotations

import argparse
import io
import json
import math
import pathlib
import platform
import statistics
from dataclasses import replace

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gradmill import demo

RECIPES, OPTIMIZERS, RATES, BETA2S = ("int4", "fp4"), ("adamw", "stablespam"), (0.01, 0.03), (0.999, 0.95)
WIDTH, DEPTH, SEQ, BATCH, STEPS, WARM_UP, EVERY, WINDOWS, RISE = 32, 4, 64, 8, 200, 20, 4, 32, 0.2


def run(recipe: str, optimizer: str, rate: float, beta2: float, seed: int, steps: int) -> list[float]:
    """The loss of the fixed windows every EVERY steps of one training."""
    demo.OPTIMIZERS[optimizer] = replace(demo.OPTIMIZERS[optimizer], options={"betas": (0.9, beta2)})
    options = demo.Options(steps=steps, recipe=recipe, optimizer=optimizer, lr=rate, width=WIDTH, depth=DEPTH, seq=SEQ, batch=BATCH, seed=seed,
                           threads=1).checked()
    half = demo.Half("gradmill", options, *demo.read_text(None)[:2])
    half.schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / WARM_UP)) for o in half.stepped]
    fixed = half._windows(half.held_out, torch.linspace(0, len(half.held_out) - SEQ - 1, WINDOWS).long())
    curve = []
    for step in range(1, steps + 1):
        half.step()
        if step % EVERY == 0:
            with torch.no_grad():
                curve.append(half.model(*fixed).item())
    return curve


def spikes(curve: list[float]) -> tuple[int, float]:
    """(spikes, largest rise above the running minimum); a nan is a spike without end."""
    low, count, up, largest = math.inf, 0, False, 0.0
    for loss in curve:
        rise = loss - (low := min(low, loss)) if math.isfinite(loss) else math.inf
        count, up = count + (rise > RISE and not up), rise > (RISE / 2 if up else RISE)
        largest = max(largest, rise)
    return count, largest


def table(results: dict) -> list[str]:
    lines = ["| recipe | beta2 | rate | optimizer | loss at the end | runs with a spike | spikes a run | largest rise, each run |", "| --- | ---: | ---: | --- |" + " ---: |" * 4]
    for (recipe, beta2, rate, optimizer), curves in results.items():
        ends, found = [curve[-1] for curve in curves], [spikes(curve) for curve in curves]
        lines.append(f"| {recipe} | {beta2:g} | {rate:g} | {demo.OPTIMIZERS[optimizer].cls} | {statistics.mean(ends):.3f} ± {statistics.stdev(ends) if len(ends) > 1 else 0:.3f} | "
                     f"{sum(count > 0 for count, _ in found)} of {len(found)} | {statistics.mean(count for count, _ in found):.1f} | "
                     f"{', '.join(f'{rise:+.2f}' for _, rise in found)} |")
    return lines


def plot(results: dict) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys(key[:3] for key in results))
    across = min(4, len(settings))
    rows = -(-len(settings) // across)
    figure = Figure(figsize=(3.5 * across, 3.2 * rows), dpi=90, layout="constrained")
    grid = figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(settings):]:
        axes.set_axis_off()
    for axes, setting in zip(grid.flat, settings):
        for optimizer, color in zip(OPTIMIZERS, ("#d95f02", "#1b6ca8")):
            for seed, curve in enumerate(results[*setting, optimizer]):
                axes.plot(range(EVERY, EVERY * len(curve) + 1, EVERY), curve, color=color, linewidth=1, label=None if seed else demo.OPTIMIZERS[optimizer].cls)
        axes.set(title="{}, beta2 {:g}, rate {:g}".format(*setting), ylim=(2.25, 4.4))
        axes.legend(frameon=False)
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel("loss of fixed held-out windows", fontsize="medium")
    FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def main():
    parser = argparse.ArgumentParser(prog="python bench/stable_spam.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--beta2s", type=float, nargs="+", default=BETA2S)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent / "docs" / "results" / "stable_spam.md")
    parser.add_argument("--redraw", action="store_true", help="train nothing: the picture of the curves in --out's .json")
    args = parser.parse_args()
    if args.redraw:
        curves = {tuple(setting): curves for setting, curves in json.loads(args.out.with_suffix(".json").read_text())}
        demo.write_whole(args.out.with_suffix(".png"), plot(curves))
        return
    torch.set_num_threads(1)
    jobs = [(recipe, beta2, rate, optimizer) for beta2 in args.beta2s for rate in args.rates for recipe in RECIPES for optimizer in OPTIMIZERS]
    results = {job: [] for job in jobs}
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=len(jobs) * args.seeds)
        for seed in range(args.seeds):
            for recipe, beta2, rate, optimizer in jobs:
                bar.update(task, description=f"{recipe} {optimizer} beta2 {beta2:g} rate {rate:g} seed {seed}")
                results[recipe, beta2, rate, optimizer].append(run(recipe, optimizer, rate, beta2, seed, args.steps))
                bar.advance(task)
    command = (f"python bench/stable_spam.py --seeds {args.seeds} --steps {args.steps} --rates {' '.join(f'{r:g}' for r in args.rates)} "
               f"--beta2s {' '.join(f'{b:g}' for b in args.beta2s)}")
    lines = [
        "# Stable-SPAM and AdamW in 4-bit recipes at a high rate", "",
        f"Command: `{command}`  ",
        f"torch {torch.__version__}, {platform.machine()}, one thread.  ",
        f"The demo's language model (width {WIDTH}, depth {DEPTH}) on Python's standard library, {args.steps} steps of {BATCH} x {SEQ} bytes, {WARM_UP} steps of",
        f"warm-up, then a constant rate; beta1 0.9, weight decay {demo.WEIGHT_DECAY}, no gradient clipping. Loss: of {WINDOWS} fixed held-out windows every {EVERY} steps;",
        f"a spike: a rise of more than {RISE} above that curve's running minimum. Loss at the end: mean and standard deviation of the seeds.", "",
        *table(results), "", f"![the curves, a line a seed]({args.out.stem}.png)", ""]
    notes = "## Notes (written by hand"  # kept when the page is written again
    old = args.out.read_text() if args.out.exists() else ""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    demo.write_whole(args.out.with_suffix(".png"), plot(results))
    curves = [json.dumps([setting, [[round(loss, 4) for loss in curve] for curve in curves]]) for setting, curves in results.items()]
    demo.write_whole(args.out.with_suffix(".json"), ("[" + ",\n".join(curves) + "]\n").encode())
    demo.write_whole(args.out, "\n".join(lines + ([old[old.index(notes):]] if notes in old else [])).encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
