"""Stochastic depth, as several libraries write it: modules that drop a residual branch per sample.

Huang et al. 2016, "Deep Networks with Stochastic Depth".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .intercept import ask, opaque

# What it is asked for by.
STOCHASTIC_DEPTH = "stochastic_depth"


@dataclass(frozen=True)
class StochasticDepth:
    """What one such module does.

    Attributes:
        probability: of dropping a sample's branch.
        scales: whether what is kept is divided by the probability of keeping it.
        whole_batch: whether all samples are dropped together.
    """

    probability: float
    scales: bool = True
    whole_batch: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> StochasticDepth | None:
        """None for any other module, and for one that drops nothing now."""
        kind = type(module).__name__
        attributes: Any = module
        if kind.endswith("DropPath") and hasattr(module, "drop_prob"):
            # timm's and Transformers'; only timm's may leave out the division.
            depth = cls(attributes.drop_prob or 0.0, bool(getattr(module, "scale_by_keep", True)))
        elif kind == "StochasticDepth" and hasattr(module, "p") and hasattr(module, "mode"):
            depth = cls(attributes.p, whole_batch=attributes.mode == "batch")
        else:
            return None
        return depth if module.training and depth.probability > 0.0 else None


@contextmanager
def stochastic_depth_asks(modules: Sequence[nn.Module]) -> Iterator[None]:
    """While inside, modules of stochastic depth below these have their calls answered."""
    found = [
        module
        for root in modules
        for module in root.modules()
        if StochasticDepth.of(module) is not None and "forward" not in vars(module)
    ]
    for module in found:
        vars(module)["forward"] = opaque(_asking(module, module.forward))
    try:
        yield
    finally:
        for module in found:
            del vars(module)["forward"]


def _asking(module: nn.Module, native: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        def otherwise(_: nn.Module, input: Tensor) -> Tensor:
            return native(input)

        output: Tensor = ask(STOCHASTIC_DEPTH, otherwise, module, input)
        return output

    return forward
