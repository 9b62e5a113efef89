"""The Triton batch norm ops on CPU tensors, interpreted, and how tensors are cut into tiles."""

from __future__ import annotations

import mmap
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.register_assert_rewrite("batch_norm_parity")

from batch_norm_parity import BatchNormParity, channels_last  # noqa: E402

from sbp_fast.ops import triton_backend, triton_batch_norm  # noqa: E402

MAP_NORESERVE = 0x4000  # Linux's; not every Python has a name for it

usable, _why = triton_backend.is_available()
interpreting = usable and triton_backend._import_kernels().INTERPRETED.value


def sparse(numel: int, dtype: torch.dtype) -> Tensor:
    """Address space of zeros; pages become memory when they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.mark.skipif(
    not interpreting,
    reason="Triton interprets only with TRITON_INTERPRET=1; on a CUDA device tests/gpu runs these",
)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, on infinities
class TestInterpreted(BatchNormParity):
    device = "cpu"

    def call(self, name: str, *arguments: Any) -> Tensor:
        result: Tensor = getattr(torch.ops.sbp_fast, name).triton(*arguments)
        return result

    @pytest.mark.parametrize("programs", [1, 3, 10])
    def test_programs_of_several_tiles(
        self, programs: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(triton_batch_norm, "_PROGRAMS", programs)
        for input in (
            self.random(3, 2, 60, 80),
            self.random(5, 3, 7, 9),
            self.random(1, 2, 70, 90),
            channels_last(self.random(3, 130, 9, 9)),
        ):
            over = triton_batch_norm.view(input.shape, input.stride(), input.itemsize)
            assert over.tiles_per_chunk > 1 or over.groups * over.tiles < 2 * programs
            self.check_statistics(input)
            self.check_backward_statistics(torch.ones_like(input), input)

    @pytest.mark.parametrize("planes", [True, False], ids=["planes", "columns"])
    def test_offsets_beyond_two_to_the_31(self, planes: bool) -> None:
        """Two lines that far apart, of tensors that are not there but for the first program's part."""
        pitch = 2**31 + 8
        channels = pitch // 8 if planes else pitch
        over = triton_batch_norm.View(planes, 2, channels, 8 if planes else pitch, 2)
        inputs, partials = sparse(2 * pitch, torch.float16), sparse(3 * channels, torch.float64)
        inputs[:8], inputs[pitch:][:8] = 1.0, 2.0
        kernels = triton_batch_norm._kernels_for("", inputs)
        kernels.statistics[(1,)](
            inputs, partials, *over.arguments, over.chunks, over.tiles_per_chunk, **over.options
        )
        count = 16.0 if planes else 2.0
        expected = [1.5, count / 4, count]
        assert [float(row[0]) for row in partials.view(3, channels)] == expected


class TestView:
    """Pure functions of shapes: no tensor is allocated, so sizes are no limit."""

    @staticmethod
    def of(
        shape: tuple[int, ...], strides: tuple[int, ...] | None = None
    ) -> triton_batch_norm.View:
        if strides is None:
            strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return triton_batch_norm.view(shape, strides, 4)

    def test_planes(self) -> None:
        assert self.of((2, 3, 4, 5)) == triton_batch_norm.View(True, 2, 3, 20, 4)

    def test_columns(self) -> None:
        assert self.of((2, 3)) == triton_batch_norm.View(False, 2, 3, 3, 4)
        last = self.of((2, 3, 4, 5), (60, 1, 15, 3))
        assert last == triton_batch_norm.View(False, 40, 3, 3, 4)

    def test_strides_of_dimensions_of_size_one_mean_nothing(self) -> None:
        assert self.of((2, 1, 4, 5), (20, 777, 5, 1)) == triton_batch_norm.View(True, 1, 1, 40, 4)
        assert self.of((1, 3, 4, 5), (0, 20, 5, 1)) == triton_batch_norm.View(True, 1, 3, 20, 4)
        assert self.of((2, 3, 1, 1), (3, 1, 3, 3)) == triton_batch_norm.View(False, 2, 3, 3, 4)

    @pytest.mark.parametrize("itemsize", [2, 4, 8])
    @pytest.mark.parametrize(
        "shape", [(2, 3), (7, 1000), (1, 3, 2**16, 2**16), (2**20, 64, 7, 7), (2**31 + 5, 2)]
    )
    def test_tiles_cover_everything(self, shape: tuple[int, ...], itemsize: int) -> None:
        strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
        over = triton_batch_norm.view(shape, strides, itemsize)
        lines, columns = over.tile
        assert lines * columns * itemsize <= 8192
        assert lines % 4 == 0 or (lines * columns % 4 == 0 and over.planes)
        assert over.lines * over.columns * (over.channels if over.planes else 1) == prod(shape)
        assert over.tiles_per_chunk * over.chunks >= over.tiles
        assert over.tiles_per_chunk * (over.chunks - 1) < over.tiles
        assert over.columns % over.width == 0
        # Enough for any device where there is enough to do; a grid has fewer than 2^31.
        assert over.groups * over.chunks >= min(over.groups * over.tiles, 4096)
        assert over.groups * over.tiles < 2**31

    def test_one_image_of_few_channels_still_fills_a_device(self) -> None:
        over = self.of((1, 3, 4096, 4096))
        assert 4096 <= over.groups * over.chunks < 2 * 4096 + 3
