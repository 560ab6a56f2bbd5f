"""Kernels, driver and programs of a bundle under AddressSanitizer and UndefinedBehaviorSanitizer.

``python -m tests.codegen.sanitizers [MODEL …] [--recipes fp32,w8a8,…]`` builds for x86-64-v3, runs
the golden inputs step by step and the bench program, and prints what was found.

The kernels are instrumented as LLVM IR by zig's clang, the C files compiled by gcc, whose runtime
both report to. Inputs, outputs, weights and arena have exactly their sizes, and before every step
all of the arena is poisoned but the tensors that the memory plan says are alive: a kernel that
reads or writes anything else is a finding. Integer kernels may read on behind a tensor, up to a
vector, and ignore what they read (the arena ends that much later); bytes there show whether they
write. Shorter outputs and arena tensors are positive controls.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe import codegen, golden, importer, lowering, passes, prune, quantize
from edgepipe.codegen import driver, link, peaks, primfunc
from edgepipe.codegen.plan import ALIGNMENT, Plan
from edgepipe.context import Context
from edgepipe.recipe import Recipe
from edgepipe.target import Target

TARGET = "x86-64-v3"
RECIPES = ("fp32", "w8a8", "fp32+80%", "w8a8+80%b1x4")
_GCC = ("gcc", "-std=gnu11", "-O1", "-g", "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")  # fmt: skip

_MAIN = r"""
#include <sanitizer/asan_interface.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "model.h"
static const size_t arena_tensors[][4] = {@arena@ {0, 0, 0, 0}};
static void *take(size_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, bytes ? bytes : 1)) abort();
    return memory;
}
static void read_all(FILE *file, void *to, size_t bytes) {
    if (fread(to, 1, bytes, file) != bytes) abort();
}
static int alive(size_t i, size_t step) {
    return arena_tensors[i][2] <= step && step <= arena_tensors[i][3];
}
/* Bytes between the end of a tensor and the next aligned address, which nothing else has. */
static size_t padding(size_t bytes) { return @read_on@ ? (64 - bytes % 64) % 64 : 0; }
int main(int argc, char **argv) {
    size_t short_output = argc > 4 ? strtoul(argv[4], 0, 10) : 0;
    size_t short_arena = argc > 5 ? strtoul(argv[5], 0, 10) : 0;
    void *inputs[@slots@], *outputs[@slots@];
    FILE *file = fopen(argv[1], "rb");
    void *weights = take(model_weights_bytes());
    read_all(file, weights, model_weights_bytes());
    fclose(file);
    if (model_init(weights, model_weights_bytes())) return 3;
    file = fopen(argv[2], "rb");
    for (size_t i = 0; i < model_input_count(); i++) {
        inputs[i] = take(model_input(i)->bytes);
        read_all(file, inputs[i], model_input(i)->bytes);
    }
    fclose(file);
    for (size_t i = 0; i < model_output_count(); i++)
        outputs[i] = take(model_output(i)->bytes - short_output);
    unsigned char *arena = take(model_arena_bytes());
    for (size_t step = 0; step < model_step_count(); step++) {
        ASAN_POISON_MEMORY_REGION(arena, model_arena_bytes());
        for (size_t i = 0; arena_tensors[i][1]; i++)
            if (alive(i, step)) {
                const size_t *t = arena_tensors[i];
                ASAN_UNPOISON_MEMORY_REGION(arena + t[0], t[1] - short_arena + @read_on@);
                memset(arena + t[0] + t[1], 0xA5, padding(t[1]));
            }
        int status = model_step(step, (const void *const *)inputs, outputs, arena);
        if (status) return 4;
        for (size_t i = 0; arena_tensors[i][1]; i++)
            for (size_t k = 0; alive(i, step) && k < padding(arena_tensors[i][1]); k++)
                if (arena[arena_tensors[i][0] + arena_tensors[i][1] + k] != 0xA5) {
                    fprintf(stderr, "step %zu writes behind a tensor\n", step);
                    return 5;
                }
    }
    file = fopen(argv[3], "wb");
    for (size_t i = 0; i < model_output_count(); i++)
        fwrite(outputs[i], 1, model_output(i)->bytes - short_output, file);
    fclose(file);
    for (size_t i = 0; i < model_input_count(); i++) free(inputs[i]);
    for (size_t i = 0; i < model_output_count(); i++) free(outputs[i]);
    free(arena);
    free(weights);
    return 0;
}
"""


@dataclass(frozen=True)
class Sanitized:
    """Programs built with sanitizers in ``folder``, and what the model answers."""

    folder: Path
    plan: Plan
    outputs: Mapping[str, Any]
    instrumented: int

    def run(self, *, short_output: int = 0, short_arena: int = 0) -> str:
        """Step through the golden inputs; what the sanitizers say, "" for nothing. Without
        findings the outputs must be near the reference's."""
        words = ["weights.bin", "in.bin", "out.bin", str(short_output), str(short_arena)]
        done = self._program("main", *words)
        if done or short_output:
            return done
        data, at = (self.folder / "out.bin").read_bytes(), 0
        for spec in self.plan.outputs:
            got = np.frombuffer(data, spec.dtype, math.prod(spec.shape), at).astype(np.float64)
            at += math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
            wanted = np.asarray(self.outputs[spec.name], np.float64).reshape(-1)
            error = np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-30)
            assert error < 0.05, f"{spec.name} is wrong: relative error {error}"
        return ""

    def bench(self) -> str:
        """What the sanitizers say of the bundle's bench program in each of its ways."""
        return (
            self._program("bench", "run", "in.bin", "out.bin", "1")
            + self._program("bench", "--runs", "2", "--warmup", "1", "--json")
            + self._program("bench", "profile", "1")
            + self._program("bench", "repeat", "2")
        )

    def _program(self, name: str, *words: str) -> str:
        # The programs keep their buffers until they end.
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        done = subprocess.run([str(self.folder / name), *words], cwd=self.folder, check=False,
                              env=environment, capture_output=True, text=True,
                              errors="replace")  # fmt: skip
        return "" if done.returncode == 0 else f"{name}: {done.returncode} {done.stderr[:3000]}"


def build(model: str | Path, recipe: str, folder: Path) -> Sanitized:
    """Compile ``model`` for x86-64-v3 with instrumented kernels into ``folder``."""
    source, target = importer.load(model), Target.load(TARGET)
    context = Context(target, quantize.recipe_of(source, Recipe.parse(recipe), None))
    graph = passes.run(source.model, context)
    graph, pruned = prune.run(graph, source, None, context)
    graph, quantized = quantize.run(graph, source, None, context)
    listing: list[str] = []
    plain = primfunc.build_module

    def listed(*arguments: Any) -> Any:
        library, workspaces = plain(*arguments)
        listing.append(library.inspect_source("ll"))
        return library, workspaces

    primfunc.build_module = listed
    try:
        plan, _ = codegen.generate(lowering.lower(graph, context), context, "model")
        measured = peaks.build(target, "model")
    finally:
        primfunc.build_module = plain
    changed = quantized or pruned
    reference = source.reference if changed is None else changed.reference
    ranges = {} if quantized is None else quantized.input_ranges
    inputs, outputs, _ = golden.golden(
        reference, plan.inputs, [t.name for t in plan.outputs], ranges
    )
    texts = driver.render(plan, "model") | driver.native_files(plan, "model", measured)
    (folder / "weights.bin").write_bytes(bytes(driver.weights_file(plan)))
    (folder / "in.bin").write_bytes(b"".join(inputs[t.name].tobytes() for t in plan.inputs))
    (folder / "libmath.a").write_bytes(link.math_library(target))
    (folder / "peaks.o").write_bytes(measured.objects[""])
    count = _link(folder, plan, listing[0], texts)
    return Sanitized(folder, plan, outputs, count)


def _link(folder: Path, plan: Plan, kernels: str, texts: Mapping[str, str]) -> int:
    arena = "".join(f"{{{t.offset}, {t.size}, {t.first}, {t.last}}}, " for t in plan.arena)
    slots = str(max(1, len(plan.inputs), len(plan.outputs)))
    integer = any(kernel.arithmetic.startswith("int") for kernel in plan.audit)
    main = _MAIN.replace("@arena@", arena).replace("@slots@", slots)
    main = main.replace("@read_on@", str(ALIGNMENT if integer else 0))
    for name, text in {**texts, "main.c": main}.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "kernels.ll").write_text(_instrumented(kernels), encoding="utf-8")
    link.zig("clang", "--target=x86_64-linux-gnu", "-fsanitize=address", "-O1", "-fPIC", "-c",
             "-x", "ir", "kernels.ll", "-o", "kernels.o", cwd=folder)  # fmt: skip
    programs = {"main": ["main.c"], "bench": ["bench.c", "profile.c", "peaks.o"]}
    for program, files in programs.items():
        command = [*_GCC, *files, "driver.c", "kernels.o", "libmath.a", "-o", program]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    calls = (folder / "kernels.o").read_bytes().count(b"__asan_report")
    assert calls, "the kernels are not instrumented"
    return kernels.count("\ndefine ")


def _instrumented(text: str) -> str:
    """LLVM IR whose functions clang's AddressSanitizer instruments: attributes that say what they
    do not touch would be wrong with its calls in them."""
    used = set(re.findall(r"^define .*\) .*#(\d+)", text, re.M))

    def sanitized(match: re.Match[str]) -> str:
        kept = re.findall(r'"[^"]*"(?:="[^"]*")?', match[2])
        return f"attributes #{match[1]} = {{ sanitize_address nounwind {' '.join(kept)} }}"

    return re.sub(
        r"^attributes #(\d+) = \{(.*)\}$",
        lambda m: sanitized(m) if m[1] in used else m[0],
        text.replace("define dllexport ", "define "),
        flags=re.M,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=["digits", "mobilenet-v1", "unet-small"])
    parser.add_argument("--recipes", default=",".join(RECIPES))
    options = parser.parse_args()
    findings = 0
    for model in options.models:
        for recipe in options.recipes.split(","):
            with tempfile.TemporaryDirectory(prefix="edgepipe-asan-") as name:
                built = build(model, recipe, Path(name))
                found = [text for text in (built.run(), built.bench()) if text]
                controls = built.run(short_output=4), built.run(short_arena=ALIGNMENT + 4)
                seen = sum("AddressSanitizer" in text for text in controls)
            findings += len(found) + (seen < 2)
            print(f"{Path(model).stem} {recipe}: {built.instrumented} kernels, {len(found)} "
                  f"findings, {seen} of 2 injected overruns found", flush=True)  # fmt: skip
            for text in found:
                print(text)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
