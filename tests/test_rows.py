"""Rows by index: what they look like, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sbp_fast.batches import count_samples, is_stream, split
from sbp_fast.data import Rows


class TestRows:
    def test_look_like_the_tensor(self) -> None:
        images, index = torch.randn(23, 3, 6, 5), torch.randint(0, 23, (13,))
        rows = Rows(images, index)
        assert rows.shape == (13, 3, 6, 5)
        assert rows.dtype == torch.float32
        assert (len(rows), rows.ndim) == (13, 4)
        assert repr(rows) == "Rows(shape=(13, 3, 6, 5), dtype=torch.float32)"
        assert torch.equal(rows.gather(), images[index])
        part = rows[4:9]
        assert isinstance(part, Rows)
        assert torch.equal(part.gather(), images[index[4:9]])
        assert torch.equal(rows[-2:].gather(), images[index[-2:]])

    @pytest.mark.parametrize("dtype", ["u1", "i2", "i8", "f2", "f4", "f8", "?"])
    def test_dtypes(self, dtype: str) -> None:
        rows = Rows(np.ones((4, 2), dtype), [1, 3, 1])
        assert rows.gather().dtype == rows.dtype == torch.from_numpy(np.ones(1, dtype)).dtype

    def test_are_a_leaf_with_samples(self) -> None:
        rows = Rows(torch.ones(4, 2), [0, 1, 0])
        assert not is_stream(rows)
        assert count_samples({"x": rows}, torch.ones(3)) == 3
        pieces = split(rows, None, 2, with_targets=False)
        assert [piece.inputs.shape for piece in pieces] == [(2, 2), (1, 2)]

    def test_the_index_is_copied(self) -> None:
        index = torch.tensor([0, 1])
        rows = Rows(torch.arange(3), index)
        index[0] = 99
        assert rows.gather().tolist() == [0, 1]

    @pytest.mark.parametrize(
        ("source", "index", "error", "words"),
        [
            (
                torch.ones(3),
                [0, 3],
                IndexError,
                "index[1] is 3; it must be at least 0 and less than 3",
            ),
            (torch.ones(3), [-1], IndexError, "index[0] is -1; it must be at least 0"),
            (
                torch.ones(3),
                [[0]],
                ValueError,
                "index has shape (1, 1); it must have shape (samples,)",
            ),
            (torch.ones(3), [0.5], TypeError, "index is torch.float32; it must be integers"),
            (
                torch.ones(3),
                torch.ones(3) > 0,
                TypeError,
                "index is torch.bool; it must be integers",
            ),
            ([1, 2], [0], TypeError, "source is a list; it must be a tensor or a NumPy array"),
            (torch.tensor(1), [0], ValueError, "source has no dimension; it must have shape"),
            (
                np.array(["a"]),
                [0],
                TypeError,
                "source is an array of <U1, which torch does not know",
            ),
            (
                np.ones(3, ">f4"),
                [0],
                TypeError,
                "source is an array of >f4, which torch does not know",
            ),
            (
                torch.ones(3, requires_grad=True),
                [0],
                ValueError,
                "source requires gradients, which rows do not pass on; pass source.detach()",
            ),
        ],
        ids=str,
    )
    def test_refused(self, source: Any, index: Any, error: type[Exception], words: str) -> None:
        with pytest.raises(error) as caught:
            Rows(source, index)
        assert words in str(caught.value)

    @pytest.mark.parametrize("samples", [0, slice(None, None, 2), slice(None, None, -1)])
    def test_are_cut_with_slices_alone(self, samples: Any) -> None:
        with pytest.raises(TypeError, match="a slice of step 1"):
            Rows(torch.ones(3), [0, 1])[samples]

    def test_no_rows_are_no_batch(self) -> None:
        with pytest.raises(ValueError, match="inputs has 0 samples"):
            count_samples(Rows(torch.ones(3, 2), []), None)
