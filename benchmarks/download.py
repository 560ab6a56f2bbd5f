"""What a page downloads before the weights: the module that the engine takes, and its loader.

Bytes as they are and gzipped (level 9), of every build in a bundle. Weights of quantized networks
are rounded without a method: their values are no code.

  download.py [--models mobilenet-v1,mobilenet-v2] [--targets wasm-simd,wasm-relaxed] [--json FILE]
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

from engines import recipe_file
from harness import arguments, bundle_folder, chosen_models, compile_apart, finish, head, progress

HEADERS = ["model", "format", "target", "build", "module", "gzipped", "loader gzipped", "together"]


def zipped(path: Path) -> int:
    """Bytes of a file, compressed."""
    return len(gzip.compress(path.read_bytes(), 9))


def main() -> int:
    options = arguments(
        __doc__, models="mobilenet-v1,mobilenet-v2", targets="wasm-simd,wasm-relaxed"
    )
    head("Download of the code", "apache-tvm", "ziglang")
    rows, results, failed = [], [], False
    with bundle_folder(options.out) as folder:
        for name, model in chosen_models(options.models).items():
            for recipe in ("fp32", "w8a8"):
                for target in options.targets.split(","):
                    path = folder / f"{name}-{target}-{recipe}"
                    words = ("--recipe", recipe_file(folder, recipe), "--no-check")
                    compiled = compile_apart(model, target, path, *words)
                    if compiled.error:
                        failed = True
                        rows.append([name, recipe, target, compiled.error, *"––––"])
                        continue
                    loader = zipped(path / "model.mjs")
                    for module in sorted(path.glob("model*.wasm")):
                        sizes = [module.stat().st_size, zipped(module), loader]
                        sizes.append(sizes[1] + loader)
                        rows.append([name, recipe, target, module.name, *map(str, sizes)])
                        results.append({"model": name, "recipe": recipe, "target": target,
                                        "build": module.name, "bytes": sizes[0],
                                        "together_gzipped": sizes[-1]})  # fmt: skip
                        progress("  ".join(rows[-1]))
    finish(HEADERS, rows, results, options.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
