"""The batch norm ops on CPU tensors, in every backend that has them, against extended precision."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sbp_fast.ops import (
    batch_norm_backward_apply,
    batch_norm_backward_statistics,
    batch_norm_normalise,
    batch_norm_statistics,
)
from sbp_fast.ops.native import load_cpu

# Triton's have tests of their own (test_triton_batch_norm.py): interpreted, these would take too long.
BACKENDS = ("cpu", "reference")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Around vectors of 4 to 16 elements, in the channels and in the images; samples one by one.
SHAPES = (
    (4, 7), (129, 33), (3, 2), (1, 5), (40, 1),
    (3, 5, 7, 9), (8, 64, 4, 4), (8, 16, 2, 2), (2, 3, 1, 1), (2, 70, 3, 3), (1, 1, 5, 5), (6, 300, 2, 2),
    (5, 1, 6), (3, 2, 17), (2, 2, 33), (2, 3, 15), (3, 5, 2, 4, 6), (2, 19, 3, 1, 1),
)  # fmt: skip

# Cut into several blocks, at every end: within an image, between images, between channels.
LARGE_SHAPES = ((1, 3, 211, 301), (5, 2, 100, 100), (3001, 37), (70, 130, 3, 5), (1, 3000, 2, 7))

needs_native = pytest.mark.skipif(
    not load_cpu().usable, reason=f"backend cpu: {load_cpu().reason or 'usable'}"
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def backend(backend: str) -> str:
    """Shadows the fixture of every op: not every backend has these."""
    if backend not in BACKENDS:
        pytest.skip(f"backend {backend} is tested in test_triton_batch_norm.py")
    return backend


def takes_too_long(shape: Sequence[int], backend: str) -> bool:
    """Interpreted, every channel of images takes milliseconds."""
    return backend == "triton" and len(shape) > 2 and shape[1] > 36


def contiguous(tensor: Tensor) -> Tensor:
    return tensor


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def channels_first(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, 0).contiguous().movedim(0, 1)


def images_transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.ndim > 3 else tensor


def with_gaps(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def with_gaps_between_channels(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, dim=1)[:, ::2]


def misaligned(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    contiguous, channels_last, channels_first, images_transposed, with_gaps,
    with_gaps_between_channels, misaligned,
)  # fmt: skip
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def randn(shape: Sequence[int], dtype: torch.dtype, mean: float = 1.5, std: float = 2.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * std + mean).to(dtype)


def coefficients(rows: int, input: Tensor) -> Tensor:
    return torch.randn(rows, input.shape[1], dtype=torch.float64) + 0.5


Extended = np.ndarray[Any, np.dtype[np.longdouble]]


def exact(tensor: Tensor) -> Extended:
    """In extended precision, with the channels in rows."""
    rows = tensor.double().movedim(1, 0).reshape(tensor.shape[1], -1)
    return rows.numpy().astype(np.longdouble)


def like(rows: Extended, input: Tensor) -> Tensor:
    """What :func:`exact` took apart, in float64."""
    moved = input.movedim(1, 0)
    return torch.from_numpy(rows.astype(np.float64)).reshape(moved.shape).movedim(0, 1)


def column(row: Tensor) -> Extended:
    return row.numpy().astype(np.longdouble)[:, None]


def bound_of(input: Tensor, backend: str) -> float:
    return (
        tolerances.CHANNEL_SUMS[input.dtype] if backend == "triton" else tolerances.BATCH_NORM_SUMS
    )


def check_sums(sums: Tensor, terms: Sequence[Extended], relative: float) -> None:
    """Each row against the sums of its terms, relative to the terms' magnitudes."""
    assert sums.dtype == torch.float64
    assert sums.shape == (len(terms), len(terms[0]))
    assert sums.is_contiguous()
    for row, values in zip(sums.numpy(), terms, strict=True):
        bound = relative * np.abs(values).sum(1)
        assert (np.abs(row - values.sum(1)) <= bound).all()


def check_elements(result: Tensor, oracle: Tensor, input: Tensor) -> None:
    assert result.dtype == input.dtype
    assert result.stride() == torch.empty_like(input).stride()
    error = float((result.double() - oracle).norm() / oracle.norm())
    assert error <= tolerances.RELATIVE[input.dtype]


def check_statistics(input: Tensor, backend: str) -> None:
    x, before = exact(input), input.clone()
    statistics = batch_norm_statistics(input, backend=backend)
    squares = np.square(x - x.mean(1, keepdims=True))
    relative = bound_of(input, backend)
    if backend == "triton":
        deviation = np.sqrt(squares.mean(1))
        relative += tolerances.MERGED_MEANS * float(
            (np.abs(x.mean(1)) / deviation.clip(1e-30)).max()
        )
    check_sums(statistics, [x / x.shape[1], squares], relative)
    assert torch.equal(input, before)


def check_normalise(input: Tensor, backend: str) -> None:
    table, before = coefficients(3, input), input.clone()
    mean, scale, shift = map(column, table)
    oracle = like((exact(input) - mean) * scale + shift, input)
    check_elements(batch_norm_normalise(input, table, backend=backend), oracle, input)
    assert torch.equal(input, before)


def check_backward_statistics(grad_output: Tensor, input: Tensor, backend: str) -> None:
    table = coefficients(2, input)
    mean, inv_std = map(column, table)
    dy = exact(grad_output)
    sums = batch_norm_backward_statistics(grad_output, input, table, backend=backend)
    terms = [dy, dy * ((exact(input) - mean) * inv_std)]
    check_sums(sums, terms, bound_of(input, backend))


def check_backward_apply(grad_output: Tensor, input: Tensor, backend: str) -> None:
    table = coefficients(4, input)
    before = [grad_output.clone(), input.clone()]
    mean, a, b, c = map(column, table)
    oracle = like(a * exact(grad_output) + b * (exact(input) - mean) + c, input)
    result = batch_norm_backward_apply(grad_output, input, table, backend=backend)
    check_elements(result, oracle, input)
    assert all(map(torch.equal, [grad_output, input], before))


class TestValues:
    @dtypes
    def test_every_shape(self, backend: str, dtype: torch.dtype) -> None:
        for shape in SHAPES:
            if takes_too_long(shape, backend):
                continue
            input, grad_output = randn(shape, dtype), randn(shape, dtype)
            check_statistics(input, backend)
            check_normalise(input, backend)
            check_backward_statistics(grad_output, input, backend)
            check_backward_apply(grad_output, input, backend)

    @layouts
    @dtypes
    def test_every_layout(
        self, backend: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
    ) -> None:
        for shape in ((5, 37, 3, 5), (3, 20, 2, 2), (2, 3, 6, 11), (3, 4, 2, 3, 4), (9, 21)):
            if takes_too_long(shape, backend):
                continue
            input = layout(randn(shape, dtype))
            check_statistics(input, backend)
            check_normalise(input, backend)
            for other in LAYOUTS if backend != "triton" else (contiguous, layout):
                grad_output = other(randn(shape, dtype))
                check_backward_statistics(grad_output, input, backend)
                check_backward_apply(grad_output, input, backend)

    @pytest.mark.parametrize("layout", [contiguous, channels_last, channels_first])
    @pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
    def test_many_blocks(
        self, backend: str, shape: tuple[int, ...], layout: Callable[[Tensor], Tensor]
    ) -> None:
        if takes_too_long(shape, backend):
            pytest.skip("interpreted, every channel of images takes milliseconds")
        input, grad_output = layout(randn(shape, torch.float32)), randn(shape, torch.float32)
        check_statistics(input, backend)
        check_normalise(input, backend)
        check_backward_statistics(grad_output, input, backend)
        check_backward_apply(layout(grad_output), input, backend)

    @pytest.mark.parametrize("shape", [(12, 5, 6, 6), (12, 5, 2, 2), (1, 2, 150, 150), (300, 9)])
    @pytest.mark.parametrize(
        ("dtype", "mean", "std"), [(torch.float64, 1e4, 1e-2), (torch.float32, 1e3, 1.0)]
    )
    def test_means_far_from_zero(
        self, backend: str, dtype: torch.dtype, mean: float, std: float, shape: tuple[int, ...]
    ) -> None:
        """The difference of the mean of squares and the square of the mean would be all wrong."""
        for layout in (contiguous, channels_last):
            input = layout(randn(shape, dtype, mean, std))
            check_statistics(input, backend)
            x = exact(input)
            table = torch.randn(4, shape[1], dtype=torch.float64)
            table[0] = torch.from_numpy(x.mean(1).astype(np.float64))
            distance = x - column(table[0])
            result = batch_norm_normalise(input, table[:3], backend=backend)
            check_elements(
                result, like(distance * column(table[1]) + column(table[2]), input), input
            )
            grad_output = randn(shape, dtype)
            oracle = column(table[1]) * exact(grad_output) + column(table[2]) * distance
            result = batch_norm_backward_apply(grad_output, input, table, backend=backend)
            check_elements(result, like(oracle + column(table[3]), input), input)

    def test_an_outlier_at_the_front(self, backend: str) -> None:
        """Where the kernels look for a value near the mean."""
        for shape in ((8, 3, 64, 64), (8, 3, 2, 2), (500, 3)):
            input = randn(shape, torch.float64, 0.0, 1.0)
            input.view(*shape[:2], -1)[0, :, 0] = 1e6
            check_statistics(input, backend)

    @pytest.mark.parametrize("shape", [(5, 3, 9, 9), (5, 3, 2, 2), (700, 40), (1, 2, 200, 200)])
    def test_a_constant_channel_has_no_variance(self, backend: str, shape: tuple[int, ...]) -> None:
        values = torch.randn(shape[1], dtype=torch.float64) * 1e6
        input = values.view(-1, *[1] * (len(shape) - 2)).expand(shape).contiguous()
        mean, m2 = batch_norm_statistics(input, backend=backend)
        rounding = tolerances.RELATIVE[torch.float64] * values.abs()
        assert bool(((mean - values).abs() <= rounding).all())
        assert bool((m2 <= input.numel() / shape[1] * rounding.square()).all())

    @pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, interpreting
    @pytest.mark.parametrize("layout", [contiguous, channels_last])
    @pytest.mark.parametrize("shape", [(4, 3, 5, 7), (4, 3, 2, 2), (4, 35, 1, 1), (2, 3, 130, 130)])
    def test_what_is_not_finite_stays_in_its_channel(
        self, backend: str, shape: tuple[int, ...], layout: Callable[[Tensor], Tensor]
    ) -> None:
        last = shape[0] * shape[2] * shape[3] - 1
        if backend == "triton" and last > 10_000:
            pytest.skip("interpreted, images of this size take a minute")
        for bad, position in itertools.product((torch.nan, torch.inf, -torch.inf), (0, last)):
            rows = torch.randn(shape[1], last + 1)
            rows[1, position] = bad
            input = rows.view(shape[1], shape[0], *shape[2:]).movedim(0, 1).contiguous()
            input, clean = layout(input), input.nan_to_num(posinf=0.0, neginf=0.0)
            mean, m2 = batch_norm_statistics(input, backend=backend)
            assert str(mean[1].item()) == str(bad)
            assert m2[1].isnan()
            others = [c for c in range(shape[1]) if c != 1]
            expected = batch_norm_statistics(clean, backend=backend)
            assert torch.allclose(torch.stack([mean, m2])[:, others], expected[:, others])

            table = coefficients(4, input)
            for result, finite in (
                (
                    batch_norm_normalise(input, table[:3], backend=backend),
                    batch_norm_normalise(clean, table[:3], backend=backend),
                ),
                (
                    batch_norm_backward_apply(input, clean, table, backend=backend),
                    batch_norm_backward_apply(clean, clean, table, backend=backend),
                ),
            ):
                same = torch.isclose(result, finite)
                assert int((~same).sum()) == 1
                value = result[~same].item()
                assert (value != value) if bad != bad else abs(value) == torch.inf
            sums = batch_norm_backward_statistics(input, clean, table[:2], backend=backend)
            assert str(sums[0, 1].item()) == str(bad)
            assert not bool(sums[1, 1].isfinite())
            assert bool(sums[:, others].isfinite().all())

    @pytest.mark.parametrize("shape", [(0, 3, 2, 2), (4, 3, 0, 2), (0, 3), (2, 0, 3), (0, 0)])
    def test_empty(self, backend: str, shape: tuple[int, ...]) -> None:
        input = torch.empty(shape)
        nan = torch.full((4, shape[1]), torch.nan, dtype=torch.float64)
        zeros = torch.zeros(2, shape[1], dtype=torch.float64)
        statistics = batch_norm_statistics(input, backend=backend)
        assert torch.equal(statistics, zeros)
        sums = batch_norm_backward_statistics(input, input, nan[:2], backend=backend)
        assert torch.equal(sums, zeros)
        assert batch_norm_normalise(input, nan[:3], backend=backend).shape == shape
        assert batch_norm_backward_apply(input, input, nan, backend=backend).shape == shape

    def test_coefficients_of_any_strides(self, backend: str) -> None:
        input = randn((3, 5, 2, 4), torch.float32)
        table = torch.randn(5, 8, dtype=torch.float64)[:, ::2].t()
        for op, rows in ((batch_norm_normalise, 3), (batch_norm_backward_apply, 4)):
            arguments = [input] * (rows - 2)
            assert torch.equal(
                op(*arguments, table[:rows], backend=backend),
                op(*arguments, table[:rows].contiguous(), backend=backend),
            )


class TestWholeBatch:
    """The ops together are torch's batch norm, however the batch is split."""

    @pytest.mark.parametrize("layout", [contiguous, channels_last])
    @pytest.mark.parametrize("splits", [(7,), (3, 3, 1), (1,) * 7], ids=str)
    @pytest.mark.parametrize("shape", [(7, 5, 6, 6), (7, 33, 2, 2), (7, 20)], ids=str)
    def test_forward_and_backward(
        self,
        backend: str,
        shape: tuple[int, ...],
        splits: tuple[int, ...],
        layout: Callable[[Tensor], Tensor],
    ) -> None:
        eps = 1e-5
        input, grad_output = layout(randn(shape, torch.float64)), randn(shape, torch.float64)
        weight, bias = torch.randn(2, shape[1], dtype=torch.float64)
        output, mean, inv_std = torch.native_batch_norm(
            input, weight, bias, None, None, True, 0.1, eps
        )
        grad_input, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_output, input, weight, None, None, mean, inv_std, True, eps, [True] * 3
        )

        xs, dys = input.split(splits), grad_output.split(splits)
        parts = torch.stack([batch_norm_statistics(x, backend=backend) for x in xs])
        counts = torch.tensor([x.numel() / shape[1] for x in xs], dtype=torch.float64)[:, None]
        n = counts.sum()
        mean = (counts * parts[:, 0]).sum(0) / n
        m2 = (parts[:, 1] + counts * (parts[:, 0] - mean).square()).sum(0)
        inv_std = (m2 / n + eps).rsqrt()
        forward = torch.stack([mean, inv_std * weight, bias])
        ours = torch.cat([batch_norm_normalise(x, forward, backend=backend) for x in xs])
        sum_dy, sum_dy_xhat = sum(
            batch_norm_backward_statistics(dy, x, torch.stack([mean, inv_std]), backend=backend)
            for dy, x in zip(dys, xs, strict=True)
        )
        a = weight * inv_std
        table = torch.stack([mean, a, -a * inv_std * sum_dy_xhat / n, -a * sum_dy / n])
        our_gradient = torch.cat(
            [
                batch_norm_backward_apply(dy, x, table, backend=backend)
                for dy, x in zip(dys, xs, strict=True)
            ]
        )
        for result, oracle in (
            (ours, output),
            (our_gradient, grad_input),
            (sum_dy_xhat, grad_weight),
            (sum_dy, grad_bias),
        ):
            assert float((result - oracle).norm() / oracle.norm()) <= tolerances.BATCH_NORM


X = torch.ones(2, 3, 4)
TABLE = torch.ones(4, 3, dtype=torch.float64)

# What is called, with what, and the words of the refusal.
REFUSED: dict[str, tuple[Callable[..., Tensor], list[Tensor], str]] = {
    "dtype": (batch_norm_statistics, [X.int()], "input has dtype"),
    "dimensions": (
        batch_norm_statistics,
        [torch.ones(3)],
        "input has shape (3,); it must have at least two dimensions, (samples, channels, ...)",
    ),
    "sparse": (
        batch_norm_statistics,
        [X.to_sparse()],
        "input is not in the layout torch.strided; it must be dense, call .to_dense() on it first",
    ),
    "normalised_dtype": (batch_norm_normalise, [X.long(), TABLE[:3]], "input has dtype"),
    "coefficients_dtype": (
        batch_norm_normalise,
        [X, TABLE[:3].float()],
        "coefficients have dtype torch.float32 and shape (3, 3); they must be float64 of shape "
        "(3, 3), one column per channel",
    ),
    "coefficients_rows": (
        batch_norm_normalise,
        [X, TABLE],
        "coefficients have dtype torch.float64 and shape (4, 3); they must be float64 of shape (3, 3)",
    ),
    "coefficients_columns": (
        batch_norm_backward_statistics,
        [X, X, TABLE[:2, :2]],
        "shape (2, 2); they must be float64 of shape (2, 3)",
    ),
    "coefficients_dimensions": (
        batch_norm_backward_apply,
        [X, X, TABLE[None]],
        "shape (1, 4, 3); they must be float64 of shape (4, 3)",
    ),
    "sparse_coefficients": (
        batch_norm_normalise,
        [X, TABLE[:3].to_sparse()],
        "coefficients is not in the layout torch.strided; it must be dense, call .to_dense() on it",
    ),
    "coefficients_device": (
        batch_norm_normalise,
        [X, TABLE[:3].to("meta")],
        "coefficients are on meta but input is on cpu; all tensors of a call must share one device",
    ),
    "gradient_shape": (
        batch_norm_backward_statistics,
        [torch.ones(2, 3, 5), X, TABLE[:2]],
        "grad_output has shape (2, 3, 5) but input has shape (2, 3, 4); the shapes must be equal",
    ),
    "gradient_dimensions": (
        batch_norm_backward_apply,
        [X[..., None], X, TABLE],
        "grad_output has shape (2, 3, 4, 1) but input has shape (2, 3, 4); the shapes must be equal",
    ),
    "gradient_dtype": (
        batch_norm_backward_apply,
        [X.double(), X, TABLE],
        "grad_output has dtype torch.float64 but input has dtype torch.float32; they must be equal",
    ),
    "gradient_kind": (batch_norm_backward_apply, [X.int(), X, TABLE], "grad_output has dtype"),
    "gradient_device": (
        batch_norm_backward_statistics,
        [X.to("meta"), X, TABLE[:2]],
        "grad_output has device meta but input has device cpu; they must be equal",
    ),
    "sparse_gradient": (
        batch_norm_backward_apply,
        [X.to_sparse(), X, TABLE],
        "grad_output is not in the layout torch.strided; it must be dense, call .to_dense() on it",
    ),
}


class TestContract:
    @pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
    def test_refused_in_the_same_words(
        self, case: tuple[Callable[..., Tensor], list[Tensor], str], backend: str
    ) -> None:
        function, arguments, words = case
        with pytest.raises(RuntimeError) as caught:
            function(*arguments, backend=backend)
        assert f"{function.__name__}: " in str(caught.value)
        assert words in str(caught.value)

    def test_opcheck(self, backend: str) -> None:
        overload = "default" if backend == "cpu" else backend
        packets = torch.ops.sbp_fast
        for layout in (contiguous, channels_last, with_gaps):
            x, dy = layout(torch.randn(2, 3, 4, 5)), torch.randn(2, 3, 4, 5)
            for packet, arguments in (
                (packets.batch_norm_statistics, (x,)),
                (packets.batch_norm_normalise, (x, TABLE[:3])),
                (packets.batch_norm_backward_statistics, (dy, x, TABLE[:2])),
                (packets.batch_norm_backward_apply, (dy, x, TABLE)),
            ):
                torch.library.opcheck(getattr(packet, overload), arguments)

    @layouts
    def test_fakes_have_the_same_strides(
        self, backend: str, layout: Callable[[Tensor], Tensor]
    ) -> None:
        for shape, dtype in itertools.product(((2, 3, 4, 5), (2, 1, 3, 1)), DTYPES):
            x = layout(torch.ones(shape, dtype=dtype))
            table = torch.ones(4, shape[1], dtype=torch.float64)
            for op, arguments in (
                (batch_norm_statistics, (x,)),
                (batch_norm_normalise, (x, table[:3])),
                (batch_norm_backward_statistics, (x, x, table[:2])),
                (batch_norm_backward_apply, (x, x, table)),
            ):
                real = op(*arguments, backend=backend)
                with FakeTensorMode() as mode:
                    fake = op(*map(mode.from_tensor, arguments), backend=backend)
                assert (fake.shape, fake.stride(), fake.dtype) == (
                    real.shape,
                    real.stride(),
                    real.dtype,
                )

    def test_compiles(self, backend: str) -> None:
        """Without a break in the graph, the choice among backends included."""
        name = "auto" if backend == "cpu" else backend

        def standardise(x: Tensor) -> Tensor:
            mean, m2 = batch_norm_statistics(x, backend=name)
            inv_std = (m2 / (x.numel() / x.shape[1]) + 1e-5).rsqrt()
            table = torch.stack([mean, inv_std, torch.zeros_like(mean)])
            return batch_norm_normalise(x, table, backend=name)

        x = torch.randn(4, 3, 5)
        compiled = torch.compile(standardise, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), standardise(x))

    @needs_native
    def test_results_do_not_depend_on_threads(self) -> None:
        inputs = [randn(shape, torch.float32) for shape in LARGE_SHAPES]
        inputs += [channels_last(input) for input in inputs]
        results = []
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 3, 3):
                torch.set_num_threads(count)
                results.append(
                    [
                        tensor
                        for x in inputs
                        for table in [torch.full((2, x.shape[1]), 0.7, dtype=torch.float64)]
                        for tensor in (
                            batch_norm_statistics(x, backend="cpu"),
                            batch_norm_backward_statistics(x, x, table, backend="cpu"),
                        )
                    ]
                )
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))


# Read once per process, so each instruction set needs its own.
CAPABILITY_CHECK = """
    import torch
    from sbp_fast import ops
    from sbp_fast.ops import native

    assert native.load_cpu().usable
    torch.manual_seed(0)
    shapes = ((3, 5, 7, 9), (9, 70, 2, 2), (30, 33), (5, 3), (2, 3, 1, 131), (8, 20, 4, 4), (300, 130))
    for dtype, bound in {bounds}.items():
        for shape in shapes:
            for last in (False, True):
                x, dy = torch.randn(2, *shape, dtype=torch.float64).add_(3.0).to(dtype)
                if last:
                    x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
                table = torch.randn(4, shape[1], dtype=torch.float64)
                results = [
                    (
                        ops.batch_norm_statistics(x, backend=backend),
                        ops.batch_norm_backward_statistics(dy, x, table[:2], backend=backend),
                        ops.batch_norm_normalise(x, table[:3], backend=backend),
                        ops.batch_norm_backward_apply(dy, x, table, backend=backend),
                    )
                    for backend in ("cpu", "reference")
                ]
                for ours, theirs in zip(*results, strict=True):
                    error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
                    limit = {sums} if ours.dtype != dtype else bound
                    assert error <= limit, (dtype, shape, last, error)
    print("instruction set:", native.cpu_instruction_set())
"""


@needs_native
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_instruction_sets(capability: str) -> None:
    bounds = "{" + ", ".join(f"{d}: {v!r}" for d, v in tolerances.RELATIVE.items()) + "}"
    script = textwrap.dedent(CAPABILITY_CHECK).replace("{bounds}", bounds)
    script = script.replace("{sums}", repr(tolerances.BATCH_NORM_SUMS))
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
