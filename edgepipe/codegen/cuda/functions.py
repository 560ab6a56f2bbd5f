"""CUDA C that kernels call by name, put before the kernels of a source that call it."""

from __future__ import annotations

from edgepipe.codegen.cuda import pairs, tensor_cores

#: What a source contains that needs them → their source.
_FUNCTIONS = {
    "tensor_mma(": tensor_cores.SOURCE,
    "bytes_mma(": tensor_cores.BYTES,
    "pair_fma(": pairs.SOURCE,
}


def with_functions(source: str) -> str:
    """``source`` behind what it calls of the above."""
    needed = [text for call, text in _FUNCTIONS.items() if call in source]
    if not needed:
        return source
    first = source.index('extern "C"')
    return source[:first] + "\n".join(needed) + "\n" + source[first:]
