"""Evidence for docs/one_bit.md, on scikit-learn's digits: python bench/one_bit.py."""
from __future__ import annotations

import copy
import dataclasses
import statistics

import torch
import torch.nn.functional as F

import gradmill
from gradmill import bitdelta, recipes


def digits():
    from sklearn.datasets import load_digits
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order][:1400], y[order][:1400], x[order][1400:], y[order][1400:]


def cnn():
    return torch.nn.Sequential(torch.nn.Unflatten(1, (1, 8)), torch.nn.Conv2d(1, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.Conv2d(32, 32, 3, padding=1),
                               torch.nn.BatchNorm2d(32), torch.nn.MaxPool2d(2), torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.BatchNorm2d(64), torch.nn.MaxPool2d(2),
                               torch.nn.Flatten(), torch.nn.Linear(256, 10))


def train(model, x, y, epochs, lr):
    optimizer = gradmill.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def test(model, x, y):
    out = model.eval()(x)
    return F.cross_entropy(out, y).item(), (out.argmax(1) == y).float().mean().item()


def one_bit(x, y, xt, yt):
    kinds = {"fp32 gradients quantised to 4 bits, nothing pruned": (4, "none"), "sampled (the paper, default)": (4, "sample"), "largest (the official code)": (4, "top"),
             "1 bit, nothing pruned (per-sample, per-channel quantisation)": (1, "none")}
    for name, how in kinds.items():
        accuracies = []
        for seed in range(3):
            torch.manual_seed(seed)
            model = cnn()
            gradmill.convert(model, dataclasses.replace(recipes.ONE_BIT_FQT, one_bit=how))
            accuracies.append(100 * test(train(model, x, y, 8, 2e-3), xt, yt)[1])
        print(f"| {name} | {statistics.mean(accuracies):.1f} | {', '.join(f'{a:.1f}' for a in accuracies)} |")


def delta(x, y, xt, yt):
    """A base that knows upright digits, fine-tuned to digits on their side."""
    for seed in range(3):
        torch.manual_seed(seed)
        base = train(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)),
                     x, y, 15, 1e-3)
        tuned = train(copy.deepcopy(base), torch.cat((x, x.rot90(1, (1, 2)))), torch.cat((y, y)), 6, 3e-4)
        side, label = torch.cat((xt, xt.rot90(1, (1, 2)))), torch.cat((yt, yt))
        small = bitdelta.compress(base, tuned)
        before = test(small, side, label)
        bitdelta.distill(small, tuned, list(torch.cat((x, x.rot90(1, (1, 2)))).split(128)), 200, progress=False)
        row = [test(m, side, label) for m in (base, tuned)] + [before, test(small, side, label)]
        print(f"| {seed} | " + " | ".join(f"{loss:.3f}, {100 * accuracy:.1f} %" for loss, accuracy in row) + " |")


if __name__ == "__main__":
    data = digits()
    print("| gradients | test accuracy, mean of 3 seeds | each |\n| --- | --- | --- |")
    one_bit(*data)
    print("\n| seed | base | fine-tuned | BitDelta, scales as they come | scales distilled |\n| --- | --- | --- | --- | --- |")
    delta(*data)
