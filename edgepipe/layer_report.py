"""What quantization did to each layer, and what to try where it did too much."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from edgepipe.display import db_text, table
from edgepipe.validation_report import plain, share

#: Layers that are named with advice.
NAMED = 3
#: A layer that loses less than this against its inputs is not worth a word.
SMALL_LOSS_DB = 1.0
#: Above this share of values beyond the codes, cutting is what costs.
MUCH_SATURATION = 0.002
#: Below this share of codes in use, outliers stretch the range.
FEW_CODES = 0.25

#: A model that came quantized keeps its scales.
FOR_IMPORTED = "quantizing the float model here, with more bits for this layer in a recipe file"


@dataclass(frozen=True)
class LayerReport:
    """One rounded tensor of the quantized network against the float network.

    ``layer`` is the node that computes it, past fused additions and activations, ``weight_bits``
    those of its weights where it has any. ``snr_db`` counts everything upstream; ``loss_db`` is
    how much lower it is than at the worst of the layer's inputs (None for an input of the model).
    ``saturation``: share of the float values beyond the last codes; ``codes_used``: share of the
    tensor's codes that occur, both 0…1 and None where the tensor is not rounded. ``values`` are the
    smallest and the largest float value seen, ``codes`` what the first and the last code stand for;
    None where channels were rescaled, so that one range says nothing of the other.
    """

    tensor: str
    layer: str
    op_type: str
    weight_bits: int | None
    snr_db: float
    loss_db: float | None
    saturation: float | None
    codes_used: float | None
    values: tuple[float, float] | None = None
    codes: tuple[float, float] | None = None

    @property
    def advice(self) -> list[str]:
        """What to try, as lines for a recipe file or in words."""
        found = []
        if self.saturation is not None and self.saturation > MUCH_SATURATION:
            found.append(
                f'{share(self.saturation)} of its values are cut off: observer = "minmax", or '
                "calibrate with data like these"
            )
        elif self.codes_used is not None and self.codes_used < FEW_CODES:
            found.append(
                f"it uses {share(self.codes_used)} of its codes: "
                'methods = ["equalization", "reconstruction"], or observer = "percentile"'
            )
        if self.weight_bits is not None:
            wider = "w8a8" if self.weight_bits == 4 else "float"
            # Literal strings of TOML: backslashes of the expression stay as they are.
            found.append(f"overrides = [{{match = '{re.escape(self.layer)}', format = '{wider}'}}]")
        return found


@dataclass(frozen=True)
class LayersReport:
    """All layers in graph order, on ``runs`` runs of ``data``. Of an ``imported`` model, which
    came quantized, a recipe can change nothing."""

    data: str
    synthetic: bool
    runs: int
    layers: tuple[LayerReport, ...]
    imported: bool = False

    @property
    def worst(self) -> list[LayerReport]:
        """Layers that lose most, the worst first."""
        losing = [x for x in self.layers if x.loss_db is not None and x.loss_db >= SMALL_LOSS_DB]
        return sorted(losing, key=lambda x: -(x.loss_db or 0.0))[:NAMED]

    def advice(self, layer: LayerReport) -> list[str]:
        """What to try for one of the layers."""
        return [FOR_IMPORTED] if self.imported else layer.advice

    def to_json(self) -> dict[str, Any]:
        """For ``json.dumps``; infinities are strings."""
        fields: dict[str, Any] = plain(asdict(self))
        fields["worst"] = [{"layer": x.layer, "try": self.advice(x)} for x in self.worst]
        return fields

    def __str__(self) -> str:
        rows = [
            [
                x.layer, x.op_type, "–" if x.weight_bits is None else x.weight_bits,
                db_text(x.snr_db), "–" if x.loss_db is None else f"{x.loss_db:.1f}",
                "–" if x.saturation is None else share(x.saturation),
                "–" if x.codes_used is None else share(x.codes_used),
            ]
            for x in self.layers
        ]  # fmt: skip
        headers = ["layer", "operator", "weight bits", "SNR dB", "loss dB", "cut off", "codes used"]
        noise = " – synthetic: says little of real data" if self.synthetic else ""
        lines = [f"layers, float against quantized, on {self.data}{noise}", table(headers, rows)]
        for x in self.worst:
            lines.append(
                f"{x.layer} loses {x.loss_db:.1f} dB" + ("; try" if self.advice(x) else "")
            )
            lines += [f"  {text}" for text in self.advice(x)]
        return "\n".join(lines)
