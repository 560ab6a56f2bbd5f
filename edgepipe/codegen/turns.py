"""Loops around functions of a WebAssembly module, so that an engine can be told to optimise them.

Engines run new code slowly and optimise a function once it has run for a while, for its next call.
V8 measures that in bytes of machine code that loops jump back over, executed or not. A loop around
all of a function, which turns without doing the work, therefore has it optimised after some
microseconds, in the background, where a part of the work would take a millisecond.

This is done in the linked module: in a kernel's source LLVM would move code out of the loop.
"""

from __future__ import annotations

from collections.abc import Iterator

#: ``turns`` after which V8 optimises a function of a kilobyte of machine code or more: its budget
#: has been 2 to 13 million bytes.
WARM_UP = 16_383

_HEADER = 8
_TYPES, _FUNCTIONS, _EXPORTS, _CODE = 1, 3, 7, 10
_FUNCTION_TYPE, _FUNCTION_EXPORT = 0x60, 0
_CALL, _CONSTANT, _END = 0x10, 0x41, 0x0B


class _Reader:
    """Reads a module from ``at`` on."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def number(self) -> int:
        """A LEB128 number, its sign left out."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def block(self) -> bytes:
        """What follows its own length."""
        size = self.number()
        self.at += size
        return self.data[self.at - size : self.at]


def _number(value: int) -> bytes:
    """LEB128 without sign."""
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def wrap(module: bytes, export: str) -> bytes:
    """``module``, which imports nothing, with a loop around each function that ``export`` calls.

    These have no results; their last parameter (i32) is how many turns are made instead of the
    work, which 0 does. Raises ValueError for a module that is otherwise.
    """
    sections = list(_sections(module))
    held = dict(sections)
    reader = _Reader(held[_CODE])
    bodies = [reader.block() for _ in range(reader.number())]
    types = _parameters(held[_TYPES])
    reader = _Reader(held[_FUNCTIONS])
    parameters = [types[reader.number()] for _ in range(reader.number())]
    for function in set(_called(bodies[_exported(held[_EXPORTS], export)])):
        bodies[function] = _turning(bodies[function], parameters[function] - 1)
    code = _number(len(bodies)) + b"".join(_number(len(b)) + b for b in bodies)
    changed = [(number, code if number == _CODE else data) for number, data in sections]
    return module[:_HEADER] + b"".join(
        bytes([number]) + _number(len(data)) + data for number, data in changed
    )


def _sections(module: bytes) -> Iterator[tuple[int, bytes]]:
    reader = _Reader(module, _HEADER)
    while reader.at < len(module):
        yield reader.byte(), reader.block()


def _parameters(section: bytes) -> list[int]:
    """How many parameters each type has."""
    reader, counts = _Reader(section), []
    for _ in range(reader.number()):
        if reader.byte() != _FUNCTION_TYPE:
            raise ValueError("a type that is no function's")
        counts.append(len(reader.block()))
        reader.block()  # results; a type of a value is a byte
    return counts


def _exported(section: bytes, name: str) -> int:
    """The function exported as ``name``."""
    reader = _Reader(section)
    for _ in range(reader.number()):
        found, kind, number = reader.block(), reader.byte(), reader.number()
        if kind == _FUNCTION_EXPORT and found == name.encode():
            return number
    raise ValueError(f"no function {name} is exported")


def _start(body: bytes) -> int:
    """Where the instructions of a function begin, behind its locals."""
    reader = _Reader(body)
    for _ in range(reader.number()):
        reader.number()
        reader.byte()
    return reader.at


def _called(body: bytes) -> Iterator[int]:
    """What a function calls that does nothing else."""
    reader = _Reader(body, _start(body))
    while (operation := reader.byte()) != _END:
        if operation not in (_CALL, _CONSTANT):
            raise ValueError(f"instruction {operation:#x}")
        operand = reader.number()
        if operation == _CALL:
            yield operand


def _turning(body: bytes, turns: int) -> bytes:
    """A function's ``body`` inside a loop; ``turns`` is the number of the parameter.

    Jumps out of the function end at the same depth, behind the work.
    """
    start, parameter = _start(body), _number(turns)
    before = b"\x03\x40" + b"\x20" + parameter + b"\x04\x40\x05"  # loop, if turns, else
    behind = b"\x0b" + b"\x20" + parameter + b"\x41\x7f\x6a\x22" + parameter  # turns -= 1
    again = b"\x41\x00\x4a\x0d\x00\x0b"  # back while turns > 0
    return body[:start] + before + body[start:-1] + behind + again + bytes([_END])
