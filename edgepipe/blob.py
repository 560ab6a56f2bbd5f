"""Bytes in pieces that lie where they were made: large files are never put together in memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Blob:
    """``pieces`` are bytes, or views of them, that follow one another."""

    pieces: tuple[bytes | memoryview, ...] = ()

    @classmethod
    def of(cls, data: bytes | Blob) -> Blob:
        """``data`` itself, or bytes as one piece."""
        return data if isinstance(data, Blob) else cls((data,))

    def __len__(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    def __bytes__(self) -> bytes:
        return b"".join(self.pieces)
