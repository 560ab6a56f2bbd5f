"""Loops around functions of a linked module: they do their work, or turn without doing it."""

from __future__ import annotations

from typing import Any

import pytest
import wasmtime

from edgepipe.codegen import turns

#: ``$work`` adds one to a number, leaves early by a jump from 2 on and by a return from 4 on.
MODULE = """
(module
  (memory (export "memory") 1)
  (func $work (param $at i32) (param $turns i32) (local $held i64) (local $value i32)
    (local.set $value (i32.load (local.get $at)))
    (block
      (br_if 1 (i32.eq (local.get $value) (i32.const 2)))
      (br_if 0 (i32.lt_u (local.get $value) (i32.const 4)))
      (return))
    (i32.store (local.get $at) (i32.add (local.get $value) (i32.const 1))))
  (func $other (param $at i32) (param $turns i32)
    (i32.store (local.get $at) (i32.const 7)))
  (func (export "run") (param i32 i32) (call $work (local.get 0) (local.get 1)))
  (func (export "other") (param i32 i32) (call $other (local.get 0) (local.get 1)))
  (func (export "warm_up") (call $work (i32.const 0) (i32.const 16383)))
  (func (export "adds") (drop (i32.add (i32.const 1) (i32.const 2)))))
"""


@pytest.fixture
def module() -> bytes:
    return bytes(wasmtime.wat2wasm(MODULE))


def called(module: bytes, name: str, start: int, *arguments: int) -> int:
    """The number at 0 after ``name(0, …)``, ``start`` before."""
    store = wasmtime.Store()
    instance = wasmtime.Instance(store, wasmtime.Module(store.engine, module), [])
    exports: Any = instance.exports(store)
    exports["memory"].write(store, start.to_bytes(4, "little"), 0)
    exports[name](store, *arguments)
    return int.from_bytes(exports["memory"].read(store, 0, 4), "little")


@pytest.mark.parametrize("start", range(6))
def test_without_turns_all_is_as_before(module: bytes, start: int) -> None:
    wrapped = turns.wrap(module, "warm_up")
    wanted = start + (start not in (2, 4, 5))
    assert called(module, "run", start, 0, 0) == wanted
    assert called(wrapped, "run", start, 0, 0) == wanted


@pytest.mark.parametrize("count", [1, 2, turns.WARM_UP])
def test_turns_do_nothing(module: bytes, count: int) -> None:
    wrapped = turns.wrap(module, "warm_up")
    assert called(module, "run", 0, 0, count) == 1
    assert called(wrapped, "run", 0, 0, count) == 0
    assert called(module, "warm_up", 0) == 1
    assert called(wrapped, "warm_up", 0) == 0


def test_what_is_not_called_there_is_left_alone(module: bytes) -> None:
    assert called(turns.wrap(module, "warm_up"), "other", 0, 0, 5) == 7


def test_another_module_is_refused(module: bytes) -> None:
    with pytest.raises(ValueError, match="no function warm is exported"):
        turns.wrap(module, "warm")
    with pytest.raises(ValueError, match="instruction 0x6a"):
        turns.wrap(module, "adds")
