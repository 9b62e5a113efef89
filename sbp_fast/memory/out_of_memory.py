"""What counts as out of memory, and how its memory is got back."""

from __future__ import annotations

import gc
import traceback

import torch

# What libraries say that torch hands on as a plain RuntimeError.
_WORDS = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)


class NothingSmallerError(torch.OutOfMemoryError):
    """Memory ran out where a smaller micro-batch cannot help."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller micro-batch may do what this one could not: the allocators of torch, cuBLAS,
    cuDNN and Python had no memory left."""
    if isinstance(error, NothingSmallerError):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def release(error: BaseException, device: torch.device) -> None:
    """Lets go of what the failed computation held: its traceback, and cached blocks, each of which may be
    too small for what comes."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        # A frame that is cleared still has its function, and that what it closes over.
        one.__traceback__ = None
        pending += [one.__cause__, one.__context__]
    # Of what is young, as the failed graph is: a look at all objects takes a tenth of a second and more.
    gc.collect(1)
    if device.type == "cuda":
        torch.cuda.empty_cache()
