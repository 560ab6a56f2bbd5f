"""What a WebAssembly bundle has beside its modules: loader, types, bench program and page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from edgepipe.codegen.driver import fill, is_warmed
from edgepipe.codegen.plan import ALIGNMENT, NO_PEAKS, Peaks, Plan, TensorSpec

_FILES = ("model.mjs", "model.d.mts", "measure.mjs", "profile.mjs", "bench.mjs", "bench.html")
_TYPED_ARRAYS = {
    "bool": "Uint8Array", "float16": "Uint16Array", "float32": "Float32Array",
    "float64": "Float64Array", "int64": "BigInt64Array", "uint64": "BigUint64Array",
    "int8": "Int8Array", "uint8": "Uint8Array", "int16": "Int16Array", "uint16": "Uint16Array",
    "int32": "Int32Array", "uint32": "Uint32Array",
}  # fmt: skip


def files(
    plan: Plan, prefix: str, variants: Sequence[str], peaks: Peaks = NO_PEAKS
) -> dict[str, str]:
    """The loader, its types, and the bench program and page of a wasm bundle.

    ``variants`` are the further builds (``model.VARIANT.wasm``), the preferred one first.
    """
    values = {
        "prefix": prefix,
        "alignment": str(ALIGNMENT),
        "variants": json.dumps(list(variants)),
        # Whether kernels sum 8-bit products, which not every engine does right.
        "dot_products": json.dumps(any(k.arithmetic.startswith("int8") for k in plan.audit)),
        "arrays": ", ".join(f"{d}: {_TYPED_ARRAYS[d]}" for d in _dtypes(plan)),
        "inputs_json": _json_specs(plan.inputs),
        "outputs_json": _json_specs(plan.outputs),
        "input_types": _typescript(plan.inputs),
        "output_types": _typescript(plan.outputs),
        "peaks_json": json.dumps({v: [asdict(k) for k in ks] for v, ks in peaks.kernels.items()}),
        "peak_buffers": json.dumps(peaks.buffers),
        "copy_bytes": str(peaks.copy_bytes),
    }
    values["probes"] = fill("probes.mjs", values) if variants else "const PROBES = {};"
    values["warm_up"] = f"exports.{prefix}_warm_up();" if is_warmed(plan) else ""
    filled = {name: fill(name, values) for name in _FILES}
    return filled | {"model.mjs": _compact(filled["model.mjs"])}


def _compact(script: str) -> str:
    """``script`` without indentation and, but for the first one, comments: pages download it.

    Strings in it may not span lines, comments have lines of their own.
    """
    head, _, rest = script.partition("\n\n")
    lines = [line.strip() for line in rest.splitlines()]
    kept = [t for t in lines if t and not t.startswith(("//", "/**"))]
    return "\n".join([head, "", *kept, ""])


def _dtypes(plan: Plan) -> list[str]:
    """Of what a caller passes and gets."""
    return sorted({t.dtype for t in (*plan.inputs, *plan.outputs)})


def _json_specs(tensors: Sequence[TensorSpec]) -> str:
    # ensure_ascii (the default) also keeps U+2028 and the like out of the script.
    return json.dumps([{"name": t.name, "shape": list(t.shape), "dtype": t.dtype} for t in tensors])


def _typescript(tensors: Sequence[TensorSpec]) -> str:
    return "\n".join(
        f"  /** {t.dtype} [{', '.join(map(str, t.shape))}] */\n"
        f"  {json.dumps(t.name)}: {_TYPED_ARRAYS[t.dtype]};"
        for t in tensors
    )
