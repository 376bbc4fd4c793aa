"""Does training in a recipe end where fp32 ends? And how far is a recipe's gradient from fp32's?

    python bench/recipes.py                              every task and recipe, three seeds, into docs/results
    python bench/recipes.py --task digits --recipe int8,fp4 --seeds 1

A task is a function (recipe name, seed) -> {"loss": validation loss, ...}; ``TASKS`` says what its table is called. Recipes run
beside "fp32" (torch's layers, from the same start, on the same batches) and "fp32, noise" (the same with 1e-6 of relative noise on
the starting weights): differences of its size mean nothing. Weight-only recipes do not train: fp32's result is packed.
"""
from __future__ import annotations

import argparse
import copy
import functools
import pathlib
import statistics
import time
from typing import Callable, NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional as F

import gradmill
from gradmill import demo
from gradmill.recipes import RECIPES

NOISE = "fp32, noise"
#: What a recipe's validation loss may lie above fp32's, as a fraction.
LIMITS = {"int8": 0.01, "int8_switchback": 0.01, "int8_weights": 0.01, "fp8_tensor": 0.01, "fp8_row": 0.01, "fp8_block": 0.01, "int4": 0.05, "fp4": 0.05,
          "mxfp4": 0.05}


# --- task: a small CNN on scikit-learn's digits -----------------------------------------------------------
EPOCHS, BATCH, LR = 14, 64, 2e-3


def cnn() -> nn.Sequential:
    """8x8 images to 10 classes, 25 thousand parameters. GELU for the sake of the comparison: with ReLU 1e-6 of noise on the starting
    weights moved the validation loss by 1 to 6%, which hides what a recipe does."""
    def block(*arguments, **options):
        return nn.Sequential(nn.Conv2d(*arguments, **options), nn.GroupNorm(4, arguments[1]), nn.GELU())

    model = nn.Sequential()
    for name, layer in {"c1": block(1, 16, 3, padding=1), "c2": block(16, 16, 3, padding=1), "c3": block(16, 32, 3, stride=2, padding=1),
                        "c4": block(32, 16, 1), "flat": nn.Flatten(), "linear": nn.Linear(256, 64), "gelu": nn.GELU(), "head": nn.Linear(64, 10)}.items():
        model.add_module(name, layer)
    return model


@functools.lru_cache(maxsize=None)
def images():
    """(images, classes) to train on and to validate on: every third of the 1797 held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
    held = torch.arange(len(x)) % 3 == 2
    return x[~held], y[~held], x[held], y[held]


@functools.lru_cache(maxsize=None)
def trained_cnn(recipe: str, seed: int, epochs: int = EPOCHS) -> nn.Module:
    x, y, *_ = images()
    torch.manual_seed(seed)
    model, order = prepared(cnn(), recipe), torch.Generator().manual_seed(seed)
    optimizer = gradmill.optim.AdamW(model.parameters(), lr=LR, weight_decay=1e-2)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps + 1, pct_start=0.2)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order)[:len(x) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model


def digits(recipe: str, seed: int) -> dict[str, float]:
    """Validation loss and accuracy after training in a recipe."""
    if recipe in RECIPES and RECIPES[recipe].frozen:
        model = copy.deepcopy(trained_cnn("fp32", seed))
        gradmill.convert(model, recipe)
    else:
        model = trained_cnn(recipe, seed)
    *_, x, y = images()
    with torch.no_grad():
        scores = model(x)
    return {"loss": F.cross_entropy(scores, y).item(), "accuracy": (scores.argmax(1) == y).float().mean().item()}


def prepared(model: nn.Module, recipe: str) -> nn.Module:
    """The model in that recipe, "fp32" or NOISE."""
    if recipe == NOISE:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    elif recipe != "fp32":
        gradmill.convert(model, recipe)
    return model


# --- task: the demo's language model ----------------------------------------------------------------------
STEPS = 200


@functools.lru_cache(maxsize=None)
def texts():
    return demo.read_text(None)[:2]


@functools.lru_cache(maxsize=None)
def trained_demo(recipe: str, seed: int) -> demo.Half:
    options = demo.Options(steps=STEPS, recipe="none" if recipe in ("fp32", NOISE) else recipe, optimizer="adamw", width=128, depth=2, seed=seed, threads=1)
    half = demo.Half("gradmill", options.checked(), *texts())
    if recipe == NOISE:
        prepared(half.model, recipe)
    for _ in range(STEPS):
        half.step()
    return half


def language(recipe: str, seed: int) -> dict[str, float]:
    """Validation loss after training in a recipe."""
    if not (recipe in RECIPES and RECIPES[recipe].frozen):
        return {"loss": trained_demo(recipe, seed).validate()}
    half = copy.copy(trained_demo("fp32", seed))
    half.model = copy.deepcopy(half.model)
    gradmill.convert(half.model, recipe)
    return {"loss": half.validate()}


class Task(NamedTuple):
    run: Callable[[str, int], dict[str, float]]
    title: str
    about: str


TASKS = {"digits": Task(digits, "A CNN on scikit-learn's digits in every recipe", f"""\
Convolutions 1-16-16-32 (3x3, the third of stride 2) and 32-16 (1x1), each with GroupNorm and GELU, linear layers 256-64-10; everything
but the head is converted, the first convolution included. {EPOCHS} epochs over 1198 images of 8x8 in batches of {BATCH}, gradmill's AdamW with fp32 states,
one-cycle rate up to {LR:g}, weight decay 0.01; 599 images held out, cross-entropy."""),
         "language": Task(language, "The demo's language model in every recipe", f"""\
A LLaMA-style byte-level model (width 128, 2 blocks, 0.5 million parameters) on Python's standard library; the blocks' linear layers are
converted. {STEPS} steps of 8 x 128 bytes, gradmill's AdamW with fp32 states at the demo's rate; cross-entropy over {demo.VALIDATION_WINDOWS} held-out windows.""")}


# --- gradients --------------------------------------------------------------------------------------------
def layer_gradients(model: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> dict[str, tuple]:
    """Layer -> (gradient of its weight or None, gradient of its input), of one batch."""
    inputs, handles = {}, []

    def keep(name):
        def hook(module, arguments):
            x = arguments[0] if arguments[0].requires_grad else arguments[0].detach().requires_grad_()
            x.retain_grad()
            inputs[name] = x
            return (x, *arguments[1:])
        return hook

    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and name != "head"}
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(keep(name)))
    model.zero_grad()
    torch.manual_seed(0)
    loss(model).backward()
    for handle in handles:
        handle.remove()
    return {name: (layer.weight.grad, inputs[name].grad) for name, layer in layers.items()}


def compare(got, want) -> str:
    """Cosine and relative error."""
    got, want = got.double().flatten(), want.double().flatten()
    return f"{F.cosine_similarity(got, want, 0).item():.4f} {((got - want).norm() / want.norm()).item():.3f}"


def gradient_table(model, loss, names) -> list[str]:
    model.zero_grad()
    want = layer_gradients(copy.deepcopy(model), loss)
    lines = ["| recipe | of | " + " | ".join(want) + " |", "| --- | --- |" + " ---: |" * len(want)]
    for recipe in names:
        converted = copy.deepcopy(model)
        gradmill.convert(converted, recipe)
        got = layer_gradients(converted, loss)
        which = 1 if RECIPES[recipe].frozen else 0
        lines.append(f"| {recipe} | {('dW', 'dX')[which]} | " + " | ".join(compare(got[n][which], want[n][which]) for n in want) + " |")
    return lines


def trained_language_model(steps=60, width=64, depth=2, seq=64, batch=8):
    """The demo's model, small, some steps into its training; and the loss of a batch it has not seen."""
    text = torch.frombuffer(bytearray(demo.read_text(None)[0]), dtype=torch.uint8)
    torch.manual_seed(0)
    model, where = demo.LanguageModel(width, depth, seq), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=demo.BETAS, weight_decay=demo.WEIGHT_DECAY)

    def windows():
        starts = torch.randint(len(text) - seq, (batch,), generator=where)
        parts = torch.stack([text[s:s + seq + 1] for s in starts.tolist()]).long()
        return parts[:, :-1], parts[:, 1:]
    for _ in range(steps):
        optimizer.zero_grad()
        model(*windows()).backward()
        optimizer.step()
    last = windows()
    return model, lambda m: m(*last)


def gradients(out: pathlib.Path, names, progress):
    bar = progress.add_task("gradients", total=2)
    x, y, *_ = images()
    parts = ["# Gradients in every recipe, layer by layer", "",
             "Cosine and relative error |g - g32| / |g32| against fp32 gradients of the same weights and the same batch: of the layer's weight "
             "(dW), of its input where the recipe freezes the weight (dX). Errors of the layers after it are in each: the forward pass and dY "
             "are the recipe's too. Recipes that round stochastically show one draw, whose error is mostly noise that averages out.", "",
             f"## The digits' CNN after 2 epochs in fp32, {BATCH} images", ""]
    parts += gradient_table(trained_cnn("fp32", 0, 2), lambda m: F.cross_entropy(m(x[:BATCH]), y[:BATCH]), names)
    progress.advance(bar)
    model, loss = trained_language_model()
    parts += ["", "## The demo's language model (width 64, depth 2) after 60 steps in fp32, 8 x 64 bytes", ""]
    parts += gradient_table(model, loss, names)
    progress.advance(bar)
    demo.write_evidence(out / "recipes_gradients.md", parts, "python bench/recipes.py")


# --- tables -----------------------------------------------------------------------------------------------
def train(name: str, task: Task, out: pathlib.Path, names, seeds: int, goal_seeds: int, progress):
    rows, started = ["fp32", NOISE, *names], time.perf_counter()
    count = {recipe: goal_seeds if recipe in LIMITS else seeds for recipe in rows} | {"fp32": max(seeds, goal_seeds)}
    bar, results = progress.add_task(name, total=sum(count.values())), {}
    for recipe in rows:
        progress.update(bar, description=f"{name}: {recipe}")
        for seed in range(count[recipe]):
            results.setdefault(recipe, []).append(task.run(recipe, seed))
            progress.advance(bar)
    metrics = list(results["fp32"][0])
    lines = [f"# {task.title}", "", task.about, "",
             f"{seeds} seeds{f', {goal_seeds} where there is a goal' if goal_seeds != seeds else ''}; start and order of the batches are fp32's of the same seed. A cell is the mean, in brackets the seeds' lowest and highest. "
             "Off: validation loss over fp32's of the same seed, less 1: mean ± its standard error. Goal: how far off the mean may be.", "",
             "| recipe | " + " | ".join(metrics) + " | off | goal |", "| --- |" + " ---: |" * (len(metrics) + 2)]
    missed = []
    for recipe in rows:
        cells = []
        for metric in metrics:
            values = [r[metric] for r in results[recipe]]
            cells.append(f"{statistics.mean(values):.4f} ({min(values):.4f}, {max(values):.4f})")
        off = [r["loss"] / f["loss"] - 1 for r, f in zip(results[recipe], results["fp32"])]
        error = 100 * statistics.stdev(off) / len(off) ** 0.5 if len(off) > 1 else 0.0
        cells.append("" if recipe == "fp32" else f"{100 * statistics.mean(off):+.2f} ± {error:.2f}% ({100 * min(off):+.2f}, {100 * max(off):+.2f})")
        limit = LIMITS.get(recipe)
        met = limit is None or statistics.mean(off) <= limit
        cells.append("" if limit is None else f"{100 * limit:.0f}%: {'met' if met else 'MISSED'}")
        missed += [] if met else [f"{recipe} ({100 * statistics.mean(off):+.2f}%)"]
        lines.append(f"| {recipe}{' (packed after fp32)' if recipe in RECIPES and RECIPES[recipe].frozen else ''} | " + " | ".join(cells) + " |")
    lines += ["", f"Missed: {', '.join(missed) or 'none'}. The whole table: {time.perf_counter() - started:.0f} s."]
    demo.write_evidence(out / f"recipes_{name}.md", lines, "python bench/recipes.py")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python bench/recipes.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default=",".join((*TASKS, "gradients")), help="comma-separated: " + ", ".join((*TASKS, "gradients")))
    parser.add_argument("--recipe", default=",".join(RECIPES), help="comma-separated names (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--goal-seeds", type=int, help="of recipes that have a goal to meet (default: --seeds); seeds scatter by more than 1 %%, and only a mean of many tells")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent / "docs" / "results")
    args = parser.parse_args(argv)
    tasks, names = args.task.split(","), args.recipe.split(",")
    for kind, given, known in (("task", tasks, (*TASKS, "gradients")), ("recipe", names, RECIPES)):
        for name in given:
            if name not in known:
                parser.error(f"--{kind} {name}: it must be one of {', '.join(known)}")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        for task in tasks:
            if task == "gradients":
                gradients(args.out, names, progress)
            else:
                train(task, TASKS[task], args.out, names, args.seeds, args.goal_seeds or args.seeds, progress)


if __name__ == "__main__":
    main()
