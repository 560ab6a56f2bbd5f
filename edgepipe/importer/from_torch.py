"""torch modules and ``.pt2`` programs, exported to ONNX through ``torch.onnx`` (dynamo)."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from edgepipe.errors import EdgepipeError, UserError, did_you_mean
from edgepipe.importer import pt2
from edgepipe.importer.checks import first_line
from edgepipe.importer.from_onnx import load_bytes
from edgepipe.importer.source import Source, identifier

if TYPE_CHECKING:
    from edgepipe.zoo import ZooEntry

_EXPORT_OPSET = 21


def load_factory(text: str, given: Mapping[str, tuple[int, ...]]) -> Source:
    """Load ``package.module:factory``.

    The factory is called without arguments and returns a ``torch.nn.Module``, or the module and
    its example inputs (a tensor, a tuple in ``forward``'s order, or a dict by name). Without
    examples the shapes come from ``given`` by ``forward``'s parameter names, float32.
    The working directory is importable. Raises UserError for whatever the factory raises.
    """
    torch = _torch()
    made = _call_factory(text)
    module, examples = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, torch.nn.Module):
        raise UserError(
            f"the factory returned {type(module).__name__}, not a torch.nn.Module", where=text
        )
    arguments = _arguments(module, examples, given, text)
    content = _serialize(_export(text, module.eval(), (), kwargs=arguments))
    return load_bytes(content, identifier(text.rpartition(":")[2]), text, {})


def load_program(path: Path, given: Mapping[str, tuple[int, ...]]) -> Source:
    """Load a program that ``torch.export.save`` wrote. No code in the file is executed."""
    torch = _torch()
    pt2.check(path)
    try:
        with _quiet():
            program = torch.export.load(io.BytesIO(path.read_bytes()))
            program._guards_code = []  # Python text that calling the program would execute
    except Exception as error:  # zip, JSON and torch errors of many types
        raise UserError(
            f"cannot be loaded by torch.export: {first_line(error)}",
            where=path.name,
            fix="save it again with torch.export.save of this torch version",
        ) from None
    content = _serialize(_export(path.name, program))
    return load_bytes(content, identifier(path.stem), path.name, given)


def export_zoo(entry: ZooEntry, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """Build a zoo network with its fixed random weights and export it for ``shapes``."""
    torch = _torch()
    from edgepipe.zoo import weights

    module = weights.built(entry)
    examples = {
        i.name: torch.zeros(shapes[i.name], dtype=getattr(torch, i.dtype)) for i in entry.inputs
    }
    names = {"output_names": list(entry.outputs)}
    # torch's optimiser would fold the BatchNorms; the zoo keeps them, as trained files have them.
    program = _export(entry.name, module, (), kwargs=examples, optimize=False, **names)
    from onnxscript import optimizer

    with _quiet():
        # The limits are in bytes; recurrent weights are reordered by slices that must fold.
        limit = 1 << 22
        optimizer.fold_constants(
            program.model,
            onnx_shape_inference=True,
            input_size_limit=limit,
            output_size_limit=limit,
        )
        optimizer.remove_unused_nodes(program.model)
    return _serialize(program)


def _export(where: str, *positional: Any, **keyword: Any) -> Any:
    """Call ``torch.onnx.export`` without a sound; UserError for whatever it raises."""
    torch = _torch()
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError(
            "exporting needs onnxscript", where=where, fix='pip install "edgepipe[torch]"'
        ) from None
    try:
        with _quiet(), torch.no_grad():
            return torch.onnx.export(
                *positional, **keyword, dynamo=True, verbose=False, opset_version=_EXPORT_OPSET
            )
    except Exception as error:  # whatever the traced module or the exporter raises
        cause = error.__cause__ or error
        raise UserError(
            f"torch.onnx cannot export it: {first_line(cause)}",
            where=where,
            fix="make forward traceable by torch.export, or export to ONNX yourself",
        ) from None


def _serialize(program: Any) -> bytes:
    """ONNX bytes without the exporter's notes, which name source lines and folders."""
    model: ir.Model = ClearMetadataAndDocStringPass()(program.model).model
    for graph in model.graphs():
        values = [v for node in graph.all_nodes() for v in node.outputs]
        for value in (*graph.inputs, *graph.initializers.values(), *values):
            value.metadata_props.clear()
    content: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    return content


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(
            "torch is not installed", where="MODEL", fix='pip install "edgepipe[torch]"'
        ) from None
    return torch


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's prints, warnings and log lines off the user's terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _call_factory(text: str) -> Any:
    module_name, _, attribute = text.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        owner = importlib.import_module(module_name)
        for part in attribute.split("."):
            if not hasattr(owner, part):
                raise UserError(
                    f"'{part}' is not in it",
                    where=module_name,
                    fix=did_you_mean(part, [n for n in dir(owner) if not n.startswith("_")]),
                )
            owner = getattr(owner, part)
        if not callable(owner):
            raise UserError(f"'{attribute}' is not callable", where=module_name)
        is_instance = not inspect.isclass(owner) and isinstance(owner, _torch().nn.Module)
        return owner if is_instance else owner()
    except EdgepipeError:
        raise
    except ModuleNotFoundError as error:
        fix = "run edgepipe from the folder that holds it, or install it"
        raise UserError(f"no module named '{error.name}'", where=text, fix=fix) from None
    except Exception as error:  # the user's own code
        raise UserError(
            f"the factory raised {type(error).__name__}: {first_line(error)}",
            where=text,
            fix="it must be callable without arguments",
        ) from None
    finally:
        sys.path.remove(str(Path.cwd()))


def _arguments(
    module: Any, examples: Any, given: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Any]:
    """Arguments of ``forward`` by name: the examples, with shapes replaced by ``given``."""
    torch = _torch()
    signature = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in signature if p.name in names and p.default is p.empty]
    if examples is None:
        arguments: dict[str, Any] = {}
    elif isinstance(examples, Mapping):
        arguments = dict(examples)
    else:
        values = examples if isinstance(examples, tuple | list) else (examples,)
        arguments = dict(zip(names, values, strict=False))
    for name, shape in given.items():
        if name not in names:
            raise UserError(
                f"forward has no input '{name}'", where="--shape", fix=did_you_mean(name, names)
            )
        dtype = arguments[name].dtype if name in arguments else torch.float32
        arguments[name] = torch.zeros(shape, dtype=dtype)
    for name in required:
        if name not in arguments:
            raise UserError(
                f"the shape of input '{name}' is not known",
                where=where,
                fix=f"give it, e.g. --shape {name}=1,3,224,224, or return (module, examples)",
            )
    return arguments
