"""The fused ops on CPU tensors, in every backend, against float64."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import tolerances
import torch
from torch import Tensor, nn

from sbp_fast import ops
from sbp_fast.ops import (
    BACKENDS,
    BackendUnavailableError,
    backends,
    finalise_,
    gradient_statistics_,
    new_statistics,
    scale_accumulate_,
    schemas,
)
from sbp_fast.ops.native import Availability, load_cpu

ACCUMULATORS = (torch.float32, torch.float64)
GRADIENTS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Around vectors (64 bytes), around a chunk of the CPU kernels, beyond what one thread does alone.
SIZES = (0, 1, 7, 63, 64, 65, 16383, 16384, 16385, 65536 + 3)
SCALE = 0.37

# NumPy's, when interpreted kernels meet infinities on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

pairs = pytest.mark.parametrize(
    ("wide", "narrow"), list(itertools.product(ACCUMULATORS, GRADIENTS)), ids=str
)
first_writes = pytest.mark.parametrize("first_write", [False, True], ids=["add", "first_write"])
needs_native = pytest.mark.skipif(
    not load_cpu().usable, reason=f"backend cpu: {load_cpu().reason or 'usable'}"
)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def sizes_for(backend: str) -> tuple[int, ...]:
    # Interpreted, each chunk takes milliseconds; its own sizes are tested in test_triton_ops.py.
    return SIZES if backend != "triton" else (0, 1, 65, 16385)


def relative_error(result: Tensor, oracle: Tensor) -> float:
    distance = float((result.double() - oracle.double()).norm())
    return distance / float(oracle.double().norm()) if distance else 0.0


def sum_of_squares(tensors: list[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors)


def check_accumulated(
    accumulators: list[Tensor],
    gradients: list[Tensor],
    backend: str,
    *,
    first_write: bool = False,
    scale: float = SCALE,
) -> None:
    """Accumulates and compares values, statistics, strides and what is not to be written."""
    terms = [
        (
            torch.zeros(()) if first_write else accumulator.to(torch.float64, copy=True),
            gradient.double() * scale,
        )
        for accumulator, gradient in zip(accumulators, gradients, strict=True)
    ]
    copies = [gradient.clone() for gradient in gradients]
    strides = [accumulator.stride() for accumulator in accumulators]
    if first_write:  # what they hold must not be read
        for accumulator in accumulators:
            accumulator.fill_(torch.nan)
    twins = [
        torch.empty_strided(accumulator.shape, stride, dtype=accumulator.dtype).copy_(accumulator)
        for accumulator, stride in zip(accumulators, strides, strict=True)
    ]
    statistics = new_statistics()
    scale_accumulate_(
        accumulators,
        gradients,
        scale,
        first_write=first_write,
        statistics=statistics,
        backend=backend,
    )
    for accumulator, (held, added), stride in zip(accumulators, terms, strides, strict=True):
        # Where the terms cancel, the sum has their rounding errors still: measured against them.
        distance = float((accumulator.double() - (held + added)).norm())
        size = float(held.norm() + added.norm())
        assert distance <= tolerances.RELATIVE[accumulator.dtype] * size
        assert accumulator.stride() == stride
    assert all(map(torch.equal, gradients, copies))
    assert statistics.tolist() == pytest.approx(
        [sum_of_squares(gradients), sum_of_squares(accumulators), 0.0],
        rel=tolerances.SUM_OF_SQUARES,
    )
    # Without statistics the values are the same bits.
    scale_accumulate_(twins, gradients, scale, first_write=first_write, backend=backend)
    assert all(map(torch.equal, twins, accumulators))


class TestScaleAccumulate:
    @pairs
    @first_writes
    def test_every_size(
        self, backend: str, wide: torch.dtype, narrow: torch.dtype, first_write: bool
    ) -> None:
        sizes = sizes_for(backend)
        check_accumulated(
            [randn(size, dtype=wide) for size in sizes],
            [randn(size, dtype=narrow) for size in sizes],
            backend,
            first_write=first_write,
        )

    @first_writes
    def test_each_size_alone(self, backend: str, first_write: bool) -> None:
        """One tensor a call: no neighbour hides a wrong end."""
        for size in sizes_for(backend):
            check_accumulated(
                [randn(size)], [randn(size, dtype=torch.bfloat16)], backend, first_write=first_write
            )

    @first_writes
    @pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
    def test_layouts(self, backend: str, narrow: torch.dtype, first_write: bool) -> None:
        def image(dtype: torch.dtype) -> Tensor:
            return randn(3, 5, 4, 6, dtype=dtype)

        last = torch.channels_last
        layouts: list[tuple[Tensor, Tensor]] = [
            (randn(), randn(dtype=narrow)),
            (image(torch.float32).to(memory_format=last), image(narrow).to(memory_format=last)),
            (image(torch.float32), image(narrow).to(memory_format=last)),
            (image(torch.float32).to(memory_format=last), image(narrow)),
            (randn(70, 9).t(), randn(70, 9, dtype=narrow).t()),
            (randn(9, 70), randn(70, 9, dtype=narrow).t()),
            (randn(9, 7), randn(9, 1, dtype=narrow).expand(9, 7)),
            (randn(9, 200)[:, ::3], randn(9, 200, dtype=narrow)[:, ::3]),
            (randn(9, 200)[:, ::3], randn(9, 67, dtype=narrow)),
            (randn(5, 1, 3), randn(5, 2, 3, dtype=narrow)[:, 1:]),
            (randn(1300)[1:], randn(1300, dtype=narrow)[1:]),
            (randn(1300)[1:], randn(1302, dtype=narrow)[3:]),
            (randn(2, 0, 3), randn(2, 0, 3, dtype=narrow)),
        ]
        if backend != "triton":  # chunks that begin in the middle of a strided tensor
            layouts.append((randn(150, 301), randn(301, 150, dtype=narrow).t()))
        for accumulator, gradient in layouts:
            check_accumulated([accumulator], [gradient], backend, first_write=first_write)
        check_accumulated(*map(list, zip(*layouts, strict=True)), backend)

    @first_writes
    def test_gaps_keep_what_they_hold(self, backend: str, first_write: bool) -> None:
        whole = randn(9, 20)
        before = whole.clone()
        scale_accumulate_(
            [whole[:, ::3]], [randn(9, 7)], 1.0, first_write=first_write, backend=backend
        )
        between = torch.ones(20, dtype=torch.bool)
        between[::3] = False
        assert torch.equal(whole[:, between], before[:, between])
        around = randn(40)
        before = around.clone()
        scale_accumulate_(
            [around[3:30]], [randn(27)], 1.0, first_write=first_write, backend=backend
        )
        assert torch.equal(around[:3], before[:3])
        assert torch.equal(around[30:], before[30:])

    def test_one_call_mixes_everything(self, backend: str) -> None:
        accumulators, gradients = [], []
        for shift, (wide, narrow) in itertools.product(
            (0, 1), itertools.product(ACCUMULATORS, GRADIENTS)
        ):
            accumulators.append(randn(1500, dtype=wide)[shift:])
            gradients.append(randn(1500, dtype=narrow)[shift:])
        accumulators.append(randn(30, 40))
        gradients.append(randn(40, 30, dtype=torch.float16).t())
        check_accumulated(accumulators, gradients, backend)

    def test_two_thousand_tensors(self, backend: str) -> None:
        count = 2000 if backend != "triton" else 60  # interpreted: milliseconds each
        shapes = [1 + index % 130 for index in range(count)]
        check_accumulated(
            [randn(size) for size in shapes],
            [randn(size, dtype=torch.bfloat16) for size in shapes],
            backend,
        )

    @needs_native
    @pytest.mark.parametrize("shift", [0, 1, 5])
    @pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
    def test_more_than_the_caches_hold(self, shift: int, narrow: torch.dtype) -> None:
        """First writes of this size go past the caches, which needs aligned vectors."""
        size = (1 << 20) + 17
        accumulator = randn(size + shift)[shift:]
        gradient = randn(size + 3, dtype=narrow)[3:]
        check_accumulated([accumulator], [gradient], "cpu", first_write=True)

    def test_empty_lists(self, backend: str) -> None:
        statistics = new_statistics()
        scale_accumulate_([], [], 1.0, statistics=statistics, backend=backend)
        gradient_statistics_([], statistics, backend=backend)
        finalise_([], [], backend=backend)
        # Past the functions' own shortcut, too.
        overload = backends.operator("scale_accumulate_", backend, "cpu")
        overload([], [], 1.0, False, statistics)
        assert statistics.tolist() == [0.0, 0.0, 0.0]

    def test_statistics_add_up(self, backend: str) -> None:
        statistics = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
        scale_accumulate_(
            [torch.zeros(3)], [torch.full((3,), 2.0)], 0.5, statistics=statistics, backend=backend
        )
        assert statistics.tolist() == [13.0, 5.0, 1.0]
        gradient_statistics_([torch.full((2,), 3.0)], statistics, backend=backend)
        assert statistics.tolist() == [31.0, 23.0, 1.0]

    @pytest.mark.parametrize("size", [1, 70, 20_000])
    def test_non_finite_values_raise_the_flag(self, backend: str, size: int) -> None:
        if backend == "triton":
            size = min(size, 1500)
        for bad, narrow in itertools.product((torch.inf, -torch.inf, torch.nan), GRADIENTS):
            for position in {0, size - 1, size // 2} if backend != "triton" else {size - 1}:
                gradient = torch.zeros(size, dtype=narrow)
                gradient[position] = bad
                for statistics in both_flags(torch.zeros(size), gradient, backend):
                    assert statistics[2] == 1.0, (bad, narrow, position)

    def test_an_overflow_of_finite_values_raises_the_flag(self, backend: str) -> None:
        large = torch.full((5,), 3e38)
        statistics = new_statistics()
        gradient_statistics_([large], statistics, backend=backend)
        assert statistics[2] == 0.0
        scale_accumulate_([large.clone()], [large], 1.0, statistics=statistics, backend=backend)
        assert statistics[2] == 1.0
        # A float64 gradient that float32 cannot hold.
        statistics = new_statistics()
        huge = torch.full((5,), 1e39, dtype=torch.float64)
        scale_accumulate_([torch.zeros(5)], [huge], 1.0, statistics=statistics, backend=backend)
        assert statistics[2] == 1.0

    def test_the_largest_finite_values_do_not(self, backend: str) -> None:
        for narrow in GRADIENTS:
            gradient = torch.full((70,), torch.finfo(narrow).max, dtype=narrow)
            wide = torch.float64 if narrow == torch.float64 else torch.float32
            for statistics in both_flags(torch.zeros(70, dtype=wide), gradient, backend):
                assert statistics[2] == 0.0, narrow


def both_flags(accumulator: Tensor, gradient: Tensor, backend: str) -> list[Tensor]:
    accumulated, observed = new_statistics(), new_statistics()
    scale_accumulate_([accumulator], [gradient], 1.0, statistics=accumulated, backend=backend)
    gradient_statistics_([gradient], observed, backend=backend)
    return [accumulated, observed]


class TestGradientStatistics:
    @pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
    def test_against_float64(self, backend: str, dtype: torch.dtype) -> None:
        gradients = [randn(size, dtype=dtype) for size in sizes_for(backend)]
        gradients += [randn(6, 40, dtype=dtype).t(), randn(6, 40, dtype=dtype)[:, ::3]]
        gradients += [randn(1300, dtype=dtype)[1:], randn(5, 1, dtype=dtype).expand(5, 4)]
        copies = [gradient.clone() for gradient in gradients]
        statistics = new_statistics()
        gradient_statistics_(gradients, statistics, backend=backend)
        expected = sum_of_squares(gradients)
        assert statistics.tolist() == pytest.approx(
            [expected, expected, 0.0], rel=tolerances.SUM_OF_SQUARES
        )
        assert all(map(torch.equal, gradients, copies))


class TestFinalise:
    @pairs
    @pytest.mark.parametrize("norm", [None, 8.0, 0.25], ids=["plain", "clipped", "within"])
    def test_every_size(
        self, backend: str, wide: torch.dtype, narrow: torch.dtype, norm: float | None
    ) -> None:
        sizes = sizes_for(backend)
        accumulators = [randn(size, dtype=wide) for size in sizes]
        outputs = [torch.full((size,), torch.nan, dtype=narrow) for size in sizes]
        accumulators += [randn(30, 40, dtype=wide), randn(1300, dtype=wide)[1:]]
        outputs += [randn(40, 30, dtype=narrow).t(), randn(1300, dtype=narrow)[1:]]
        copies = [accumulator.clone() for accumulator in accumulators]
        coefficient = (1 / 3) * (min(1.0, 0.5 / (norm + 1e-6)) if norm is not None else 1.0)
        options: dict[str, Any] = {"backend": backend}
        if norm is not None:
            options |= {"norm": torch.tensor(norm, dtype=torch.float64), "max_norm": 0.5}
        finalise_(outputs, accumulators, 1 / 3, **options)
        bound = max(tolerances.RELATIVE[wide], tolerances.RELATIVE[narrow])
        for output, accumulator in zip(outputs, accumulators, strict=True):
            assert relative_error(output, accumulator.double() * coefficient) <= bound
        assert all(map(torch.equal, accumulators, copies))
        # The scale as a tensor gives the same bits.
        others = [torch.empty_like(output) for output in outputs]
        finalise_(others, accumulators, torch.tensor(1 / 3, dtype=torch.float64), **options)
        assert all(map(torch.equal, outputs, others))

    @pairs
    def test_rounds_as_torch_does(
        self, backend: str, wide: torch.dtype, narrow: torch.dtype
    ) -> None:
        # Ties both ways, carries into the exponent, the largest values and beyond, subnormal
        # results, infinities, NaN, zeros of both signs; and many ordinary values.
        one, step = 1.0, 2.0**-8
        special = [one + step, one + 3 * step, one + step + 2**-20, 2 - step, 65519.9, 65520.0]
        special += [3.4028235e38, 1e-7, 6.1e-5, 3e-8, 1e-38, torch.inf, torch.nan, 0.0]
        values = torch.tensor(special + [-value for value in special], dtype=torch.float64)
        accumulator = torch.cat([values, torch.randn(3000, dtype=torch.float64)]).to(wide)
        for source in (accumulator, accumulator.flip(0)):  # in whole vectors, and in what remains
            output = torch.empty_like(source, dtype=narrow)
            finalise_([output], [source], backend=backend)
            expected = source.to(narrow)
            torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
            numbers = ~expected.isnan()
            assert torch.equal(output[numbers].signbit(), expected[numbers].signbit())

    @pytest.mark.parametrize("dtype", ACCUMULATORS, ids=str)
    def test_in_place(self, backend: str, dtype: torch.dtype) -> None:
        accumulators = [randn(size, dtype=dtype) for size in sizes_for(backend)]
        accumulators.append(randn(6, 40, dtype=dtype)[:, ::3])
        oracles = [accumulator.double() * 0.3 for accumulator in accumulators]
        finalise_(accumulators, accumulators, 0.3, backend=backend)
        for accumulator, oracle in zip(accumulators, oracles, strict=True):
            assert relative_error(accumulator, oracle) <= tolerances.RELATIVE[dtype]

    @pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
    def test_clips_as_torch_does(self, backend: str, max_norm: float) -> None:
        gradients = [randn(70), randn(3, 5)]
        parameters = [nn.Parameter(torch.empty_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        outputs = [torch.empty_like(gradient) for gradient in gradients]
        finalise_(outputs, gradients, norm=norm.double(), max_norm=max_norm, backend=backend)
        for output, parameter in zip(outputs, parameters, strict=True):
            assert parameter.grad is not None
            assert relative_error(output, parameter.grad) <= 2 * tolerances.RELATIVE[torch.float32]

    def test_a_nan_norm_reaches_every_output(self, backend: str) -> None:
        outputs = [randn(size) for size in (1, 65, 300)]
        norm = torch.tensor(torch.nan, dtype=torch.float64)
        finalise_(outputs, outputs, norm=norm, max_norm=1.0, backend=backend)
        assert all(bool(output.isnan().all()) for output in outputs)


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def scalar(value: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


A, G = torch.ones(3), torch.full((3,), 2.0)
# A place for tensors that share memory in the cases below.
B = torch.arange(24.0)
LAST = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)

# What is called, with what, and the words of the refusal.
REFUSED: dict[str, tuple[Callable[..., None], list[Any], dict[str, Any], str]] = {
    "length": (
        scale_accumulate_,
        [[A], [G, G], 1.0],
        {},
        "1 accumulators but 2 gradients; the lists must have the same length",
    ),
    "no_accumulators": (
        scale_accumulate_,
        [[], [G], 1.0],
        {},
        "0 accumulators but 1 gradients; the lists must have the same length",
    ),
    "shape": (
        scale_accumulate_,
        [[A, A.clone()], [G, torch.ones(1, 3)], 1.0],
        {},
        "accumulators[1] has shape (3,) but gradients[1] has shape (1, 3); the shapes must be equal",
    ),
    "shape_of_the_same_numel": (
        scale_accumulate_,
        [[torch.ones(2, 3)], [torch.ones(3, 2)], 1.0],
        {},
        "accumulators[0] has shape (2, 3) but gradients[0] has shape (3, 2)",
    ),
    "accumulator_dtype": (
        scale_accumulate_,
        [[A, A.bfloat16()], [G, G], 1.0],
        {},
        "accumulators[1] has dtype torch.bfloat16; it must be one of torch.float32, torch.float64",
    ),
    "gradient_dtype": (
        scale_accumulate_,
        [[A], [G.int()], 1.0],
        {},
        "gradients[0] has dtype",
    ),
    "device": (
        scale_accumulate_,
        [[A], [meta(3)], 1.0],
        {},
        "gradients[0] is on meta but accumulators[0] is on cpu; all tensors of a call must share",
    ),
    "sparse": (
        scale_accumulate_,
        [[A], [G.to_sparse()], 1.0],
        {},
        "gradients[0] is not in the layout torch.strided; it must be dense, call .to_dense() on it",
    ),
    "expanded": (
        scale_accumulate_,
        [[torch.ones(1).expand(3)], [G], 1.0],
        {},
        "accumulators[0] has shape (3,) and strides (0,), so that elements share memory; pass a .clone",
    ),
    "huge_expanded": (  # 2^31 elements and more, of which one exists: sizes are 64-bit numbers
        scale_accumulate_,
        [[torch.ones(1).expand(2**31 + 5)], [torch.ones(1).expand(2**31 + 5)], 1.0],
        {},
        "accumulators[0] has shape (2147483653,) and strides (0,), so that elements share memory",
    ),
    "overlapping": (
        scale_accumulate_,
        [[torch.ones(9).as_strided((3, 3), (2, 1))], [torch.ones(3, 3)], 1.0],
        {},
        "accumulators[0] has shape (3, 3) and strides (2, 1), so that elements share memory",
    ),
    "statistics_dtype": (
        scale_accumulate_,
        [[A], [G], 1.0],
        {"statistics": torch.zeros(3)},
        "statistics is a torch.float32 tensor of shape (3,); it must be contiguous, torch.float64",
    ),
    "statistics_shape": (
        scale_accumulate_,
        [[A], [G], 1.0],
        {"statistics": torch.zeros(4, dtype=torch.float64)},
        "tensor of shape (4,); it must be contiguous, torch.float64, of shape (3,)",
    ),
    "statistics_strides": (
        gradient_statistics_,
        [[G], torch.zeros(6, dtype=torch.float64)[::2]],
        {},
        "it must be contiguous, torch.float64, of shape (3,)",
    ),
    "statistics_device": (
        gradient_statistics_,
        [[G], torch.zeros(3, dtype=torch.float64, device="meta")],
        {},
        "statistics is on meta but the tensors are on cpu",
    ),
    "observed_dtype": (
        gradient_statistics_,
        [[G.long()], new_statistics()],
        {},
        "gradients[0] has dtype",
    ),
    "output_dtype": (finalise_, [[A.int()], [G]], {}, "outputs[0] has dtype"),
    "finalised_dtype": (
        finalise_,
        [[A], [G.half()]],
        {},
        "accumulators[0] has dtype torch.float16; it must be one of torch.float32, torch.float64",
    ),
    "scale_dtype": (
        finalise_,
        [[A], [G], scalar(dtype=torch.float32)],
        {},
        "scale is a torch.float32 tensor of shape (); it must be a torch.float64 tensor of no dim",
    ),
    "scale_shape": (
        finalise_,
        [[A], [G], torch.ones(1, dtype=torch.float64)],
        {},
        "scale is a torch.float64 tensor of shape (1,); it must be a torch.float64 tensor of no dim",
    ),
    "norm_alone": (
        finalise_,
        [[A], [G]],
        {"norm": scalar()},
        "norm and max_norm go together",
    ),
    "max_norm_alone": (finalise_, [[A], [G]], {"max_norm": 1.0}, "norm and max_norm go together"),
    "max_norm_zero": (
        finalise_,
        [[A], [G]],
        {"norm": scalar(), "max_norm": 0.0},
        "max_norm is 0",
    ),
    "max_norm_negative": (
        finalise_,
        [[A], [G]],
        {"norm": scalar(), "max_norm": -1.0},
        "it must be greater than 0",
    ),
    "sparse_scale": (
        finalise_,
        [[A], [G], scalar().to_sparse()],
        {},
        "scale is not in the layout torch.strided; it must be dense, call .to_dense() on it first",
    ),
    "sparse_norm": (
        finalise_,
        [[A], [G]],
        {"norm": scalar().to_sparse(), "max_norm": 1.0},
        "norm is not in the layout torch.strided; it must be dense, call .to_dense() on it first",
    ),
    "sparse_statistics": (
        gradient_statistics_,
        [[G], new_statistics().to_sparse()],
        {},
        "statistics is not in the layout torch.strided; it must be dense, call .to_dense() on it",
    ),
    "accumulator_twice": (
        scale_accumulate_,
        [[A, A], [G, G], 1.0],
        {},
        "accumulators[0] and accumulators[1] share memory; pass each tensor once",
    ),
    "channels_last_twice": (
        scale_accumulate_,
        [[A, LAST, LAST], [G, LAST.clone(), LAST.clone()], 1.0],
        {},
        "accumulators[1] and accumulators[2] share memory; pass each tensor once",
    ),
    "transposed_twice": (
        scale_accumulate_,
        [[B[:12].view(3, 4).t(), B[:12].view(3, 4)], [torch.ones(4, 3), torch.ones(3, 4)], 1.0],
        {},
        "accumulators[0] and accumulators[1] share memory; pass each tensor once",
    ),
    "gaps_twice": (
        scale_accumulate_,
        [[B[::2], B[::2]], [torch.ones(12), torch.ones(12)], 1.0],
        {},
        "accumulators[0] and accumulators[1] share memory; pass each tensor once",
    ),
    "a_range_within_a_range": (  # the neighbours in the order of addresses are apart
        scale_accumulate_,
        [[B[9:12], B[:12], B[3:6]], [G, torch.ones(12), G], 1.0],
        {},
        "accumulators[1] and accumulators[2] share memory; pass each tensor once",
    ),
    "output_over_accumulator": (
        finalise_,
        [[B[1:8]], [B[0:7]]],
        {},
        "outputs[0] and accumulators[0] share memory; pass a .clone() of accumulators[0]",
    ),
    "output_over_another_accumulator": (
        finalise_,
        [[A, B[:4]], [B[1:4], torch.ones(4)]],
        {},
        "outputs[1] and accumulators[0] share memory; pass a .clone() of accumulators[0]",
    ),
    "output_and_accumulator_change_places": (
        finalise_,
        [[B[:3], B[3:6]], [B[3:6], B[:3]]],
        {},
        "outputs[0] and accumulators[1] share memory; pass a .clone() of accumulators[1]",
    ),
    "output_is_the_transpose": (
        finalise_,
        [[B[:9].view(3, 3).t()], [B[:9].view(3, 3)]],
        {},
        "outputs[0] and accumulators[0] share memory; pass a .clone() of accumulators[0]",
    ),
    "output_in_the_same_place_of_another_dtype": (
        finalise_,
        [[B.view(torch.bfloat16)[:24]], [B]],
        {},
        "outputs[0] and accumulators[0] share memory; pass a .clone() of accumulators[0]",
    ),
    "gradient_over_accumulator": (
        scale_accumulate_,
        [[B[4:8]], [B[5:6].expand(4)], 1.0],
        {},
        "accumulators[0] and gradients[0] share memory; pass a .clone() of gradients[0]",
    ),
    "accumulator_within_gradients": (
        scale_accumulate_,
        [[A, B[4:7]], [B[2:5], G], 1.0],
        {},
        "accumulators[1] and gradients[0] share memory; pass a .clone() of gradients[0]",
    ),
    "expanded_output": (
        finalise_,
        [[torch.ones(1).expand(3)], [G]],
        {},
        "outputs[0] has shape (3,) and strides (0,), so that elements share memory; pass a .clone()",
    ),
}


class TestRefusedCalls:
    @pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
    def test_same_words_and_nothing_written(
        self, case: tuple[Callable[..., None], list[Any], dict[str, Any], str], backend: str
    ) -> None:
        function, arguments, options, words = case
        tensors = [t for a in arguments for t in (a if isinstance(a, list) else [a])]
        tensors = [t for t in tensors if isinstance(t, Tensor) and t.device.type == "cpu"]
        tensors = [t for t in tensors if not t.is_sparse and t.numel() < 100]
        before = [tensor.clone() for tensor in tensors]
        with pytest.raises(RuntimeError) as caught:
            function(*arguments, **options, backend=backend)
        assert f"{function.__name__}: " in str(caught.value)
        assert words in str(caught.value)
        assert all(map(torch.equal, tensors, before))

    def test_a_late_fault_leaves_the_first_pair_alone(self, backend: str) -> None:
        accumulator, statistics = torch.ones(3), new_statistics()
        with pytest.raises(RuntimeError, match="dtype"):
            scale_accumulate_(
                [accumulator, torch.ones(3)],
                [G, G.int()],
                1.0,
                statistics=statistics,
                backend=backend,
            )
        assert torch.equal(accumulator, torch.ones(3))
        assert statistics.tolist() == [0.0, 0.0, 0.0]

    def test_what_shares_no_element_is_accepted(self, backend: str) -> None:
        """Interleaved, one after another, in place, read twice, or empty."""
        held = torch.arange(12.0)
        even, odd, whole = held[::2], held[1::2], torch.arange(12.0)
        pairs = [(even, odd.clone()), (odd, odd.clone()), (whole[:6], whole[:6])]
        pairs += [(whole[6:9], G), (whole[9:], G), (whole[3:3], whole[3:3])]
        expected = [written + 2 * read for written, read in pairs]
        scale_accumulate_(*map(list, zip(*pairs, strict=True)), 2.0, backend=backend)
        assert all(torch.equal(pair[0], sum_) for pair, sum_ in zip(pairs, expected, strict=True))

    def test_no_sparse_kernel_returns(self) -> None:
        """Whatever the checks might let pass one day."""
        kernel = schemas._refuse_sparse("gradient_statistics_")
        with pytest.raises(RuntimeError, match=r"gradient_statistics_: .* sparse; call .to_dense"):
            kernel([G], new_statistics())


class TestChoiceOfBackend:
    def test_unknown(self) -> None:
        with pytest.raises(
            ValueError, match="backend is 'gpu'; it must be one of auto, cuda, triton"
        ):
            scale_accumulate_([A.clone()], [G], 1.0, backend="gpu")

    def test_cuda_computes_on_no_cpu_tensors(self) -> None:
        with pytest.raises(
            ValueError, match="backend='cuda' computes on cuda tensors, these are on cpu"
        ):
            scale_accumulate_([A.clone()], [G], 1.0, backend="cuda")

    def test_explicit_never_falls_back_and_auto_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def availability(name: str) -> Availability:
            return Availability(name == "reference", "it is away")

        monkeypatch.setattr(backends, "availability", availability)
        backends._resolve.cache_clear()
        try:
            for name in ("cpu", "triton"):
                with pytest.raises(
                    BackendUnavailableError,
                    match=f"backend='{name}' is not usable here: it is away",
                ):
                    scale_accumulate_([A.clone()], [G], 1.0, backend=name)
            assert ops.resolve("auto", "cpu") == "reference"
            accumulator = torch.ones(3)
            scale_accumulate_([accumulator], [G], 1.0)
            assert torch.equal(accumulator, torch.full((3,), 3.0))
        finally:
            monkeypatch.undo()
            backends._resolve.cache_clear()

    def test_the_environment_replaces_auto_and_nothing_else(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SBP_FAST_BACKEND", "reference")
        assert ops.resolve("auto", "cpu") == "reference"
        if ops.availability("cpu").usable:
            assert ops.resolve("cpu", "cpu") == "cpu"
        monkeypatch.setenv("SBP_FAST_BACKEND", "fastest")
        with pytest.raises(ValueError, match="'fastest'; it must be one of"):
            scale_accumulate_([A.clone()], [G], 1.0)
        scale_accumulate_([A.clone()], [G], 1.0, backend="reference")

    def test_every_backend_says_whether_it_is_usable(self) -> None:
        for name in BACKENDS[1:]:
            usable, reason = ops.availability(name)
            assert usable or reason


class TestPyTorchContract:
    def test_opcheck(self, backend: str) -> None:
        overload = "default" if backend == "cpu" else backend
        packets = torch.ops.sbp_fast
        wide, narrow = [randn(5), randn(2, 3)], [randn(5), randn(2, 3, dtype=torch.bfloat16)]
        statistics = new_statistics()
        samples: list[tuple[Any, tuple[Any, ...]]] = [
            (packets.scale_accumulate_, (wide, narrow, 0.5)),
            (packets.scale_accumulate_, (wide, narrow, 0.5, True, statistics)),
            (packets.gradient_statistics_, (narrow, statistics)),
            (packets.finalise_, (narrow, wide, scalar(0.5))),
            (packets.finalise_, (narrow, wide, scalar(0.5), scalar(2.0), 1.0)),
        ]
        for packet, arguments in samples:
            torch.library.opcheck(getattr(packet, overload), arguments)

    def test_compiles(self, backend: str) -> None:
        """Without a break in the graph, the choice among backends included."""
        name = "auto" if backend == "cpu" else backend

        def accumulate(accumulator: Tensor, gradient: Tensor, statistics: Tensor) -> Tensor:
            doubled = gradient * 2
            scale_accumulate_([accumulator], [doubled], 0.5, statistics=statistics, backend=name)
            return accumulator + statistics[0]

        compiled = torch.compile(accumulate, fullgraph=True, backend="aot_eager")
        plain = [torch.ones(4), G.new_ones(4), new_statistics()]
        traced = [tensor.clone() for tensor in plain]
        assert torch.equal(compiled(*traced), accumulate(*plain))
        assert all(map(torch.equal, traced, plain))

    def test_writing_counts_as_a_new_version(self, backend: str) -> None:
        """Autograd refuses to use what was overwritten only where versions say so."""
        accumulator, output, statistics = torch.ones(3), torch.ones(3), new_statistics()
        written = [accumulator, output, statistics]
        versions = [tensor._version for tensor in written]
        scale_accumulate_([accumulator], [G], 1.0, statistics=statistics, backend=backend)
        finalise_([output], [accumulator], backend=backend)
        assert [tensor._version > v for tensor, v in zip(written, versions, strict=True)] == [
            True
        ] * 3

    @needs_native
    def test_statistics_do_not_depend_on_threads(self) -> None:
        accumulators = [randn(size) for size in SIZES]
        gradients = [randn(size, dtype=torch.bfloat16) for size in SIZES]
        results = []
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 2):
                torch.set_num_threads(count)
                statistics = new_statistics()
                copies = [accumulator.clone() for accumulator in accumulators]
                scale_accumulate_(copies, gradients, SCALE, statistics=statistics, backend="cpu")
                gradient_statistics_(gradients, statistics, backend="cpu")
                results.append([statistics, *copies])
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))


# Read once per process, so each instruction set needs its own.
CAPABILITY_CHECK = """
    import itertools
    import torch
    from sbp_fast.ops import finalise_, gradient_statistics_, native, new_statistics, scale_accumulate_

    assert native.load_cpu().usable
    torch.manual_seed(0)
    sizes = (0, 1, 7, 31, 64, 65, 16385)
    for wide, narrow in itertools.product(
        (torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    ):
        accumulators = [torch.randn(size, dtype=wide) for size in sizes]
        gradients = [torch.randn(size).to(narrow) for size in sizes]
        for first_write, shift in ((False, 0), (True, 0), (False, 1), (True, 1)):
            results = []
            for backend in ("cpu", "reference"):
                statistics = new_statistics()
                sums = [a.clone()[shift:] for a in accumulators]
                read = [g[shift:] for g in gradients]
                scale_accumulate_(
                    sums, read, 0.37, first_write=first_write, statistics=statistics, backend=backend
                )
                gradient_statistics_(read, statistics, backend=backend)
                outputs = [torch.empty_like(g) for g in read]
                norm = statistics[1].sqrt()
                finalise_(outputs, sums, 0.5, norm=norm, max_norm=1.0, backend=backend)
                results.append((sums, outputs, statistics))
            # All in one vector: where single sums cancel, they have the terms' rounding errors.
            for which, bound in ((0, {bounds}[wide]), (1, max({bounds}[wide], {bounds}[narrow]))):
                ours, theirs = (torch.cat(result[which]).double() for result in results)
                error = (ours - theirs).norm() / theirs.norm()
                assert error <= bound, (wide, narrow, first_write, shift, which, error)
            ours, theirs = (result[2] for result in results)
            # The statistics are exact, of sums that differ by their roundings.
            assert ours[0] == theirs[0] or abs(ours[0] / theirs[0] - 1) <= {sum_of_squares}
            assert abs(ours[1] / theirs[1] - 1) <= {bounds}[wide]
            assert ours[2] == theirs[2] == 0.0
    bad = torch.zeros(70)
    for value, position in itertools.product((torch.inf, -torch.inf, torch.nan), (0, 33, 69)):
        statistics = new_statistics()
        bad.zero_()[position] = value
        gradient_statistics_([bad], statistics, backend="cpu")
        assert statistics[2] == 1.0
    print("instruction set:", native.cpu_instruction_set())
"""


@needs_native
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_instruction_sets(capability: str) -> None:
    bounds = "{" + ", ".join(f"{d}: {v!r}" for d, v in tolerances.RELATIVE.items()) + "}"
    script = textwrap.dedent(CAPABILITY_CHECK).replace("{bounds}", bounds)
    script = script.replace("{sum_of_squares}", repr(tolerances.SUM_OF_SQUARES))
    environment = {**os.environ, "SBP_FAST_CPU_CAPABILITY": capability}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    chosen = process.stdout.strip().rpartition(" ")[2]
    widths = ["baseline", "avx2", "avx512"]
    assert widths.index(chosen) <= widths.index(capability)
    if chosen != capability:
        pytest.skip(f"this processor has no {capability}; {chosen} was tested instead")
