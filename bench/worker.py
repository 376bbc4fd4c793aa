"""One training run in a process of its own, so that its memory is its own.

    python bench/worker.py '{"model": "language", "way": "torch", ...}'

answers each line of its standard input ("train 30", "step", "measure") with a line of JSON. bench/training.py starts it. Imports nothing
of this folder: a script has no package.
"""
from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

import gradmill
from gradmill import demo


# --- what people would choose -----------------------------------------------------------------------------
def torch_adamw(groups, lr):
    return torch.optim.AdamW(groups, lr=lr, betas=demo.BETAS, fused=True)


def bitsandbytes_adamw(groups, lr):
    import bitsandbytes
    return bitsandbytes.optim.AdamW8bit(groups, lr=lr, betas=demo.BETAS)


def torchao_adamw(groups, lr):
    import torchao.optim
    return torchao.optim.AdamW8bit(groups, lr=lr, betas=demo.BETAS)


def gradmill_adamw(groups, lr):
    return gradmill.optim.AdamW(groups, lr=lr, betas=demo.BETAS, states="int8")


def torchao_int8(model):
    """torchao's INT8 mixed-precision training of every layer that gradmill.convert would take."""
    from torchao.prototype.quantized_training import int8_mixed_precision_training
    from torchao.quantization import quantize_
    quantize_(model, int8_mixed_precision_training(), filter_fn=lambda m, name: type(m) is nn.Linear and "head" not in name)


#: way -> (the optimizer, or None for Q-GaLore; what is done to the model first)
WAYS = {
    "torch": (torch_adamw, lambda model: None),
    "bitsandbytes": (bitsandbytes_adamw, lambda model: None),
    "torchao": (torchao_adamw, lambda model: None),
    "torchao int8": (torchao_adamw, torchao_int8),
    "gradmill": (gradmill_adamw, lambda model: gradmill.convert(model, "int8")),
    "gradmill fp32": (gradmill_adamw, lambda model: None),
    "gradmill q-galore": (None, None),
}


class Language(demo.Half):
    """The demo's language model; gradmill's Q-GaLore as the demo runs it."""

    def __init__(self, way: str, width: int, depth: int, batch: int, seq: int, steps: int, device: str):
        self.way = way
        options = demo.Options(steps=steps, width=width, depth=depth, batch=batch, seq=seq, device=device, threads=torch.get_num_threads())
        super().__init__("torch", options.checked(), *demo.read_text(None)[:2])

    def _torch(self, options):
        optimizer, prepare = WAYS[self.way]
        if optimizer is None:
            self.choice = demo.OPTIMIZERS["qgalore"]
            return self._gradmill(replace(options, recipe="int8_weights", lr=self.choice.lr))
        prepare(self.model)
        return optimizer(self._groups(), options.baseline_lr)


class Images(Language):
    """A CNN on scikit-learn's digits (1797 images of 8x8), every third held out."""

    def __init__(self, way: str, width: int, batch: int, steps: int, device: str):
        from sklearn.datasets import load_digits
        data = load_digits()
        self.way, self.width, held = way, width, torch.arange(len(data.target)) % 3 == 2
        x, y = (torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1).to(device), torch.tensor(data.target).to(device)
        self.images, self.held_images = (x[~held], y[~held]), (x[held], y[held])
        demo.Half.__init__(self, "torch", demo.Options(steps=steps, batch=batch, seq=1, device=device, threads=torch.get_num_threads()).checked(), b"..", b"..")

    def _model(self, options):
        n = min(self.width, options.width)   # the throw-away step's is 32
        block = lambda inputs, outputs, stride=1: (nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(4, outputs), nn.GELU())
        return Scored(nn.Sequential(*block(1, n), *block(n, n), *block(n, 2 * n, 2), *block(2 * n, 2 * n), nn.Flatten(), nn.Linear(32 * n, 10)))

    def _groups(self, decay=demo.WEIGHT_DECAY, **projected):
        return [{"params": [p for p in self.model.parameters() if p.dim() > 1], "weight_decay": decay, **projected},
                {"params": [p for p in self.model.parameters() if p.dim() == 1], "weight_decay": 0.0}]

    def _windows(self, text, starts):
        x, y = self.images
        chosen = torch.randint(len(x), (self.options.batch,), generator=self.starts).to(x.device)
        return x[chosen], y[chosen]

    @torch.no_grad()
    def validate(self):
        return self.model(*self.held_images).item()


class Scored(nn.Module):
    """Cross-entropy of what a classifier says."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x, y):
        return F.cross_entropy(self.layers(x), y)


def main():
    job, answers = json.loads(sys.argv[1]), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)   # peers talk; the answers go their own way
    warnings.simplefilter("ignore")
    torch.set_num_threads(job.pop("threads"))
    run = {"language": Language, "images": Images}[job.pop("model")](**job)
    for line in sys.stdin:
        command, *count = line.split()
        if command == "train":
            for _ in range(int(count[0])):
                run.step()
            answer = run.validate()
        elif command == "step":
            answer = run.step()[0]
        else:
            answer = run.measure()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
