"""What LLVM is asked for is what it has: it would end the process otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgepipe.codegen import primfunc
from edgepipe.errors import UserError
from edgepipe.target import Integer, Target


@pytest.mark.parametrize(
    ("llvm", "said"),
    [
        ({"mcpu": "magic"}, "LLVM has no CPU 'magic' of this triple"),
        ({"mcpu": "x86-64"}, "'maddubs' needs the feature 'avx2'"),
        ({"mattr": ["-avx2"]}, "'maddubs' needs the feature 'avx2'"),
    ],
)
def test_what_llvm_would_end_the_process_for_is_refused(llvm: dict[str, object], said: str) -> None:
    target = Target.load("x86-64-v3")
    with pytest.raises(UserError, match=said):
        primfunc.llvm_target(replace(target, llvm={**target.llvm, **llvm}))


@pytest.mark.parametrize("features", [(), ("-relaxed-simd",)])
def test_a_variant_without_its_instructions_is_refused(features: tuple[str, ...]) -> None:
    target = replace(Target.load("wasm-relaxed"), variants={"relaxed": features})
    with pytest.raises(UserError, match="need the feature 'relaxed-simd'"):
        primfunc.llvm_target(target, features)
    sound = Target.load("wasm-relaxed")
    primfunc.llvm_target(sound)
    primfunc.llvm_target(sound, sound.variants["relaxed"])


def test_products_of_another_architecture_are_refused() -> None:
    target = Target.load("x86-64-v3")
    with pytest.raises(UserError, match="x86_64 has no 'sdot'"):
        primfunc.llvm_target(replace(target, integer=Integer("sdot", "int8")))
