"""What bundles and edgepipe are made of, and the bills of materials of both."""

from __future__ import annotations

import json
import re
from pathlib import Path

import handmade
import pytest

from edgepipe import cli, components
from edgepipe.bundle import Bundle
from edgepipe.codegen.link import zig_program
from edgepipe.errors import UserError
from edgepipe.target import Target


def made(target: str, folder: Path) -> Bundle:
    path = folder / target
    found = Target.load(target)
    return handmade.write(path, handmade.source(), handmade.plan(), handmade.objects(found),  # type: ignore[arg-type]
                        handmade.context(found), "model")  # fmt: skip


@pytest.mark.parametrize("target", ["x86-64-v3", "wasm-relaxed"])
def test_a_bundle_says_what_it_contains(target: str, tmp_path: Path) -> None:
    found = made(target, tmp_path)
    listed = {(c.name, c.licence) for c in found.components}
    assert {("edgepipe", "Apache-2.0"), ("zig", "MIT"), ("Go", "BSD-3-Clause")} <= listed
    code = {n for n in found.manifest["files"] if re.search(r"\.(so|a|wasm|c|h|m?js|html)$", n)}
    assert code <= {file for c in found.components if c.name == "edgepipe" for file in c.files}
    linked = {"x86-64-v3": {"model.so", "model.a", "bench"},
              "wasm-relaxed": {"model.wasm", "model.relaxed.wasm"}}[target]  # fmt: skip
    assert all(linked <= set(c.files) for c in found.components if c.name in ("zig", "Go"))
    libc = [c.files for c in found.components if "C library" in c.what]
    assert libc == ([("bench",)] if target == "x86-64-v3" else [])
    text = found.file(components.NOTICES).read_text(encoding="utf-8")
    for words in (
        "Apache License",
        "Zig contributors",
        "Rich Felker",
        "The Go Authors",
        "Arm Limi",
    ):
        assert words in text


def test_what_zig_is_ported_from_is_known() -> None:
    """Another version of zig may come with parts of others' code."""
    lib = zig_program().parent / "lib"
    files = [*(lib / "std" / "math").rglob("*.zig"), *(lib / "compiler_rt").rglob("*.zig")]
    said = {
        line.strip(" /!.:").lower()
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        if re.match(r"\s*//.*(licensed|ported from \w)", line, re.I)
    }
    known = ("musl", "arm-software", "go,", "llvm", "rust", "compiler-rt", "public domain")
    assert len(said) > 5
    assert not [line for line in said if not any(name in line for name in known)]


def test_what_is_installed_is_listed_without_the_developers_tools() -> None:
    found = {c.name: c for c in components.installed()}
    assert {"edgepipe", "numpy", "apache-tvm", "ziglang", "onnxruntime"} <= found.keys()
    assert not {"pytest", "ruff", "pip"} & found.keys()
    assert found["apache-tvm"].licence == "Apache-2.0"
    assert all(c.licence and "\n" not in c.licence for c in found.values())


def test_a_bill_of_materials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = made("wasm-simd", tmp_path)
    for words in ([], [str(found.path)]):
        assert cli.main(["licences", *words, "--json"]) == 0
        bill = json.loads(capsys.readouterr().out)
        assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
        assert all({"type", "name", "version", "licenses"} <= c.keys() for c in bill["components"])
        assert any("purl" in c for c in bill["components"]) is not bool(words)
    assert cli.main(["licences", str(found.path)]) == 0
    assert "BSD-3-Clause" in capsys.readouterr().out


@pytest.mark.parametrize("broken", [3, [3], [{"name": "x"}], [{"name": 3}]])
def test_components_that_are_none_are_refused(broken: object, tmp_path: Path) -> None:
    path = made("wasm-simd", tmp_path).path / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["components"] = broken
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match=r"components"):
        Bundle.open(path.parent)
