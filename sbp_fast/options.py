"""The options of a StreamedAccumulator: checked once, with errors that name the value and the cure."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .batches import PyTree
from .loss import LossContract
from .memory import parse_bytes
from .ops import BACKENDS, GRADIENT_DTYPES
from .parameters import Parameters

# Wrappers whose gradients belong to several processes, by name: importing them all would take seconds.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}

Normalization = str | Callable[[PyTree], "float | Tensor"]

_ALLOWED: dict[str, tuple[Any, ...]] = {
    "batch_norm": ("exact", "micro_batch"),
    "dropout": ("per_sample", "native"),
    "cross_sample_loss": (False, True),
    "activations": ("auto", "keep", "recompute", "offload"),
    "probe": (True, False),
    "backend": BACKENDS,
}


def check_choice(name: str, value: Any) -> None:
    """Raises ValueError for a value that is unknown."""
    allowed = _ALLOWED[name]
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of " + ", ".join(map(repr, allowed)))


def check_micro_batch_size(value: Any, cost: Any) -> int | None:
    """None for ``"auto"``. Raises TypeError for what is no int, ValueError for an int below 1."""
    if cost is not None and not callable(cost):
        raise TypeError(
            f"micro_batch_cost is {cost!r}; it must be callable as micro_batch_cost(inputs), or None"
        )
    if value == "auto":
        if cost is not None:
            raise ValueError(
                "micro_batch_size is 'auto' with a micro_batch_cost; give the most that a micro-batch "
                "may cost (16384 for tokens, say)"
            )
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"micro_batch_size is {value!r}; it must be an int, the number of samples computed at once, "
            "or 'auto'"
        )
    if value < 1:
        raise ValueError(
            f"micro_batch_size is {value}; it must be at least 1, the number of samples computed at once"
        )
    return int(value)


def check_memory_budget(value: Any) -> int | None:
    """Bytes. Raises TypeError or ValueError for what is no size."""
    return None if value is None else parse_bytes(value)


def check_host_budget(value: Any) -> int | None:
    """Bytes. Raises TypeError or ValueError for what is no size."""
    return None if value is None else parse_bytes(value)


def check_spill_directory(value: Any, host_budget: Any) -> Path | None:
    """Raises ValueError for what is no directory, or has nothing to spill."""
    if value is None:
        return None
    directory = Path(value)
    if not directory.is_dir():
        raise ValueError(
            f"spill_directory is {str(value)!r}, which is no directory; make it first, on a disk with "
            "room"
        )
    if host_budget is None:
        raise ValueError(
            f"spill_directory is {str(value)!r} without a host_budget, so nothing would be spilled; give "
            "the host memory that may be used, '32GiB' say"
        )
    return directory


def check_max_grad_norm(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) > 0:
        raise ValueError(
            f"max_grad_norm is {value!r}; it must be a number greater than 0, or None for no clipping"
        )
    return float(value)


def autocast_context(
    autocast: torch.dtype | torch.autocast | None, device_type: str
) -> Callable[[], AbstractContextManager[Any]]:
    """A factory of the context in which models and losses run.

    Args:
        autocast: None (whatever context the caller is in), a dtype (bfloat16 or float16), or a
            ``torch.autocast`` object.

    Raises:
        TypeError: anything else.
    """
    if autocast is None:
        return nullcontext
    if isinstance(autocast, torch.dtype):
        if autocast not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"autocast is {autocast}; it must be torch.bfloat16 or torch.float16, or None"
            )
        dtype = autocast
        return lambda: torch.autocast(device_type, dtype=dtype)
    if isinstance(autocast, torch.autocast):
        context = autocast
        return lambda: context
    raise TypeError(
        f"autocast is {autocast!r}; it must be None, torch.bfloat16, torch.float16 or a torch.autocast "
        "object"
    )


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            f"the model has {len(parameters)} parameters, none of which requires a gradient; set "
            "requires_grad_(True) on what is to be trained"
        )
    for module in model.modules():
        if not _WRAPPERS.isdisjoint(kind.__name__ for kind in type(module).__mro__):
            raise NotImplementedError(
                f"the model holds a {type(module).__name__}, which reduces gradients over processes; "
                "that is not available yet: pass the plain model, call backward(), and all-reduce p.grad "
                "before the optimizer's step"
            )


def check_parameters(
    parameters: Parameters,
    names: Sequence[str],
    modules: tuple[nn.Module, ...],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Raises ValueError, TypeError or NotImplementedError for parameters that cannot be trained together.

    Args:
        names: of ``parameters.trainable``.
        modules: the model first.
    """
    check_model(modules[0])
    for parameter, name in zip(parameters.trainable, names, strict=True):
        if is_traceable_wrapper_subclass(parameter):
            raise NotImplementedError(
                f"{name} is a {type(parameter).__name__}; sharded and wrapped parameters are not "
                "available yet: train plain tensors"
            )
        if parameter.dtype not in GRADIENT_DTYPES:
            raise TypeError(
                f"{name} has dtype {parameter.dtype}; it must be one of "
                + ", ".join(map(str, GRADIENT_DTYPES))
                + " to be trained (a complex one: as two real ones, and torch.view_as_complex in forward)"
            )
        if parameter.device != parameters.device:
            raise ValueError(
                f"{name} is on {parameter.device} but {names[0]} is on {parameters.device}; all "
                "trainable parameters must be on one device"
            )
    own = {id(parameter) for module in modules for parameter in module.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "the optimizer holds no parameter of the model; make it from model.parameters() (and anew, "
            "where the model's parameters were replaced)"
        )


def warn_about_batch_norm(model: nn.Module) -> None:
    """Says that statistics per micro-batch make the step depend on the split."""
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    if layers:
        warnings.warn(
            f"{len(layers)} batch norm layers ({layers[0]!r} first) use each micro-batch's own "
            "statistics, as batch_norm='micro_batch' says: the step depends on micro_batch_size. Group "
            "or layer norm does not, nor does batch norm in eval mode",
            stacklevel=3,
        )


def check_gradients_possible() -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "a step under torch.inference_mode() has no gradients; leave that context first "
            "(torch.no_grad() is no obstacle)"
        )


def check_loss_fn(loss_fn: Any) -> None:
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(
            f"loss_fn is {loss_fn!r}; it must be callable as loss_fn(outputs, targets), or None for "
            "a model that returns its own loss"
        )


def cross_sample_contract(
    loss_fn: Callable[..., Any] | None, normalization: Normalization
) -> LossContract:
    """The contract of a loss over the whole large batch: there is nothing to divide.

    Raises:
        ValueError: there is no loss_fn to give all outputs to, or a normalization of parts is asked for.
    """
    if loss_fn is None:
        raise ValueError(
            "cross_sample_loss=True needs a loss_fn that takes the outputs of the whole large batch; a "
            "model that returns its own loss sees one micro-batch only: let it return its outputs"
        )
    if normalization != "auto":
        raise ValueError(
            f"normalization is {normalization!r} with cross_sample_loss=True, where loss_fn is called "
            "once for the whole large batch and does its own averaging; leave it at 'auto'"
        )
    return LossContract(weigh=None)


def check_grad_scaler(grad_scaler: Any) -> None:
    if grad_scaler is not None and not isinstance(grad_scaler, GradScaler):
        raise TypeError(
            f"grad_scaler is {grad_scaler!r}; it must be a torch.amp.GradScaler, or None"
        )


def check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(optimizer).__name__}.step() demands a closure, which would compute the large batch "
            "several times; use an optimizer that steps on gradients alone (SGD, AdamW), or call "
            "backward() in a closure of your own"
        )
