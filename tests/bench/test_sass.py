"""The reader of machine code on listings made up here, in the form that nvdisasm prints."""

from __future__ import annotations

import pytest

from gspn.bench.sass import Instruction, Loop, read_kernel


def listing(code: str) -> str:
    """Lines of code and labels as nvdisasm prints them, with addresses."""
    lines, address = ["\t.target\tsm_90a", '\t.section\t.text.kernel,"ax",@progbits', ".text.kernel:"], 0
    for line in filter(None, map(str.strip, code.splitlines())):
        if line.endswith(":"):
            lines.append(line)
        else:
            guard = "" if line.startswith("@") else "        "
            lines.append(f"        /*{address:04x}*/           {guard}{line} ;")
            address += 16
    return "\n".join(lines)


def read(code: str) -> Loop:
    return read_kernel(listing(code))


NESTED = """
    S2R R0, SR_TID.X
    IMAD.MOV.U32 R7, RZ, RZ, RZ
.L_x_2:
    LDG.E R4, desc[UR4][R2.64]
    CS2R R8, SRZ
.L_x_1:
    LDS R5, [R8]
    FFMA R6, R5, R4.reuse, R6
    IADD3 R8, P1, R8, 0x4, RZ
    IMAD.X R9, RZ, RZ, R9, P1
    ISETP.NE.U32.AND P6, PT, R8, 0x20, PT
    ISETP.NE.U32.AND.EX P6, PT, R9, RZ, PT, P6
    @P6 BRA `(.L_x_1)
    MUFU.EX2 R6, R6
    BAR.SYNC.DEFER_BLOCKING 0x0
    @P0 STG.E.128 desc[UR4][R2.64], R4
    UISETP.NE.AND UP0, UPT, UR7, UR8, UPT
    PLOP3.LUT P3, PT, PT, PT, UP0, 0x80, 0x0
    @P3 BRA `(.L_x_2)
    EXIT
.L_x_9:
    BRA `(.L_x_9)
    NOP
"""


def test_loops_are_nested_and_counted_by_class() -> None:
    kernel = read(NESTED)
    (lines,) = kernel.loops
    (inner,) = lines.loops
    assert kernel.own() == {"integer": 2, "control": 1}
    assert lines.trips is None
    assert lines.own() == {"global": 2, "integer": 3, "mufu": 1, "barrier": 1, "control": 1}
    assert inner.trips == 8
    assert inner.own() == {"shared": 1, "fma": 1, "integer": 4, "control": 1}
    assert lines.loops[0].loops == []


@pytest.mark.parametrize(
    ("counter", "trips"),
    [
        ("UIADD3 UR6, UR6, 0x1, URZ\n UISETP.NE.AND UP0, UPT, UR6, 0x10, UPT", 16),
        ("UISETP.NE.AND UP0, UPT, UR6, 0xf, UPT\n UIADD3 UR6, UR6, 0x1, URZ", 16),
        ("UIADD3 UR7, UR6, 0x2, URZ\n UISETP.LT.AND UP0, UPT, UR7, 0x10, UPT\n UMOV UR6, UR7", 8),
        ("UIADD3 UR6, UR6, 0x1, URZ\n UISETP.NE.AND UP0, UPT, UR6, UR9, UPT", None),
        ("UIADD3 UR6, UR6, UR8, URZ\n UISETP.NE.AND UP0, UPT, UR6, 0x10, UPT", None),
        ("UISETP.NE.AND UP0, UPT, UR5, 0x10, UPT\n UIADD3 UR6, UR6, 0x1, URZ", None),
    ],
)
def test_iterations_are_found_where_they_are_constant(counter: str, trips: int | None) -> None:
    kernel = read(f"UMOV UR6, URZ\n.L_x_0:\nFADD R1, R1, R2\n{counter}\nBRA.U UP0, `(.L_x_0)\nEXIT")
    assert kernel.loops[0].trips == trips


def test_a_count_that_starts_elsewhere() -> None:
    kernel = read("""
        MOV R1, 0xfffffffc
    .L_x_0:
        VIADD R1, R1, 0x1
        ISETP.NE.AND P0, PT, R1, RZ, PT
        @P0 BRA `(.L_x_0)
        EXIT
    """)
    assert kernel.loops[0].trips == 4


def test_blocks_of_a_loop_may_be_anywhere() -> None:
    # The second half of the body lies behind the end of the kernel.
    kernel = read("""
        MOV R1, RZ
    .L_x_0:
        FMUL R2, R2, R3
        BRA `(.L_x_2)
    .L_x_1:
        EXIT
    .L_x_2:
        MUFU.RCP R2, R2
        @!P0 BRA `(.L_x_1)
        BRA `(.L_x_0)
    """)
    assert kernel.loops[0].own() == {"fma": 1, "mufu": 1, "control": 3}
    assert kernel.own() == {"integer": 1, "control": 1}


def test_of_two_ways_the_one_with_fewer_calls_and_then_the_longer() -> None:
    code = """
    .L_x_0:
        @!P4 BRA `(.L_x_1)
        MOV R29, 0x40
        MOV R29, 0x40
        MOV R29, 0x40
        {call}
        BRA `(.L_x_2)
    .L_x_1:
        I2F.U32.RP R24, UR20
        MUFU.RCP R24, R24
    .L_x_2:
        @P0 BRA `(.L_x_0)
        EXIT
    $__internal_0_$__cuda_sm20_rem_s64:
        FADD R1, R1, R2
        RET.REL.NODEC R29 `(kernel)
    """
    slow_and_fast = read(code.format(call="CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rem_s64)"))
    assert slow_and_fast.loops[0].own() == {"float": 1, "mufu": 1, "control": 2}
    both_fast = read(code.format(call="FADD R1, R1, R2"))
    assert both_fast.loops[0].own() == {"integer": 3, "fma": 1, "control": 3}


def test_of_two_loops_of_which_one_runs_the_shorter() -> None:
    kernel = read("""
        @P4 BRA `(.L_x_1)
    .L_x_0:
        FADD R1, R1, R2
        FADD R1, R1, R2
        @P0 BRA `(.L_x_0)
        MOV R3, R4
        EXIT
    .L_x_1:
        MUFU.RCP R24, R24
        @P0 BRA `(.L_x_1)
        EXIT
    """)
    assert [loop.own() for loop in kernel.loops] == [{"mufu": 1, "control": 1}]


def test_a_loop_with_a_call_that_nothing_avoids() -> None:
    # A guard before the loop leaves it out; and the subroutine's code counts.
    kernel = read("""
        @P0 BRA `(.L_x_1)
    .L_x_0:
        CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rem_s64)
        @P0 BRA `(.L_x_0)
    .L_x_1:
        EXIT
    $__internal_0_$__cuda_sm20_rem_s64:
        I2F.RP R1, R2
        MUFU.RCP R1, R1
        RET.REL.NODEC R29 `(kernel)
    """)
    assert kernel.own() == {"control": 2}
    assert kernel.loops[0].own() == {"float": 1, "mufu": 1, "control": 3}


def test_a_call_of_a_place_in_the_kernel_is_a_branch() -> None:
    # So does the assembler end a loop for sm_80.
    kernel = read("""
    .L_x_1:
        FADD R1, R1, R2
        @!P0 CALL.REL.NOINC `(.L_x_0)
        BRA `(.L_x_1)
    .L_x_0:
        EXIT
    """)
    assert kernel.loops[0].own() == {"fma": 1, "control": 2}
    assert kernel.own() == {"control": 1}


def test_loops_that_only_wait_do_not_count() -> None:
    kernel = read("""
    .L_x_0:
        UTCHMMA tmem[UR40], gdesc[UR8], tmem[UR48], tmem[UR4], idesc[UR5], !UPT
    .L_x_1:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR14+0x1000], R50
        @!P1 BRA `(.L_x_1)
        @P0 BRA `(.L_x_0)
        EXIT
    """)
    (loop,) = kernel.loops
    assert loop.loops == []
    assert loop.own() == {"matrix": 1, "control": 1}


WORK = "\n".join(["FFMA R1, R1, R2, R3"] * 20)


@pytest.mark.parametrize(
    ("groups", "left", "ahead"),
    [
        # One buffer: copied at the end of the body, waited for at its start.
        (1, 0, 3),
        # Two groups a line, and those of the next line still under way.
        (2, 2, 30),
        (2, 4, 57),
    ],
)
def test_copies_to_shared_memory(groups: int, left: int, ahead: int) -> None:
    copies = "LDGSTS.E [R4], desc[UR4][R2.64]\nLDGDEPBAR\n" * groups
    kernel = read(f".L_x_0:\nNOP\nDEPBAR.LE SB0, {left:#x}\n{WORK}\n{copies}@P0 BRA `(.L_x_0)\nEXIT")
    distances = kernel.loops[0].distances()
    assert distances.groups_left == left
    assert distances.copies == ahead
    assert distances.loads is None


@pytest.mark.parametrize(
    ("first", "last", "ahead"),
    [
        ("LDG.E R8, desc[UR4][R2.64]", "FADD R9, R8, R9", 21),
        ("LDG.E.128 R8, desc[UR4][R2.64]\nFADD R1, R11, R9", "", 1),
        # Loaded for the next iteration: the use is before the load.
        ("FADD R9, R8, R9\nLDG.E R8, desc[UR4][R2.64]", "", 22),
        ("LDG.E R8, desc[UR4][R2.64]", "STG.E desc[UR4][R4.64], R8", 21),
    ],
)
def test_loads_into_registers(first: str, last: str, ahead: int) -> None:
    kernel = read(f".L_x_0:\n{first}\n{WORK}\n{last}\n@P0 BRA `(.L_x_0)\nEXIT")
    assert kernel.loops[0].distances().loads == ahead


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("FFMA2 R1, R2, R3, R4", "fma"), ("FSEL R1, R2, R3, P0", "float"), ("MUFU.EX2 R1, R2", "mufu"),
        ("LEA.HI.X R7, R0, R23, R1, 0x2, P1", "integer"), ("ULDC.64 UR4, c[0x0][0x208]", "constant"),
        ("LDSM.16.M88.4 R4, [R2]", "shared"), ("LDGSTS.E.BYPASS.128 [R56], desc[UR28][R96.64], P4", "global"),
        ("LDL R51, [R1+0x88]", "local"), ("SHFL.BFLY PT, R3, R2, 0x1, 0x1f", "shuffle"),
        ("HGMMA.64x16x8.F32.TF32 R24, gdesc[UR8], R24, !UPT", "matrix"), ("BAR.SYNC 0x0", "barrier"),
        ("DEPBAR.LE SB0, 0x0", "control"), ("@!PT LDS RZ, [RZ]", "control"), ("HFMA2.MMA R2, -RZ, RZ, 0, 0", "integer"),
    ],
)  # fmt: skip
def test_classes(code: str, kind: str) -> None:
    kernel = read(f"{code}\nEXIT")
    assert isinstance(kernel.body[0], Instruction)
    assert kernel.body[0].kind == kind


@pytest.mark.parametrize(
    ("opcode", "size"),
    [("LDG.E", 4), ("LDG.E.U16", 2), ("LDG.E.S8.CONSTANT", 1), ("STG.E.64", 8), ("LDGSTS.E.BYPASS.128", 16)],
)
def test_bytes_of_an_access(opcode: str, size: int) -> None:
    assert Instruction(0, None, opcode, "R4, desc[UR4][R2.64]").bytes == size


@pytest.mark.parametrize(("code", "message"), [("", "no instructions"), ("BRX R2 -0x10\nEXIT", "computed address")])
def test_what_cannot_be_read_is_refused(code: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(code)
