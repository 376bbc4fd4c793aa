"""Proves an installed wheel: run by `make wheel` from an empty folder, outside the checkout. Not a pytest file.

    python smoke.py [--without-triton]
"""
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import gradmill


def check(condition, what):
    if not condition:
        raise SystemExit(f"smoke test failed: {what}")
    print(f"ok  {what}")


def trains(model, optimizer, x, y):
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] < 0.7 * losses[0]


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.SiLU(), torch.nn.Linear(256, 128))


def main():
    package = Path(gradmill.__file__).resolve()
    check("site-packages" in package.parts, f"gradmill {gradmill.__version__} comes from site-packages")
    without_triton = importlib.util.find_spec("triton") is None
    if "--without-triton" in sys.argv[1:]:
        check(without_triton, "triton is not installed")
    check(all(op.backend("cpu") != "reference" for op in gradmill.ops.OPS.values()), f"{len(gradmill.ops.OPS)} ops have a fast CPU backend")

    w, g = torch.randn(64, 128), torch.randn(64, 128)
    ours, theirs = (torch.nn.Parameter(w.clone()) for _ in range(2))
    for p, optimizer in ((ours, gradmill.optim.AdamW), (theirs, torch.optim.AdamW)):
        p.grad = g.clone()
        optimizer([p], lr=1e-2).step()
    check(torch.allclose(ours, theirs, rtol=0, atol=1e-6), "AdamW agrees with torch's")

    x, y = torch.randn(64, 128), torch.randn(64, 128)
    for recipe, make in (("int8", lambda m: gradmill.optim.AdamW(m.parameters(), lr=1e-2, states="int8")),
                         ("int8_weights", lambda m: gradmill.optim.QGaLoreAdamW(m.parameters(), lr=2e-2, rank=32, scale=1.0))):
        m = model()
        report = gradmill.convert(m, recipe=recipe)
        optimizer = make(m)
        check(len(report.replaced) == 2 and trains(m, optimizer, x, y), f"recipe {recipe} trains with {type(optimizer).__name__}")

    command = Path(sys.executable).with_name("gradmill")
    info = json.loads(subprocess.run([command, "info", "--json"], check=True, capture_output=True, text=True).stdout)
    check(info["native"]["available"] and (info["triton"] is None) == without_triton, f"the gradmill command runs; ISA {info['native']['isa']}")
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--steps", "2", "--width", "64", "--depth", "1", "--batch", "2", "--seq", "32", "--device", "cpu", "--out", folder]
        subprocess.run([command, "demo", *arguments], check=True, capture_output=True)
        check((Path(folder) / "demo.json").exists() and (Path(folder) / "demo.png").exists(), "a two-step demo wrote demo.json and demo.png")


if __name__ == "__main__":
    main()
