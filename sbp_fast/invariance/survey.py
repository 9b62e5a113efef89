"""A look at the model on a few samples: where they are inside of it, and what would escape the step.

Where it calls dropout, the model runs a second time, with one sample replaced by another. What changes is
that sample's. Dropout is left out, and batch norm keeps to the first run's statistics, so nothing else
does.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..batches import MicroBatch, PyTree, copied, has_samples, rows
from ..forward import Forward
from ..parameters import modules_of
from ..rehearsal import Rehearsal
from .intercept import answering, native
from .layout import NO_SAMPLES, Fingerprint, Layout, Layouts, Site, recognise
from .sites import Names
from .stochastic_depth import STOCHASTIC_DEPTH, stochastic_depth_asks

_log = logging.getLogger("sbp_fast")

# The sample that is replaced: not the first, which is where a tensor without samples would seem to be.
_REPLACED = 1


class Survey:
    """A check for the first look. Warns of random numbers that no step can tie to samples.

    Args:
        layouts: takes in where samples are; None where dropout is the model's own.
        exact_batch_norm: whether batch norm must be within reach.

    Attributes:
        calls_batch_norm: whether the model calls batch norm in training mode, of a layer or by itself.
    """

    def __init__(self, layouts: Layouts | None, exact_batch_norm: bool) -> None:
        self._layouts = layouts
        self._exact_batch_norm = exact_batch_norm
        self.calls_batch_norm = False

    def __call__(self, forward: Forward, samples: MicroBatch, device: torch.device) -> None:
        """Raises RuntimeError where batch norm is out of reach (in a scripted module, say)."""
        modules = modules_of(forward.model, forward.loss_fn)
        with Rehearsal(modules, device) as rehearsal:
            try:
                before = _Look(forward, samples, modules)
                after = fewer = before
                other = _replaced(samples) if before.inputs else None
                if other is not None:
                    rehearsal.start_over()
                    after = _Look(forward, other, modules, before)
                    if any(
                        fingerprint.is_like(after.inputs.get(site))
                        for site, fingerprint in before.inputs.items()
                    ):
                        rehearsal.start_over()
                        fewer = _Look(forward, _without_last(samples), modules)
            except Exception as reason:
                _log.info("the model is not looked at: %s", reason)
                return
        self.calls_batch_norm = before.calls_batch_norm
        if self._exact_batch_norm and before.batch_norm_out_of_reach:
            raise RuntimeError(
                f"batch norm in {before.batch_norm_out_of_reach!r} is inside code that cannot be "
                "suspended (a scripted module, or a function that the model imported by name); use "
                "torch.nn.BatchNorm or torch.nn.functional.batch_norm there, or pass "
                "batch_norm='micro_batch'"
            )
        if self._layouts is not None:
            if after is not before:
                for site, fingerprint in before.inputs.items():
                    self._layouts.recognised[site] = _recognise(
                        fingerprint, after.inputs.get(site), fewer.inputs.get(site), samples.samples
                    )
            if before.draws_by_itself:
                _warn_of_draws(before.draws_by_itself)


def _recognise(
    before: Fingerprint, after: Fingerprint | None, fewer: Fingerprint | None, samples: int
) -> Layout | None:
    if after is None:
        return None
    layout = recognise(before, after, samples, _REPLACED)
    # Unchanged, yet of another shape with fewer samples: they are there, and nothing told where.
    if layout == NO_SAMPLES and (fewer is None or fewer.shape != before.shape):
        return None
    return layout


def _warn_of_draws(draws: Mapping[str, set[str]]) -> None:
    listed = "; ".join(f"{site!r} ({', '.join(sorted(ops))})" for site, ops in draws.items())
    warnings.warn(
        "random numbers that the model draws by itself depend on the split into micro-batches: "
        f"{listed}. Dropout inside of fused attention becomes per sample with an attention that calls "
        "torch.nn.functional.dropout (attn_implementation='eager' in Transformers), or set its "
        "probability to 0; dropout='native' takes this for granted",
        stacklevel=6,
    )


class _Look:
    """One run of the model, and what was seen."""

    def __init__(
        self,
        forward: Forward,
        samples: MicroBatch,
        modules: Sequence[nn.Module],
        earlier: _Look | None = None,
    ) -> None:
        self.thread = threading.get_ident()
        self.statistics: list[tuple[Tensor, Tensor]] = []
        self._earlier = iter([] if earlier is None else earlier.statistics)
        self.inputs: dict[Site, Fingerprint] = {}
        self.calls_batch_norm = False
        self.batch_norm_out_of_reach = ""
        self.draws_by_itself: dict[str, set[str]] = {}
        self._occurrences: Counter[str] = Counter()
        self._names = Names(modules)
        with answering(self), stochastic_depth_asks(modules), _Watch(self):
            forward.outputs(copied(samples.inputs))

    @property
    def answers(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "batch_norm": self._batch_norm,
            STOCHASTIC_DEPTH: lambda module, input: self._pass_on(input, training=True),
            **{
                name: partial(self._dropout, name)
                for name in (
                    *("dropout", "dropout1d", "dropout2d", "dropout3d"),
                    *("alpha_dropout", "feature_alpha_dropout"),
                )
            },
        }

    def is_computing(self, in_autograd: bool) -> bool:
        return not in_autograd

    def name_of_caller(self) -> str:
        return self._names.of_caller()[0]

    def _dropout(self, name: str, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        training = kwargs.get("training", args[1] if len(args) > 1 else "alpha" not in name)
        return self._pass_on(input, training)

    def _pass_on(self, input: Tensor, training: bool) -> Tensor:
        if training:
            name = self.name_of_caller()
            self.inputs[name, self._occurrences[name]] = Fingerprint(input)
            self._occurrences[name] += 1
        return input

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if training:
            self.calls_batch_norm = True
            known = next(self._earlier, None)
            if known is None:
                dims = [dim for dim in range(input.ndim) if dim != 1]
                variance, mean = torch.var_mean(input, dims, correction=0)
                # A channel with one value has no variance; here it only has to stay finite.
                known = mean, variance.clamp(min=1e-3)
            self.statistics.append(known)
            running_mean, running_var = known
        output: Tensor = native("batch_norm")(
            input, running_mean, running_var, weight, bias, False, momentum, eps
        )
        return output


class _Watch(TorchDispatchMode):
    """Sees what draws random numbers, and batch norm that nobody was asked about."""

    def __init__(self, look: _Look) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._look = look

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if torch.Tag.nondeterministic_seeded in func.tags:
            # Fused attention has the tag whether or not it drops anything.
            if _given(func, args, kwargs).get("dropout_p", 1.0) != 0.0:
                drawn = self._look.draws_by_itself.setdefault(self._look.name_of_caller(), set())
                drawn.add(name)
        elif "batch_norm" in name and "backward" not in name:
            given = _given(func, args, kwargs)
            if given.get("training", given.get("train", "with_update" in name)):
                self._look.batch_norm_out_of_reach = self._look.name_of_caller()
        return func(*args, **kwargs)


def _given(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an operator by name, defaults included."""
    arguments = func._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return {**defaults, **dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}


def _without_last(samples: MicroBatch) -> MicroBatch:
    count = samples.samples - 1
    return MicroBatch(rows(samples.inputs, 0, count), rows(samples.targets, 0, count), count)


def _replaced(samples: MicroBatch) -> MicroBatch | None:
    """The same with one sample replaced by another that differs from it; None if none does."""
    leaves = [leaf for leaf in pytree.tree_leaves(samples.inputs) if has_samples(leaf)]
    for other in range(samples.samples):
        if any(not torch.equal(leaf[other], leaf[_REPLACED]) for leaf in leaves):

            def replace(leaf: Any, other: int = other) -> Any:
                if not has_samples(leaf):
                    return leaf
                leaf = leaf.clone()
                leaf[_REPLACED] = leaf[other]
                return leaf

            inputs: PyTree = pytree.tree_map(replace, samples.inputs)
            return MicroBatch(inputs, samples.targets, samples.samples)
    return None
