"""The gradmill command: info, its JSON, and what it says where something is missing."""
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

import gradmill
from gradmill import cli, info


def run(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "gradmill", *arguments], capture_output=True, text=True, timeout=240,
                          env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8", **environment})


def shown(capsys, *arguments):
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_json_holds_everything(capsys):
    data = json.loads(shown(capsys, "info", "--json"))
    assert data["version"] == gradmill.__version__
    assert data["torch"] == torch.__version__ and data["threads"] == torch.get_num_threads()
    assert set(data["native"]) == {"available", "problem", "compiler", "nvcc", "cuda_archs", "cuda_problem", "isa", "detected_isa", "isa_cap"}
    assert data["devices"][0]["device"] == "cpu" and data["devices"][0]["name"]
    assert len(data["devices"]) == 1 + torch.cuda.device_count()
    assert (data["cuda_problem"] == "") == torch.cuda.is_available()
    assert set(data["ops"]) == set(gradmill.ops.OPS)
    for name, places in data["ops"].items():
        op = gradmill.ops.OPS[name]
        for device in ("cpu", "cuda"):
            place = places[device]
            assert set(place["live"]) | set(place["not_live"]) == set(op.order[device])
            assert all(place["not_live"].values()), "every dead backend has its reason"
        assert places["cpu"]["backend"] == op.backend("cpu")
        assert places["cuda"]["backend"] == (op.backend("cuda") if torch.cuda.is_available() else None)


def test_the_table_names_every_op_and_fits_80_columns(capsys):
    text = shown(capsys, "info")
    for name in gradmill.ops.OPS:
        assert name in text
    assert gradmill.__version__ in text and torch.__version__ in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_module_alone_is_info_and_the_isa_can_be_capped():
    alone = run(GRADMILL_ISA="portable", COLUMNS="100")
    assert alone.returncode == 0, alone.stderr
    assert "portable" in alone.stdout and "GRADMILL_ISA=portable" in alone.stdout
    data = json.loads(run("info", "--json", GRADMILL_ISA="portable").stdout)["native"]
    assert data["isa"] == "portable" and data["isa_cap"] == "portable" and data["detected_isa"] == gradmill._C.detected_isa()


def test_an_unknown_isa_is_named_not_a_crash():
    result = run("info", GRADMILL_ISA="sse9", COLUMNS="200")
    assert result.returncode == 0, result.stderr
    assert "sse9" in result.stdout and "avx2" in result.stdout


@pytest.mark.parametrize("as_json", [False, True])
def test_without_the_native_module(as_json, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradmill._C", None)
    monkeypatch.setattr(gradmill, "_C", None)
    text = shown(capsys, "info", *(["--json"] if as_json else []))
    assert "native module could not be imported" in " ".join(text.split())
    if as_json:
        data = json.loads(text)
        assert not data["native"]["available"] and data["native"]["isa"] is None
        assert data["ops"]["quantize"]["cpu"]["backend"] == "reference"


def test_without_triton(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else real(name, *rest))
    data = info.collect()
    assert data["triton"] is None
    assert data["ops"]["quantize"]["cpu"]["not_live"]["triton"] == "triton is not installed"


def test_interpreted_triton_is_live_on_cpu(monkeypatch):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    data = info.collect()
    assert data["triton_interpreter"] and "triton" in data["ops"]["quantize"]["cpu"]["live"]


def test_version_and_help(capsys):
    for arguments, expected in ((["--version"], gradmill.__version__), (["--help"], "demo"), (["demo", "--help"], "--optimizer")):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize("arguments, named", [
    (["fly"], "fly"),
    (["demo", "--recipe", "int3"], "int8_weights"),
    (["demo", "--optimizer", "nadam"], "qgalore"),
    (["demo", "--device", "tpu"], "cuda"),
    (["demo", "--steps", "many"], "many"),
    (["memory", "--model", "llama-60m", "--rank", "many"], "'many' is no number"),
    (["bench", "--isa", "sse9"], "avx2"),
    (["bench", "--threads", "0"], "--threads is 0; it must be at least 1"),
    (["bench", "--json", "."], "--json .: it is a folder; name a file"),
    (["bench", "--html", os.devnull + "/x/page.html"], "its folder cannot be made"),
])
def test_bad_arguments_name_the_choices(arguments, named, capsys):
    if arguments[0] == "bench":  # another process
        result = run(*arguments)
        assert result.returncode == 2 and named in result.stderr, result.stderr
        return
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("arguments, named", [
    (["memory", "--model", "llama-60m", "--rank", "-3"], "rank is -3; it must be an int of at least 1"),
    (["profile"], "the command line names no program to watch"),
    (["profile", "--", "python"], "'python' names no program to watch"),
    (["profile", "--", "no_such.py"], "there is no script 'no_such.py'"),
])
def test_arguments_that_make_no_sense(arguments, named, capsys):
    assert cli.main(arguments) == 2
    assert named in capsys.readouterr().err


def test_nobody_reads_what_it_prints_and_ctrl_c(monkeypatch, capfd):
    """A closed pipe and Ctrl-C are no reason for a traceback."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        result = subprocess.run([sys.executable, "-m", "gradmill", "info", "--json"], stdout=out, stderr=subprocess.PIPE, text=True, timeout=240,
                                env={**os.environ, "PYTHONSAFEPATH": "1"})
    assert result.returncode == 1 and result.stderr == ""

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "collect", interrupted)
    assert cli.main(["info", "--json"]) == 130
    assert capfd.readouterr().err == "\ngradmill: stopped\n"
