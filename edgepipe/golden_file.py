"""golden.npz: seeded inputs, and what the forms of a model answer to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepipe import golden
from edgepipe.codegen.plan import TensorSpec

if TYPE_CHECKING:
    from edgepipe.importer.source import Source
    from edgepipe.prune import Pruned
    from edgepipe.quantize import Quantized


@dataclass(frozen=True)
class GoldenFile:
    """``content`` of the file, and in ``references`` what computed it."""

    content: bytes
    references: dict[str, str]


def make(
    source: Source,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str],
    quantized: Quantized | None = None,
    pruned: Pruned | None = None,
) -> GoldenFile:
    """``input_i`` and ``output_i`` of the original model. Of a quantized model: what its Q/DQ form
    answers (``output_i``), the float model where there is one (``float_i``), and the definition of
    the integer arithmetic (``integer_i``). Of a pruned one: its own answers, and the dense
    model's."""
    from edgepipe.integer_reference import integer_run

    changed = quantized or pruned
    model = source.reference if changed is None else changed.reference
    ranges = {} if quantized is None else quantized.input_ranges
    values, results, reference = golden.golden(model, inputs, outputs, ranges)
    references = {"reference": reference}
    arrays = {f"input_{i}": values[spec.name] for i, spec in enumerate(inputs)}
    arrays |= _numbered("output", results, outputs)
    if pruned is not None or (quantized is not None and not quantized.imported):
        floats, references["float_reference"] = golden.outputs_of(source.reference, values, outputs)
        arrays |= _numbered("float", floats, outputs)
    if quantized is not None and quantized.manifest["integer"]:
        arrays |= _numbered("integer", integer_run(quantized.definition)(values), outputs)
    return GoldenFile(golden.npz_bytes(arrays), references)


def _numbered(stem: str, values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {f"{stem}_{i}": values[name] for i, name in enumerate(names) if name in values}
