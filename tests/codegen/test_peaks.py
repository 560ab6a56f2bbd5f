"""Peak kernels do exactly the multiplications they are counted for, on every kind of core."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from edgepipe.codegen import link, peaks
from edgepipe.codegen.plan import Peaks
from edgepipe.runners import qemu
from edgepipe.target import Target

MAIN = """
#include <stdio.h>
#include <string.h>
static char x[1 << 20] __attribute__((aligned(64))), w[1 << 20] __attribute__((aligned(64))),
    y[1 << 20] __attribute__((aligned(64)));
static void fill(char *to, int floats, int value) {
    for (int i = 0; i < 1 << 18; i++)
        if (floats) ((float *)to)[i] = (float)value;
        else memset(to + 4 * i, value, 4);
}
static void sum(const char *name, void (*run)(void *, void *, void *), int floats, int value) {
    double total = 0;
    fill(x, floats, 1), fill(w, floats, value), memset(y, 0, sizeof y);
    run(x, w, y);
    for (int i = 0; i < 1 << 18; i++) total += floats ? ((float *)y)[i] : ((int *)y)[i];
    printf("%s %.0f\\n", name, total);
}
PROTOTYPES
void net_peak_bytes(void *, void *, void *);
int main(void) {
    CALLS
    for (int i = 0; i < 1 << 20; i++) x[i] = (char)(i * 7 + 1), y[i] = 0;
    net_peak_bytes(x, w, y);
    for (int i = 0; i < 1 << 20; i++)
        if (y[i] != (i < COPIED ? x[i] : 0)) return 1;
    return 0;
}
"""


def program(built: Peaks, target: Target, folder: Path, value: int) -> Path:
    kernels = built.kernels[""]
    prototypes = "\n".join(f"void {k.symbol}(void *, void *, void *);" for k in kernels)
    calls = "\n".join(
        f'sum("{k.symbol}", {k.symbol}, {int(k.of == "float32")}, {value});' for k in kernels
    )
    text = MAIN.replace("PROTOTYPES", prototypes).replace("CALLS", calls)
    (folder / "main.c").write_text(text.replace("COPIED", str(built.copy_bytes // 2)))
    (folder / "peaks.o").write_bytes(built.objects[""])
    link.zig("cc", "-target", target.link.static_zig_target, "-static", "-O1",
             "-fno-sanitize=all", "main.c", "peaks.o", "-o", "main", cwd=folder)  # fmt: skip
    return folder / "main"


@pytest.mark.needs_qemu
@pytest.mark.parametrize("name", ["host", "x86-64-v3", "raspberry-pi-5", "raspberry-pi-4",
                                  "raspberry-pi-3-32"])  # fmt: skip
@pytest.mark.parametrize("value", [1, 3])
def test_work_is_what_is_counted(name: str, value: int, tmp_path: Path) -> None:
    target = Target.load(name)
    built = peaks.build(target, "net")
    launcher = [] if target.arch == "x86_64" else qemu.command(target)
    done = subprocess.run([*launcher, str(program(built, target, tmp_path, value))],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, "the copy does not copy"
    sums = dict(line.split() for line in done.stdout.splitlines())
    assert {k.of for k in built.kernels[""]} == {"float32", "int8"}
    for kernel in built.kernels[""]:
        assert int(sums[kernel.symbol]) == kernel.work // 2 * value, kernel


@pytest.mark.needs_wasmtime
@pytest.mark.parametrize("variant", ["", "relaxed"])
def test_work_in_webassembly(variant: str, tmp_path: Path) -> None:
    import numpy as np
    import wasmtime

    target = Target.load("wasm-relaxed")
    built = peaks.build(target, "net")
    (tmp_path / "peaks.o").write_bytes(built.objects[variant])
    link.zig("wasm-ld", "--no-entry", "--export-all", "-o", "peaks.wasm", "peaks.o", cwd=tmp_path)
    config = wasmtime.Config()
    config.wasm_relaxed_simd = True
    store = wasmtime.Store(wasmtime.Engine(config))
    module = wasmtime.Module.from_file(store.engine, str(tmp_path / "peaks.wasm"))
    exports = wasmtime.Instance(store, module, []).exports(store)
    memory, base = exports["memory"], 1 << 17
    memory.grow(store, 8)
    for kernel in built.kernels[variant]:
        dtype = "float32" if kernel.of == "float32" else "int8"
        ones = np.ones(1 << 16, np.uint8).view(np.int8).astype(dtype).tobytes()[: 1 << 16]
        for i in range(2):
            memory.write(store, ones, base + (i << 16))
        memory.write(store, bytes(1 << 16), base + (2 << 16))
        exports[kernel.symbol](store, base, base + (1 << 16), base + (2 << 16))
        sums = "float32" if kernel.of == "float32" else "int32"
        result = np.frombuffer(memory.read(store, base + (2 << 16), base + (3 << 16)), sums)
        assert result.astype(np.float64).sum() == kernel.work // 2, kernel
