"""gradmill demo: real runs at a tiny size, its files, its errors, and Ctrl-C."""
import functools
import io
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zlib
from contextlib import nullcontext

import pytest
import torch
from rich.console import Console

import gradmill
from gradmill import cli, demo

TINY = ["--width", "64", "--depth", "1", "--batch", "2", "--seq", "32", "--threads", "1", "--device", "cpu"]
HALF = {"optimizer", "recipe", "lr", "steps", "validation_loss", "ms_per_step_median", "ms_per_step_mean", "tokens_per_second", "weight_bytes",
        "gradient_bytes", "optimizer_bytes", "peak_memory_bytes", "training_losses", "ms_per_step", "validation", "parameters",
        "layers_replaced", "optimizer_class"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of seven small files."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(7):
        (folder / f"{i}.txt").write_text(f"file {i}: the quick brown fox jumps over the lazy dog. " * 40)
    return folder


def run(*arguments):
    """(exit code, demo.json of the run)"""
    out = arguments[arguments.index("--out") + 1]
    code = cli.main(["demo", *TINY, *map(str, arguments)])
    return code, json.loads((out / "demo.json").read_text())


def options(folder, out, **more):
    return demo.Options(**{**dict(width=64, depth=1, batch=2, seq=32, threads=1, device="cpu", steps=6, text=str(folder), out=str(out)), **more})


# --- runs -------------------------------------------------------------------------------------------------
def test_a_run_on_the_standard_library(tmp_path, capsys):
    code, report = run("--steps", 3, "--out", tmp_path)
    assert code == 0
    printed = capsys.readouterr().out
    for row in ("validation loss", "ms per step, median", "tokens/s", "bytes of weights", "bytes of gradients", "bytes of optimizer state",
                "peak memory"):
        assert row in printed
    assert set(report["halves"]) == {"torch", "gradmill"}
    assert not report["interrupted"] and report["gradmill"] == gradmill.__version__
    assert report["text"]["held_out_files"] > 1 and report["text"]["files"] > 100
    for half in report["halves"].values():
        assert HALF == set(half)
        assert half["steps"] == 3 == len(half["training_losses"]) == len(half["ms_per_step"])
        assert all(1 < loss < 7 for loss in half["training_losses"])
        assert half["validation"][0][0] == 0 and half["validation"][-1] == [3, half["validation_loss"]]
        assert half["gradient_bytes"] == 4 * half["parameters"]
    ours, theirs = report["halves"]["gradmill"], report["halves"]["torch"]
    assert theirs["weight_bytes"] == 4 * theirs["parameters"] and theirs["optimizer_bytes"] == 8 * theirs["parameters"]
    assert ours["layers_replaced"] == 7 and ours["optimizer_class"] == "gradmill.optim.QGaLoreAdamW"
    assert report["ratios"]["weight_bytes"] == pytest.approx(ours["weight_bytes"] / theirs["weight_bytes"])
    assert set(report["goals"]) == {"optimizer state under 1/8", "validation loss within 2%", "a step no slower"}
    # the same start: before the first step the halves differ by the rounding of the weights only
    assert ours["validation"][0][1] == pytest.approx(theirs["validation"][0][1], rel=0.01)
    assert sorted(os.listdir(tmp_path)) == ["demo.json", "demo.png"]


def test_without_matplotlib_what_was_measured_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert demo.write({"halves": {}}, tmp_path) == [tmp_path / "demo.json"] and os.listdir(tmp_path) == ["demo.json"]
    assert "no demo.png: " in capsys.readouterr().out


def test_the_picture_is_a_picture(text, tmp_path):
    from PIL import Image

    assert run("--steps", 2, "--text", text, "--no-baseline", "--out", tmp_path)[0] == 0
    with Image.open(tmp_path / "demo.png") as image:
        image.verify()
    with Image.open(tmp_path / "demo.png") as image:
        assert image.size[0] >= 800 and len(image.convert("RGB").getcolors(1 << 20)) > 20


@pytest.mark.parametrize("optimizer, recipe", [("adamw", "none"), ("adamw8bit", "int8"), ("lion", "int8_weights")])
def test_other_optimizers_and_recipes(optimizer, recipe, text, tmp_path):
    if not hasattr(gradmill.optim, {"lion": "Lion"}.get(optimizer, "AdamW")):
        pytest.skip(f"gradmill.optim has no {optimizer} yet")
    code, report = run("--steps", 2, "--text", text, "--optimizer", optimizer, "--recipe", recipe, "--no-baseline", "--out", tmp_path)
    assert code == 0 and set(report["halves"]) == {"gradmill"} and report["ratios"] is None
    half = report["halves"]["gradmill"]
    assert half["optimizer"] == optimizer and half["recipe"] == (None if recipe == "none" else recipe)
    assert half["layers_replaced"] == (0 if recipe == "none" else 7)
    states = 1 if optimizer == "lion" else 2
    if optimizer == "adamw":
        assert half["optimizer_bytes"] == 4 * states * half["parameters"]
    else:
        assert half["parameters"] * states < half["optimizer_bytes"] < 1.5 * half["parameters"] * states


@pytest.mark.parametrize("name", demo.OPTIMIZERS)
def test_every_optimizer_steps_as_it_wants_to(name, text, monkeypatch):
    """Its class over every parameter, its gradients and states counted, and on one batch again and again the loss falls."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # the half is in this process
    choice = demo.OPTIMIZERS[name]
    half = demo.Half("gradmill", options(text, "-", optimizer=name, steps=60, batch=4).checked(), *demo.read_text(str(text))[:2])
    held = half.model.head.weight.detach().clone()
    monkeypatch.setattr(half, "_windows", functools.cache(lambda *_: demo.Half._windows(half, half.train, torch.tensor([0, 40, 80, 120]))))
    losses = [half.step()[0] for _ in range(12)]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] and min(losses) < losses[0] - 0.01
    assert sum(len(g["params"]) for o in half.stepped for g in o.param_groups) == len(list(half.model.parameters())) and not torch.equal(held, half.model.head.weight)
    found = half.measure()
    assert found["optimizer_class"] == f"gradmill.optim.{choice.cls}" and found["gradient_bytes"] == 4 * found["parameters"]
    stateless = choice.cls in ("AdaGradNorm",)
    assert (found["optimizer_bytes"] == 0) == stateless and math.isfinite(half.validate())


def test_muon_through_the_command(text, tmp_path):
    code, report = run("--steps", 2, "--text", text, "--optimizer", "muon", "--no-baseline", "--out", tmp_path)
    assert code == 0 and report["halves"]["gradmill"]["optimizer_class"] == "gradmill.optim.Muon" and report["goals"] is None


def test_xgrad_is_validated_at_its_own_weights(text, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    half = demo.Half("gradmill", options(text, "-", optimizer="xgrad", recipe="none").checked(), *demo.read_text(str(text))[:2])
    for _ in range(3):
        half.step()
    with half.optimizer.weights():
        own = [p.detach().clone() for p in half.model.parameters()]
    shown = half.validate()
    with torch.no_grad():
        for p, value in zip(half.model.parameters(), own):
            p.copy_(value)
    monkeypatch.setattr(half.optimizer, "weights", nullcontext)
    assert half.validate() == shown


def test_the_default_optimizer_needs_less_than_an_eighth_of_torchs_state(text, tmp_path):
    """The goal's bytes depend on shapes only, so two steps of one full-width block show it (embeddings weigh more here)."""
    code, report = run("--steps", 1, "--text", text, "--width", 256, "--out", tmp_path)
    assert code == 0 and report["ratios"]["optimizer_bytes"] < 1 / 8


def test_same_seed_same_losses(text, tmp_path):
    """And the baseline's presence changes nothing."""
    first, again = (run("--steps", 3, "--text", text, *more, "--out", tmp_path)[1]["halves"]["gradmill"]["training_losses"]
                    for more in ((), ("--no-baseline",)))
    assert first == again
    assert first != run("--steps", 3, "--text", text, "--no-baseline", "--seed", 1, "--out", tmp_path)[1]["halves"]["gradmill"]["training_losses"]


def test_both_halves_see_the_same_batches(text, monkeypatch):
    o = options(text, "-").checked()
    train, held_out, _ = demo.read_text(str(text))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # the halves are in this process for once
    seen = []
    for name in ("torch", "gradmill"):
        half = demo.Half(name, o, train, held_out)
        half.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        half.step()
    assert torch.equal(*seen)


# --- text -------------------------------------------------------------------------------------------------
def test_whole_files_are_held_out_and_always_the_same(text):
    train, held_out, what = demo.read_text(str(text))
    assert (train, held_out, what) == demo.read_text(str(text))
    assert what["held_out_files"] == 1 and what["files"] == 7
    held = next(f for f in text.iterdir() if f.read_bytes() == held_out)
    assert held_out not in train and len(train) + len(held_out) == what["bytes"] + 5
    assert held.name == min((f.name for f in text.iterdir()), key=lambda name: zlib.crc32(name.encode()))


def test_the_standard_library_leaves_out_its_tests_and_packages():
    train, held_out, what = demo.read_text(None)
    assert what["bytes"] > 3_000_000 and 0.04 < what["held_out_bytes"] / what["bytes"] < 0.3
    assert what["source"] == "Python's standard library" and b"class TestCase(" in train + held_out


def test_one_file_is_split_at_its_tail(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(200)))
    train, held_out, what = demo.read_text(str(tmp_path / "a.txt"))
    assert train == bytes(range(180)) and held_out == bytes(range(180, 200)) and what["held_out_files"] == 0


# --- errors -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("more, named", [
    (dict(text="/no/such/place"), "/no/such/place"),
    (dict(steps=0), "--steps"), (dict(batch=0), "--batch"), (dict(width=100), "--width"), (dict(threads=0), "--threads"),
    (dict(lr=-1.0), "--lr"), (dict(baseline_lr=math.inf), "--baseline-lr"), (dict(seed=-1), "--seed"),
    (dict(recipe="int3"), "int8_weights"), (dict(optimizer="nadam"), "qgalore"), (dict(device="tpu"), "cuda"),
    (dict(optimizer="fedspeed", recipe="int8_weights"), "--recipe"), (dict(optimizer="xgrad", recipe="int8_weights"), "quantised weights"), (dict(optimizer="vrgd", batch=1), "--batch"),
    (dict(seq=100_000), "too little text"),
])
def test_errors_name_what_was_wrong(more, named, text, tmp_path):
    with pytest.raises(demo.DemoError) as error:
        demo.run(options(text, tmp_path / "out", **more), Console(file=io.StringIO()))
    assert named in str(error.value)
    assert not (tmp_path / "out" / "demo.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_is_named(capsys):
    assert cli.main(["demo", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_empty_folder_and_unwritable_out(tmp_path, text, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["demo", "--text", str(tmp_path / "empty")]) == 2
    assert "0 non-empty file(s)" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--text", str(text), "--seq", "32", "--out", str(tmp_path / "file")]) == 2
    assert "it is a file; name a folder" in capsys.readouterr().err


def test_a_half_that_fails_says_why(text, tmp_path, monkeypatch):
    monkeypatch.setattr(demo.Remote, "step", lambda self: self._call("no_such_method"))
    with pytest.raises(demo.DemoError, match="no_such_method"):
        demo.run(options(text, tmp_path), Console(file=io.StringIO()))
    assert os.listdir(tmp_path) == []


# --- files: whole or not at all ---------------------------------------------------------------------------
def report_for(halves=("torch", "gradmill"), steps=40):
    half = {"optimizer": "qgalore", "recipe": "int8_weights", "lr": 1e-3, "steps": steps, "validation_loss": float("nan"), "parameters": 10,
            "training_losses": [3.0] * steps, "ms_per_step": [1.0] * steps, "validation": [[0, 5.0], [steps, float("nan")]]}
    return {"options": {"batch": 1, "seq": 8}, "text": {"source": "a book", "held_out_files": 0}, "interrupted": False,
            "halves": {name: half for name in halves}}


def test_nothing_is_written_when_the_picture_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "plot", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.write(report_for(), tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(step, tmp_path, monkeypatch):
    (tmp_path / "demo.json").write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        demo.write_whole(tmp_path / "demo.json", b"new" * 1000)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["demo.json"] and (tmp_path / "demo.json").read_text() == "old"


def test_json_has_no_nan(tmp_path):
    demo.write(report_for(), tmp_path)

    def refuse(name):
        raise AssertionError(name)

    report = json.loads((tmp_path / "demo.json").read_text(), parse_constant=refuse)
    assert report["halves"]["torch"]["validation_loss"] is None


# --- Ctrl-C -----------------------------------------------------------------------------------------------
def interrupt_after(monkeypatch, steps, method="step", name="gradmill"):
    real = getattr(demo.Remote, method)

    def call(self):
        if self.name == name and len(self.losses) == steps:
            signal.raise_signal(signal.SIGINT)
        return real(self)

    monkeypatch.setattr(demo.Remote, method, call)


def test_ctrl_c_keeps_what_was_measured(text, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 4)
    said = io.StringIO()
    before = signal.getsignal(signal.SIGINT)
    assert demo.run(options(text, tmp_path, steps=50), Console(file=said, width=100)) == 130
    assert signal.getsignal(signal.SIGINT) is before
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["interrupted"] and (tmp_path / "demo.png").exists()
    for half in report["halves"].values():
        assert half["steps"] == 5 and half["validation"][-1][0] == 5 and half["optimizer_bytes"] > 0
    assert "Stopped at step 5 of 50" in said.getvalue() and "first 5 of 50 steps" in said.getvalue()


def test_a_second_ctrl_c_ends_at_once_and_still_writes(text, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 4)                          # asks to stop after the fifth step,
    interrupt_after(monkeypatch, 5, "validate", "torch")     # and again when the last validation begins
    assert demo.run(options(text, tmp_path, steps=50), Console(file=io.StringIO())) == 130
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["interrupted"] and all(half["steps"] == 5 for half in report["halves"].values())


def test_ctrl_c_before_the_first_step_writes_nothing(text, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 0, "ready")
    said = io.StringIO()
    assert demo.run(options(text, tmp_path), Console(file=said)) == 130
    assert os.listdir(tmp_path) == [] and "nothing written" in said.getvalue()


@pytest.mark.skipif(os.name != "posix", reason="children inherit a signal mask")
def test_ctrl_c_while_a_half_starts_is_kept_for_later_and_from_the_child(text, tmp_path, monkeypatch):
    context = multiprocessing.get_context("spawn")
    real, reached = context.Process.start, []

    def start(self):
        child = subprocess.run([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('alive')"], capture_output=True, text=True)
        signal.raise_signal(signal.SIGINT)
        real(self)
        reached.append((child.stdout, self))

    monkeypatch.setattr(context.Process, "start", start)
    said = io.StringIO()
    assert demo.run(options(text, tmp_path), Console(file=said)) == 130
    (out, process), = reached
    process.kill()
    assert out == "alive\n" and "nothing written" in said.getvalue() and os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process group")
def test_ctrl_c_as_a_terminal_sends_it(text, tmp_path):
    """SIGINT to the whole process group: the children must not die of it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gradmill", "demo", *TINY, "--steps", "100000", "--text", str(text), "--out", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "PYTHONSAFEPATH": "1"})
    for line in process.stdout:
        if line.startswith("step"):
            break
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "Stopped" in out
    if "Written" in out:
        assert json.loads((tmp_path / "demo.json").read_text())["interrupted"]
        assert sorted(os.listdir(tmp_path)) == ["demo.json", "demo.png"]
    else:
        assert os.listdir(tmp_path) == []
