"""The generated C: names, sizes, errors, two models in one program."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import handmade
import pytest

from edgepipe.codegen import driver, link, loader
from edgepipe.codegen.plan import Call, Place, TensorSpec
from edgepipe.errors import EdgepipeError, UserError
from edgepipe.target import Target

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wno-unused-function")


def build(folder: Path, *arguments: str) -> Path:
    """Compile and link a C program with zig for this machine."""
    link.zig("cc", "-target", "x86_64-linux-musl", *arguments, "-o", "program", cwd=folder)
    return folder / "program"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *arguments], cwd=program.parent, capture_output=True, text=True, check=False
    )


def library(folder: Path, prefix: str, seed: int = 7) -> None:
    """Leave PREFIX.a, PREFIX.h and PREFIX.bin in ``folder``."""
    host = Target.load("host")
    plan = handmade.plan(prefix, seed)
    sources = {**driver.render(plan, prefix), **driver.native_files(plan, prefix)}
    made = link.native(host, sources, handmade.objects(host, prefix)[""], prefix)
    (folder / f"{prefix}.a").write_bytes(made["model.a"])
    (folder / f"{prefix}.h").write_text(sources["model.h"])
    (folder / f"{prefix}.bin").write_bytes(bytes(driver.weights_file(plan)))


TWO_MODELS = """
#include <stdio.h>
#include <stdlib.h>
#include <math.h>
#include "first.h"
#include "second.h"
static char a[2][16384] __attribute__((aligned(64))), w[2][16384] __attribute__((aligned(64)));
static float x[1024] __attribute__((aligned(64))), y[2][1024] __attribute__((aligned(64)));
#define RUN(p, x, y, a) p##_run((const void *[]){x, &n}, (void *[]){y, &m}, a)
static long long n __attribute__((aligned(64))) = 21, m __attribute__((aligned(64)));
static void load(const char *name, void *to, size_t bytes) {
    FILE *file = fopen(name, "rb");
    if (!file || fread(to, 1, bytes, file) != bytes) exit(9);
    fclose(file);
}
int main(void) {
    for (int i = 0; i < 1000; i++) x[i] = 1;
    load("first.bin", w[0], first_weights_bytes());
    load("second.bin", w[1], second_weights_bytes());
    if (RUN(first, x, y[0], a[0]) != FIRST_ERROR_NOT_INITIALIZED)
        return 1;
    if (first_init(w[1], first_weights_bytes()) != FIRST_ERROR_WRONG_WEIGHTS) return 2;
    if (first_init(w[0], first_weights_bytes() - 1) != FIRST_ERROR_SIZE) return 3;
    if (first_init(w[0] + 1, first_weights_bytes()) != FIRST_ERROR_ALIGNMENT) return 4;
    if (first_init(0, 0) != FIRST_ERROR_ALIGNMENT) return 5;
    if (first_init(w[0], first_weights_bytes()) || second_init(w[1], second_weights_bytes()))
        return 6;
    if (RUN(first, x, y[0], a[0] + 4) != FIRST_ERROR_ALIGNMENT)
        return 7;
    if (RUN(first, x + 1, y[0], a[0]) !=
        FIRST_ERROR_ALIGNMENT) return 8;
    if (RUN(first, x, y[0], a[0])) return 10;
    if (RUN(second, x, y[1], a[1])) return 11;
    if (m != 42 || expf((float)y[0][0]) < 0) return 12;
    const first_tensor *t = first_input(0);
    printf("%s|%s|%d|%lld|%zu|%.6f|%.6f|%s", t->name, t->dtype, t->rank, (long long)t->dims[1],
           t->bytes, y[0][5], y[1][5], first_version());
    return first_input(2) || first_output(2) || first_input_count() != 2 ? 13 : 0;
}
"""


@pytest.mark.slow
def test_two_models_link_into_one_program(tmp_path: Path) -> None:
    library(tmp_path, "first", seed=7)
    library(tmp_path, "second", seed=8)
    (tmp_path / "main.c").write_text(TWO_MODELS)
    done = run(build(tmp_path, *STRICT, "main.c", "first.a", "second.a"))
    assert done.returncode == 0, done.stdout
    name, dtype, rank, extent, size, first, second, version = done.stdout.split("|")
    assert (name, dtype, rank) == (handmade.NAMES[0], "float32", "2")
    assert (extent, size) == ("1000", "4000")
    ones = {handmade.NAMES[0]: handmade.np.ones((1, 1000)), handmade.NAMES[1]: 21}
    assert float(first) == pytest.approx(handmade.expected(ones, 7)["y"][0, 5], abs=1e-5)
    assert float(second) == pytest.approx(handmade.expected(ones, 8)["y"][0, 5], abs=1e-5)
    assert version == "first"


@pytest.mark.parametrize("compiler", ["gcc", "g++"])
def test_header_and_driver_compile_cleanly(tmp_path: Path, compiler: str) -> None:
    """Strict C99 and C++, in the machine's own compiler where there is one, else in zig's."""
    for name, text in driver.render(handmade.plan(), "model").items():
        (tmp_path / name).write_text(text)
    (tmp_path / "user.c").write_text('#include "model.h"\n#include "model.h"\nint user;\n')
    own = [compiler] if shutil.which(compiler) else [str(link.zig_program()), "cc"]
    standard = "-std=c++11" if compiler == "g++" else "-std=c99"
    language = "c++" if compiler == "g++" else "c"
    for file in ["user.c"] + ([] if compiler == "g++" else ["driver.c"]):
        words = [*own, "-x", language, standard, *STRICT[1:-1], "-Wno-type-limits", "-c", file]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_example_builds_and_runs(tmp_path: Path) -> None:
    host, plan = Target.load("host"), handmade.plan("net")
    sources = {**driver.render(plan, "net"), **driver.native_files(plan, "net")}
    made = link.native(host, sources, handmade.objects(host, "net")[""], "net")
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "weights.bin").write_bytes(bytes(driver.weights_file(plan)))
    program = build(tmp_path, *STRICT, "example.c", "model.a")
    done = run(program)
    assert done.returncode == 0
    assert done.stdout.startswith("y (float32): ")
    (tmp_path / "weights.bin").write_bytes(b"\0" * 9000)
    assert run(program).returncode == 2


def test_model_names_never_become_code(tmp_path: Path) -> None:
    hostile = '"); system("x"); //??/\n*/ \\ %s é\x01' + "7"
    plan = dataclasses.replace(
        handmade.plan(),
        inputs=(TensorSpec(hostile, (1, 1000), "float32"), handmade.plan().inputs[1]),
    )
    text = driver.render(plan, "model", version='1"\\')["driver.c"]
    (tmp_path / "driver.c").write_text(text)
    (tmp_path / "model.h").write_text(driver.render(plan, "model")["model.h"])
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#include "model.h"\n'
        "void model_scale_bias(void *a, void *b, void *c) {(void)a; (void)b; (void)c;}\n"
        "void model_relu(void *a, void *b) {(void)a; (void)b;}\n"
        "void model_double(void *a, void *b) {(void)a; (void)b;}\n"
        "int main(void) { fputs(model_input(0)->name, stdout); fputs(model_version(), stdout); }\n"
    )
    done = subprocess.run(
        [build(tmp_path, "-std=c99", "main.c", "driver.c")], capture_output=True, check=True
    )
    assert done.stdout.decode() == hostile + '1"\\'
    scripts = loader.files(plan, "model", [])
    assert hostile not in scripts["model.mjs"]


@pytest.mark.parametrize("prefix", ["", "9a", "a-b", "a b", "é", "_x", "a" * 65, "a;b"])
def test_bad_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(UserError, match="--prefix"):
        driver.render(handmade.plan(), prefix)


def test_no_inputs_scalar_and_empty_tensors(tmp_path: Path) -> None:
    plan = dataclasses.replace(
        handmade.plan(),
        inputs=(),
        outputs=(TensorSpec("empty", (0, 3), "float32"), TensorSpec("scalar", (), "bool")),
        calls=(),
    )
    for name, text in driver.render(plan, "model").items():
        (tmp_path / name).write_text(text)
    (tmp_path / "main.c").write_text(
        '#include "model.h"\nint main(void) { const model_tensor *e = model_output(0);\n'
        "return model_input_count() || model_input(0) || e->bytes || e->rank != 2 || e->dims[0] ||"
        " model_output(1)->bytes != 1 || model_output(1)->rank; }\n"
    )
    assert run(build(tmp_path, "-std=c99", "main.c", "driver.c")).returncode == 0


def test_other_calls_make_other_weights(tmp_path: Path) -> None:
    """The same blob read by another program must not be accepted."""
    plan = handmade.plan()
    moved = dataclasses.replace(
        plan, calls=(Call("model_relu", (Place("arena", 128), Place("output")), "r"), *plan.calls)
    )
    assert bytes(driver.weights_file(plan))[:64] != bytes(driver.weights_file(moved))[:64]
    assert bytes(driver.weights_file(plan))[64:] == bytes(plan.weights)


def test_missing_function_is_named() -> None:
    host = Target.load("host")
    kernels = handmade.compile_c(
        host, "void launch_rocket(void); void model_k(void) { launch_rocket(); }"
    )
    plan = dataclasses.replace(handmade.plan(), calls=(Call("model_k", (), "k"),))
    sources = {**driver.render(plan, "model"), **driver.native_files(plan, "model")}
    with pytest.raises(EdgepipeError, match="launch_rocket"):
        link.native(host, sources, kernels, "model")
    wasm = Target.load("wasm-simd")
    kernels = handmade.compile_c(
        wasm, "void launch_rocket(void); void model_k(void) { launch_rocket(); }"
    )
    with pytest.raises(EdgepipeError, match="launch_rocket"):
        link.wasm(wasm, driver.render(plan, "model"), {"": kernels}, "model")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["host", "raspberry-pi-3-32", "wasm-relaxed"])
def test_linking_twice_gives_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the second one has to build the runtime library again."""
    target, plan = Target.load(name), handmade.plan()
    objects = handmade.objects(target)
    sources = driver.render(plan, "model")

    def make() -> dict[str, bytes]:
        if target.kind == "wasm":
            return link.wasm(target, sources, objects, "model")
        both = {**sources, **driver.native_files(plan, "model")}
        return link.native(target, both, objects[""], "model")

    first = make()
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(Path.home() / ".cache" / "zig"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert first == make()
    for data in first.values():
        assert str(Path.home()).encode() not in data
        assert b"edgepipe-link-" not in data


@pytest.mark.slow
def test_math_library_cache_heals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(Path.home() / ".cache" / "zig"))
    target = Target.load("wasm-simd")
    assert link.math_library(target).startswith(b"!<arch>")
    (kept,) = link.cache_folder().glob("*.a")
    kept.write_bytes(kept.read_bytes()[:100])
    again = link.math_library(target)
    assert len(again) > 10_000
    assert again in [path.read_bytes() for path in link.cache_folder().glob("*.a")]
    assert link.math_library(target) == again
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(link.math_library(target)) == len(again)  # no cache, no error


def fake_zig(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "zig"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(link, "zig_program", lambda: program)


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("echo 'ld.lld: error: bad input' >&2; exit 1", EdgepipeError, "bad input"),
        ("echo 'x: No space left on device' >&2; exit 1", UserError, "disk is full"),
        ("echo 'error: unable to open global cache directory \"x\": ReadOnly' >&2; exit 1",
         UserError, "ZIG_GLOBAL_CACHE_DIR"),
        ("exit 7", EdgepipeError, r"failed \(7\): no message"),
    ],
)  # fmt: skip
def test_what_zig_says_becomes_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, kind: type, message: str
) -> None:
    fake_zig(tmp_path, script, monkeypatch)
    with pytest.raises(kind, match=message) as raised:
        link.zig("cc", cwd=tmp_path)
    assert raised.type is kind
    assert "\n" not in str(raised.value)


def test_zig_that_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "zig_program", lambda: tmp_path / "zig")
    with pytest.raises(UserError, match="pip install"):
        link.zig("cc", cwd=tmp_path)


def test_threads_with_their_own_arenas(tmp_path: Path) -> None:
    host, plan = Target.load("host"), handmade.plan("net")
    sources = {**driver.render(plan, "net"), **driver.native_files(plan, "net")}
    made = link.native(host, sources, handmade.objects(host, "net")[""], "net")
    (tmp_path / "model.a").write_bytes(made["model.a"])
    (tmp_path / "model.h").write_text(sources["model.h"])
    (tmp_path / "weights.bin").write_bytes(bytes(driver.weights_file(plan)))
    (tmp_path / "main.c").write_text(THREADS)
    assert run(build(tmp_path, "-O1", "-pthread", "main.c", "model.a")).returncode == 0


THREADS = """
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include "model.h"
static char weights[16384] __attribute__((aligned(64)));
static float wanted[2][1024] __attribute__((aligned(64)));
static float x[2][1024] __attribute__((aligned(64)));
static int infer(int which, float *y, void *arena) {
    long long n __attribute__((aligned(64))) = which, m __attribute__((aligned(64)));
    return net_run((const void *[]){x[which], &n}, (void *[]){y, &m}, arena) || m != 2 * which;
}
static void *work(void *argument) {
    char arena[8192] __attribute__((aligned(64)));
    float y[1024] __attribute__((aligned(64)));
    int which = argument != NULL;
    for (int i = 0; i < 20000; i++)
        if (infer(which, y, arena) || memcmp(y, wanted[which], 4000)) return (void *)1;
    return NULL;
}
int main(void) {
    FILE *file = fopen("weights.bin", "rb");
    if (fread(weights, 1, sizeof weights, file) != net_weights_bytes()) return 1;
    if (net_init(weights, net_weights_bytes())) return 2;
    for (int i = 0; i < 1000; i++) x[0][i] = i, x[1][i] = -i;
    char arena[8192] __attribute__((aligned(64)));
    if (infer(0, wanted[0], arena) || infer(1, wanted[1], arena)) return 3;
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, work, i % 2 ? x : NULL);
    for (int i = 0; i < 4; i++) {
        void *bad;
        pthread_join(threads[i], &bad);
        if (bad) return 4;
    }
    return 0;
}
"""
