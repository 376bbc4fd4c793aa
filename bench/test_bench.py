"""The same cases under pytest-benchmark, one test per case and entry: `pytest bench --benchmark-only`.

To see what a change did: `pytest bench --benchmark-autosave`, change, `pytest bench --benchmark-compare`. For ratios
between libraries use run.py: pytest-benchmark times one entry after the other.
"""
import itertools

import pytest
import torch

from . import runner

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("pytest_benchmark")


@pytest.fixture(scope="session")
def context(pytestconfig):
    return runner.Context(DEVICE, tiny=bool(pytestconfig.getoption("benchmark_disable", False)))


def _entries():
    context = runner.Context(DEVICE, tiny=True)
    for case in runner.load():
        for k, entry in enumerate(case.build(context).entries):
            yield pytest.param(case, k, id=f"{case.family}.{case.name}-{entry.label}")


@pytest.mark.parametrize("case, k", _entries())
def test_bench(benchmark, context, case, k):
    bench = case.build(context)
    entry = bench.entries[k]
    benchmark.group = bench.title
    benchmark.extra_info.update(bytes=bench.work.bytes, ops=bench.work.ops, bound=bench.work.bound, isa=context.isa, device=DEVICE)
    try:
        parts = runner.build(entry)
    except Exception as error:
        if entry.kind == "ours":
            raise
        pytest.skip(runner.explain(error))
    calls = itertools.count(1)

    def run(run, wait=torch.cuda.synchronize if DEVICE == "cuda" else lambda: None):
        run(next(calls))
        wait()
    # A mixture cannot be one sample here: the part with the largest weight is timed.
    name, (_, part) = max(parts.items(), key=lambda item: item[1][0])
    benchmark.extra_info["part"] = name
    benchmark(run, part)
