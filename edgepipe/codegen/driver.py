"""The C driver of a bundle: a header for users and the code that calls the kernels in order."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise

from edgepipe.blob import Blob
from edgepipe.codegen.plan import (
    ALIGNMENT,
    MOST_THREADS,
    NO_PEAKS,
    Call,
    Peaks,
    Place,
    Plan,
    TensorSpec,
)
from edgepipe.codegen.turns import WARM_UP
from edgepipe.errors import UserError
from edgepipe.target import Target

#: First bytes of weights.bin; the digit is the version of the file's layout.
WEIGHTS_MAGIC = b"EDGEPW1\0"

_ITEM_BYTES = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2,
    "int32": 4, "uint32": 4, "float32": 4, "int64": 8, "uint64": 8, "float64": 8,
}  # fmt: skip


def check_prefix(prefix: str) -> None:
    """Refuse a prefix that cannot start C identifiers. Raises UserError."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", prefix):
        raise UserError(
            f"'{prefix}' cannot start C identifiers",
            where="--prefix",
            fix="use letters, digits and underscores, a letter first, 64 at most",
        )


def check_threads(threads: int, target: Target) -> None:
    """Refuse a number of threads that no bundle for ``target`` has. Raises UserError."""
    if threads != 1 and target.kind != "cpu":
        what = "run on the GPU" if target.kind == "cuda" else "run on one thread"
        raise UserError(f"bundles for {target.name} {what}", where="--threads",
                        fix="leave it out, or compile for a CPU such as host")  # fmt: skip
    if not 0 <= threads <= MOST_THREADS:
        raise UserError(f"{threads} is not from 0 to {MOST_THREADS}", where="--threads",
                        fix="0 takes as many as the device has cores")  # fmt: skip


def element_count(tensor: TensorSpec) -> int:
    """Number of elements of ``tensor``; 1 for a scalar."""
    count = 1
    for extent in tensor.shape:
        count *= extent
    return count


def tensor_bytes(tensor: TensorSpec) -> int:
    """Size of ``tensor`` in bytes, dense and row-major. Raises UserError for an unknown dtype."""
    if tensor.dtype not in _ITEM_BYTES:
        raise UserError(f"a bundle cannot pass tensors of dtype {tensor.dtype}", where=tensor.name)
    return element_count(tensor) * _ITEM_BYTES[tensor.dtype]


def weights_file(plan: Plan) -> Blob:
    """The content of weights.bin: a 64-byte header (magic, hash, size; rest zero), then the blob.

    The hash ties the blob to the calls that read it, so weights of another model are refused.
    """
    header = WEIGHTS_MAGIC + _weights_hash(plan).to_bytes(8, "little")
    header += (ALIGNMENT + len(plan.weights)).to_bytes(8, "little")
    return Blob((header.ljust(ALIGNMENT, b"\0"), *plan.weights.pieces))


def arena_bytes(plan: Plan) -> int:
    """Size of the arena a caller provides; never 0, so that it can always be allocated."""
    return max(ALIGNMENT, -(-plan.arena_bytes // ALIGNMENT) * ALIGNMENT)


def api_symbols(prefix: str, threaded: bool = False) -> list[str]:
    """The C functions a bundle exports; every other symbol is hidden."""
    return [f"{prefix}_{name}" for name in (*_API, *["run_part"] * threaded)]


def wasm_symbols(prefix: str, warmed: bool = False) -> list[str]:
    """The functions that a WebAssembly module exports; model.mjs knows the rest."""
    names = ("arena_bytes", "init", "run", "step_count", "step", *["warm_up"] * warmed)
    return [f"{prefix}_{name}" for name in names]


def is_warmed(plan: Plan) -> bool:
    """Whether kernels are to be warmed up before the first inference."""
    return any(call.warmed for call in plan.calls)


_API = (
    "version", "weights_bytes", "arena_bytes", "input_count", "output_count",
    "input", "output", "init", "run", "step_count", "step",
)  # fmt: skip


def render(
    plan: Plan,
    prefix: str,
    version: str = "",
    template: str = "driver.c",
    gpu: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return ``{"model.h": …, "driver.c": …}`` for ``plan``.

    ``version`` is what ``PREFIX_version()`` returns. Model-supplied names appear only inside
    escaped C strings. ``gpu`` has the values of another driver ``template``. Raises UserError for
    a prefix or dtype that C cannot express.
    """
    check_prefix(prefix)
    threaded = plan.threads != 1
    values = {
        "prefix": prefix,
        "PREFIX": prefix.upper(),
        "alignment": str(ALIGNMENT),
        "version": c_string(version or prefix),
        "weights_bytes": str(ALIGNMENT + len(plan.weights)),
        "weights_magic": f"0x{int.from_bytes(WEIGHTS_MAGIC, 'little'):016x}ull",
        "weights_hash": f"0x{_weights_hash(plan):016x}ull",
        "arena_bytes": str(ALIGNMENT if plan.gpu else arena_bytes(plan)),
        "input_count": str(len(plan.inputs)),
        "output_count": str(len(plan.outputs)),
        "inputs": _descriptors(prefix, "input", plan.inputs),
        "outputs": _descriptors(prefix, "output", plan.outputs),
        "prototypes": "\n".join(_prototypes(plan.calls)),
        "step_count": str(len(plan.calls)),
        "calls": "\n".join(_call(i, call, threaded) for i, call in enumerate(plan.calls)),
        "parameters": ", int part, int parts" if threaded else "",
        "whole": ", 0, 1" if threaded else "",
        "warm_ups": "\n".join(_warm_ups(plan.calls)),
        # ISO C has no empty arrays.
        "first_weights": ", ".join(str(_first_weights(c)) for c in plan.calls) or "0",
        "meets": _meets(plan.calls),
        "threads": str(plan.threads),
        "most_threads": str(plan.most_threads),
        **(gpu or {}),
    }
    values["api"] = fill("api.c", values)
    values["gpu_api"] = fill("gpu_api.h", values) if gpu else ""
    values["threads_api"] = fill("threads_api.h", values) if threaded else ""
    values["run_part"] = fill("run_part.c", values) if threaded else ""
    values["warm_up"] = fill("warm_up.c", values) if is_warmed(plan) else ""
    values["state"] = _GPU_STATE if gpu else _CPU_STATE
    return {"model.h": fill("model.h", values), "driver.c": fill(template, values)}


def native_files(plan: Plan, prefix: str, peaks: Peaks = NO_PEAKS) -> dict[str, str]:
    """The C programs of a native bundle: ``bench.c`` with ``profile.c``, and ``example.c``."""
    kernels = peaks.kernels.get("", ())
    prototype = "extern void {}(void *, void *, void *) __attribute__((weak));"
    values = {
        "prefix": prefix,
        "PREFIX": prefix.upper(),
        "alignment": str(ALIGNMENT),
        # ISO C has no empty arrays.
        "input_slots": str(max(1, len(plan.inputs))),
        "output_slots": str(max(1, len(plan.outputs))),
        "step_count": str(len(plan.calls)),
        "peak_prototypes": "\n".join(prototype.format(k.symbol) for k in kernels),
        "peaks": "\n".join(f"    {{{c_string(k.of)}, {k.symbol}, {k.work}}}," for k in kernels),
        "copy_bytes": str(peaks.copy_bytes),
        **{f"peak_{n}_bytes": str(b) for n, b in zip("xwy", peaks.buffers, strict=True)},
        "needs": " and the GPU's driver" if plan.gpu else " alone",
        "threads_usage": _THREADS_USAGE if plan.threads != 1 else "",
        "libraries": " -ldl -lpthread" if plan.gpu else "",
    }
    files = {name: fill(name, values) for name in ("bench.c", "profile.c", "example.c")}
    return files | _pool_files(plan, prefix)


#: The threads of a bundle that has them.
POOL = ("pool.h", "pool.c")


def _pool_files(plan: Plan, prefix: str) -> dict[str, str]:
    """``pool.h`` and ``pool.c``: threads that run the model together, for whoever has pthreads."""
    values = {"prefix": prefix, "PREFIX": prefix.upper()}
    return {name: fill(name, values) for name in POOL} if plan.threads != 1 else {}


def rpc_source(prefix: str, inputs: int, outputs: int) -> str:
    """C of the model behind TVM's calling convention; it needs model.h."""
    values = {
        "prefix": prefix,
        "PREFIX": prefix.upper(),
        "input_count": str(inputs),
        "output_count": str(outputs),
        "input_slots": str(max(1, inputs)),
        "output_slots": str(max(1, outputs)),
    }
    return fill("rpc.c", values)


def candidate_source(kernels: Mapping[str, Sequence[tuple[str, int]]]) -> str:
    """C of two kernels to be measured in turn: symbol → dtype and bytes of each argument.

    Arguments in one place share their memory; where sizes differ it has the larger one.
    """
    longest = max(len(arguments) for arguments in kernels.values())
    offset, offsets, lines = 0, [], []
    for place in range(longest):
        present = [a[place] for a in kernels.values() if place < len(a)]
        size, dtype = max(size for _, size in present), present[0][0]
        kind = {"float32": "FLOATS", "float16": "HALVES", "int32": "WORDS"}.get(dtype, "BYTES")
        lines.append(f"    {{{offset}, {size // 4 * 4 if kind != 'BYTES' else size}, {kind}}},")
        offsets.append(offset)
        # A line apart: tensors of powers of two would otherwise share cache sets.
        offset += -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT
    calls = {
        f"call_{i}": f"{symbol}({', '.join(f'memory + {at}' for at in offsets[: len(arguments)])})"
        for i, (symbol, arguments) in enumerate(kernels.items())
    }
    prototypes = [f"extern void {s}({', '.join(['void *'] * len(a))});" for s, a in kernels.items()]
    values = {
        "prototypes": "\n".join(prototypes),
        "bytes": str(offset),
        "tensors": "\n".join(lines),
    }
    return fill("candidate.c", values | calls)


_THREADS_USAGE = """ *
 * With --threads N so many share an inference (0: as many as there are cores); a profile has one.
"""
#: What the header says of memory; lines of a C comment.
_CPU_STATE = """No function allocates memory, does I/O or keeps state
 * other than the weights pointer."""
_GPU_STATE = """The network runs on an NVIDIA GPU: its weights
 * and all tensors in between are in GPU memory, and runs wait for each other. See the end."""


def c_string(text: str) -> str:
    """``text`` as a C string literal, UTF-8; trigraphs, quotes and control codes are escaped."""
    out = []
    for byte in text.encode("utf-8"):
        char = chr(byte)
        # Octal escapes end after three digits, so a following digit cannot join them.
        plain = 32 <= byte < 127 and char not in '"\\?'
        out.append(char if plain else f"\\{byte:03o}")
    return '"' + "".join(out) + '"'


def resource(name: str) -> str:
    """Text of one of the source templates that ship with the package."""
    return resources.files("edgepipe.codegen").joinpath("runtime", name).read_text("utf-8")


def fill(name: str, values: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        return values[match.group(1)]

    return re.sub(r"@(\w+)@", value, resource(name))


def _weights_hash(plan: Plan) -> int:
    digest = hashlib.sha256()
    for piece in plan.weights.pieces:
        digest.update(piece)
    digest.update(repr([(call.symbol, call.arguments) for call in plan.calls]).encode())
    return int.from_bytes(digest.digest()[:8], "little")


def _descriptors(prefix: str, role: str, tensors: Sequence[TensorSpec]) -> str:
    # ISO C has no empty arrays: a scalar's dims and an empty list keep one unused element.
    lines = [
        f"static const int64_t {role}_{i}_dims[] = {{{', '.join(map(str, t.shape)) or '0'}}};"
        for i, t in enumerate(tensors)
    ]
    lines.append(f"static const {prefix}_tensor {role}_tensors[] = {{")
    for i, t in enumerate(tensors):
        fields = f"{c_string(t.name)}, {c_string(t.dtype)}, {len(t.shape)}, {role}_{i}_dims"
        lines.append(f"    {{{fields}, {tensor_bytes(t)}u}},")
    if not tensors:
        lines.append('    {"", "", 0, 0, 0u},')
    return "\n".join([*lines, "};"])


def _prototypes(calls: Sequence[Call]) -> list[str]:
    arity: dict[str, int] = {}
    for call in calls:
        if arity.setdefault(call.symbol, len(call.arguments)) != len(call.arguments):
            raise ValueError(f"{call.symbol} is called with different numbers of arguments")
    more = {call.symbol: ["int32_t"] * len(_more(call)) for call in calls}
    return [
        f"void {symbol}({', '.join(['void *'] * count + more[symbol]) or 'void'});"
        for symbol, count in arity.items()
    ]


def _call(step: int, call: Call, threaded: bool) -> str:
    strides, first = call.strides or (0,) * len(call.arguments), _first_weights(call)
    arguments = [_argument(*pair, first) for pair in zip(call.arguments, strides, strict=True)]
    called = f"{call.symbol}({', '.join(arguments + _more(call))});"
    alone = "if (part == 0) " if threaded and call.pieces == 1 else ""
    return f"    case {step}: {alone}{called} break;"


def _more(call: Call) -> list[str]:
    """What a kernel takes besides pointers: a part of parts, or no turns instead of its work."""
    if call.pieces > 1:
        return ["part", "parts"]
    return ["0"] if call.warmed else []


def _warm_ups(calls: Sequence[Call]) -> list[str]:
    """Every warmed kernel once, without work."""
    arity = {call.symbol: len(call.arguments) for call in calls if call.warmed}
    return [f"    {s}({', '.join([*['NULL'] * n, str(WARM_UP)])});" for s, n in arity.items()]


def _meets(calls: Sequence[Call]) -> str:
    """Of each step 1 where all threads wait behind it: where it or the next one is shared."""
    shared = [call.pieces > 1 for call in calls]
    # Behind the last one they wait in any case.
    waits = [a or b for a, b in pairwise(shared)]
    return ", ".join(str(int(w)) for w in [*waits, False])


def _first_weights(call: Call) -> int:
    """Where in weights.bin those of ``call`` begin."""
    offsets = [place.offset for place in call.arguments if place.space == "weights"]
    return ALIGNMENT + min(offsets) if offsets else 0


def _argument(place: Place, stride: int, first_weights: int) -> str:
    if stride:
        return f"(char *)arena + {place.offset} + (size_t)part * {stride}"
    if place.space == "input":
        return f"(char *)inputs[{place.index}] + {place.offset}"
    if place.space == "output":
        return f"(char *)outputs[{place.index}] + {place.offset}"
    if place.space == "weights":
        return f"(char *)weights + {ALIGNMENT + place.offset - first_weights}"
    return f"(char *)arena + {place.offset}"
