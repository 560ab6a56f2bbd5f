"""Seeded inputs for when there are no data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgepipe.codegen.plan import TensorSpec
from edgepipe.data.samples import Inputs, Samples
from edgepipe.golden import synthetic_inputs


def synthetic(specs: Sequence[TensorSpec], *, runs: int = 8, first_seed: int = 1) -> Samples:
    """``runs`` seeded runs, seeds counting from ``first_seed`` (the golden inputs have seed 0)."""

    def read() -> Iterator[Inputs]:
        for seed in range(first_seed, first_seed + runs):
            yield synthetic_inputs(specs, seed)

    last = first_seed + runs - 1
    return Samples(f"synthetic inputs (seeds {first_seed}–{last})", runs, read, synthetic=True)
