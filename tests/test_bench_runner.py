"""The benchmark's runner: what fails is a row, goals, points, peers, memory; and the comparison of instruction counts."""
import importlib
import importlib.util
import json
import threading
import time
from pathlib import Path

import pytest
import torch

import gradmill

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bench():
    """bench/ as a package of its own, with the modules asked for."""
    spec = importlib.util.spec_from_file_location("bench_run_for_runner", ROOT / "bench" / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    run.package()
    return lambda name: importlib.import_module(f"gradmill_bench.{name}")


def measured(runner, build, full=False, **options):
    case = runner.Case("quant", "a_case", build, options.pop("goal", None), False)
    return runner.measure(case, runner.Context("cpu", tiny=True, full=full), runner.timer("cpu"), seconds=0.02, rounds=2, **options)


def test_what_fails_is_a_row_with_its_reason(bench):
    runner, report, page = bench("runner"), bench("report"), bench("page")
    calls = []

    def half_way(i):
        calls.append(i)
        if len(calls) > 4:
            raise ValueError("no more")

    def refuses():
        raise KeyError("of its own")
    result = measured(runner, lambda ctx: runner.Bench("a job", runner.UNCOUNTED, [
        runner.ours(lambda: lambda i: None), runner.baseline("torch", lambda: lambda i: time.sleep(0.001)), runner.rival("breaks", lambda: half_way),
        runner.rival("refuses", refuses), runner.peer("no_such_package", "absent", lambda m: m), runner.compiled("compiled", lambda: 1 / 0)]))
    reasons = {e.label: e.reason for e in result.entries}
    assert reasons["gradmill"] == reasons["torch"] == "" and not result.failed
    assert "no more" in reasons["breaks"] and "of its own" in reasons["refuses"] and reasons["absent"] == "no_such_package is not installed" and "--full" in reasons["compiled"]
    assert result.torch.ratio[0] > 1 and result.ours.of_limit is None

    def cannot(ctx):
        raise RuntimeError("cannot be built")
    broken = measured(runner, cannot)
    assert "cannot be built" in broken.failed
    facts = {"command": "c", "date": "d", "cpu": "x", "threads": 1, "cores": 1, "isa": "i", "torch_isa": "t", "gradmill": "g", "commit": None, "torch": "t", "python": "p",
             "load": None, "environment": {}}
    data = json.loads(report.dumps(report.as_data(facts, {"copy": 1e9}, {}, {}, {"tiny": False, "complete": True, "took_s": 1.0}, [result, broken])))
    text = page.page(data)
    assert "cannot be built" in text and "no more" in text and "of its own" in text
    assert "cannot be built" in report.markdown(facts, {}, {}, [], {}, [result, broken])
    report.summary([result, broken])


def test_threads_of_a_case_end_with_it(bench):
    runner, before, seen = bench("runner"), torch.get_num_threads(), []
    measured(runner, lambda ctx: runner.Bench("a job", runner.UNCOUNTED, [runner.ours(lambda: lambda i: seen.append(torch.get_num_threads()))], threads=1))
    assert set(seen) == {1} and torch.get_num_threads() == before


@pytest.mark.parametrize("mine, theirs, want", [(20e-6, 11e-6, "met"), (22e-6, 11e-6, "MISSED"), (5e-6, 50e-6, "met")])
def test_a_goal_of_so_much_later(bench, mine, theirs, want):
    runner, report = bench("runner"), bench("report")
    ours, torchs = (runner.Timed(kind, kind, dict.fromkeys(range(3), t)) for kind, t in (("ours", mine), ("torch", theirs)))
    runner.compare(ours, torchs)
    result = runner.Result(None, "", runner.UNCOUNTED, [ours, torchs], [], (runner.LATER, 10e-6))
    assert result.goal_said == want and report.aim(*result.goal) == "+10.0 us"
    result.others = 0.5
    assert result.goal_said == "unclear"


def test_facts_and_bytes(bench):
    runner = bench("runner")
    weight = gradmill.QuantizedWeight.quantize(torch.randn(8, 64), gradmill.formats.Format("int8"))
    assert runner.nbytes([torch.zeros(3), {"a": (weight, torch.zeros(2, dtype=torch.int64))}, "text", None]) == 12 + 8 * 64 + 8 * 4 + 16
    result = measured(runner, lambda ctx: runner.Bench("a job", runner.UNCOUNTED, [
        runner.ours(lambda: runner.knowing(lambda i: None, lambda: {"state bytes": 7, "loss": 2.5}))], per_call=(10, "tokens")))
    assert result.ours.facts == {"state bytes": 7, "loss": 2.5}
    said = bench("report").known(bench("report")._entry(result.ours), result.per_call)
    assert "tokens/s" in said and "state 7 B" in said and "loss 2.5" in said


def test_scaling_cases_are_points(bench):
    runner = bench("runner")
    cases = [c for c in runner.load(("scaling",)) if c.family == "scaling"]
    points = [c.build(runner.Context("cpu", tiny=True)).point for c in cases]
    assert all(c.full for c in cases) and len(set(points)) == len(cases)
    assert {"parameters", "threads", "batch", "tokens", "rows"} <= {varies for _, varies, _ in points}


@pytest.mark.parametrize("file", sorted(f.name for f in (ROOT / "bench" / "results").glob("c*-*.json")))
def test_what_is_below_its_limit_or_behind_says_why(bench, file):
    """Every committed row that is under 70% of its limit (measured before and after the run: the nearer), or slower than torch's way or the best
    other by more than a tie, has a reason: in the run, or in the case since."""
    runner, data = bench("runner"), json.loads((ROOT / "bench" / "results" / file).read_text())
    cases, context, silent = {(c.family, c.name): c for c in runner.load()}, runner.Context("cpu", tiny=True), []
    for row in data["results"]:
        mine = next(e for e in row["entries"] if e["kind"] == "ours")
        others = [e for e in row["entries"] if e["kind"] != "ours" and e.get("ratio") and not e["label"].startswith("gradmill")]
        behind = [e["label"] for e in others if e["ratio"]["median"] < 1 and not e["tie"]]
        bound, case = row["work"]["bound"], cases.get((row["family"], row["case"]))
        if "not_run" in mine or case is None:
            continue
        now = case.build(context)
        drift = min(1.0, data["limits_after"].get(bound, 1e99) / data["limits"][bound]) if bound in data["limits"] else 1.0
        low = bound == now.work.bound and mine["of_limit"] is not None and mine["of_limit"] / drift < 0.7   # a case that is bound by something else now is another
        if (low or behind) and not now.why:
            silent.append((f"{row['family']}.{row['case']}", mine["of_limit"], behind))
    assert not silent, "\n".join(map(str, silent))


def test_every_peer_is_listed(bench):
    peers = bench("peers")
    found = peers.found()
    assert list(found) == [p.distribution for p in peers.PEERS] and all(found.values())
    wanted = {line.strip() for line in (ROOT / "bench" / "peers.txt").read_text().splitlines() if line.strip() and not line.startswith("#")}
    assert set(found) <= wanted, "make bench-peers tries to install each"
    assert bench("page").peer_lines({"peers": found})


def test_a_peer_that_waits_for_ever_is_left(bench):
    peers = bench("peers")
    with pytest.raises(TimeoutError, match="1 s"), peers.within(1):
        time.sleep(30)
    with peers.within(30):
        pass
    ended = []

    def elsewhere():
        with peers.within(30):
            ended.append(True)
    thread = threading.Thread(target=elsewhere)   # no signals there
    thread.start()
    thread.join()
    assert ended


def test_a_training_process_answers_and_its_end_is_said(bench):
    training, limits = bench("training"), bench("limits")
    worker = training.Worker(model="language", way="gradmill", width=32, depth=1, batch=2, seq=16, steps=2, device="cpu")
    assert worker.process.pid in limits.CHILDREN and limits.OtherWork().share() is None
    assert 4 < worker("train 2") < 7 and worker("step") > 0 and worker("measure")["optimizer_bytes"] > 0
    worker.process.kill()
    with pytest.raises(RuntimeError, match="its process ended"):
        worker("step")
    pid = worker.process.pid
    del worker
    assert pid not in limits.CHILDREN
    with pytest.raises(RuntimeError, match="no_such_way"):
        training.Worker(model="language", way="no_such_way", width=32, depth=1, batch=2, seq=16, steps=2, device="cpu")("step")


@pytest.mark.parametrize("model", ["language", "images"])
@pytest.mark.parametrize("way", ["torch", "gradmill", "gradmill fp32", "gradmill q-galore"])
def test_every_way_trains(bench, model, way):
    if model == "images":
        pytest.importorskip("sklearn")
    size = {"depth": 1, "seq": 16} if model == "language" else {}
    worker = bench("training").Worker(model=model, way=way, width=32, batch=4, steps=2, device="cpu", **size)
    assert 1 < worker("train 2") < 7 and worker("step") > 0 and worker("measure")["parameters"] > 1000


def test_every_limit_has_a_meaning_and_every_peak_a_function(bench):
    limits, runner = bench("limits"), bench("runner")
    level = gradmill._C.detected_isa()
    for name in limits.LEVELS[:limits.LEVELS.index(level) + 1]:
        found = limits.registers(name, 1, 0.001)
        assert not found or {"fp32", "popcount"} <= set(found) and all(rate > 1e8 for rate in found.values()), (name, found)
    assert set(found) <= set(limits.MEANING)
    for case in runner.load(("binary",)):
        assert case.build(runner.Context("cpu", tiny=True)).work.bound in limits.MEANING, case.name


# --- instructions -----------------------------------------------------------------------------------------
@pytest.fixture
def instructions():
    spec = importlib.util.spec_from_file_location("bench_instructions", ROOT / "bench" / "instructions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_jump_names_the_kernel(instructions, tmp_path, capsys, monkeypatch):
    rows = {"a": {"instructions": 2.0, "per": "value"}, "b": {"registers": 64, "spills": 0, "shared": 0, "stack": 0, "matrix": 8}}
    monkeypatch.setattr(instructions, "PARTS", {"cpu": lambda: ("cc 1", rows)})
    table = tmp_path / "table.json"
    run = lambda: (instructions.main(["--table", str(table)]), capsys.readouterr().out)
    assert run()[0] == 0 and json.loads(table.read_text())["cpu"]["kernels"] == rows
    assert "no kernel jumped" in run()[1]
    rows["a"] = {"instructions": 2.03, "per": "value"}
    assert run()[0] == 0, "within 3%"
    rows["a"], rows["b"] = {"instructions": 2.2, "per": "value"}, {"registers": 64, "spills": 4, "shared": 0, "stack": 0, "matrix": 0}
    status, said = run()
    assert status == 1 and "cpu: a: instructions 2.03 -> 2.2" in said and "b: spills 0 -> 4" in said and "b: no matrix instruction is left of 8" in said
    monkeypatch.setattr(instructions, "PARTS", {"cpu": lambda: ("cc 2", {"a": {"instructions": 9.0, "per": "value"}})})
    status, said = run()
    assert status == 0 and "not compared: cc 1 was there before" in said

    def missing():
        raise FileNotFoundError("valgrind is not installed")
    monkeypatch.setattr(instructions, "PARTS", {"cpu": missing})
    status, said = run()
    assert status == 0 and "left as it was: valgrind is not installed" in said and json.loads(table.read_text())["cpu"]["compiler"] == "cc 2"


def test_the_committed_table(instructions):
    table = json.loads(instructions.TABLE.read_text())
    assert instructions.TABLE.read_text() == instructions.dumps(table)
    assert set(table["cpu"]["kernels"]) == set(instructions.kernels())
    assert all(row["instructions"] > 0 for row in table["cpu"]["kernels"].values())
