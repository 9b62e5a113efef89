"""How a large batch is cut: every sample once, in order, as views."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from sbp_fast.batches import (
    as_tensor,
    count_samples,
    first_samples,
    is_stream,
    split,
    split_stream,
)

Point = namedtuple("Point", ["x", "y"])


class TestSplit:
    @given(samples=st.integers(1, 60), micro_batch_size=st.integers(1, 70))
    def test_every_sample_once_and_in_order(self, samples: int, micro_batch_size: int) -> None:
        inputs, targets = torch.arange(samples), torch.arange(samples) * 2
        pieces = split(inputs, targets, micro_batch_size, with_targets=True)
        assert torch.equal(torch.cat([piece.inputs for piece in pieces]), inputs)
        assert torch.equal(torch.cat([piece.targets for piece in pieces]), targets)
        assert [piece.samples for piece in pieces] == [len(piece.inputs) for piece in pieces]
        assert all(piece.samples == micro_batch_size for piece in pieces[:-1])
        assert 1 <= pieces[-1].samples <= micro_batch_size

    def test_pieces_are_views(self) -> None:
        inputs, targets = torch.arange(10.0), np.arange(10)
        pieces = split(inputs, targets, 4, with_targets=True)
        for piece in pieces:
            assert piece.inputs.untyped_storage().data_ptr() == inputs.untyped_storage().data_ptr()
            assert np.shares_memory(piece.targets, targets)

    def test_the_tree_keeps_its_form(self) -> None:
        inputs = {
            "point": Point(torch.arange(5), [np.arange(5), (torch.arange(5),)]),
            "ordered": OrderedDict(a=torch.arange(5)),
            "number": 3,
            "name": "adam",
            "nothing": None,
            "scalar": torch.tensor(7.0),
            "flag": True,
        }
        last = split(inputs, None, 3, with_targets=False)[-1]
        assert last.samples == 2
        assert last.targets is None
        point = last.inputs["point"]
        assert type(point) is Point
        assert point.x.tolist() == point.y[0].tolist() == point.y[1][0].tolist() == [3, 4]
        assert isinstance(point.y[0], np.ndarray)
        assert type(last.inputs["ordered"]) is OrderedDict
        assert last.inputs["ordered"]["a"].tolist() == [3, 4]
        for name in ("number", "name", "nothing", "scalar", "flag"):
            assert last.inputs[name] is inputs[name]

    def test_mappings_of_other_libraries(self) -> None:
        batch = UserDict(tokens=torch.arange(5), mask=torch.ones(5))
        last = split(batch, UserDict(labels=torch.arange(5)), 3, with_targets=True)[-1]
        assert last.inputs["tokens"].tolist() == [3, 4]
        assert last.targets["labels"].tolist() == [3, 4]

    def test_one_piece_for_a_size_beyond_the_batch(self) -> None:
        (piece,) = split(torch.arange(3), None, 2**40, with_targets=False)
        assert piece.samples == 3


class TestCount:
    def test_inputs_and_targets_agree(self) -> None:
        assert count_samples({"a": torch.ones(3, 2)}, [np.ones(3)]) == 3
        # Targets alone may say how many there are.
        assert count_samples({"scale": 2.0}, torch.ones(3)) == 3

    @pytest.mark.parametrize(
        ("inputs", "targets", "words"),
        [
            (torch.ones(3), torch.ones(4), "targets has 4 samples but inputs has 3"),
            ([torch.ones(3), torch.ones(2)], None, "inputs[1] has 2 samples but inputs[0] has 3"),
            (
                {"a": torch.ones(3)},
                {"b": Point(torch.ones(3), torch.ones(5))},
                "targets['b'].y has 5 samples but inputs['a'] has 3",
            ),
            (
                torch.ones(0, 3),
                torch.ones(0),
                "inputs has 0 samples; a large batch needs at least one",
            ),
            (None, None, "the batch holds no tensor with a first dimension to split"),
            ({"a": range(3)}, None, "inputs['a'] is a range; a batch is made of tensors and NumPy"),
            (torch.ones(3), {1, 2, 3}, "targets is a set; a batch is made of tensors and NumPy"),
        ],
        ids=["lengths", "list", "named_tuple", "empty", "nothing", "range", "set"],
    )
    def test_refused(self, inputs: Any, targets: Any, words: str) -> None:
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (the words are asserted below)
            count_samples(inputs, targets)
        assert words in str(caught.value)


class TestStreams:
    def test_what_is_a_stream(self) -> None:
        loader = DataLoader(TensorDataset(torch.ones(3)), batch_size=2)
        for stream in (iter([1]), (x for x in "ab"), loader, range(3), map(len, [])):
            assert is_stream(stream)
        for tree in (torch.ones(3), np.ones(3), [1], (1,), {}, UserDict(), None, 3, Point(1, 2)):
            assert not is_stream(tree)

    @given(
        sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
        micro_batch_size=st.integers(1, 13),
    )
    def test_items_are_cut_and_never_joined(self, sizes: list[int], micro_batch_size: int) -> None:
        items = torch.arange(sum(sizes)).split(sizes)
        pieces = list(split_stream(((x, -x) for x in items), micro_batch_size, with_targets=True))
        assert torch.equal(torch.cat([piece.inputs for piece in pieces]), torch.cat(items))
        assert all(torch.equal(piece.inputs, -piece.targets) for piece in pieces)
        assert len(pieces) == sum(-(-size // micro_batch_size) for size in sizes)
        assert max(piece.samples for piece in pieces) <= micro_batch_size

    def test_an_item_is_read_when_its_turn_comes(self) -> None:
        read: list[int] = []

        def stream() -> Iterator[Tensor]:
            for index in range(3):
                read.append(index)
                yield torch.ones(2)

        pieces = split_stream(stream(), 2, with_targets=False)
        assert read == []
        assert next(pieces).targets is None
        assert read == [0]

    def test_a_later_empty_item(self) -> None:
        pieces = split_stream(iter([torch.ones(2), torch.ones(0)]), 2, with_targets=False)
        next(pieces)
        with pytest.raises(ValueError, match="inputs has 0 samples"):
            next(pieces)


class TestFirstSamples:
    def test_are_those_of_what_a_piece_was_cut_from(self) -> None:
        inputs, targets = {"x": torch.arange(7), "flag": "kept"}, np.arange(7)
        for piece in split(inputs, targets, 2, with_targets=True):
            first = first_samples(piece, 5)
            assert torch.equal(first.inputs["x"], torch.arange(5))
            assert first.inputs["flag"] == "kept"
            assert first.targets.tolist() == list(range(5))
            assert first.samples == 5

    def test_of_an_item_of_a_stream(self) -> None:
        x = torch.arange(6.0)
        pieces = split_stream(iter([x[:2], x[2:]]), 1, with_targets=False)
        found = [first_samples(piece, 3).inputs.tolist() for piece in pieces]
        assert found == [[0, 1]] * 2 + [[2, 3, 4]] * 4


class TestArrays:
    def test_an_ordinary_array_is_not_copied(self) -> None:
        array = np.arange(5.0)
        tensor = as_tensor(array[1:])
        tensor[0] = 9.0
        assert array[1] == 9.0

    def test_what_cannot_be_written_is_copied(self, tmp_path: Any) -> None:
        np.save(tmp_path / "array.npy", np.arange(5))
        for mode in ("r", "r+", "c"):
            mapped = np.load(tmp_path / "array.npy", mmap_mode=mode)
            as_tensor(mapped[1:])[0] = 9
            assert mapped.tolist() == [0, 1, 2, 3, 4]
        frozen = np.arange(5)
        frozen.flags.writeable = False
        as_tensor(frozen)[0] = 9
        assert frozen[0] == 0

    @pytest.mark.parametrize("dtype", ["u1", "i2", "i8", "f2", "f4", "f8", "?"])
    def test_dtypes(self, dtype: str) -> None:
        array = np.ones((2, 3), dtype)
        assert np.array_equal(as_tensor(array).numpy(), array)


def test_an_array_that_runs_backwards_becomes_a_tensor() -> None:
    backwards = np.arange(6.0).reshape(3, 2)[::-1]
    assert as_tensor(backwards).tolist() == backwards.tolist()
