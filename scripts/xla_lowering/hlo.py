"""HLO as text: read, and what in it does not suit Neuron. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# Source: neuronx-cc release notes, "Supported Operators" (AWS Neuron SDK 2.30), in HLO's spelling. Left out although
# documented, because a step has no use for them: collectives, random numbers, scatters, gradients and custom calls.
_OPERATORS = (
    "abs add and atan2 batch-norm-inference batch-norm-training bitcast-convert broadcast ceil clamp compare"
    " concatenate constant convert cosine divide dot dynamic-update-slice exponential floor gather get-tuple-element"
    " iota log maximum minimum multiply negate not pad power reduce reshape reverse rsqrt select shift-right-logical"
    " sign sine slice sqrt subtract tanh transpose tuple"
)
DOCUMENTED = frozenset(_OPERATORS.split())
# Not in that list: gelu's erf and silu's logistic. The compiler has custom calls for both activations (AwsNeuronGelu,
# AwsNeuronErf, AwsNeuronSilu: its error EVRF015), and torch_neuronx lowers gelu to its own (aws-neuron-sdk issue 789),
# so what public torch-xla writes for them is not what would be compiled. The report names those that were met.
WAIVED = frozenset({"erf", "logistic"})


@dataclass(frozen=True)
class Instruction:
    """One line of HLO text; `rest` is what follows the opcode's opening parenthesis."""

    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions and parameters it reads."""
        return re.findall(r"%([\w.-]+)", _inside(self.rest))

    def numbers(self, attribute: str) -> set[str]:
        """Return an attribute that is a list of numbers."""
        found = re.search(rf"\b{attribute}={{([^}}]*)}}", self.rest)
        return set(filter(None, found[1].split(","))) if found else set()


def _inside(text: str) -> str:
    """Return `text` up to the parenthesis that closes what was opened before it."""
    depth = 1
    for at, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return text[:at]
    raise ValueError(f"unbalanced HLO: {text}")


@dataclass(frozen=True)
class Program:
    """A parsed HLO module: every instruction by name, which are in the entry computation, and all roots."""

    instructions: dict[str, Instruction]
    entry: list[str]
    roots: dict[str, str]  # computation -> its root; the entry's is ""

    def ancestors(self, name: str) -> set[str]:
        """Return `name` and all that it depends on."""
        seen, waiting = set[str](), [name]
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += self.instructions[name].operands
        return seen

    def constant(self, name: str) -> str | None:
        """Return the literal behind a name, through broadcasts, reshapes and conversions; None if there is none."""
        while (found := self.instructions[name]).opcode in ("broadcast", "reshape", "convert"):
            name = found.operands[0]
        return _inside(found.rest) if found.opcode == "constant" else None

    def parameters(self) -> dict[int, str]:
        """Return the entry's parameters: number -> name."""
        return {
            int(_inside(self.instructions[name].rest)): name
            for name in self.entry
            if self.instructions[name].opcode == "parameter"
        }


def parse(text: str) -> Program:
    """Read HLO text.

    Raises:
        ValueError: a line is not understood, or there is no entry computation.
    """
    program, computation = Program({}, [], {}), None
    for line in re.sub(r"/\*.*?\*/", "", text).split("\n"):
        if header := re.fullmatch(r"(ENTRY )?%([\w.-]+) \(.*\{", line):
            computation = "" if header[1] else header[2]
        elif computation is not None and line.startswith("  "):
            found = re.match(r"  (ROOT )?%([\w.-]+) = (\(.*?\)(?= [a-z])|\S+) ([a-z][\w-]*)\((.*)", line)
            if not found:
                raise ValueError(f"HLO that is not understood: {line}")
            root, name, shape, opcode, rest = found.groups()
            program.instructions[name] = Instruction(shape, opcode, rest)
            if root:
                program.roots[computation] = name
            if computation == "":
                program.entry.append(name)
    if "" not in program.roots:
        raise ValueError("HLO without an entry computation")
    return program


def dynamic_shapes(program: Program) -> Iterator[str]:
    """Name instructions whose shape is not static."""
    for name, instruction in program.instructions.items():
        if "<=" in instruction.shape or "?" in instruction.shape:
            yield f"{name} is {instruction.shape}"


def undocumented(program: Program) -> Iterator[str]:
    """Name operators that neuronx-cc does not document, or not for this use."""
    for name, found in program.instructions.items():
        operands = found.operands
        if found.opcode not in DOCUMENTED | WAIVED | {"parameter"}:
            yield f"{found.opcode} is not documented"
        elif found.opcode == "power" and not _whole(program.constant(operands[1])):
            yield f"{name}: the exponent is no constant whole number"
        elif found.opcode == "dynamic-update-slice" and None in map(program.constant, operands[2:]):
            yield f"{name}: an index is no constant"
        elif found.opcode == "gather" and not found.numbers("start_index_map") <= found.numbers("collapsed_slice_dims"):
            yield f"{name}: start_index_map and remapped offset dims are not disjoint"
        elif found.opcode == "reduce":
            if None in map(program.constant, operands[len(operands) // 2 :]):
                yield f"{name}: an initial value is no constant"
            computation = re.findall(r"to_apply=%([\w.-]+)", found.rest)[0]
            root = program.instructions[program.roots[computation]].opcode
            if root not in ("add", "maximum", "minimum", "multiply"):
                yield f"{name}: reduces by {root}"


def _whole(literal: str | None) -> bool:
    return literal is not None and re.fullmatch(r"-?\d+", literal) is not None


def unfit_inputs(program: Program, inputs: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    """Say what is wrong with the entry's parameters.

    Args:
        program: the program.
        inputs: name -> (parameter number, -1 if it is none; wanted shape, for example "s32[2,33]").
    """
    parameters, used = program.parameters(), program.ancestors(program.roots[""])
    for name, (number, shape) in inputs.items():
        if parameters.get(number) not in used:
            yield f"{name} was dropped: no result depends on it"
        elif (found := program.instructions[parameters[number]].shape.partition("{")[0]) != shape:
            yield f"{name} is {found}, not {shape}"
    for number, name in parameters.items():
        if (shape := program.instructions[name].shape).startswith("s64[") and not shape.startswith("s64[]"):
            yield f"parameter {number} is {shape}"


def int64_inside(program: Program) -> list[str]:
    """Return the operators that make int64 arrays: Neuron narrows them to int32."""
    arrays = (i for i in program.instructions.values() if re.match(r"s64\[[^\]]", i.shape))
    return sorted({found.opcode for found in arrays})
