"""The peers, and whether each runs here: found out by letting it do its smallest job, so that what is said of it stays true.

    python bench/peers.py [cuda]
"""
from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import logging
import signal
import sys
import threading
import warnings
from typing import Callable, NamedTuple

import torch


class Peer(NamedTuple):
    module: str
    distribution: str
    probe: Callable       # (module, device): raises with the reason where the peer cannot do its job
    cases: str            # where it takes part, or why it does not although it runs


def _step(make):
    """A probe: a few steps of an optimizer on one matrix."""
    def probe(module, device):
        p = torch.nn.Parameter(torch.randn(256, 256, device=device))
        optimizer = make(module, p)
        for _ in range(2):
            p.grad = torch.randn_like(p)
            optimizer.step()
        if not bool(p.isfinite().all()):
            raise RuntimeError("its step makes nan of a plain weight")
    return probe


#: q-galore-torch's options of a parameter group.
GALORE_QUANTISED = {"quant": True, "quant_n_bit": 4, "quant_group_size": 256, "cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5}


def _galore(name):
    def make(module, p):
        more = GALORE_QUANTISED if name.startswith("QGaLore") else {}
        return getattr(module, name)([{"params": [p], "rank": 32, "update_proj_gap": 50, "scale": 0.25, "proj_type": "std", **more}], lr=1e-3)
    return make


def _layer(device):
    return torch.nn.Linear(256, 256, bias=False, device=device)


def _bitsandbytes(module, device):
    x = torch.randn(64, 256, device=device)
    module.functional.dequantize_blockwise(*module.functional.quantize_blockwise(x))


def _torchao(module, device):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    layer = torch.nn.Sequential(_layer(device))
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    with torch.no_grad():
        layer(torch.randn(4, 256, device=device))


def _liger(module, device):
    from liger_kernel.transformers import LigerCrossEntropyLoss
    x = torch.randn(4, 64, device=device, requires_grad=True)
    LigerCrossEntropyLoss()(x, torch.arange(4, device=device)).backward()


def gemlite_layer(module, n, device):
    """run(i) of gemlite's 4-bit layer of n x n, groups of 128, batch 1."""
    codes, scale = torch.randint(0, 15, (n, n), dtype=torch.uint8, device=device), torch.ones(n * n // 128, 1, device=device, dtype=torch.float16)
    layer = module.GemLiteLinear(4, group_size=128, in_features=n, out_features=n, input_dtype=module.DType.FP16, output_dtype=module.DType.FP16)
    layer.pack(codes, scale, scale, None)
    x = torch.randn(1, n, dtype=torch.float16, device=device)
    return lambda i: layer.forward(x)


def hqq_layer(module, linear):
    """hqq's 4-bit layer of a linear one, groups of 128."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    return HQQLinear(linear, BaseQuantizeConfig(nbits=4, group_size=128), compute_dtype=torch.float32, device=str(linear.weight.device))


def quanto_layer(module, linear):
    """optimum-quanto's 4-bit layer of a linear one."""
    model = torch.nn.Sequential(linear)
    module.quantize(model, weights=module.qint4)
    module.freeze(model)
    return model


def _forward(make):
    def probe(module, device):
        with torch.no_grad():
            make(module, _layer(device))(torch.randn(4, 256, device=device))
    return probe


def peft_layer(module, linear, rank=16):
    """peft's LoRA of a linear layer."""
    model = torch.nn.Sequential(linear)
    return module.inject_adapter_in_model(module.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]), model)


PATIENCE = 180   # seconds for a peer's first call: some compile

PEERS = [
    Peer("torchao", "torchao", _torchao, "matmul, optim, training"),
    Peer("bitsandbytes", "bitsandbytes", _bitsandbytes, "quant, matmul, optim, training, scaling"),
    Peer("galore_torch", "galore-torch", _step(_galore("GaLoreAdamW")), "projection"),
    Peer("q_galore_torch", "q-galore-torch", _step(_galore("QGaLoreAdamW8bit")), "projection (its algorithm in plain torch is there too)"),
    Peer("flashoptim", "flashoptim", _step(lambda m, p: m.FlashAdamW([p], lr=1e-3)), "optim"),
    Peer("liger_kernel", "liger-kernel", _liger, "in no case: losses and norms, which gradmill leaves to torch"),
    Peer("gemlite", "gemlite", lambda m, device: gemlite_layer(m, 256, device)(0), "matmul"),
    Peer("hqq", "hqq", _forward(hqq_layer), "matmul"),
    Peer("optimum.quanto", "optimum-quanto", _forward(quanto_layer), "matmul"),
    Peer("lion_pytorch", "lion-pytorch", _step(lambda m, p: m.Lion([p], lr=1e-3)), "optim"),
    Peer("pytorch_optimizer", "pytorch-optimizer", _step(lambda m, p: m.AdaBelief([p], lr=1e-3)), "optim"),
    Peer("peft", "peft", _forward(peft_layer), "in no case: adapters around torch's own layers, no kernel (gradmill.lora works on them)"),
]


@contextlib.contextmanager
def quiet():
    """Peers talk while they are imported and compiled: not into our table."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def within(seconds: int):
    """Raises TimeoutError in what takes longer (a compilation that waits for a lock nobody holds), where signals can: POSIX, the main thread."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_):
        raise TimeoutError(f"not ready after {seconds} s")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def explain(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def found(device: str = "cpu", patience: int = PATIENCE) -> dict[str, str]:
    """{distribution: its version and where it takes part, or why it does not}."""
    said = {}
    for peer in PEERS:
        try:
            version = importlib.metadata.version(peer.distribution)
        except importlib.metadata.PackageNotFoundError:
            said[peer.distribution] = "not here: not installed (make bench-peers)"
            continue
        try:
            with quiet(), within(patience):
                peer.probe(importlib.import_module(peer.module), device)
            said[peer.distribution] = f"{version}: {peer.cases}"
        except Exception as error:
            said[peer.distribution] = f"{version} does not run here: {explain(error)}"
    return said


if __name__ == "__main__":
    for name, text in found(*(sys.argv[1:2] or ["cpu"]), patience=1800).items():   # after installing: quanto compiles once
        print(f"{name:<20} {text}")
