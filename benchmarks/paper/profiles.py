"""How much is measured: models, batch sizes, seeds, budgets."""

from __future__ import annotations

from dataclasses import dataclass

from sbp_fast.memory import parse_bytes


@dataclass(frozen=True)
class Training:
    """How one model is trained.

    Attributes:
        model: a key of :data:`benchmarks.paper.models.MODELS`.
        samples: seen in all, whatever the batch size: the number of steps follows.
        learning_rate: the highest of the schedule, for a large batch of 256.
    """

    model: str
    samples: int
    learning_rate: float

    def steps(self, batch: int) -> int:
        return max(1, self.samples // batch)


@dataclass(frozen=True)
class Profile:
    """One size of the evaluation.

    Attributes:
        name: of the command line.
        reduced: whether the models are reduced in width.
        pixels: height and width of the images.
        classification, segmentation: names of the data sets.
        trainings: a table for each.
        batches: sizes of the large batch; the paper's are 8 to 1024 in powers of two.
        seeds: of the weights and of the order of the data; for each, everything is trained anew.
        budgets: of device memory. Trained under the largest; under the others a few steps are made.
        probe_steps: how many.
        test_samples: of the test set, at most; and of the training set, for batch norm's statistics.
    """

    name: str
    reduced: bool
    pixels: int
    classification: str
    segmentation: str
    trainings: tuple[Training, ...]
    batches: tuple[int, ...]
    seeds: tuple[int, ...]
    budgets: tuple[str, ...]
    probe_steps: int
    test_samples: int

    @property
    def budget_bytes(self) -> tuple[int, ...]:
        """Of the budgets, in their order: the largest last."""
        return tuple(map(parse_bytes, self.budgets))


_PAPER_BATCHES = (1024, 512, 256, 128, 64, 32, 16, 8)

FULL = Profile(
    name="full",
    reduced=False,
    pixels=224,
    classification="flower-102",
    segmentation="carvana",
    # Thirty times the 2,040 images of Flower-102; U-Net sees Carvana's 4,064 ten times.
    trainings=(
        Training("ResNet-50", 61_440, 1e-3),
        Training("ResNet-101", 61_440, 1e-3),
        Training("AmoebaNet-D", 61_440, 1e-3),
        Training("U-Net", 40_960, 1e-3),
        Training("EfficientNet-B0", 61_440, 1e-3),
        Training("ViT-B/16", 61_440, 3e-4),
        Training("Swin-T", 61_440, 3e-4),
    ),
    batches=_PAPER_BATCHES,
    seeds=(0, 1, 2),
    budgets=("8GiB", "16GiB", "24GiB"),
    probe_steps=3,
    test_samples=10_000,
)
SMALL = Profile(
    name="small",
    reduced=True,
    pixels=32,
    classification="fashion-mnist",
    segmentation="fashion-scenes",
    trainings=(
        Training("ResNet-50", 4_096, 4e-3),
        Training("ResNet-101", 3_072, 4e-3),
        Training("AmoebaNet-D", 3_072, 4e-3),
        Training("U-Net", 4_096, 1e-2),
        Training("EfficientNet-B0", 3_072, 4e-3),
        Training("ViT-B/16", 4_096, 4e-3),
        Training("Swin-T", 4_096, 4e-3),
    ),
    # From what the largest budget holds at once to several times as many.
    batches=(512, 256, 64),
    seeds=(0, 1, 2),
    # The paper's budgets over 512: the reduced models need about as much less.
    budgets=("16MiB", "32MiB", "48MiB"),
    probe_steps=2,
    test_samples=1_000,
)
# For tests: everything once, in seconds.
TINY = Profile(
    name="tiny",
    reduced=True,
    pixels=32,
    classification="fashion-mnist",
    segmentation="fashion-scenes",
    trainings=(Training("Swin-T", 32, 1e-3), Training("U-Net", 32, 1e-3)),
    batches=(16, 8),
    seeds=(0, 1),
    budgets=("10MiB", "14MiB"),
    probe_steps=1,
    test_samples=16,
)
PROFILES = {profile.name: profile for profile in (SMALL, FULL, TINY)}
