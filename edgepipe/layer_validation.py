"""Every layer of a quantized network against the float network, tensor by tensor.

Both are run by ONNX Runtime with all tensors as outputs: the canonical float graph, and the Q/DQ
model of the bundle, which the bundle's kernels equal. Of a model that came quantized the float
twin is the same graph without the roundings of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepipe import passes, quantize
from edgepipe.context import Context
from edgepipe.data import Inputs, Samples, from_arrays, open_data
from edgepipe.emitted import FILES
from edgepipe.errors import UserError
from edgepipe.layer_pairs import LayerPair, match
from edgepipe.layer_report import LayerReport, LayersReport
from edgepipe.metrics import Array
from edgepipe.onnx_session import open_session
from edgepipe.quantization.config import PREPARATIONS
from edgepipe.quantization.graph import code_range, is_op, name_of
from edgepipe.recipe import Recipe
from edgepipe.reference import open_reference

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgepipe.bundle import Bundle


def validate_layers(
    bundle: Bundle,
    data: str | Path | Mapping[str, Array] | Samples | None = None,
    *,
    model: str | Path | None = None,
    limit: int | None = None,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> LayersReport:
    """Compare every rounded tensor of ``bundle``'s network with its float value.

    ``data`` and ``model`` are those of ``edgepipe.validation.validate``; ``limit`` takes the first
    samples alone. Raises UserError for
    bundles that are not quantized or lack their Q/DQ model.
    """
    facts = bundle.manifest.get("quantization")
    if facts is None:
        raise UserError(
            f"recipe '{bundle.recipe}' rounds no tensors", where="--layers", fix="leave it out"
        )
    reference = open_reference(bundle, model)
    context = Context(bundle.target, Recipe())
    exact = passes.run(reference.source.model, context)
    if facts["imported"]:
        rounded, exact = exact, _without_roundings(exact)
    else:
        rounded = _emitted(bundle)
    if isinstance(data, Samples):
        samples = data
    elif data is None:
        inputs, _ = bundle.golden()
        samples = from_arrays(inputs, bundle.inputs, "golden inputs of the bundle", synthetic=True)
    else:
        samples = open_data(data, bundle.inputs, reference.preprocessing)
    config = quantize.configure(bundle.recipe, bundle.target)
    imported = bool(facts["imported"])
    rescaled = config is not None and bool({*PREPARATIONS} & {*config.methods}) and not imported
    pairs = match(exact, rounded, rescaled=rescaled, same_nodes=imported)
    if limit is not None and samples.count > limit:
        samples = replace(samples, count=limit, read=partial(_first, samples, limit))
    runs = _run(exact, rounded, pairs, samples, step)
    layers = tuple(_reports(pairs))
    return LayersReport(samples.description, samples.synthetic, runs, layers, imported)


def _first(samples: Samples, limit: int) -> Iterator[Inputs]:
    return islice(iter(samples), limit)


def _emitted(bundle: Bundle) -> ir.Model:
    import onnx
    import onnx_ir as ir

    if FILES["onnx"] not in bundle.manifest["files"]:
        raise UserError(
            f"the bundle lacks its Q/DQ model, {FILES['onnx']}",
            where=bundle.path.name,
            fix="compile it again with --emit onnx",
        )
    data = bundle.file(FILES["onnx"]).read_bytes()
    return ir.serde.deserialize_model(onnx.load_model_from_string(data))


def _without_roundings(model: ir.Model) -> ir.Model:
    """A copy that rounds no activation: a Clip without bounds instead of each Q/DQ pair, or a Relu
    where the codes start at zero, since exporters leave out the Relu that the codes imply."""
    import onnx_ir as ir

    result = model.clone()
    for node in list(result.graph):
        rounding = node.inputs[0].producer() if node.inputs and node.inputs[0] else None
        if not is_op(node, "DequantizeLinear") or not is_op(rounding, "QuantizeLinear"):
            continue
        assert rounding is not None
        limits = code_range(rounding)
        kind = "Relu" if limits is not None and limits[0] == 0.0 else "Clip"
        replaced = ir.node(kind, [rounding.inputs[0]], name=node.name)
        old, new = node.outputs[0], replaced.outputs[0]
        new.shape, new.type, name = old.shape, old.type, old.name
        result.graph.insert_before(node, replaced)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        result.graph.remove(node, safe=True)
        if not rounding.outputs[0].uses():
            result.graph.remove(rounding, safe=True)
        new.name = name
    return result


def _run(
    exact: ir.Model,
    rounded: ir.Model,
    pairs: list[LayerPair],
    samples: Samples,
    step: Callable[[int, int], None],
) -> int:
    sessions = [
        open_session(_with_outputs(exact, [p.exact for p in pairs])),
        open_session(_with_outputs(rounded, [p.rounded for p in pairs])),
    ]
    runs = 0
    for inputs in samples:
        floats, codes = (
            {name_of(v): inputs[name_of(v)] for v in model.graph.inputs if v.name in inputs}
            for model in (exact, rounded)
        )
        wanted = [[name_of(p.exact) for p in pairs], [name_of(p.rounded) for p in pairs]]
        left, right = (
            _values(session, names, feeds)
            for session, names, feeds in zip(sessions, wanted, (floats, codes), strict=True)
        )
        for pair, r, y in zip(pairs, left, right, strict=True):
            pair.add(r, y)
        runs += 1
        step(runs, samples.count)
    return runs


def _values(session: Any, names: list[str], feeds: Mapping[str, Array]) -> Iterator[Array]:
    """Values by name; inputs of the model are no outputs of a session."""
    computed = [name for name in dict.fromkeys(names) if name not in feeds]
    found = dict(zip(computed, session.run(computed, dict(feeds)), strict=True))
    for name in names:
        yield feeds[name] if name in feeds else found[name]


def _with_outputs(model: ir.Model, values: list[ir.Value]) -> bytes:
    """``model`` with more outputs, as ONNX."""
    result = model.clone()
    there = {v.name: v for node in result.graph for v in node.outputs}
    known = {v.name for v in result.graph.outputs}
    for value in values:
        if value.name in there and value.name not in known:
            result.graph.outputs.append(there[value.name])
            known.add(value.name)
    return quantize.onnx_bytes(result)


def _reports(pairs: list[LayerPair]) -> Iterator[LayerReport]:
    snr = {name_of(pair.exact): pair.snr_db for pair in pairs}
    for pair in pairs:
        inputs = [snr[name] for name in pair.sources]
        own = snr[name_of(pair.exact)]
        worst = min(inputs, default=float("inf"))
        yield LayerReport(
            tensor=name_of(pair.exact),
            layer=(pair.layer.name if pair.layer is not None else None) or name_of(pair.exact),
            op_type="input" if pair.layer is None else pair.layer.op_type,
            weight_bits=pair.weight_bits,
            snr_db=own,
            loss_db=worst - own if np.isfinite(worst) and np.isfinite(own) else None,
            saturation=pair.saturation,
            codes_used=pair.codes_used,
            values=None if pair.rescaled else (pair.low, pair.high),
            codes=None if pair.rescaled or pair.codes is None else pair.codes[:2],
        )
