"""Does training through a projection end where full-rank AdamW ends, and does a packed basis cost anything?

    python bench/projection_quality.py                 every method, three seeds, into docs/results/projections.md
    python bench/projection_quality.py --seeds 1 --steps 100
    python bench/projection_quality.py --energy        what of real gradients each basis holds, into docs/results/projection_energy.md

The demo's language model on Python's standard library, every method from the same start on the same batches. A method's learning
rate is the best of ``RATES`` for a seed that is not in the table; GaLore's variants share GaLore's. CPU time is that of the
optimizer's steps alone, counted by the process and not by the clock, so that other programs do not matter.
"""
from __future__ import annotations

import argparse
import pathlib
import statistics
import time

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gradmill import demo
from gradmill.demo import BETAS, REFRESH_EVERY, Choice
from gradmill.optim._base import Item
from gradmill.optim.projection import Projected, Projection, find_basis

WIDTH, DEPTH, BATCH, SEQ = 128, 2, 8, 64
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
TUNED_ON = 100   # a seed


def choice(cls, **options):
    projected = {} if cls == "AdamW" else {"rank": 0.25}
    return Choice(cls, 1.0, {"betas": BETAS, **({} if cls in ("AdamW", "DCTAdamW") else {"refresh_every": REFRESH_EVERY}), **options}, **projected)


#: row of the table -> (what it is, the row whose rate it takes, recipe)
METHODS = {
    "AdamW, full rank": (choice("AdamW"), None, "none"),
    "GaLore: SVD": (choice("GaLoreAdamW"), None, "none"),
    "GaLore: power iteration": (choice("GaLoreAdamW", basis="subspace"), "GaLore: SVD", "none"),
    "GaLore: power iteration, INT4 basis": (choice("GaLoreAdamW", basis="subspace", bits=4), "GaLore: SVD", "none"),
    "Q-GaLore: INT4 basis, 8-bit states": (choice("QGaLoreAdamW"), "GaLore: SVD", "none"),
    "Q-GaLore over INT8 weights": (choice("QGaLoreAdamW"), "GaLore: SVD", "int8_weights"),
    "Fira": (choice("FiraAdamW"), None, "none"),
    "FRUGAL: coordinates": (choice("FrugalAdamW"), None, "none"),
    "FRUGAL: coordinates, every 100 steps": (choice("FrugalAdamW", refresh_every=100), "FRUGAL: coordinates", "none"),
    "FRUGAL: power iteration": (choice("FrugalAdamW", basis="subspace", bits=32), "FRUGAL: coordinates", "none"),
    "DCT": (choice("DCTAdamW"), None, "none"),
}


def train(name: str, lr: float, seed: int, steps: int, texts) -> dict[str, float]:
    """Validation loss, bytes of optimizer state, and milliseconds of CPU time that an optimizer's step took."""
    what, _, recipe = METHODS[name]
    demo.OPTIMIZERS[name] = what
    half = demo.Half("gradmill", demo.Options(steps=steps, recipe=recipe, optimizer=name, lr=lr, width=WIDTH, depth=DEPTH, batch=BATCH, seq=SEQ,
                                              seed=seed, threads=1, device="cpu").checked(), *texts)
    spent = []
    half.optimizer.register_step_pre_hook(lambda *_: spent.append(-time.process_time()))
    half.optimizer.register_step_post_hook(lambda *_: spent.append(spent.pop() + time.process_time()))
    for _ in range(steps):
        half.step()
    return {"loss": half.validate(), "bytes": half.measure()["optimizer_bytes"], "ms": 1e3 * statistics.fmean(spent)}


def verdict(results, better: str, than: str, limit: float = 0.0) -> str:
    """Loss of one method over another's, seed by seed."""
    off = [a["loss"] / b["loss"] - 1 for a, b in zip(results[better], results[than])]
    mean = statistics.fmean(off)
    goal = f"at most {100 * limit:.0f}% above" if limit else "below"
    return (f"* {better}, against {than}: {100 * mean:+.2f}% ({', '.join(f'{100 * o:+.2f}' for o in off)}); goal {goal}: "
            f"{'met' if mean <= limit else 'MISSED'}")


# --- energy -----------------------------------------------------------------------------------------------
ENERGY_STEPS, ENERGY_WIDTH = 121, 256
BASES = {"power iteration from the last basis": dict(basis="subspace", bits=32), "the same, INT4": dict(basis="subspace", bits=4),
         "two power iterations from the last basis": dict(basis="subspace", bits=32, iterations=2), "DCT": dict(basis="dct"), "random": dict(basis="random"),
         "coordinates": dict(basis="coordinate")}


def energy(out: pathlib.Path):
    """|P G|^2 / |G|^2, P onto each basis, over that of the leading singular vectors, for the gradients of a training, refreshed as it goes."""
    def as_left(g, left):
        return g.t() if left else g

    options = demo.Options(steps=ENERGY_STEPS, recipe="none", optimizer="adamw", width=ENERGY_WIDTH, depth=DEPTH, batch=8, seq=128, threads=1, device="cpu")
    half = demo.Half("gradmill", options.checked(), *demo.read_text(None)[:2])
    matrices = {name: p for name, p in half.model.blocks.named_parameters() if p.dim() == 2}
    found, best, states, step = {name: {} for name in BASES}, {}, {}, 0

    @torch.no_grad()
    def look(*_):
        for number, (name, p) in enumerate(matrices.items()):
            whole = float(p.grad.square().sum())
            rank = min(p.shape) // 4
            best[name, step] = float(torch.linalg.svdvals(p.grad)[:rank].square().sum()) / whole
            for label, options in BASES.items():
                projection = Projection(rank, group_size=64, refresh_every=1, stagger=False, **options)
                state = states.setdefault((name, label), {"rng_id": number})
                part = Projected(projection, Item(p, p.grad, state, step, owner=p), {"seed": 0})
                state.update({k: v for k, v in find_basis(projection, part.grad, part.left, rank, part.basis(), 0, step, part.stream).items() if k != "low"}, refreshed_at=step)
                # Of the space that the basis spans: rounded to INT4 its vectors are no longer quite orthonormal.
                low = part.project() if part.basis() is None else as_left(p.grad, part.left) @ torch.linalg.qr(part.basis().t()).Q
                found[label][name, step] = float(low.square().sum()) / whole / best[name, step]
    half.optimizer.register_step_pre_hook(lambda *_: look() if step % REFRESH_EVERY == 1 else None)
    for step in range(1, ENERGY_STEPS + 1):
        half.step()
    later = [key for key in best if key[1] > 1]
    lines = ["# What of a gradient each basis holds", "",
             f"The demo's language model (width {ENERGY_WIDTH}, {DEPTH} blocks), AdamW, a refresh every {REFRESH_EVERY} steps of 8 x 128 bytes; rank a quarter of the smaller side. "
             "|P G|^2 / |G|^2, P onto the space the basis spans, for the gradient G of the refresh, over that of its leading singular vectors (which hold "
             f"{statistics.fmean(best[k] for k in later):.3f} of G on average, {min(best[k] for k in later):.3f} at least): mean over all {len(matrices)} matrices of the blocks, in "
             "brackets the lowest.", "", "| basis | at the first step | at later refreshes |", "| --- | ---: | ---: |"]
    for label, values in found.items():
        cells = [[values[k] for k in best if (k[1] > 1) == then] for then in (False, True)]
        lines.append(f"| {label} | " + " | ".join(f"{statistics.fmean(c):.4f} ({min(c):.4f})" for c in cells) + " |")
    worst = min(found["power iteration from the last basis"].values())
    lines += ["", f"Goal: power iteration from the last basis within 1% of the singular vectors: {'met' if worst >= 0.99 else 'MISSED'}."]
    demo.write_evidence(out, lines, "python bench/projection_quality.py --energy")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python bench/projection_quality.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--energy", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, help="default: projections.md or projection_energy.md in docs/results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    out = args.out or pathlib.Path(__file__).resolve().parent.parent / "docs" / "results" / ("projection_energy.md" if args.energy else "projections.md")
    if args.energy:
        energy(out)
        return
    texts, rates, results = demo.read_text(None)[:2], {}, {}
    tuned = [name for name, (_, of, _) in METHODS.items() if of is None]
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task("rates", total=len(tuned) * len(RATES) + len(METHODS) * args.seeds)

        def one(name, lr, seed):
            progress.update(bar, description=f"{name}, {lr:g}, seed {seed}")
            result = train(name, lr, seed, args.steps, texts)
            progress.advance(bar)
            progress.console.print(f"{name}, rate {lr:g}, seed {seed}: loss {result['loss']:.4f}")
            return result
        for name in tuned:
            rates[name] = {lr: one(name, lr, TUNED_ON)["loss"] for lr in RATES}
        best = {name: min(losses, key=losses.get) for name, losses in rates.items()}
        for name, (_, of, _) in METHODS.items():
            results[name] = [one(name, best[of or name], seed) for seed in range(args.seeds)]
    first = results["AdamW, full rank"]
    lines = [
        "# Training through projections", "",
        f"The demo's language model (width {WIDTH}, {DEPTH} blocks, 0.5 million parameters), {args.steps} steps of {BATCH} x {SEQ} bytes, warm-up and cosine; rank a "
        f"quarter of the width, scale 1, a refresh every {REFRESH_EVERY} steps unless it says otherwise (DCT: every step); the embedding, the head and the norms take plain steps. "
        f"Validation loss over {demo.VALIDATION_WINDOWS} held-out windows: mean of seeds 0 to {args.seeds - 1}, in brackets the lowest and the highest. Off: over full-rank "
        "AdamW's of the same seed, less 1. CPU time of the optimizer's step alone, one thread, refreshes included.", "",
        "| method | loss | off | bytes of state | of AdamW's | CPU ms a step | peak rate |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, (_, of, _) in METHODS.items():
        losses = [r["loss"] for r in results[name]]
        off = 100 * statistics.fmean(r["loss"] / f["loss"] - 1 for r, f in zip(results[name], first))
        size = results[name][0]["bytes"]
        lines.append(f"| {name} | {statistics.fmean(losses):.4f} ({min(losses):.4f}, {max(losses):.4f}) | {off:+.2f}% | {size:,} | {size / first[0]['bytes']:.3f} | "
                     f"{statistics.fmean(r['ms'] for r in results[name]):.2f} | {best[of or name]:g} |")
    lines += ["", "Seed by seed:", "",
              verdict(results, "GaLore: power iteration, INT4 basis", "GaLore: power iteration", 0.01),
              verdict(results, "GaLore: power iteration", "GaLore: SVD", 0.01),
              *(verdict(results, name, "GaLore: SVD") for name in list(METHODS)[6:]), "",
              f"Rates tried, with the validation loss at seed {TUNED_ON}:", "",
              "| method | " + " | ".join(f"{lr:g}" for lr in RATES) + " |", "| --- |" + " ---: |" * len(RATES),
              *(f"| {name} | " + " | ".join(f"{losses[lr]:.4f}" for lr in RATES) + " |" for name, losses in rates.items())]
    demo.write_evidence(out, lines, "python bench/projection_quality.py")


if __name__ == "__main__":
    main()
