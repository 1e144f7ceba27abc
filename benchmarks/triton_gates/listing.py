"""Reads what a compiler made: loops, and what one turn of the main loop costs. SASS (nvdisasm -c), amdgcn, PTX."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    op: str  # "HMMA.16816.F32", "v_mfma_f32_16x16x16_f16"
    operands: str
    jumps_to: str | None  # label


@dataclass(frozen=True)
class Language:
    """How to read a listing, and what to look for (expressions on a line; from `branch` on `Instruction.op`)."""

    label: re.Pattern[str]
    code: re.Pattern[str]  # op and operands
    aim: re.Pattern[str]  # the label in a branch's operands
    branch: re.Pattern[str]
    load: re.Pattern[str]  # from global memory
    matrix: re.Pattern[str]
    wide: re.Pattern[str]  # loads of 128 bits per thread, or of a tile by the copy engine
    int_to_float: re.Pattern[str]
    convert: re.Pattern[str]  # all conversions
    local: re.Pattern[str]  # spills
    idle: re.Pattern[str]  # takes no issue slot worth counting


_NEVER = re.compile(r"$^")
SASS = Language(
    label=re.compile(r"^\s*(\.L_[\w.$]+):"),
    code=re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P[\dT]+\s+)?([A-Z][\w.]*)([^;]*);"),
    aim=re.compile(r"`\((\.L_[\w.$]+)\)"),
    branch=re.compile(r"(BRA|BRX|JMP)\b"),
    load=re.compile(r"(LDG|LDGSTS|UTMALDG|UBLKCP)\b"),
    matrix=re.compile(r"(HMMA|IMMA|QMMA|OMMA|BMMA|HGMMA|IGMMA|QGMMA|UTCHMMA|UTCQMMA|UTCIMMA|UTCOMMA)\b"),
    wide=re.compile(r"(LDG|LDGSTS)\b.*\.128\b|(UTMALDG|UBLKCP)\b"),
    int_to_float=re.compile(r"(I2F|I2FP|I2HP)\b"),
    convert=re.compile(r"(I2F|I2FP|I2HP|F2F|F2FP|F2I|FRND|I2I|I2IP)\b"),
    local=re.compile(r"(LDL|STL)\b"),
    idle=re.compile(r"NOP\b"),
)
AMDGCN = Language(
    label=re.compile(r"^(\.L[\w.$]+):"),
    code=re.compile(r"^\s+([a-z]+_[a-z0-9_]+)\b([^;]*)"),
    aim=re.compile(r"(\.LBB[\w.$]+)"),
    branch=re.compile(r"s_c?branch"),
    load=re.compile(r"(global|buffer|flat)_load_"),
    matrix=re.compile(r"v_(mfma|smfmac|wmma|swmmac)_"),
    wide=re.compile(r"(global|buffer|flat)_load_(lds_)?(dwordx4|b128)"),
    int_to_float=re.compile(r"v_cvt_(f16|f32)_(u|i)(16|32)|v_cvt_f32_ubyte|v_cvt_off_f32_i4"),
    convert=re.compile(r"v_cvt_"),
    local=re.compile(r"scratch_"),
    idle=re.compile(r"s_(nop|waitcnt|delay_alu|endpgm|code_end|sched|barrier)"),
)
PTX = Language(
    label=re.compile(r"^(\$L[\w$]+):"),
    code=re.compile(r"^\s+(?:@!?%p\d+\s+)?([a-z][\w.:]*)([^;]*);"),
    aim=re.compile(r"(\$L[\w$]+)"),
    branch=re.compile(r"bra"),
    load=re.compile(r"ld\.global|cp\.async\.(ca|cg|bulk)"),
    matrix=re.compile(r"mma|wgmma\.mma|tcgen05\.mma"),
    wide=_NEVER,
    int_to_float=_NEVER,
    convert=_NEVER,
    local=_NEVER,
    idle=_NEVER,
)


def instructions(text: str, language: Language) -> tuple[list[Instruction], dict[str, int]]:
    """The program in order, and the index each label stands before."""
    program: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := language.label.match(line):
            labels[found[1]] = len(program)
        elif found := language.code.match(line):
            to = language.aim.search(found[2]) if language.branch.match(found[1]) else None
            program.append(Instruction(found[1], found[2].strip(), to[1] if to else None))
    return program, labels


def loops(program: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """[first, last] of every loop, from the branches that go back; two that begin alike are one, the longer."""
    ends: dict[int, int] = {}
    for i, instruction in enumerate(program):
        first = labels.get(instruction.jumps_to or "", len(program))
        if first < i:  # a branch to itself is the trap after EXIT
            ends[first] = max(ends.get(first, i), i)
    return sorted(ends.items())


def main_loop(text: str, language: Language) -> tuple[list[Instruction], bool]:
    """The instructions of the loop that reads the weights, and whether there is one (else: the whole program).

    Of the loops that load from global memory, and multiply matrices where the program does, the innermost; of
    several of those (a masked tail, say) the longest.
    """
    program, labels = instructions(text, language)

    def has(part: list[Instruction], pattern: re.Pattern[str]) -> bool:
        return any(pattern.match(i.op) for i in part)

    needs = [language.load] + ([language.matrix] if has(program, language.matrix) else [])
    found = [(a, b) for a, b in loops(program, labels) if all(has(program[a : b + 1], need) for need in needs)]
    inner = [(a, b) for a, b in found if not any((c, d) != (a, b) and a <= c and d <= b for c, d in found)]
    if not inner:
        return program, False
    first, last = max(inner, key=lambda loop: loop[1] - loop[0])
    return program[first : last + 1], True


@dataclass(frozen=True)
class Counts:
    """Instructions by kind in the main loop (in the whole program where `looped` is false)."""

    looped: bool
    total: int
    matrix: int
    loads: int
    wide_loads: int
    int_to_float: int
    convert: int
    matrix_ops: str  # the kinds of matrix instruction
    spills_anywhere: int


def count(text: str, language: Language) -> Counts:
    body, looped = main_loop(text, language)

    def number(pattern: re.Pattern[str]) -> int:
        return sum(1 for i in body if pattern.match(i.op))

    int_to_float = number(language.int_to_float)
    kinds = {i.op.split(".")[0] if language is SASS else i.op for i in body if language.matrix.match(i.op)}
    return Counts(
        looped=looped,
        total=len(body) - number(language.idle),
        matrix=number(language.matrix),
        loads=number(language.load),
        wide_loads=number(language.wide),
        int_to_float=int_to_float,
        convert=number(language.convert) - int_to_float,
        matrix_ops="+".join(sorted(kinds)),
        spills_anywhere=sum(1 for i in instructions(text, language)[0] if language.local.match(i.op)),
    )
