"""Mathematical functions of kernels, where TVM's own lowering is too slow or too coarse.

TVM's exp, sigmoid, tanh and erf lowered to vector code instead of scalar library calls.

TVM lowers these to LLVM intrinsics, which become one scalar call per lane. The rules registered
here apply after vectorisation to float32 and float16 of any width. What is left (log, pow, sin,
...) is linked from the bundle's own math object.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from tvm import tirx

from edgepipe.kernels import math

_FLOAT = re.compile(r"^float(16|32|64)(?:x(\d+))?$")
_LEVEL = 110  # above TVM's own rules (99)


def _rule(name: str, expand: Callable[[Any, int], Any]) -> None:
    def lower(call: Any) -> Any:
        dtype = str(call.ty.dtype)
        match = _FLOAT.match(dtype)
        assert match is not None, dtype
        bits, lanes = match.group(1), int(match.group(2) or 1)
        if bits == "64":
            return tirx.call_pure_extern(dtype, name, *call.args)
        if bits == "16":  # computed in float32, rounded once
            wide = f"float32x{lanes}" if lanes > 1 else "float32"
            return tirx.Cast(dtype, expand(tirx.Cast(wide, call.args[0]), lanes))
        return expand(call.args[0], lanes)

    tirx.register_intrin_lowering(f"tirx.{name}", target="llvm", f=lower, level=_LEVEL)


#: Functions for which TVM takes the coarse hardware approximations in CUDA (``__sinf``).
_COARSE = ("exp", "exp2", "exp10", "log", "log2", "log10", "pow", "sin", "cos", "tan", "tanh")


@cache
def register_cuda() -> None:
    """Let CUDA kernels call the exact functions of CUDA's mathematical library in float32."""

    def exact(name: str) -> Callable[[Any], Any]:
        def lower(call: Any) -> Any:
            dtype = str(call.ty.dtype)
            if dtype == "float16":
                wide = [tirx.Cast("float32", argument) for argument in call.args]
                return tirx.Cast(dtype, tirx.call_pure_extern("float32", f"{name}f", *wide))
            suffix = "f" if dtype == "float32" else ""
            return tirx.call_pure_extern(dtype, name + suffix, *call.args)

        return lower

    for name in _COARSE:
        rule = {"target": "cuda", "f": exact(name), "level": _LEVEL}
        tirx.register_intrin_lowering(f"tirx.{name}", **rule)


@cache
def register() -> None:
    """Install the rules, once per process."""
    _rule("exp", math.exp)
    _rule("tanh", math.tanh)
    _rule("erf", math.erf)
    _rule("sigmoid", math.sigmoid)
