"""Inferences of a model converted for ncnn, in an emulated machine: FOLDER X.npy Y.npy TIMES.

One that is not meant to be counted comes first; its output becomes Y.npy. Needs numpy and ncnn.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from edgepipe.peers.ncnn import Loaded


def main() -> None:
    folder, x, y, times = sys.argv[1:]
    loaded = Loaded(Path(folder), [np.load(x)], 1, threads=1)
    np.save(y, np.array(loaded.infer()[0]))
    for _ in range(int(times)):
        loaded.infer()


if __name__ == "__main__":
    main()
