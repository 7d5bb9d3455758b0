"""Reads a kernel's machine code (SASS), as ``nvdisasm -c`` prints it: its loops, what they execute, how far ahead they
load.

Loops are natural loops of the control-flow graph, so it does not matter where the assembler has put their blocks. Of
two ways through a body the one with more loops is taken, then the one with fewer calls, which leaves out the slow
halves of divisions, and among those the one with shorter loops, which leaves out the one for rare numbers, and the
longer one where there are none. Subroutines count where they are called. The number of iterations
is found where it is a constant in the code; only the caller knows the others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

CLASSES = (
    "fma",
    "float",
    "mufu",
    "integer",
    "constant",
    "shared",
    "global",
    "local",
    "shuffle",
    "matrix",
    "barrier",
    "control",
)
"""Classes of instructions: multiplications and additions; other floating-point ones (comparisons, selections,
conversions); special functions; integers, moves and predicates; constant, shared, global and local memory; exchanges
within a warp; matrix products and their memory; barriers of a block; branches, waits and padding."""

_OPCODES = {
    "fma": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 FFMA32I FADD32I FMUL32I HFMA2 HADD2 HMUL2 DFMA DADD DMUL",
    "float": "FSEL FSETP FSET FMNMX FMNMX3 FCHK FRND F2F F2FP F2I I2F I2FP HSETP2 HSET2 HMNMX2 DSETP UF2F UF2FP UF2I"
    " UI2F UI2FP",
    "mufu": "MUFU",
    "constant": "LDC ULDC LDCU",
    "shared": "LDS STS LDSM STSM ATOMS LDS2",
    "global": "LDG STG LDGSTS LD ST ATOM ATOMG RED REDG UTMALDG UTMASTG UBLKCP",
    "local": "LDL STL",
    "shuffle": "SHFL VOTE VOTEU MATCH REDUX",
    "matrix": "HMMA IMMA DMMA QMMA OMMA HGMMA IGMMA QGMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA LDTM STTM WARPGROUP",
    "barrier": "BAR",
    "control": "BRA BRX BRXU JMP JMX JMXU EXIT CALL RET BSSY BSYNC BREAK BMOV WARPSYNC NOP DEPBAR LDGDEPBAR YIELD"
    " NANOSLEEP ERRBAR MEMBAR FENCE SYNCS CCTL CCTLL ELECT BPT ENDCOLLECTIVE UTCBAR UTCATOMSWS ACQBULK PREEXIT",
}
_CLASS_OF = {opcode: name for name, opcodes in _OPCODES.items() for opcode in opcodes.split()}

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-fA-F]+)\*/\s+(?:@(!?U?P(?:\d+|T))\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_LABEL = re.compile(r"^([.$\w]+):\s*$")
_TARGET = re.compile(r"`\(([.$\w]+)\)")
_REGISTER = re.compile(r"(?<![\w.])(U?R)(\d+)(?!\w)")
_PREDICATE = re.compile(r"^!?(U?P\d+)$")
_ADDITIONS = ("IADD3", "IADD", "VIADD", "UIADD3", "UIADD", "UVIADD")
_MOVES = ("MOV", "UMOV", "IMAD", "CS2R", "R2UR", "MOV32I")
_MOST_TRIPS = 1 << 16


class Instruction(NamedTuple):
    """One instruction."""

    address: int
    guard: str | None
    """The predicate under which it does anything, such as ``P0`` and ``!UP1``."""
    opcode: str
    """With its suffixes."""
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its suffixes."""
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """One of :data:`CLASSES`."""
        if self.guard in ("!PT", "!UPT"):
            return "control"  # never executed: padding that works around the hardware
        if self.name == "HFMA2" and re.match(r"R\d+, -RZ, RZ", self.operands):
            return "integer"  # the idiom that sets a register to a constant
        return _CLASS_OF.get(self.name, "integer")

    @property
    def fields(self) -> list[str]:
        """The operands one by one, without ``.reuse``."""
        return [one.strip().replace(".reuse", "") for one in self.operands.split(",")]

    @property
    def bytes(self) -> int:
        """The number of bytes that a thread reads or writes by an access to memory."""
        match = re.search(r"\.(?:[US](8|16)|(64|128|256))(?:\.|$)", self.opcode)
        return int(match.group(1) or match.group(2)) // 8 if match else 4

    def written(self) -> set[str]:
        """The registers that a load writes."""
        match = _REGISTER.fullmatch(self.fields[0])
        if match is None:
            return set()
        return {f"{match.group(1)}{int(match.group(2)) + i}" for i in range(max(self.bytes // 4, 1))}

    def read(self) -> set[str]:
        """The registers that it names as sources; of several in a row, the first."""
        fields = self.fields
        stores = self.name in ("STG", "STS", "STL", "ST", "LDGSTS", "RED", "ATOMS")
        sources = fields if stores or not _REGISTER.fullmatch(fields[0]) else fields[1:]
        return {"".join(pair) for one in sources for pair in _REGISTER.findall(one)}


class Distances(NamedTuple):
    """How far ahead a loop loads, in instructions between a load and the first wait for it, over all its loads."""

    copies: int | None
    """Copies to shared memory (LDGSTS): from the end of a group to the wait for it. None without any."""
    loads: int | None
    """Loads into registers (LDG): to the first use. None without any."""
    groups_left: int | None
    """The most groups of copies that a wait leaves under way."""


@dataclass
class Loop:
    """A loop; for the whole kernel, what runs once."""

    address: int
    """Of its first instruction."""
    body: list[Instruction | Loop]
    """In the order of execution."""
    trips: int | None
    """The number of iterations, where it is a constant."""
    spins: bool = False
    """Whether it only waits for a barrier in memory."""

    @property
    def loops(self) -> list[Loop]:
        """The loops inside, in order; none that only spins."""
        return [one for one in self.body if isinstance(one, Loop) and not one.spins]

    def own(self) -> Counter[str]:
        """The instructions of one iteration by class, those of inner loops left out."""
        return Counter(one.kind for one in self.body if isinstance(one, Instruction))

    def instructions(self) -> Iterator[Instruction]:
        """Those of one iteration, each inner loop once."""
        for one in self.body:
            if isinstance(one, Loop):
                yield from one.instructions()
            else:
                yield one

    def distances(self) -> Distances:
        """See :class:`Distances`; a loop follows itself."""
        steps: list[tuple[int, Instruction]] = []
        uses: list[tuple[int, Instruction]] = []
        length = 0
        for one in self.body:
            if isinstance(one, Loop):
                inside = list(one.instructions())
                uses += [(length + i, each) for i, each in enumerate(inside)]
                length += (one.trips or 1) * len(inside)
            else:
                steps.append((length, one))
                uses.append((length, one))
                length += 1
        uses += [(at + length, one) for at, one in uses]
        commits = [at for at, one in steps if one.name == "LDGDEPBAR"]
        copies: list[int] = []
        left: list[int] = []
        loads: list[int] = []
        for at, one in steps:
            if one.name == "DEPBAR" and commits and (match := re.search(r"0x([0-9a-f]+)", one.operands)):
                left.append(int(match.group(1), 16))
                # The group waited for is that many commits back, perhaps of earlier iterations.
                before = sum(1 for commit in commits if commit < at) - 1 - left[-1]
                iterations, index = divmod(before, len(commits))
                copies.append(at - iterations * length - commits[index])
            elif one.name in ("LDG", "LD") and one.kind == "global":
                mine = one.written()
                loads.append(next((there - at for there, other in uses if there > at and mine & other.read()), length))
        return Distances(min(copies, default=None), min(loads, default=None), max(left, default=None))


def _is_call(one: Instruction) -> bool:
    """Whether it calls a subroutine; a call of a place in the kernel itself is used as a branch."""
    target = _TARGET.search(one.operands)
    return one.name == "CALL" and (target is None or not target.group(1).startswith(".L"))


def read_kernel(text: str) -> Loop:
    """The kernel in the output of ``nvdisasm -c``, as a loop of one iteration.

    Raises:
        ValueError: there is no kernel, or it jumps to computed addresses.
    """
    return _Graph(text).kernel


class _Graph:
    """The control-flow graph. Blocks are numbered by their position in memory."""

    def __init__(self, text: str) -> None:
        self.code: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if match := _LABEL.match(line):
                labels[match.group(1)] = len(self.code)
            elif match := _INSTRUCTION.match(line):
                address, guard, opcode, operands = match.groups()
                self.code.append(Instruction(int(address, 16), guard, opcode, operands))
        if not self.code:
            raise ValueError("there are no instructions in this listing; pass what nvdisasm -c prints for a cubin.")
        self.labels = labels
        self._divide()

    def _divide(self) -> None:
        """Into blocks: their instructions and successors."""
        labels = self.labels
        size = len(self.code)
        goes_on, jumps = [True] * size, [None] * size
        for i, one in enumerate(self.code):
            target = _TARGET.search(one.operands)
            if one.name in ("BRX", "BRXU", "JMX", "JMXU"):
                raise ValueError(f"{one.opcode} at {one.address:#x} jumps to a computed address.")
            if one.name in ("BRA", "JMP") or (one.name == "CALL" and not _is_call(one)):
                if target is not None:
                    jumps[i] = labels.get(target.group(1))  # type: ignore[call-overload]
                # A predicate may also be the first operand.
                goes_on[i] = one.guard is not None or not one.operands.startswith("`")
            elif one.name in ("EXIT", "RET"):
                goes_on[i] = one.guard is not None
        starts = sorted(
            {
                0,
                *(i for i in labels.values() if i < size),
                *(i + 1 for i in range(size - 1) if jumps[i] is not None or not goes_on[i]),
            }
        )
        block_at = {start: b for b, start in enumerate(starts)}
        self.blocks = [self.code[a:b] for a, b in zip(starts, [*starts[1:], size], strict=True)]
        self.next: list[list[int]] = []
        for b, end in enumerate([*starts[1:], size]):
            after = [b + 1] if goes_on[end - 1] and end < size else []
            jump = jumps[end - 1]
            if jump is not None and jump < size:
                after.append(block_at[jump])
            self.next.append(after)

    @cached_property
    def order(self) -> list[int]:
        """The blocks that can be reached, each after those it follows, but for loops."""
        seen, order = {0}, []
        stack = [(0, iter(self.next[0]))]
        while stack:
            block, after = stack[-1]
            following = next((one for one in after if one not in seen), None)
            if following is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.next[following])))
        return order[::-1]

    @cached_property
    def natural_loops(self) -> dict[int, set[int]]:
        """The blocks of each loop by its first one."""
        rank = {block: i for i, block in enumerate(self.order)}
        before: dict[int, list[int]] = {block: [] for block in self.order}
        for block in self.order:
            for following in self.next[block]:
                before[following].append(block)
        dominators = {block: set(self.order) for block in self.order}
        dominators[self.order[0]] = {self.order[0]}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                common = {block} | set.intersection(*(dominators[one] for one in before[block]))
                changed |= common != dominators[block]
                dominators[block] = common
        loops: dict[int, set[int]] = {}
        for block in self.order:
            for first in self.next[block]:
                if rank[first] <= rank[block] and first in dominators[block]:
                    inside = loops.setdefault(first, {first})
                    waiting = [block]
                    while waiting:
                        one = waiting.pop()
                        if one not in inside:
                            inside.add(one)
                            waiting += before[one]
        return loops

    @cached_property
    def kernel(self) -> Loop:
        """The whole kernel."""
        loops = sorted(self.natural_loops.items(), key=lambda loop: len(loop[1]))
        made: dict[int, Loop] = {}
        owner: dict[int, int] = {}  # the outermost loop so far of each block
        for first, inside in loops:
            made[first] = self._loop(first, inside, made, owner)
            owner.update(dict.fromkeys(inside, first))
        return Loop(self.code[0].address, self._path(0, set(self.order), made, owner, None), 1)

    def _loop(self, first: int, inside: set[int], made: Mapping[int, Loop], owner: Mapping[int, int]) -> Loop:
        body = self._path(first, inside, made, owner, first)
        code = [one for block in sorted(inside) for one in self.blocks[block]]
        waits = any(one.name == "NANOSLEEP" or "TRYWAIT" in one.opcode for one in code)
        spins = waits and not any(one.kind in ("fma", "matrix", "shared", "global") for one in code)
        loop = Loop(self.blocks[first][0].address, body, None, spins)
        flat = list(loop.instructions())
        leaving = [
            self.blocks[b][-1]
            for b in inside
            if any(n not in inside for n in self.next[b]) or self.blocks[b][-1].name == "EXIT"
        ]
        start = self.code.index(self.blocks[first][0])
        counts = [trips for one in leaving if (trips := _constant_trips(one, flat, self.code[:start])) is not None]
        loop.trips = 1 if spins else min(counts, default=None)
        return loop

    def _path(
        self, first: int, inside: set[int], made: Mapping[int, Loop], owner: Mapping[int, int], back_to: int | None
    ) -> list[Instruction | Loop]:
        """The way through some blocks that counts, as the module says; ``back_to`` ends it."""

        def loop_at(block: int) -> Loop | None:
            return made.get(block) if block != back_to else None

        def blocks_of(block: int) -> set[int]:
            return self.natural_loops[block] if loop_at(block) is not None else {block}

        def following(block: int) -> list[int]:
            mine = blocks_of(block)
            after = {n for one in mine for n in self.next[one] if n in inside and n not in mine}
            return sorted({owner.get(n, n) for n in after})

        def worth(block: int) -> tuple[int, int, int, int]:
            loop = loop_at(block)
            flat = self.blocks[block] if loop is None else list(loop.instructions())
            calls, length = sum(map(_is_call, flat)), len(flat)
            # Of loops of which one runs the longer is for rare numbers.
            return (0, -calls, 0, length) if loop is None or loop.spins else (1, -calls, -length, 0)

        best: dict[int, tuple[tuple[int, ...], int | None]] = {}
        start = first if back_to is not None else owner.get(first, first)
        stack, done = [start], set[int]()
        while stack:
            at = stack[-1]
            after = [n for n in following(at) if n != back_to]
            waiting = next((n for n in after if n not in done and n not in stack), None)
            if waiting is not None:
                stack.append(waiting)
                continue
            stack.pop()
            done.add(at)
            ends = not after if back_to is None else any(back_to in self.next[one] for one in blocks_of(at))
            choices: list[tuple[tuple[int, ...], int | None]] = [((0, 0, 0, 0), None)] if ends else []
            choices += [(best[n][0], n) for n in after if n in best]
            if choices:
                rest, then = max(choices, key=lambda choice: choice[0])
                best[at] = tuple(a + b for a, b in zip(worth(at), rest, strict=True)), then
        path: list[Instruction | Loop] = []
        at: int | None = start
        while at is not None and at in best:
            loop = loop_at(at)
            path += [loop] if loop is not None else self._with_subroutines(self.blocks[at])
            at = best[at][1]
        return path

    def _with_subroutines(self, block: Sequence[Instruction]) -> list[Instruction]:
        """A block, each call followed by the code that it runs."""
        code: list[Instruction] = []
        for one in block:
            code.append(one)
            target = _TARGET.search(one.operands)
            if _is_call(one) and target is not None and target.group(1) in self.labels:
                start = self.labels[target.group(1)]
                end = next((i for i in range(start, len(self.code)) if self.code[i].name == "RET"), start - 1)
                code += self.code[start : end + 1]
        return code


def _number(text: str) -> int | None:
    """An immediate operand, or a register that is always zero."""
    if text in ("RZ", "URZ", "SRZ"):
        return 0
    match = re.fullmatch(r"(-?)0x([0-9a-fA-F]+)", text)
    if match is None:
        return None
    value = int(match.group(2), 16)
    value -= 1 << 32 if value >= 1 << 31 else 0
    return -value if match.group(1) else value


def _constant_trips(branch: Instruction, loop: Sequence[Instruction], before: Sequence[Instruction]) -> int | None:
    """The iterations of a loop that ``branch`` leaves, if it counts to a constant by a constant from a constant."""
    predicate = (branch.guard or branch.fields[0]).lstrip("!")
    at = next((i for i, one in enumerate(loop) if one is branch), len(loop))
    compared: Instruction | None = None
    for i in range(at - 1, -1, -1):
        one = loop[i]
        targets = [match.group(1) for field in one.fields[:2] if (match := _PREDICATE.match(field))]
        if predicate not in targets or not ("SETP" in one.name or "PLOP3" in one.name):
            continue
        sources = [match.group(1) for field in one.fields[2:] if (match := _PREDICATE.match(field))]
        if "PLOP3" in one.name or ".EX" in one.opcode:
            # A copy, or the upper half of a comparison of 64 bits.
            if not sources:
                return None
            predicate = sources[-1]
            continue
        compared, at = one, i
        break
    if compared is None or compared.name not in ("ISETP", "UISETP"):
        return None
    operands = compared.fields[2:4]
    bound = next((value for field in operands if (value := _number(field)) is not None), None)
    register = next((field for field in operands if _REGISTER.fullmatch(field)), None)
    if bound is None or register is None:
        return None
    for i, one in enumerate(loop):
        if one.name not in _ADDITIONS or one.guard is not None:
            continue
        fields = [field for field in one.fields if not _PREDICATE.match(field)]
        sources = [field for field in fields[1:] if _REGISTER.fullmatch(field)]
        step = next((value for field in fields[1:] if (value := _number(field))), None)
        moved = {(o.fields[0], o.fields[-1]) for o in loop if o.name in _MOVES}
        if len(sources) != 1 or not step or (fields[0] != sources[0] and (sources[0], fields[0]) not in moved):
            continue
        if register not in (fields[0], sources[0]):
            continue
        old = i > at or register != fields[0]  # compared before the step
        start = _initial(sources[0], before)
        if start is None:
            return None
        trips = -((start - bound) // step) + (1 if old and "NE" in compared.opcode else 0)
        return trips if 1 <= trips <= _MOST_TRIPS else None
    return None


def _initial(register: str, before: Sequence[Instruction]) -> int | None:
    """The value of a register before a loop, if the last instruction that writes it sets it to a constant."""
    for one in reversed(before):
        fields = one.fields
        pair = one.name == "CS2R" and "32" not in one.opcode and fields[0][-1:].isdigit()
        targets = {fields[0], f"R{int(fields[0][1:]) + 1}" if pair else ""}
        if register in targets:
            return _number(fields[-1]) if one.name in _MOVES or one.name == "HFMA2" else None
    return None
