"""Tables of strangers become dataclasses, or one line says which key is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edgepipe import tables
from edgepipe.errors import UserError


@dataclass(frozen=True)
class Inner:
    count: int
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count must be 0 or more")


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    several: tuple[Inner, ...] = ()
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    flag: bool = False
    anything: Any = None
    perhaps: Inner | None = None


RIGHT = {"name": "x", "inner": {"count": 3, "share": 1}, "several": [{"count": 1}],
         "words": {"a": ["b"]}, "anything": [{}], "perhaps": None}  # fmt: skip


def test_what_is_right_is_read() -> None:
    wanted = Outer("x", Inner(3, 1.0), (Inner(1),), {"a": ("b",)}, False, [{}])
    assert tables.read(Outer, RIGHT, "f.toml") == wanted
    assert isinstance(tables.read(Outer, RIGHT, "f.toml").inner.share, float)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": 3}, "'name' must be text, not 3"),
        ({"inner": []}, "'inner' must be a table, not []"),
        ({"inner": {"count": "3"}}, "'inner.count' must be a whole number, not '3'"),
        ({"inner": {"count": True}}, "'inner.count' must be a whole number, not True"),
        ({"inner": {"count": 2**63}}, "'inner.count' must be a whole number"),
        ({"inner": {"count": 1.0}}, "'inner.count' must be a whole number"),
        ({"inner": {"count": 1, "share": float("nan")}}, "'inner.share' must be a number"),
        ({"inner": {"count": 1, "share": float("inf")}}, "'inner.share' must be a number"),
        ({"inner": {"count": 1, "share": 10**400}}, "'inner.share' must be a number"),
        ({"inner": {"count": -1}}, "count must be 0 or more"),
        ({"inner": {}}, "missing key 'count' in 'inner'"),
        ({"inner": {"count": 1, "shaer": 1}}, "unknown key 'shaer' in 'inner'; did you mean"),
        ({"several": {"count": 1}}, "'several' must be a list"),
        ({"several": [{"count": 1}, 5]}, "'several[1]' must be a table, not 5"),
        ({"words": {"a": "b"}}, "'words.a' must be a list, not 'b'"),
        ({"flag": 1}, "'flag' must be true or false, not 1"),
        ({"perhaps": "x"}, "'perhaps' must be a table"),
        ({"name": "y" * 10**6, "flag": "z" * 10**6}, "'flag' must be true or false, not 'zzz"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        tables.read(Outer, RIGHT | change, "f.toml")
    assert str(caught.value).startswith("f.toml: ")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 1200


def test_keys_of_other_versions_may_be_left_out() -> None:
    raw = RIGHT | {"later": 1, "inner": {"count": 3, "share": 1, "later": 2}}
    assert tables.read(Outer, raw, "f", extra=True) == tables.read(Outer, RIGHT, "f")
    with pytest.raises(UserError, match="unknown key 'later'"):
        tables.read(Outer, raw, "f")


@pytest.mark.parametrize("content", [b"a = ", b"\xff\xfe", b"a = " + b"[" * 10**5, b"a" * 10**6])
def test_what_is_no_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "f.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable TOML file"):
        tables.load_toml(path)
    with pytest.raises(UserError, match="cannot be read"):
        tables.load_toml(tmp_path)
