"""Reads optimised programs: collectives, and the bytes that their instructions touch.

A program is the text that XLA prints of it (HLO, after all passes and for a single device). The
compiler's own count of bytes takes every operand whole, and both branches of a conditional. Here:

- what slices and gathers read is as much as they give, wherever they are fused into;
- an update in place writes as much as it is given, and reads nothing of what it updates;
- a loop counts as often as the compiler knows that it runs, or else once;
- of a conditional the branch that touches least is counted, and what others touch more is apart;
- a loop that runs once or not at all is a conditional;
- only arrays in the device's main memory count, and not those on the chip (as of a TPU's kernels).

Calls of kernels count their operands and results once, though a kernel may read them several times.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_BITS = {"pred": 8, "token": 0, "opaque": 0}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "add-dependency",
    "domain",
}
_VIEWS = {"bitcast", "reshape", "copy", "convert", "transpose"}
"""Inside a fusion, these are computed for those elements alone that are read of them."""
_NO_KERNELS = {"ConcatBitcast", "AllocateBuffer", "Sharding", "AssumeGatherIndicesInBound"}
_MAIN = 0  # the number of the device's main memory


@dataclass(frozen=True)
class Piece:
    """An array of an instruction's result.

    Attributes:
        bytes: its size, without what a layout may add.
        memory: number of the memory that it lies in; 0 is the main one.
    """

    bytes: int
    memory: int = _MAIN

    @property
    def counted(self) -> int:
        """Its bytes, if it lies in the main memory."""
        return self.bytes if self.memory == _MAIN else 0


@dataclass(frozen=True)
class Instruction:
    """An instruction of a computation.

    Attributes:
        name: its name.
        opcode: what it does, as ``dynamic-slice``.
        pieces: the arrays of its result, those of nested tuples in order.
        operands: names of the instructions that it reads.
        rest: the text behind its operands.
    """

    name: str
    opcode: str
    pieces: tuple[Piece, ...]
    operands: tuple[str, ...]
    rest: str

    @property
    def origin(self) -> str:
        """Name of the operation in JAX that it was made from, or nothing."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def counted(self) -> int:
        """Bytes of its result in the main memory."""
        return sum(piece.counted for piece in self.pieces)

    def named(self, attribute: str) -> tuple[str, ...]:
        """Names of computations that an attribute gives, such as ``calls``."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[^\s,]+)", self.rest)
        return tuple(re.findall(r"%([^\s,{}]+)", found[1])) if found else ()


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in their order; the last one of ``parameters`` has the highest number.

    Attributes:
        instructions: the instructions.
        parameters: names of the parameters by number.
        root: name of the instruction that gives the result.
    """

    instructions: Mapping[str, Instruction]
    parameters: tuple[str, ...]
    root: str

    def users(self, name: str) -> Iterator[Instruction]:
        """The instructions that read a result."""
        for instruction in self.instructions.values():
            if name in instruction.operands:
                yield instruction


@dataclass(frozen=True)
class Program:
    """A whole program.

    Attributes:
        computations: the computations by name.
        entry: name of the one that is called.
        aliased: numbers of the parameters whose memory results are written to.
    """

    computations: Mapping[str, Computation]
    entry: str
    aliased: frozenset[int]

    @property
    def aliased_bytes(self) -> int:
        """Bytes of the parameters whose memory results are written to."""
        entry = self.computations[self.entry]
        names = [entry.parameters[number] for number in self.aliased]
        return sum(piece.bytes for name in names for piece in entry.instructions[name].pieces)


@dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
        kind: one of ``COLLECTIVES``.
        bytes: bytes of its result on a device.
        group: number of devices that take part together.
        origin: the operation in JAX that it was made from.
        times: how often it runs.
    """

    kind: str
    bytes: int
    group: int
    origin: str
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends at least, all runs together (by a ring of the devices)."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "reduce-scatter": self.group - 1.0}
        if self.kind == "collective-permute":
            return float(self.bytes * self.times)
        return self.times * self.bytes * factor.get(self.kind, share)


@dataclass(frozen=True)
class Choice:
    """A conditional.

    Attributes:
        origin: the operation in JAX that it was made from.
        extra: bytes that the branch which touches most touches more than the one that touches
            least.
        collectives: the collectives in that branch.
    """

    origin: str
    extra: int
    collectives: tuple[Collective, ...]


@dataclass
class Traffic:
    """What a computation touches.

    Attributes:
        bytes: bytes of the main memory that are read and written.
        collectives: the collectives, without those of ``choices``.
        choices: the conditionals.
        loops: bytes of one run of each loop whose number of runs is not known, by its origin.
    """

    bytes: int = 0
    collectives: list[Collective] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)


def parse(text: str) -> Program:
    """Reads the text of a program.

    Args:
        text: as ``jax.stages.Compiled.as_text`` gives it.
    """
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    instructions: dict[str, Instruction] = {}
    parameters: dict[int, str] = {}
    root = ""
    for line in text.splitlines():
        opened = re.match(r"(ENTRY )?%?([^\s(]+) .*\{$", line)
        if not line.startswith(" ") and opened and not line.startswith("HloModule"):
            name = opened[2]
            entry = name if opened[1] else entry
            instructions, parameters, root = {}, {}, ""
        elif line.startswith("}"):
            in_order = tuple(parameters[number] for number in sorted(parameters))
            computations[name] = Computation(instructions, in_order, root)
        elif line.startswith("  "):
            instruction, number = _instruction(line)
            instructions[instruction.name] = instruction
            if number is not None:
                parameters[number] = instruction.name
            if line.startswith("  ROOT "):
                root = instruction.name
    return Program(computations, entry, _aliased(text[: text.index("\n")]))


def _aliased(header: str) -> frozenset[int]:
    start = header.find("input_output_alias={")
    if start < 0:
        return frozenset()
    inside = header[start : start + _closed(header, header.index("{", start)) - start]
    return frozenset(int(number) for number in re.findall(r": \((\d+),", inside))


def _closed(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at ``start``."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "({[") - (text[place] in ")}]")
        if not depth:
            return place + 1
    raise AssertionError("a bracket is not closed")


def _instruction(line: str) -> tuple[Instruction, int | None]:
    """Reads a line, and the number of the parameter that it is."""
    line = re.sub(r"/\*.*?\*/", "", line)
    left, _, right = line.strip().removeprefix("ROOT ").partition(" = ")
    of_type = _closed(right, 0) if right.startswith("(") else right.index(" ")
    kind = right[:of_type]
    start = right.index("(", of_type)
    stop = _closed(right, start)
    opcode, inside = right[of_type:start].strip(), right[start + 1 : stop - 1]
    names = () if opcode in ("constant", "parameter") else re.findall(r"%([^\s,(){}]+)", inside)
    number = int(inside) if opcode == "parameter" else None
    pieces = tuple(_pieces(kind))
    return Instruction(left.removeprefix("%"), opcode, pieces, tuple(names), right[stop:]), number


def _pieces(kind: str) -> Iterator[Piece]:
    for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([^\]]*)\](\{[^}]*\})?", kind):
        width = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(width[0]) if width else 0)
        count = math.prod(int(size.removeprefix("<=")) for size in dims.split(",") if size)
        memory = re.search(r"S\((\d+)\)", layout)
        yield Piece(-(-count * bits // 8), int(memory[1]) if memory else _MAIN)


def loop(program: Program) -> str:
    """Name of the body of the largest loop that the entry runs.

    It is found through calls, and where a loop does nothing but another one.
    """
    best, most = "", -1
    for computation in _called(program, program.entry):
        for instruction in program.computations[computation].instructions.values():
            if instruction.opcode == "while":
                size = sum(piece.bytes for piece in instruction.pieces)
                if size > most:
                    best, most = instruction.named("body")[0], size
    return best


def _called(program: Program, name: str) -> Iterator[str]:
    yield name
    for instruction in program.computations[name].instructions.values():
        if instruction.opcode == "call":
            for other in instruction.named("to_apply"):
                yield from _called(program, other)


def traffic(program: Program, name: str | None = None) -> Traffic:
    """Counts what a computation touches in a run, with all that it calls.

    Args:
        program: the program.
        name: name of the computation; None: the whole program.
    """
    total = Traffic()
    _add(total, program, name or program.entry, 1)
    return total


def _add(total: Traffic, program: Program, name: str, times: int) -> None:
    computation = program.computations[name]
    for instruction in computation.instructions.values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            total.collectives.append(_collective(instruction, kind, times))
        if instruction.opcode == "while" and _runs_at_most_once(program, instruction):
            body = traffic(program, instruction.named("body")[0])
            extra = times * body.bytes
            total.choices.append(Choice(instruction.origin, extra, tuple(body.collectives)))
            total.choices.extend(body.choices)
        elif instruction.opcode == "while":
            found = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.rest)
            runs = times * (int(found[1]) if found else 1)
            for part in (*instruction.named("condition"), *instruction.named("body")):
                _add(total, program, part, runs)
        elif instruction.opcode == "call":
            _add(total, program, instruction.named("to_apply")[0], times)
        elif instruction.opcode == "conditional":
            _add_choice(total, program, instruction, times)
        else:
            total.bytes += times * touched(program, computation, instruction)


def _runs_at_most_once(program: Program, instruction: Instruction) -> bool:
    """Whether a loop goes on by a value of its state that its body sets to a constant."""
    condition = program.computations[instruction.named("condition")[0]]
    body = program.computations[instruction.named("body")[0]]
    goes_on, state = condition.instructions[condition.root], body.instructions[body.root]
    index = re.search(r"\bindex=(\d+)", goes_on.rest)
    if goes_on.opcode != "get-tuple-element" or index is None or state.opcode != "tuple":
        return False
    value = body.instructions[state.operands[int(index[1])]]
    while value.opcode in ("copy", "bitcast"):
        value = body.instructions[value.operands[0]]
    return value.opcode == "constant"


def _add_choice(total: Traffic, program: Program, instruction: Instruction, times: int) -> None:
    names = instruction.named("branch_computations") or (
        *instruction.named("true_computation"),
        *instruction.named("false_computation"),
    )
    branches = sorted((traffic(program, name) for name in names), key=lambda branch: branch.bytes)
    least, most = branches[0], branches[-1]
    total.bytes += times * least.bytes
    total.collectives.extend(least.collectives)
    total.choices.extend(least.choices)
    extra = times * (most.bytes - least.bytes)
    total.choices.append(Choice(instruction.origin, extra, tuple(most.collectives)))
    total.choices.extend(most.choices)


def _collective(instruction: Instruction, kind: str, times: int) -> Collective:
    sizes = [piece.bytes for piece in instruction.pieces]
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # The operands are in the result besides.
        sizes = sizes[len(instruction.operands) : 2 * len(instruction.operands)]
    return Collective(kind, sum(sizes), _group(instruction.rest), instruction.origin, times)


def _group(rest: str) -> int:
    """Number of devices that take part together; each of the three ways to write it."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    found = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(found[1].split(",")) if found else 1


def touched(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Bytes of the main memory that an instruction reads and writes, without what it calls."""
    opcode = instruction.opcode
    operands = [computation.instructions[name] for name in instruction.operands]
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    if opcode in ("copy-start", "collective-permute-start"):
        return sum(piece.counted for piece in instruction.pieces[:2])
    if opcode == "slice-start":
        # Operands, result, context: what is read of the operands is as much as the result.
        result = instruction.pieces[len(operands)]
        return _read_as(operands[0], result.bytes) + result.counted
    if opcode in ("async-start", "fusion", "dynamic-slice-start"):
        return _of_called(program, instruction, operands)
    if opcode == "custom-call" and any(f'"{name}"' in instruction.rest for name in _NO_KERNELS):
        return 0
    if opcode in ("slice", "dynamic-slice", "gather"):
        given = sum(piece.bytes for piece in instruction.pieces)
        indices = sum(operand.counted for operand in operands[1:])
        return _read_as(operands[0], given) + indices + instruction.counted
    if opcode == "dynamic-update-slice":
        update = sum(piece.bytes for piece in operands[1].pieces)
        return operands[1].counted + (update if instruction.counted else 0)
    if opcode == "scatter":
        # It reads and writes the places that the updates go to.
        count = (len(operands) - 1) // 2
        updates = sum(piece.bytes for operand in operands[count + 1 :] for piece in operand.pieces)
        read = sum(operand.counted for operand in operands[count:])
        return read + (2 * updates if instruction.counted else 0)
    return sum(operand.counted for operand in operands) + instruction.counted


def _read_as(operand: Instruction, size: int) -> int:
    """Bytes that are read of an operand of which so many are needed."""
    return min(operand.counted, size)


def _of_called(program: Program, fusion: Instruction, operands: list[Instruction]) -> int:
    """What a fusion touches: of each operand what is needed inside, and its results."""
    names = fusion.named("calls")
    if not names:
        return sum(operand.counted for operand in operands) + fusion.counted
    inside = program.computations[names[0]]
    total = 0
    for operand, parameter in zip(operands, inside.parameters, strict=True):
        whole = sum(piece.bytes for piece in operand.pieces)
        total += _read_as(operand, min(whole, _needed(program, inside, parameter)))
    root = inside.instructions[inside.root]
    results = root.operands if root.opcode == "tuple" else (root.name,)
    if fusion.opcode != "fusion":  # its operands come first
        pieces = fusion.pieces[len(operands) : len(operands) + len(results)]
    else:
        pieces = fusion.pieces
    if len(results) != len(pieces):  # the root is an operation with several results
        return total + sum(piece.counted for piece in pieces)
    for name, piece in zip(results, pieces, strict=True):
        total += min(piece.counted, _written(program, inside, name))
    return total


def _needed(program: Program, inside: Computation, name: str) -> int:
    """Bytes of a result inside a fusion that others in it need, each user apart."""
    of_name = inside.instructions[name]
    whole = sum(piece.bytes for piece in of_name.pieces)
    if name == inside.root:
        return whole
    needed = 0
    for user in inside.users(name):
        given = sum(piece.bytes for piece in user.pieces)
        if user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == name:
            needed += given
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            # In place if the result is the fusion's; else the part beside the update is read.
            if not _is_result(inside, user.name):
                needed += whole
        elif user.opcode in _VIEWS:
            # In the same share, as a conversion may change the size.
            needed += whole * _needed(program, inside, user.name) // max(given, 1)
        elif user.opcode == "fusion":
            called = program.computations[user.named("calls")[0]]
            for operand, parameter in zip(user.operands, called.parameters, strict=True):
                if operand == name:
                    needed += _needed(program, called, parameter)
        elif user.opcode == "tuple" and user.name == inside.root:
            needed += whole
        else:
            return whole
    return min(needed, whole)


def _is_result(inside: Computation, name: str) -> bool:
    """Whether a result is one of the computation's, as it is or seen as another shape."""
    if name == inside.root:
        return True
    users = list(inside.users(name))
    root = inside.instructions[inside.root]
    return any(
        (user.opcode == "tuple" and user.name == root.name)
        or (user.opcode == "bitcast" and _is_result(inside, user.name))
        for user in users
    )


def _written(program: Program, inside: Computation, name: str) -> int:
    """Bytes that are written of a result of a fusion."""
    instruction = inside.instructions[name]
    while instruction.opcode == "bitcast":
        instruction = inside.instructions[instruction.operands[0]]
    if instruction.opcode == "dynamic-update-slice" and _is_parameter(inside, instruction):
        return sum(piece.bytes for piece in inside.instructions[instruction.operands[1]].pieces)
    if instruction.opcode == "fusion":
        called = program.computations[instruction.named("calls")[0]]
        return _written(program, called, called.root)
    return sum(piece.bytes for piece in instruction.pieces)


def _is_parameter(inside: Computation, update: Instruction) -> bool:
    """Whether what is updated is a parameter, as it is or seen as another shape."""
    instruction = inside.instructions[update.operands[0]]
    while instruction.opcode == "bitcast":
        instruction = inside.instructions[instruction.operands[0]]
    return instruction.opcode == "parameter"
