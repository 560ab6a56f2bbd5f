"""A CUDA driver for a bundle, to be opened in place of NVIDIA's: it runs the kernels on the CPU."""

from __future__ import annotations

from pathlib import Path

from cuda.emulation import FLAGS, to_cpp, zig

_SOURCE = Path(__file__).with_name("libcuda.c")


def executing(source: str, folder: Path) -> Path:
    """The library that executes the kernels of CUDA ``source``; built in ``folder``."""
    text, counts = to_cpp(source)
    rows = "".join(f'{{"{name}", {count}, run_{name}}}, ' for name, count in counts.items())
    table = (
        "struct kernel { const char *name; int n; void (*f)(void **, int, int, int, int, unsigned);"
        f' }};\nextern "C" {{ extern const kernel stub_kernels[] = {{ {rows} }};\n'
        f"extern const int stub_kernel_count = {len(counts)}; }}\n"
    )
    (folder / "kernels.cpp").write_text(text + "\n" + table, encoding="utf-8")
    objects = ("-c", "-o", "libcuda.o", str(_SOURCE))
    zig(folder, "cc", *FLAGS[1:], *objects)
    zig(folder, "c++", *FLAGS, "-o", "libcuda.so.1", "kernels.cpp", "libcuda.o")
    return folder / "libcuda.so.1"


def recording(zig_target: str, folder: Path) -> Path:
    """The library that only notes what is called, for another machine."""
    words = ("-target", zig_target, "-DRECORDING", *FLAGS, "-o", "recording.so", str(_SOURCE))
    zig(folder, "cc", *words)
    return folder / "recording.so"
