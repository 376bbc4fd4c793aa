"""Evidence for docs/codebook.md and docs/bct.md on the demo's text: python bench/compressed.py [codebook] [bct] [--seeds N] [--trained N] [--steps N] [--out FOLDER].

Small models, one thread; writes codebook.md and bct.md.
"""
from __future__ import annotations

import argparse
import copy
import functools
import math
import pathlib
import statistics
import time

import torch
from torch import nn

import gradmill
from gradmill import bct, codebook, demo, ops
from gradmill.reference.quant import fake_quantize_parameters

SEQ, WIDTH, DEPTH, BATCH, GROUP, WINDOWS = 64, 128, 2, 16, 64, 128


class EncoderModel(nn.Module):
    """The demo's task on torch's own encoder layers: bytes in, cross-entropy of the next byte out."""

    def __init__(self):
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, WIDTH), nn.Embedding(SEQ, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        self.register_buffer("mask", torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x, y):
        h = self.embedding(x) + self.position(torch.arange(x.shape[1]))
        return nn.functional.cross_entropy(self.head(self.encoder(h, self.mask, is_causal=True)).flatten(0, 1), y.flatten())


class Text:
    def __init__(self):
        train, held_out, _ = demo.read_text(None)
        self.train, self.held_out = (torch.frombuffer(bytearray(t), dtype=torch.uint8) for t in (train, held_out))

    def batch(self, generator):
        return self._windows(self.train, torch.randint(len(self.train) - SEQ - 1, (BATCH,), generator=generator))

    @staticmethod
    def _windows(text, starts):
        w = torch.stack([text[s:s + SEQ + 1] for s in starts.tolist()]).long()
        return w[:, :-1], w[:, 1:]

    @torch.no_grad()
    def loss(self, model):
        """Mean over WINDOWS windows spread evenly over the held-out text."""
        starts = torch.linspace(0, len(self.held_out) - SEQ - 1, WINDOWS).long().split(32)
        return statistics.mean(model.eval()(*self._windows(self.held_out, s)).item() for s in starts)


def train(model, text, steps, lr, seed, parameters=None, indices_lr=0.0):
    """AdamW along a cosine; with ``indices_lr`` the indices step, too."""
    model.train()
    parameters = list(model.parameters()) if parameters is None else parameters
    where, optimizer = torch.Generator().manual_seed(seed), gradmill.optim.AdamW(parameters, lr=lr, betas=demo.BETAS, weight_decay=0.0)
    others = [codebook.Indices(model, lr=indices_lr, seed=seed)] if indices_lr else []
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: min(1.0, (i + 1) / 20) * (0.05 + 0.475 * (1 + math.cos(math.pi * i / steps)))) for o in (optimizer, *others)]
    for _ in range(steps):
        model(*text.batch(where)).backward()
        for o in (optimizer, *others):
            o.step()
            o.zero_grad()
        for s in schedules:
            s.step()
    for o in others:
        o.stop()
    return model


@functools.lru_cache(maxsize=None)
def trained(make, text, steps, seed):
    """(a model after ``steps`` in fp32, its loss, four calibration batches)."""
    torch.manual_seed(seed)
    model = train(make(), text, steps, 2e-3, seed)
    print(f"trained {make.__name__} {seed}: {text.loss(model):.4f}", flush=True)
    return model, text.loss(model), [text.batch(torch.Generator().manual_seed(100 + i)) for i in range(4)]


def llama():
    return demo.LanguageModel(WIDTH, DEPTH, SEQ)


def nearest(model, bits):
    """Rounded to nearest in groups of GROUP with a zero point (1 bit: sign and mean magnitude), and the exact factor in gradmill's formats: fp32 scale, uint8 zero point."""
    model, before, after = copy.deepcopy(model), 0, 0.0
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            w = layer.weight.data
            groups = w.numel() / GROUP
            if bits == 1:
                g = w.view(-1, GROUP)
                w.copy_((g.sign() * g.abs().mean(1, keepdim=True)).view_as(w))
            else:
                w.copy_(ops.fake_quantize(w, *fake_quantize_parameters(w, bits, GROUP), bits, GROUP, torch.float32))
            before, after = before + w.nbytes, after + w.numel() * bits / 8 + groups * (4 if bits == 1 else 5)
    return model, before / after


def jlcm(text, args):
    seeds, rows = range(args.seeds), {}
    for seed in seeds:
        base, full, calibration = trained(llama, text, args.trained, seed)
        rows.setdefault("full precision", []).append(full)
        for bits in range(1, 9):
            row = {}
            model, row["nearest factor"] = nearest(base, bits)
            row["nearest"] = text.loss(model)
            for name, how in (("fit", {}), ("calibrated", {"calibration": calibration}), ("shared", {"calibration": calibration, "shared": True})):
                model = copy.deepcopy(base)
                report = codebook.fit(model, bits, progress=False, **how)
                row[name], row[f"{name} factor"] = text.loss(model), report.bytes_before / report.bytes_after
                if name == "calibrated" and bits <= 4:
                    books = [p for n, p in model.named_parameters() if n.endswith("codebooks")]
                    start = copy.deepcopy(model)
                    row["codebooks"] = text.loss(train(model, text, args.steps, 3e-3 / 2 ** (bits - 1), seed + 50, books))
                    books = [p for n, p in start.named_parameters() if n.endswith("codebooks")]
                    row["both"] = text.loss(train(start, text, args.steps, 3e-3 / 2 ** (bits - 1), seed + 50, books, indices_lr=0.02))
            rows.setdefault(bits, []).append(row)
            print(seed, bits, {k: round(v, 4) for k, v in row.items()}, flush=True)
    mean = lambda bits, key: statistics.mean(r[key] for r in rows[bits])
    full = statistics.mean(rows["full precision"])
    lines = ["# Codebooks (JLCM) on the demo's language model", "",
             f"A LLaMA-style byte-level model (width {WIDTH}, {DEPTH} blocks) after {args.trained} steps of {BATCH} x {SEQ} bytes of Python's standard library in fp32; its blocks' linear layers "
             f"replaced. Cross-entropy over {WINDOWS} held-out windows, mean of {args.seeds} seed{'s' * (args.seeds > 1)}; in full precision {full:.4f}. Factors are those of the replaced weights, exact bytes.", "",
             f"Nearest: rounded in groups of {GROUP} with zero point (1 bit: sign and mean magnitude), fp32 scales as gradmill stores them. Codebooks: a group of 64 rows each; calibrated: "
             f"weights' errors weighed by inputs of 4 batches; shared: one codebook a layer, a scale a group, calibrated. Trained: {args.steps} steps of the calibrated ones on the training text, "
             "codebooks alone (AdamW, nothing else trains), and codebooks and indices together (rate 0.02 an index); beyond 4 bits there is little left to gain. "
             "That training goes on where the model's own ended, so its loss may fall below full precision's.", "",
             "| bits | nearest: factor | loss | codebooks: factor | loss | calibrated | shared: factor | loss | codebooks trained | both trained |",
             "| --- |" + " ---: |" * 9]
    for bits in range(1, 9):
        cells = [f"{mean(bits, k):.2f}x" if "factor" in k else f"{mean(bits, k):.4f}" for k in (
            "nearest factor", "nearest", "fit factor", "fit", "calibrated", "shared factor", "shared", *(("codebooks", "both") if bits <= 4 else ()))] + ["", ""] * (bits > 4)
        lines.append(f"| {bits} | " + " | ".join(cells) + " |")
    return lines


def integers(text, args):
    lines = ["# BCT on two small language models", "",
             f"Byte-level models of width {WIDTH} and {DEPTH} blocks after {args.trained} steps of {BATCH} x {SEQ} bytes of Python's standard library in fp32. "
             "LLaMA-style: the demo's (RMSNorm, rotary attention, SwiGLU; attention, rotation and SwiGLU are functions between its modules and stay in floats). Encoder: torch's nn.TransformerEncoderLayer with a causal mask, integers throughout. Everything "
             f"with weights is quantised, embedding and head too. Cross-entropy over {WINDOWS} held-out windows, mean of {args.seeds} seed{'s' * (args.seeds > 1)}. Factor: of the whole model, exact bytes "
             "(fp32 before), at this width and, for the demo's weights' shapes, at width 4096.", "",
             "| model | weights | shift for each | factor | at width 4096 | loss | calibrated | full precision |", "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    found = {}
    for name, make in (("LLaMA-style", llama), ("encoder", EncoderModel)):
        for seed in range(args.seeds):
            base, full, calibration = trained(make, text, args.trained, seed)
            for bits, block in ((8, 0), (4, 0), (4, 64), (4, 16), (2, 16)):
                losses = []
                for data in (None, calibration):
                    model, report = bct.quantize(copy.deepcopy(base), bits, block, data)
                    losses.append(text.loss(model))
                found.setdefault((name, bits, block), []).append((report.factor, *losses, full))
                print(name, seed, bits, block, [round(x, 4) for x in found[name, bits, block][-1]], flush=True)
    for (name, bits, block), rows in found.items():
        factor, plain, calibrated, full = (statistics.mean(column) for column in zip(*rows))
        wide = 32 / (bits + 8 / 4096 + (2 * (1 if block == 0 else 4096 / block) + 6 * (block == 0)) / 4096)
        lines.append(f"| {name} | {bits} bits | {block or 'row'} | {factor:.3f}x | {wide:.3f}x | {plain:.4f} | {calibrated:.4f} | {full:.4f} |")
    return lines


def main():
    parser = argparse.ArgumentParser(prog="python bench/compressed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", default=["codebook", "bct"], help="codebook, bct (default: both)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--trained", type=int, default=400, help="steps of the models before anything is compressed")
    parser.add_argument("--steps", type=int, default=80, help="of training codebooks")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent / "docs" / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = Text()
    for job in args.jobs or ("codebook", "bct"):
        started = time.process_time()
        lines = {"codebook": jlcm, "bct": integers}[job](text, args)
        lines += ["", f"{time.process_time() - started:.0f} s of CPU time."]
        demo.write_evidence(args.out / f"{job}.md", lines, f"python bench/compressed.py {job} --seeds {args.seeds} --trained {args.trained} --steps {args.steps}")


if __name__ == "__main__":
    main()
