"""The pool of a bundle with threads: results, errors, and no race that ThreadSanitizer sees."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import handmade
import pytest

from edgepipe.codegen import driver
from edgepipe.codegen.plan import Plan

#: The first kernel in parts, the second one reads what another part wrote.
KERNELS = """
#include <stdint.h>
void model_scale_bias(float *x, float *w, float *t, int32_t part, int32_t parts) {
    for (int i = 1000 * part / parts; i < 1000 * (part + 1) / parts; i++)
        t[i] = x[i] * w[i] + w[1000 + i];
}
void model_relu(float *t, float *y, int32_t part, int32_t parts) {
    for (int i = 1000 * part / parts; i < 1000 * (part + 1) / parts; i++) {
        int k = (i + 500) % 1000;
        y[k] = t[k] > 0 ? t[k] : 0;
    }
}
void model_double(long long *n, long long *m) { *m = *n * 2; }
"""

PROGRAM = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "model.h"
#include "pool.h"
static char w[16384] __attribute__((aligned(64))), a[8192] __attribute__((aligned(64)));
static float x[1024] __attribute__((aligned(64)));
static float y[1024] __attribute__((aligned(64))), z[1024] __attribute__((aligned(64)));
static long long n __attribute__((aligned(64))) = 21, m __attribute__((aligned(64)));
int main(void) {
    FILE *file = fopen("weights.bin", "rb");
    if (!file || fread(w, 1, model_weights_bytes(), file) != model_weights_bytes()) return 9;
    const void *in[] = {x, &n};
    void *out[] = {y, &m}, *reference[] = {z, &m};
    if (model_pool_create(-1) || model_pool_create(MODEL_MOST_THREADS + 1)) return 8;
    for (int threads = 1; threads <= MODEL_MOST_THREADS; threads++) {
        model_pool *pool = model_pool_create(threads);
        if (!pool || model_pool_threads(pool) != threads) return 7;
        if (threads == 1 &&
            model_pool_run(pool, in, out, a) != MODEL_ERROR_NOT_INITIALIZED) return 6;
        if (threads == 1 && model_init(w, model_weights_bytes()) != MODEL_OK) return 5;
        for (int round = 0; round < 40; round++) {
            for (int i = 0; i < 1000; i++) x[i] = (float)(i * 7 % 100 - 50 + round);
            if (model_run(in, reference, a) != MODEL_OK) return 4;
            memset(a, 0x55, sizeof a);
            memset(y, 0x55, sizeof y);
            if (round % 10 == 9) usleep(2000); /* until they sleep */
            if (model_pool_run(pool, in, out, a) != MODEL_OK || m != 42) return 3;
            if (memcmp(y, z, 4000)) return 2;
            if (model_pool_run(pool, in, out, a + 1) != MODEL_ERROR_ALIGNMENT) return 1;
        }
        model_pool_destroy(pool);
    }
    model_pool *all = model_pool_create(0);
    if (!all || model_pool_threads(all) < 1) return 10;
    model_pool_destroy(all);
    model_pool_destroy(NULL);
    puts("right");
    return 0;
}
"""


#: How the program ends where results differ, and where ThreadSanitizer has something to say.
WRONG, RACE = 2, 66


def threaded(threads: int, shared: tuple[int, ...] = (8, 8, 1)) -> Plan:
    plan = handmade.plan()
    calls = (dataclasses.replace(c, pieces=p) for c, p in zip(plan.calls, shared, strict=True))
    return dataclasses.replace(plan, calls=tuple(calls), threads=threads)


def build(folder: Path, sanitizer: str, meets: str = "meets[] = {1") -> Path:
    """The program, all of it compiled by the system's compiler; ``meets`` begins the driver's table
    of where threads wait."""
    plan = threaded(6)
    sources = {**driver.render(plan, "model"), **driver.native_files(plan, "model")}
    assert "meets[] = {1" in sources["driver.c"]
    sources["driver.c"] = sources["driver.c"].replace("meets[] = {1", meets)
    for name in ("model.h", "driver.c", *driver.POOL):
        (folder / name).write_text(sources[name])
    (folder / "weights.bin").write_bytes(bytes(driver.weights_file(plan)))
    (folder / "kernels.c").write_text(KERNELS)
    (folder / "main.c").write_text(PROGRAM)
    files = ["main.c", "pool.c", "driver.c", "kernels.c"]
    subprocess.run(["gcc", "-O1", "-g", f"-fsanitize={sanitizer}", *files, "-o", "program",
                    "-lpthread"], cwd=folder, check=True, capture_output=True)  # fmt: skip
    return folder / "program"


def run(program: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program)], cwd=program.parent, capture_output=True, text=True,
                          check=False, timeout=300)  # fmt: skip


needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


@pytest.mark.may_skip
@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_pools_of_every_size_without_a_race(sanitizer: str, tmp_path: Path) -> None:
    done = run(build(tmp_path, sanitizer))
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr[-2000:]


@pytest.mark.may_skip
@needs_gcc
@pytest.mark.slow
def test_threads_that_do_not_wait_are_seen(tmp_path: Path) -> None:
    """Positive control: the second kernel begins before the first one has ended everywhere."""
    done = run(build(tmp_path, "thread", "meets[] = {0"))
    assert done.returncode in (WRONG, RACE), done.stderr[-2000:]


def test_threads_meet_around_what_they_share() -> None:
    for shared, meets in (((8, 8, 1), "1, 1, 0"), ((1, 8, 1), "1, 1, 0"), ((1, 1, 1), "0, 0, 0")):
        text = driver.render(threaded(2, shared), "model")["driver.c"]
        assert f"meets[] = {{{meets}}};" in text
        assert ("if (part == 0) model_scale_bias" in text) == (shared[0] == 1)


def test_a_bundle_of_one_thread_has_no_trace_of_them() -> None:
    plan = handmade.plan()
    files = {**driver.render(plan, "model"), **driver.native_files(plan, "model")}
    assert not set(driver.POOL) & files.keys()
    assert "part" not in files["driver.c"]
    assert "_run_part" not in files["model.h"]
