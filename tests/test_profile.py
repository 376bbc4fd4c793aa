"""gradmill.profile: what it counts is what was called, in every thread, and nothing stays behind."""
import os
import random
import subprocess
import sys
import threading

import pytest
import torch

import gradmill
from gradmill import ops, speeds
from gradmill.ops import _registry

from .conftest import SEED


def rows(p):
    return {(r.op, r.backend): r for r in p.rows}


def test_calls_and_bytes_are_counted_by_hand():
    m, n, calls = random.randrange(1, 40), random.randrange(1, 300), random.randrange(1, 5)
    x = torch.randn(m, n)
    with gradmill.profile() as p:
        for _ in range(calls):
            codes, scales, zeros = ops.quantize(x, "int8")
        ops.quantize(torch.randn(1, n).expand(m, n), "int8")  # an expanded row is read once
    (row,) = p.rows
    written = codes.nbytes + scales.nbytes + zeros.nbytes
    assert (row.op, row.device, row.backend, row.calls) == ("quantize", "cpu", ops.OPS["quantize"].backend("cpu"), calls + 1)
    assert row.bytes_read == 4 * m * n * calls + 4 * n and row.bytes_written == written * (calls + 1) and row.bytes == row.bytes_read + row.bytes_written
    assert 0 < row.seconds < p.wall and row.share == row.seconds / p.wall


def test_what_an_optimizer_changes_in_place_is_read_and_written():
    weight = torch.nn.Parameter(torch.randn(13, 7))
    optimizer = gradmill.optim.AdamW([weight], lr=1e-3)
    weight.grad = torch.randn(13, 7)
    optimizer.step()
    with gradmill.profile() as p:
        optimizer.step()
    row = rows(p)["fused_step", ops.OPS["fused_step"].backend("cpu")]
    changed = 3 * weight.nbytes  # the weight and two moments
    assert row.bytes_written == changed and changed + weight.nbytes <= row.bytes_read <= changed + weight.nbytes + 200  # scalars and a key too


def test_backward_is_counted_where_autograd_runs_it_and_no_profile_means_no_trace():
    layer = gradmill.nn.Linear(24, 16, recipe="int8")
    x = torch.randn(5, 24, requires_grad=True)

    def step():
        layer(x).sum().backward()
    with gradmill.profile() as alone:
        step()
    with gradmill.profile() as p:
        forward = threading.Thread(target=step)
        forward.start()
        forward.join()
        y = layer(x)
        backward = threading.Thread(target=lambda: y.sum().backward())
        backward.start()
        backward.join()
    step()
    assert _registry.profiler is None
    assert {k: 2 * r.calls for k, r in rows(alone).items()} == {k: r.calls for k, r in rows(p).items()}
    assert rows(alone)["linear_int8_backward", ops.OPS["linear_int8_backward"].backend("cpu")].calls == 1


def test_concurrent_threads_lose_no_call():
    x, calls, threads = torch.randn(3, 64), 200, 4
    with gradmill.profile() as p:
        running = [threading.Thread(target=lambda: [ops.quantize(x, "int8") for _ in range(calls)]) for _ in range(threads)]
        for t in running:
            t.start()
        for t in running:
            t.join()
    assert [r.calls for r in p.rows] == [calls * threads]


def test_an_op_inside_an_op_is_not_timed_twice(monkeypatch):
    """What the inner call took is the inner op's alone."""
    def slow(*a, **k):
        threading.Event().wait(0.02)
        return ops.OPS["quantize"].backends["reference"](*a, **k)
    inner = ops.OPS["quantize"]
    monkeypatch.setitem(inner._chosen, ("cpu", None), slow)
    monkeypatch.setitem(ops.OPS["hadamard"]._chosen, ("cpu", None), lambda x, *a, **k: inner(x, "int8")[1])
    with gradmill.profile() as p:
        ops.hadamard(torch.randn(4, 16))
    by_op = {r.op: r.seconds for r in p.rows}
    assert by_op["quantize"] >= 0.02 and sum(by_op.values()) <= p.wall and by_op["hadamard"] <= p.wall - by_op["quantize"]


def test_errors_pass_through_and_leave_nothing_behind():
    with pytest.raises(RuntimeError, match="another profile"), gradmill.profile(), gradmill.profile():
        pass
    with pytest.raises(TypeError, match="x is int64"), gradmill.profile() as p:
        ops.quantize(torch.ones(2, 2, dtype=torch.int64), "int8")
    assert _registry.profiler is None and p.wall > 0
    with pytest.raises(ValueError), gradmill.profile() as p:
        try:
            ops.quantize(torch.ones(2, 2), "no such code")
        finally:
            ops.dequantize(*ops.quantize(torch.ones(2, 4), "int8"), "int8", 0, 4, torch.float32)
    assert {r.op for r in p.rows} == {"quantize", "dequantize"} and all(r.seconds >= 0 for r in p.rows)


def test_the_table_names_rows_and_hints(monkeypatch):
    monkeypatch.setattr(speeds, "measured", lambda *layer: 0.5 if layer == ("int8", 48, 32) else None)
    slow, unknown = gradmill.nn.Linear(48, 32, recipe="int8"), gradmill.nn.Linear(32, 8, recipe="int8")
    with gradmill.profile() as p, gradmill.use_backend("reference"):
        unknown(slow(torch.randn(3, 48)))
    text = str(p)
    flat = " ".join(text.split())
    assert "linear_int8" in flat and "reference, cpu" in flat and max(map(len, text.splitlines())) <= 100
    assert "slow reference on cpu, not in native" in flat and "recipe int8 was measured at 0.5x" in flat and "48 -> 32" in flat
    assert "32 -> 8" not in flat and len(p.hints) == 2
    with gradmill.profile() as p:
        pass
    assert p.rows == [] and p.hints == [] and "all" in str(p)


@pytest.mark.skipif(gradmill._C is None or gradmill._C.detected_isa() == "portable", reason="needs an instruction set to leave unused")
def test_hints_for_threads_and_instruction_set(monkeypatch):
    before, threads = gradmill._C.isa(), torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    try:
        gradmill._C.set_isa("portable")
        torch.set_num_threads(1)
        with gradmill.profile() as p:
            ops.quantize(torch.randn(2, 8), "int8")
    finally:
        gradmill._C.set_isa(before)
        torch.set_num_threads(threads)
    assert any("portable" in h and gradmill._C.detected_isa() in h for h in p.hints) and any("set_num_threads(6)" in h for h in p.hints)


def test_cuda_times_come_from_events_on_the_calls_stream(monkeypatch):
    """With a stand-in for torch.cuda: events in pairs, on the stream, also when thousands of calls are pending."""
    clock = iter(range(10 ** 9))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "stream 3"
            self.at = next(clock)

        def query(self):
            return True

        def elapsed_time(self, end):
            return float(end.at - self.at)  # ms
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: "stream 3")
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    op = ops.OPS["quantize"]
    monkeypatch.setattr(op, "backend", lambda device: "native")
    monkeypatch.setattr(op, "function", lambda device: op.backends["reference"])
    run, x = op._runner("cuda"), torch.randn(2, 4)
    with gradmill.profile() as p:
        for _ in range(2100):
            run(x, "int8")
        assert len(p._pending) < 2100
        capturing = True
        run(x, "int8")
    (row,) = p.rows
    assert (row.device, row.calls) == ("cuda", 2101) and row.seconds == pytest.approx(2100e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_rows_are_of_the_device():
    x = torch.randn(1024, 1024, device="cuda")
    with gradmill.profile() as p:
        ops.quantize(x, "int8")
    assert p.rows[0].device == "cuda" and 0 < p.rows[0].seconds < p.wall


SCRIPT = """
import sys, torch, gradmill, helper
print("argv", sys.argv[1:], __name__, helper.word)
gradmill.ops.quantize(torch.randn(3, 8), "int8")
{end}
"""


@pytest.mark.parametrize("end, code, said", [("", 0, ""), ("sys.exit(7)", 7, ""), ("raise KeyError('lost')", 1, "KeyError: 'lost'"),
                                             ("sys.exit('no data')", 1, "no data")])
def test_command(tmp_path, end, code, said):
    (tmp_path / "helper.py").write_text("word = 'beside'")
    script = tmp_path / "train it.py"
    script.write_text(SCRIPT.format(end=end))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    program = random.Random(SEED + code).choice([["--", "python", str(script)], [str(script)], ["python3.11", str(script)]])
    result = subprocess.run([sys.executable, "-m", "gradmill", "profile", *program, "--lr", "3", "--", "-x"], capture_output=True, text=True,
                            timeout=240, env={**environment, "PYTHONIOENCODING": "utf-8"}, cwd="/")
    assert result.returncode == code, result.stderr
    assert "argv ['--lr', '3', '--', '-x'] __main__ beside" in result.stdout
    assert "gradmill.profile" in result.stdout and "quantize" in result.stdout and said in result.stderr
    assert "runpy" not in result.stderr


@pytest.mark.parametrize("program", [[], ["--"], ["--", "python"], ["python", "-u", "x.py"], ["nowhere.py"], ["-u", "x.py"], ["-m"], ["--", "-m", "no_such_module"],
                                     ["-m", "gradmill.no_such_module"], ["-m", "torch.nn"], [os.path.dirname(__file__)]])
def test_command_refuses_what_it_cannot_run(program, capsys):
    from gradmill import cli

    assert cli.main(["profile", *program]) == 2
    captured = capsys.readouterr()
    assert "gradmill profile: error" in captured.err and "Traceback" not in captured.err and not captured.out


def test_an_import_that_fails_inside_the_program_is_the_programs(tmp_path, capsys):
    from gradmill import cli

    script = tmp_path / "train.py"
    script.write_text("import no_such_module")
    assert cli.main(["profile", str(script)]) == 1
    captured = capsys.readouterr()
    assert 'line 1, in <module>' in captured.err and "gradmill.profile" in captured.out
    script.write_text("def f(:")
    assert cli.main(["profile", str(script)]) == 1
    captured = capsys.readouterr()
    assert "SyntaxError" in captured.err and "runpy" not in captured.err


def test_command_runs_a_module(tmp_path):
    (tmp_path / "helper.py").write_text("word = 'near'")
    (tmp_path / "training.py").write_text(SCRIPT.format(end="raise SystemExit(3)"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    program = random.choice([["--", "python"], ["python"], []])
    result = subprocess.run([sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-m", "gradmill", "profile", *program, "-m", "training", "7"],
                            capture_output=True, text=True, timeout=240, cwd=tmp_path,
                            env={**environment, "PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "utf-8"})
    assert result.returncode == 3 and "argv ['7'] __main__ near" in result.stdout and "quantize" in result.stdout, result.stderr
