"""One optimizer step on a batch of any size, told from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from . import options
from .batches import MicroBatch, PyTree, is_stream, split, split_stream
from .forward import Forward, backward_context
from .gradients import Accumulators, Finaliser, GradientHooks
from .large_batch import LargeBatch
from .loss import Shares, Weight, read_contract
from .memory.peak import PeakMeter
from .ops import resolve
from .result import StepResult
from .streaming import PinnedRing, stream_to
from .transaction import Transaction


class StreamedAccumulator:
    """Trains with a large batch that does not fit in device memory.

    Small-Batch Processing (Ravi Kumar and Sivakumar, 2025, doi 10.55164/ajstr.v28i5.256270): a large
    batch ``B`` is split into micro-batches ``B_i <= B_max`` that stream through the device one after the
    other; their gradients accumulate, ``G = sum of G_i``; the loss is normalised as the large batch's
    own; one update follows.

    Args:
        model: any module. A tensor of inputs is passed as ``model(inputs)``, a tuple as
            ``model(*inputs)``, a mapping as ``model(**inputs)``; anything else as one argument.
        optimizer: any optimizer over the model's parameters.
        loss_fn: ``loss_fn(outputs, targets)`` gives a scalar; or None for a model that returns its own
            loss (itself, as ``.loss`` or under the key ``"loss"``).
        micro_batch_size: samples computed at once.
        memory_budget: not available yet; see :func:`sbp_fast.memory.memory_budget`.
        normalization: how the loss averages. ``"auto"`` reads it off a torch loss; anything else is
            declared: ``"mean"`` (over samples), ``"tokens"`` (over targets that are not -100), ``"sum"``
            (no division), ``"inverse_sqrt"`` (the paper's ``Loss / sqrt(B)``), or a callable that takes
            a micro-batch's targets (its inputs, if there are no targets) and returns its weight.
        batch_norm: ``"micro_batch"``: each micro-batch is normalised by itself.
        dropout: ``"native"``: the model's own.
        cross_sample_loss: False: the loss is a mean or a sum over samples.
        activations: ``"keep"``: they live from forward to backward.
        max_grad_norm: clips the large batch's gradient to this 2-norm.
        autocast: ``torch.bfloat16``, ``torch.float16`` or a ``torch.autocast`` object for model and loss;
            None leaves the caller's context as it is.
        grad_scaler: scales the loss, skips steps whose gradient overflowed, and adapts.
        backend: which kernels accumulate; see :func:`sbp_fast.ops.scale_accumulate_`.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it and the cure.
        NotImplementedError: an option that is not available yet; the message names what to pass instead.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[..., Any] | None,
        *,
        micro_batch_size: int,
        memory_budget: str | int | None = None,
        normalization: options.Normalization = "auto",
        batch_norm: str = "micro_batch",
        dropout: str = "native",
        cross_sample_loss: bool = False,
        activations: str = "keep",
        max_grad_norm: float | None = None,
        autocast: torch.dtype | torch.autocast | None = None,
        grad_scaler: GradScaler | None = None,
        backend: str = "auto",
    ) -> None:
        options.check_model(model)
        options.check_optimizer(optimizer)
        options.check_loss_fn(loss_fn)
        options.check_grad_scaler(grad_scaler)
        options.check_memory_budget(memory_budget)
        options.check_choice("batch_norm", batch_norm)
        options.check_choice("dropout", dropout)
        options.check_choice("cross_sample_loss", cross_sample_loss)
        options.check_choice("activations", activations)
        options.check_choice("backend", backend)
        options.warn_about_batch_norm(model)
        self._model = model
        self._optimizer = optimizer
        self._micro_batch_size = options.check_micro_batch_size(micro_batch_size)
        self._contract = read_contract(loss_fn, normalization)
        self._has_targets = loss_fn is not None
        self._device = next(p.device for p in model.parameters() if p.requires_grad)
        self._backend = resolve(backend, self._device.type)
        self._forward = Forward(
            model, loss_fn, options.autocast_context(autocast, self._device.type)
        )
        self._grad_scaler = grad_scaler
        self._ring = PinnedRing(self._device) if self._device.type == "cuda" else None
        self._finaliser = Finaliser(self._backend, options.check_max_grad_norm(max_grad_norm))
        self._parameters: list[nn.Parameter] = []
        self._hooks: GradientHooks | None = None
        self._watch_parameters()

    def step(self, inputs: PyTree | Iterable[Any], targets: PyTree = None) -> StepResult:
        """One large batch: stream, accumulate, update, zero.

        Equal to ``loss_fn(model(inputs), targets).backward(); optimizer.step(); optimizer.zero_grad()``
        on the whole batch, for models whose samples do not depend on one another.

        A loss or gradient that is not finite makes no update: the step is skipped,
        ``result.skipped`` is True, and parameters, buffers, optimizer state and ``p.grad`` are as they
        were. To decide that, the device is waited for once, after the last micro-batch. An exception
        leaves all of them as they were, too, unless the optimizer itself raised half way.

        Args:
            inputs: tensors of shape ``(samples, ...)``, alone or in dicts, tuples and lists, on host,
                pinned, memory-mapped or device memory; or an iterable (not a list or tuple) of
                micro-batches: of ``(inputs, targets)`` pairs, or of inputs where ``loss_fn`` is None.
                Items larger than ``micro_batch_size`` are split further.
            targets: the same for the targets.

        Raises:
            ValueError: an empty batch, leaves of different lengths, a loss that is no scalar.
        """
        self._watch_parameters()
        with self._transaction as transaction:
            large_batch = self._stream(inputs, targets)
            self._finalise(large_batch)
            skipped = large_batch.is_broken()
            self._update(skipped)
            # An autocast context of the caller's would go on with copies of the old parameters.
            torch.clear_autocast_cache()
            if skipped:
                transaction.roll_back()
            else:
                transaction.clear_gradients()
            return large_batch.result(skipped)

    def backward(self, inputs: PyTree | Iterable[Any], targets: PyTree = None) -> StepResult:
        """The same without the update: leaves the large batch's gradient in ``p.grad``.

        The gradient replaces whatever ``p.grad`` held. It is clipped where ``max_grad_norm`` is set, and
        still scaled where there is a ``grad_scaler``, as ``grad_scaler.step`` expects it. A gradient that
        is not finite is left so, as ``Tensor.backward`` leaves it, and the device is not waited for.

        Takes and raises what :meth:`step` does.
        """
        self._watch_parameters()
        with self._transaction:
            large_batch = self._stream(inputs, targets)
            self._finalise(large_batch)
            return large_batch.result(skipped=False)

    def _watch_parameters(self) -> None:
        """Hooks whatever is trainable now: layers may come, be frozen and unfrozen between steps."""
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        if len(trainable) == len(self._parameters) and all(map(is_, trainable, self._parameters)):
            return
        options.check_model(self._model)
        if self._hooks is not None:
            self._hooks.remove()
        self._parameters = trainable
        self._hooks = GradientHooks(trainable)
        self._transaction = Transaction(self._model, trainable)

    def _stream(self, inputs: PyTree | Iterable[Any], targets: PyTree) -> LargeBatch:
        """Runs every micro-batch forward and backward; gradients go to accumulators as they appear."""
        options.check_gradients_possible()
        micro_batches, shares = self._split(inputs, targets)
        large_batch = LargeBatch(
            shares, Accumulators(self._parameters, backend=self._backend), PeakMeter(self._device)
        )
        assert self._hooks is not None
        with torch.enable_grad(), self._hooks.delivering_to(large_batch.accumulators.add):
            for arrival in stream_to(self._device, micro_batches, self._ring):
                if arrival.is_last:
                    large_batch.accumulators.observe()
                self._compute(arrival.micro_batch, large_batch)
        return large_batch

    def _split(
        self, inputs: PyTree | Iterable[Any], targets: PyTree
    ) -> tuple[Iterable[MicroBatch], Shares]:
        shares = Shares(self._contract)
        size = self._micro_batch_size
        if not is_stream(inputs):
            micro_batches = split(inputs, targets, size, with_targets=self._has_targets)
            shares.announce(micro_batches)
            return micro_batches, shares
        if targets is not None:
            raise ValueError(
                "targets were given beside an iterable of micro-batches; let the iterable yield pairs "
                "(inputs, targets)"
            )
        return split_stream(inputs, size, with_targets=self._has_targets), shares

    def _compute(self, micro_batch: MicroBatch, large_batch: LargeBatch) -> None:
        """One micro-batch, forward and backward, with its share of the large batch."""
        share = large_batch.shares.take(micro_batch)
        if not isinstance(share, Tensor) and share == 0.0:
            # All targets are ignored: nothing to learn, and the mean over nothing is NaN.
            return
        loss = self._forward.loss(micro_batch)
        if isinstance(share, Tensor):
            loss = loss.masked_fill(share <= 0, 0.0)
        large_batch.add_loss(loss, share)
        # A share seeds the backward pass, so that gradients arrive ready to be kept. A loss in 16 bits
        # would round it: then it scales the gradients as they are added, in the accumulators' precision
        # (a share on the device must be read for that).
        narrow = loss.dtype in (torch.bfloat16, torch.float16)
        large_batch.accumulators.scale = float(share) if narrow else 1.0
        seed = 1.0 if narrow else share
        if self._grad_scaler is not None:
            loss = self._grad_scaler.scale(loss)
        with backward_context(self._device.type):
            loss.backward(_as_gradient(seed, loss))
        large_batch.accumulators.flush()

    def _finalise(self, large_batch: LargeBatch) -> None:
        """Writes the large batch's gradient into ``p.grad``: scaled, clipped, cast."""
        sums = large_batch.accumulators.finish()
        scale = large_batch.close(self._grad_scaler)
        self._finaliser.write(self._parameters, sums, scale, large_batch.grad_norm)
        self._finaliser.check_narrowed(self._parameters, large_batch.accumulators.statistics)

    def _update(self, skipped: bool) -> None:
        scaler = self._grad_scaler
        if scaler is None:
            if not skipped:
                self._optimizer.step()
            return
        if skipped:
            # Shows the scaler the gradient, so that it lowers its scale if that overflowed.
            scaler.unscale_(self._optimizer)
        else:
            scaler.step(self._optimizer)
        scaler.update()


def _as_gradient(seed: Weight, loss: Tensor) -> Tensor:
    """The seed as a gradient of the loss, made without a copy from the host: that would wait."""
    if isinstance(seed, Tensor):
        return seed.to(loss.dtype)
    return torch.full_like(loss, seed)
