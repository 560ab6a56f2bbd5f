"""Making the symbols of a relocatable ELF object private to one model.

A static library can only keep a symbol to itself by its name: two models in one program, or a
model and the program's own libm, would otherwise define ``expf`` twice. Every global that is not
part of the API is renamed to ``PREFIX__NAME`` and hidden. (System V ABI, chapter 4: object files.)
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass

from edgepipe.errors import EdgepipeError

_SHT_SYMTAB = 2
_STB_LOCAL = 0
_STV_HIDDEN = 2
_SHN_UNDEF = 0
# The linker makes this one itself.
_ALLOWED_UNDEFINED = frozenset({"_GLOBAL_OFFSET_TABLE_"})


@dataclass(frozen=True)
class _Layout:
    """Where the fields of one ELF class are: struct formats and field positions."""

    section_offset_at: int  # e_shoff in the file header
    word: str  # format of an address-sized field
    counts_at: int  # e_shentsize, e_shnum
    section: str  # name type flags addr offset size link info addralign entsize
    symbol: str
    value_first: bool  # Elf32_Sym has value and size before info and other


_ELF32 = _Layout(32, "<I", 46, "<10I", "<IIIBBH", True)
_ELF64 = _Layout(40, "<Q", 58, "<IIQQQQIIQQ", "<IBBHQQ", False)


def make_private(data: bytes, keep: Collection[str], prefix: str) -> bytes:
    """Return the little-endian object ``data`` with every global but ``keep`` hidden and renamed.

    Names that start with ``PREFIX_`` are hidden, not renamed. Raises EdgepipeError where the
    object is not ELF, lacks one of ``keep``, or still needs symbols from elsewhere.
    """
    if data[:4] != b"\x7fELF" or data[5] != 1 or data[4] not in (1, 2):
        raise EdgepipeError("the linked object is not a little-endian ELF file")
    layout = _ELF32 if data[4] == 1 else _ELF64
    out = bytearray(data)
    header_at, sections = _sections(out, layout)
    symtab = next(s for s in sections if s[1] == _SHT_SYMTAB)
    strings = sections[symtab[6]]
    names = bytearray(out[strings[4] : strings[4] + strings[5]])
    size = struct.calcsize(layout.symbol)

    undefined, found = [], set()
    for at in range(symtab[4] + size, symtab[4] + symtab[5], size):
        fields = list(struct.unpack_from(layout.symbol, out, at))
        info, other, section = (3, 4, 5) if layout.value_first else (1, 2, 3)
        if fields[info] >> 4 == _STB_LOCAL:
            continue
        name = names[fields[0] : names.index(0, fields[0])].decode()
        if fields[section] == _SHN_UNDEF:
            undefined.append(name)
        elif name in keep:
            found.add(name)
        else:
            fields[other] = (fields[other] & ~3) | _STV_HIDDEN
            if not name.startswith(f"{prefix}_"):
                fields[0] = len(names)
                names += f"{prefix}__{name}".encode() + b"\0"
            struct.pack_into(layout.symbol, out, at, *fields)
    _complain(set(undefined) - _ALLOWED_UNDEFINED, set(keep) - found)

    moved = list(strings)
    moved[4], moved[5] = len(out), len(names)
    out += names
    at = header_at + symtab[6] * struct.calcsize(layout.section)
    struct.pack_into(layout.section, out, at, *moved)
    return bytes(out)


def _sections(data: bytearray, layout: _Layout) -> tuple[int, list[tuple[int, ...]]]:
    (start,) = struct.unpack_from(layout.word, data, layout.section_offset_at)
    size, count = struct.unpack_from("<HH", data, layout.counts_at)
    if count == 0:  # more sections than fit 16 bits: the count is in section 0
        count = struct.unpack_from(layout.section, data, start)[5]
    return start, [struct.unpack_from(layout.section, data, start + i * size) for i in range(count)]


def _complain(undefined: set[str], missing: set[str]) -> None:
    if undefined:
        names = ", ".join(sorted(undefined))
        raise EdgepipeError(f"kernels call functions that the runtime does not provide: {names}")
    if missing:
        raise EdgepipeError(f"the linked object lacks {', '.join(sorted(missing))}")
