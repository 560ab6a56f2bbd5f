"""ncnn on the CPU in float32, on the original model as pnnx converts it.

Integers are left out: ncnn's come from its own calibration of its own format, another model.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.errors import UserError
from edgepipe.machine import versions
from edgepipe.peers import Case, Engine, Outputs, timed

RUNNERS = ("local",)
_CONVERSION_S = 600.0
_WHERE = "--against ncnn"


def missing() -> str:
    """The packages that bring it."""
    there = all(importlib.util.find_spec(name) for name in ("ncnn", "pnnx"))
    return "" if there else "pip install 'edgepipe[ncnn]'"


def engines(case: Case) -> list[Engine]:
    """The original model. Raises UserError where pnnx or ncnn cannot take it."""
    inputs = [case.inputs[i.name] for i in case.reference.session.get_inputs()]
    for value in inputs:
        if value.dtype != np.float32:
            raise UserError(f"takes float32 inputs, this is {value.dtype}", where=_WHERE)
    with tempfile.TemporaryDirectory(prefix="edgepipe-peer-") as name:
        folder = Path(name)
        convert(case.reference.source.proto_bytes(), folder)
        loaded = Loaded(folder, inputs, len(case.bundle.outputs), case.threads)
    title = f"ncnn {versions('ncnn')['ncnn']}"
    return [Engine(title, timed(loaded.infer), partial(_outputs, case, loaded))]


def convert(model: bytes, folder: Path) -> None:
    """``model.ncnn.param``, ``.bin`` and ``model_ncnn.py`` in ``folder``, where all that pnnx
    leaves stays. Raises UserError."""
    (folder / "model.onnx").write_bytes(model)
    spec = importlib.util.find_spec("pnnx")  # importing it would import torch
    assert spec is not None and spec.origin is not None
    program = Path(spec.origin).with_name("pnnx.exe" if sys.platform == "win32" else "pnnx")
    try:
        done = subprocess.run([str(program), "model.onnx", "fp16=0"], cwd=folder, check=False,
                              capture_output=True, timeout=_CONVERSION_S)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"pnnx did not convert the model: {error}", where=_WHERE) from None
    param = folder / "model.ncnn.param"
    if done.returncode or not param.is_file():
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise UserError(f"pnnx cannot convert the model ({done.returncode}): {lines[-1][:160]}",
                        where=_WHERE)  # fmt: skip
    import ncnn

    kinds = {line.split()[0] for line in param.read_text(encoding="utf-8").splitlines()[2:]}
    # What pnnx knows no layer of ncnn for keeps its own name: Hardmax, aten::gather.
    if foreign := sorted(kind for kind in kinds if ncnn.layer_to_index(kind) < 0):
        raise UserError(f"ncnn has no layer for {', '.join(foreign)}", where=_WHERE)


class Loaded:
    """The converted model with its inputs; the batch, which ncnn does not have, is taken off."""

    def __init__(self, folder: Path, inputs: list[Any], n_outputs: int, threads: int) -> None:
        import ncnn

        self.net = ncnn.Net()
        self.names = [f"out{i}" for i in range(n_outputs)]
        option = self.net.opt
        option.num_threads = threads
        option.use_vulkan_compute = False
        option.use_fp16_packed = option.use_fp16_storage = option.use_fp16_arithmetic = False
        option.use_bf16_storage = False
        failed = self.net.load_param(str(folder / "model.ncnn.param"))
        if failed or self.net.load_model(str(folder / "model.ncnn.bin")):
            raise UserError("ncnn cannot load what pnnx made of the model", where=_WHERE)
        program = (folder / "model_ncnn.py").read_text(encoding="utf-8")
        self.inputs = [(f"in{i}", ncnn.Mat(_without_batch(program, f"in{i}", value)).clone())
                       for i, value in enumerate(inputs)]  # fmt: skip

    def infer(self) -> list[Any]:
        """One inference; the outputs as ncnn has them. Raises UserError where it fails."""
        with self.net.create_extractor() as extractor:
            for name, value in self.inputs:
                extractor.input(name, value)
            found = [extractor.extract(name) for name in self.names]
        if any(failed for failed, _ in found):
            raise UserError("ncnn fails to run what pnnx made of the model", where=_WHERE)
        return [value for _, value in found]


def _without_batch(program: str, name: str, value: Any) -> Any:
    """``value`` as the program that pnnx wrote gives it to ``name``. Raises UserError."""
    (call,) = re.findall(rf'ex\.input\("{name}",.*', program)
    batch = re.search(r"(?:batch_index=|squeeze\()(\d+)", call)
    axis = int(batch[1]) if batch else value.ndim
    if axis >= value.ndim:  # pnnx writes 233 where there is none
        return np.ascontiguousarray(value)
    if value.shape[axis] != 1:
        raise UserError(f"computes one sample at a time, the model {value.shape[axis]}",
                        where=_WHERE)  # fmt: skip
    return np.ascontiguousarray(value.squeeze(axis))


def _outputs(case: Case, loaded: Loaded) -> Outputs:
    values = loaded.infer()
    return {t.name: np.array(v) for t, v in zip(case.bundle.outputs, values, strict=True)}
