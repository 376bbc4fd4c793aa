"""Evidence for docs/one_bit.md, into docs/results/one_bit.md: python bench/one_bit.py [one_bit] [unbiased] [language] [delta] [biper] [block_ap].

On scikit-learn's digits, three of scikit-image's photographs (pip install scikit-image) and the demo's text.
"""
from __future__ import annotations

import argparse
import copy
import dataclasses
import pathlib
import statistics

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


def textures():
    """Which of three photographs of scikit-image's (brick, grass, gravel) an 8x8 patch is of: trained on their left three quarters, tested on the rest."""
    from skimage import data
    generator, sets = torch.Generator().manual_seed(0), ([], [], [], [])
    for label, photo in enumerate((data.brick(), data.grass(), data.gravel())):
        photo = torch.tensor(photo, dtype=torch.float32)
        photo = (photo - photo.mean()) / photo.std()
        for part, at, count in ((photo[:, :384], 0, 500), (photo[:, 384:], 2, 300)):
            corners = [torch.randint(0, length - 8, (count,), generator=generator).tolist() for length in part.shape]
            sets[at].extend(part[i:i + 8, j:j + 8] for i, j in zip(*corners))
            sets[at + 1].extend([label] * count)
    return torch.stack(sets[0]), torch.tensor(sets[1]), torch.stack(sets[2]), torch.tensor(sets[3])


KINDS = {"4 bits, nothing pruned": (4, "none"), "sampled (the paper, default)": (4, "sample"), "largest (the official code)": (4, "top"),
         "1 bit, nothing pruned (per sample and channel)": (1, "none")}


def one_bit(x, y, xt, yt):
    """The network learns upright digits in floats, then another task with one_bit_fqt."""
    turn = lambda images: images.rot90(1, (1, 2))
    bases = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        bases.append(train(cnn(), x, y, 8, 2e-3))
    for title, (x, y, xt, yt) in (("digits on their side", (turn(x), y, turn(xt), yt)), ("textures", textures())):
        for name, how in {"floats": None, **KINDS}.items():
            accuracies = []
            for seed, base in enumerate(bases):
                torch.manual_seed(seed)
                model = copy.deepcopy(base).train()
                model[-1] = torch.nn.Linear(256, 1 + int(y.max()))
                if how is not None:
                    gradmill.convert(model, dataclasses.replace(recipes.ONE_BIT_FQT, one_bit=how))
                accuracies.append(100 * test(train(model, x, y, 4, 2e-3), xt, yt)[1])
            say(f"| {title} | {name} | {statistics.mean(accuracies):.1f} | {', '.join(f'{a:.1f}' for a in accuracies)} |")


def unbiased(x, y, xt, yt):
    """The second convolution's gradient, drawn again and again, against the straight-through gradient without quantisation."""
    torch.manual_seed(0)
    model = train(cnn(), x, y, 2, 2e-3)
    conv, seen = model[3], {}
    hook = conv.register_forward_hook(lambda m, inputs, output: seen.update(x=inputs[0].detach(), y=output) or output.retain_grad())
    F.cross_entropy(model(x[:64]), y[:64]).backward()
    hook.remove()
    x, dy, w = seen["x"], seen["y"].grad, conv.weight.detach()
    scales, sign = w.flatten(1).abs().mean(1, keepdim=True), lambda t: torch.where(t < 0, -1.0, 1.0)
    patches = F.unfold(F.pad(sign(x), (1, 1, 1, 1), value=1.0), 3).transpose(1, 2).reshape(-1, w[0].numel())  # padding counts as +
    rows = dy.permute(0, 2, 3, 1).reshape(-1, len(w))
    exact = (scales * (rows.t() @ patches)).view_as(w).double(), (torch.nn.grad.conv2d_input(x.shape, sign(w) * scales.view(-1, 1, 1, 1), dy, padding=1) * (x.abs() <= 1)).double()
    for name, how in KINDS.items():
        recipe, sums, cells = dataclasses.replace(recipes.ONE_BIT_FQT, one_bit=how), [torch.zeros_like(e) for e in exact], []
        for draw in range(1, 1001):
            a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
            out = gradmill.functional.conv2d(a, b, None, 1, 1, recipe=recipe, steps=scales)
            for total, g in zip(sums, torch.autograd.grad(out, (b, a), dy)):
                total += g
            if draw in (1, 10, 100, 1000):
                cells.append(" / ".join(f"{((total / draw - e).norm() / e.norm()).item():.3f}" for total, e in zip(sums, exact)))
        say(f"| {name} | " + " | ".join(cells) + " |")


def delta(x, y, xt, yt):
    """A base that knows upright digits, fine-tuned to digits on their side."""
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        base = train(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)),
                     x, y, 15, 1e-3)
        tuned = train(copy.deepcopy(base), torch.cat((x, x.rot90(1, (1, 2)))), torch.cat((y, y)), 6, 3e-4)
        side, label = torch.cat((xt, xt.rot90(1, (1, 2)))), torch.cat((yt, yt))
        small = bitdelta.compress(base, tuned)
        before = test(small, side, label)
        bitdelta.distill(small, tuned, list(torch.cat((x, x.rot90(1, (1, 2)))).split(128)), 200, progress=False)
        row = [test(m, side, label) for m in (base, tuned)] + [before, test(small, side, label)]
        say(f"| {seed} | " + " | ".join(f"{loss:.3f}, {100 * accuracy:.1f} %" for loss, accuracy in row) + " |")


def language():
    """The demo's model on the standard library's sources, fine-tuned to English: a small change, as BitDelta is meant for."""
    code, *_ = demo.read_text(None)
    from pydoc_data.topics import topics
    english = "\n".join(topics.values()).encode()
    english, held_out = english[:-40000], english[-40000:]
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        base = trained_language_model(code, 300)
        tuned, unseen = copy.deepcopy(base), batches(held_out, 32)
        optimizer = gradmill.optim.AdamW(tuned.parameters(), lr=1e-4, weight_decay=0.0)
        for batch in batches(english, 100):
            tuned(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        small = bitdelta.compress(base, tuned)
        losses = [perplexed(m, unseen) for m in (base, tuned, small)]
        bitdelta.distill(Logits(small), Logits(tuned), [inputs for inputs, _ in batches(english, 100)], 100, progress=False)
        losses.append(perplexed(small, unseen))
        say(f"| {seed} | " + " | ".join(f"{loss:.3f}" for loss in losses) + f" | {100 * (losses[2] / losses[1] - 1):+.1f} % | {100 * (losses[3] / losses[1] - 1):+.1f} % |")


class Logits(torch.nn.Module):
    """The demo's model, whose forward returns a loss, as BitDelta's distillation wants it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        m, h = self.model, self.model.embedding(tokens)
        for block in m.blocks:
            h = block(h, m.cos, m.sin)
        return m.head(m.norm(h))


def biper(x, y, xt, yt):
    """A network in floats, then BiPer's two stages from the same start; what sin(omega W) is away from its sign over the float network's weights."""
    weights = []
    for seed in range(SEEDS):
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
        say(f"| {seed} | " + " | ".join(f"{loss:.3f}, {100 * accuracy:.1f} %" for loss, accuracy in rows) + " |")
    w = torch.cat(weights)
    for line in ("", f"| omega (weights' deviation {w.std():.3f}) | mean (sin - sign)^2 | share of energy left |", "| ---: | ---: | ---: |"):
        say(line)
    for omega in (1, 5, 10, 20, 40, 80, 160):
        wave = (omega * w).sin()
        size, energy = wave.abs().mean(), wave.square().mean()
        say(f"| {omega} | {1 - 2 * size + energy:.3f} | {1 - size.square() / energy:.3f} |")


def batches(source, count):
    """(inputs, next bytes) of 16 windows of 64 bytes."""
    starts = torch.randint(0, len(source) - 65, (16 * count,)).tolist()
    windows = torch.stack([torch.frombuffer(bytearray(source[i:i + 65]), dtype=torch.uint8).long() for i in starts])
    return [(w[:, :-1], w[:, 1:]) for w in windows.split(16)]


def trained_language_model(text, steps):
    model = demo.LanguageModel(128, 2, 64)
    optimizer = gradmill.optim.AdamW(model.parameters(), lr=2e-3)
    for batch in batches(text, steps):
        model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def perplexed(model, unseen) -> float:
    return statistics.mean(model(*batch).item() for batch in unseen)


def block_ap():
    """A small byte-level model, its blocks in 2 bits: rounded to nearest and trained."""
    text, held_out, _ = demo.read_text(None)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model = trained_language_model(text, 300)
        data, unseen, ours, rates = batches(text, 128), batches(held_out, 32), [], ((None, 1e-4), (2e-4, 1e-3))
        for epochs, (lr, steps_lr) in ((0, rates[0]), (2, rates[0]), (2, rates[1])):
            small = copy.deepcopy(model)
            report = qat.block_ap(small, data, 2, 64, epochs=epochs, lr=lr, steps_lr=steps_lr, progress=False)
            ours.append((small, list(report.blocks.values())[-1].after))
        losses = [perplexed(m, unseen) for m in (model, *(m for m, _ in ours))]
        back = [f"{100 * (losses[1] - loss) / (losses[1] - losses[0]):.0f} %" for loss in losses[2:]]
        say(f"| {seed} | {losses[0]:.3f} | " + " | ".join(f"{loss:.3f} ({last:.4f})" for loss, (_, last) in zip(losses[1:], ours)) + f" | {', '.join(back)} |")


#: Section -> (function, what was done, the table's head).
JOBS = {
    "one_bit": (one_bit, "1-Bit FQT fine-tunes a CNN", "A CNN 32-32-64 (BatchNorm, 3x3) trained in fp32 on upright digits (1400 of scikit-learn's, 8x8), given a new last layer and fine-tuned for 4 epochs of "
                "AdamW at 2e-3: to digits turned by 90 degrees (397 to test), and to which of scikit-image's three textures an 8x8 patch is of (1500 patches of the left three quarters, 900 of the rest to "
                "test). `one_bit_fqt` is in the two middle convolutions, forward in signs in every row but the first; rows differ in how gradients are quantised. 4-bit gradients of a quarter of "
                "the groups cost what 1-bit gradients of all do. Test accuracy in percent.",
                "| task | gradients | mean | seeds |\n| --- | --- | ---: | --- |"),
    "unbiased": (unbiased, "Its gradient is unbiased", "Mean of so many drawn gradients, dW / dX, of the second convolution after two epochs (64 images), against the straight-through gradient without quantisation: "
                 "norm of the difference over its norm. Of an unbiased estimate it falls by 3.2 from column to column.",
                 "| gradients | 1 draw | 10 | 100 | 1000 |\n| --- | ---: | ---: | ---: | ---: |"),
    "language": (language, "BitDelta of a fine-tuned language model", "The demo's byte-level model (width 128, 2 blocks), 300 steps on the standard library's sources, fine-tuned for 100 steps of AdamW at 1e-4 to English "
                 "(pydoc_data.topics); loss on 40,000 held-out bytes of it. All linear layers are one bit a weight away from the base. Distilled: 100 steps of the scales. Goal: within 2 %.",
                 "| seed | base | fine-tuned | BitDelta, scales as they come | distilled | over fine-tuned | distilled, over fine-tuned |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |"),
    "delta": (delta, "BitDelta where the fine-tune moves far", "An MLP 64-256-256-10 trained on upright digits, fine-tuned to upright and turned ones; loss and accuracy on both.",
              "| seed | base | fine-tuned | BitDelta, scales as they come | scales distilled |\n| --- | --- | --- | --- | --- |"),
    "biper": (biper, "BiPer", "The CNN of the first table from the start, its two middle convolutions binary; test loss and accuracy on upright digits. Below: how far sin(omega W) is from its sign over the float networks' "
              "weights, the mean square, and the share of sin's energy that the best scale leaves.",
              "| seed | floats, 8 epochs | stage 1, 8 epochs | its signs | stage 2, 8 more |\n| --- | --- | --- | --- | --- |"),
    "block_ap": (block_ap, "EfficientQAT's Block-AP in 2 bits", "The demo's model as above; its blocks in 2 bits, groups of 64; 2 epochs over 128 batches of 16 x 64 bytes; loss on held-out files, in brackets the last block's "
                 "own. The last column: how much of the loss that rounding costs is taken back.",
                 "| seed | full precision | 2 bits, rounded to nearest | Block-AP | Block-AP, rates 2e-4 and 1e-3 | taken back |\n| --- | --- | --- | --- | --- | --- |"),
}
TAKES_NO_DIGITS = ("language", "block_ap")
SEEDS = 3
lines: list[str] = []


def say(line: str):
    lines.append(line)
    print(line, flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python bench/one_bit.py", description=__doc__)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"one of {', '.join(JOBS)} (default: all); the other sections of the page stay")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent / "docs" / "results")
    args = parser.parse_args(argv)
    for name in args.jobs:
        if name not in JOBS:
            parser.error(f"{name}: it must be one of {', '.join(JOBS)}")
    torch.set_num_threads(1)
    data = digits()
    for name in args.jobs or JOBS:
        job, title, about, head = JOBS[name]
        lines.clear()
        for line in ("## " + title, "", about, "", *head.split("\n")):
            say(line)
        job(*(() if name in TAKES_NO_DIGITS else data))
        say("")
        page = args.out / "one_bit.md"
        _, *sections = page.read_text().split("\n## ") if page.exists() else ("",)
        held = {section.split("\n")[0]: section.split("\n`python")[0].rstrip() for section in sections}  # the last one has the foot
        held[title] = "\n".join(lines)[3:].rstrip()
        parts = [f"## {held[t]}" for _, t, *_ in JOBS.values() if t in held]
        demo.write_evidence(page, ["\n\n".join([f"# One bit: evidence, {SEEDS} seeds", *parts])], "python bench/one_bit.py")


if __name__ == "__main__":
    main()
