"""What the build promises: no torch in the native core, one wheel that imports anywhere, every room in the package."""
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import gradmill
import pytest

from .conftest import LEVELS

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for pattern in ("*.h", "*.cpp", "*.cu", "*.cuh") for p in (ROOT / "csrc").rglob(pattern))


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


def test_no_native_source_includes_torch():
    assert SOURCES
    for path in SOURCES:
        assert not [i for i in includes(path) if re.match(r"(torch|ATen|c10|caffe2)\b", i)], path


def test_bindings_is_the_only_file_that_knows_python():
    for path in SOURCES:
        if path.name != "bindings.cpp":
            assert not [i for i in includes(path) if "pybind11" in i or i == "Python.h"], path


def test_torch_is_not_a_build_requirement_and_a_range_at_run_time():
    text = (ROOT / "pyproject.toml").read_text()
    assert "torch" not in re.search(r"^requires = \[(.*)\]", text, re.M).group(1)
    wanted = [r for r in metadata.requires("gradmill") if re.match(r"torch\b", r)]
    assert len(wanted) == 1 and ">=" in wanted[0] and "==" not in wanted[0]


def test_metadata():
    assert metadata.version("gradmill") == gradmill.__version__
    assert metadata.metadata("gradmill")["License-Expression"] == "Apache-2.0" and (ROOT / "LICENSE").exists()
    assert {e.name: e.value for e in metadata.entry_points(group="console_scripts") if e.value.startswith("gradmill")} == {"gradmill": "gradmill.cli:main"}


def test_every_folder_of_the_package_is_in_the_wheel():
    listed = set(re.findall(r'"(gradmill[\w.]*)"', re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S).group(1)))
    there = {"gradmill"} | {f"gradmill.{p.parent.relative_to(ROOT / 'pyops').as_posix().replace('/', '.')}"
                            for p in (ROOT / "pyops").rglob("__init__.py") if p.parent != ROOT / "pyops"}
    assert listed == there | {"gradmill.kernels", "gradmill.bench"}


def test_every_data_file_that_code_reads_is_in_the_wheel():
    text = re.search(r"^\[tool.setuptools.package-data\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.M | re.S).group(1)
    listed = {f"{folder}/{name}" for package, names in re.findall(r"^\W?([\w.]+)\W* = \[(.*)\]$", text, re.M)
              for folder in ["pyops" if package == "gradmill" else package.split(".")[1]] for name in re.findall(r'"(.*?)"', names)}
    there = {p.relative_to(ROOT).as_posix() for folder in ("pyops", "kernels", "bench") for p in (ROOT / folder).rglob("*")
             if p.suffix in (".json", ".typed", ".c", ".h") and "results" not in p.parts}
    assert listed == there


def test_the_source_distribution_is_the_checkout(tmp_path):
    """Without csrc, which setuptools leaves out by itself, it would not build."""
    checkout = tmp_path / "checkout"
    for name in (".ci", "bench", "csrc", "docs", "kernels", "pyops", "tests"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.tmp"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name[0] != ".":
            shutil.copy(path, checkout)
    files = {p.relative_to(checkout).as_posix() for p in checkout.rglob("*") if p.is_file()}
    done = subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    assert not files - held


def test_every_family_has_the_same_name_in_every_room():
    for family in ("quant", "matmul", "optim", "projection", "binary"):
        for path in (f"csrc/cpu/{family}.cpp", f"csrc/cuda/{family}.cu", f"kernels/{family}.py", f"pyops/ops/{family}.py", f"pyops/reference/{family}.py",
                     f"tests/test_{family}.py"):
            assert (ROOT / path).exists(), path


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file's needed libraries")
def test_the_module_needs_no_library_of_torch_openmp_or_cuda_and_holds_no_path_of_its_builder():
    data = Path(gradmill._C.__file__).read_bytes()
    dynamic = set(re.findall(rb"lib[\w+-]+\.so(?:\.\d+)*", data))
    for name in (b"libtorch", b"libc10", b"libgomp", b"libomp", b"libiomp", b"libcudart.so", b"libstdc++"):
        assert not [d for d in dynamic if d.startswith(name)], dynamic
    for folder in (ROOT, sys.base_prefix, Path(sys.prefix) / "lib"):
        assert os.fsencode(folder) + b"/" not in data, f"a path of the machine that built it: {folder}"


def run(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1", **environment})


@pytest.mark.parametrize("cap", LEVELS)
def test_an_environment_variable_caps_the_instruction_set(cap):
    result = run("import gradmill; print(gradmill._C.isa())", GRADMILL_ISA=cap)
    assert result.stdout.strip() == cap, result.stderr


def test_a_process_imports_without_the_native_module_and_without_triton():
    code = """
import sys
sys.modules['gradmill._C'] = None
sys.modules['triton'] = None
import torch, gradmill, warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('always')
    codes, _, _ = gradmill.ops.quantize(torch.tensor([[127.0, -1.0]]), 'int8')
print(codes.tolist(), len([w for w in seen if 'slow reference' in str(w.message)]))
"""
    result = run(code)
    assert result.stdout.strip() == "[[127, -1]] 1", result.stderr


def test_importing_gradmill_does_not_import_triton_or_matplotlib():
    result = run("import sys, gradmill; print([m for m in ('triton', 'matplotlib', 'rich') if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
