"""The slice that ships, where the full set is looked for, and damaged files."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from sbp_fast.data import fashion_mnist, load_fashion_mnist
from sbp_fast.data.fashion_mnist import (
    ENVIRONMENT_VARIABLE,
    FILES,
    SLICE_NAME,
    TEST_LABELS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
)

DATA = Path(fashion_mnist.__file__).parent
SCRIPT = DATA.parents[1] / "examples" / "data" / "make_fashion_mnist_slice.py"


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def write(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content, mtime=0))


def make_full_set(directory: Path, train: int = 40, test: int = 20) -> Path:
    """A full set in small: random images, labels 0..9 in turn."""
    generator = np.random.default_rng(0)
    directory.mkdir(exist_ok=True)
    for (images, labels), count in zip((FILES[:2], FILES[2:]), (train, test), strict=True):
        write(directory / images, idx(generator.integers(0, 256, (count, 28, 28))))
        write(directory / labels, idx(np.arange(count) % 10))
    return directory


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(fashion_mnist, "SYSTEM_DIRECTORY", tmp_path / "not installed")


def test_slice_is_balanced_and_within_its_size() -> None:
    data = load_fashion_mnist()
    assert "slice" in data.describe()
    assert "9,000 training and 2,000 test" in data.describe()
    for images, labels, each in (
        (data.train_images, data.train_labels, 900),
        (data.test_images, data.test_labels, 200),
    ):
        assert images.shape == (10 * each, 28, 28)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert torch.bincount(labels).tolist() == [each] * 10
    assert (DATA / SLICE_NAME).stat().st_size <= 5_000_000


def test_slice_holds_real_images_of_their_classes() -> None:
    """The nearest class mean labels most test images rightly: no noise, no shuffled labels."""
    data = load_fashion_mnist()
    train, test = data.train_images.flatten(1).float(), data.test_images.flatten(1).float()
    means = torch.stack([train[data.train_labels == label].mean(0) for label in range(10)])
    guesses = torch.cdist(test, means).argmin(1)
    assert (guesses == data.test_labels).float().mean() > 0.6
    assert not set(map(bytes, data.train_images.numpy())) & set(
        map(bytes, data.test_images.numpy())
    )


def test_full_set_is_found_in_the_order_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {
        name: make_full_set(tmp_path / name, train)
        for name, train in (("system", 30), ("environment", 50), ("argument", 70))
    }
    monkeypatch.setattr(fashion_mnist, "SYSTEM_DIRECTORY", places["system"])
    assert len(load_fashion_mnist().train_labels) == 30
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(places["environment"]))
    assert len(load_fashion_mnist().train_labels) == 50
    data = load_fashion_mnist(places["argument"])
    assert len(data.train_labels) == 70
    assert data.describe() == (
        f"Fashion-MNIST, full set from {places['argument']}: 70 training and 20 test images"
    )
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert len(load_fashion_mnist().train_labels) == 30


def test_full_set_arrives_as_written(tmp_path: Path) -> None:
    data = load_fashion_mnist(make_full_set(tmp_path))
    expected = np.random.default_rng(0).integers(0, 256, (40, 28, 28))
    assert torch.equal(data.train_images, torch.from_numpy(expected.astype(np.uint8)))
    assert data.train_labels.tolist() == [i % 10 for i in range(40)]
    data.train_images.add_(1)  # its own memory, writable


def test_incomplete_system_directory_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "SYSTEM_DIRECTORY", make_full_set(tmp_path / "system"))
    (tmp_path / "system" / TEST_LABELS).unlink()
    assert "slice" in load_fashion_mnist().describe()


@pytest.mark.parametrize("by_environment", [True, False])
def test_named_directory_without_the_files_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    directory = make_full_set(tmp_path / "named")
    (directory / TEST_LABELS).unlink()
    if by_environment:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(directory))
    with pytest.raises(FileNotFoundError) as caught:
        load_fashion_mnist(None if by_environment else directory)
    message = str(caught.value)
    assert f"does not hold {TEST_LABELS}. " in message
    assert str(directory) in message
    assert (ENVIRONMENT_VARIABLE in message) == by_environment


IMAGES = idx(np.zeros((40, 28, 28)))
LABELS = idx(np.arange(40) % 10)


@pytest.mark.parametrize(
    ("name", "stored", "expected"),
    [
        (TRAIN_IMAGES, gzip.compress(IMAGES)[:-20], "expected a whole gzip file"),
        (TRAIN_IMAGES, b"<html>404</html>", "expected a whole gzip file"),
        (TRAIN_IMAGES, gzip.compress(IMAGES[:-100]), "31,260 bytes of data, expected 31,360"),
        (TRAIN_IMAGES, gzip.compress(IMAGES + b"x"), "31,361 bytes of data, expected 31,360"),
        (TRAIN_IMAGES, gzip.compress(IMAGES[:10]), "expected an idx file of unsigned bytes with 3"),
        (TRAIN_IMAGES, gzip.compress(LABELS), "0x00000801, expected an idx file"),
        (TRAIN_LABELS, gzip.compress(IMAGES), "0x00000803, expected an idx file"),
        (TRAIN_IMAGES, gzip.compress(b""), "expected an idx file"),
        (
            TRAIN_IMAGES,
            gzip.compress(idx(np.zeros((40, 32, 32)))),
            "32 x 32 pixels, expected 28 x 28",
        ),
        (TRAIN_LABELS, gzip.compress(idx(np.zeros(39))), "39 labels, expected 40"),
        (TRAIN_LABELS, gzip.compress(idx(np.arange(40))), "label 39, expected 0..9"),
    ],
)
def test_damaged_file_is_named_with_the_cure(
    tmp_path: Path, name: str, stored: bytes, expected: str
) -> None:
    (make_full_set(tmp_path) / name).write_bytes(stored)
    with pytest.raises(ValueError, match="Fetch the file again") as caught:
        load_fashion_mnist(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert expected in str(caught.value)


@pytest.fixture
def script() -> ModuleType:
    if not SCRIPT.is_file():
        pytest.skip("the examples are not part of an installed package")
    spec = importlib.util.spec_from_file_location("make_fashion_mnist_slice", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_makes_the_same_balanced_slice_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: ModuleType
) -> None:
    full = make_full_set(tmp_path / "full", train=9100, test=2100)
    outputs = [tmp_path / "first.npz", tmp_path / "second.npz"]
    monkeypatch.setattr(script, "LIMIT_BYTES", 10**8)
    for output in outputs:
        monkeypatch.setattr(sys, "argv", ["script", str(full), "--output", str(output)])
        script.main()
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    whole = load_fashion_mnist(full)
    with np.load(outputs[0]) as arrays:
        assert np.bincount(arrays["train_labels"]).tolist() == [900] * 10
        assert np.array_equal(arrays["train_images"], whole.train_images[:9000].numpy())
        assert np.array_equal(arrays["test_images"], whole.test_images[:2000].numpy())


def test_script_wants_enough_of_each_class(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="3 images of class 9, expected at least 4"):
        script.balanced(np.arange(39) % 10, 4)
