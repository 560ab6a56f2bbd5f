"""Compiles random graphs with every recipe for every target and judges what they compute."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from edgepipe import importer, passes, prune, quantize
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.importer.source import Source
from edgepipe.quantization.interpreter import Interpreter
from edgepipe.recipe import Recipe
from edgepipe.target import Target
from tests.random_graphs.builder import Array
from tests.random_graphs.generate import Case
from tests.random_graphs.modules import Module, OverrunError
from tests.random_graphs.verdict import Verdict, by_deviation, by_integers, by_noise

RECIPES = ("fp32", "w8a8", "fp32+2:4")
TARGETS = ("host", "wasm-simd")

Judge = Callable[[dict[str, Array]], Verdict]


@dataclass
class Trial:
    """One graph with one recipe for one target: refused, or to be judged when it has run."""

    case: Case
    recipe: str
    target: str
    verdict: Verdict | None = None
    judge: Judge | None = None

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.recipe} {self.target}"


class Trials:
    """Trials that are compiled one by one, linked together and run."""

    def __init__(self) -> None:
        self._modules: dict[str, Module] = {}
        self._canonical: dict[str, tuple[Source, ir.Model]] = {}

    def compile(self, case: Case, recipe: str, target: str) -> Trial:
        """Compile; the trial has a verdict already where edgepipe refuses or fails."""
        trial = Trial(case, recipe, target)
        module = self._modules.setdefault(target, Module(target))
        try:
            if case.name not in self._canonical:
                self._canonical[case.name] = _canonical(case, module.target)
            trial.judge = _compile(module, trial, *self._canonical[case.name])
        except UserError as error:
            trial.verdict = Verdict("refused", str(error))
        except Exception as error:
            trial.verdict = _crashed(error)
        return trial

    def link(self) -> None:
        """Link what was compiled."""
        for module in self._modules.values():
            module.link()

    def judge(self, trial: Trial) -> Verdict:
        """The verdict on one trial, which is run unless it was refused."""
        if trial.judge is None:
            assert trial.verdict is not None
            return trial.verdict
        try:
            return trial.judge(self._modules[trial.target].run(trial.name, trial.case.inputs))
        except OverrunError as error:
            return Verdict("wrong", str(error))
        except Exception as error:
            return _crashed(error)


def _crashed(error: Exception) -> Verdict:
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())[:300]
    return Verdict(
        "crashed", f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {said}"
    )


def _canonical(case: Case, target: Target) -> tuple[Source, ir.Model]:
    """The model as it is read, and behind the passes, which no recipe and no target change."""
    with tempfile.TemporaryDirectory(prefix="edgepipe-random-") as folder:
        path = Path(folder) / "graph.onnx"
        onnx.save(case.model, path)
        source = importer.load(path)
    return source, passes.run(source.model, Context(target, Recipe()))


def _compile(module: Module, trial: Trial, source: Source, canonical: ir.Model) -> Judge:
    case, recipe = trial.case, Recipe.parse(trial.recipe)
    context = Context(module.target, recipe, allow_float_fallback=True)
    graph = canonical.clone()
    graph, pruned = prune.run(graph, source, None, context)
    graph, quantized = quantize.run(graph, source, None, context)
    module.add(trial.name, graph, context)
    if quantized is not None:
        interpreter = Interpreter(ir.from_proto(onnx.load_model_from_string(quantized.definition)))
        steps = dict(quantized.manifest["output_steps"])
        # Its notes tell of operators that the integer lowering leaves, such as a last Mul.
        falls_back = any(
            note.stage.startswith("lowering") and "in float" in note.text for note in context.notes
        )
        model = quantized.reference
        return lambda found: by_integers(found, interpreter, model, case, steps, falls_back)
    if pruned is not None:
        reference = onnx.load_model_from_string(pruned.reference)
        return lambda found: by_noise(found, reference, case.inputs)
    return lambda found: by_deviation(found, case)
