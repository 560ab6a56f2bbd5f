"""The bundle's own C math functions against float64 references, where they execute."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path

import handmade
import numpy as np
import pytest

from edgepipe import runners
from edgepipe.blob import Blob
from edgepipe.bundle import Bundle
from edgepipe.codegen import link
from edgepipe.codegen.plan import Call, Place, Plan, TensorSpec
from edgepipe.target import Target

COUNT = 4096
Reference = Callable[..., np.ndarray]

# function: (float64 reference, range of x, largest error in units in the last place)
# 2 is what the C libraries in use promise or reach; pow and the hyperbolic inverses lose one more.
UNARY: dict[str, tuple[Reference, float, float, float]] = {
    "expf": (np.exp, -100, 88, 1),
    "exp2f": (np.exp2, -140, 127, 1),
    "exp10f": (lambda x: 10.0**x, -37, 38, 2),
    "expm1f": (np.expm1, -20, 88, 1),
    "logf": (np.log, 1e-30, 1e4, 1),
    "log2f": (np.log2, 1e-30, 1e4, 1),
    "log10f": (np.log10, 1e-30, 1e4, 2),
    "log1pf": (np.log1p, -0.999, 100, 1),
    "tanhf": (np.tanh, -12, 12, 3),
    "erff": (np.vectorize(math.erf), -5, 5, 1),
    "erfcf": (np.vectorize(math.erfc), -5, 9, 1),
    "sinf": (np.sin, -1000, 1000, 1),
    "cosf": (np.cos, -1000, 1000, 1),
    "tanf": (np.tan, -1000, 1000, 1),
    "asinf": (np.arcsin, -1, 1, 2),
    "acosf": (np.arccos, -1, 1, 2),
    "atanf": (np.arctan, -50, 50, 1),
    "sinhf": (np.sinh, -80, 80, 3),
    "coshf": (np.cosh, -80, 80, 2),
    "asinhf": (np.arcsinh, -1000, 1000, 3),
    "acoshf": (np.arccosh, 1, 1000, 3),
    "atanhf": (np.arctanh, -0.999, 0.999, 3),
    "sqrtf": (np.sqrt, 0, 1e6, 0.5),
    "cbrtf": (np.cbrt, -1e6, 1e6, 1),
    "floorf": (np.floor, -1e4, 1e4, 0),
    "ceilf": (np.ceil, -1e4, 1e4, 0),
    "truncf": (np.trunc, -1e4, 1e4, 0),
    "roundf": (lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x), -1e4, 1e4, 0),
    "rintf": (np.rint, -1e4, 1e4, 0),
    "nearbyintf": (np.rint, -1e4, 1e4, 0),
    "roundevenf": (np.rint, -1e4, 1e4, 0),
    "fabsf": (np.abs, -10, 10, 0),
}
BINARY: dict[str, tuple[Reference, float, float, float]] = {
    "powf": (np.power, 0.01, 20, 2),
    "atan2f": (np.arctan2, -20, 20, 2),
    "hypotf": (np.hypot, -1e3, 1e3, 1),
    "fmodf": (np.fmod, 0.1, 1e3, 0),
    "fminf": (np.minimum, -10, 10, 0),
    "fmaxf": (np.maximum, -10, 10, 0),
    "copysignf": (np.copysign, -10, 10, 0),
}
HALVES = {"rintf", "nearbyintf", "roundevenf", "roundf"}
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38], np.float32)


def samples(low: float, high: float, seed: int, halves: bool = False) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = random.uniform(low, high, COUNT)
    x[: COUNT // 4] = np.clip(random.normal(0, 1, COUNT // 4), low, high)
    if halves:
        x[-1000:] = np.arange(-500, 500) + 0.5
    return x.astype(np.float32)


def second_operand() -> np.ndarray:
    """The y of binary functions: every special value eight times, then random ones."""
    y = samples(-3, 3, 99)
    y[:64] = np.repeat(SPECIAL, 8)
    return y


def model_of(target: Target) -> tuple[Plan, dict[str, bytes]]:
    lines, calls, inputs, outputs = [], [], [], []
    for name in [*UNARY, *BINARY]:
        pair = name in BINARY
        lines.append(f"float {name}({'float, float' if pair else 'float'});")
        lines.append(
            f"void model_{name}(const float *x, const float *z, float *y)"
            f"{{ for (int i = 0; i < {COUNT}; i++)"
            f" y[i] = {name}(x[i]{', z[i]' if pair else ''}); }}"
        )
        index = len(outputs)
        inputs.append(TensorSpec(f"x_{name}", (COUNT,), "float32"))
        outputs.append(TensorSpec(name, (COUNT,), "float32"))
        places = (Place("input", index=index), Place("weights"), Place("output", index=index))
        calls.append(Call(f"model_{name}", places, name))
    second = second_operand()
    plan = Plan(tuple(inputs), tuple(outputs), tuple(calls), 0, 0, Blob((second.tobytes(),)), ())
    text = "\n".join(lines)
    # Without builtins each call stays a call to the bundle's own function.
    return plan, {"": handmade.compile_c(target, text, flags=("-fno-builtin",))}


@pytest.fixture(scope="module", params=["host", "raspberry-pi-4", "raspberry-pi-3-32", "wasm-simd"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = Target.load(request.param)
    plan, objects = model_of(target)
    path = tmp_path_factory.mktemp("math") / "bundle"
    return handmade.write(path, handmade.source(), plan, objects, handmade.context(target), "model")


def outputs_of(built: Bundle, special: bool = False) -> tuple[dict, dict]:
    inputs = {}
    for seed, (name, (_, low, high, _)) in enumerate({**UNARY, **BINARY}.items()):
        x = samples(low, high, seed, name in HALVES)
        inputs[f"x_{name}"] = np.resize(SPECIAL, COUNT) if special else x
    return inputs, built.run(inputs)


def ulps(got: np.ndarray, exact: np.ndarray) -> float:
    """Largest distance to the float64 reference, in units in the last place of float32."""
    unit = np.spacing(np.maximum(np.abs(exact), np.finfo(np.float32).tiny).astype(np.float32))
    return float((np.abs(got.astype(np.float64) - exact) / unit.astype(np.float64)).max())


def test_error_in_units_in_the_last_place(built: Bundle) -> None:
    inputs, outputs = outputs_of(built)
    second = second_operand().astype(np.float64)[64:]
    errors = {}
    for name, (reference, _, _, limit) in {**UNARY, **BINARY}.items():
        x = inputs[f"x_{name}"].astype(np.float64)[64:]
        exact = reference(x, second) if name in BINARY else reference(x)
        # half a unit more: the reference is not rounded to float32
        error = ulps(outputs[name][64:], exact)
        if error > limit + (0.5 if limit else 0):
            errors[name] = error
    assert not errors


def test_special_values(built: Bundle) -> None:
    _, outputs = outputs_of(built, special=True)
    x, y = np.resize(SPECIAL, 64), second_operand()[:64]
    wrong = []
    for name, (reference, *_) in {**UNARY, **BINARY}.items():
        arguments = (x, y) if name in BINARY else (x,)
        with np.errstate(all="ignore"):
            exact = np.asarray(reference(*(a.astype(np.float64) for a in arguments)))
            exact = exact.astype(np.float32)
        if name in ("fminf", "fmaxf"):  # C ignores one NaN, NumPy returns it
            exact = (np.fmin if name == "fminf" else np.fmax)(x, y)
        got = outputs[name][:64]
        same = np.isclose(got, exact, rtol=1e-5, atol=1e-44, equal_nan=True)
        zeros_differ = np.isnan(exact) | (name in ("fminf", "fmaxf"))
        same &= (np.signbit(got) == np.signbit(exact)) | zeros_differ
        wrong += [(name, *(a[i] for a in arguments), got[i], exact[i]) for i in np.where(~same)[0]]
    assert not wrong


def test_positive_control(built: Bundle) -> None:
    """The error measure notices one unit in the last place too many."""
    x = samples(-5, 5, 1).astype(np.float64)
    exact = np.vectorize(math.erf)(x)
    spoilt = exact.astype(np.float32)
    spoilt[7] = np.nextafter(np.nextafter(spoilt[7], np.float32(2)), np.float32(2))
    assert ulps(exact.astype(np.float32), exact) <= 0.5
    assert ulps(spoilt, exact) > 1.4


def test_nothing_leaks(built: Bundle) -> None:
    """A native model exports its API and needs no library; a wasm module imports nothing."""
    if built.target.kind == "wasm":
        assert IMPORTS not in section_ids(built.file("model.wasm").read_bytes())
        return
    data = built.file("model.so").read_bytes()
    assert dynamic_symbols(data) == {f"model_{name}" for name in API}
    assert DT_NEEDED not in dynamic_tags(data)


API = (
    "version", "weights_bytes", "arena_bytes", "input_count", "output_count",
    "input", "output", "init", "run", "step_count", "step",
)  # fmt: skip


DT_NEEDED = 1
IMPORTS = 2


def sections(data: bytes) -> list[tuple[int, ...]]:
    wide = data[4] == 2
    offset = struct.unpack_from("<Q" if wide else "<I", data, 40 if wide else 32)[0]
    size, count = struct.unpack_from("<HH", data, 58 if wide else 46)
    form = "<IIQQQQIIQQ" if wide else "<10I"
    return [struct.unpack_from(form, data, offset + i * size) for i in range(count)]


def dynamic_symbols(data: bytes) -> set[str]:
    """Names in .dynsym of an ELF file; undefined ones start with '?'."""
    wide = data[4] == 2
    table = sections(data)
    dynsym = next(s for s in table if s[1] == 11)
    strings = table[dynsym[6]]
    step = 24 if wide else 16
    names = set()
    for at in range(dynsym[4] + step, dynsym[4] + dynsym[5], step):
        section = struct.unpack_from("<H", data, at + (6 if wide else 14))[0]
        start = strings[4] + struct.unpack_from("<I", data, at)[0]
        name = data[start : data.index(0, start)].decode()
        names.add(name if section else f"?{name}")
    return names


def dynamic_tags(data: bytes) -> set[int]:
    dynamic = next(s for s in sections(data) if s[1] == 6)
    form = "<qQ" if data[4] == 2 else "<iI"
    part = data[dynamic[4] : dynamic[4] + dynamic[5]]
    return {tag for tag, _ in struct.iter_unpack(form, part)}


def section_ids(module: bytes) -> set[int]:
    """Ids of the sections of a WebAssembly module (core specification, 5.5.2)."""
    at, ids = 8, set()
    while at < len(module):
        ids.add(module[at])
        size, shift, at = 0, 0, at + 1
        while True:
            byte = module[at]
            size, shift, at = size | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                break
        at += size
    return ids


def test_all_runners_of_wasm_agree(tmp_path: Path) -> None:
    target = Target.load("wasm-simd")
    plan, objects = model_of(target)
    made = handmade.write(
        tmp_path / "b", handmade.source(), plan, objects, handmade.context(target), "model"
    )
    inputs, _ = outputs_of(made)
    first, second = (runners.run(made, inputs, name) for name in ("node", "wasmtime"))
    for name in first:
        assert np.array_equal(first[name], second[name], equal_nan=True), name


DOUBLES: dict[str, Reference] = {
    "exp": np.exp, "log": np.log, "log2": np.log2, "log10": np.log10, "log1p": np.log1p,
    "expm1": np.expm1, "exp2": np.exp2, "sin": np.sin, "cos": np.cos, "tan": np.tan,
    "asin": lambda x: np.arcsin(x / 8), "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh,
    "tanh": np.tanh, "asinh": np.arcsinh, "sqrt": np.sqrt, "cbrt": np.cbrt,
    "erf": np.vectorize(math.erf), "erfc": np.vectorize(math.erfc), "rint": np.rint,
    "floor": np.floor,
}  # fmt: skip


_LOOP = "for (int i = 0; i < 65536; i++)"
_HALF = f"""void model_half(_Float16 *x, float *y, _Float16 *z) {{
    {_LOOP} {{ y[i] = x[i]; z[i] = (_Float16)(y[i] * 1.0007f); }}
}}"""
# clang has no _Float16 for wasm; LLVM emits these calls for the half type there.
_HALF_BY_NAME = f"""float __extendhfsf2(unsigned short); unsigned short __truncsfhf2(float);
void model_half(unsigned short *x, float *y, unsigned short *z) {{
    {_LOOP} {{ y[i] = __extendhfsf2(x[i]); z[i] = __truncsfhf2(y[i] * 1.0007f); }}
}}"""


@pytest.mark.parametrize("name", ["host", "raspberry-pi-3-32", "wasm-simd"])
def test_double_and_half_precision(name: str, tmp_path: Path) -> None:
    """float64 functions to 1e-13; float16 to float32 and back exactly, rounded half to even."""
    target = Target.load(name)
    lines, calls, outputs = [], [], []
    for index, function in enumerate(DOUBLES):
        lines.append(
            f"double {function}(double); void model_{function}(double *x, double *y)"
            f"{{ for (int i = 0; i < 512; i++)"
            f" y[i] = {function}({'x[i] / 8' if function == 'asin' else 'x[i]'}); }}"
        )
        outputs.append(TensorSpec(function, (512,), "float64"))
        places = (Place("input"), Place("output", index=index))
        calls.append(Call(f"model_{function}", places, function))
    lines.append(_HALF_BY_NAME if target.kind == "wasm" else _HALF)
    outputs += [TensorSpec("wide", (65536,), "float32"), TensorSpec("half", (65536,), "float16")]
    places = (
        Place("input", index=1), Place("output", index=len(DOUBLES)),
        Place("output", index=len(DOUBLES) + 1),
    )  # fmt: skip
    calls.append(Call("model_half", places, "half"))
    specs = (TensorSpec("x", (512,), "float64"), TensorSpec("h", (65536,), "float16"))
    plan = Plan(specs, tuple(outputs), tuple(calls), 0, 0, Blob(), ())
    kernels = {"": handmade.compile_c(target, "\n".join(lines), flags=("-fno-builtin",))}
    made = handmade.write(
        tmp_path / "b", handmade.source(), plan, kernels, handmade.context(target), "model"
    )
    x = np.random.default_rng(1).uniform(0.01, 7.9, 512)
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    got = made.run({"x": x, "h": halves})
    for function, reference in DOUBLES.items():
        assert np.allclose(got[function], reference(x), rtol=1e-13, atol=1e-300), function
    wide = halves.astype(np.float32)
    assert np.array_equal(got["wide"], wide, equal_nan=True)
    with np.errstate(all="ignore"):
        narrow = (wide * np.float32(1.0007)).astype(np.float16)
    assert np.array_equal(got["half"], narrow, equal_nan=True)


@pytest.mark.needs_wasmtime
def test_sums_of_codes(tmp_path: Path) -> None:
    """What integer kernels share in WebAssembly, beside NumPy: whole registers and what is left."""
    import wasmtime

    target, name = Target.load("wasm-relaxed"), "edgepipe_add_codes"
    (tmp_path / "libmath.a").write_bytes(link.math_library(target))
    link.zig("wasm-ld", "--no-entry", f"--export={name}", f"--undefined={name}",
             "--export=__heap_base", "-o", "sums.wasm", "libmath.a", cwd=tmp_path)  # fmt: skip
    store = wasmtime.Store()
    module = wasmtime.Module.from_file(store.engine, str(tmp_path / "sums.wasm"))
    exports = wasmtime.Instance(store, module, []).exports(store)
    memory, base = exports["memory"], 1 << 17
    memory.grow(store, 8)
    draw = np.random.default_rng(3)
    codes = draw.integers(-128, 128, 4096, np.int8)
    memory.write(store, codes.tobytes(), base)

    def sums(pixels: int, stride: int, count: int, more: int) -> np.ndarray:
        exports[name](store, base, base + 8192, pixels, stride, count, -64, more)
        return np.frombuffer(memory.read(store, base + 8192, base + 8192 + 4 * pixels), np.int32)

    for pixels, stride, count in [
        (1, 4, 4),
        (7, 12, 12),
        (5, 24, 24),
        (3, 40, 36),
        (2, 1280, 1280),
    ]:
        rows = [codes[i * stride : i * stride + count].astype(np.int64) for i in range(pixels)]
        exact = -64 * np.array([row.sum() for row in rows])
        assert np.array_equal(sums(pixels, stride, count, 0), exact)
        assert np.array_equal(sums(pixels, stride, count, 1), 2 * exact)
        memory.write(store, bytes([int(codes[count - 1]) + 1 & 255]), base + count - 1)
        assert not np.array_equal(sums(pixels, stride, count, 0), exact)
        memory.write(store, codes.tobytes(), base)
