"""Where Adam's loss spikes in 4-bit training, does Stable-SPAM's stay calm?

    python bench/stable_spam.py                     both 4-bit recipes and fp32, three seeds, into docs/results/stable_spam.md

Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam", claim so at 130M to 1B parameters; this is
the demo's language model, with learning rates from the tuned one up. A spike is a training loss more than 0.3 above the median of
the ten before, after the warm-up.
"""
from __future__ import annotations

import argparse
import pathlib
import platform
import statistics

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gradmill import demo

RECIPES, OPTIMIZERS, RATES = ("none", "int4", "fp4"), ("adamw", "stablespam"), (7e-4, 3e-3, 1e-2, 3e-2)
WIDTH, DEPTH, STEPS, BEFORE, RISE = 64, 2, 160, 10, 0.3


def run(recipe: str, optimizer: str, rate: float, seed: int, steps: int = STEPS) -> dict[str, float]:
    """Validation loss, spikes and the largest rise of one training."""
    options = demo.Options(steps=steps, recipe=recipe, optimizer=optimizer, lr=rate, width=WIDTH, depth=DEPTH, seed=seed, threads=1).checked()
    half = demo.Half("gradmill", options, *demo.read_text(None)[:2])
    losses = [half.step()[0] for _ in range(steps)]
    first = max(BEFORE, steps // 10)
    rises = [loss - statistics.median(losses[i - BEFORE:i]) for i, loss in enumerate(losses) if i >= first]
    return {"loss": half.validate(), "spikes": sum(not rise <= RISE for rise in rises), "rise": max(rises)}


def table(results: dict) -> list[str]:
    lines = ["| recipe | rate | AdamW: loss | spikes | largest rise | StableSPAM: loss | spikes | largest rise |", "| --- |" + " ---: |" * 7]
    for recipe in RECIPES:
        for rate in RATES:
            cells = []
            for optimizer in OPTIMIZERS:
                runs = results[recipe, rate, optimizer]
                losses = [r["loss"] for r in runs]
                cells += [f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses) if len(losses) > 1 else 0:.3f}",
                          f"{statistics.mean(r['spikes'] for r in runs):.1f}", f"{max(r['rise'] for r in runs):+.2f}"]
            lines.append(f"| {'fp32' if recipe == 'none' else recipe} | {rate:g} | " + " | ".join(cells) + " |")
    return lines


def main():
    parser = argparse.ArgumentParser(prog="python bench/stable_spam.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent / "docs" / "results" / "stable_spam.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    jobs = [(recipe, rate, optimizer) for recipe in RECIPES for rate in RATES for optimizer in OPTIMIZERS]
    results = {job: [] for job in jobs}
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=len(jobs) * args.seeds)
        for recipe, rate, optimizer in jobs:
            for seed in range(args.seeds):
                bar.update(task, description=f"{recipe} {optimizer} {rate:g} seed {seed}")
                results[recipe, rate, optimizer].append(run(recipe, optimizer, rate, seed, args.steps))
                bar.advance(task)
    text = "\n".join([
        "# Stable-SPAM and AdamW in 4-bit recipes", "",
        f"Command: `python bench/stable_spam.py --seeds {args.seeds} --steps {args.steps}`  ",
        f"torch {torch.__version__}, {platform.machine()}, one thread.  ",
        f"The demo's language model (width {WIDTH}, depth {DEPTH}) on Python's standard library, {args.steps} steps of 8 x 128 bytes, warm-up and cosine",
        f"around the rate, {args.seeds} seeds. Loss: of held-out windows at the end, mean and standard deviation; spikes: training losses over {RISE} above the",
        f"median of the {BEFORE} before, mean a run; largest rise above that median, of all runs.", "", *table(results), ""])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    demo.write_whole(args.out, text.encode())
    print(text)


if __name__ == "__main__":
    main()
