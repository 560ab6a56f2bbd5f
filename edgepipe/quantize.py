"""The quantization stage of the pipeline: recipe, device and data become a Q/DQ graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe import data, patterns, zoo
from edgepipe.codegen.plan import TensorSpec
from edgepipe.context import Context
from edgepipe.data import Samples
from edgepipe.errors import UserError, did_you_mean
from edgepipe.onnx_session import known_opset
from edgepipe.quantization import STAGE, QuantConfig
from edgepipe.recipe import Recipe, Settings
from edgepipe.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgepipe.data.samples import Array
    from edgepipe.importer.source import Source

    #: What calibration takes: SRC of the command line, arrays by input name, or opened samples.
    Calibration = str | Path | Mapping[str, Array] | Samples

#: What another format asks of a configuration.
Change = Callable[[QuantConfig], QuantConfig]

#: Seeded samples that calibration takes where there are no data.
SYNTHETIC_SAMPLES = 64


@dataclass(frozen=True)
class Quantized:
    """``graph`` is standard ONNX with Q/DQ pairs. ``reference`` is the model that ONNX Runtime
    judges integers by: ``graph`` as bytes, or the file itself where it came quantized
    (``imported``); ``definition`` is ``graph`` as bytes in any case. ``input_ranges``: smallest and
    largest float that each quantized input can tell apart. ``manifest`` is what the bundle says
    about all of it. ``again`` quantizes the float model once more, with a changed configuration,
    for formats that want roundings elsewhere; an imported model is what it is.
    """

    graph: ir.Model
    reference: bytes
    definition: bytes
    input_ranges: dict[str, tuple[float, float]]
    manifest: dict[str, Any]
    again: Callable[[Change], ir.Model]

    @classmethod
    def of(
        cls,
        graph: ir.Model,
        again: Callable[[Change], ir.Model],
        reference: bytes | None = None,
        *,
        integer: bool,
        imported: bool,
        calibration: Mapping[str, Any] | None = None,
    ) -> Quantized:
        """Read the rest off ``graph``: the lowering, which comes next, changes it."""
        manifest: dict[str, Any] = {
            "output_steps": output_steps(graph), "integer": integer, "imported": imported,
        }  # fmt: skip
        if calibration is not None:
            manifest["calibration"] = dict(calibration)
        whole = onnx_bytes(graph)
        return cls(graph, reference or whole, whole, input_ranges(graph), manifest, again)

    @property
    def imported(self) -> bool:
        """Whether the model came quantized."""
        return bool(self.manifest["imported"])


def configure(recipe: Recipe, target: Target) -> QuantConfig | None:
    """How ``recipe`` quantizes for ``target``; None for float formats. Raises UserError."""
    if not recipe.quantizes:
        return None
    settings = recipe.settings
    changes: dict[str, Any] = {
        "overrides": tuple((o.match, o.format) for o in settings.overrides),
        "symmetric_activations": settings.activations == "symmetric",
    }
    if recipe.integer:
        changes["signed_activations"] = target.integer.activations == "int8"
        changes["weight_limit"] = target.integer.weight_limit
    for name in ("first_last", "depthwise", "observer", "percentile", "methods", "max_samples"):
        value = getattr(settings, name)
        if value is not None:
            changes[name] = value
    return QuantConfig.parse(recipe.format, **changes)


def check(recipe: Recipe | None, target: Target, calibration: Calibration | None) -> None:
    """Refuse what cannot be before any work is done. Raises UserError."""
    if isinstance(calibration, str | Path):
        data.check_source(calibration)
    if recipe is None:
        return
    target.check(recipe)
    configure(recipe, target)
    if calibration is not None and not recipe.changes_weights:
        raise _needless_calibration(recipe)


def _needless_calibration(recipe: Recipe) -> UserError:
    return UserError(
        f"recipe '{recipe}' is not calibrated",
        where="--calibration",
        fix="leave it out, or give a quantized recipe such as w8a8",
    )


def recipe_of(source: Source, given: Recipe | None, calibration: Calibration | None) -> Recipe:
    """The recipe to compile ``source`` with: ``given``, or what its own Q/DQ nodes say.

    Raises UserError where the two contradict each other.
    """
    from edgepipe.quantization.imported import implied_format

    implied = implied_format(source.model)
    if implied is None:
        chosen = given or Recipe()
        if calibration is not None and not chosen.changes_weights:
            raise _needless_calibration(chosen)
        return chosen
    where = f"{source.origin} is quantized already: {implied} by its Q/DQ nodes"
    if given is not None and str(given) != implied:
        raise UserError(f"recipe '{given}' contradicts that", where=where, fix="leave --recipe out")
    changed = given.settings.to_json() if given is not None else {}
    if changed.keys() - {"allow_float_fallback"}:
        raise UserError(
            "its scales are kept, so the recipe's settings change nothing",
            where=where,
            fix="leave them out, or give the float model",
        )
    if calibration is not None:
        raise UserError(
            "its scales are kept, so there is nothing to calibrate",
            where=where,
            fix="leave --calibration out, or give the float model",
        )
    settings = given.settings if given is not None else Settings()
    return Recipe(implied, settings)


def run(
    graph: ir.Model, source: Source, calibration: Calibration | None, context: Context
) -> tuple[ir.Model, Quantized | None]:
    """Give ``graph``, the canonical form of ``source``, the numbers of the recipe: the graph to
    lower, and what else is known where it is quantized.

    A model that came with Q/DQ nodes stays as it is. Without ``calibration`` seeded synthetic
    inputs are taken, which is a warning. Raises UserError for data that do not fit the model.
    """
    from edgepipe import quantization
    from edgepipe.quantization import half
    from edgepipe.quantization.imported import implied_format

    config = configure(context.recipe, context.target)
    if config is None:
        return (half.apply(graph, context) if context.recipe.format == "fp16" else graph), None
    integer = context.recipe.integer
    if implied_format(source.model) is not None:
        reference = source.proto_bytes()
        return graph, Quantized.of(
            graph, lambda change: graph, reference, integer=integer, imported=True
        )
    context.progress("calibrating")
    samples = _open(source, graph, calibration, config, context)
    _warn_of_idle_overrides(graph, context)
    result = quantization.apply(graph, config, samples, context)
    context.dump("quantization-00-qdq.txt", lambda: str(result))

    used = {
        "data": samples.description,
        "samples": min(samples.count, config.max_samples),
        "synthetic": samples.synthetic,
    }

    def again(change: Change) -> ir.Model:
        silent = replace(context, notes=[], progress=lambda line: None)
        return quantization.apply(graph, change(config), samples, silent)

    return result, Quantized.of(result, again, integer=integer, imported=False, calibration=used)


def input_ranges(graph: ir.Model) -> dict[str, tuple[float, float]]:
    """The floats that the ends of the codes of each quantized input stand for."""
    from edgepipe.quantization.graph import code_range, name_of

    found = {}
    for value in graph.graph.inputs:
        readers = [use.node for use in value.uses() if use.node.op_type == "QuantizeLinear"]
        limits = code_range(readers[0]) if readers else None
        if limits is not None:
            found[name_of(value)] = limits
    return found


def output_steps(graph: ir.Model) -> dict[str, float]:
    """The scale of every output of the model that is quantized per tensor itself."""
    from edgepipe.quantization.graph import constant, is_op, name_of

    found = {}
    for value in graph.graph.outputs:
        producer = value.producer()
        if producer is not None and is_op(producer, "DequantizeLinear"):
            scale = constant(producer.inputs[1])
            if scale is not None and scale.size == 1:
                found[name_of(value)] = float(scale.reshape(()))
    return found


def onnx_bytes(graph: ir.Model) -> bytes:
    """``graph`` as a self-contained ONNX file, the same bytes for the same graph."""
    import onnx_ir as ir

    proto = ir.serde.serialize_model(graph)
    for opset in proto.opset_import:
        if opset.domain == "":
            opset.version = known_opset(n.op_type for n in proto.graph.node)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def _open(
    source: Source,
    graph: ir.Model,
    calibration: Calibration | None,
    config: QuantConfig,
    context: Context,
) -> Samples:
    """The samples to calibrate with. Raises UserError where they cannot be the model's input."""
    specs = inputs_of(graph)
    if calibration is None:
        runs = min(SYNTHETIC_SAMPLES, config.max_samples)
        context.warn(
            STAGE,
            "calibration",
            f"no data given: ranges come from {runs} synthetic inputs; give --calibration",
        )
        return data.synthetic(specs, runs=runs)
    return open_samples(source, graph, calibration)


def open_samples(source: Source, graph: ir.Model, calibration: Calibration) -> Samples:
    """The samples given for ``graph``, the canonical form of ``source``. Raises UserError."""
    if isinstance(calibration, Samples):
        return calibration
    steps = zoo.describe(source.origin).preprocessing if source.origin in zoo.names() else None
    return data.open_data(calibration, inputs_of(graph), steps)


def inputs_of(graph: ir.Model) -> list[TensorSpec]:
    """What the model is given, in order."""
    return [TensorSpec.of(value) for value in graph.graph.inputs if not value.is_initializer()]


def _warn_of_idle_overrides(graph: ir.Model, context: Context) -> None:
    """An override that fits nothing is most likely a misspelt name."""
    nodes = list(graph.graph)
    known = {node.name or "" for node in nodes} | {node.op_type for node in nodes}
    for override in context.recipe.settings.overrides:
        if not any(patterns.fits(override.match, name) for name in known):
            context.warn(
                STAGE,
                f"override '{override.match}'",
                f"it fits no node's name or operator; {did_you_mean(override.match, known)}",
            )
