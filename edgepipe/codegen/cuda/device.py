"""PrimFuncs to CUDA source and launches: every top-level statement becomes one kernel.

No GPU and no CUDA installation take part: TVM prints the source, ``toolkit`` compiles it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx
from tvm.tirx.buffer import buffer_data_pointer_type, is_buffer_var
from tvm_ffi import structural_map, structural_walk

from edgepipe.codegen import lets, math
from edgepipe.codegen.cuda.functions import with_functions
from edgepipe.codegen.plan import Launch
from edgepipe.codegen.primfunc import buffer_bytes, passes
from edgepipe.target import Target


@dataclass(frozen=True)
class Device:
    """CUDA source, launches per function in order, and bytes of its workspaces."""

    source: str
    launches: dict[str, list[Launch]]
    workspaces: dict[str, list[int]]


def cuda_target(target: Target) -> Any:
    """The TVM target that ``target`` compiles for."""
    assert target.cuda is not None
    kind = {"kind": "cuda", "arch": f"sm_{target.cuda.virtual_sm}", "thread_warp_size": 32}
    limits = {"max_num_threads": 1024, "max_threads_per_block": 1024}
    shared = {"max_shared_memory_per_block": 49152}
    return tvm.target.Target({**kind, **limits, **shared})


def build_source(functions: Mapping[str, Any], target: Target) -> Device:
    """Print ``functions`` (symbol → PrimFunc) as one CUDA source file."""
    math.register_cuda()
    device = cuda_target(target)
    module = tvm.IRModule({name: _unfenced(_scalar(f)) for name, f in functions.items()})
    both = device.with_host(tvm.target.Target({"kind": "llvm"}))
    module = tirx.transform.BindTarget(both)(module)
    launches: dict[str, list[Launch]] = {}
    workspaces: dict[str, list[int]] = {}
    kernels: dict[str, Any] = {}
    with device, tvm.transform.PassContext(opt_level=3):
        module = tvm.transform.Sequential(passes(gpu=True))(module)
        for var, function in sorted(module.functions.items(), key=lambda item: item[0].name_hint):
            symbol = var.name_hint
            parts, workspaces[symbol] = _split(function, symbol, device)
            launches[symbol] = [_launch(name, part) for name, part in parts.items()]
            kernels |= parts
        module = lets.flatten(tirx.transform.LowerIntrin()(tvm.IRModule(kernels)))
    library = tvm.get_global_func("target.build.cuda")(module, device)
    source = with_functions(str(library.inspect_source("cuda")))
    return Device(source, launches, workspaces)


def _scalar(function: Any) -> Any:
    """``function`` as it is where it binds threads; else its vectors, of a CPU, become loops."""
    bound: list[bool] = []

    def visit(loop: Any) -> None:
        if loop.kind == tirx.ForKind.THREAD_BINDING:
            bound.append(True)

    def serial(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.VECTORIZED:
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    structural_walk(function.body, (tirx.For, visit))
    if bound or _extents(function.body):
        return function
    body = structural_map(function.body, (tirx.For, serial))
    return tirx.PrimFunc(function.params, body, function.ret_type, function.attrs)


def _unfenced(function: Any) -> Any:
    """Products that a fence of LLVM keeps apart from a sum as ``__fmul_rn``, which never fuses."""
    fence = tvm.target.codegen.llvm_lookup_intrinsic_id("llvm.arithmetic.fence")

    def product(call: Any) -> Any:
        if call.op.name != "tirx.call_llvm_pure_intrin" or int(call.args[0]) != fence:
            return call
        value = call.args[-1]
        assert isinstance(value, tirx.Mul), value
        return tirx.call_pure_extern("float32", "__fmul_rn", value.a, value.b)

    body = structural_map(function.body, (tvm.ir.Call, product))
    return tirx.PrimFunc(function.params, body, function.ret_type, function.attrs)


def _split(function: Any, symbol: str, device: Any) -> tuple[dict[str, Any], list[int]]:
    """One kernel per top-level statement, all with the same pointers; allocations outside of
    them become workspaces."""
    params: list[Any] = []
    declarations: list[Any] = []
    workspaces: list[int] = []

    def pointer(buffer: Any, name: str) -> None:
        var = tirx.Var(name, buffer_data_pointer_type(buffer))
        declarations.append(tirx.DeclBuffer(buffer, data=var))
        params.append(var)

    for index, param in enumerate(function.params):
        assert is_buffer_var(param), param
        pointer(param, f"p{index}")
    statements = []
    body = function.body
    for statement in list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]:
        if isinstance(statement, tirx.AllocBuffer):
            workspaces.append(buffer_bytes(statement.buffer))
            pointer(statement.buffer, f"w{len(workspaces)}")
        elif isinstance(statement, tirx.DeclBuffer):
            declarations.append(statement)
        else:
            statements.append(statement)
    parts = {}
    for i, statement in enumerate(statements):
        name = symbol if i == 0 else f"{symbol}_part{i}"
        raw = tirx.PrimFunc(params, tirx.SeqStmt([*declarations, _bound(statement)]))
        flags = {"calling_conv": 2, "tirx.is_global_func": True, "tirx.noalias": True}
        parts[name] = raw.with_attr({"global_symbol": name, "target": device, **flags})
    return parts, workspaces


def _extents(statement: Any) -> dict[str, int]:
    found: dict[str, int] = {}

    def visit(node: Any) -> None:
        if isinstance(node, tirx.AttrStmt) and node.attr_key == "thread_extent":
            found[str(node.node.thread_tag)] = int(node.value)

    structural_walk(statement, visit)
    return found


def _bound(statement: Any) -> Any:
    """``statement`` in a launch: as it is, or by a single thread where nothing is bound."""
    if _extents(statement):
        return statement
    for tag in ("threadIdx.x", "blockIdx.x"):
        var = tirx.Var(tag, "int32")
        axis = tirx.IterVar((0, 1), var, 1, tag)
        statement = tirx.AttrStmt(axis, "thread_extent", tirx.const(1, "int32"), statement)
    return statement


def _launch(name: str, function: Any) -> Launch:
    extents = _extents(function.body)

    def axes(prefix: str) -> tuple[int, int, int]:
        x, y, z = (extents.get(f"{prefix}.{axis}", 1) for axis in "xyz")
        return x, y, z

    return Launch(name, axes("blockIdx"), axes("threadIdx"))
