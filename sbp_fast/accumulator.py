"""One optimizer step on a batch of any size, told from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from . import options
from .batches import MicroBatch, PyTree, is_stream, split, split_stream
from .forward import Forward, Roots, backward_context, run_back
from .gradients import Accumulators, Finaliser, GradientHooks, autograd_can_accumulate
from .invariance.batch_norm import ExactBatchNorm, has_batch_norm
from .invariance.cross_sample import Joint, check_same_outputs, detached, roots_of
from .invariance.layout import Layouts
from .invariance.lockstep import Lockstep
from .invariance.sampling import Sampling
from .large_batch import LargeBatch
from .loss import Shares, Weight, read_contract
from .memory.host_store import HostStore
from .memory.peak import PeakMeter
from .ops import is_automatic, resolve
from .parameters import Parameters, find_parameters, modules_of, names_of
from .result import StepResult
from .streaming import Arrival, PinnedRing, stream_to
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
        optimizer: any optimizer over the model's parameters; those it has beside them (of a loss, say)
            are trained as well.
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
        backend: which kernels accumulate; see :func:`sbp_fast.ops.scale_accumulate_`. Under ``"auto"``,
            gradients on the CPU that need no other dtype are added by autograd itself.

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
        batch_norm: str = "exact",
        dropout: str = "per_sample",
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
        self._loss_fn = loss_fn
        self._batch_norm = batch_norm
        self._layouts = Layouts() if dropout == "per_sample" else None
        self._cross_sample_loss = cross_sample_loss
        self._modules = modules_of(model, loss_fn)
        self._optimizer = optimizer
        self._micro_batch_size = options.check_micro_batch_size(micro_batch_size)
        self._contract = (
            options.cross_sample_contract(loss_fn, normalization)
            if cross_sample_loss
            else read_contract(loss_fn, normalization)
        )
        self._grad_scaler = grad_scaler
        self._max_grad_norm = options.check_max_grad_norm(max_grad_norm)
        self._backend_option = backend
        self._autocast = autocast
        self._prepare_for(find_parameters(self._modules, optimizer))

    def step(self, inputs: PyTree | Iterable[Any], targets: PyTree = None) -> StepResult:
        """One large batch: stream, accumulate, update, zero.

        Equal to ``loss_fn(model(inputs), targets).backward(); optimizer.step(); optimizer.zero_grad()``
        on the whole batch, for models whose samples do not depend on one another. ``p.grad`` is cleared
        on every parameter of the model, the loss and the optimizer: where several optimizers train one
        model, call :meth:`backward` and step each.

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
        self._follow_changes()
        with self._transaction as transaction:
            large_batch = self._stream(inputs, targets)
            self._finalise(large_batch)
            finite_loss, finite_gradient = large_batch.finite()
            skipped = not (finite_loss and finite_gradient)
            if not skipped:
                self._update()
            elif not finite_gradient:
                self._show_overflow()
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
        is not finite is left so, as ``Tensor.backward`` leaves it. The device is not waited for, unless
        the batch lies in pinned memory: then until that is read and may be filled again.

        Takes and raises what :meth:`step` does.
        """
        self._follow_changes()
        with self._transaction:
            large_batch = self._stream(inputs, targets)
            self._finalise(large_batch)
            return large_batch.result(skipped=False)

    def _follow_changes(self) -> None:
        """Layers may come, be frozen, moved or cast between steps."""
        options.check_gradients_possible()
        parameters = find_parameters(self._modules, self._optimizer)
        if parameters.state != self._parameters.state:
            before = self._hooks
            self._prepare_for(parameters)
            before.remove()

    def _prepare_for(self, parameters: Parameters) -> None:
        """Everything that depends on which parameters there are, and where; nothing, if refused."""
        names = names_of(parameters.trainable, self._modules)
        options.check_parameters(parameters, names, self._modules, self._optimizer)
        device = parameters.device
        backend = resolve(self._backend_option, device.type)
        automatic = is_automatic(self._backend_option)
        self._parameters = parameters
        self._device = device
        self._backend = backend
        self._forward = Forward(
            self._model,
            self._loss_fn,
            options.autocast_context(self._autocast, device.type),
            self._contract.elementwise,
        )
        self._ring = PinnedRing(device) if device.type == "cuda" else None
        self._finaliser = Finaliser(self._backend, self._max_grad_norm)
        self._transaction = Transaction(self._modules, parameters.all)
        self._hooks = GradientHooks(
            parameters.trainable,
            names,
            unwatched=[
                position
                for position, parameter in enumerate(parameters.trainable)
                if automatic and autograd_can_accumulate(parameter)
            ],
        )

    def _stream(self, inputs: PyTree | Iterable[Any], targets: PyTree) -> LargeBatch:
        """Runs every micro-batch forward and backward; gradients go to accumulators as they appear."""
        micro_batches, shares = self._split(inputs, targets)
        large_batch = LargeBatch(
            shares, Accumulators(self._hooks, backend=self._backend), PeakMeter(self._device)
        )
        arrivals = stream_to(self._device, micro_batches, self._ring)
        must_meet = self._must_meet(micro_batches)
        with (
            torch.enable_grad(),
            Sampling(
                self._modules,
                self._device,
                self._layouts,
                reseed=must_meet or self._cross_sample_loss,
                backend=self._backend,
            ) as sampling,
        ):
            if must_meet:
                self._compute_in_lockstep(arrivals, large_batch, sampling)
            elif self._cross_sample_loss:
                self._compute_twice(arrivals, large_batch, sampling)
            else:
                self._compute_one_by_one(arrivals, large_batch, sampling)
        return large_batch

    def _must_meet(self, micro_batches: Iterable[MicroBatch]) -> bool:
        """Whether there are statistics to be computed from several micro-batches."""
        is_whole = isinstance(micro_batches, list) and len(micro_batches) == 1
        return self._batch_norm == "exact" and not is_whole and has_batch_norm(self._modules)

    def _split(
        self, inputs: PyTree | Iterable[Any], targets: PyTree
    ) -> tuple[Iterable[MicroBatch], Shares]:
        shares = Shares(self._contract)
        size = self._micro_batch_size
        if not is_stream(inputs):
            micro_batches = split(inputs, targets, size, with_targets=self._loss_fn is not None)
            shares.announce(micro_batches)
            return micro_batches, shares
        if targets is not None:
            raise ValueError(
                "targets were given beside an iterable of micro-batches; let the iterable yield pairs "
                "(inputs, targets)"
            )
        return split_stream(inputs, size, with_targets=self._loss_fn is not None), shares

    def _compute_one_by_one(
        self, arrivals: Iterable[Arrival], large_batch: LargeBatch, sampling: Sampling
    ) -> None:
        """Each micro-batch forward and backward before the next: nothing of it is kept."""
        for arrival in arrivals:
            if arrival.is_last:
                large_batch.accumulators.observe()
            self._compute(arrival.micro_batch, large_batch, sampling)
            # Its memory is wanted for the next one, which is sent before the loop comes round.
            del arrival

    def _compute(
        self, micro_batch: MicroBatch, large_batch: LargeBatch, sampling: Sampling
    ) -> None:
        """One micro-batch, forward and backward, with its share of the large batch."""
        sampling.begin(large_batch.shares.samples, micro_batch.samples)
        share = large_batch.shares.take(micro_batch)
        if _is_nothing(share):
            return
        loss = self._forward.loss(self._forward.outputs(micro_batch), micro_batch.targets)
        loss = large_batch.add_loss(loss, share)
        # A share seeds the backward pass, so that gradients arrive ready to be kept. A loss in 16 bits
        # would round it: then it scales the gradients as they are added, in the accumulators' precision
        # (a share on the device must be read for that).
        narrow = loss.dtype in (torch.bfloat16, torch.float16)
        scale, seed = (float(share), 1.0) if narrow else (1.0, share)
        with self._backward(large_batch, scale):
            run_back(self._roots(loss, seed))

    def _compute_in_lockstep(
        self, arrivals: Iterable[Arrival], large_batch: LargeBatch, sampling: Sampling
    ) -> None:
        """All micro-batches forward together, from batch norm to batch norm, and back together."""
        store = HostStore(self._device)
        store.leave_alone(self._parameters.all)
        store.leave_alone(buffer for module in self._modules for buffer in module.buffers())
        together = ExactBatchNorm(
            self._modules,
            Lockstep(self._device, sampling, store),
            store,
            self._hooks.deliver,
            self._backend,
        )
        micro_batches: list[MicroBatch] = []

        def run(micro_batch: MicroBatch, first_sample: int, share: Weight) -> Any:
            sampling.begin(first_sample, micro_batch.samples)
            outputs = self._forward.outputs(micro_batch)
            if self._cross_sample_loss:
                return outputs
            # One that counts for nothing in the loss counts in the statistics.
            if _is_nothing(share):
                return []
            loss = self._forward.loss(outputs, micro_batch.targets)
            return self._roots(large_batch.add_loss(loss, share), share)

        def begin(micro_batch: MicroBatch) -> Callable[[], Any]:
            micro_batches.append(micro_batch)
            first_sample = large_batch.shares.samples
            return partial(run, micro_batch, first_sample, large_batch.shares.take(micro_batch))

        results = together.forward(begin(arrival.micro_batch) for arrival in arrivals)
        if self._cross_sample_loss:
            joint = self._joint_loss(results, micro_batches, large_batch)
            results = [
                roots_of(outputs, joint.gradients(position))
                for position, outputs in enumerate(results)
            ]
        with self._backward(large_batch, 1.0):
            together.backward(results)

    def _compute_twice(
        self, arrivals: Iterable[Arrival], large_batch: LargeBatch, sampling: Sampling
    ) -> None:
        """All outputs first, without graphs; then, with the loss's gradient, each micro-batch again."""
        micro_batches, outputs = [], []
        with torch.no_grad():
            for arrival in arrivals:
                micro_batch = arrival.micro_batch
                sampling.begin(large_batch.shares.samples, micro_batch.samples)
                large_batch.shares.take(micro_batch)
                micro_batches.append(micro_batch)
                outputs.append(detached(self._forward.outputs(micro_batch)))
        joint = self._joint_loss(outputs, micro_batches, large_batch)
        del outputs
        # From the same buffers through the same changes to the same end.
        self._transaction.put_buffers_back()
        first_sample = 0
        distances = []
        for position, micro_batch in enumerate(micro_batches):
            sampling.begin(first_sample, micro_batch.samples)
            first_sample += micro_batch.samples
            if position == len(micro_batches) - 1:
                large_batch.accumulators.observe()
            again = self._forward.outputs(micro_batch)
            distances.append(joint.distance(position, again))
            roots = roots_of(again, joint.gradients(position))
            del again
            if roots:
                with self._backward(large_batch, 1.0):
                    run_back(roots)
        check_same_outputs(distances)

    def _joint_loss(
        self, outputs: list[PyTree], micro_batches: list[MicroBatch], large_batch: LargeBatch
    ) -> Joint:
        """The loss of all outputs together, and its gradient with respect to them."""
        samples = [micro_batch.samples for micro_batch in micro_batches]
        joint = Joint(outputs, samples)
        targets = Joint([micro_batch.targets for micro_batch in micro_batches], samples)
        loss = self._forward.loss(joint.tree, detached(targets.tree))
        large_batch.add_loss(loss, 1.0)
        with self._backward(large_batch, 1.0):
            run_back(self._roots(loss, 1.0))
        return joint

    def _roots(self, loss: Tensor, seed: Weight) -> Roots:
        """Where a backward pass starts, and the gradient it starts with."""
        if self._grad_scaler is not None:
            loss = self._grad_scaler.scale(loss)
        return [(loss, _as_gradient(seed, loss))]

    @contextmanager
    def _backward(self, large_batch: LargeBatch, scale: float) -> Iterator[None]:
        """A backward pass: its gradients, ``scale`` times, go to the accumulators."""
        with large_batch.accumulators.collecting(scale), backward_context(self._device.type):
            yield

    def _finalise(self, large_batch: LargeBatch) -> None:
        """Writes the large batch's gradient into ``p.grad``: scaled, clipped, cast."""
        sums = large_batch.accumulators.finish()
        scale = large_batch.close(self._grad_scaler)
        self._finaliser.write(self._parameters.trainable, sums, scale, large_batch.grad_norm)
        self._finaliser.check_narrowed(
            self._parameters.trainable, large_batch.accumulators.statistics
        )

    def _update(self) -> None:
        scaler = self._grad_scaler
        if scaler is None:
            self._optimizer.step()
            return
        with _scaler_kept(scaler):
            scaler.step(self._optimizer)
            scaler.update()

    def _show_overflow(self) -> None:
        """Shows the scaler a gradient that is not finite, so that it lowers its scale."""
        if self._grad_scaler is not None:
            with _scaler_kept(self._grad_scaler):
                self._grad_scaler.unscale_(self._optimizer)
                self._grad_scaler.update()


@contextmanager
def _scaler_kept(scaler: GradScaler) -> Iterator[None]:
    """A scaler remembers that gradients were unscaled until it is updated. If that never comes, the next
    step would go without."""
    try:
        yield
    except BaseException:
        scaler.update(scaler.get_scale())
        raise


def _is_nothing(share: Weight) -> bool:
    """All targets are ignored: nothing to learn, and the mean over nothing is NaN."""
    return not isinstance(share, Tensor) and share == 0.0


def _as_gradient(seed: Weight, loss: Tensor) -> Tensor:
    """The seed as a gradient of the loss, made without a copy from the host: that would wait."""
    if isinstance(seed, Tensor):
        return seed.to(loss.dtype)
    return torch.full_like(loss, seed)
