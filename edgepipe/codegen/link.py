"""From objects to what runs: shared and static library, bench program, WebAssembly module.

zig (from PyPI) is compiler and linker for every target. Outputs carry no time stamps, build ids
or paths: the same inputs give the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from edgepipe.codegen import driver, elf, turns
from edgepipe.errors import EdgepipeError, UserError
from edgepipe.target import Target

# Warnings are errors nowhere: generated code meets many compiler versions at the user's.
_C_FLAGS = (
    "-O2", "-g0", "-std=c99", "-ffreestanding", "-fvisibility=hidden", "-ffunction-sections",
    "-fno-sanitize=all", "-fno-stack-protector", "-fno-unwind-tables",
    "-fno-asynchronous-unwind-tables",
)  # fmt: skip
_WASM_STACK_BYTES = 65536
#: What zig and clang say of a target that they do not have.
_UNKNOWN_TARGET = ("target query", "unknown CPU", "unknown target", "unknown arch")
_TIMEOUT_S = 1200  # building a C library takes a minute on a slow machine; a hang has no end
_INSTALL = "pip install 'ziglang>=0.17,<0.18'"
#: What a GPU bundle's host program is made from, besides the code for the GPU.
#: Kernels that a measured call of a candidate launches: one alone may take less than its launch.
GPU_TIMES = 16
GPU_SOURCES = ("model.h", "driver.c", "bench.c", "profile.c")
_DEFAULT_PAGE_BYTES = {"aarch64": 65536}


def native(
    target: Target,
    sources: Mapping[str, str],
    kernels: bytes,
    prefix: str,
    progress: Callable[[str], None] = lambda line: None,
    peaks: bytes = b"",
) -> dict[str, bytes]:
    """Link ``model.so``, ``model.a`` and the static program ``bench``.

    ``sources`` holds model.h, driver.c, bench.c, profile.c and, of a bundle with threads, pool.h
    and pool.c; ``kernels`` is a relocatable ELF
    object of position-independent code, ``peaks`` one for the program alone.
    No result needs a library at run time. Raises UserError where zig
    is missing, EdgepipeError where it fails.
    """
    pool = [file for file in driver.POOL if file in sources and file.endswith(".c")]
    api = driver.api_symbols(prefix, threaded=bool(pool))
    with tempfile.TemporaryDirectory(prefix="edgepipe-link-") as name:
        work = Path(name)
        for file, text in sources.items():
            (work / file).write_text(text, encoding="utf-8")
        (work / "kernels.o").write_bytes(kernels)
        (work / "peaks.o").write_bytes(peaks)
        extra = ["peaks.o"] if peaks else []
        _compile_driver(target, work)
        zig("ld.lld", "-r", "--gc-sections", "--strip-debug", *(f"--undefined={s}" for s in api),
            "-o", "model.o", "driver.o", "kernels.o", "libmath.a",
            cwd=work)  # fmt: skip
        private = elf.make_private((work / "model.o").read_bytes(), api, prefix)
        (work / "model.o").write_bytes(private)
        zig("ar", "rcsD", "model.a", "model.o", cwd=work)
        page = target.facts.get("page_bytes", _DEFAULT_PAGE_BYTES.get(target.arch, 4096))
        zig("ld.lld", "-shared", "--gc-sections", "--strip-all", "--build-id=none",
            "-soname=model.so", "-z", f"max-page-size={page}", "-z", "noexecstack", "-z", "defs",
            "-o", "model.so", "model.o", cwd=work)  # fmt: skip
        _announce_libc(target.link.static_zig_target, progress)
        # No -mcpu: zig builds the C library anew for each CPU it is given, 40 s at a time.
        zig("cc", "-target", target.link.static_zig_target, "-static", "-O2", "-g0", "-s",
            "-fno-sanitize=all", "-Wl,--build-id=none", "-o", "bench", "bench.c", "profile.c",
            *pool, *extra, "model.a", *(["-lpthread"] if pool else []), cwd=work)  # fmt: skip
        with contextlib.suppress(OSError):
            _libc_marker(target.link.static_zig_target).touch()
        return {file: (work / file).read_bytes() for file in ("model.so", "model.a", "bench")}


def rpc(target: Target, files: Mapping[str, bytes], prefix: str, counts: tuple[int, int]) -> bytes:
    """A shared library that TVM's RPC servers can load and call, of a bundle's ``files`` model.a
    and model.h; ``counts`` of inputs and outputs. Raises as ``native`` does."""
    with tempfile.TemporaryDirectory(prefix="edgepipe-link-") as name:
        work = Path(name)
        for file, content in files.items():
            (work / file).write_bytes(content)
        (work / "rpc.c").write_text(driver.rpc_source(prefix, *counts), encoding="utf-8")
        zig("cc", "-target", target.link.static_zig_target, *_C_FLAGS, "-fPIC", "-c", "rpc.c",
            "-o", "rpc.o", cwd=work)  # fmt: skip
        zig("ld.lld", "-shared", "--strip-all", "--build-id=none", "-z", "noexecstack",
            "-o", "rpc.so", "rpc.o", "model.a", cwd=work)  # fmt: skip
        return (work / "rpc.so").read_bytes()


def candidate(target: Target, source: str, kernels: bytes, form: str) -> bytes:
    """Two kernels to measure, behind ``source`` (candidate.c filled in): a ``PROGRAM``, a
    ``LIBRARY`` for TVM's RPC servers, or a ``MODULE`` of WebAssembly. Raises as ``native`` does."""
    with tempfile.TemporaryDirectory(prefix="edgepipe-link-") as name:
        work = Path(name)
        (work / "candidate.c").write_text(source, encoding="utf-8")
        (work / "kernels.o").write_bytes(kernels)
        (work / "libmath.a").write_bytes(math_library(target))
        objects = ("candidate.o", "kernels.o", "libmath.a")
        triple = target.link.static_zig_target or target.link.zig_target
        if form == "PROGRAM":
            zig("cc", "-target", triple, "-DPROGRAM", "-static", "-O2", "-g0", "-s", "-std=gnu11",
                "-fno-sanitize=all", "-o", "candidate", "candidate.c", *objects[1:],
                cwd=work)  # fmt: skip
            return (work / "candidate").read_bytes()
        flags = [flag if flag != "-std=c99" else "-std=c11" for flag in _C_FLAGS]
        zig("cc", "-target", triple, *flags, *(() if form == "MODULE" else ("-fPIC",)),
            f"-D{form}", "-c", "candidate.c", "-o", "candidate.o", cwd=work)  # fmt: skip
        if form == "LIBRARY":
            zig("ld.lld", "-shared", "--strip-all", "--build-id=none", "-z", "noexecstack",
                "-o", "candidate", *objects, cwd=work)  # fmt: skip
        else:
            zig("wasm-ld", "--no-entry", "--strip-all", "--stack-first", "-z",
                f"stack-size={_WASM_STACK_BYTES}", "--export=candidate_fill",
                "--export=candidate_run", "-o", "candidate", *objects, cwd=work)  # fmt: skip
        return (work / "candidate").read_bytes()


def gpu_candidate(
    target: Target, sources: Mapping[str, str], code: Mapping[str, bytes], form: str
) -> bytes:
    """Two kernels to measure on a GPU, as ``candidate``: ``sources`` has candidate.c and
    candidate_gpu.c filled in, ``code`` the files that the latter embeds."""
    shape = ("-DLIBRARY", "-shared", "-fPIC") if form == "LIBRARY" else ("-DPROGRAM",)
    with tempfile.TemporaryDirectory(prefix="edgepipe-link-") as name:
        work = Path(name)
        for file, text in sources.items():
            (work / file).write_text(text, encoding="utf-8")
        for file, content in code.items():
            (work / file).write_bytes(content)
        zig("cc", "-target", target.link.zig_target, "-DGPU", f"-DTIMES={GPU_TIMES}", *shape,
            "-O2", "-g0", "-s", "-std=gnu11", "-fno-sanitize=all", "-fno-stack-protector",
            "-o", "candidate", *sources, "-ldl", "-lpthread", cwd=work)  # fmt: skip
        return (work / "candidate").read_bytes()


def shared_for_this_machine(source: str) -> bytes:
    """A shared library from one C file, what it lacks left to what loads it."""
    with tempfile.TemporaryDirectory(prefix="edgepipe-link-") as name:
        work = Path(name)
        (work / "library.c").write_text(source, encoding="utf-8")
        zig("cc", "-fPIC", "-O2", "-g0", "-fno-sanitize=all", "-c", "library.c", "-o", "library.o",
            cwd=work)  # fmt: skip
        zig("ld.lld", "-shared", "--strip-all", "-z", "noexecstack", "-o", "library.so",
            "library.o", cwd=work)  # fmt: skip
        return (work / "library.so").read_bytes()


def gpu(
    zig_target: str,
    sources: Mapping[str, str],
    code: Mapping[str, bytes],
) -> dict[str, bytes]:
    """Link ``model.so``, ``model.a`` and ``bench`` for the host of a GPU.

    ``sources`` holds GPU_SOURCES, ``code`` the files that the driver embeds.
    They need the C library of ``zig_target`` and open the GPU's driver at run time. Raises as
    ``native`` does.
    """
    flags = ("-target", zig_target, "-O2", "-g0", "-fno-sanitize=all", "-fno-stack-protector")
    libraries = ("-ldl", "-lpthread", "-s", "-Wl,--build-id=none")
    with tempfile.TemporaryDirectory(prefix="edgepipe-link-") as name:
        work = Path(name)
        for file, text in sources.items():
            (work / file).write_text(text, encoding="utf-8")
        for file, content in code.items():
            (work / file).write_bytes(content)
        zig("cc", *flags, "-std=gnu99", "-fPIC", "-fvisibility=hidden", "-c", "driver.c",
            "-o", "model.o", cwd=work)  # fmt: skip
        zig("ar", "rcsD", "model.a", "model.o", cwd=work)
        zig("cc", *flags, "-shared", "-o", "model.so", "model.o", "-Wl,-soname=model.so",
            *libraries, cwd=work)  # fmt: skip
        zig("cc", *flags, "-o", "bench", "bench.c", "profile.c", "model.a",
            *libraries, cwd=work)  # fmt: skip
        return {file: (work / file).read_bytes() for file in ("model.so", "model.a", "bench")}


def wasm(
    target: Target, sources: Mapping[str, str], objects: Mapping[str, bytes], prefix: str,
    peaks: Mapping[str, bytes] | None = None, warmed: bool = False,
) -> dict[str, bytes]:  # fmt: skip
    """Link ``model.wasm`` and one ``model.VARIANT.wasm`` per further variant of ``objects``, and
    ``peaks.wasm`` likewise from ``peaks``.

    The modules import nothing; they export their memory, ``__heap_base`` and
    ``driver.wasm_symbols``, with ``warm_up`` where kernels are ``warmed``. Raises as ``native``
    does.
    """
    exports = [*driver.wasm_symbols(prefix, warmed), "__heap_base"]
    with tempfile.TemporaryDirectory(prefix="edgepipe-link-") as name:
        work = Path(name)
        for file, text in sources.items():
            (work / file).write_text(text, encoding="utf-8")
        _compile_driver(target, work)
        files = {}
        for variant, kernels in sorted(objects.items()):
            file = f"model.{variant}.wasm" if variant else "model.wasm"
            (work / "kernels.o").write_bytes(kernels)
            zig("wasm-ld", "--no-entry", "--gc-sections", "--strip-all", "--stack-first",
                "-z", f"stack-size={_WASM_STACK_BYTES}", *(f"--export={s}" for s in exports),
                "-o", file, "driver.o", "kernels.o", "libmath.a",
                cwd=work)  # fmt: skip
            code = (work / file).read_bytes()
            files[file] = turns.wrap(code, f"{prefix}_warm_up") if warmed else code
        for variant, kernels in sorted((peaks or {}).items()):
            file = f"peaks.{variant}.wasm" if variant else "peaks.wasm"
            (work / "kernels.o").write_bytes(kernels)
            zig("wasm-ld", "--no-entry", "--strip-all", "--stack-first", "--export-all",
                "-o", file, "kernels.o", cwd=work)  # fmt: skip
            files[file] = (work / file).read_bytes()
        return files


def zig(*arguments: str, cwd: Path) -> None:
    """Run one zig command. Raises UserError (missing, disk full, no cache) or EdgepipeError."""
    try:
        done = subprocess.run(
            [str(zig_program()), *arguments],
            cwd=cwd,
            capture_output=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise EdgepipeError(f"zig {arguments[0]} did not end within {_TIMEOUT_S} s") from None
    except OSError as error:
        raise UserError(
            f"cannot run zig: {error.strerror}", where=str(zig_program()), fix=_INSTALL
        ) from None
    if done.returncode == 0:
        return
    text = done.stderr.decode("utf-8", "replace")
    if "No space left" in text or "NoSpaceLeft" in text:
        raise UserError("the disk is full", where=str(cwd), fix="free some space and try again")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = next((line for line in lines if "error:" in line), lines[-1] if lines else "no message")
    if "cache directory" in first:
        raise UserError(
            f"zig cannot keep its cache: {first.partition('error: ')[2]}",
            fix="set ZIG_GLOBAL_CACHE_DIR to a folder you can write to",
        )
    if any(said in text for said in _UNKNOWN_TARGET):
        raise UserError(f"zig does not know the target: {first}", where="target",
                        fix="correct [link] and [llvm] of its file")  # fmt: skip
    raise EdgepipeError(f"zig {arguments[0]} failed ({done.returncode}): {first}")


@cache
def zig_program() -> Path:
    """Path of the zig program that the ``ziglang`` package brings. Raises UserError."""
    spec = importlib.util.find_spec("ziglang")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for name in ("zig", "zig.exe"):
            if (Path(folder) / name).is_file():
                return Path(folder) / name
    raise UserError("the zig compiler is missing", fix=_INSTALL)


def zig_cpu(target: Target) -> str:
    """The target's CPU and features as zig's ``-mcpu`` wants them."""
    # WebAssembly: start from nothing, so that a module never asks for more than the target says.
    cpu = target.llvm.get("mcpu") or (
        "mvp+mutable_globals" if target.kind == "wasm" else "baseline"
    )
    features = [f[0] + f[1:].replace("-", "_") for f in target.llvm.get("mattr", ())]
    return cpu.replace("-", "_") + "".join(features)


def cache_folder() -> Path:
    """Where built runtime libraries are kept: ``$XDG_CACHE_HOME/edgepipe/runtime`` or the like."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()
    return root / "edgepipe" / "runtime"


def math_library(target: Target) -> bytes:
    """Archive of math.zig and zig's compiler-rt for ``target``, built once per content.

    It is kept in the user's cache as ``KEY-SHA256.a``: KEY stands for everything it depends on,
    SHA256 is that of the archive and is checked on every read. Raises as ``zig`` does; a cache
    that cannot be written only costs the build again.
    """
    source = driver.resource("math.zig")
    arguments = [
        "build-lib", "-static", "-fcompiler-rt", "-OReleaseFast", "-fstrip", "-fPIC",
        "-ffunction-sections", "-fdata-sections", "-target", target.link.zig_target,
        f"-mcpu={zig_cpu(target)}",
    ]  # fmt: skip
    key = hashlib.sha256(repr((source, arguments, _zig_version())).encode()).hexdigest()[:16]
    if (cached := _cached(key)) is not None:
        return cached
    with tempfile.TemporaryDirectory(prefix="edgepipe-math-") as name:
        work = Path(name)
        (work / "math.zig").write_text(source, encoding="utf-8")
        zig(*arguments, "--cache-dir", "cache", "--name", "math", "math.zig", cwd=work)
        content = (work / "libmath.a").read_bytes()
    with contextlib.suppress(OSError):
        _keep(key, content)
    return content


def _cached(key: str) -> bytes | None:
    with contextlib.suppress(OSError):
        for path in sorted(cache_folder().glob(f"{key}-*.a")):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == path.stem.rsplit("-", 1)[1]:
                return content
    return None


def _keep(key: str, content: bytes) -> None:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(folder / f"{key}-{hashlib.sha256(content).hexdigest()}.a")
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _libc_marker(zig_target: str) -> Path:
    return cache_folder() / f"{zig_target}-{_zig_version()}.built"


def _announce_libc(zig_target: str, progress: Callable[[str], None]) -> None:
    if not _libc_marker(zig_target).exists():
        progress(f"building the C library for {zig_target} (once, about a minute)")


def _compile_driver(target: Target, work: Path) -> None:
    (work / "libmath.a").write_bytes(math_library(target))
    position = () if target.kind == "wasm" else ("-fPIC",)
    zig("cc", "-target", target.link.zig_target, f"-mcpu={zig_cpu(target)}", *_C_FLAGS, *position,
        "-c", "driver.c", "-o", "driver.o", cwd=work)  # fmt: skip


@cache
def _zig_version() -> str:
    from importlib.metadata import version

    return version("ziglang")
