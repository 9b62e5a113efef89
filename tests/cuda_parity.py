"""What the CUDA ops must do, wherever their source runs: on a device, or emulated on the host. Test
cases for a subclass that says on which tensors and how an op is called.

Compared with a computation in float64, and in what they refuse with the reference ops.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import pytest
import tolerances
import torch
from torch import Tensor

from sbp_fast.ops import reference

CHUNK = 16384  # elements, as csrc/cuda/plan.h has it
SIZES = (0, 1, 7, 255, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
ACCUMULATORS = (torch.float32, torch.float64)
GRADIENTS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCALE = 0.37

dtype_pairs = pytest.mark.parametrize(
    ("wide", "narrow"), list(itertools.product(ACCUMULATORS, GRADIENTS)), ids=str
)
both_modes = pytest.mark.parametrize("first_write", [False, True], ids=["add", "first_write"])
sanitize = pytest.mark.sanitize


def relative_error(result: Tensor, oracle: Tensor) -> float:
    distance = (result.double() - oracle.double()).norm()
    return float(distance / oracle.double().norm()) if distance else 0.0


def sum_of_squares(tensors: Sequence[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors)


class CudaParity:
    device: str

    def call(self, name: str, *arguments: Any) -> None:
        """Runs the native kernel of ``sbp_fast::name``."""
        raise NotImplementedError

    # --- Material -------------------------------------------------------------------------------

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed + sum(shape))
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(self.device, dtype)

    def statistics(self) -> Tensor:
        return torch.zeros(3, dtype=torch.float64, device=self.device)

    def scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def layouts(self, dtype: torch.dtype, other: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Pairs of tensors (one to write, one to read) whose elements lie in all sorts of orders."""
        image = (2, 5, 6, 7)
        first, second = self.random(*image, dtype=dtype), self.random(*image, dtype=other, seed=1)
        last = {"memory_format": torch.channels_last}
        return [
            (first.clone(**last), second.clone(**last)),
            (first.clone(), second.clone(**last)),
            (first.clone(**last), second.clone()),
            (self.random(60, 41, dtype=dtype).t(), self.random(41, 60, dtype=other)),
            (self.random(9, 40, dtype=dtype)[:, ::3], self.random(9, 14, dtype=other)),
            (self.random(9, 14, dtype=dtype), self.random(1, 14, dtype=other).expand(9, 14)),
            (self.random(9, 14, dtype=dtype), self.random(1, 1, dtype=other).expand(9, 14)),
            # Views that begin off a 16-byte boundary, one or both of them.
            (self.random(5000, dtype=dtype)[1:], self.random(4999, dtype=other)),
            (self.random(4999, dtype=dtype), self.random(5000, dtype=other)[1:]),
            (self.random(5000, dtype=dtype)[1:], self.random(5000, dtype=other)[1:]),
            # As many dimensions as the kernels take once they cannot be merged.
            (
                self.random(*[2] * 8, dtype=dtype),
                self.random(*[2] * 8, dtype=other).permute(*range(7, -1, -1)),
            ),
            (self.random(1, dtype=dtype)[0], self.random(1, dtype=other)[0]),
        ]

    def check_accumulate(
        self, accumulators: list[Tensor], gradients: list[Tensor], first_write: bool = False
    ) -> None:
        pairs = list(zip(accumulators, gradients, strict=True))
        oracles = [
            gradient.double() * SCALE + (0.0 if first_write else accumulator.double())
            for accumulator, gradient in pairs
        ]
        incoming = sum_of_squares(gradients)
        if first_write:  # what the accumulators hold must not be read
            for accumulator in accumulators:
                accumulator.fill_(float("nan"))
        statistics = self.statistics()
        self.call("scale_accumulate_", accumulators, gradients, SCALE, first_write, statistics)
        for accumulator, oracle in zip(accumulators, oracles, strict=True):
            assert relative_error(accumulator, oracle) <= tolerances.RELATIVE[accumulator.dtype]
        assert statistics.tolist() == pytest.approx(
            [incoming, sum_of_squares(accumulators), 0.0], rel=tolerances.SUM_OF_SQUARES
        )

    # --- Values, for every pair of dtypes -------------------------------------------------------

    @sanitize
    @dtype_pairs
    @both_modes
    def test_scale_accumulate(
        self, wide: torch.dtype, narrow: torch.dtype, first_write: bool
    ) -> None:
        self.check_accumulate(
            [self.random(size, dtype=wide, seed=1) for size in SIZES],
            [self.random(size, dtype=narrow, seed=2) for size in SIZES],
            first_write,
        )

    @sanitize
    @dtype_pairs
    @both_modes
    def test_scale_accumulate_in_any_layout(
        self, wide: torch.dtype, narrow: torch.dtype, first_write: bool
    ) -> None:
        pairs = self.layouts(wide, narrow)
        self.check_accumulate([pair[0] for pair in pairs], [pair[1] for pair in pairs], first_write)

    @sanitize
    @pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
    def test_gradient_statistics(self, dtype: torch.dtype) -> None:
        gradients = [self.random(size, dtype=dtype) for size in SIZES]
        gradients += [gradient for _, gradient in self.layouts(torch.float32, dtype)]
        copies = [gradient.clone() for gradient in gradients]
        statistics = self.statistics()
        self.call("gradient_statistics_", gradients, statistics)
        expected = sum_of_squares(gradients)
        assert statistics.tolist() == pytest.approx(
            [expected, expected, 0.0], rel=tolerances.SUM_OF_SQUARES
        )
        assert all(map(torch.equal, gradients, copies))

    @sanitize
    @dtype_pairs
    @pytest.mark.parametrize("norm", [None, 8.0, 0.25], ids=["plain", "clipped", "under_limit"])
    def test_finalise(self, wide: torch.dtype, narrow: torch.dtype, norm: float | None) -> None:
        outputs = [self.random(size, dtype=narrow) for size in SIZES]
        accumulators = [self.random(size, dtype=wide) for size in SIZES]
        for output, accumulator in self.layouts(narrow, wide):
            outputs.append(output)
            accumulators.append(accumulator)
        coefficient = 0.7 if norm is None else 0.7 * min(1.0, 0.5 / (norm + 1e-6))
        clip = (None, None) if norm is None else (self.scalar(norm), 0.5)
        self.call("finalise_", outputs, accumulators, self.scalar(0.7), *clip)
        bound = tolerances.RELATIVE[wide] + tolerances.RELATIVE[narrow]
        for output, accumulator in zip(outputs, accumulators, strict=True):
            assert relative_error(output, accumulator.double() * coefficient) <= bound

    @pytest.mark.parametrize("dtype", ACCUMULATORS, ids=str)
    def test_finalise_in_place(self, dtype: torch.dtype) -> None:
        tensors = [self.random(size, dtype=dtype) for size in SIZES]
        tensors.append(self.random(50, 60, dtype=dtype)[:, ::2])
        oracles = [tensor.double() * 0.25 for tensor in tensors]
        self.call("finalise_", tensors, tensors, self.scalar(0.25))
        for tensor, oracle in zip(tensors, oracles, strict=True):
            assert torch.equal(tensor.double(), oracle)

    def test_a_nan_norm_reaches_every_output(self) -> None:
        output = self.random(1000)
        norm = self.scalar(float("nan"))
        self.call("finalise_", [output], [output.clone()], self.scalar(1.0), norm, 1.0)
        assert bool(output.isnan().all())

    # --- Lists ----------------------------------------------------------------------------------

    def test_one_call_mixes_dtypes_and_layouts(self) -> None:
        pairs = [
            pair
            for wide, narrow in itertools.product(ACCUMULATORS, GRADIENTS)
            for pair in self.layouts(wide, narrow)
        ]
        self.check_accumulate([pair[0] for pair in pairs], [pair[1] for pair in pairs])

    def test_two_thousand_tensors(self) -> None:
        accumulators = [self.random(1 + index % 90, seed=index) for index in range(2000)]
        gradients = [self.random(1 + index % 90, seed=-index) for index in range(2000)]
        oracle = torch.cat(accumulators).double() + torch.cat(gradients).double()
        self.call("scale_accumulate_", accumulators, gradients, 1.0)
        error = relative_error(torch.cat(accumulators), oracle)
        assert error <= tolerances.RELATIVE[torch.float32]

    @sanitize
    def test_nothing_to_do(self) -> None:
        empty = torch.empty(0, 3, device=self.device)
        statistics = self.statistics()
        for tensors in ([], [empty]):
            self.call("scale_accumulate_", tensors, tensors, 1.0, False, statistics)
            self.call("gradient_statistics_", tensors, statistics)
            self.call("finalise_", tensors, tensors, self.scalar(1.0))
        assert statistics.tolist() == [0.0, 0.0, 0.0]

    # --- Statistics -----------------------------------------------------------------------------

    @dtype_pairs
    @pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
    def test_the_flag_tells_of_a_single_bad_value(
        self, wide: torch.dtype, narrow: torch.dtype, value: float
    ) -> None:
        for position in (0, 5000, CHUNK + 4):
            gradient = self.random(CHUNK + 5, dtype=narrow)
            gradient[position] = value
            accumulated, statistics = self.statistics(), self.statistics()
            accumulator = torch.zeros_like(gradient, dtype=wide)
            self.call("scale_accumulate_", [accumulator], [gradient], 1.0, False, accumulated)
            self.call("gradient_statistics_", [gradient], statistics)
            assert accumulated[2] == 1.0
            assert statistics[2] == 1.0
            # The flag stays until someone clears it.
            self.call("gradient_statistics_", [torch.zeros_like(gradient)], statistics)
            assert statistics[2] == 1.0

    def test_the_flag_tells_of_an_overflow_in_the_result(self) -> None:
        statistics = self.statistics()
        accumulator = torch.zeros(10, device=self.device)
        gradient = torch.full_like(accumulator, 1e300, dtype=torch.float64)
        self.call("scale_accumulate_", [accumulator], [gradient], 1.0, False, statistics)
        assert statistics[2] == 1.0

    def test_statistics_collect_over_calls_and_are_the_same_bits_every_time(self) -> None:
        gradients = [self.random(size) for size in SIZES]
        results = []
        for _ in range(3):
            statistics = self.statistics()
            for _ in range(2):
                self.call("gradient_statistics_", gradients, statistics)
            results.append(statistics)
        assert results[0][0].item() == pytest.approx(2 * sum_of_squares(gradients))
        assert all(torch.equal(result, results[0]) for result in results)

    # --- What is refused, before anything is written --------------------------------------------

    def refusals(self) -> dict[str, tuple[str, tuple[Any, ...]]]:
        tensor, scale = self.random(4), self.scalar(1.0)
        overlapping = torch.zeros(1, device=self.device).expand(4)
        return {
            "lengths": ("scale_accumulate_", ([tensor], [], 1.0)),
            "shapes": ("scale_accumulate_", ([tensor], [self.random(5)], 1.0)),
            "accumulator dtype": ("scale_accumulate_", ([tensor.half()], [tensor], 1.0)),
            "overlap": ("scale_accumulate_", ([overlapping], [tensor], 1.0)),
            "statistics": ("gradient_statistics_", ([tensor], self.random(3))),
            "scale": ("finalise_", ([tensor], [tensor], self.random(1))),
            "max_norm": ("finalise_", ([tensor], [tensor], scale, scale, -0.5)),
        }

    @pytest.mark.parametrize(
        "kind",
        ["lengths", "shapes", "accumulator dtype", "overlap", "statistics", "scale", "max_norm"],
    )
    def test_refuses_in_the_words_of_the_reference(self, kind: str) -> None:
        name, arguments = self.refusals()[kind]
        with pytest.raises(RuntimeError) as expected:
            getattr(reference, name)(*arguments)
        with pytest.raises(RuntimeError, match=re.escape(str(expected.value)[:60])):
            self.call(name, *arguments)

    def test_more_dimensions_than_fit_are_an_error_that_names_the_cure(self) -> None:
        accumulator = self.random(*[2] * 9)
        before = accumulator.clone()
        gradient = self.random(*[2] * 9).permute(*range(8, -1, -1))
        with pytest.raises(RuntimeError, match=r"9 dimensions to walk.*\.contiguous\(\)"):
            self.call("scale_accumulate_", [accumulator], [gradient], 1.0)
        assert torch.equal(accumulator, before)
