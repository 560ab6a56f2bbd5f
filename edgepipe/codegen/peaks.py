"""The kernels that tell what a core can reach, compiled for a bundle's own bench program."""

from __future__ import annotations

from edgepipe.codegen.plan import PeakKernel, Peaks
from edgepipe.target import Target

_built: dict[str, Peaks] = {}


def build(target: Target, prefix: str) -> Peaks:
    """``edgepipe.kernels.peak`` as objects for ``target`` and its variants, symbols beginning with
    ``prefix``. Built once per target and process."""
    key = repr((target, prefix))
    if key not in _built:
        _built[key] = _build(target, prefix)
    return _built[key]


def _build(target: Target, prefix: str) -> Peaks:
    from edgepipe.codegen.primfunc import build_object
    from edgepipe.kernels import peak

    objects, found, sizes = {}, {}, [0, 0, 0]
    for variant, attributes in {"": (), **target.variants}.items():
        kernels = {f"{prefix}_{n}": k for n, k in peak.kernels(target, variant).items()}
        functions = {symbol: k.function for symbol, k in kernels.items()}
        objects[variant], _ = build_object(functions, target, attributes)
        found[variant] = tuple(
            PeakKernel(symbol, k.of, k.work) for symbol, k in kernels.items() if k.of != "bytes"
        )
        for k in kernels.values():
            sizes = [max(a, b) for a, b in zip(sizes, k.sizes, strict=True)]
    return Peaks(objects, found, (sizes[0], sizes[1], sizes[2]), peak.COPY_BYTES)
