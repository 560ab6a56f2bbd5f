"""Bad input: one line that says what, where and what would work; exit code 2."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepipe import importer
from edgepipe.errors import Unsupported, UserError

from .graphs import dense, externalise, model, relu, save, value, weight

Shapes = dict[str, tuple[int, ...]]


def refusal(source: str | Path, shapes: Shapes | None = None) -> str:
    """The message ``load`` refuses with; checks what holds for every message."""
    with pytest.raises(UserError) as caught:
        importer.load(source, shapes)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.isprintable() and 10 < len(message) < 1200
    return message


def _write(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "m.onnx").write_bytes(content)
        return folder / "m.onnx"

    return make


def _changed(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        proto = relu()
        change(proto)
        return save(proto, folder)

    return make


def _bundle(folder: Path) -> Path:
    (folder / "manifest.json").write_text("{}")
    return folder


def _named(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(b"x")
        return folder / name

    return make


FILES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "empty": (_write(b""), ("m.onnx", "empty")),
    "text": (_write(b"hello, this is no model\n" * 9), ("m.onnx", "not an ONNX model")),
    "zeros": (_write(bytes(100)), ("m.onnx", "not an ONNX model")),
    "truncated": (_write(dense().SerializeToString()[:-20]), ("m.onnx", "truncated")),
    "folder": (lambda folder: folder, ("is a folder", ".onnx")),
    "bundle": (_bundle, ("is a bundle", "already compiled")),
    "missing": (lambda folder: folder / "no.onnx", ("no such file",)),
    "pickled weights": (_named("m.pth"), (".pth", "package.module:factory")),
    "tflite": (_named("m.tflite"), ("tf2onnx",)),
    "opset too old": (
        _changed(lambda m: setattr(m.opset_import[0], "version", 6)),
        ("opset 6 is too old", "7 to", "opset_version="),
    ),
    "opset too new": (
        _changed(lambda m: setattr(m.opset_import[0], "version", 99)),
        ("opset 99 is too new", "export the model again"),
    ),
    "ir version too new": (
        _changed(lambda m: setattr(m, "ir_version", 99)),
        ("IR version 99",),
    ),
    "foreign domain": (
        _changed(lambda m: setattr(m.graph.node[0], "domain", "com.example")),
        ("com.example::Relu", "node 'relu'", "standard"),
    ),
    "unknown operator": (
        _changed(lambda m: setattr(m.graph.node[0], "op_type", "Rleu")),
        ("unknown operator Rleu", "did you mean 'Relu'"),
    ),
    "operator newer than the opset": (
        _changed(lambda m: setattr(m.graph.node[0], "op_type", "Gelu")),
        ("Gelu does not exist in opset 17",),
    ),
    "undefined name": (
        _changed(lambda m: m.graph.node[0].input.__setitem__(0, "nowhere")),
        ("reads 'nowhere'", "nothing produces"),
    ),
    "output of nothing": (
        _changed(lambda m: setattr(m.graph.output[0], "name", "lost")),
        ("output 'lost'",),
    ),
    "no outputs": (_changed(lambda m: m.graph.ClearField("output")), ("no outputs",)),
    "no standard domain": (
        _changed(lambda m: setattr(m.opset_import[0], "domain", "ai.onnx.ml")),
        ("only operators of ai.onnx.ml",),
    ),
    "sequence output": (
        _changed(
            lambda m: m.graph.output[0].CopyFrom(
                helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
            )
        ),
        ("output 'y'", "sequence_type"),
    ),
    "two inputs of one name": (
        _changed(lambda m: m.graph.input.append(value("x", (1, 4)))),
        ("two inputs are named 'x'",),
    ),
    "written twice": (
        _changed(lambda m: m.graph.node.append(helper.make_node("Neg", ["x"], ["y"]))),
        ("'y' is produced twice",),
    ),
    "unknown attribute": (
        _changed(lambda m: m.graph.node[0].attribute.append(helper.make_attribute("alpha", 1.0))),
        ("alpha",),
    ),
    "no type of elements": (
        _changed(lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", -1)),
        ("has elements of type -1, which is none",),
    ),
    "word that means nothing": (
        _changed(
            lambda m: m.graph.node[0].CopyFrom(
                helper.make_node("Resize", ["x", "", "w"], ["h"], "relu", nearest_mode="")
            )
        ),
        ("node 'relu'", "Resize has nearest_mode ''", "known: round_prefer_floor, "),
    ),
    "attribute of a function that is not there": (
        _changed(lambda m: m.graph.node[0].attribute.add(name="a", type=1, ref_attr_name="main")),
        ("attribute a refers to 'main'",),
    ),
    "constant of something unknown": (
        _changed(
            lambda m: m.graph.node.append(
                helper.make_node("Constant", [], ["k"], "k", __import__="os")
            )
        ),
        ("node 'k'", "Constant has no attribute '__import__'"),
    ),
    "more numbers than the shape says": (
        _changed(
            lambda m: m.graph.node.append(
                helper.make_node(
                    "Constant",
                    [],
                    ["k"],
                    "k",
                    value=onnx.TensorProto(name="t", data_type=6, int32_data=[1, 2, 3]),
                )
            )
        ),
        ("tensor 't'", "holds 3 numbers, shape [] needs 1"),
    ),
    "hostile names": (
        _changed(lambda m: setattr(m.graph.node[0], "op_type", "\x1b[2J\n\u202e" + "a" * 10**6)),
        ("unknown operator \\x1b[2J \\u202eaaa", " … "),
    ),
    "too many operands": (
        _changed(lambda m: m.graph.node[0].input.append("x")),
        ("not a valid ONNX model",),
    ),
    "an operand left out": (
        _changed(
            lambda m: m.graph.node.append(helper.make_node("Max", ["x", ""], ["k"], "largest"))
        ),
        ("node 'largest'", "Max needs its input 1"),
    ),
    "string input": (
        _changed(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 8)),
        ("input 'x'", "STRING"),
    ),
    "huge input": (
        _changed(lambda m: m.graph.input[0].CopyFrom(value("x", (1, 10**12)))),
        ("input 'x'", "GiB"),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_file(tmp_path: Path, case: str) -> None:
    make, words = FILES[case]
    message = refusal(make(tmp_path))
    assert not [word for word in words if word not in message], message


def test_cycle(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "second"),
        helper.make_node("Neg", ["b"], ["y"], "third"),
    ]
    path = save(model(nodes, [value("x", (4,))], [value("y", (4,))]), tmp_path)
    assert "cycle through Add 'first'" in refusal(path)


def test_huge_intermediate_value(tmp_path: Path) -> None:
    node = helper.make_node("Add", ["x", "y"], ["z"], "outer")
    inputs = [value("x", (100_000, 1)), value("y", (1, 100_000))]
    message = refusal(save(model([node], inputs, [value("z", None)]), tmp_path))
    assert "value 'z'" in message and "37.3 GiB" in message


def test_huge_initializer_is_not_allocated(tmp_path: Path) -> None:
    proto = dense()
    del proto.graph.initializer[0].dims[:]
    proto.graph.initializer[0].dims.extend([2**40, 2**20])
    assert "tensor 'w'" in refusal(save(proto, tmp_path))


@pytest.mark.parametrize("axes", [(0, 0), (1, 1), (2, 0)])
def test_sequences_along_an_axis_twice(axes: tuple[int, int], tmp_path: Path) -> None:
    """ONNX Runtime reads it as it likes."""
    node = helper.make_node(
        "ReverseSequence", ["x", "n"], ["y"], batch_axis=axes[0], time_axis=axes[1]
    )
    inputs = [value("x", (4, 4)), helper.make_tensor_value_info("n", TensorProto.INT64, (4,))]
    path = save(model([node], inputs, [value("y", None)]), tmp_path)
    assert f"batch_axis {axes[0]} and time_axis {axes[1]}" in refusal(path)


@pytest.mark.parametrize("shape", [(2**62, 1), (5, 4), (5,)])
def test_an_output_that_is_another_input(shape: tuple[int, ...], tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    path = save(model([node], [value("x", (5, 3))], [value("x", shape)]), tmp_path)
    assert "'x' is an input and an output of different types" in refusal(path)


@pytest.mark.parametrize(("given", "rows"), [(5, 5), ("n", 1), (-1, 1)])
@pytest.mark.parametrize("again", [5, "rows", -1])
def test_an_input_that_is_passed_on_keeps_its_shape(
    given: int | str, rows: int, again: int | str, tmp_path: Path
) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    outputs = [value("x", (again, 3)), value("y", None)]
    path = save(model([node], [value("x", (given, 3))], outputs), tmp_path)
    found = importer.load(path, None).model.graph
    shapes = [list(v.shape or ()) for v in (found.inputs[0], found.outputs[0])]
    assert shapes == [[rows, 3]] * 2


def test_parts_without_number_are_not_counted(tmp_path: Path) -> None:
    """ONNX's inference would go through all of them."""
    node = helper.make_node("Split", ["x"], ["y", "z"], axis=1, num_outputs=2**31)
    path = save(model([node], [value("x", (2, 6))], [value("y", None), value("z", None)]), tmp_path)
    assert "Split into 2147483648 has 2 outputs" in refusal(path)


def test_sequence_input(tmp_path: Path) -> None:
    kind = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)
    node = helper.make_node("SequenceAt", ["s", "i"], ["y"])
    index = helper.make_tensor("i", TensorProto.INT64, [], [0])
    path = save(model([node], [kind], [value("y", (4,))], [index]), tmp_path)
    with pytest.raises(Unsupported, match="sequence_type"):
        importer.load(path)


def test_types_of_nothing_within_a_branch(tmp_path: Path) -> None:
    """ONNX's checker and inference let them pass."""
    constant = numpy_helper.from_array(np.ones(4, np.float32))
    node = helper.make_node("Constant", [], ["b"], value=constant)
    branch = helper.make_graph([node], "branch", [], [value("b", (4,))])
    branch.output[0].type.sequence_type.SetInParent()
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, ())
    choice = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    proto = model([choice], [condition], [value("y", (4,))])
    assert "SequenceTypeProto must have elem_type set" in refusal(save(proto, tmp_path))


@pytest.mark.parametrize(
    ("dims", "shapes", "words"),
    [
        (("n", "c", "h", "w"), {}, ("[1,c,h,w]", "--shape x=1,3,224,224")),
        (("n", "t"), {}, ("input 'x'", "--shape x=1,128")),
        (None, {}, ("has no shape", "--shape x=")),
        ((1, 4), {"y": (1, 4)}, ("no input 'y'", "known: x")),
        ((1, 4), {"x": (1, 4, 1)}, ("3 dimensions", "[1,4]")),
        ((1, 4), {"x": (2, 4)}, ("dimension 0 is fixed to 1", "[1,4]")),
        (("n", 4), {"x": (-2, 4)}, ("negative",)),
        (("n", "n"), {"x": (2, 3)}, ("'n' is 3 here and 2 elsewhere",)),
    ],
)
def test_bad_shape(
    tmp_path: Path, dims: tuple[int | str, ...], shapes: Shapes, words: tuple[str, ...]
) -> None:
    message = refusal(save(relu(dims), tmp_path), shapes)
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mobilnet-v1", ("unknown model", "did you mean 'mobilenet-v1'")),
        ("", ("unknown model", "digits")),
        ("x/y/z.onnx", ("no such file",)),
        ("no.such.module:make", ("no module named 'no'",)),
    ],
)
def test_bad_name(name: str, words: tuple[str, ...]) -> None:
    if ":" in name:
        pytest.importorskip("torch")
    message = refusal(name)
    assert not [word for word in words if word not in message], message


def test_misspelt_file_finds_its_neighbour(tmp_path: Path) -> None:
    save(relu(), tmp_path, "detector.onnx")
    assert "did you mean 'detector.onnx'" in refusal(tmp_path / "detectr.onnx")


@pytest.mark.parametrize(
    "location",
    [
        "../out.data",
        "/etc/hostname",
        "sub/../../out.data",
        "C:\\out.data",
        "..\\out.data",
        "\\\\host\\share",
    ],
)
def test_external_data_outside_of_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    proto = dense()
    (tmp_path / "out.data").write_bytes(externalise(proto, folder, f"{location}/")[:48])
    proto.graph.initializer[0].external_data[0].value = location
    assert "outside of the model's folder" in refusal(save(proto, folder))


def test_external_data_through_a_link_that_leaves(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    proto = dense()
    (tmp_path / "out.data").write_bytes(externalise(proto, folder))
    (folder / "m.data").unlink()
    (folder / "m.data").symlink_to(tmp_path / "out.data")
    assert "outside of the model's folder" in refusal(save(proto, folder))


def test_missing_external_data(tmp_path: Path) -> None:
    proto = dense()
    externalise(proto, tmp_path)
    (tmp_path / "m.data").unlink()
    message = refusal(save(proto, tmp_path))
    assert "'m.data' is missing" in message and "tensor 'w'" in message


def test_short_external_data(tmp_path: Path) -> None:
    proto = dense()
    content = externalise(proto, tmp_path)
    (tmp_path / "m.data").write_bytes(content[:-1])
    assert "too short (47 bytes, 48 needed)" in refusal(save(proto, tmp_path))


@pytest.mark.parametrize(("key", "text"), [("length", "47"), ("offset", "-4"), ("length", "many")])
def test_contradictory_external_data(tmp_path: Path, key: str, text: str) -> None:
    proto = dense()
    externalise(proto, tmp_path)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = text
    assert "external data" in refusal(save(proto, tmp_path))


@pytest.mark.parametrize("kind", ["fifo", "folder", "endless"])
def test_external_data_that_never_ends_is_not_read(tmp_path: Path, kind: str) -> None:
    proto = dense()
    externalise(proto, tmp_path)
    file = tmp_path / "m.data"
    file.unlink()
    {"fifo": os.mkfifo, "folder": os.mkdir, "endless": lambda f: f.symlink_to("/dev/zero")}[kind](
        file
    )
    assert "external data" in refusal(save(proto, tmp_path))


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""

    def varint(value: int) -> bytes:
        head = bytes([value & 127 | (128 if value > 127 else 0)])
        return head + (varint(value >> 7) if value > 127 else b"")

    return varint(number << 3 | 2) + varint(len(payload)) + payload


def nested(depth: int) -> bytes:
    """y = x + 1 inside ``depth`` operators If, one in the other; put together as bytes, because
    protobuf refuses to write more than it reads."""
    one = numpy_helper.from_array(np.ones(1, np.float32), "one")
    outputs = [value("y0", (1,))]
    add = helper.make_graph([helper.make_node("Add", ["x", "one"], ["y0"])], "g", [], outputs)
    graph = add.SerializeToString()
    for level in range(1, depth + 1):
        result = f"y{level}"
        branch = onnx.AttributeProto(name="then_branch", type=onnx.AttributeProto.GRAPH)
        other = helper.make_graph(
            [helper.make_node("Identity", ["x"], [f"e{level}"])],
            "e",
            [],
            [value(f"e{level}", (1,))],
        )
        node = helper.make_node("If", ["c"], [result])
        node.attribute.append(helper.make_attribute("else_branch", other))
        content = node.SerializeToString() + _field(
            5, branch.SerializeToString() + _field(6, graph)
        )
        empty = helper.make_graph([], f"g{level}", [], [value(result, (1,))])
        if level == depth:
            empty.initializer.append(one)
            empty.input.append(value("x", (1,)))
            empty.input.append(helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
        graph = empty.SerializeToString() + _field(1, content)
    head = onnx.ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 17)])
    return head.SerializeToString() + _field(7, graph)


def test_nesting_is_read_as_deep_as_protobuf_does(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(nested(8))
    assert importer.load(tmp_path / "m.onnx").model.graph.outputs[0].name == "y8"
    for depth in (60, 3000):
        (tmp_path / "m.onnx").write_bytes(nested(depth))
        assert "m.onnx" in refusal(tmp_path / "m.onnx")


def test_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.onnx")
    assert "not a regular file" in refusal(tmp_path / "m.onnx")


def test_two_initializers_of_one_name(tmp_path: Path) -> None:
    proto = dense()
    proto.graph.initializer.append(weight("w", (4, 3)))
    assert "two initializers are named 'w'" in refusal(save(proto, tmp_path))


@pytest.mark.parametrize("cut", range(1, 200, 13))
def test_no_truncation_crashes(tmp_path: Path, cut: int) -> None:
    content = dense().SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content[: len(content) - cut])
    refusal(tmp_path / "m.onnx")


@pytest.mark.parametrize("text", [b"relu", b"dynamic", b"Relu", b"graph"])
def test_names_that_are_not_text(tmp_path: Path, text: bytes) -> None:
    proto = relu(("dynamic", 4))
    proto.graph.name = "graph"
    content = proto.SerializeToString()
    assert text in content
    (tmp_path / "m.onnx").write_bytes(content.replace(text, b"\xff" * len(text)))
    assert "not valid text" in refusal(tmp_path / "m.onnx")


@pytest.mark.parametrize("text", [b"maker", b"remark", b"inner", b"tensor", b"entry", b"about"])
def test_remarks_that_are_not_text(tmp_path: Path, text: bytes) -> None:
    """Nothing reads them, but what is written from them must be text."""
    proto = dense()
    proto.producer_name, proto.doc_string = "maker", "remark"
    proto.graph.node[0].doc_string = "inner"
    proto.graph.initializer[0].doc_string = "tensor"
    proto.metadata_props.add(key="entry", value="1")
    proto.graph.initializer[0].metadata_props.add(key="about", value="1")
    content = proto.SerializeToString()
    assert text in content
    (tmp_path / "m.onnx").write_bytes(content.replace(text, b"\xd1" * len(text)))
    assert "not valid text" in refusal(tmp_path / "m.onnx")


def test_an_attribute_that_is_not_text(tmp_path: Path) -> None:
    proto = relu((1, 4))
    proto.graph.node[0].op_type = "DepthToSpace"
    proto.graph.node[0].attribute.add(name="mode", s=b"\xff", type=onnx.AttributeProto.STRING)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert "not valid text" in refusal(tmp_path / "m.onnx")


@pytest.mark.parametrize("sound", [True, False])
def test_a_stage_that_fails_on_a_contradiction_is_not_at_fault(sound: bool, tmp_path: Path) -> None:
    index = onnx.numpy_helper.from_array(np.array([0 if sound else 99]), "i")
    node = helper.make_node("Gather", ["x", "i"], ["y"], axis=1)
    proto = model([node], [value("x", (1, 4))], [value("y", None)], [index])
    source = importer.load(save(proto, tmp_path))
    expected = ZeroDivisionError if sound else UserError
    said = "by zero" if sound else "ONNX Runtime cannot run it either"
    with pytest.raises(expected, match=said), importer.judged(source):
        raise ZeroDivisionError("by zero")
