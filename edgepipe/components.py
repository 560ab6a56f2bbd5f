"""What edgepipe and its bundles are made of: components with their licences, and as an SBOM.

Kernels are compiled from edgepipe's own templates and from the loops that TVM writes for an
operator; nothing of TVM or LLVM itself is in a bundle. What others wrote and is linked in comes
with zig: functions that a C compiler's output calls, and of the static program the C library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from edgepipe.resources import data_file
from edgepipe.target import Target

#: The file of a bundle that has the licences' texts.
NOTICES = "LICENCES.txt"


@dataclass(frozen=True)
class Component:
    """``licence`` is an SPDX expression, ``what`` says which part of it is meant; ``files`` of a
    bundle have it in them."""

    name: str
    version: str
    licence: str
    what: str
    files: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


#: What zig's compiler-rt and mathematics are ported from, by their own comments.
_PORTED = (
    ("musl", "MIT", "mathematics, in zig's port"),
    ("Arm Optimized Routines", "MIT", "mathematics, in zig's port"),
    ("Go", "BSD-3-Clause", "math.Pow, in zig's port"),
    ("LLVM compiler-rt", "Apache-2.0 WITH LLVM-exception", "arithmetic, in zig's port"),
)
_CUDA = ("model.ptx", "model.cubin", "model.so", "model.a", "bench")


def of_bundle(target: Target, files: Iterable[str], versions: Mapping[str, str]) -> list[Component]:
    """What a bundle for ``target`` with ``files`` contains; ``versions`` of edgepipe and zig."""
    names = sorted(files)
    linked = tuple(n for n in names if n == "bench" or n.endswith((".so", ".a", "model.wasm")))
    linked += tuple(n for n in names if re.fullmatch(r"model\.\w+\.wasm", n))
    code = tuple(n for n in names if not n.endswith((".npz", ".bin", ".onnx", ".tflite", ".txt")))
    zig, own = f"zig {versions['zig']}", versions["edgepipe"]
    found = [
        Component("edgepipe", own, "Apache-2.0", "driver, kernels, programs", code),
        Component("zig", versions["zig"], "MIT", "compiler-rt and mathematics", linked),
        *(Component(name, zig, licence, what, linked) for name, licence, what in _PORTED),
    ]
    if target.kind == "cuda":
        files_of_cuda = tuple(n for n in _CUDA if n in names)
        found += [
            Component("glibc", zig, "LGPL-2.1-or-later", "start files, to be linked by their "
                      "exception", tuple(n for n in ("bench", "model.so") if n in names)),
            Component("CUDA Toolkit", _version("nvidia-cuda-nvrtc-cu12"),
                      "LicenseRef-NVIDIA-CUDA-EULA", "device functions that kernels call",
                      files_of_cuda),
        ]  # fmt: skip
    elif "bench" in names:
        found.append(Component("musl", zig, "MIT", "the C library, linked statically", ("bench",)))
    return found


def notices(components: Sequence[Component]) -> bytes:
    """The file NOTICES: a list of ``components`` and the texts of their licences."""
    lines = [
        "What this bundle contains, and under which licence. The network's weights are whose",
        "they were.",
        "",
    ]
    lines += [f"{c.name} ({c.version}), {c.licence}: {c.what}; in {', '.join(c.files)}"
              for c in components]  # fmt: skip
    names = {c.name for c in components}
    for name, path in _texts().items():
        if name in names:
            text = path.read_text(encoding="utf-8").strip()
            lines += ["", "=" * 80, name, "=" * 80, "", text]
    return ("\n".join(lines) + "\n").encode("utf-8")


def _texts() -> dict[str, Path]:
    from edgepipe.codegen.link import zig_program

    zig = zig_program().parent
    notices = Path(__file__).parent / "codegen" / "runtime"
    return {
        "edgepipe": data_file("LICENSE"),
        "zig": zig / "LICENSE",
        "musl": zig / "lib" / "libc" / "musl" / "COPYRIGHT",
        "Go": notices / "go-licence.txt",
        "Arm Optimized Routines": notices / "arm-licence.txt",
        "glibc": zig / "lib" / "libc" / "glibc" / "LICENSES",
    }


_EXTRA, _DEVELOPERS = re.compile(r";.*\bextra\b"), re.compile(r";.*\bextra == .dev\b")


def installed() -> list[Component]:
    """edgepipe and its dependencies, sorted, with those of its extras that are installed here but
    for the tools of its developers."""
    found: dict[str, Component] = {}
    waiting = ["edgepipe"]
    while waiting:
        name = waiting.pop()
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        key = canonicalize_name(package.metadata["Name"])
        if key in found:
            continue
        about = package.metadata.json
        found[key] = Component(key, package.version, _licence(about), str(about.get("summary", "")))
        left_out = _DEVELOPERS if name == "edgepipe" else _EXTRA
        waiting += [Requirement(text).name for text in package.requires or ()
                    if not left_out.search(text)]  # fmt: skip
    return sorted(found.values(), key=lambda c: c.name)


def _licence(about: Mapping[str, Any]) -> str:
    """What a package's metadata say, in one line."""
    if expression := about.get("license_expression"):
        return str(expression)
    classifiers = [text.rpartition(" :: ")[2] for text in about.get("classifier", ())
                   if text.startswith("License ::")]  # fmt: skip
    said = ", ".join(classifiers) or str(about.get("license", "")).strip()
    return said.splitlines()[0][:80] if said else "not told"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


#: Licence names that CycloneDX takes as one SPDX identifier or expression.
_SPDX = re.compile(r"[A-Za-z0-9.+-]+(?: (?:AND|OR|WITH) [A-Za-z0-9.+-]+)*")


def cyclonedx(name: str, version: str, components: Iterable[Component]) -> dict[str, Any]:
    """A bill of materials of ``name`` in CycloneDX 1.6, as JSON. It holds no time and no serial
    number: the same components give the same bytes."""
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": name, "version": version}},
        "components": [_entry(c) for c in components],
    }


def _entry(component: Component) -> dict[str, Any]:
    licence = component.licence
    entry: dict[str, Any] = {
        "type": "library",
        "name": component.name,
        "version": component.version,
        "description": component.what,
        "licenses": [{"expression": licence} if _SPDX.fullmatch(licence)
                     else {"license": {"name": licence}}],
    }  # fmt: skip
    if component.files:
        entry["properties"] = [{"name": "edgepipe:file", "value": f} for f in component.files]
    else:
        entry["purl"] = f"pkg:pypi/{component.name}@{component.version.replace('+', '%2B')}"
    return entry
