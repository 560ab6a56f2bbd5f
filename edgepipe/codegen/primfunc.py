"""PrimFuncs to one relocatable object with a raw-pointer C ABI and no TVM runtime in it.

Every kernel becomes ``void symbol(T0 *a, T1 *b, ...)``: one pointer per buffer parameter, then
one per workspace. TVM's packed calling convention and its runtime allocations are left out of
the pass list on purpose; what would be allocated at run time becomes a workspace parameter that
the memory plan serves from the arena.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.target.codegen import (
    llvm_cpu_has_features,
    llvm_get_vector_width,
    llvm_is_valid_cpu,
)
from tvm.tirx.buffer import buffer_data_pointer_type, is_buffer_var

from edgepipe.codegen import lets, math, parts
from edgepipe.errors import UserError
from edgepipe.target import Target

#: How 8-bit products are summed, on which architecture → the LLVM feature of its instructions.
FEATURES = {
    ("vnni", "x86_64"): "avx512vnni", ("maddubs", "x86_64"): "avx2", ("pairs", "x86_64"): "avx2",
    ("sdot", "aarch64"): "dotprod", ("mlal", "aarch64"): "neon", ("mlal", "arm"): "neon",
    ("pairs", "wasm32"): "simd128", ("relaxed", "wasm32"): "simd128",
}  # fmt: skip
#: A local buffer above this many bytes moves from the stack to a workspace parameter.
STACK_BYTES = 4096


def llvm_target(target: Target, extra_attributes: tuple[str, ...] = ()) -> Any:
    """Return the TVM target of ``target``, host included, plus LLVM attributes of a variant."""
    spec = dict(target.llvm)
    cpu = spec.get("mcpu")
    if cpu is not None and not llvm_is_valid_cpu(cpu, spec["mtriple"]):
        raise UserError(f"LLVM has no CPU '{cpu}' of this triple",
                        where=f"target {target.name}, [llvm]", fix="correct mcpu")  # fmt: skip
    attributes = [*spec.pop("mattr", []), *extra_attributes]
    if attributes:
        spec["mattr"] = attributes
    if target.kind == "wasm":  # TVM does not know it and says so on every build
        spec["vector-width"] = 128
    # LLVM 22's loop vectoriser miscompiles i % 4 under AVX-512 (it drops the wrap), and its SLP
    # vectoriser does not come to an end on some transposes of bytes, nor the WebAssembly backend
    # on vectors of half that it makes (see tests/lowering/test_llvm.py). Schedules
    # vectorise explicitly instead.
    spec["cl-opt"] = ["-vectorize-loops:bool=false", "-vectorize-slp:bool=false"]
    if target.kind == "wasm" or target.arch == "aarch64":
        # Kernels unroll by themselves where it pays. What LLVM unrolls besides is a quarter of
        # the download, and V8 runs it no faster; for ARM it then takes the weights of all steps
        # out of the loop over pixels, into more registers than there are.
        spec["cl-opt"].append("-unroll-threshold-aggressive:uint=0")
    if target.kind == "wasm":
        # Loop strength reduction forgets that sums of pointers do not wrap, and loads then no
        # longer take what is constant in them: an instruction each, of loops that have thirty.
        spec["cl-opt"].append("-disable-lsr:bool=true")
    try:
        llvm = tvm.target.Target({"kind": "llvm", "opt-level": 3, **spec})
        llvm_get_vector_width(llvm)  # it knows the triple: what comes next crashes otherwise
    except Exception as error:  # TVM's own, for keys and values that LLVM does not have
        raise UserError(f"LLVM does not take it: {error}", where=f"target {target.name}, [llvm]",
                        fix="copy the file of a device like it") from None  # fmt: skip
    _check_instructions(target, llvm)
    # Kernels of the variant "relaxed" have instructions that the target itself may lack.
    relaxed = target.variants.get("relaxed")
    if relaxed == tuple(extra_attributes) and not llvm_cpu_has_features("relaxed-simd", llvm):
        raise UserError("its instructions need the feature 'relaxed-simd'",
                        where=f"target {target.name}, variants.relaxed",
                        fix='write relaxed = ["+relaxed-simd"]')  # fmt: skip
    return llvm.with_host(llvm)


def _check_instructions(target: Target, llvm: Any) -> None:
    """LLVM ends the process at an instruction that the core does not have."""
    dot = target.integer.dot
    needs, where = FEATURES.get((dot, target.arch)), f"target {target.name}, integer.dot"
    if needs is None:
        raise UserError(f"{target.arch} has no '{dot}'", where=where,
                        fix="copy the file of a device like it")  # fmt: skip
    if not llvm_cpu_has_features(needs, llvm):
        raise UserError(f"'{dot}' needs the feature '{needs}'", where=where,
                        fix=f"add '+{needs}' to mattr of [llvm], or correct its mcpu")  # fmt: skip


def passes(gpu: bool = False) -> list[Any]:
    """What lowers a scheduled PrimFunc to flat loops over flat buffers.

    For a GPU common subexpressions are left to the assembler, since variables hide what is
    aligned, and functions without threads are no error: they get a thread later.
    """
    s, x = s_tir.transform, tirx.transform
    return [
        s.CanonicalizeLoop(),
        s.LowerInitBlock(),
        s.PlanAndUpdateBufferAllocationLocation(),
        s.ConvertBlocksToOpaque(),
        s.CompactBufferAllocation(),
        s.LowerMatchBuffer(),
        s.StmtSimplify(),
        s.AnnotateIrregularLoop(),
        s.LowerOpaqueBlock(),
        x.FlattenBuffer(),
        x.NarrowDataType(32),
        s.LoopPartition(),
        x.VectorizeLoop(True),
        x.StorageRewrite(),
        s.HoistIfThenElse(),
        x.UnrollLoop(),
        s.RenormalizeSplitPattern(),
        x.StmtSimplify(),
        x.RemoveNoOp(),
        s.RewriteUnsafeSelect(),
        *([] if gpu else [x.CommonSubexprElim(), x.VerifyMemory()]),
        x.AnnotateEntryFunc(),
    ]


def buffer_bytes(buffer: Any) -> int:
    """Bytes of a static buffer."""
    count = 1
    for extent in buffer.shape:
        count *= int(extent)
    dtype = str(buffer.dtype)
    if dtype == "bool":
        return count
    bits, _, lanes = re.sub(r"^[a-z]+", "", dtype).partition("x")
    return count * max(1, int(bits) // 8) * int(lanes or 1)


def _raw_pointers(
    func: Any, symbol: str, pieces: dict[str, int], turning: bool
) -> tuple[Any, list[int]]:
    """Turn buffer parameters into pointers and big allocations into workspace pointers."""
    body = list(func.body.seq) if isinstance(func.body, tirx.SeqStmt) else [func.body]
    params: list[Any] = []
    declarations: list[Any] = []
    workspaces: list[int] = []
    held: list[Any] = []

    def pointer(buffer: Any, name: str) -> Any:
        var = tirx.Var(name, buffer_data_pointer_type(buffer))
        declarations.append(tirx.DeclBuffer(buffer, data=var))
        return var

    for index, param in enumerate(func.params):
        params.append(pointer(param, f"p{index}") if is_buffer_var(param) else param)
    rest = []
    for stmt in body:
        if isinstance(stmt, tirx.AllocBuffer) and buffer_bytes(stmt.buffer) > STACK_BYTES:
            workspaces.append(buffer_bytes(stmt.buffer))
            held.append(stmt.buffer)
            params.append(pointer(stmt.buffer, f"w{len(workspaces)}"))
        else:
            rest.append(stmt)
    if symbol in pieces and turning:
        params.append(tirx.Var("turns", "int32"))  # which the linked module reads
    elif symbol in pieces:
        sliced = parts.slice_body(rest, held)
        if sliced is not None:
            rest, pieces[symbol] = sliced.body, sliced.pieces
            params += sliced.params
    attrs = dict(func.attrs.items()) if func.attrs else {}
    raw = tirx.PrimFunc(
        params,
        tirx.SeqStmt([*declarations, *rest]),
        ret_type=func.ret_type,
        attrs=tvm.ir.make_node("ir.DictAttrs", **attrs),
    )
    return raw.with_attr("global_symbol", symbol), workspaces


def build_object(
    functions: Mapping[str, Any],
    target: Target,
    extra_attributes: tuple[str, ...] = (),
    pieces: dict[str, int] | None = None,
) -> tuple[bytes, dict[str, list[int]]]:
    """Compile ``functions`` (symbol → PrimFunc) to one object file.

    Returns the object's bytes and, per symbol, the bytes of each workspace parameter that
    follows its buffer parameters. ``pieces`` names the symbols that threads are to share, or in
    WebAssembly those to be warmed up. For threads it receives how many pieces each has, and those
    of more than one take ``int32_t part, parts`` last; to be warmed up all take ``int32_t turns``
    (``codegen.turns``).
    """
    library, workspaces = build_module(functions, target, extra_attributes, pieces)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.o"
        library.write_to_file(str(path))
        return path.read_bytes(), workspaces


def build_module(
    functions: Mapping[str, Any],
    target: Target,
    extra_attributes: tuple[str, ...] = (),
    pieces: dict[str, int] | None = None,
) -> tuple[Any, dict[str, list[int]]]:
    """The LLVM module behind ``build_object``, and the same workspaces."""
    math.register()
    llvm = llvm_target(target, extra_attributes)
    module = tirx.transform.BindTarget(llvm)(tvm.IRModule(dict(functions)))
    raw: dict[str, Any] = {}
    workspaces: dict[str, list[int]] = {}
    with llvm, tvm.transform.PassContext(opt_level=3):
        module = tvm.transform.Sequential(passes())(module)
        for var, func in module.functions.items():
            symbol = var.name_hint
            raw[symbol], workspaces[symbol] = _raw_pointers(
                func, symbol, pieces or {}, turning=target.kind == "wasm"
            )
        module = lets.flatten(tirx.transform.LowerIntrin()(tvm.IRModule(raw)))
    return tvm.get_global_func("target.build.llvm")(module, llvm), workspaces
