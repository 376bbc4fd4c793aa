"""Triton kernels: bit-equality under the interpreter (in one subprocess) and ahead-of-time compilation for GPUs."""
import ast
import dataclasses
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

pytest.importorskip("triton")

INNER = Path(__file__).with_name("triton_interpreted.py")
FUNCTIONS = [node.name for node in ast.parse(INNER.read_text()).body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """The pytest run with TRITON_INTERPRET=1, started first: it works while this process compiles. (process, report)"""
    with tempfile.TemporaryDirectory() as folder:
        report, output = Path(folder, "report.xml"), Path(folder, "output.txt")
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        for name in [n for n in environment if n.startswith("PYTEST_")]:
            del environment[name]
        with output.open("w") as file:
            process = subprocess.Popen([sys.executable, "-m", "pytest", str(INNER), "-q", "--tb=short", "--import-mode=importlib",
                                        "-p", "no:cacheprovider", f"--junitxml={report}"], cwd=INNER.parent.parent, env=environment,
                                       stdout=file, stderr=subprocess.STDOUT)
        try:
            yield process, report, output
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def interpreted(interpreter):
    """{test function: [(case, failure text or "")]} of that run."""
    process, report, output = interpreter
    process.wait()
    text = output.read_text()[-4000:]
    if not report.exists():
        pytest.fail(f"the interpreted run did not report:\n{text}")
    results: dict = {"output": text}
    for case in xml.parse(report).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
        message = "\n".join(f"{child.get('message') or ''}\n{child.text or ''}" for child in bad)
        results.setdefault(case.get("name").split("[")[0], []).append((case.get("name"), message))
    return results


# --- ahead of time ----------------------------------------------------------------------------------------
if os.environ.get("TRITON_INTERPRET") == "1":  # this process cannot compile
    CASES = []
else:
    from gradmill.kernels import aot
    CASES = [(variant, target) for variant in aot.variants() for target in aot.TARGETS
             if variant.only in ("", target) and (variant.everywhere and (target != "sm_89" or variant.only) or target == "sm_90")]


@pytest.mark.parametrize("variant, target", CASES, ids=[f"{v.name}-{t}".replace(" ", "_") for v, t in CASES])
def test_compiles(variant, target):
    compiled = aot.compile(variant, target)
    text, found = aot.assembly(compiled), aot.found(compiled)
    wanted = variant.instruction.get(target)
    assert wanted is None or wanted in found, f"{variant.name} was written for {wanted}, {target} got {found}"
    assert compiled.metadata.shared <= aot.SHARED[target], f"{compiled.metadata.shared} bytes of shared memory: it would not launch"
    if variant.row:
        assert aot.misfit(variant, target)[0] == ""
    if target.startswith("sm_") and not variant.instruction and variant.elementwise:
        # What bit-equality rests on: no fused multiply-add, no flushed denormals, correctly rounded division and root.
        for inexact in ("fma.rn.f32", ".ftz", "div.full", "div.approx", "sqrt.approx", "rcp.approx"):
            assert inexact not in text, f"{variant.name} on {target}: {inexact}"


def test_arguments_equal_to_one_compile():
    """A launch turns integers equal to 1 into constants (which have no .to()): neither the interpreter nor test_compiles sees it."""
    seen = {}
    for variant, target in CASES:
        if target == "sm_90":
            seen.setdefault((variant.kernel.__name__, *(variant.constants.get(c) for c in ("LOOP", "LONG", "TRANSPOSE", "LEFT"))), variant)
    for variant in seen.values():
        given = {*variant.types, *variant.constants, *(variant.kernel.do_not_specialize or ())}
        ones = {name: 1 for name in variant.kernel.arg_names if name not in given}
        aot.compile(dataclasses.replace(variant, constants={**variant.constants, **ones}), "sm_90")


# --- under the interpreter --------------------------------------------------------------------------------
@pytest.mark.timeout(600)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_interpreted(function, interpreted):
    cases = interpreted.get(function)
    assert cases, f"{function} did not run:\n{interpreted['output']}"
    failures = [f"{name}\n{text}" for name, text in cases if text]
    if failures:
        pytest.fail(f"{len(failures)} of {len(cases)} cases failed\n\n" + "\n".join(failures), pytrace=False)
