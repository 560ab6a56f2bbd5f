"""How many pixels of a convolution are packed at a time for WebAssembly: a strip of them."""

from __future__ import annotations

#: Bytes of packed inputs that stay in a small second-level cache, and what as many again cost.
_BYTES, _FAR = 1 << 17, 0.1
#: What reading all weights once more is worth, in pixels.
_WEIGHTS = 8


def strip(count: int, size: int, tile: int = 1, pixels: int = 1, most: int = _BYTES) -> int:
    """How many of ``count`` units, of ``size`` bytes and ``pixels`` each, make a strip.

    A strip takes whole tiles of ``tile`` units, or all; the last one overlaps its neighbour. The
    best has few places of tiles, and of strips, computed twice.
    """

    def cost(units: int) -> float:
        filled = -(-units // tile) * tile
        far = max(0.0, filled * size / most - 1)
        return -(-count // units) * (filled * pixels + _WEIGHTS) * (1 + _FAR * far)

    best: int = min([count, *range(tile, count, tile)], key=cost)
    return best
