"""Targets: every shipped file loads, every mistake in a file is named."""

import platform
from dataclasses import replace
from pathlib import Path

import pytest

from edgepipe import gpu
from edgepipe.errors import UserError
from edgepipe.recipe import Recipe
from edgepipe.resources import data_folder
from edgepipe.target import Target, target_names

EXPECTED = {
    "android-arm64",
    "host",
    "jetson-tx2-cpu",
    "raspberry-pi-3-32",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "wasm-relaxed",
    "wasm-simd",
    "x86-64-v3",
}
JETSON = {
    *("jetson-nano", "jetson-tx1", "jetson-tx2", "jetson-xavier-nx", "jetson-agx-xavier"),
    *("jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "jetson-thor"),
}
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="host is x86-64 only")


def test_the_promised_targets_are_there() -> None:
    assert set(target_names()) >= EXPECTED | JETSON


@pytest.mark.parametrize("name", sorted(JETSON))
def test_a_gpu_target_is_one_that_its_driver_can_serve(name: str) -> None:
    target = Target.load(name)
    assert target.name == name
    assert target.cuda is not None
    major, minor = map(int, target.cuda.driver.split("."))
    assert gpu.driver_version(target.cuda.ptx_isa) <= 1000 * major + 10 * minor
    assert target.cuda.sm < 70 or target.cuda.peak_gops_s8
    assert target.cuda.bandwidth_gb_s and target.cuda.peak_gflops_f16 > target.cuda.peak_gflops_f32
    target.check(Recipe("fp32"))


@pytest.mark.parametrize("name", sorted(EXPECTED - {"host"}))
def test_a_target_says_what_it_is(name: str) -> None:
    target = Target.load(name)
    assert target.name == name
    assert target.kind in ("cpu", "wasm")
    assert target.run.runners
    assert target.link.zig_target
    target.check(Recipe("fp32"))


@x86_only
def test_host_is_detected_and_never_native() -> None:
    host = Target.load("host")
    assert host.llvm["mcpu"] in ("x86-64-v3", "x86-64-v4")
    assert host.simd.lanes_f32 == {"x86-64-v3": 8, "x86-64-v4": 16}[host.llvm["mcpu"]]


def test_a_misspelt_name_is_answered_with_the_closest() -> None:
    with pytest.raises(UserError, match="did you mean 'raspberry-pi-4'"):
        Target.load("raspbery-pi-4")


def _changed(tmp_path: Path, old: str, new: str, name: str = "raspberry-pi-4") -> Path:
    text = (data_folder("targets") / f"{name}.toml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "board.toml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def test_a_file_of_ones_own_is_a_target(tmp_path: Path) -> None:
    path = _changed(tmp_path, 'mcpu = "cortex-a72"', 'mcpu = "cortex-a53"')
    assert Target.load(str(path)).llvm["mcpu"] == "cortex-a53"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("summary =", "sumary =", "did you mean 'summary'"),
        ('kind = "cpu"\n', "", "missing key 'kind'"),
        ("registers = 32", "register = 32", "register"),
        ("[simd]", "[simd", "not a readable TOML"),
        ('recipes = ["fp32"', 'recipes = ["fp23"', "unknown recipe 'fp23' in 'recipes'"),
        ('"w4gN"]', '"w4g32"]', "unknown recipe 'w4g32'"),
        ('kind = "cpu"', 'kind = "gpu"', "'kind' must be cpu, wasm, cuda"),
        ('kind = "cpu"', 'kind = "cuda"', "'[cuda]' must be that of kind cuda"),
        ("lanes_f32 = 4", "lanes_f32 = 0", "'simd.lanes_f32' must be 2, 4"),
        ("registers = 32", "registers = '32'", "'simd.registers' must be a whole number"),
        ('dot = "mlal"', 'dot = "magic"', "'integer.dot' must be vnni"),
        ('mcpu = "cortex-a72"', "mcpu = 1e308", "'llvm.mcpu' must be a word"),
        ('mcpu = "cortex-a72"', 'mcpu = ["a"]', "'llvm.mcpu' must be a word"),
        ('mcpu = "cortex-a72"', 'mcpu = "a b"', "'llvm.mcpu' must be a word"),
        ('mtriple = "aarch64-linux-gnu"\n', "", "'llvm.mtriple' must be a triple of aarch64"),
        ('mtriple = "aarch64', 'mtriple = "model', "'llvm.mtriple' must be a triple of aarch64"),
        ('arch = "aarch64"', 'arch = "z80"', "'arch' must be x86_64, aarch64, arm, wasm32"),
        ('arch = "aarch64"', 'arch = "wasm32"', "'arch' must be wasm32 of kind wasm"),
        ('mattr = ["+neon"]', 'mattr = "w4a16"', "'llvm.mattr' must be a list of features"),
        ('mattr = ["+neon"]', 'mattr = ["neon"]', "'llvm.mattr' must be a list of features"),
        ('kind = "cpu"', 'kind = "cpu"\nvariants = {x = ["y"]}', "'variants.x' must be a list of"),
        ('zig_target = "', 'zig_target = "-o/tmp/x ', "'link.zig_target' must be a triple"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        Target.load(str(_changed(tmp_path, old, new)))
    assert said in str(caught.value)
    assert "board.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["peak_gflops_f32", "bandwidth_gb_s", "processors"])
def test_a_gpu_without_speed_is_refused(tmp_path: Path, key: str) -> None:
    path = _changed(tmp_path, f"\n{key} = ", f"\n{key} = 0 # ", "jetson-tx2")
    with pytest.raises(UserError, match=f"'cuda.{key}' must be (above 0|from 1 to 999)"):
        Target.load(str(path))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml: no such target file"):
        Target.load("nowhere.toml")


def test_a_recipe_the_device_lacks_is_refused_with_what_it_offers() -> None:
    target = replace(Target.load("raspberry-pi-4"), recipes=("w8a8",))
    with pytest.raises(UserError, match="it offers w8a8"):
        target.check(Recipe("fp32"))


@pytest.mark.parametrize("name", sorted(EXPECTED - {"host"}))
@pytest.mark.parametrize(
    "recipe", ["fp16", "w8a8", "w4a8", "w4a4", "w8a16", "w4a16", "w8g64", "w4g32"]
)
def test_every_processor_offers_every_recipe(name: str, recipe: str) -> None:
    Target.load(name).check(Recipe(recipe))


def test_a_group_size_is_offered_by_its_family() -> None:
    target = replace(Target.load("raspberry-pi-4"), recipes=("fp32", "w4gN"))
    target.check(Recipe("w4g7"))
    with pytest.raises(UserError, match="does not offer recipe 'w8g7'; it offers fp32, w4gN"):
        target.check(Recipe("w8g7"))
