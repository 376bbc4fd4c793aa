"""gradmill demo: the same language model, trained twice from one seed on the same batches: by torch, and by gradmill.

A LLaMA-style byte-level model (RMSNorm, rotary attention, SwiGLU, untied head) learns Python from the .py files of the
standard library, which every machine has. One half uses torch's layers and torch.optim.AdamW(fused=True); the other
gradmill's low-precision layers and one of its optimizers. Each half is a process of its own, so that its memory is
its own, and the two take their steps in turn, so that whatever else the machine does slows both alike.
"""
from __future__ import annotations

import gc
import json
import math
import os
import platform
import signal
import statistics
import sysconfig
import threading
import time
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from gradmill._files import replacing

__all__ = ["DemoError", "Options", "OPTIMIZERS", "LanguageModel", "read_text", "run"]


class DemoError(Exception):
    """The demo cannot run as asked; the message names what is wrong."""


# --- optimizers -------------------------------------------------------------------------------------------
# Learning rates of torch's AdamW and of int8_weights + QGaLoreAdamW: tuned on the default model and run (5.2M parameters, 400
# steps of 1024 bytes, seed 0, one thread, 2-core x86-64 with AVX-512), warm-up and cosine in all; validation loss at the end:
#   torch.optim.AdamW                   5e-4 1.832   7e-4 1.792   1e-3 1.821   2e-3 1.923
#   int8_weights + QGaLoreAdamW         2e-3 1.758   4e-3 1.726   6e-3 1.756
# Q-GaLore ran with rank width/4 and scale 1, so that projected and plain parameters share one rate (the paper's scale of
# 0.25 needs a rate four times as high for the projected ones). In a plain-torch model of it at a quarter of the size,
# refreshing every 5, 20 or 50 steps made 1% of difference, and fp32 weights were no better than INT8 with stochastic rounding.
TORCH_LR = 7e-4
BETAS, WEIGHT_DECAY, REFRESH_EVERY = (0.9, 0.95), 0.1, 20
HESSIAN_EVERY, ROUND, SHARDS = 10, 50, 4   # steps between Sophia's estimates and in a round of FedSpeed; parts of a batch for VRGD


@dataclass(frozen=True)
class Choice:
    """What ``--optimizer NAME`` means."""

    cls: str                    #: of gradmill.optim
    lr: float                   #: its peak, warm-up and cosine around it
    options: dict = field(default_factory=dict)
    decay: float = WEIGHT_DECAY
    rank: float | None = None   #: where the blocks' matrices are projected: at most 1 a fraction of the width, at scale 1
    matrices: bool = False      #: for the blocks' matrices only; an AdamW steps the rest, at torch's rate
    inner: dict | None = None   #: options of the AdamW that it goes around
    packed: bool = True         #: steps quantised weights too


_adam = {"betas": BETAS}
#: name -> what it means. Rates: of adamw and qgalore as above; of galore, fira, frugal and dct the best of four
#: (docs/results/projections.md); AdamW's kin take its, grams twice that, lion a third, as its paper advises; Muon's kin have their
#: papers'; the others' are the best of three, a factor of 3 apart, in 100 steps of a model of width 64 and depth 2.
OPTIMIZERS = {
    "qgalore": Choice("QGaLoreAdamW", 4e-3, {**_adam, "refresh_every": REFRESH_EVERY}, rank=0.25),
    "galore": Choice("GaLoreAdamW", 4e-3, {**_adam, "refresh_every": REFRESH_EVERY}, rank=0.25),
    "fira": Choice("FiraAdamW", 4e-3, {**_adam, "refresh_every": REFRESH_EVERY}, rank=0.25),
    "frugal": Choice("FrugalAdamW", 2e-3, {**_adam, "refresh_every": REFRESH_EVERY}, rank=0.25),
    "dct": Choice("DCTAdamW", 4e-3, _adam, rank=0.25),
    "adamw": Choice("AdamW", TORCH_LR, _adam),
    "adamw8bit": Choice("AdamW", TORCH_LR, {**_adam, "states": "int8"}),
    "adamw4bit": Choice("AdamW", TORCH_LR, {**_adam, "states": "int4"}),
    "adam": Choice("Adam", TORCH_LR, _adam, decay=0.0),
    "adabelief": Choice("AdaBelief", TORCH_LR, _adam),
    "diffgrad": Choice("DiffGrad", TORCH_LR, _adam, decay=0.0),
    "grams": Choice("Grams", 1.5e-3, _adam),
    "stablespam": Choice("StableSPAM", TORCH_LR, _adam),
    "swats": Choice("SWATS", TORCH_LR, {**_adam, "tolerance": 1e-5}, decay=0.0),
    "step": Choice("STEPAdam", TORCH_LR, _adam),
    "lamb": Choice("LAMB", 1.5e-2, _adam),
    "lars": Choice("LARS", 3.0, {"momentum": 0.9}, decay=0.0),
    "lion": Choice("Lion", 2.5e-4, {"betas": (0.9, 0.99), "states": "int8"}),
    "sophia": Choice("Sophia", 7.5e-4),
    "sgd": Choice("SGD", 0.03, {"momentum": 0.9}, decay=0.0),
    "adagrad": Choice("Adagrad", 1.5e-2, decay=0.0),
    "adagradnorm": Choice("AdaGradNorm", 0.3, decay=0.0),
    # The paper's threshold of 0.5 is for gradients of that size; here all are smaller, and nothing would learn.
    "classp": Choice("CLASSP", 0.02, {"threshold": 1e-10, "power": 2.0}, decay=0.0),
    "muon": Choice("Muon", 2e-2, matrices=True),
    "auon": Choice("AuON", 0.24, matrices=True, decay=0.0),
    "hybridauon": Choice("HybridAuON", 0.24, matrices=True, decay=0.0),
    "fedspeed": Choice("FedSpeed", 0.1, decay=0.0, packed=False),
    "vrgd": Choice("VRGD", TORCH_LR, inner=_adam),
    "xgrad": Choice("XGrad", TORCH_LR, {"decoupled": True}, inner=_adam, packed=False),
}

WARM_UP_STEPS = 3     # steps left out of every timing
VALIDATION_WINDOWS = 64    # evenly spaced over the held-out text
VALIDATIONS = 6            # times in a run


@dataclass(frozen=True)
class Options:
    """What the command line chooses; see ``gradmill demo --help``."""

    steps: int = 400
    device: str = "auto"
    seed: int = 0
    recipe: str | None = None          # None: int8_weights, or int8 for an optimizer that steps no quantised weights
    optimizer: str = "qgalore"
    lr: float | None = None            # None: that of OPTIMIZERS
    baseline_lr: float | None = None   # None: TORCH_LR
    baseline: bool = True
    batch: int = 8
    seq: int = 128
    width: int = 256
    depth: int = 6
    threads: int | None = None
    text: str | None = None
    out: str = "demo_out"

    def checked(self) -> "Options":
        """The options with the device resolved. DemoError for values that make no sense."""
        for name in ("steps", "batch", "seq", "depth"):
            if getattr(self, name) < 1:
                raise DemoError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.width != 32 and (self.width < 64 or self.width % 64):
            raise DemoError(f"--width is {self.width}; it must be 32 or a multiple of 64 (attention heads are 64 wide)")
        if self.threads is not None and self.threads < 1:
            raise DemoError(f"--threads is {self.threads}; it must be at least 1")
        if not 0 <= self.seed < 2 ** 63:
            raise DemoError(f"--seed is {self.seed}; it must be from 0 to 2^63 - 1")
        for name in ("lr", "baseline_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise DemoError(f"--{name.replace('_', '-')} is {value}; it must be positive")
        if self.recipe is not None and self.recipe not in recipe_names():
            raise DemoError(f"--recipe is {self.recipe!r}; it must be one of {', '.join(recipe_names())}")
        if self.optimizer not in OPTIMIZERS:
            raise DemoError(f"--optimizer is {self.optimizer!r}; it must be one of {', '.join(OPTIMIZERS)}")
        choice = OPTIMIZERS[self.optimizer]
        if self.recipe == "int8_weights" and not choice.packed:
            raise DemoError(f"--optimizer {self.optimizer} does not step quantised weights; give another --recipe: int8 or none, say")
        if choice.cls == "VRGD" and self.batch < 2:
            raise DemoError("--batch is 1; --optimizer vrgd needs at least 2, to compare the gradients of a batch's parts")
        if self.device not in ("auto", "cpu", "cuda"):
            raise DemoError(f"--device is {self.device!r}; it must be auto, cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise DemoError("--device cuda, but torch sees no CUDA device here"
                            + ("" if torch.version.cuda else f" (torch {torch.__version__} is a CPU build)"))
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        recipe = self.recipe or ("int8_weights" if choice.packed else "int8")
        return replace(self, device=device, recipe=recipe, lr=self.lr or choice.lr, baseline_lr=self.baseline_lr or TORCH_LR)


def recipe_names() -> list[str]:
    """gradmill's recipes, and "none": torch's layers, to try an optimizer alone."""
    from gradmill import recipes

    return [*recipes.RECIPES, "none"]


# --- text -------------------------------------------------------------------------------------------------
#: folders left out of the standard library: not every distribution ships its tests, and packages are not part of it
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def read_text(path: str | None) -> tuple[bytes, bytes, dict]:
    """(training bytes, held-out bytes, what they are) from a file, a folder, or (None) the standard library's .py files.

    Whole files are held out, at least one and about 5% of the bytes, chosen by a checksum of their names, so that the
    choice is the same on every machine; of a single file, the last 10%.
    """
    if path is not None and not Path(path).exists():
        raise DemoError(f"--text {path}: no such file or folder")
    root = Path(sysconfig.get_path("stdlib") if path is None else path)
    if root.is_file():
        data = _read(root)
        cut = len(data) - len(data) // 10
        return data[:cut], data[cut:], {"source": root.name, "files": 1, "bytes": len(data), "held_out_files": 0,
                                        "held_out_bytes": len(data) - cut, "held_out": "the last tenth of the file"}
    if path is None:
        files = [f for f in root.rglob("*.py") if not SKIPPED.intersection(f.relative_to(root).parts)]
    else:
        files = [f for f in root.rglob("*") if not any(part.startswith(".") for part in f.relative_to(root).parts)]
    files = [f for f in files if f.is_file() and f.stat().st_size > 0]
    files.sort(key=lambda f: (zlib.crc32(name := f.relative_to(root).as_posix().encode()), name))
    if len(files) < 2:
        what = "the standard library" if path is None else f"--text {path}"
        raise DemoError(f"{what} has {len(files)} non-empty file(s); a folder needs at least 2, one of them to hold out")
    texts = [_read(f) for f in files]
    total, held, count = sum(map(len, texts)), 0, 0
    while count < len(files) - 1 and (count == 0 or held < total / 20):
        held += len(texts[count])
        count += 1
    return b"\n".join(texts[count:]), b"\n".join(texts[:count]), {
        "source": "Python's standard library" if path is None else root.name, "files": len(files), "bytes": total,
        "held_out_files": count, "held_out_bytes": held, "held_out": "whole files"}


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DemoError(f"cannot read {file}: {error.strerror}") from None


# --- model ------------------------------------------------------------------------------------------------
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding: pairs (i, i + half) of a head turn by position * frequency."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Block(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x, cos, sin):
        batch, time_, width = x.shape
        h = self.attention_norm(x)
        q, k, v = (layer(h).view(batch, time_, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).reshape(batch, time_, width))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class LanguageModel(nn.Module):
    """Bytes in, cross-entropy of the next byte out."""

    def __init__(self, width: int, depth: int, seq: int):
        super().__init__()
        heads = max(1, width // 64)
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        size = width // heads
        angles = torch.arange(seq)[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_stream = name.endswith(("o.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * depth) if into_stream else 0.02)

    def logits(self, x):
        h = self.embedding(x)
        for block in self.blocks:
            h = block(h, self.cos, self.sin)
        return self.head(self.norm(h))

    def forward(self, x, y):
        return F.cross_entropy(self.logits(x).flatten(0, 1), y.flatten())


# --- one half ---------------------------------------------------------------------------------------------
class Half:
    """One model in training. Lives in a process of its own; ``Remote`` calls its methods."""

    def __init__(self, name: str, options: Options, train: bytes, held_out: bytes):
        if options.threads:
            torch.set_num_threads(options.threads)
        self.name, self.options, self.device = name, options, torch.device(options.device)
        self.train, self.held_out = (torch.frombuffer(bytearray(b), dtype=torch.uint8) for b in (train, held_out))
        self._build(replace(options, width=32, depth=1))  # one throw-away step, so that what torch loads at the first
        self.step()                                       # one (code, thread pools, 100 MB of it) is not counted as training's
        self.optimizer = self.stepped = self.schedules = self.model = None
        self.memory_at_start = self._reset_memory()
        self._build(options)

    def _build(self, options: Options):
        torch.manual_seed(options.seed)
        self.starts = torch.Generator().manual_seed(options.seed)  # the same batches in both halves
        self.model = self._model(options).to(self.device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.replaced, self.beside = 0, []
        self.choice = OPTIMIZERS[options.optimizer] if self.name == "gradmill" else None
        self.optimizer = self._torch(options) if self.choice is None else self._gradmill(options)
        # The torch optimizers there are: a wrapper's inner one; for Muon and its kin an AdamW more.
        self.stepped = [getattr(self.optimizer, "optimizer", self.optimizer), *self.beside]
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, self._lr_factor) for o in self.stepped]
        self.gradient_bytes = self.taken = 0

    def _model(self, options: Options) -> nn.Module:
        return LanguageModel(options.width, options.depth, options.seq)

    def _lr_factor(self, step: int) -> float:
        """Linear warm-up over a tenth of the run, then a cosine down to a tenth."""
        warm = max(1, self.options.steps // 10)
        if step < warm:
            return (step + 1) / warm
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, self.options.steps - warm)))

    def _groups(self, decay=WEIGHT_DECAY, **projected):
        """Matrices decay, norms do not; the blocks' matrices take the ``projected`` options."""
        inner = [p for p in self.model.blocks.parameters() if p.dim() == 2]
        outer = [self.model.embedding.weight, self.model.head.weight]
        norms = [p for p in self.model.parameters() if p.dim() == 1]
        return [{"params": inner, "weight_decay": decay, **projected}, {"params": outer, "weight_decay": decay},
                {"params": norms, "weight_decay": 0.0}]

    def _torch(self, options: Options):
        return torch.optim.AdamW(self._groups(), lr=options.baseline_lr, betas=BETAS, fused=True)

    def _gradmill(self, options: Options):
        import gradmill

        if options.recipe != "none":
            self.replaced = len(gradmill.convert(self.model, recipe=options.recipe).replaced)
        choice, optim = self.choice, gradmill.optim
        cls = getattr(optim, choice.cls)
        if choice.inner is not None:
            return cls(optim.AdamW(self._groups(choice.decay), lr=options.lr, **choice.inner), **choice.options)
        if choice.matrices:
            matrices, *rest = self._groups(choice.decay)
            self.beside = [optim.AdamW([{**group, "weight_decay": WEIGHT_DECAY if group["weight_decay"] else 0.0} for group in rest], lr=TORCH_LR, betas=BETAS)]
            return cls([matrices], lr=options.lr, **choice.options)
        # With scale 1 projected and plain parameters share one rate.
        projected = {} if choice.rank is None else {"rank": choice.rank, "scale": 1.0}
        return cls(self._groups(choice.decay, **projected), lr=options.lr, **choice.options)

    # --- what Remote calls --------------------------------------------------------------------------------
    def step(self) -> tuple[float, float]:
        """One training step: (loss, milliseconds of forward, backward and optimizer)."""
        x, y = self._windows(self.train, torch.randint(len(self.train) - self.options.seq, (self.options.batch,), generator=self.starts))
        self._synchronize()
        start = time.perf_counter()
        loss = self._step(x, y)
        self._synchronize()
        elapsed = time.perf_counter() - start
        if not self.gradient_bytes:
            self.gradient_bytes = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        start = time.perf_counter()
        self._zero_grad()
        for schedule in self.schedules:
            schedule.step()
        return loss.item(), 1e3 * (elapsed + time.perf_counter() - start)

    def _zero_grad(self):
        for optimizer in (self.optimizer, *self.beside):
            optimizer.zero_grad(set_to_none=True)

    def _backward(self, x, y) -> torch.Tensor:
        loss = self.model(x, y)
        loss.backward()
        return loss.detach()

    def _step(self, x, y) -> torch.Tensor:
        """Forward, backward and the optimizer's step, in the way it wants them; the loss."""
        cls, first = self.choice.cls if self.choice else None, self.taken % HESSIAN_EVERY == 0
        self.taken += 1
        if cls == "FedSpeed":
            if self.taken % ROUND == 0:
                self.optimizer.end_round()
                self.optimizer.begin_round()

            def closure():
                self._zero_grad()
                return self._backward(x, y)
            return self.optimizer.step(closure)
        if cls == "Sophia" and first:
            from gradmill.optim import gauss_newton_bartlett

            gauss_newton_bartlett(self.model.logits(x)).backward()
            self.optimizer.update_hessian(x.numel())
            self._zero_grad()
        if cls == "VRGD":
            losses = []
            for part in zip(x.chunk(SHARDS), y.chunk(SHARDS)):
                losses.append(self._backward(*part))
                self.optimizer.accumulate()
            loss = torch.stack(losses).mean()
        else:
            loss = self._backward(x, y)
        for optimizer in (self.optimizer, *self.beside):
            optimizer.step()
        return loss

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over windows spread evenly over the held-out text."""
        starts = torch.linspace(0, len(self.held_out) - self.options.seq - 1, VALIDATION_WINDOWS).long()
        with getattr(self.optimizer, "weights", nullcontext)():  # XGrad's own weights, not those it predicts
            losses = [self.model(*self._windows(self.held_out, s)).item() * len(s) for s in starts.split(self.options.batch)]
        return sum(losses) / len(starts)

    def measure(self) -> dict:
        """Bytes: counted from the tensors, and the memory's high-water mark."""
        from gradmill import nbytes
        from gradmill.optim import state_nbytes

        return {"parameters": self.parameters, "layers_replaced": self.replaced,
                "optimizer_class": f"{type(self.optimizer).__module__.split('.')[0]}.optim.{type(self.optimizer).__name__}",
                "weight_bytes": sum(nbytes(p) for p in self.model.parameters()), "gradient_bytes": self.gradient_bytes,
                "optimizer_bytes": sum(map(state_nbytes, self.stepped)) + sum(t.nbytes for t in getattr(self.optimizer, "_kept", [])), "peak_memory_bytes": self._peak_memory()}

    def _windows(self, text, starts):
        windows = torch.stack([text[i:i + self.options.seq + 1] for i in starts.tolist()]).to(self.device).long()
        return windows[:, :-1], windows[:, 1:]

    def _synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # --- memory -------------------------------------------------------------------------------------------
    def _reset_memory(self) -> int:
        """Forgets the high-water mark so far (on CPU: where Linux allows it), and returns what is resident now."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            pass
        return _status("VmRSS") or 0

    def _peak_memory(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        high = _status("VmHWM")
        return None if high is None else high - self.memory_at_start


def memory_note(device: str) -> str:
    return ("torch.cuda.max_memory_allocated in each half's process" if device == "cuda" else
            "growth of each half's own process (resident-set high-water mark) from before its model was built")


def _status(field: str) -> int | None:
    """Bytes of a field of /proc/self/status, None where there is none."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _serve(pipe, name, options, train, held_out):
    """The child process: builds a Half and answers calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        half = Half(name, options, train, held_out)
        del train, held_out
        pipe.send((None, None))
        while True:
            pipe.send((None, getattr(half, pipe.recv())()))
    except EOFError:
        pass
    except Exception as error:
        import traceback

        pipe.send((f"{type(error).__name__}: {error}", traceback.format_exc()))


class Remote:
    """A Half in a process of its own, and the record of what it did."""

    def __init__(self, name: str, options: Options, train: bytes, held_out: bytes):
        import multiprocessing

        self.name, self.losses, self.ms, self.validation, self.measured = name, [], [], [], {}
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, name, options, train, held_out), daemon=True)
        with _holding_sigint():  # so that it cannot hit the child while that imports
            self.process.start()
        other.close()

    def _answer(self):
        try:
            problem, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(5)
            raise DemoError(f"the {self.name} half's process ended (exit code {self.process.exitcode}); was there too little memory?") from None
        if problem:
            raise DemoError(f"the {self.name} half failed: {problem}\n{value}")
        return value

    def _call(self, method: str):
        self.pipe.send(method)
        return self._answer()

    def ready(self):
        self._answer()

    def step(self):
        loss, ms = self._call("step")
        self.losses.append(loss)
        self.ms.append(ms)

    def validate(self):
        self.validation.append([len(self.losses), self._call("validate")])

    def measure(self):
        self.measured = self._call("measure")

    def close(self):
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()

    # --- what came of it ----------------------------------------------------------------------------------
    def timed(self) -> list[float]:
        """Steps' milliseconds without the warm-up (all of them in a run that is hardly longer)."""
        return self.ms[WARM_UP_STEPS:] if len(self.ms) > 2 * WARM_UP_STEPS else self.ms[1:] or self.ms

    def speed(self, options: Options) -> float:
        """Tokens per second of the last 20 steps."""
        return options.batch * options.seq / statistics.fmean(self.timed()[-20:]) * 1e3

    def result(self, options: Options) -> dict:
        timed = self.timed()
        mean = statistics.fmean(timed)
        return {
            **self.measured, "lr": options.baseline_lr if self.name == "torch" else options.lr,
            "recipe": None if self.name == "torch" or options.recipe == "none" else options.recipe,
            "optimizer": "torch fused adamw" if self.name == "torch" else options.optimizer, "steps": len(self.losses),
            "validation_loss": self.validation[-1][1] if self.validation else None,
            "ms_per_step_median": statistics.median(timed), "ms_per_step_mean": mean,
            "tokens_per_second": options.batch * options.seq / mean * 1e3,
            "training_losses": self.losses, "ms_per_step": self.ms, "validation": self.validation}


@contextmanager
def _holding_sigint():
    """Ctrl-C waits for the end of the block, which may take seconds: a child gets megabytes of text as it starts. One that
    starts in it inherits the mask, and is never hit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mask, seen = getattr(signal, "pthread_sigmask", None), []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))  # another thread may be given what this one masks
    if mask:
        from multiprocessing.resource_tracker import ensure_running

        ensure_running()  # a later start of it would unmask
        mask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if mask:
            mask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if seen:
            signal.raise_signal(signal.SIGINT)


class _Stop:
    """Ctrl-C: in training the first asks to end after the step at hand; the second, or one before training, ends at once."""

    def __init__(self):
        self.asked = self.training = False

    def __enter__(self):
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_):
        if self.main:
            signal.signal(signal.SIGINT, self.before)

    def _handle(self, *_):
        if self.asked or not self.training:
            raise KeyboardInterrupt
        self.asked = True


# --- the run ----------------------------------------------------------------------------------------------
def run(options: Options, console) -> int:
    """Trains, prints, writes; returns the exit code (130 after Ctrl-C). DemoError for what cannot be done."""
    options = options.checked()
    train, held_out, text = read_text(options.text)
    for name, data in (("training", train), ("held-out", held_out)):
        if len(data) < options.seq + 2:
            raise DemoError(f"too little text: {len(data)} {name} bytes, but a window is {options.seq + 1} bytes long "
                            "(give more with --text, or lower --seq)")
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        raise DemoError(f"--out {out}: {'it is a file; name a folder' if out.is_file() else error.strerror}") from None

    console.print(f"[bold]gradmill demo[/bold] on {options.device}: {text['source']}, {text['files']:,} files, {text['bytes'] / 1e6:.1f} MB; "
                  f"held out: {text['held_out_bytes'] / 1e6:.2f} MB ({text['held_out']})", highlight=False)
    names = (["torch"] if options.baseline else []) + ["gradmill"]
    with _Stop() as stop:
        halves = []
        try:
            for name in names:
                halves.append(Remote(name, options, train, held_out))
            for half in halves:
                half.ready()
            stop.training = True
            _train(halves, options, stop, console)
            if halves[-1].losses:
                if stop.asked:
                    console.print(f"[yellow]Stopped at step {len(halves[-1].losses)} of {options.steps}.[/yellow] One last validation; "
                                  "Ctrl-C again to leave it out.", highlight=False)
                for half in halves:
                    if not half.validation or half.validation[-1][0] != len(half.losses):
                        half.validate()
                    half.measure()
        except KeyboardInterrupt:
            console.print("[yellow]Stopped at once.[/yellow]")
        finally:
            for half in halves:
                half.close()
        if len(halves) < len(names) or not all(half.losses for half in halves):
            console.print("Stopped before the first step: nothing was measured, nothing written.")
            return 130
        stop.asked = True  # from here Ctrl-C means: at once. The files are whole or absent.
        report = make_report(halves, options, text, interrupted=len(halves[-1].losses) < options.steps)
        show(report, console)
        paths = write(report, out)
    console.print("Written: " + ", ".join(str(p) for p in paths), highlight=False, soft_wrap=True)
    if report["interrupted"]:
        console.print(f"[yellow]Interrupted:[/yellow] these figures are for the first {report['halves']['gradmill']['steps']} of "
                      f"{options.steps} steps.", highlight=False)
        return 130
    return 0


def _train(halves, options, stop, console):
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    every = max(1, math.ceil(options.steps / VALIDATIONS))
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
               TextColumn("{task.fields[speed]} tokens/s"), TimeRemainingColumn(compact=True)]
    with Progress(*columns, console=console, disable=not console.is_terminal, expand=True, refresh_per_second=4) as progress:
        _validate(halves, 0, options, console)
        tasks = [progress.add_task(half.name, total=options.steps, loss="  -  ", speed="    -") for half in halves]
        for step in range(1, options.steps + 1):
            if stop.asked:
                return
            for half, task in zip(halves, tasks):
                half.step()
                progress.update(task, advance=1, loss=f"{statistics.fmean(half.losses[-20:]):.3f}", speed=f"{half.speed(options):5,.0f}")
            if step % every == 0 or step == options.steps:
                if stop.asked:
                    return
                _validate(halves, step, options, console)


def _validate(halves, step, options, console):
    said = []
    for half in halves:
        half.validate()
        said.append(f"{half.name} {half.validation[-1][1]:.4f}")
        if step:
            said[-1] += f" ({half.speed(options):,.0f} tok/s)"
    console.print(f"step {step:{len(str(options.steps))}}/{options.steps}  val loss: {'  '.join(said)}", highlight=False)


# --- the report -------------------------------------------------------------------------------------------
def make_report(halves, options: Options, text: dict, interrupted: bool) -> dict:
    """What demo.json holds."""
    import gradmill
    from gradmill.info import collect

    info = collect()
    results = {half.name: half.result(options) for half in halves}
    ratios, goals = None, None
    if "torch" in results:
        torch_, ours = results["torch"], results["gradmill"]
        keys = ("validation_loss", "ms_per_step_median", "ms_per_step_mean", "tokens_per_second", "weight_bytes", "gradient_bytes",
                "optimizer_bytes", "peak_memory_bytes")
        ratios = {k: ours[k] / torch_[k] if ours.get(k) and torch_.get(k) else None for k in keys}
        # Steps are taken in turn: the median of the ratio of neighbours is freer of the machine's noise than the ratio of medians.
        timed = {half.name: half.timed() for half in halves}
        ratios["ms_per_step_paired"] = statistics.median(b / a for a, b in zip(timed["torch"], timed["gradmill"]))
        if options.optimizer == "qgalore" and options.recipe == "int8_weights" and ratios["optimizer_bytes"] and ratios["validation_loss"]:
            goals = {"optimizer state under 1/8": ratios["optimizer_bytes"] < 1 / 8,
                     "validation loss within 2%": ratios["validation_loss"] <= 1.02,
                     "a step no slower": ratios["ms_per_step_paired"] <= 1.0}
    return {
        "gradmill_demo": 1, "gradmill": gradmill.__version__, "interrupted": interrupted,
        "options": {k: v for k, v in asdict(options).items() if k not in ("text", "out")},
        "machine": {"processor": info["devices"][0]["name"], "cores": os.cpu_count(), "threads": options.threads or torch.get_num_threads(),
                    "devices": [d["name"] for d in info["devices"][1:]], "isa": info["native"]["isa"], "torch": torch.__version__,
                    "triton": info["triton"], "python": platform.python_version()},
        "text": text, "halves": results, "ratios": ratios, "goals": goals, "peak_memory_is": memory_note(options.device)}


def show(report: dict, console) -> None:
    """The table side by side."""
    from rich.table import Table

    halves, ratios = report["halves"], report["ratios"] or {}
    ours = halves["gradmill"]
    rows = [("validation loss", "validation_loss", "{:.4f}"), ("ms per step, median", "ms_per_step_median", "{:,.1f}"),
            ("ms per step, mean", "ms_per_step_mean", "{:,.1f}"), ("tokens/s", "tokens_per_second", "{:,.0f}"),
            ("bytes of weights", "weight_bytes", "{:,}"), ("bytes of gradients", "gradient_bytes", "{:,}"),
            ("bytes of optimizer state", "optimizer_bytes", "{:,}"), ("peak memory, bytes", "peak_memory_bytes", "{:,}")]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for name in halves:
        table.add_column(name, justify="right")
    if ratios:
        table.add_column("gradmill / torch", justify="right")
    table.add_row("matmuls, weights", *(h["recipe"] or "fp32" for h in halves.values()), *([""] if ratios else []))
    table.add_row("optimizer", *(h["optimizer"] for h in halves.values()), *([""] if ratios else []))
    table.add_row("peak learning rate", *(f"{h['lr']:g}" for h in halves.values()), *([""] if ratios else []))
    for label, key, form in rows:
        cells = ["-" if h.get(key) is None else form.format(h[key]) for h in halves.values()]
        table.add_row(label, *cells, *([_ratio(ratios.get(key))] if ratios else []))
    console.print()
    console.print(table, highlight=False)
    if ours.get("parameters"):
        console.print(f"\n{ours['parameters']:,} parameters, {ours['steps']} steps of {report['options']['batch']} x {report['options']['seq']} bytes; "
                      f"{ours['layers_replaced']} layers converted. Means include what happens only at some steps, such as refreshes.",
                      highlight=False)
    if ratios:
        console.print(f"Steps were taken in turn; gradmill's took {ratios['ms_per_step_paired']:.3f} of its neighbour's time (median).",
                      highlight=False)
    console.print(f"Peak memory: {report['peak_memory_is']}.", highlight=False)
    if report["goals"] and not report["interrupted"]:
        console.print("Goals: " + "; ".join(f"{goal}: {'[green]met[/green]' if met else '[red]missed[/red]'}" for goal, met in report["goals"].items()),
                      highlight=False)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" + (f" (1/{1 / value:.1f})" if value < 0.5 else "")


def write(report: dict, out: Path) -> list[Path]:
    """demo.json and demo.png: both made first, then each put in place whole. Without matplotlib, which pip brings, demo.json alone."""
    # JSON knows neither nan nor inf: a loss that diverged is null.
    payload = json.dumps(_finite(report), indent=1, allow_nan=False).encode() + b"\n"
    files = {"demo.json": payload}
    try:
        files["demo.png"] = plot(report)
    except ImportError as error:
        print(f"gradmill demo: no demo.png: {error}")
    for name, data in files.items():
        write_whole(out / name, data)
    return [out / name for name in files]


def _finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def write_whole(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_evidence(path: Path, lines: list[str], command: str) -> None:
    """Writes a page of docs/results: its lines, and the command and machine that they are from."""
    import gradmill

    foot = (f"`{command}`, one thread of {platform.machine()}, gradmill on {gradmill._C.isa() if gradmill._C else 'torch'}, "
            f"torch {torch.__version__}.")
    write_whole(path, "\n".join([*lines, "", foot, ""]).encode())
    print(f"wrote {path}")


def plot(report: dict) -> bytes:
    """The loss curves as a PNG: every step thin, smoothed thick, validations as points."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    labels = {"torch": "torch: fp32, fused AdamW"}
    for (name, half), color, marker in zip(report["halves"].items(), ("#d95f02", "#1b6ca8")[-len(report["halves"]):], "so"):
        label = labels.get(name, f"gradmill: {half['recipe'] or 'fp32'}, {half['optimizer']}")
        losses = half["training_losses"]
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=color, alpha=0.22, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color=color, linewidth=2, label=label)
        if half["validation"]:
            final = half["validation_loss"]
            axes.plot(*zip(*half["validation"]), marker, color=color, markersize=7, markeredgecolor="white",
                      label=f"   held-out files, last {final:.3f}" if report["text"]["held_out_files"] else f"   held-out text, last {final:.3f}")
    axes.set_xlabel(f"step ({report['options']['batch']} x {report['options']['seq']} bytes each)")
    axes.set_ylabel("cross-entropy (nats per byte)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    some = next(iter(report["halves"].values()))
    size = f"{some['parameters'] / 1e6:.1f}M parameters, " if some.get("parameters") else ""
    axes.set_title(f"{size}{report['text']['source']}" + (" (interrupted)" if report["interrupted"] else ""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential average, corrected for its start."""
    total, norm, smooth = 0.0, 0.0, []
    for v in values:
        total, norm = weight * total + (1 - weight) * v, weight * norm + 1 - weight
        smooth.append(total / norm)
    return smooth
