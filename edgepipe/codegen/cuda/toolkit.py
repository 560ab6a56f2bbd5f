"""NVRTC and ptxas from PyPI wheels: CUDA source → PTX at a board's ISA → cubin and resources."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from edgepipe.codegen.plan import Resources
from edgepipe.errors import EdgepipeError, UserError
from edgepipe.target import Cuda

_INSTALL = "pip install 'edgepipe[cuda]'"


@cache
def _folder(package: str, file: str) -> Path:
    """Folder of one of NVIDIA's wheels. Raises UserError."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        if next((Path(root) / package).glob(file), None):
            return Path(root) / package
    raise UserError(f"NVIDIA's {package} is missing", where="--target", fix=_INSTALL)


def check(cuda: Cuda) -> None:
    """Refuse a GPU that NVRTC does not know, and missing wheels. Raises UserError."""
    known = architectures()
    if cuda.virtual_sm not in known:
        raise UserError(
            f"NVRTC does not know sm_{cuda.virtual_sm}",
            where="--target",
            fix=f"it knows {', '.join(map(str, known))}; {_INSTALL} for another version",
        )


def architectures() -> list[int]:
    """What NVRTC compiles for, ascending. Raises UserError where a wheel is missing."""
    nvrtc, count = _nvrtc(), ctypes.c_int()
    _assembler()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(known)
    return sorted(known)


def _nvrtc() -> ctypes.CDLL:
    library = _folder("cuda_nvrtc", "lib/libnvrtc.so.*") / "lib"
    return ctypes.CDLL(str(next(library.glob("libnvrtc.so.*"))))


def _assembler() -> Path:
    return _folder("cuda_nvcc", "bin/ptxas") / "bin" / "ptxas"


def assemble(source: str, cuda: Cuda) -> tuple[str, str, bytes, dict[str, Resources]]:
    """Source, PTX, code for the exact GPU, and resources by kernel.

    The assembler may spill a few registers to have more blocks on a processor; such a kernel is
    compiled again for four of them, with as many registers as those leave.
    """
    ptx = to_ptx(source, cuda)
    cubin, resources = to_cubin(ptx, cuda)
    spilled = [name for name, found in resources.items() if found.spill_bytes]
    if not spilled:
        return source, ptx, cubin, resources
    bounds = re.compile(rf"__launch_bounds__\((\d+)\) ({'|'.join(spilled)})\(")
    source = bounds.sub(r"__launch_bounds__(\1, 4) \2(", source)
    ptx = to_ptx(source, cuda)
    return source, ptx, *to_cubin(ptx, cuda)


def to_ptx(source: str, cuda: Cuda) -> str:
    """Compile for the virtual architecture of ``cuda`` and label the PTX with its ISA.

    NVRTC labels PTX with its own, newest ISA, which the drivers of older boards refuse;
    ``to_cubin`` has the assembler check that what is in it belongs to the older one. Raises
    UserError where the wheels are missing.
    """
    nvrtc = _nvrtc()
    includes = [_folder("cuda_runtime", "include/cuda_fp16.h") / "include"]
    includes.append(_folder("cuda_cccl", "include/nv") / "include")
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"model.cu", 0, None, None)
    options = [f"--gpu-architecture=compute_{cuda.virtual_sm}", "--std=c++17", "-default-device"]
    words = [o.encode() for o in (*options, *(f"-I{folder}" for folder in includes))]
    status = nvrtc.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
    if status:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        message = log.value.decode("utf-8", "replace")
        first = next((x for x in message.splitlines() if "error" in x), message[:200])
        raise EdgepipeError(f"NVRTC failed: {first}")
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    # A hint for vector loads that newer ISAs have; without it nothing changes but that hint.
    hint = re.compile(r"(?m)^\s*\.pragma \"used_bytes_mask [^\"]*\";\n")
    text = hint.sub("", ptx.value.decode())
    return re.sub(r"(?m)^\.version \S+", f".version {cuda.ptx_isa}", text, count=1)


def to_cubin(ptx: str, cuda: Cuda) -> tuple[bytes, dict[str, Resources]]:
    """Assemble for the exact ``sm``; resources by kernel. Raises EdgepipeError."""
    with tempfile.TemporaryDirectory(prefix="edgepipe-ptxas-") as name:
        (Path(name) / "model.ptx").write_text(ptx, encoding="utf-8")
        command = [
            str(_assembler()),
            "-v",
            f"-arch=sm_{cuda.virtual_sm}",
            "model.ptx",
            "-o",
            "model.cubin",
        ]
        done = subprocess.run(command, cwd=name, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[0]
            raise EdgepipeError(f"ptxas failed: {last}")
        report = _resources(done.stdout + done.stderr)
        return (Path(name) / "model.cubin").read_bytes(), report


def _resources(text: str) -> dict[str, Resources]:
    found: dict[str, Resources] = {}
    for part in text.split("Compiling entry function ")[1:]:
        kernel = part.split("'", 2)[1]
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found[kernel] = Resources(
            int(registers.group(1)) if registers else 0,
            int(shared.group(1)) if shared else 0,
            spills,
        )
    return found
