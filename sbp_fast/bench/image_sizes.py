"""How large the batches of images are, of those benchmarks that compare ways to compute one network."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepSize:
    """Samples in the large batch, samples in a micro-batch, and pixels of an image's side."""

    pixels: int
    batch: int
    micro_batch: int

    def name_of(self, network: str) -> str:
        return (
            f"{network} fp32, {self.pixels} px, batch {self.batch}, micro-batch {self.micro_batch}"
        )
