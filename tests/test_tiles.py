"""kernels/tiles.json, and the search that writes it: nothing here needs a GPU."""
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET is set: this process interprets kernels, it cannot compile them", allow_module_level=True)

from concurrent.futures import ThreadPoolExecutor

from gradmill.bench import tiles as bench
from gradmill.kernels import aot, tiles
from gradmill.kernels.tiles import Tile

ARCHITECTURES = [name for name in tiles.TABLE if name != "interpreter"]


def test_every_architecture_has_every_format_and_class():
    assert set(ARCHITECTURES) == set(aot.TARGETS)
    for name in ARCHITECTURES:
        rows = tiles.TABLE[name]
        assert set(rows) == {"from", "torch", *tiles.FORMATS}, name
        assert set(rows["from"]) <= set(tiles.FORMATS)
        for pair in rows["torch"]:
            format, shape = pair.split()
            assert format in ("int8", "fp8") and shape in rows[format], (name, pair)
        for format in tiles.FORMATS:
            assert "large" in rows[format] and set(rows[format]) <= set(tiles.CLASSES), (name, format)
            for shape, row in rows[format].items():
                tile = Tile(*row)
                assert all(side & (side - 1) == 0 for side in (tile.bm, tile.bn, tile.bk, tile.warps)) and min(tile) >= 1, (name, format, shape)
                if format in aot.PRODUCTS and name != "gfx942":
                    assert not bench.counted(name, format, tile), (name, format, shape)


@pytest.mark.parametrize("m, n, shape", ((1, 1 << 20, "m16"), (16, 1, "m16"), (17, 1, "m64"), (64, 1 << 20, "m64"), (65, 64, "small"), (1024, 2048, "small"),
                                         (1024, 2049, "large"), (8192, 8192, "large")))
def test_shape_classes_and_what_a_missing_one_takes(monkeypatch, m, n, shape):
    assert tiles.shape_class(m, n) == shape
    rows = {"m64": (1,) * 7, "large": (2,) * 7}
    monkeypatch.setitem(tiles.TABLE["sm_90"], "int8", rows)
    assert tiles.choose("int8", "sm_90", m, n).bm == (1 if shape in ("m16", "m64") else 2)


def test_no_more_programs_than_tiles_or_than_run_at_a_time(monkeypatch):
    monkeypatch.setattr(tiles, "cores", lambda device: 132)
    tile = Tile(128, 256, 128, 8, 8, 3, 2)
    for m, n, want in ((1, 1, 1), (129, 257, 4), (8192, 8192, 264), (128 * 264, 256, 264), (128 * 263, 256, 263)):
        assert tiles.grid(m, n, tile, torch.device("cuda")) == (want,), (m, n)


@pytest.mark.parametrize("hip, capability, want", ((None, (8, 0), "sm_80"), (None, (8, 6), "sm_89"), (None, (8, 9), "sm_89"), (None, (9, 0), "sm_90"), (None, (10, 0), "sm_100"),
                                                   (None, (10, 3), "sm_100"), (None, (12, 0), "sm_89"), ("6.4", (9, 4), "gfx942")))
def test_architectures(monkeypatch, hip, capability, want):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tiles.architecture(torch.device("cuda")) == want


# --- the search -------------------------------------------------------------------------------------------
def test_the_committed_table_is_as_the_search_writes_it(tmp_path):
    bench.write(tmp_path / "tiles.json")
    assert (tmp_path / "tiles.json").read_text() == tiles.TABLE_FILE.read_text()


def test_shapes_belong_to_their_classes():
    assert set(bench.SHAPES) == set(tiles.CLASSES) == set(bench.SIDES)
    for shape, problems in bench.SHAPES.items():
        assert all(tiles.shape_class(m, n) == shape for m, n, _ in problems)


def test_what_cannot_fit_is_rejected():
    """Some by counting, without a compiler, the others by what the compiler made of them."""
    assert bench.counted("sm_89", "int8", Tile(128, 128, 128, 8, 8, 4, 1)) == "shared memory"
    assert bench.counted("sm_90", "int8", Tile(256, 256, 64, 8, 8, 2, 1)) == "accumulators"
    assert not bench.counted("sm_90", "int8", Tile(128, 256, 128, 8, 8, 4, 1)) and bench.counted("sm_90", "fp8", Tile(128, 256, 128, 8, 8, 4, 1))
    reason, *_ = bench.judged(("sm_90", "int8", Tile(128, 256, 128, 8, 4, 4, 1)))
    assert reason.startswith("spills"), reason
    reason, *_ = bench.judged(("sm_90", "int8", Tile(128, 256, 128, 8, 8, 5, 1)))
    assert "bytes of shared memory" in reason, reason
    reason, tile, used = bench.judged(("sm_90", "int8", Tile(64, 128, 64, 8, 4, 3, 1)))
    assert not reason and tile.programs == min(4, aot.resident(used, 4, "sm_90")) > 1 and used["stack"] == 0


def test_dry_run(capsys):
    assert bench.main(["--dry-run", "--arch", "sm_90", "--format", "int8", "--shape", "m64,m16", "--limit", "2", "--jobs", "1"]) == 0
    said = capsys.readouterr().out
    assert "sm_90 int8 m64: " in said and "rejected: " in said and "does not fit" not in said and "m16" not in said
    assert said.count("  bm ") == int(said.split("m64: ")[1].split(" fit")[0]) >= 1


def test_fitting_keeps_the_order_and_counts_what_it_rejects(monkeypatch):
    monkeypatch.setattr(bench, "judged", lambda job: ("spills: 8 bytes" if job[2].warps == 8 else "", job[2], {}))
    with ThreadPoolExecutor(1) as pool:
        kept, why = bench.fitting("sm_90", "int8", "large", pool)
    all = list(dict.fromkeys(bench.candidates("sm_90", "int8", "large")))
    assert kept == [t for t in all if t.warps == 4 and not bench.counted("sm_90", "int8", t)] and kept
    assert why["spills"] and sum(why.values()) + len(kept) == len(all)


@pytest.fixture
def measured(monkeypatch):
    """measured(times, torch's time, row) runs the search on a pretended GPU, whose times are times[tile] (an exception: it does not run)."""
    def run(times, theirs, row, until=float("inf"), pair=("int8", "large")):
        table = {"from": {}, "torch": ["int8 large", "fp8 small"], pair[0]: {pair[1]: list(row)}}
        monkeypatch.setitem(tiles.TABLE, "sm_90", table)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        monkeypatch.setattr(bench, "problem", lambda *a: (lambda i=0: None, lambda got: None))

        class Timer:
            def sample(self, run, start, inner):
                took = theirs if " ".join(pair) in table["torch"] else times[Tile(*table[pair[0]][pair[1]])._replace(group=8)]
                if isinstance(took, Exception):
                    raise took
                return took
        said = []
        bench.search("sm_90", *pair, [t for t in times if t != row], Timer(), until, said.append)
        return Tile(*table[pair[0]][pair[1]]), table, said
    return run


A, B, C = Tile(128, 128, 128, 8, 8, 3, 1), Tile(128, 256, 128, 8, 8, 3, 1), Tile(64, 64, 64, 8, 4, 3, 2)


def test_the_fastest_row_wins_by_more_than_noise(measured):
    best, table, _ = measured({A: 1.0, B: 0.9, C: 2.0}, 1.5, A)
    assert best._replace(group=8) == B and table["torch"] == ["fp8 small"] and "a GPU" in table["from"]["int8"]
    assert measured({A: 1.0, B: 0.99, C: 2.0}, 1.5, A)[0] == A
    assert measured({A: RuntimeError("out of resources"), B: 3.0, C: 2.0}, 9.0, A)[0]._replace(group=8) == C


def test_torch_is_listed_where_it_is_faster(measured):
    assert measured({A: 1.0, B: 0.9}, 0.5, A)[1]["torch"] == ["fp8 small", "int8 large"]
    assert measured({A: 1.0, B: 0.9}, 0.89, A)[1]["torch"] == ["fp8 small"]
    assert measured({A: 1.0, B: 0.9}, RuntimeError("no"), A)[1]["torch"] == ["fp8 small"]
    assert measured({A: 1.0, B: 0.9}, 0.1, A, pair=("packed", "large"))[1]["torch"] == ["int8 large", "fp8 small"]


def test_nothing_that_runs_leaves_the_row(measured):
    best, table, said = measured({A: RuntimeError("x"), B: RuntimeError("y")}, 0.1, A)
    assert best == A and not table["from"] and "int8 large" not in table["torch"] and "nothing ran" in said[-1]


def test_time_that_runs_out_keeps_the_best_so_far(measured):
    best, _, said = measured({A: 1.0, B: 0.5, C: 0.1}, 2.0, A, until=float("-inf"))
    assert best._replace(group=8) == A and any("out of time" in line for line in said)


def test_a_machine_without_a_gpu_is_told_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there: the message for none cannot be seen")
    with pytest.raises(SystemExit):
        bench.main([])
    assert "--dry-run" in capsys.readouterr().err
