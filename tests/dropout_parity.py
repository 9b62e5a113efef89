"""What dropout must do in every backend and on any device: test cases for a subclass that says on which
tensors and how the op is called. Masks are compared with numpy's, bit by bit."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import philox_oracle
import pytest
import torch
from torch import Tensor

from sbp_fast.ops import reference_dropout

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A negative one, so that both words of the key have their highest bits set; and the largest call.
SEED, CALL = -0x123456789ABCDEF, 2**32 - 1
# Samples of a call then differ in both of their words.
FIRST_SAMPLE = 2**32 - 2
PROBABILITY = 0.3

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
sanitize = pytest.mark.sanitize


def expected_of(
    input: Tensor,
    seed: int,
    call: int,
    first_sample: int,
    outer: int,
    samples: int,
    probability: float,
) -> Tensor:
    """On the CPU. The factor is that of torch's own dropout: 1 / (1 - p) in the dtype computed in."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    keep = philox_oracle.mask(input.shape, seed, call, first_sample, outer, samples, probability)
    scale = torch.ones((), dtype=wide).div(1.0 - probability)
    return (input.cpu().to(wide) * torch.where(keep, scale, 0.0)).to(input.dtype)


def offsets_of(parts: tuple[int, ...]) -> list[int]:
    return [0, *itertools.accumulate(parts)][:-1]


class DropoutParity:
    device: str
    # Elements beyond what one thread, block or program works on, with odd ends.
    large = 40_003
    reads_subnormals = True

    def call(
        self,
        input: Tensor,
        seed: int,
        call: int,
        first_sample: int,
        outer: int,
        samples: int,
        probability: float,
    ) -> Tensor:
        """Runs the kernel under test."""
        raise NotImplementedError

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        # Away from zero: a zero tells nothing of the mask.
        return (values + values.sign()).to(self.device, dtype)

    def check(self, input: Tensor, samples: int, outer: int = 1) -> None:
        """Compares mask, values and strides, and that the input is only read."""
        arguments = (SEED, CALL, FIRST_SAMPLE, outer, samples, PROBABILITY)
        before = input.clone()
        result = self.call(input, *arguments)
        expected = expected_of(input, *arguments)
        described = f"{tuple(input.shape)}, strides {input.stride()}, {outer=}, {samples=}"
        assert torch.equal(result.cpu() != 0, expected != 0), described
        assert torch.equal(result.cpu(), expected), described
        assert result.dtype == input.dtype
        assert result.stride() == torch.empty_like(input).stride(), described
        assert torch.equal(input, before)

    # --- Masks and values -----------------------------------------------------------------------

    @sanitize
    @each_dtype
    def test_contiguous(self, dtype: torch.dtype) -> None:
        shapes = [(1, 1), (3, 1), (5, 2), (1, 7), (4, 16), (3, 63), (2, 64), (2, 132), (2, 3, 5, 7)]
        for shape in [*shapes, (1, 1000), (7, 1023), (1, self.large), (2, 4 * self.large // 7)]:
            self.check(self.random(*shape, dtype=dtype), shape[0])

    @sanitize
    @each_dtype
    def test_memory_that_is_not_aligned(self, dtype: torch.dtype) -> None:
        for size in (8, 300, 2056):
            self.check(self.random(size + 1, dtype=dtype)[1:].view(2, -1), 2)

    @sanitize
    @each_dtype
    def test_channels_last(self, dtype: torch.dtype) -> None:
        for shape in (
            (2, 16, 4, 8),  # four divides the positions
            (3, 72, 2, 6),
            (1, 3, 16, 16),
            (2, 5, 1, 4),
            (1, 4, 101, 100),
            (2, 16, 7, 7),  # it does not
            (3, 33, 3, 3),
            (2, 2, 1, 2),
            (1, 300, 5, 5),
        ):
            self.check(
                self.random(*shape, dtype=dtype).to(memory_format=torch.channels_last), shape[0]
            )

    @sanitize
    @each_dtype
    def test_samples_take_turns(self, dtype: torch.dtype) -> None:
        """Sequence first: (time, samples, features)."""
        for shape in ((5, 3, 8), (3, 2, 12), (6, 4, 1), (7, 3, 5), (2, 2, 1026), (33, 1, 6)):
            self.check(self.random(*shape, dtype=dtype), shape[1], outer=shape[0])

    @sanitize
    def test_any_layout(self) -> None:
        last = torch.channels_last_3d
        layouts: list[tuple[Tensor, int, int]] = [
            (self.random(2, 6, 3, 2, 4).to(memory_format=last), 2, 1),
            (
                self.random(2, 40, 9).transpose(1, 2),
                2,
                1,
            ),  # features, then time, in one sample each
            (self.random(40, 9).t(), 9, 1),
            (self.random(3, 5, 8).transpose(0, 1), 3, 5),
            (self.random(3, 5, 8).transpose(0, 1), 5, 1),
            (self.random(9, 40)[:, ::3], 9, 1),
            (self.random(9, 40)[2:, 5:], 7, 1),
            (self.random(9, 1).expand(9, 14), 9, 1),
            (self.random(1).expand(4, 3), 4, 1),
            (self.random(4, 6, 5, 5).to(memory_format=torch.channels_last)[1:, ::2], 3, 1),
            (self.random(4, 6, 5, 4).to(memory_format=torch.channels_last)[::2], 2, 1),
            # Samples over two dimensions, over part of one, and none of one's own.
            (self.random(2, 3, 6, 4, 4).permute(0, 1, 3, 4, 2).contiguous().movedim(-1, 2), 6, 1),
            (self.random(6, 8, 4, 4).to(memory_format=torch.channels_last), 3, 1),
            (self.random(6, 8, 4, 4).to(memory_format=torch.channels_last), 1, 1),
            (self.random(6, 8, 4, 4).to(memory_format=torch.channels_last), 8, 6),
            (self.random(1, 8, 4, 4).to(memory_format=torch.channels_last), 1, 1),
            (self.random(12, 4), 3, 2),
            (self.random(1)[0], 1, 1),
        ]
        for input, samples, outer in layouts:
            self.check(input, samples, outer)

    def test_known_answers(self) -> None:
        """A threshold at the published word keeps the element, the next one drops it."""
        (_, _, words), *_ = philox_oracle.KNOWN_ANSWERS
        ones = torch.ones(1, 4, dtype=torch.float64, device=self.device)
        for position, word in enumerate(words):
            for threshold, kept in ((word, True), (word + 1, False)):
                result = self.call(ones, 0, 0, 0, 1, 1, threshold / 2**32)
                assert bool(result[0, position] != 0) == kept

    @pytest.mark.parametrize(
        ("seed", "call", "first_sample"),
        [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**32), (-1, 5, 2**62)],
    )
    def test_every_argument_has_its_place(self, seed: int, call: int, first_sample: int) -> None:
        input = self.random(2, 36)
        arguments = (seed, call, first_sample, 1, 2, 0.5)
        assert torch.equal(self.call(input, *arguments).cpu(), expected_of(input, *arguments))

    # --- Splits ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("parts", [(1, 1, 1, 1, 1, 1), (5, 1), (2, 4), (1, 2, 3)], ids=str)
    def test_any_split_gives_the_same(self, parts: tuple[int, ...]) -> None:
        image = self.random(6, 5, 4, 8)
        last = torch.channels_last
        for whole in (self.random(6, 35), image, image.to(memory_format=last)):
            expected = self.call(whole, SEED, CALL, FIRST_SAMPLE, 1, 6, PROBABILITY)
            pieces = [
                self.call(piece, SEED, CALL, FIRST_SAMPLE + offset, 1, len(piece), PROBABILITY)
                for piece, offset in zip(whole.split(parts), offsets_of(parts), strict=True)
            ]
            assert torch.equal(torch.cat(pieces), expected)
        for inner in (8, 3):
            whole = self.random(7, 6, inner)
            expected = self.call(whole, SEED, CALL, FIRST_SAMPLE, 7, 6, PROBABILITY)
            pieces = [
                self.call(piece, SEED, CALL, FIRST_SAMPLE + offset, 7, piece.shape[1], PROBABILITY)
                for piece, offset in zip(whole.split(parts, 1), offsets_of(parts), strict=True)
            ]
            assert torch.equal(torch.cat(pieces, 1), expected)

    # --- Probabilities and special values -------------------------------------------------------

    @each_dtype
    def test_probability_of_zero_copies(self, dtype: torch.dtype) -> None:
        values = self.random(6, 8, dtype=dtype)
        values[0, :3] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
        for input in (values, values.t(), values[:, ::2]):
            result = self.call(input, 1, 2, 3, 1, 2, 0.0)
            torch.testing.assert_close(result, input, rtol=0, atol=0, equal_nan=True)
            assert result.data_ptr() != input.data_ptr()

    @each_dtype
    def test_probability_of_one_drops_all(self, dtype: torch.dtype) -> None:
        for input in (self.random(2, 69, dtype=dtype), self.random(2, 24, dtype=dtype)):
            assert not self.call(input, 1, 2, 3, 1, 2, 1.0).any()

    def test_extreme_probabilities(self) -> None:
        """The nearest number of words drops, ties to even: none, or all of them."""
        ones = torch.ones(2, 50, device=self.device)
        assert torch.equal(self.call(ones, 1, 2, 3, 1, 2, 2.0**-34), ones)
        assert not self.call(ones, 1, 2, 3, 1, 2, 1.0 - 2.0**-34).any()
        arguments = (1, 2, 3, 1, 2, 1.0 - 2.0**-30)
        assert torch.equal(self.call(ones, *arguments).cpu(), expected_of(ones, *arguments))

    @each_dtype
    @pytest.mark.parametrize("probability", [0.5, 1.0])
    def test_what_is_not_finite_is_multiplied(self, dtype: torch.dtype, probability: float) -> None:
        """As in torch: zero times infinity is NaN."""
        input = self.random(1, 96, dtype=dtype)
        for start, value in enumerate((math.nan, math.inf, -math.inf)):
            input[:, start::4] = value
        result = self.call(input, 1, 2, 3, 1, 1, probability).cpu()
        if probability == 1.0:
            expected = input.cpu() * 0.0
        else:
            expected = expected_of(input, 1, 2, 3, 1, 1, probability)
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        assert bool(result[:, 1::4].isnan().any())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_narrow_products_round_to_nearest(self, dtype: torch.dtype) -> None:
        """Every finite value: ties, carries, subnormals and overflows are among the products."""
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.isfinite()]
        if not self.reads_subnormals:
            every = every[(every == 0) | (every.abs() >= torch.finfo(dtype).tiny)]
        input = every.to(self.device)
        if self.large < input.numel():
            input = input[:: input.numel() // self.large]
        for probability in (0.25, 1.0 - 2 / 3):
            arguments = (1, 2, 3, 1, 1, probability)
            result = self.call(input, *arguments).cpu()
            assert torch.equal(result, expected_of(input, *arguments))

    # --- Nothing to do, and what is refused -----------------------------------------------------

    def test_empty(self) -> None:
        for shape, samples, outer in (
            ((3, 0), 3, 1),
            ((0,), 1, 1),
            ((2, 0, 4, 4), 2, 1),
            ((5, 2, 0), 2, 5),
        ):
            for probability in (0.0, 0.5, 1.0):
                input = torch.empty(shape, device=self.device)
                result = self.call(input, 1, 2, 3, outer, samples, probability)
                assert result.shape == input.shape

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ((1, -1, 0, 1, 2, 0.5), "call is -1; it must be from 0 to 4294967295"),
            ((1, 2**32, 0, 1, 2, 0.5), "call is 4294967296; it must be from 0 to 4294967295"),
            ((1, 0, -5, 1, 2, 0.5), "first_sample is -5; it must be 0 or more"),
            ((1, 0, 0, 1, 2, 1.5), "probability is 1.5; it must be between 0 and 1"),
            ((1, 0, 0, 1, 2, math.nan), "probability is nan; it must be between 0 and 1"),
            ((1, 0, 0, 1, 5, 0.5), "input has 12 elements, which are not outer=1 times samples=5"),
            ((1, 0, 0, 5, 2, 0.5), "input has 12 elements, which are not outer=5 times samples=2"),
            ((1, 0, 0, 1, 0, 0.5), "outer=1 times samples=0 times a whole number"),
            ((1, 0, 0, -1, 2, 0.5), "outer=-1 times samples=2 times a whole number"),
            ((1, 0, 0, 2**62, 4, 0.5), "which are not outer=4611686018427387904 times samples=4"),
        ],
    )
    def test_refuses_in_the_words_of_the_reference(
        self, arguments: tuple[int, int, int, int, int, float], words: str
    ) -> None:
        input = self.random(2, 6)
        with pytest.raises(RuntimeError) as expected:
            reference_dropout.dropout(input, *arguments)
        assert words in str(expected.value)
        with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
            self.call(input, *arguments)

    def test_refuses_dtypes_and_more_elements_than_it_can_count(self) -> None:
        with pytest.raises(
            RuntimeError, match=r"input has dtype .*; it must be one of torch.float32"
        ):
            self.call(torch.ones(2, 3, dtype=torch.int32, device=self.device), 1, 0, 0, 1, 2, 0.5)
        # Of one element repeated: nothing is computed before it is refused.
        huge = torch.ones(1, device=self.device).expand(2**34 + 1)
        with pytest.raises(
            RuntimeError, match=r"a sample has 17179869185 elements; .* 17179869184"
        ):
            self.call(huge, 1, 0, 0, 1, 1, 0.5)


def test_the_oracle_knows_the_published_answers() -> None:
    for counter, key, expected in philox_oracle.KNOWN_ANSWERS:
        words = philox_oracle.philox([np.array([word], np.uint64) for word in counter], key)
        assert tuple(int(word[0]) for word in words) == expected
