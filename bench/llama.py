"""Trains a LLaMA of a paper's sizes for a few steps and says what it took: peak memory, seconds per step, loss.

    python bench/llama.py --model llama-60m --steps 3 --batch 2 --seq 64      on CPU, to see that it runs
    python bench/llama.py --device cuda --plain                               LLaMA-7B in 16 GB: 20 steps, and plain torch doing the same maths

Zhang et al., "Q-GaLore": INT8 weights updated by stochastic rounding, INT4 bases, 8-bit states, gradients released one at a time, rank
1024, batches of 16 x 256 tokens, activations checkpointed; the paper reports 15.26 GB. The cross-entropy of the 32,000 words is taken in chunks.
Tokens are random: what a step takes does not depend on them. ``--plain`` trains the same model by :class:`gradmill.bench.projection.LeanTorchQGaLore`, the weights as
INT8 codes that each product dequantises, gradients released as well; its bases are random, because ``torch.linalg.svd`` of 224 layers would take longer than all the steps.
"""
from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time

import torch
from rich.progress import track
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradmill import demo, memory, optim
from gradmill.bench.projection import LeanTorchQGaLore

GOAL = 15.26e9   # bytes, of the paper, for llama-7b on a GPU
GROUP = 256
CHUNK = 512      # tokens whose logits are there at once


class Model(nn.Module):
    """A forward for :func:`gradmill.memory.build`'s modules: tokens in, cross-entropy of the next token out."""

    def __init__(self, modules: nn.ModuleDict, shape: memory.Llama, seq: int, device):
        super().__init__()
        self.llama, self.heads = modules, shape.heads
        size = shape.width // shape.heads
        angles = torch.arange(seq, device=device)[:, None] * 10000.0 ** (-torch.arange(0, size, 2, device=device) / size)
        dtype = modules["norm"].weight.dtype
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def block(self, layer, x):
        batch, seq, width = x.shape
        h = layer["input_norm"](x)
        q, k, v = (layer[f"{n}_proj"](h).view(batch, seq, self.heads, -1).transpose(1, 2) for n in "qkv")
        h = F.scaled_dot_product_attention(demo.rotate(q, self.cos, self.sin), demo.rotate(k, self.cos, self.sin), v, is_causal=True)
        x = x + layer["o_proj"](h.transpose(1, 2).reshape(batch, seq, width))
        h = layer["post_attention_norm"](x)
        return x + layer["down_proj"](F.silu(layer["gate_proj"](h)) * layer["up_proj"](h))

    def loss_sum(self, h, y):
        return F.cross_entropy(self.llama["lm_head"](h).float(), y, reduction="sum")

    def hidden(self, x):
        h = self.llama["embed_tokens"](x)
        for layer in self.llama["layers"]:
            h = checkpoint(self.block, layer, h, use_reentrant=False)
        return self.llama["norm"](h)

    def forward(self, x, y):
        h, y = self.hidden(x).flatten(0, 1), y.flatten()
        chunks = zip(h.split(CHUNK), y.split(CHUNK))
        return sum(checkpoint(self.loss_sum, *chunk, use_reentrant=False) for chunk in chunks) / len(y)


class PlainLinear(nn.Module):
    """A linear layer by :class:`LeanTorchQGaLore`: INT8 codes dequantised for each product, stepped as soon as its gradient is there."""

    def __init__(self, weight, rank: int):
        super().__init__()
        self.shape = weight.shape
        self.tall = self.shape[0] >= self.shape[1]  # LeanTorchQGaLore projects columns: wide weights are kept transposed
        stored = weight.float() if self.tall else weight.float().t().contiguous()
        self.method = LeanTorchQGaLore(stored, rank, min(GROUP, stored.shape[1]))
        self.method.set_basis(torch.linalg.qr(torch.randn(stored.shape[1], rank, device=weight.device)).Q.t().contiguous())
        self.start = nn.Parameter(torch.zeros((), device=weight.device))  # something to differentiate by, so that backward is called

    def weight(self, dtype):
        codes, scale, zero = self.method.weight
        w = codes.to(dtype).sub_(zero.to(dtype)).mul_(scale.to(dtype))
        return w.view(self.shape) if self.tall else w.view(self.shape[::-1]).t()

    def forward(self, x):
        return _Plain.apply(x, self.start, self)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, start, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return x @ layer.weight(x.dtype).t()

    @staticmethod
    def backward(ctx, dy):
        (x,), layer = ctx.saved_tensors, ctx.layer
        dx = dy @ layer.weight(x.dtype)
        dw = dy.flatten(0, -2).t() @ x.flatten(0, -2)
        with torch.no_grad():
            layer.method.step((dw if layer.tall else dw.t()).float())
        return dx, None, None


def plain(shape: memory.Llama, rank: int, device) -> nn.ModuleDict:
    modules = memory.build(memory.Llama(shape.width, shape.hidden, shape.heads, 0, shape.rank, shape.vocabulary), "bf16", device)
    for _ in range(shape.layers):
        layer = memory.build_layer(shape, "bf16", device)
        for name, child in list(layer.items()):
            if isinstance(child, nn.Linear):
                layer[name] = PlainLinear(child.weight.detach(), rank)
        modules["layers"].append(layer)
    return modules


def train(args, shape, by_torch: bool) -> dict:
    """Peak bytes (of torch's CUDA allocator, else None), seconds of each step, the losses."""
    torch.manual_seed(0)
    device, cuda = torch.device(args.device), args.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    modules = plain(shape, args.rank, device) if by_torch else memory.build(shape, "int8", device)
    model = Model(modules, shape, args.seq, device)
    for p in model.parameters():
        if p.dim() == 2 and type(p) is nn.Parameter:
            nn.init.normal_(p, std=0.02)  # the embedding and the head; converted layers keep torch's start
    if by_torch:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.dim()], lr=args.lr)
    else:
        optimizer = memory.make_optimizer(model, "qgalore", args.rank)
        for group in optimizer.param_groups:
            group["lr"] = args.lr
        optim.release_gradients(model, optimizer)
    times, losses = [], []
    for _ in track(range(args.steps), f"{args.model}, {'plain torch' if by_torch else 'gradmill'}"):
        tokens = torch.randint(shape.vocabulary, (args.batch, args.seq + 1), device=device)
        started = time.perf_counter()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the GPU
        times.append(time.perf_counter() - started)
    return {"peak_bytes": torch.cuda.max_memory_allocated() if cuda else None, "first_step_s": times[0],
            "step_s": statistics.median(times[1:]) if len(times) > 1 else None, "losses": losses}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama-7b", choices=memory.LLAMA)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rank", type=int, help="default the paper's")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--plain", action="store_true", help="plain torch doing the same maths, too")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    shape = memory.LLAMA[args.model]
    args.rank = args.rank or shape.rank
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU")
    planned = memory.plan(args.model, "qgalore", rank=args.rank, weights="int8", release_gradients=True).total_bytes
    report = {"model": args.model, "batch": args.batch, "seq": args.seq, "rank": args.rank, "planned_bytes": planned,
              "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu", "torch": torch.__version__,
              "gradmill": train(args, shape, False)}
    if args.plain:
        report["plain torch"] = train(args, shape, True)
    for name in ("gradmill", "plain torch"):
        if name in report:
            r = report[name]
            peak = "" if r["peak_bytes"] is None else f"peak {r['peak_bytes'] / 1e9:.2f} GB, "
            print(f"{name}: {peak}first step {r['first_step_s']:.2f} s, then {r['step_s'] or float('nan'):.3f} s a step, loss {r['losses'][0]:.3f} to {r['losses'][-1]:.3f}")
    print(f"weights, the largest gradient and states, as gradmill memory counts them: {planned / 1e9:.2f} GB")
    if args.json:
        demo.write_whole(args.json, (json.dumps(report, indent=1) + "\n").encode())
    peak = report["gradmill"]["peak_bytes"]
    if args.model == "llama-7b" and peak is not None:
        print(f"goal {GOAL / 1e9} GB: {'met' if peak <= GOAL else 'MISSED'}")
        return int(peak > GOAL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
