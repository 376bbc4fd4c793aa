"""Evidence for docs/one_bit.md, on scikit-learn's digits and the demo's text: python bench/one_bit.py [one_bit] [delta] [biper] [block_ap]."""
from __future__ import annotations

import copy
import dataclasses
import statistics
import sys

import torch
import torch.nn.functional as F

import gradmill
from gradmill import biper as two_stages, bitdelta, demo, qat, recipes


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


def biper(x, y, xt, yt):
    """A network in floats, then BiPer's two stages from the same start; what sin(omega W) is away from its sign over the float network's weights."""
    weights = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = cnn()
        plain = train(copy.deepcopy(model), x, y, 8, 2e-3)
        weights += [plain[i].weight.detach().flatten().double() for i in (3, 6)]
        two_stages.convert(model)
        rows = [test(plain, xt, yt)]
        rows.append(test(train(model.train(), x, y, 8, 2e-3), xt, yt))
        two_stages.binarize(model)
        rows.append(test(model, xt, yt))
        rows.append(test(train(model.train(), x, y, 8, 2e-3), xt, yt))
        want = model(xt).detach()
        two_stages.pack(model)
        assert torch.equal(model(xt), want), "packed, the same"
        print(f"| {seed} | " + " | ".join(f"{loss:.3f}, {100 * accuracy:.1f} %" for loss, accuracy in rows) + " |")
    w = torch.cat(weights)
    print(f"\n| omega (weights' deviation {w.std():.3f}) | mean (sin - sign)^2 | best scale, share of sin's energy |\n| --- | --- | --- |")
    for omega in (1, 5, 10, 20, 40, 80, 160):
        wave = (omega * w).sin()
        size, energy = wave.abs().mean(), wave.square().mean()
        print(f"| {omega} | {1 - 2 * size + energy:.3f} | {1 - size.square() / energy:.3f} |")


def block_ap():
    """A small byte-level model, its blocks in 2 bits: rounded to nearest and trained."""
    text, held_out, _ = demo.read_text(None)
    windows = lambda source, count: torch.stack([torch.frombuffer(bytearray(source[i:i + 65]), dtype=torch.uint8).long()
                                                 for i in torch.randint(0, len(source) - 65, (count,)).tolist()])
    batches = lambda source, count: [(w[:, :-1], w[:, 1:]) for w in windows(source, 16 * count).split(16)]
    for seed in range(3):
        torch.manual_seed(seed)
        model = demo.LanguageModel(128, 2, 64)
        optimizer = gradmill.optim.AdamW(model.parameters(), lr=2e-3)
        for batch in batches(text, 300):
            model(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        data, unseen, ours, rates = batches(text, 128), batches(held_out, 32), [], ((None, 1e-4), (2e-4, 1e-3))
        for epochs, (lr, steps_lr) in ((0, rates[0]), (2, rates[0]), (2, rates[1])):
            small = copy.deepcopy(model)
            report = qat.block_ap(small, data, 2, 64, epochs=epochs, lr=lr, steps_lr=steps_lr, progress=False)
            ours.append((small, list(report.blocks.values())[-1].after))
        with torch.no_grad():
            losses = [statistics.mean(m(*batch).item() for batch in unseen) for m in (model, *(m for m, _ in ours))]
        print(f"| {seed} | {losses[0]:.3f} | " + " | ".join(f"{loss:.3f} ({last:.4f})" for loss, (_, last) in zip(losses[1:], ours)) + " |", flush=True)


if __name__ == "__main__":
    data = digits()
    for job, title, arguments in (
            (one_bit, "| gradients | test accuracy, mean of 3 seeds | each |\n| --- | --- | --- |", data),
            (delta, "| seed | base | fine-tuned | BitDelta, scales as they come | scales distilled |\n| --- | --- | --- | --- | --- |", data),
            (biper, "| seed | floats, 8 epochs | stage 1, 8 epochs | its signs | stage 2, 8 more |\n| --- | --- | --- | --- | --- |", data),
            (block_ap, "| seed | full precision | 2 bits, rounded to nearest | Block-AP | Block-AP, lr 2e-4 and 1e-3 |\n| --- | --- | --- | --- | --- |", ())):
        if not sys.argv[1:] or job.__name__ in sys.argv[1:]:
            print(title)
            job(*arguments)
            print()
