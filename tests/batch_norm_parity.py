"""What the batch norm kernels must do, wherever they run: on a device, emulated on the host, interpreted.
Test cases for a subclass that says on which tensors and how an op is called.

Compared with a computation in float64, on every way in which memory is walked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import tolerances
import torch
from torch import Tensor

from sbp_fast.ops import reference_batch_norm as reference

sanitize = pytest.mark.sanitize
# Tools that watch every access are slow, and see as much in one dtype.
each_dtype = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=sanitize),
        *(torch.float64, torch.bfloat16, torch.float16),
    ],
    ids=str,
)

# From values of some shape to a tensor of the same shape in some layout.
Layout = Callable[[Tensor], Tensor]


def as_it_is(values: Tensor) -> Tensor:
    return values


def channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


def channels_last_3d(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last_3d)


def height_innermost(values: Tensor) -> Tensor:
    """Dense, but in no order that has a name."""
    return values.transpose(2, 3).contiguous().transpose(2, 3)


def off_the_boundary(values: Tensor) -> Tensor:
    """Begins one element after a 16-byte boundary."""
    return torch.cat([values.flatten()[:1], values.flatten()])[1:].view(values.shape)


def with_gaps(values: Tensor) -> Tensor:
    return values.repeat_interleave(2, -1)[..., ::2]


def of_more_channels(values: Tensor) -> Tensor:
    return torch.cat([values, values], 1)[:, : values.shape[1]]


def expanded(values: Tensor) -> Tensor:
    return values[:1].expand_as(values)


WALKS: dict[str, tuple[tuple[int, ...], Layout]] = {
    "matrix": ((37, 24), as_it_is),
    "odd matrix": ((70, 5), as_it_is),
    "wide matrix": ((9, 600), as_it_is),
    "one sample": ((1, 7), as_it_is),
    "sequences": ((5, 6, 33), as_it_is),
    "images": ((3, 5, 6, 8), as_it_is),
    "odd images": ((3, 5, 7, 9), as_it_is),
    "large images": ((2, 2, 64, 72), as_it_is),
    "one large image": ((1, 2, 71, 101), as_it_is),
    "one value each": ((1, 3, 1, 1), as_it_is),
    "one channel": ((3, 1, 6, 8), as_it_is),
    "volumes": ((2, 3, 3, 4, 5), as_it_is),
    "channels last": ((3, 16, 5, 7), channels_last),
    "odd channels last": ((3, 5, 6, 8), channels_last),
    "many channels last": ((6, 40, 8, 9), channels_last),
    "volumes, channels last": ((2, 8, 3, 4, 5), channels_last_3d),
    "height innermost": ((3, 5, 6, 8), height_innermost),
    "off the boundary": ((3, 5, 6, 8), off_the_boundary),
    "gaps": ((3, 5, 6, 8), with_gaps),
    "more channels": ((3, 4, 5, 8), of_more_channels),
    "expanded": ((4, 3, 5, 8), expanded),
}

each_walk = pytest.mark.parametrize("walk", WALKS)


def columns(coefficients: Tensor, like: Tensor) -> list[Tensor]:
    """The rows of coefficients, each to be broadcast along channels."""
    return [row.reshape(-1, *[1] * (like.ndim - 2)) for row in coefficients]


def sum_of(values: Tensor) -> Tensor:
    return values.sum([dim for dim in range(values.ndim) if dim != 1])


class BatchNormParity:
    device: str

    def call(self, name: str, *arguments: Any) -> Tensor:
        """Runs the kernel of ``sbp_fast::name``."""
        raise NotImplementedError

    # --- Material -------------------------------------------------------------------------------

    def random(
        self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, mean: float = 0.5
    ) -> Tensor:
        generator = torch.Generator().manual_seed(seed + sum(shape))
        values = torch.randn(shape, generator=generator, dtype=torch.float64) + mean
        return values.to(self.device, dtype)

    def walked(self, walk: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
        shape, layout = WALKS[walk]
        return layout(self.random(*shape, dtype=dtype, seed=seed))

    def coefficients(self, like: Tensor, rows: int) -> Tensor:
        """Means that are near the channels' own, and factors of either sign."""
        result = self.random(rows, like.shape[1], dtype=torch.float64, seed=rows, mean=0.0)
        result[0] = like.double().mean([dim for dim in range(like.ndim) if dim != 1]) + 0.01
        return result

    # --- What is compared -----------------------------------------------------------------------

    def check_statistics(self, input: Tensor) -> None:
        mean, squares = self.call("batch_norm_statistics", input)
        x = input.double()
        count = x.numel() // x.shape[1]
        oracle = sum_of(x) / count
        apart = x - columns(oracle[None], x)[0]
        oracle, oracle_squares = oracle + sum_of(apart) / count, sum_of(apart.square())
        bound = tolerances.CHANNEL_SUMS[input.dtype]
        deviation = (oracle_squares / count).sqrt()
        rounding = tolerances.CHANNEL_SUMS[torch.float64] * oracle.abs()
        assert bool(((mean - oracle).abs() <= bound * deviation + rounding).all())
        # Times a deviation of 0 it is no bound, but neither does anything need one then.
        merging = tolerances.MERGED_MEANS * oracle.abs() * (oracle_squares * count).sqrt()
        assert bool(((squares - oracle_squares).abs() <= bound * oracle_squares + merging).all())
        assert bool((squares >= 0).all())

    def check_backward_statistics(self, grad_output: Tensor, input: Tensor) -> None:
        coefficients = self.coefficients(input, 2)
        sums, products = self.call(
            "batch_norm_backward_statistics", grad_output, input, coefficients
        )
        mean, inv_std = columns(coefficients, input)
        dy = grad_output.double()
        weighted = dy * ((input.double() - mean) * inv_std)
        bound = tolerances.CHANNEL_SUMS[input.dtype]
        for result, terms in ((sums, dy), (products, weighted)):
            assert bool(((result - sum_of(terms)).abs() <= bound * sum_of(terms.abs())).all())

    def check_normalise(self, input: Tensor) -> None:
        coefficients = self.coefficients(input, 3)
        result = self.call("batch_norm_normalise", input, coefficients)
        mean, scale, shift = columns(coefficients, input)
        self.check_output(result, (input.double() - mean) * scale + shift, input)

    def check_backward_apply(self, grad_output: Tensor, input: Tensor) -> None:
        coefficients = self.coefficients(input, 4)
        result = self.call("batch_norm_backward_apply", grad_output, input, coefficients)
        mean, a, b, c = columns(coefficients, input)
        oracle = a * grad_output.double() + b * (input.double() - mean) + c
        self.check_output(result, oracle, input)

    @staticmethod
    def check_output(result: Tensor, oracle: Tensor, input: Tensor) -> None:
        assert result.dtype == input.dtype
        assert result.stride() == torch.empty_like(input).stride()
        error = float((result.double() - oracle).norm() / oracle.norm())
        assert error <= tolerances.RELATIVE[input.dtype]

    # --- Values, on every walk ------------------------------------------------------------------

    @each_dtype
    @each_walk
    def test_statistics(self, walk: str, dtype: torch.dtype) -> None:
        self.check_statistics(self.walked(walk, dtype))

    @each_dtype
    @each_walk
    def test_normalise(self, walk: str, dtype: torch.dtype) -> None:
        self.check_normalise(self.walked(walk, dtype))

    @each_dtype
    @each_walk
    def test_backward_statistics(self, walk: str, dtype: torch.dtype) -> None:
        self.check_backward_statistics(self.walked(walk, dtype, seed=1), self.walked(walk, dtype))

    @each_dtype
    @each_walk
    def test_backward_apply(self, walk: str, dtype: torch.dtype) -> None:
        self.check_backward_apply(self.walked(walk, dtype, seed=1), self.walked(walk, dtype))

    @pytest.mark.parametrize(
        ("of_gradient", "of_input"),
        [
            (as_it_is, channels_last),
            (channels_last, as_it_is),
            (expanded, as_it_is),
            (with_gaps, channels_last),
            (off_the_boundary, as_it_is),
            (as_it_is, off_the_boundary),
        ],
    )
    def test_gradients_in_another_layout(self, of_gradient: Layout, of_input: Layout) -> None:
        shape = (3, 8, 5, 8)
        grad_output = of_gradient(self.random(*shape, seed=1))
        input = of_input(self.random(*shape))
        self.check_backward_statistics(grad_output, input)
        self.check_backward_apply(grad_output, input)

    # --- Accuracy -------------------------------------------------------------------------------

    @pytest.mark.parametrize("walk", ["large images", "many channels last"])
    @pytest.mark.parametrize(
        ("dtype", "mean"), [(torch.float32, 1e4), (torch.float32, -1e6), (torch.float64, 1e6)]
    )
    def test_a_mean_far_above_the_deviation(
        self, dtype: torch.dtype, mean: float, walk: str
    ) -> None:
        """Where sums of squares would have lost every digit, and a mean in float32 some."""
        shape, layout = WALKS[walk]
        input = layout(self.random(*shape, dtype=dtype, mean=mean))
        grad_output = layout(self.random(*shape, dtype=dtype, seed=1))
        self.check_statistics(input)
        self.check_normalise(input)
        self.check_backward_statistics(grad_output, input)
        self.check_backward_apply(grad_output, input)

    @pytest.mark.parametrize("walk", ["large images", "many channels last"])
    def test_values_that_drift(self, walk: str) -> None:
        """No value near the first ones, and no part of the tensor, has the mean of the whole."""
        shape, layout = WALKS[walk]
        values = self.random(*shape)
        drift = torch.linspace(0.0, 1000.0, values[0, 0].numel(), device=self.device)
        samples = 1000.0 * torch.arange(shape[0], device=self.device).reshape(-1, 1, 1, 1)
        self.check_statistics(layout(values + drift.view(shape[2:]) + samples))

    @pytest.mark.parametrize("walk", ["large images", "many channels last", "odd matrix"])
    def test_equal_values_have_no_deviation(self, walk: str) -> None:
        shape, layout = WALKS[walk]
        input = layout(torch.full(shape, 0.1, device=self.device))
        mean, squares = self.call("batch_norm_statistics", input)
        assert bool((mean == input.flatten()[0].double()).all())
        assert bool((squares == 0.0).all())

    @each_dtype
    @pytest.mark.parametrize("walk", ["images", "channels last"])
    def test_non_finite_values_stay_with_their_channel(self, walk: str, dtype: torch.dtype) -> None:
        input = self.walked(walk, dtype)
        input[1, 2, 3, 4] = float("nan")
        input[0, 1, 2, 3] = float("inf")
        spoilt = torch.zeros(input.shape[1], dtype=torch.bool, device=self.device)
        spoilt[1:3] = True
        squares = self.call("batch_norm_statistics", input)[1]
        assert torch.equal(squares.isfinite(), ~spoilt)
        grad_output = torch.ones_like(input)
        coefficients = torch.ones(4, input.shape[1], dtype=torch.float64, device=self.device)
        sums = self.call("batch_norm_backward_statistics", grad_output, input, coefficients[:2])
        assert torch.equal(sums[1].isfinite(), ~spoilt)
        for result in (
            self.call("batch_norm_normalise", input, coefficients[:3]),
            self.call("batch_norm_backward_apply", grad_output, input, coefficients),
        ):
            assert torch.equal(result.isfinite(), input.isfinite())

    @each_dtype
    @pytest.mark.parametrize("walk", ["large images", "many channels last", "odd images"])
    def test_infinities_mean_what_they_mean_to_the_reference(
        self, walk: str, dtype: torch.dtype
    ) -> None:
        input = self.walked(walk, dtype)
        input[0, 0, 1, 2] = float("inf")
        input[1, 1, 2, 1] = -float("inf")
        mean, squares = self.call("batch_norm_statistics", input)
        assert mean[:2].tolist() == [float("inf"), -float("inf")]
        assert bool(squares[:2].isnan().all())
        coefficients = self.coefficients(input, 4)
        assert coefficients[0, :2].tolist() == mean[:2].tolist()
        for name, arguments in (
            ("batch_norm_normalise", (input, coefficients[:3])),
            ("batch_norm_backward_statistics", (input, input, coefficients[:2])),
            ("batch_norm_backward_apply", (input, input, coefficients)),
        ):
            result = self.call(name, *arguments).nan_to_num(7.0)
            expected = getattr(reference, name)(*arguments).nan_to_num(7.0)
            torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("walk", ["large images", "many channels last"])
    def test_the_same_bits_every_time(self, walk: str) -> None:
        input, grad_output = self.walked(walk, torch.float32), self.walked(walk, torch.float32, 1)
        coefficients = self.coefficients(input, 2)
        for name, arguments in (
            ("batch_norm_statistics", (input,)),
            ("batch_norm_backward_statistics", (grad_output, input, coefficients)),
        ):
            first = self.call(name, *arguments)
            assert all(torch.equal(self.call(name, *arguments), first) for _ in range(3))

    # --- Arguments ------------------------------------------------------------------------------

    @sanitize
    @pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5), (0, 0)])
    def test_nothing_to_do(self, shape: tuple[int, ...]) -> None:
        empty = self.random(*shape)
        coefficients = torch.ones(4, shape[1], dtype=torch.float64, device=self.device)
        for result in (
            self.call("batch_norm_statistics", empty),
            self.call("batch_norm_backward_statistics", empty, empty, coefficients[:2]),
        ):
            assert result.dtype == torch.float64
            assert torch.equal(result, torch.zeros_like(coefficients[:2]))
        for result in (
            self.call("batch_norm_normalise", empty, coefficients[:3]),
            self.call("batch_norm_backward_apply", empty, empty, coefficients),
        ):
            assert result.shape == empty.shape

    def test_coefficients_in_any_layout(self) -> None:
        input, grad_output = (
            self.walked("images", torch.float32),
            self.walked("images", torch.float32, 1),
        )
        for name, tensors, rows in (
            ("batch_norm_normalise", (input,), 3),
            ("batch_norm_backward_statistics", (grad_output, input), 2),
            ("batch_norm_backward_apply", (grad_output, input), 4),
        ):
            coefficients = self.coefficients(input, rows)
            transposed = coefficients.t().contiguous().t()
            assert torch.equal(
                self.call(name, *tensors, transposed), self.call(name, *tensors, coefficients)
            )

    def test_nothing_that_is_read_is_written(self) -> None:
        input, grad_output = (
            self.walked("images", torch.float32),
            self.walked("images", torch.float32, 1),
        )
        coefficients = self.coefficients(input, 4)
        tensors = (grad_output, input, coefficients)
        copies = [tensor.clone() for tensor in tensors]
        self.call("batch_norm_statistics", input)
        self.call("batch_norm_normalise", input, coefficients[:3])
        self.call("batch_norm_backward_statistics", grad_output, input, coefficients[:2])
        self.call("batch_norm_backward_apply", *tensors)
        assert all(map(torch.equal, tensors, copies))

    def refusals(self) -> dict[str, tuple[str, tuple[Any, ...]]]:
        input = self.random(3, 5, 4)
        coefficients = torch.ones(3, 5, dtype=torch.float64, device=self.device)
        backward = "batch_norm_backward_statistics"
        return {
            "dimensions": ("batch_norm_statistics", (self.random(3),)),
            "dtype": ("batch_norm_statistics", (input.long(),)),
            "rows": ("batch_norm_normalise", (input, coefficients[:2])),
            "channels": ("batch_norm_normalise", (input, coefficients[:, :4])),
            "coefficients' dtype": ("batch_norm_normalise", (input, coefficients.float())),
            "shapes": (backward, (self.random(3, 5, 3), input, coefficients[:2])),
            "dtypes": (backward, (input.double(), input, coefficients[:2])),
            "gradient's dtype": (backward, (input.long(), input, coefficients[:2])),
        }

    @pytest.mark.parametrize(
        "kind",
        [
            *("dimensions", "dtype", "rows", "channels", "coefficients' dtype"),
            *("shapes", "dtypes", "gradient's dtype"),
        ],
    )
    def test_refuses_in_the_words_of_the_reference(self, kind: str) -> None:
        name, arguments = self.refusals()[kind]
        with pytest.raises(RuntimeError) as expected:
            getattr(reference, name)(*arguments)
        # Native kernels have other names for dtypes that they do not know.
        words = str(expected.value).partition("torch.int64")[0]
        with pytest.raises(RuntimeError, match=re.escape(words)):
            self.call(name, *arguments)
