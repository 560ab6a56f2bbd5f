"""Own decompositions of signal operators with constant sizes.

1. DFT → products with constant cosine and sine matrices.
2. STFT → frames gathered by constant indices, windowed, then as 1.
3. Col2Im → ScatterND with addition at constant positions, then a crop of the padding.
"""

from __future__ import annotations
