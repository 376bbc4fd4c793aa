"""training: whole steps of a small LLaMA and a small CNN in the combinations people would choose: time, peak memory, and the loss that
they end with. Each runs in a process of its own (worker.py); the processes take their steps in turn."""
from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import weakref

import torch

from . import limits as machine
from .runner import UNCOUNTED, Bench, baseline, case, knowing, ours, peer, rival

WORKER = pathlib.Path(__file__).with_name("worker.py")


class Worker:
    """A training run in a process of its own."""

    def __init__(self, **job):
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen([sys.executable, str(WORKER), json.dumps({"threads": torch.get_num_threads(), **job})], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.log, text=True)
        machine.CHILDREN.add(self.process.pid)
        weakref.finalize(self, _end, self.process)

    def __call__(self, command: str):
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.log.seek(0)
            said = self.log.read().decode(errors="replace").strip().splitlines() or [f"exit code {self.process.returncode}"]
            raise RuntimeError(f"its process ended: {said[-1]}")
        return json.loads(line)


def _end(process):
    """Also at the interpreter's end."""
    machine.CHILDREN.discard(process.pid)
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def _training(ctx, title, per_call, steps, ways, why="", **job):
    """A case: every way trains ``steps`` steps, says its validation loss, then is timed step by step."""
    steps = ctx.pick(steps, 2)

    def make(way):
        def made(*_):
            worker = Worker(way=way, steps=steps, device=ctx.device, **job)
            loss = worker(f"train {steps}")

            def facts():
                peak = worker("measure")["peak_memory_bytes"]   # None where the system does not tell
                return {**({} if peak is None else {"peak memory bytes": max(0, peak)}), f"loss after {steps} steps": loss}
            return knowing(lambda i: worker("step"), facts)
        return made
    entries = {"gradmill": ours(make("gradmill"), "gradmill int8, AdamW 8-bit"), "gradmill fp32": rival("torch layers, gradmill AdamW 8-bit", make("gradmill fp32")),
               "gradmill q-galore": rival("gradmill int8_weights, Q-GaLore", make("gradmill q-galore")),
               "torch": baseline("torch fp32, AdamW(fused=True)", make("torch")), "bitsandbytes": peer("bitsandbytes", "torch fp32, bitsandbytes AdamW8bit", make("bitsandbytes")),
               "torchao": peer("torchao", "torch fp32, torchao AdamW8bit (compiled)", make("torchao")),
               "torchao int8": peer("torchao", "torchao int8 training, AdamW8bit", make("torchao int8"))}
    return Bench(title, UNCOUNTED, [entries[way] for way in ways], why, per_call=per_call)


def _language(ctx, width, depth, steps, ways):
    (width, depth), (batch, seq) = ctx.pick((width, depth), (32, 1)), ctx.pick((8, 128), (2, 16))
    return _training(ctx, f"train a LLaMA of width {width}, {depth} blocks, {batch} x {seq} bytes", (batch * seq, "tokens"), steps, ways,
                     model="language", width=width, depth=depth, batch=batch, seq=seq)


QUICK = ("gradmill", "torch", "gradmill q-galore", "bitsandbytes")
ALL = ("gradmill", "torch", "gradmill fp32", "gradmill q-galore", "bitsandbytes", "torchao", "torchao int8")


@case("training")
def llama_small(ctx):
    return _language(ctx, 128, 2, 20, QUICK)


@case("training", full=True)
def llama(ctx):
    return _language(ctx, 384, 4, 60, ALL)


def _images(ctx, width, steps, ways):
    width, batch = ctx.pick((width, 64), (8, 4))
    return _training(ctx, f"train a CNN of width {width} and {2 * width}, {batch} images of 8x8", (batch, "images"), steps, ways,
                     "INT8 pays from 64 channels on: with 32, making codes of the patches of an 8x8 image costs more than its products save", model="images", width=width, batch=batch)


@case("training")
def cnn_small(ctx):
    return _images(ctx, 32, 20, QUICK)


@case("training", full=True)
def cnn(ctx):
    return _images(ctx, 64, 100, ALL)
