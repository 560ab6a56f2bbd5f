"""Which operators are integer, what is fused, what shares a scale."""

from __future__ import annotations

from edgepipe.quantization.config import QuantConfig
from edgepipe.quantization.placement import Placement, place
from quantization.networks import MIXED, build


def placed(text: str = MIXED, **fields: object) -> tuple[Placement, dict[str, object], list[str]]:
    notes: list[str] = []
    graph = build(text).graph
    config = QuantConfig(**fields)  # type: ignore[arg-type]
    result = place(graph, config, lambda subject, text: notes.append(f"{subject}: {text}"))
    return result, {v.name: n for v, n in result.group.items()}, notes


def chains(result: Placement) -> list[str]:
    return ["+".join(node.op_type for node in unit.nodes) for unit in result.units]


def test_residual_and_activation_are_fused() -> None:
    result, group, _ = placed()
    assert "Conv+Add+Relu" in chains(result) and "Conv+Clip" in chains(result)
    assert not {"c0", "c1", "c2", "s"} & group.keys(), "nothing is rounded inside a chain"


def test_without_fused_residuals_the_add_stands_alone() -> None:
    result, group, _ = placed(fuse_residual=False)
    assert "Add+Relu" in chains(result) and "c2" in group


def test_concat_and_pooling_share_scales() -> None:
    _, group, _ = placed()
    assert group["r2"] == group["m"] == group["c3"] == group["k"]
    assert len({group["r0"], group["r1"], group["r2"], group["a"], group["x"]}) == 5


def test_the_last_product_is_not_rounded() -> None:
    assert "y" not in placed()[1]
    assert "y" in placed(quantize_outputs=True)[1]


def test_overrides_by_name_and_type() -> None:
    result, group, notes = placed(
        overrides=(("GlobalAveragePool", "float"), ("node_.*|c1", "w4a8"))
    )
    assert not any(n.op_type == "GlobalAveragePool" for n in result.integer)
    assert "f" in group, "its float result is rounded for the integer Gemm behind it"
    assert any("override" in note for note in notes)


def test_first_and_last() -> None:
    result, _, _ = placed(weight_bits=4, first_last="w8")
    bits = [result.formats[u.linear].weight_bits for u in result.units if u.linear]
    assert bits == [8, 4, 4, 4, 8]
    result, group, _ = placed(first_last="float")
    assert "x" not in group and sum(u.linear is not None for u in result.units) == 3


def test_depthwise_layers_of_4_bits() -> None:
    text = """n (float[1,3,8,8] x) => (float[1,4,8,8] y) <float[4,3,3,3] a, float[4,1,1,1] b,
    float[4,4,1,1] c, float[4,2,1,1] d, float[4,1,3,3] e, float[4,4,1,1] f> {
        t = Conv<pads=[1,1,1,1]>(x, a)
        u = Conv<group=4>(t, b)
        v = Conv(u, c)
        w = Conv<group=2>(v, d)
        z = Conv<group=4, pads=[1,1,1,1]>(w, e)
        y = Conv(z, f) }"""

    def bits(recipe: str, **changes: object) -> list[int]:
        config = QuantConfig.parse(recipe, first_last="same", **changes)
        placement = place(build(text).graph, config, lambda *_: None)
        return [placement.formats[u.linear].weight_bits for u in placement.units if u.linear]

    assert bits("w4a8") == bits("w4g32") == [4, 8, 4, 4, 8, 4]
    assert bits("w4a8", depthwise="same") == [4] * 6
    assert bits("w4a8", overrides=(("Conv", "w4a8"),)) == [4] * 6, "an override wins"
    assert bits("w8a8") == [8] * 6


def test_float_tail_and_constant_operands_stay_float() -> None:
    text = """n (float[1,4,6,6] x) => (float[1,4,6,6] y) <float[4,4,1,1] w, float[4] b,
    float[1,4,1,1] k> {
        c = Conv(x, w, b)
        m = Mul(c, k)
        e = Exp(m)
        y = Softmax<axis=1>(e) }"""
    result, group, _ = placed(text)
    assert {n.op_type for n in result.integer} == {"Conv"} and set(group) == {"x"}


def test_of_two_convolutions_the_later_takes_the_add() -> None:
    text = """n (float[1,4,6,6] x) => (float[1,4,6,6] y) <float[4,4,1,1] w, float[4] b,
    float[4,4,1,1] v, float[4] a, float[4,4,1,1] z> {
        c = Conv(x, w, b)
        d = Conv(x, v, a)
        s = Add(c, d)
        r = Relu(s)
        y = Conv(r, z) }"""
    result, group, _ = placed(text)
    assert chains(result) == ["Conv", "Conv+Add+Relu", "Conv"]
    assert "c" in group and "d" not in group
