"""Reentrant checkpoints: they call backward in the middle of a backward pass."""

from __future__ import annotations

from torch import Tensor

_NAME = "CheckpointFunctionBackward"


def arrives_in_parts(loss: Tensor) -> bool:
    """Whether a parameter's gradient may come in several parts, each added by itself."""
    pending = [loss.grad_fn]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == _NAME:
            return True
        seen.add(node)
        pending += [following for following, _ in node.next_functions]
    return False
