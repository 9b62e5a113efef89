"""Loaders read small sets in the formats of the large ones, and name what is missing or damaged."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.paper.batches import large_batches
from benchmarks.paper.data import DamagedFileError, Dataset, MissingDataError, Split, load
from benchmarks.paper.data.fashion_scenes import CLASSES as SCENE_CLASSES
from sbp_fast.data import fashion_mnist as idx_files

PIXELS = 32
Load = Callable[..., Dataset]


@pytest.fixture(name="read")
def _read(tmp_path: Path) -> Load:
    """Loads with a cache of the test's own."""

    def read(name: str, folder: Path | None, pixels: int = PIXELS, **options: bool) -> Dataset:
        return load(name, folder, tmp_path / "cache", pixels, **options)

    return read


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def check(split: Split, images: tuple[int, ...], targets: tuple[int, ...]) -> None:
    assert isinstance(split.images, np.memmap)
    assert isinstance(split.targets, np.memmap)
    assert split.images.dtype == np.uint8
    assert (split.images.shape, split.targets.shape) == (images, targets)


# Fashion-MNIST


def make_fashion_mnist(folder: Path, train: int = 40, test: int = 20) -> Path:
    """As the original files are: idx, gzipped."""
    folder.mkdir()
    for (images, labels), count in zip(
        (idx_files.FILES[:2], idx_files.FILES[2:]), (train, test), strict=True
    ):
        for name, array in (
            (images, noise(count, 28, 28)),
            (labels, (np.arange(count) % 10).astype(np.uint8)),
        ):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            (folder / name).write_bytes(gzip.compress(header + array.tobytes(), mtime=0))
    return folder


def test_fashion_mnist_lies_in_a_frame(read: Load, tmp_path: Path) -> None:
    data = read("fashion-mnist", make_fashion_mnist(tmp_path / "data"))
    check(data.train, (40, 1, 32, 32), (40,))
    check(data.test, (20, 1, 32, 32), (20,))
    assert (data.train.images[:, 0, 2:30, 2:30] == noise(40, 28, 28)).all()
    assert data.train.images[:, :, :2].max() == 0
    assert data.train.targets[:12].tolist() == [*range(10), 0, 1]
    assert data.classes == 10


def test_fashion_mnist_is_decoded_once(read: Load, tmp_path: Path) -> None:
    folder = make_fashion_mnist(tmp_path / "data")
    read("fashion-mnist", folder)
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "cache").rglob("*"))
    read("fashion-mnist", folder)
    after = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "cache").rglob("*"))
    assert before == after


def test_scenes_have_a_label_for_every_pixel(read: Load, tmp_path: Path) -> None:
    data = read("fashion-scenes", make_fashion_mnist(tmp_path / "data"))
    check(data.train, (40, 1, 32, 32), (40, 32, 32))
    assert data.train.targets.dtype == np.uint8
    assert data.train.targets.max() < data.classes == SCENE_CLASSES
    # What is background is black, what is not is brighter than the threshold.
    background = data.train.targets == 0
    assert data.train.images[:, 0][background].max() == 0
    assert data.train.images[:, 0][~background].min() > 40
    # A scene has four garments of 14 x 14 pixels at most.
    assert (~background).sum((1, 2)).max() <= 4 * 14 * 14
    assert (~background).any((1, 2)).all()


def test_scenes_are_the_same_every_time(tmp_path: Path) -> None:
    folder = make_fashion_mnist(tmp_path / "data")
    first, second = (
        load("fashion-scenes", folder, tmp_path / cache, PIXELS) for cache in ("a", "b")
    )
    assert (first.train.images == second.train.images).all()
    assert (first.train.targets == second.train.targets).all()
    assert not (first.train.images[:20] == first.test.images).all()


@pytest.mark.parametrize(("name", "pixels"), [("fashion-mnist", 27), ("fashion-scenes", 13)])
def test_too_few_pixels_are_refused(read: Load, name: str, pixels: int) -> None:
    with pytest.raises(ValueError, match="or more"):
        read(name, None, pixels)


# CIFAR


def make_cifar_10(folder: Path) -> Path:
    folder.mkdir()
    for number, name in enumerate(
        [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    ):
        rows = noise(4, 1 + 3072)
        rows[:, 0] = (np.arange(4) + number) % 10
        (folder / name).write_bytes(rows.tobytes())
    return folder


def test_cifar_10(read: Load, tmp_path: Path) -> None:
    data = read("cifar-10", make_cifar_10(tmp_path / "data"))
    check(data.train, (20, 3, 32, 32), (20,))
    check(data.test, (4, 3, 32, 32), (4,))
    assert (data.train.images[5] == noise(4, 3073)[1, 1:].reshape(3, 32, 32)).all()
    assert data.train.targets[:6].tolist() == [0, 1, 2, 3, 1, 2]


def test_cifar_100_has_the_fine_labels(read: Load, tmp_path: Path) -> None:
    rows = noise(3, 2 + 3072)
    rows[:, 0], rows[:, 1] = (1, 2, 3), (97, 98, 99)
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(rows.tobytes())
    data = read("cifar-100", tmp_path)
    assert data.train.targets.tolist() == [97, 98, 99]
    assert (data.test.images[2] == rows[2, 2:].reshape(3, 32, 32)).all()
    assert data.classes == 100


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def mislabel(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3073] = 10
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "said"),
    [(truncate, "ends within record 3"), (mislabel, "record 1 has the label 10")],
)
def test_damaged_cifar_is_named_and_counted_only_when_asked(
    read: Load, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    folder = make_cifar_10(tmp_path / "data")
    damage(folder / "data_batch_2.bin")
    with pytest.raises(DamagedFileError, match=rf"data_batch_2\.bin.*{said}.*--skip-damaged"):
        read("cifar-10", folder)
    for _decoded_then_read in range(2):
        data = read("cifar-10", folder, skip_damaged=True)
        assert (len(data.train), len(data.test), data.skipped) == (19, 4, 1)
        assert "1 damaged" in data.describe()


def test_cifar_keeps_its_size(read: Load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="have 32"):
        read("cifar-10", make_cifar_10(tmp_path / "data"), 64)


# Photographs


def save(path: Path, array: NDArray[np.uint8], **options: object) -> Path:
    images = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    images.fromarray(array).save(path, **options)
    return path


def make_imagenet(folder: Path) -> Path:
    for split, count in (("train", 3), ("val", 2)):
        for brightness, name in ((40, "n01440764"), (200, "n02102040")):
            for number in range(count):
                image = np.full((48, 40 + 8 * number, 3), brightness, np.uint8)
                save(folder / split / name / f"{name}_{number}.JPEG", image)
    return folder


def test_imagenet_folders(read: Load, tmp_path: Path) -> None:
    data = read("imagenet", make_imagenet(tmp_path / "data"))
    check(data.train, (6, 3, 32, 32), (6,))
    check(data.test, (4, 3, 32, 32), (4,))
    assert data.train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.abs(data.train.images.mean((1, 2, 3)) - [40, 40, 40, 200, 200, 200]).max() < 3


def test_middle_square_is_taken(read: Load, tmp_path: Path) -> None:
    make_imagenet(tmp_path)
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    save(tmp_path / "train" / "n01440764" / "n01440764_0.JPEG", wide, quality=100, subsampling=0)
    assert read("imagenet", tmp_path).train.images[0].min() > 200


def test_truncated_photograph_is_named_and_counted_only_when_asked(
    read: Load, tmp_path: Path
) -> None:
    make_imagenet(tmp_path)
    victim = save(tmp_path / "train" / "n02102040" / "n02102040_1.JPEG", noise(64, 64, 3))
    victim.write_bytes(victim.read_bytes()[:2000])
    with pytest.raises(DamagedFileError, match=r"n02102040_1\.JPEG.*no whole image"):
        read("imagenet", tmp_path)
    data = read("imagenet", tmp_path, skip_damaged=True)
    assert (len(data.train), data.skipped) == (5, 1)


def test_class_without_training_images_is_named(read: Load, tmp_path: Path) -> None:
    make_imagenet(tmp_path)
    save(tmp_path / "val" / "n09999999" / "stray.JPEG", noise(32, 32, 3))
    with pytest.raises(DamagedFileError, match=r"stray\.JPEG.*n09999999"):
        read("imagenet", tmp_path)
    assert read("imagenet", tmp_path, skip_damaged=True).skipped == 1


def make_flower_102(folder: Path, labels: tuple[int, ...] = (1, 102, 5, 7, 7, 50)) -> Path:
    scipy_io = pytest.importorskip("scipy.io", reason="Flower-102's labels are MATLAB files")
    for number in range(1, 7):
        save(
            folder / "jpg" / f"image_{number:05d}.jpg", np.full((40, 50, 3), 20 * number, np.uint8)
        )
    scipy_io.savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    sets = {"trnid": [[2, 1]], "valid": [[3]], "tstid": [[6, 5, 4]]}
    scipy_io.savemat(
        folder / "setid.mat", {key: np.array(ids, np.uint16) for key, ids in sets.items()}
    )
    return folder


def test_flower_102(read: Load, tmp_path: Path) -> None:
    data = read("flower-102", make_flower_102(tmp_path / "data"))
    check(data.train, (3, 3, 32, 32), (3,))
    assert data.train.targets.tolist() == [101, 0, 4]
    assert data.test.targets.tolist() == [49, 6, 6]
    assert np.abs(data.test.images.mean((1, 2, 3)) - [120, 100, 80]).max() < 3
    assert data.classes == 102


def test_flower_of_no_class_and_missing_image_are_named(read: Load, tmp_path: Path) -> None:
    folder = make_flower_102(tmp_path / "data", labels=(1, 103, 5, 7, 7, 50))
    with pytest.raises(DamagedFileError, match=r"image_00002\.jpg.*is 103, expected 1\.\.102"):
        read("flower-102", folder)
    (folder / "jpg" / "image_00005.jpg").unlink()
    data = read("flower-102", folder, skip_damaged=True)
    assert (len(data.train), len(data.test), data.skipped) == (2, 2, 2)


def test_damaged_label_file_is_named_in_any_case(read: Load, tmp_path: Path) -> None:
    folder = make_flower_102(tmp_path / "data")
    (folder / "imagelabels.mat").write_bytes(b"no MATLAB file" * 20)
    with pytest.raises(DamagedFileError, match=r"imagelabels\.mat"):
        read("flower-102", folder, skip_damaged=True)


def make_carvana(folder: Path) -> Path:
    for car in range(5):
        for view in (1, 2):
            name = f"{car:012x}_{view:02d}"
            save(folder / "train" / f"{name}.jpg", np.full((40, 60, 3), 50 * car, np.uint8))
            mask = np.zeros((40, 60), np.uint8)
            mask[10:30, 20:40] = 255
            save(folder / "train_masks" / f"{name}_mask.gif", mask)
    return folder


def test_carvana_pairs(read: Load, tmp_path: Path) -> None:
    data = read("carvana", make_carvana(tmp_path / "data"))
    check(data.train, (8, 3, 32, 32), (8, 32, 32))
    # The fifth car, whole: both of its views.
    check(data.test, (2, 3, 32, 32), (2, 32, 32))
    assert np.abs(data.test.images.astype(int) - 200).max() < 4
    assert set(np.unique(data.train.targets)) == {0, 1}
    assert data.train.targets.mean() == pytest.approx(0.25)


def lose(path: Path) -> None:
    path.unlink()


def shrink(path: Path) -> None:
    save(path, np.zeros((20, 20), np.uint8))


@pytest.mark.parametrize(("damage", "said"), [(lose, "no image"), (shrink, "a mask of")])
def test_mask_that_does_not_fit_is_named(
    read: Load, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    folder = make_carvana(tmp_path / "data")
    damage(folder / "train_masks" / "000000000001_02_mask.gif")
    with pytest.raises(DamagedFileError, match=rf"000000000001_02_mask\.gif.*{said}"):
        read("carvana", folder)
    assert (len(read("carvana", folder, skip_damaged=True).train)) == 7


# What is not there


@pytest.mark.parametrize(
    ("name", "flag", "origin"),
    [
        ("cifar-10", "--classification-folder", "cifar-10-binary"),
        ("cifar-100", "--classification-folder", "cifar-100-binary"),
        ("flower-102", "--classification-folder", "robots.ox.ac.uk"),
        ("imagenet", "--classification-folder", "image-net.org"),
        ("carvana", "--segmentation-folder", "kaggle.com"),
    ],
)
def test_missing_data_says_where_to_get_it_and_which_flag(
    read: Load, tmp_path: Path, name: str, flag: str, origin: str
) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(MissingDataError) as error:
            read(name, folder)
        assert flag in str(error.value)
        assert origin in str(error.value)


def test_unknown_data_set_is_refused(read: Load) -> None:
    with pytest.raises(ValueError, match="expected one of fashion-mnist"):
        read("mnist", None)


def test_interrupted_decoding_leaves_nothing_behind(read: Load, tmp_path: Path) -> None:
    folder = make_cifar_10(tmp_path / "data")
    mislabel(folder / "data_batch_1.bin")
    with pytest.raises(DamagedFileError):
        read("cifar-10", folder)
    assert list((tmp_path / "cache").iterdir()) == []


# Large batches


def test_order_of_batches_is_the_seeds() -> None:
    split = Split(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), np.arange(10))

    def drawn(seed: int) -> list[list[int]]:
        batches = large_batches(split, 4, seed)
        return [next(batches)[1].tolist() for _ in range(4)]

    assert drawn(0) == drawn(0) != drawn(1)
    # Two batches make an epoch, in which no sample comes twice.
    for first, second in (drawn(0)[:2], drawn(0)[2:]):
        assert len({*first, *second}) == 8


def test_batch_larger_than_the_data_is_refused() -> None:
    split = Split(np.zeros((3, 1, 1, 1), np.uint8), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="a batch of 4 samples, but the data set has 3"):
        next(large_batches(split, 4, 0))
