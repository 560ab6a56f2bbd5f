"""ONNX files: what is kept, what is fixed, and that the result computes the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepipe import importer, passes
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.importer.source import Source, identifier
from edgepipe.recipe import Recipe
from edgepipe.target import Target

from .graphs import dense, externalise, model, relu, save, value, weight


def outputs(content: bytes, seed: int = 0) -> list[np.ndarray]:
    """Run a model on seeded inputs: floats normal, integers 0 or 1."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(seed)
    feed = {
        i.name: random.standard_normal(i.shape).astype(np.float32)
        if "float" in i.type
        else random.integers(0, 2, i.shape)
        for i in session.get_inputs()
    }
    return session.run(None, feed)


def compiled_bytes(source: Source) -> bytes:
    return ir.to_proto(source.model).SerializeToString()


def shape_of(source: Source, name: str) -> list[int]:
    values = [*source.model.graph.inputs, *source.model.graph.outputs]
    return list(next(v for v in values if v.name == name).shape.numpy())


def test_source_fields(tmp_path: Path) -> None:
    path = save(relu(), tmp_path, "my-net v2.onnx")
    source = importer.load(path)
    assert (source.name, source.origin) == ("my_net_v2", "my-net v2.onnx")
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.proto.graph.node[0].op_type == "Relu"
    assert str(tmp_path) not in source.origin


@pytest.mark.parametrize(
    ("text", "name"),
    [("mobilenet-v1", "mobilenet_v1"), ("2nd.try", "model_2nd_try"), ("ß", "model")],
)
def test_identifier(text: str, name: str) -> None:
    assert identifier(text) == name
    assert name.isidentifier() and name.isascii()


def test_batch_becomes_one(tmp_path: Path) -> None:
    source = importer.load(save(relu(("n", 4)), tmp_path))
    assert shape_of(source, "x") == shape_of(source, "y") == [1, 4]


def test_minus_one_is_a_free_batch(tmp_path: Path) -> None:
    assert shape_of(importer.load(save(relu((-1, 4)), tmp_path)), "x") == [1, 4]


def test_given_shape_wins_and_reaches_the_output(tmp_path: Path) -> None:
    source = importer.load(save(relu(("n", "h", 4)), tmp_path), {"x": (2, 5, 4)})
    assert shape_of(source, "x") == shape_of(source, "y") == [2, 5, 4]
    assert outputs(source.proto_bytes())[0].shape == (2, 5, 4)


def test_symbol_binds_every_input(tmp_path: Path) -> None:
    node = helper.make_node("Add", ["a", "b"], ["y"])
    inputs = [value("a", ("n", "t")), value("b", ("n", "t"))]
    path = save(model([node], inputs, [value("y", ("n", "t"))]), tmp_path)
    source = importer.load(path, {"a": (1, 7)})
    assert shape_of(source, "b") == [1, 7]


def test_stale_output_shape_is_replaced(tmp_path: Path) -> None:
    proto = relu(("n", 4))
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert shape_of(importer.load(save(proto, tmp_path), {"x": (3, 4)}), "y") == [3, 4]


def test_missing_output_shape_is_inferred(tmp_path: Path) -> None:
    proto = relu()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    assert shape_of(importer.load(save(proto, tmp_path)), "y") == [1, 4]


def test_initializers_listed_as_inputs_are_no_inputs(tmp_path: Path) -> None:
    proto = dense()
    proto.ir_version = 3
    proto.graph.input.append(value("w", (4, 3)))
    source = importer.load(save(proto, tmp_path))
    assert [v.name for v in source.model.graph.inputs] == ["x"]
    session = onnxruntime.InferenceSession(source.proto_bytes())
    assert [i.name for i in session.get_inputs()] == ["x"]


def test_shares_of_devices_are_left_out(tmp_path: Path) -> None:
    """onnx-ir does not write those without a name, and what is a function is written."""
    node = helper.make_node("HardSwish", ["x"], ["y"])
    node.device_configurations.add()
    source = importer.load(save(model([node], [value("x", (4,))], [value("y", (4,))]), tmp_path))
    assert not next(iter(source.model.graph)).device_configurations
    passes.run(source.model, Context(Target.load("host"), Recipe()))


def test_scalar_and_integer_inputs(tmp_path: Path) -> None:
    node = helper.make_node("Gather", ["x", "i"], ["y"], axis=1)
    inputs = [value("x", ("n", 4)), value("i", (), TensorProto.INT64)]
    source = importer.load(save(model([node], inputs, [value("y", ("n",))]), tmp_path))
    assert shape_of(source, "i") == [] and shape_of(source, "y") == [1]


def test_unsorted_graph_is_sorted(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["t"], ["y"]),
        helper.make_node("Neg", ["x"], ["t"]),
    ]
    source = importer.load(save(model(nodes, [value("x", (4,))], [value("y", (4,))]), tmp_path))
    assert [n.op_type for n in source.model.graph] == ["Neg", "Relu"]
    outputs(source.proto_bytes())


def test_subgraphs_read_outer_names(tmp_path: Path) -> None:
    branch = helper.make_graph([helper.make_node("Neg", ["t"], ["o"])], "b", [], [value("o", (4,))])
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
        helper.make_node("Relu", ["x"], ["t"]),
    ]
    inputs = [value("x", (4,)), value("c", (), TensorProto.BOOL)]
    source = importer.load(save(model(nodes, inputs, [value("y", (4,))]), tmp_path))
    assert [n.op_type for n in source.model.graph] == ["Relu", "If"]


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    function = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    proto = relu()
    proto.graph.node[0].CopyFrom(helper.make_node("Twice", ["x"], ["y"], domain="mine"))
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    source = importer.load(save(proto, tmp_path))
    assert [n.op_type for n in source.model.graph] == ["Add"]


@pytest.mark.parametrize("opset", range(7, 24))
def test_every_opset(tmp_path: Path, opset: int) -> None:
    source = importer.load(save(relu(opset=opset), tmp_path))
    assert np.array_equal(outputs(source.proto_bytes())[0], outputs(compiled_bytes(source))[0])


def test_reference_gets_the_lowest_label_that_means_the_same(tmp_path: Path) -> None:
    newest = onnx.defs.onnx_opset_version()
    source = importer.load(save(relu(opset=newest, ir_version=onnx.IR_VERSION), tmp_path))
    outputs(source.proto_bytes())  # ONNX Runtime refuses the newest labels
    assert source.proto.opset_import[0].version == 21
    assert source.model.opset_imports[""] == newest


def test_reference_keeps_an_opset_that_changed_an_operator(tmp_path: Path) -> None:
    proto = relu(opset=23)
    proto.graph.node[0].CopyFrom(helper.make_node("RMSNormalization", ["x", "s"], ["y"]))
    proto.graph.initializer.append(weight("s", (4,)))
    source = importer.load(save(proto, tmp_path))
    assert source.proto.opset_import[0].version == 23


def test_external_data_is_embedded(tmp_path: Path) -> None:
    proto = dense()
    want = outputs(proto.SerializeToString())
    externalise(proto, tmp_path)
    source = importer.load(save(proto, tmp_path))
    assert np.array_equal(outputs(source.proto_bytes())[0], want[0])
    assert np.array_equal(outputs(compiled_bytes(source))[0], want[0])


def test_sha256_covers_external_data(tmp_path: Path) -> None:
    proto = dense()
    content = externalise(proto, tmp_path)
    path = save(proto, tmp_path)
    before = importer.load(path).sha256
    (tmp_path / "m.data").write_bytes(bytes(content[:-4]) + b"\0\0\0\0")
    assert importer.load(path).sha256 != before


def test_external_data_through_a_link_inside_the_folder(tmp_path: Path) -> None:
    proto = dense()
    externalise(proto, tmp_path)
    (tmp_path / "m.data").rename(tmp_path / "real.data")
    (tmp_path / "m.data").symlink_to("real.data")
    importer.load(save(proto, tmp_path))


def test_type_mismatch_is_found(tmp_path: Path) -> None:
    proto = dense((1, 5))
    with pytest.raises(UserError, match="shapes do not fit together"):
        importer.load(save(proto, tmp_path))


def test_an_output_that_is_a_constant_of_another_type(tmp_path: Path) -> None:
    """ONNX Runtime loads it; neither strict nor loose inference does."""
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("Split", ["x", "parts"], ["a", "b"], axis=0)],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [6])],
            [
                helper.make_tensor_value_info("parts", TensorProto.FLOAT, [2]),
                helper.make_tensor_value_info("b", TensorProto.FLOAT, [4]),
            ],
            [numpy_helper.from_array(np.array([2, 4]), "parts")],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    with pytest.raises(UserError, match="shapes do not fit together"):
        importer.load(save(proto, tmp_path))


def test_shape_of_every_value_where_inference_can_tell(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Concat", ["n", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    initializers = [
        numpy_helper.from_array(np.array([0]), "zero"),
        numpy_helper.from_array(np.array([-1]), "rest"),
    ]
    proto = model(nodes, [value("x", ("n", 3, 4))], [value("y", ("n", "k"))], initializers)
    assert shape_of(importer.load(save(proto, tmp_path), {"x": (2, 3, 4)}), "y") == [2, 12]


def test_truncated_weights_are_found(tmp_path: Path) -> None:
    proto = dense()
    proto.graph.initializer[0].CopyFrom(weight("w", (4, 3)))
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-1]
    with pytest.raises(UserError, match="holds 47 bytes"):
        importer.load(save(proto, tmp_path))


@pytest.mark.slow
@pytest.mark.needs_shared
def test_trained_networks(shared_models: Path) -> None:
    paths = sorted(shared_models.glob("*.onnx"))
    assert len(paths) >= 5
    for path in paths:
        source = importer.load(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path.read_bytes(), options)
        assert {v.name for v in source.model.graph.inputs} == {i.name for i in session.get_inputs()}
        for original, loaded, compiled in zip(
            _original_outputs(session),
            outputs(source.proto_bytes()),
            outputs(compiled_bytes(source)),
            strict=True,
        ):
            assert np.array_equal(loaded, compiled)
            # ONNX Runtime fuses more once initializers are no inputs: last-bit differences.
            assert np.abs(original - loaded).max() <= 1e-5 * np.abs(original).max()


def _original_outputs(session: onnxruntime.InferenceSession) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    feed = {
        i.name: random.standard_normal(
            [d if isinstance(d, int) else 1 for d in i.shape]
        ).astype(np.float32)
        for i in session.get_inputs()
    }  # fmt: skip
    return session.run(None, feed)
