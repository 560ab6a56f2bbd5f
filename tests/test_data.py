"""Data sources: what they read, and that each mistake is named."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from edgepipe.codegen.plan import TensorSpec
from edgepipe.data import Samples, from_arrays, named, open_data, synthetic
from edgepipe.data.folder import apply
from edgepipe.data.npz import read_npz, write_npz
from edgepipe.errors import UserError
from edgepipe.zoo import Preprocessing


def Spec(name: str, shape: tuple[int, ...], dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, shape, dtype)


IMAGE = Spec("x", (1, 3, 4, 5))


def rows(count: int, *shape: int) -> np.ndarray:
    return np.arange(count * int(np.prod(shape)), dtype=np.float32).reshape(count, *shape)


def gather(samples: Samples, name: str = "x") -> np.ndarray:
    return np.concatenate([run[name] for run in samples])


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


def test_npz_gives_one_run_at_a_time_with_labels(tmp_path: Path) -> None:
    x, labels = rows(7, 3, 4, 5), np.arange(7)
    samples = open_data(save(tmp_path / "d.npz", x=x, labels=labels), [IMAGE])
    assert samples.count == 7
    assert {run["x"].shape for run in samples} == {(1, 3, 4, 5)}
    np.testing.assert_array_equal(gather(samples), x)
    np.testing.assert_array_equal(gather(samples), x)  # can be read again
    assert samples.labels is not None
    np.testing.assert_array_equal(samples.labels, labels)
    assert not samples.synthetic


def test_batches_are_of_the_models_size(tmp_path: Path) -> None:
    x = rows(6, 2)
    samples = open_data(save(tmp_path / "d.npz", x=x), [Spec("x", (3, 2))])
    assert samples.count == 2
    np.testing.assert_array_equal(gather(samples), x)


def test_fortran_order_is_read_right(tmp_path: Path) -> None:
    x = np.asfortranarray(rows(4, 3, 4, 5))
    np.testing.assert_array_equal(gather(open_data(save(tmp_path / "d.npz", x=x), [IMAGE])), x)


def test_an_input_given_once_serves_every_run(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", x=rows(3, 2), scale=np.float32(2.0))
    runs = list(open_data(path, [Spec("x", (1, 2)), Spec("scale", ())]))
    assert len(runs) == 3
    assert all(run["scale"] == 2.0 for run in runs)


def test_chunks_cover_everything_in_order() -> None:
    samples = from_arrays({"x": rows(7, 2)}, [Spec("x", (1, 2))], "arrays")
    assert [len(chunk) for chunk in samples.chunks(3)] == [3, 3, 1]


def test_reading_does_not_hold_the_whole_file(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", x=np.zeros((200, 1, 200, 200), np.float32))  # 32 MB
    samples = open_data(path, [Spec("x", (1, 1, 200, 200))])
    tracemalloc.start()
    assert sum(1 for _ in samples) == 200
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


nan = rows(2, 3, 4, 5)
nan[1, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"y": rows(1, 3, 4, 5)}, "'y' is not an input of the model; known: labels, x"),
        ({"labels": np.arange(1)}, "input 'x' is missing; it has labels"),
        (
            {"x": rows(1, 3, 4, 6)},
            "shape [1, 3, 4, 6]; the model takes [1, 3, 4, 5] or [N, 3, 4, 5]",
        ),
        ({"x": rows(3, 4, 5)}, "shape [3, 4, 5]"),
        ({"x": rows(0, 3, 4, 5)}, "shape [0, 3, 4, 5]"),
        ({"x": rows(1, 3, 4, 5).astype(complex)}, "complex128, the model wants float32; save it"),
        ({"x": rows(2, 3, 4, 5), "labels": np.arange(3)}, "'labels' is int64[3]"),
        ({"x": rows(2, 3, 4, 5), "labels": np.zeros(2)}, "'labels' is float64[2]"),
        ({"x": nan}, "input 'x' of sample 1 contains NaN"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, arrays: dict, said: str) -> None:
    path = save(tmp_path / "d.npz", **arrays)
    with pytest.raises(UserError) as caught:
        list(open_data(path, [IMAGE]))
    assert said in str(caught.value)
    assert "d.npz" in str(caught.value)


def test_dtypes_of_the_same_kind_are_converted(tmp_path: Path) -> None:
    specs = [Spec("x", (1, 2)), Spec("i", (1, 2), "int32")]
    path = save(tmp_path / "d.npz", x=np.ones((3, 2)), i=np.ones((3, 2), np.int64))
    assert [run["x"].dtype.name for run in open_data(path, specs)] == ["float32"] * 3
    assert [run["i"].dtype.name for run in open_data(path, specs)] == ["int32"] * 3
    path = save(tmp_path / "d.npz", x=np.ones((3, 2)), i=np.full((3, 2), 2**40))
    with pytest.raises(UserError, match="input 'i' of sample 0 does not fit int32"):
        list(open_data(path, specs))


def test_inputs_of_different_length_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", a=rows(2, 2), b=rows(3, 2))
    with pytest.raises(UserError, match="'a' for 2 runs, 'b' for 3 runs"):
        open_data(path, [Spec("a", (1, 2)), Spec("b", (1, 2))])


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="never unpickled"):
        open_data(path, [IMAGE])


@pytest.mark.parametrize("damage", ["truncated", "text", "flipped"])
def test_a_damaged_file_is_a_user_error(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path / "d.npz", x=rows(50, 3, 4, 5))
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "text":
        data = bytearray(b"no archive")
    else:
        data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"d\.npz"):
        list(open_data(path, [IMAGE]))


def test_a_name_that_is_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'digits'"):
        open_data("digit", [IMAGE])


def test_folder_of_npy_with_and_without_the_batch_dimension(tmp_path: Path) -> None:
    x = rows(3, 3, 4, 5)
    np.save(tmp_path / "a.npy", x[0])
    np.save(tmp_path / "b.npy", x[1:2])
    np.save(tmp_path / "c.npy", x[2])
    samples = open_data(tmp_path, [IMAGE])
    assert samples.count == 3
    np.testing.assert_array_equal(gather(samples), x)


def test_folder_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.npy files and no images"):
        open_data(tmp_path, [IMAGE])
    np.save(tmp_path / "a.npy", rows(2, 3, 4, 5))
    with pytest.raises(UserError, match=r"a\.npy: holds 2 samples"):
        list(open_data(tmp_path, [IMAGE]))
    with pytest.raises(UserError, match="models with one input"):
        open_data(tmp_path, [IMAGE, Spec("y", (1,))])


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_images_follow_the_preprocessing(tmp_path: Path, order: str) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((4, 5, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = 255, 128, 0
    image.fromarray(pixels).save(tmp_path / "a.png")
    steps = Preprocessing(raw=f"{order}, 0…255", scale=1 / 255, mean=(0.5,), std=(0.25,))
    (run,) = open_data(tmp_path, [IMAGE], steps)
    channels = np.float32([255, 128, 0] if order == "RGB" else [0, 128, 255])
    expected = (channels / 255 - 0.5) / 0.25
    np.testing.assert_allclose(run["x"][0, :, 2, 3], expected, rtol=1e-5, atol=1e-6)


def test_images_are_resized_and_grey_where_the_model_is(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (9, 7), (255, 255, 255)).save(tmp_path / "a.jpg")
    (run,) = open_data(tmp_path, [Spec("x", (1, 1, 4, 5))])
    assert run["x"].shape == (1, 1, 4, 5)
    np.testing.assert_allclose(run["x"], 1.0, atol=1e-6)
    (tmp_path / "b.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"b\.jpg: not a readable image"):
        list(open_data(tmp_path, [Spec("x", (1, 1, 4, 5))]))


def test_the_digits_ship_with_labels_and_their_sha256() -> None:
    samples = open_data("digits", [Spec("image", (1, 1, 8, 8))])
    assert samples.labels is not None
    assert samples.count == len(samples.labels) > 300
    assert gather(samples, "image").max() <= 16


def test_a_data_set_of_images_with_a_sampler(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 5, 3), dtype=np.uint8)
    path = save(tmp_path / "set.npz", images=images, labels=np.arange(10))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    text = f"""
name = "set"
summary = "ten images"
source = "set.npz"
sha256 = "{digest}"
images = "images"
[preprocessing]
raw = "RGB, 0…255"
scale = 0.00392156862745098
[sampler]
order = "shuffled"
count = 4
seed = 3
"""
    (tmp_path / "set.toml").write_text(text, encoding="utf-8")
    samples = named.open_named("set", [IMAGE], tmp_path)
    assert samples.count == 4
    assert samples.labels is not None
    expected = images[samples.labels].transpose(0, 3, 1, 2).astype(np.float32) / 255
    np.testing.assert_allclose(gather(samples), expected, atol=1e-6)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match="sha256"):
        named.open_named("set", [IMAGE], tmp_path)


def test_calibration_digits_are_none_of_those_held_out() -> None:
    spec = [Spec("image", (1, 1, 8, 8))]
    train, held = (gather(open_data(name, spec), "image") for name in ("digits-train", "digits"))
    assert len(train) == 256
    assert train.max() == held.max() == 16
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in held}


def test_a_file_of_ones_own_says_how_images_become_inputs(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    raw = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(raw).save(tmp_path / "images" / "a.png")
    path = tmp_path / "mine.toml"
    text = """
name = "mine"
summary = "one image"
source = "images"
[preprocessing]
raw = "BGR, 0…255"
mean = [127.5]
std = [127.5]
"""
    path.write_text(text, encoding="utf-8")
    samples = open_data(path, [IMAGE])
    assert samples.description.startswith("data set 'mine': images/ (1 files")
    expected = ((raw[..., ::-1].astype(np.float32) - 127.5) / 127.5).transpose(2, 0, 1)
    np.testing.assert_allclose(gather(samples)[0], expected, atol=1e-6)
    path.write_text(text + "[sampler]\ncount = 1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"'sampler' and 'images' belong to an \.npz"):
        open_data(path, [IMAGE])
    with pytest.raises(UserError, match=r"nowhere\.toml: no such file"):
        open_data(tmp_path / "nowhere.toml", [IMAGE])


def test_synthetic_inputs_are_seeded_and_say_so() -> None:
    specs = [Spec("x", (1, 5)), Spec("ids", (1, 5), "int64"), Spec("mask", (1, 5), "bool")]
    first, again = list(synthetic(specs, runs=3)), list(synthetic(specs, runs=3))
    for a, b in zip(first, again, strict=True):
        for spec in specs:
            np.testing.assert_array_equal(a[spec.name], b[spec.name])
            assert a[spec.name].dtype == spec.dtype
    assert not np.array_equal(first[0]["x"], first[1]["x"])
    assert synthetic(specs).synthetic


def test_outputs_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    write_npz(path, {"y/with slash": rows(2, 3)})
    np.testing.assert_array_equal(np.load(path)["y/with slash"], rows(2, 3))
    with pytest.raises(AttributeError):
        write_npz(path, {"y": None})  # type: ignore[dict-item]
    assert [p.name for p in tmp_path.iterdir()] == ["out.npz"]
    np.testing.assert_array_equal(np.load(path)["y/with slash"], rows(2, 3))
    assert read_npz(path, [Spec("y/with slash", (1, 3))])["y/with slash"].shape == (2, 3)


def test_an_image_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", b""), chunk(b"IEND", b"")
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    (tmp_path / "0.png").write_bytes(bomb)
    with pytest.raises(UserError, match=r"0\.png: not a readable image"):
        list(open_data(tmp_path, [TensorSpec("x", (1, 3, 8, 8), "float32")]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("source = 5", "'source' must be text"),
        ('source = "i.npz"\nsampler = 1.5', "'sampler' must be a table"),
        ('source = "i.npz"\nsampler = {seed = "x"}', "'sampler.seed' must be a whole number"),
        ('source = "i.npz"\nsampler = {seed = -1}', "sampler.seed must be 0 or more"),
        ('source = "i.npz"\npreprocessing = {mean = ["a"]}', "'preprocessing.mean[0]' must be"),
        ('source = "i.npz"\npreprocessing = {std = [0]}', "preprocessing.std must not be 0"),
        ('source = "i.npz"\nimages = "x"\npreprocessing = {mean = [1, 2]}', "2 values for 3"),
        ('source = "i.npz"\nimages = "labels"', "'labels' is int64[2], not images"),
        ('source = "i.npz"\nimages = "none"', "no array 'none'"),
    ],
)
def test_hostile_data_set_files_are_one_line(tmp_path: Path, text: str, said: str) -> None:
    np.savez(tmp_path / "i.npz", x=np.zeros((2, 8, 8, 3), np.uint8), labels=np.arange(2))
    (tmp_path / "s.toml").write_text(f'name = "s"\nsummary = ""\n{text}\n', encoding="utf-8")
    with pytest.raises(UserError) as caught:
        list(open_data(tmp_path / "s.toml", [TensorSpec("x", (1, 3, 8, 8), "float32")]))
    assert said in str(caught.value)


@pytest.mark.parametrize("steps", [{"scale": 1e200}, {"mean": (1e39,)}, {"std": (1e-300,)}])
def test_steps_that_float32_does_not_hold_are_refused(steps: dict[str, object]) -> None:
    images = np.ones((1, 4, 4, 3), np.float32)
    with pytest.raises(UserError, match="numbers that float32 does not hold"):
        apply(images, Preprocessing(**steps))
    assert np.array_equal(apply(images, Preprocessing()), np.ones((1, 3, 4, 4), np.float32))
