"""Own decompositions of attention operators."""

from __future__ import annotations
