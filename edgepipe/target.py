"""Targets: facts about devices, read from ``targets/*.toml``. Adding a device is adding a file."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgepipe import gpu, tables
from edgepipe.errors import UserError, did_you_mean
from edgepipe.recipe import FORMATS, GROUPED, Recipe
from edgepipe.resources import data_folder

KINDS = ("cpu", "wasm", "cuda")
ARCHITECTURES = ("x86_64", "aarch64", "arm", "wasm32")
DOTS = ("vnni", "maddubs", "sdot", "mlal", "pairs", "relaxed", "dp4a")

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
_VERSION = re.compile(r"\d{1,2}\.\d{1,2}")


def _require(sound: bool, key: str, wanted: str) -> None:
    if not sound:
        raise UserError(f"'{key}' must be {wanted}", where="target")


def _require_features(value: object, key: str) -> None:
    """LLVM fails on anything else, if it does not crash."""
    sound = isinstance(value, list | tuple) and all(
        isinstance(word, str) and word[:1] in ("+", "-") and _WORD.fullmatch(word[1:])
        for word in value
    )
    _require(sound, key, "a list of features such as '+neon'")


@dataclass(frozen=True)
class Simd:
    """The vector unit as kernels see it. ``fma`` says whether a fused multiply-add is native."""

    lanes_f32: int
    registers: int
    fma: bool

    def __post_init__(self) -> None:
        _require(self.lanes_f32 in (2, 4, 8, 16, 32), "simd.lanes_f32", "2, 4, 8, 16 or 32")
        _require(8 <= self.registers <= 256, "simd.registers", "from 8 to 256")


@dataclass(frozen=True)
class Integer:
    """How 8-bit products are summed, which decides what quantization may produce.

    ``dot`` names the instruction that kernels use: ``vnni`` (u8 x s8, four to an int32),
    ``maddubs`` (u8 x s8, two to a saturating int16), ``sdot`` (s8 x s8, four to an int32),
    ``mlal`` (s8 x s8 to int16, gathered pairwise), ``pairs`` (int16 x int16, two to an int32) or
    ``relaxed`` (s8 x 7 bits, four to an int32, where the engine has it; else ``pairs``).
    ``activations`` is how codes are stored. ``weight_limit`` is the largest magnitude of an 8-bit
    weight with which ``dot`` is exact.
    """

    dot: str
    activations: str
    weight_limit: int = 127

    def __post_init__(self) -> None:
        _require(self.dot in DOTS, "integer.dot", ", ".join(DOTS))
        _require(self.activations in ("int8", "uint8"), "integer.activations", "int8 or uint8")
        _require(1 <= self.weight_limit <= 127, "integer.weight_limit", "from 1 to 127")


@dataclass(frozen=True)
class Link:
    """How zig links for the target: its target triple and, for programs, the static one."""

    zig_target: str
    static_zig_target: str = ""

    def __post_init__(self) -> None:
        for name, text in vars(self).items():
            sound = bool(_WORD.fullmatch(text)) or not text
            _require(sound, f"link.{name}", "a triple such as aarch64-linux-gnu.2.27")


@dataclass(frozen=True)
class Run:
    """Runners that can execute the target's bundles, preferred first, and what they need."""

    runners: tuple[str, ...]
    qemu: str = ""
    qemu_cpu: str = ""


@dataclass(frozen=True)
class Cuda:
    """The GPU at its highest clock, and what the board's driver takes.

    ``sm`` is the compute capability (62 for 6.2), ``ptx_isa`` the highest PTX ISA and ``driver``
    the CUDA version of the driver. ``ptx_sm`` is the architecture PTX is made for where the
    assembler does not know ``sm`` yet. A peak of 0 says that the GPU has no such arithmetic.
    """

    sm: int
    ptx_isa: str
    driver: str
    processors: int
    memory_gb: float
    bandwidth_gb_s: float
    peak_gflops_f32: float
    peak_gflops_f16: float = 0.0
    peak_gops_s8: float = 0.0
    ptx_sm: int = 0

    def __post_init__(self) -> None:
        for name in ("ptx_isa", "driver"):
            sound = bool(_VERSION.fullmatch(getattr(self, name)))
            _require(sound, f"cuda.{name}", "a version such as 10.2")
        for name in ("sm", "ptx_sm"):
            _require(0 <= getattr(self, name) < 1000, f"cuda.{name}", "from 0 to 999")
        _require(1 <= self.processors < 1000, "cuda.processors", "from 1 to 999")
        for name in ("bandwidth_gb_s", "peak_gflops_f32"):
            _require(getattr(self, name) > 0, f"cuda.{name}", "above 0")
        for name in ("memory_gb", "peak_gflops_f16", "peak_gops_s8"):
            _require(getattr(self, name) >= 0, f"cuda.{name}", "0 or more")

    @property
    def virtual_sm(self) -> int:
        """The architecture that PTX is compiled for."""
        return self.ptx_sm or self.sm


@dataclass(frozen=True)
class Target:
    """A device, as data. ``llvm`` is the full TVM target; ``facts`` is what else the file tells.

    ``variants`` lists further LLVM attribute sets the bundle is also built for and chosen from
    at load (WebAssembly relaxed SIMD): name → extra attributes. ``recipes`` is what the device
    can run: families of ``edgepipe.recipe``, ``w4gN`` for every group size.
    """

    name: str
    summary: str
    kind: str
    arch: str
    llvm: dict[str, Any]
    simd: Simd
    link: Link
    run: Run
    integer: Integer
    recipes: tuple[str, ...] = ("fp32",)
    variants: dict[str, tuple[str, ...]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    cuda: Cuda | None = None

    def __post_init__(self) -> None:
        _require(self.kind in KINDS, "kind", ", ".join(KINDS))
        _require((self.kind == "cuda") == (self.cuda is not None), "[cuda]", "that of kind cuda")
        for key in ("name", "arch"):
            _require(bool(_WORD.fullmatch(getattr(self, key))), key, "letters, digits, '-' and '_'")
        _require(self.arch in (*ARCHITECTURES, "detect"), "arch", ", ".join(ARCHITECTURES))
        _require((self.kind == "wasm") == (self.arch == "wasm32"), "arch", "wasm32 of kind wasm")
        triple = self.llvm.get("mtriple")
        # LLVM crashes on the triple of a machine that it does not know.
        sound = isinstance(triple, str) and triple.startswith(self.arch)
        _require(sound or self.arch == "detect", "llvm.mtriple", f"a triple of {self.arch}")
        for key, value in self.llvm.items():
            if key == "mattr":
                _require_features(value, "llvm.mattr")
                continue
            kind = str if key in ("mtriple", "mcpu") else str | int
            sound = isinstance(value, kind) and bool(_WORD.fullmatch(str(value)))
            _require(sound, f"llvm.{key}", "a word")
        for name, features in self.variants.items():
            _require_features(features, f"variants.{name}")
        for recipe in self.recipes:
            if recipe not in (*FORMATS, *GROUPED):
                fix = did_you_mean(recipe, (*FORMATS, *GROUPED))
                raise UserError(f"unknown recipe '{recipe}' in 'recipes'", where="target", fix=fix)
        page = self.facts.get("page_bytes", 4096)
        _require(page in (4096, 16384, 65536), "facts.page_bytes", "4096, 16384 or 65536")

    @classmethod
    def load(cls, name_or_file: str) -> Target:
        """Load a target by name or from a TOML file. Raises UserError."""
        path = Path(name_or_file)
        if path.suffix == ".toml":
            if not path.is_file():
                raise UserError("no such target file", where=str(path))
            return cls.from_toml(path)
        if name_or_file not in target_names():
            raise UserError(
                f"unknown target '{name_or_file}'",
                where="--target",
                fix=did_you_mean(name_or_file, target_names()),
            )
        return cls.from_toml(data_folder("targets") / f"{name_or_file}.toml")

    @classmethod
    def from_toml(cls, path: Path) -> Target:
        """Read one target file; every unknown, missing or ill-typed key is a UserError."""
        target: Target = tables.read(cls, tables.load_toml(path), str(path))
        if target.cuda is not None and target.cuda.sm == 0:
            return _detect_gpu(target, target.cuda)
        return _detect_host(target) if target.llvm.get("mcpu") == "detect" else target

    def halves(self, recipe: Recipe) -> bool:
        """Whether kernels may keep float activations in memory as halves."""
        return self.kind == "cuda" and recipe.format != "fp32" and not recipe.integer

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe the device cannot run, saying what it offers. Runs before any work."""
        if recipe.family not in self.recipes:
            raise UserError(
                f"{self.name} does not offer recipe '{recipe}'",
                where="--recipe",
                fix="it offers " + ", ".join(self.recipes),
            )


def target_names() -> list[str]:
    """Names of all targets that ship with edgepipe, sorted."""
    return sorted(p.stem for p in data_folder("targets").glob("*.toml"))


# CPUID names of /proc/cpuinfo that together make one psABI level, highest first, with the
# LLVM CPU that stands for the level and its float32 vector.
_LEVELS = (
    ({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}, "x86-64-v4", 16, 32),
    ({"avx2", "fma", "bmi2", "f16c"}, "x86-64-v3", 8, 16),
)


def _detect_host(target: Target) -> Target:
    """Fill in this machine's CPU. ``-mcpu=native`` is not used: bundles must say what they need."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise UserError(
            f"target 'host' supports x86-64 machines; this one is {platform.machine()}",
            where="--target",
            fix="use raspberry-pi-4, raspberry-pi-5 or another named target",
        )
    cpuinfo = Path("/proc/cpuinfo")
    flags: set[str] = set()
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                flags = set(line.split(":", 1)[1].split())
                break
    level = next((level for level in _LEVELS if level[0] <= flags), None)
    if level is None:
        raise UserError("this CPU has no AVX2 and FMA", where="--target", fix="use another machine")
    _, mcpu, lanes, registers = level
    llvm = {**target.llvm, "mcpu": mcpu}
    if mcpu == "x86-64-v4":
        # LLVM prefers 256-bit vectors on this level unless told; kernels are written for 512.
        llvm["mattr"] = [*llvm.get("mattr", []), "-prefer-256-bit"]
    integer = target.integer
    if "avx512_vnni" in flags and mcpu == "x86-64-v4":
        llvm["mattr"] = [*llvm.get("mattr", []), "+avx512vnni"]
        integer = Integer("vnni", "uint8")
    return replace(target, llvm=llvm, simd=Simd(lanes, registers, True), integer=integer)


#: Two halves are one operand of a multiply-add from 5.3 on, 6.1 apart; dot products of four bytes
#: from 6.1 on, 6.2 apart: CUDA C guide, arithmetic throughput.
_NO_HALVES, _NO_BYTES = (61,), (60, 62)
#: The newest architecture that every NVRTC of the extra ``cuda`` compiles for.
_NEWEST_SM = 90


def _detect_gpu(target: Target, cuda: Cuda) -> Target:
    """Fill in this machine's GPU and host."""
    found = gpu.detect()
    if isinstance(found, str):
        raise UserError(found, where="--target", fix="name a board, such as jetson-tx2")
    major, minor = found.driver
    peak = round(found.peak_gflops_f32, 1)
    arch = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    detected = replace(
        cuda,
        sm=found.sm,
        ptx_sm=_NEWEST_SM if found.sm > _NEWEST_SM else 0,
        ptx_isa=gpu.highest_isa(found.driver),
        driver=f"{major}.{minor}",
        processors=found.processors,
        memory_gb=round(found.memory_bytes / 1e9, 1),
        bandwidth_gb_s=round(found.bandwidth_gb_s, 1),
        peak_gflops_f32=peak,
        peak_gflops_f16=peak * (1 if found.sm in _NO_HALVES else 2),
        peak_gops_s8=0.0 if found.sm < 61 or found.sm in _NO_BYTES else 4 * peak,
    )
    return replace(
        target,
        arch=arch,
        recipes=(*target.recipes, *(("w8a8",) if detected.peak_gops_s8 else ())),
        summary=f"{target.summary}: {found.name}",
        llvm={**target.llvm, "mtriple": f"{arch}-linux-gnu"},
        link=Link(f"{arch}-linux-gnu.2.27"),
        cuda=detected,
    )
