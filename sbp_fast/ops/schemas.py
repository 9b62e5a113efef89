"""Schemas and fake implementations of the ops. They exist without any compiler.

Every op has three overloads with one meaning: the default one is native (C++ on CPU tensors, CUDA on
CUDA tensors), ``.triton`` and ``.reference`` are what their names say. ``backends`` chooses among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import checks, checks_batch_norm, checks_dropout

NAMESPACE = "sbp_fast"
OVERLOADS = ("", "triton", "reference")

_ARGUMENTS = {
    "scale_accumulate_": (
        "(Tensor(a!)[] accumulators, Tensor[] gradients, float scale, "
        "bool first_write=False, Tensor(b!)? statistics=None) -> ()"
    ),
    "gradient_statistics_": "(Tensor[] gradients, Tensor(a!) statistics) -> ()",
    "finalise_": (
        "(Tensor(a!)[] outputs, Tensor[] accumulators, Tensor scale, "
        "Tensor? norm=None, float? max_norm=None) -> ()"
    ),
    "batch_norm_statistics": "(Tensor input) -> Tensor",
    "batch_norm_normalise": "(Tensor input, Tensor coefficients) -> Tensor",
    "batch_norm_backward_statistics": (
        "(Tensor grad_output, Tensor input, Tensor coefficients) -> Tensor"
    ),
    "batch_norm_backward_apply": (
        "(Tensor grad_output, Tensor input, Tensor coefficients) -> Tensor"
    ),
    "dropout": (
        "(Tensor input, int seed, int call, int first_sample, int outer, int samples, "
        "float probability) -> Tensor"
    ),
}

_FAKES: dict[str, Callable[..., Any]] = {
    "scale_accumulate_": checks.check_scale_accumulate,
    "gradient_statistics_": checks.check_gradient_statistics,
    "finalise_": checks.check_finalise,
    "batch_norm_statistics": checks_batch_norm.fake_statistics,
    "batch_norm_normalise": checks_batch_norm.fake_normalise,
    "batch_norm_backward_statistics": checks_batch_norm.fake_backward_statistics,
    "batch_norm_backward_apply": checks_batch_norm.fake_backward_apply,
    "dropout": checks_dropout.fake_dropout,
}


def _refuse_sparse(name: str) -> Callable[..., None]:
    """Without a kernel for sparse tensors the dispatcher would answer with pages. This one says what
    is wrong in the words of the checks, and never returns as if it had computed."""

    def kernel(*arguments: Any) -> None:
        _FAKES[name](*arguments)
        raise RuntimeError(f"{name}: a tensor is sparse; call .to_dense() on it first")

    return kernel


# Not in CUDA graphs: a replay would read a table of addresses that belongs to somebody else by then.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)

library = torch.library.Library(NAMESPACE, "DEF")

for _name, _arguments in _ARGUMENTS.items():
    for _overload in OVERLOADS:
        _qualified = f"{_name}.{_overload}" if _overload else _name
        library.define(_qualified + _arguments, tags=_TAGS)
        torch.library.register_fake(f"{NAMESPACE}::{_qualified}", _FAKES[_name], lib=library)
    for _key in ("SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA"):
        library.impl(_name, _refuse_sparse(_name), _key)
