"""The dropout op on CPU tensors, in every backend: against numpy's masks, and as noise."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from typing import Any

import philox_oracle
import pytest
import torch
from torch import Tensor

pytest.register_assert_rewrite("dropout_parity")

from dropout_parity import (  # noqa: E402
    CALL,
    FIRST_SAMPLE,
    PROBABILITY,
    SEED,
    DropoutParity,
    test_the_oracle_knows_the_published_answers,  # noqa: F401
)

from sbp_fast import ops  # noqa: E402
from sbp_fast.ops import reference_dropout  # noqa: E402
from sbp_fast.ops.native import load_cpu  # noqa: E402

needs_native = pytest.mark.skipif(
    not load_cpu().usable, reason=f"backend cpu: {load_cpu().reason or 'usable'}"
)


# NumPy's, when interpreted kernels meet infinities on purpose.
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
class TestDropout(DropoutParity):
    device = "cpu"

    @pytest.fixture(autouse=True)
    def _backend(self, backend: str) -> None:
        self.backend = backend
        if backend == "triton":
            self.large = 5003  # interpreted, each program takes milliseconds
            self.reads_subnormals = False  # Triton's interpreter widens those of bfloat16 wrongly

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
        return ops.dropout(
            input,
            probability,
            seed=seed,
            call=call,
            first_sample=first_sample,
            samples=samples,
            outer=outer,
            backend=self.backend,
        )

    def test_opcheck(self, backend: str) -> None:
        packet = torch.ops.sbp_fast.dropout
        overload = getattr(packet, "default" if backend == "cpu" else backend)
        image = self.random(2, 4, 3, 3)
        for input in (self.random(2, 6), image.to(memory_format=torch.channels_last)):
            torch.library.opcheck(overload, (input, 1, 2, 3, 1, 2, 0.5))

    def test_compiles(self, backend: str) -> None:
        """Without a break in the graph, the choice among backends included."""

        def drop(input: Tensor) -> Tensor:
            options: dict[str, Any] = {"seed": 1, "call": 2, "first_sample": 0, "samples": 2}
            name = "auto" if backend == "cpu" else backend
            return ops.dropout(input * 2, 0.5, backend=name, **options) + 1

        input = self.random(2, 20)
        compiled = torch.compile(drop, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(input), drop(input))

    def test_shapes_without_memory(self, backend: str) -> None:
        input = torch.empty(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last)
        packet = torch.ops.sbp_fast.dropout
        overload = getattr(packet, "default" if backend == "cpu" else backend)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = mode.from_tensor(input)
            result = overload(fake, 1, 2, 3, 1, 2, 0.5)
        assert result.shape == input.shape
        assert result.stride() == input.stride()

    def test_sparse_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match=r"call .to_dense\(\) on it first"):
            self.call(torch.eye(3).to_sparse(), 1, 0, 0, 1, 3, 0.5)


def test_the_reference_knows_the_published_answers() -> None:
    for counter, key, expected in philox_oracle.KNOWN_ANSWERS:
        element, call, low, high = counter
        sample = low | high << 32
        sample -= 2**64 if sample >= 2**63 else 0
        words = reference_dropout._philox(
            key[0] | key[1] << 32, torch.tensor([element]), call, torch.tensor([[sample]])
        )
        assert tuple(words.flatten().tolist()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("probability", [0.1, 0.25, 1 / 3, 0.5, 0.9])
def test_the_factor_is_that_of_torch(probability: float, dtype: torch.dtype) -> None:
    ones = torch.ones(1, 400, dtype=dtype)
    ours = ops.dropout(ones, probability, seed=1, call=0, first_sample=0, samples=1)
    theirs = torch.nn.functional.dropout(ones, probability)
    assert ours.unique().tolist() == theirs.unique().tolist()


@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_what_is_not_finite_becomes_what_torch_makes_of_it(probability: float) -> None:
    bad = torch.tensor([math.nan, math.inf]).repeat(100)[None]
    ours = ops.dropout(bad, probability, seed=1, call=0, first_sample=0, samples=1)
    theirs = torch.nn.functional.dropout(bad, probability)
    for result in (ours, theirs):
        assert bool(result[:, ::2].isnan().all())
        assert set(result[:, 1::2].abs().nan_to_num(-1.0, posinf=1.0).unique().tolist()) == (
            {-1.0} if probability == 1.0 else {-1.0, 1.0}
        )


# --- Noise: what a mask must look like. Backends have equal masks, so one of them will do. -----------


def kept(elements: int, samples: int = 1, **changes: Any) -> Tensor:
    """float64[samples, elements]: 1 where an element is kept."""
    options: dict[str, Any] = {
        "seed": 7,
        "call": 3,
        "first_sample": 0,
        "probability": 0.5,
    } | changes
    result = ops.dropout(torch.ones(samples, elements), samples=samples, **options)
    return (result != 0).double()


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard deviations of what independent masks give."""
    a, b = a.flatten(), b.flatten()
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1]) * math.sqrt(a.numel())


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_the_rate_is_the_probability(probability: float) -> None:
    count = 1 << 20
    dropped = count - float(kept(count, probability=probability).sum())
    deviation = math.sqrt(count * probability * (1 - probability))
    assert abs(dropped - count * probability) <= 4 * deviation


@pytest.mark.parametrize("words", range(4))
def test_every_word_of_a_block_has_the_rate(words: int) -> None:
    mine = kept(1 << 18)[:, words::4]
    assert abs(float(mine.sum()) - mine.numel() / 2) <= 4 * math.sqrt(mine.numel() / 4)


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 8, 32, 1024])
def test_neighbours_are_independent(distance: int) -> None:
    mask = kept(1 << 18)
    assert abs(correlation(mask[:, :-distance], mask[:, distance:])) <= 4


def test_samples_calls_and_seeds_are_independent() -> None:
    size = 1 << 16
    mask = kept(size, samples=2)
    others = {
        "samples": mask[1:],
        "calls": kept(size, call=4),
        "seeds": kept(size, seed=8),
        "high words of seeds": kept(size, seed=7 + (1 << 32)),
        "high words of samples": kept(size, first_sample=1 << 32),
    }
    for what, other in others.items():
        assert abs(correlation(mask[:1], other)) <= 4, what


def test_pairs_are_evenly_distributed() -> None:
    """Pearson's chi-square over the 16 patterns of a block, which overlaps with none: 15 degrees of
    freedom, of which 1 in 10,000 exceeds 44.3."""
    patterns = kept(1 << 18).view(-1, 4) @ torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    counts = torch.bincount(patterns.long(), minlength=16).double()
    expected = counts.sum() / 16
    assert float(((counts - expected) ** 2 / expected).sum()) <= 44.3


# --- Native kernels ----------------------------------------------------------------------------------


@needs_native
def test_masks_do_not_depend_on_threads() -> None:
    image = torch.ones(3, 40, 25, 24)
    inputs = [
        torch.ones(2, 60_001),
        torch.ones(300, 3, 64),
        image.to(memory_format=torch.channels_last),
    ]
    threads = torch.get_num_threads()
    try:
        for input, samples, outer in zip(inputs, (2, 3, 3), (1, 300, 1), strict=True):
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                op = torch.ops.sbp_fast.dropout.default
                results.append(op(input, SEED, CALL, FIRST_SAMPLE, outer, samples, PROBABILITY))
            assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(threads)


# Read once per process, so each instruction set needs its own.
CAPABILITY_CHECK = """
    import torch
    from sbp_fast.ops import native

    assert native.load_cpu().usable
    torch.manual_seed(0)
    last = torch.channels_last
    inputs = [(torch.randn(*shape), shape[0], 1) for shape in ((3, 1), (2, 63), (2, 1024), (1, 20011))]
    inputs += [(torch.randn(9, 2, inner), 2, 9) for inner in (8, 6, 3)]
    inputs += [
        (torch.randn(*shape).to(memory_format=last), shape[0], 1)
        for shape in ((2, 40, 4, 4), (2, 40, 7, 7), (1, 3, 6, 6), (1, 4, 90, 90))
    ]
    for input, samples, outer in inputs:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            arguments = (input.to(dtype), -3, 2**32 - 1, 2**32 - 1, outer, samples, 0.3)
            native_, reference = (
                getattr(torch.ops.sbp_fast.dropout, name)(*arguments)
                for name in ("default", "reference")
            )
            assert torch.equal(native_, reference), (input.shape, dtype)
    print("instruction set:", native.cpu_instruction_set())
"""


@needs_native
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_instruction_sets(capability: str) -> None:
    environment = {**os.environ, "SBP_FAST_CPU_CAPABILITY": capability}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.run(
        [sys.executable, "-c", "import sbp_fast.ops\n" + textwrap.dedent(CAPABILITY_CHECK)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    chosen = process.stdout.strip().rpartition(" ")[2]
    if chosen != capability:
        pytest.skip(f"this processor has no {capability}; {chosen} was tested instead")
