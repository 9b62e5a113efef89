"""What the Triton ops must do on any device: test cases for a subclass that says on which.

Compared with a computation in float64. One list of odd sizes covers the empty tensor, less than a
block, whole chunks and what remains after them.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tolerances
import torch
from torch import Tensor

from sbp_fast.ops import chunk_table, triton_backend

CHUNK = chunk_table.CHUNK_ELEMENTS
SIZES = (0, 1, 7, 127, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
ACCUMULATORS = (torch.float32, torch.float64)
GRADIENTS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCALE = 0.37

scale_accumulate_ = torch.ops.sbp_fast.scale_accumulate_.triton
gradient_statistics_ = torch.ops.sbp_fast.gradient_statistics_.triton
finalise_ = torch.ops.sbp_fast.finalise_.triton

dtype_pairs = pytest.mark.parametrize(
    ("wide", "narrow"), list(itertools.product(ACCUMULATORS, GRADIENTS)), ids=str
)


def relative_error(result: Tensor, oracle: Tensor) -> float:
    distance = (result.double() - oracle.double()).norm()
    return float(distance / oracle.double().norm()) if distance else 0.0


def sum_of_squares(tensors: list[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors)


class TritonParity:
    device: str
    many = 2000  # tensors in one call

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed + sum(shape))
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(self.device, dtype)

    def lists(self, wide: torch.dtype, narrow: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        return (
            [self.random(size, dtype=wide, seed=1) for size in SIZES],
            [self.random(size, dtype=narrow, seed=2) for size in SIZES],
        )

    def statistics(self) -> Tensor:
        return torch.zeros(3, dtype=torch.float64, device=self.device)

    def scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def check_accumulated(
        self, accumulator: Tensor, gradient: Tensor, *, first_write: bool = False
    ) -> None:
        """Accumulates one gradient and compares, whatever the layouts."""
        oracle = gradient.double() * SCALE
        if not first_write:
            oracle = oracle + accumulator.double()
        strides = accumulator.stride()
        statistics = self.statistics()
        incoming = sum_of_squares([gradient])
        scale_accumulate_([accumulator], [gradient], SCALE, first_write, statistics)
        assert relative_error(accumulator, oracle) <= tolerances.RELATIVE[accumulator.dtype]
        assert accumulator.stride() == strides
        assert statistics.tolist() == pytest.approx(
            [incoming, sum_of_squares([accumulator]), 0.0], rel=tolerances.SUM_OF_SQUARES
        )

    # --- Values, for every pair of dtypes -------------------------------------------------------

    @dtype_pairs
    @pytest.mark.parametrize("first_write", [False, True], ids=["add", "first_write"])
    def test_scale_accumulate(
        self, wide: torch.dtype, narrow: torch.dtype, first_write: bool
    ) -> None:
        accumulators, gradients = self.lists(wide, narrow)
        oracles = [
            gradient.double() * SCALE + (0.0 if first_write else accumulator.double())
            for accumulator, gradient in zip(accumulators, gradients, strict=True)
        ]
        if first_write:  # what the accumulators hold must not be read
            for accumulator in accumulators:
                accumulator.fill_(float("nan"))
        statistics = self.statistics()
        scale_accumulate_(accumulators, gradients, SCALE, first_write, statistics)
        for accumulator, oracle in zip(accumulators, oracles, strict=True):
            assert relative_error(accumulator, oracle) <= tolerances.RELATIVE[wide]
        assert statistics.tolist() == pytest.approx(
            [sum_of_squares(gradients), sum_of_squares(accumulators), 0.0],
            rel=tolerances.SUM_OF_SQUARES,
        )

    @pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
    def test_gradient_statistics(self, dtype: torch.dtype) -> None:
        gradients = [self.random(size, dtype=dtype) for size in SIZES]
        gradients.append(self.random(6, 4, dtype=dtype).t())
        gradients.append(self.random(6, 40, dtype=dtype)[:, ::3])
        statistics = self.statistics()
        gradient_statistics_(gradients, statistics)
        expected = sum_of_squares(gradients)
        assert statistics.tolist() == pytest.approx(
            [expected, expected, 0.0], rel=tolerances.SUM_OF_SQUARES
        )

    @dtype_pairs
    @pytest.mark.parametrize("norm", [None, 8.0, 0.25], ids=["plain", "clipped", "under_limit"])
    def test_finalise(self, wide: torch.dtype, narrow: torch.dtype, norm: float | None) -> None:
        accumulators, outputs = self.lists(wide, narrow)
        scale = 1 / 3
        coefficient = scale * (min(1.0, 0.5 / (norm + 1e-6)) if norm is not None else 1.0)
        finalise_(
            outputs,
            accumulators,
            self.scalar(scale),
            None if norm is None else self.scalar(norm),
            None if norm is None else 0.5,
        )
        bound = max(tolerances.RELATIVE[wide], tolerances.RELATIVE[narrow])
        for output, accumulator in zip(outputs, accumulators, strict=True):
            assert relative_error(output, accumulator.double() * coefficient) <= bound

    @dtype_pairs
    def test_finalise_rounds_as_torch_does(self, wide: torch.dtype, narrow: torch.dtype) -> None:
        # Ties both ways, carries into the exponent, the largest values and beyond, subnormal
        # results, infinities, NaN, zeros of both signs; and many ordinary values.
        one, step = 1.0, 2.0**-8
        special = [one + step, one + 3 * step, one + step + 2**-20, 2 - step, 65519.9, 65520.0]
        special += [3.4028235e38, 1e-7, 6.1e-5, 3e-8, 1e-38, float("inf"), float("nan"), 0.0]
        values = torch.tensor(special + [-value for value in special], dtype=torch.float64)
        many = torch.randn(CHUNK, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        accumulator = torch.cat([values, many]).to(wide).to(self.device)
        output = torch.empty_like(accumulator, dtype=narrow)
        finalise_([output], [accumulator], self.scalar(1.0))
        expected = accumulator.to(narrow)
        torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
        numbers = ~expected.isnan()
        assert torch.equal(output[numbers].signbit(), expected[numbers].signbit())

    @pytest.mark.parametrize("dtype", ACCUMULATORS, ids=str)
    def test_finalise_in_place(self, dtype: torch.dtype) -> None:
        accumulators = [self.random(size, dtype=dtype) for size in SIZES]
        accumulators.append(self.random(6, 40, dtype=dtype)[:, ::3])
        oracles = [accumulator.double() * 0.3 for accumulator in accumulators]
        finalise_(accumulators, accumulators, self.scalar(0.3))
        for accumulator, oracle in zip(accumulators, oracles, strict=True):
            assert relative_error(accumulator, oracle) <= tolerances.RELATIVE[dtype]

    def test_a_nan_norm_reaches_every_output(self) -> None:
        outputs = [self.random(size) for size in SIZES]
        finalise_(outputs, outputs, self.scalar(1.0), self.scalar(float("nan")), 1.0)
        assert all(bool(output.isnan().all()) for output in outputs)

    # --- Lists ----------------------------------------------------------------------------------

    def test_one_call_mixes_dtypes_and_alignments(self) -> None:
        accumulators, gradients, oracles = [], [], []
        for shift, (wide, narrow) in itertools.product(
            (0, 1), itertools.product(ACCUMULATORS, GRADIENTS)
        ):
            accumulators.append(self.random(1500, dtype=wide, seed=1)[shift:])
            gradients.append(self.random(1500, dtype=narrow, seed=2)[shift:])
            oracles.append(accumulators[-1].double() + SCALE * gradients[-1].double())
        statistics = self.statistics()
        scale_accumulate_(accumulators, gradients, SCALE, False, statistics)
        for accumulator, oracle in zip(accumulators, oracles, strict=True):
            assert relative_error(accumulator, oracle) <= tolerances.RELATIVE[accumulator.dtype]
        assert statistics.tolist() == pytest.approx(
            [sum_of_squares(gradients), sum_of_squares(accumulators), 0.0],
            rel=tolerances.SUM_OF_SQUARES,
        )

    def test_many_tensors(self) -> None:
        accumulators = [self.random(1 + index % 13, seed=index) for index in range(self.many)]
        gradients = [self.random(1 + index % 13, seed=10**6 + index) for index in range(self.many)]
        oracle = torch.cat(accumulators).double() + torch.cat(gradients).double()
        scale_accumulate_(accumulators, gradients, 1.0)
        assert relative_error(torch.cat(accumulators), oracle) <= tolerances.RELATIVE[torch.float32]

    def test_nothing_to_do(self) -> None:
        empty = torch.empty(0, 3, device=self.device)
        statistics = self.statistics()
        scale_accumulate_([], [], 1.0, False, statistics)
        scale_accumulate_([empty], [empty.clone()], 1.0, False, statistics)
        gradient_statistics_([], statistics)
        gradient_statistics_([empty], statistics)
        finalise_([], [], self.scalar(1.0))
        finalise_([empty], [empty], self.scalar(1.0))
        assert statistics.tolist() == [0.0, 0.0, 0.0]

    # --- Layouts --------------------------------------------------------------------------------

    @pytest.mark.parametrize("first_write", [False, True], ids=["add", "first_write"])
    @pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
    def test_layouts(self, narrow: torch.dtype, first_write: bool) -> None:
        def image(dtype: torch.dtype) -> Tensor:
            return self.random(3, 5, 4, 6, dtype=dtype)

        last = torch.channels_last
        wide = torch.float32
        for accumulator, gradient in [
            (image(wide).to(memory_format=last), image(narrow).to(memory_format=last)),
            (image(wide), image(narrow).to(memory_format=last)),
            (image(wide).to(memory_format=last), image(narrow)),
            (self.random(7, 9).t(), self.random(7, 9, dtype=narrow).t()),
            (self.random(9, 7), self.random(7, 9, dtype=narrow).t()),
            (self.random(9, 7), self.random(9, 1, dtype=narrow).expand(9, 7)),
            (self.random(9, 20)[:, ::3], self.random(9, 20, dtype=narrow)[:, ::3]),
            (self.random(9, 20)[:, ::3], self.random(9, 7, dtype=narrow)),
            (self.random(9, 7), self.random(18, 7, dtype=narrow)[::2]),
            (self.random(5, 1, 3), self.random(5, 2, 3, dtype=narrow)[:, 1:]),
            (self.random(1300)[1:], self.random(1300, dtype=narrow)[1:]),
            (self.random(1300)[4:], self.random(1300, dtype=narrow)[4:]),
        ]:
            self.check_accumulated(accumulator, gradient, first_write=first_write)

    def test_gaps_keep_what_they_hold(self) -> None:
        whole = self.random(9, 20)
        before = whole.clone()
        scale_accumulate_([whole[:, ::3]], [self.random(9, 7)], SCALE)
        finalise_([whole[:, 1::3]], [self.random(9, 7)], self.scalar(1.0))
        assert torch.equal(whole[:, 2::3], before[:, 2::3])
        assert not torch.equal(whole[:, ::3], before[:, ::3])
        assert not torch.equal(whole[:, 1::3], before[:, 1::3])

    def test_finalise_into_another_layout(self) -> None:
        accumulator = self.random(3, 5, 4, 6)
        channels_last = torch.empty_like(accumulator).contiguous(memory_format=torch.channels_last)
        strided = torch.zeros(3, 5, 4, 12, device=self.device)[..., ::2]
        finalise_([channels_last, strided], [accumulator, accumulator], self.scalar(2.0))
        assert torch.equal(channels_last, accumulator * 2)
        assert torch.equal(strided, accumulator * 2)

    # --- Statistics -----------------------------------------------------------------------------

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
    @pytest.mark.parametrize("position", [0, CHUNK + 3], ids=["whole_block", "tail"])
    @pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
    def test_non_finite_is_flagged_for_good(
        self, dtype: torch.dtype, position: int, value: float
    ) -> None:
        gradient = self.random(CHUNK + 5, dtype=dtype)
        gradient[position] = value
        accumulator = self.random(CHUNK + 5)
        fine = self.random(7)
        for accumulates in (True, False):
            statistics = self.statistics()
            if accumulates:
                scale_accumulate_([accumulator], [gradient], 1.0, True, statistics)
            else:
                gradient_statistics_([fine, gradient], statistics)
            assert statistics[2] == 1.0
            scale_accumulate_([fine.clone()], [fine], 1.0, False, statistics)
            gradient_statistics_([fine], statistics)
            assert statistics[2] == 1.0

    def test_the_result_counts_not_what_comes_in(self) -> None:
        largest = torch.full((7,), 3e38, device=self.device)
        statistics = self.statistics()
        scale_accumulate_([largest.clone()], [largest], 0.1, False, statistics)
        assert statistics[2] == 0.0
        scale_accumulate_([largest.clone()], [largest], 1.0, False, statistics)
        assert statistics[2] == 1.0

    @pytest.mark.parametrize("scale", [float("inf"), float("nan")], ids=str)
    def test_a_non_finite_scale_touches_no_sum_that_it_should_not(self, scale: float) -> None:
        gradient = self.random(7).abs() + 1
        accumulator = torch.zeros_like(gradient)
        statistics = self.statistics()
        scale_accumulate_([accumulator], [gradient], scale, False, statistics)
        assert torch.equal(accumulator.isnan(), torch.full_like(accumulator, scale).isnan())
        assert statistics.tolist() == pytest.approx(
            [sum_of_squares([gradient]), scale, 1.0], rel=tolerances.SUM_OF_SQUARES, nan_ok=True
        )

    def test_statistics_add_up_and_repeat_to_the_bit(self) -> None:
        gradients = [self.random(size, dtype=torch.bfloat16) for size in SIZES]
        once, again = self.statistics(), self.statistics()
        gradient_statistics_(gradients, once)
        gradient_statistics_(gradients, again)
        assert torch.equal(once, again)
        gradient_statistics_(gradients, once)
        assert torch.equal(once, again * 2)

    # --- Contracts ------------------------------------------------------------------------------

    def test_opcheck(self) -> None:
        def check(op: torch._ops.OpOverload, *arguments: object) -> None:
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))

        accumulators = [self.random(3, 4), self.random(5, dtype=torch.float64)]
        gradients = [self.random(3, 4, dtype=torch.bfloat16), self.random(5)]
        one = self.scalar(1.0)
        check(scale_accumulate_, accumulators, gradients, 0.5)
        check(scale_accumulate_, accumulators, gradients, 0.5, True, self.statistics())
        check(gradient_statistics_, gradients, self.statistics())
        check(finalise_, gradients, accumulators, one)
        check(finalise_, gradients, accumulators, one, one.clone(), 1.0)

    def test_refused_calls_change_nothing(self) -> None:
        a, b = self.random(8), self.random(9)
        before = a.clone(), b.clone()
        statistics = self.statistics()
        for message, arguments in {
            "same length": ([a, b], [a]),
            "shapes must be equal": ([a, b], [a, b[:8]]),
            "must be one of": ([a, b], [a, b.long()]),
            r"accumulators\[0\] and accumulators\[2\] share memory": ([a, b, a[:4]], [a, b, a[:4]]),
        }.items():
            with pytest.raises(RuntimeError, match=message):
                scale_accumulate_(*arguments, 1.0, False, statistics)
        with pytest.raises(RuntimeError, match=r"outputs\[0\] and outputs\[1\] share memory"):
            finalise_([a, a], [b[:8], b[1:]], self.scalar(1.0))
        with pytest.raises(RuntimeError, match="norm and max_norm go together"):
            finalise_([a], [a], self.scalar(1.0), self.scalar(1.0))
        assert torch.equal(a, before[0])
        assert torch.equal(b, before[1])
        assert statistics.tolist() == [0.0, 0.0, 0.0]

    def test_a_kernel_reaches_beyond_two_to_the_31_elements(self) -> None:
        """The table of a tensor that is not there, but for its last chunk."""
        kernels = triton_backend._import_kernels()
        numel = 2**31 + CHUNK + 5
        begin = numel // CHUNK * CHUNK
        accumulator = self.random(numel - begin)
        gradient = self.random(numel - begin, dtype=torch.bfloat16)
        oracle = accumulator.double() + gradient.double()
        rows, _ = chunk_table.plan(
            triton_backend._addresses([accumulator]) - begin * accumulator.itemsize,
            triton_backend._addresses([gradient]) - begin * gradient.itemsize,
            np.array([numel]),
            np.array([0]),
            np.array([[accumulator.itemsize, gradient.itemsize]]),
            1.0,
        )
        kernels.scale_accumulate[(1,)](
            torch.from_numpy(rows[-1:]).to(self.device),
            torch.empty(0, 4, dtype=torch.float64, device=self.device),
            ACCUMULATOR=kernels.tl.float32,
            GRADIENT=kernels.tl.bfloat16,
            FIRST_WRITE=False,
            STATISTICS=False,
            ALIGNED=True,
            **triton_backend._options(kernels),
        )
        assert relative_error(accumulator, oracle) <= tolerances.RELATIVE[torch.float32]
