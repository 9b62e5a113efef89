"""One optimizer step on a batch of any size, told from top to bottom."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from . import options
from .activations import activations_of
from .batches import MicroBatch, PyTree
from .buffers import Buffers
from .first_look import Check, FirstLook
from .fitting import Fitting
from .forward import Forward
from .gradients import (
    Accumulators,
    Finaliser,
    FusedGradients,
    GradientHooks,
    autograd_can_accumulate,
)
from .invariance.batch_norm_layers import has_batch_norm
from .invariance.layout import Layouts
from .invariance.sampling import Sampling
from .invariance.survey import Survey
from .large_batch import LargeBatch
from .loss import Shares, read_contract
from .loss_probe import probe_loss
from .memory.device_budget import free_bytes
from .memory.host_store import HostStore
from .memory.peak import PeakMeter
from .ops import is_automatic, resolve
from .parameters import Parameters, find_parameters, modules_of, names_of
from .passes.computation import Computation
from .passes.one_by_one import compute_one_by_one
from .passes.twice import compute_twice
from .passes.until_it_fits import compute_until_it_fits
from .passes.waiting import WaitingBytes
from .result import StepResult
from .splitting import Cost, Splitting
from .streaming import Arrival, make_ring, stream_to
from .transaction import Transaction
from .tuning.noise_estimator import NoiseScaleEstimator
from .update import Update


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
        micro_batch_size: samples computed at once. ``"auto"``: as many as, says :func:`sbp_fast.plan`,
            ``memory_budget`` or the free CUDA memory allows; on a CPU without a budget, 32. Where memory
            runs out all the same, the step goes on with half as many, and so do later ones.
        micro_batch_cost: for samples of different lengths: ``micro_batch_cost(inputs)`` is what a micro-
            batch of these inputs costs (``inputs.numel()``, its tokens, say), and ``micro_batch_size``
            the most that one may cost, instead of a number of samples. A piece takes as many samples,
            in their order, as that allows. Samples must not make it cheaper. None: samples count alike.
        memory_budget: the most device memory that a step may take, parameters and optimizer state
            included: ``"8GiB"`` or bytes; None for all that the device has. On the CPU the bytes of
            tensors are counted, see :func:`sbp_fast.memory.memory_budget`; a few percent of the time.
        host_budget: the most host memory in which activations may wait, which exact batch norm and
            ``activations="offload"`` need: ``"32GiB"`` or bytes; None for no bound.
        spill_directory: where memory-mapped files hold what is beyond ``host_budget``.
        normalization: how the loss averages. ``"auto"`` reads it off a torch loss; anything else is
            declared: ``"mean"`` (over samples), ``"tokens"`` (over targets that are not -100), ``"sum"``
            (no division), ``"inverse_sqrt"`` (the paper's ``Loss / sqrt(B)``), or a callable that takes
            a micro-batch's targets (its inputs, if there are no targets) and returns its weight.
        probe: on the first step, and when layers change between training and evaluation, a few samples
            are computed to check what was declared and to find where samples are in the model; False: it
            is believed, and samples come first. Buffers, gradients and random numbers stay as they are;
            what a model counts in attributes of its own goes on.
        batch_norm: ``"exact"``: layers in training mode normalise with the statistics of the whole large
            batch, as if it had been computed at once; all micro-batches then run in lockstep, and what
            the others need for their backward pass waits in host memory. ``"micro_batch"``: each
            micro-batch is normalised by itself.
        dropout: ``"per_sample"``: a sample's masks depend on its place in the large batch and on torch's
            seed, so that they are the same for any split; ``"native"``: the model's own.
        cross_sample_loss: True: ``loss_fn`` is called once, with the outputs (and targets) of all micro-
            batches joined along the first dimension: for losses that compare samples.
        activations: ``"keep"``: they live from forward to backward. ``"recompute"``: the model's repeated
            blocks keep their inputs alone and are computed again in backward; ``"offload"``: what the
            backward pass needs waits in pinned host memory. ``"auto"``: kept where a plan says that it
            fits into ``memory_budget`` or the free CUDA memory, else as few blocks computed again as must
            be, else offloaded; kept on a CPU without a budget, and with a ``micro_batch_cost``. The
            gradient is the same.
        max_grad_norm: clips the large batch's gradient to this 2-norm.
        autocast: ``torch.bfloat16``, ``torch.float16`` or a ``torch.autocast`` object for model and loss;
            None leaves the caller's context as it is.
        grad_scaler: scales the loss, skips steps whose gradient overflowed, and adapts.
        noise_scale: True: ``result.noise_scale`` is estimated; each step reads its gradient once more.
            Or the estimator itself, to choose its smoothing or to save its state.
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
        micro_batch_size: int | str = "auto",
        micro_batch_cost: Cost | None = None,
        memory_budget: str | int | None = None,
        host_budget: str | int | None = None,
        spill_directory: str | os.PathLike[str] | None = None,
        normalization: options.Normalization = "auto",
        probe: bool = True,
        batch_norm: str = "exact",
        dropout: str = "per_sample",
        cross_sample_loss: bool = False,
        activations: str = "auto",
        max_grad_norm: float | None = None,
        autocast: torch.dtype | torch.autocast | None = None,
        grad_scaler: GradScaler | None = None,
        noise_scale: bool | NoiseScaleEstimator = False,
        backend: str = "auto",
    ) -> None:
        options.check_model(model)
        options.check_optimizer(optimizer)
        options.check_loss_fn(loss_fn)
        options.check_grad_scaler(grad_scaler)
        self._memory_budget = options.check_memory_budget(memory_budget)
        options.check_choice("probe", probe)
        options.check_choice("batch_norm", batch_norm)
        options.check_choice("dropout", dropout)
        options.check_choice("cross_sample_loss", cross_sample_loss)
        options.check_choice("activations", activations)
        options.check_choice("backend", backend)
        if batch_norm == "micro_batch":
            options.warn_about_batch_norm(model)
        self._model = model
        self._loss_fn = loss_fn
        self._batch_norm = batch_norm
        self._layouts = Layouts() if dropout == "per_sample" else None
        self._host_budget = options.check_host_budget(host_budget)
        self._spill_directory = options.check_spill_directory(spill_directory, host_budget)
        self._cross_sample_loss = cross_sample_loss
        self._modules = modules_of(model, loss_fn)
        self._activations = activations_of(activations, self._modules, self._host_budget)
        self._optimizer = optimizer
        self._update = Update(optimizer, grad_scaler)
        self._wanted_size = options.check_micro_batch_size(micro_batch_size, micro_batch_cost)
        self._has_cost = micro_batch_cost is not None
        self._splitting = Splitting(loss_fn, micro_batch_cost)
        self._plan_options = {
            **{"activations": activations, "host_budget": self._host_budget},
            **{"batch_norm": batch_norm, "dropout": dropout},
            **{"cross_sample_loss": cross_sample_loss, "autocast": autocast, "backend": backend},
        }
        self._contract = (
            options.cross_sample_contract(loss_fn, normalization)
            if cross_sample_loss
            else read_contract(loss_fn, normalization)
        )
        self._waiting = (
            None
            if self._host_budget is None
            else WaitingBytes(self._host_budget, self._spill_directory)
        )
        self._survey = Survey(self._layouts, exact_batch_norm=batch_norm == "exact")
        checks: list[Check] = []
        if probe and (batch_norm == "exact" or dropout == "per_sample"):
            checks.append(self._survey)
        if probe and self._contract.declared is not None:
            checks.append(partial(probe_loss, self._contract))
        self._first_look = FirstLook(checks)
        self._grad_scaler = grad_scaler
        self._noise = options.check_noise_scale(noise_scale)
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
        leaves all of them as they were, too, unless the optimizer itself raised half way: where that is
        for lack of memory, the message says so.

        Args:
            inputs: tensors of shape ``(samples, ...)``, alone or in dicts, tuples and lists, on host,
                pinned, memory-mapped or device memory, or :class:`sbp_fast.data.Rows` of them; or an
                iterable (not a list or tuple) of micro-batches: of ``(inputs, targets)`` pairs, or of
                inputs where ``loss_fn`` is None. Items larger than ``micro_batch_size`` are split
                further.
            targets: the same for the targets.

        Raises:
            ValueError: an empty batch, leaves of different lengths, a loss that is no scalar or does not
                add up as declared.
        """
        self._follow_changes()
        shares = Shares(self._contract)
        micro_batches = self._splitting.split(inputs, targets, shares, self._fitting.size_for)
        with self._fitting.within_budget(micro_batches), self._transaction as transaction:
            large_batch = self._stream(micro_batches, shares)
            self._finalise(large_batch)
            self._splitting.end_step()
            finite_loss, finite_gradient = large_batch.finite()
            skipped = not (finite_loss and finite_gradient)
            if not skipped:
                self._update.make()
            elif not finite_gradient:
                self._update.show_overflow()
            # An autocast context of the caller's would go on with copies of the old parameters.
            torch.clear_autocast_cache()
            if skipped:
                transaction.roll_back()
            else:
                transaction.clear_gradients()
            result = large_batch.result(skipped)
            self._fitting.learn_from(result)
            return result

    def backward(self, inputs: PyTree | Iterable[Any], targets: PyTree = None) -> StepResult:
        """The same without the update: leaves the large batch's gradient in ``p.grad``.

        The gradient replaces whatever ``p.grad`` held. It is clipped where ``max_grad_norm`` is set, and
        still scaled where there is a ``grad_scaler``, as ``grad_scaler.step`` expects it. A gradient that
        is not finite is left so, as ``Tensor.backward`` leaves it. The device is not waited for, unless
        the batch lies in pinned memory: then until that is read and may be filled again.

        Takes and raises what :meth:`step` does.
        """
        self._follow_changes()
        shares = Shares(self._contract)
        micro_batches = self._splitting.split(inputs, targets, shares, self._fitting.size_for)
        with self._fitting.within_budget(micro_batches), self._transaction:
            large_batch = self._stream(micro_batches, shares)
            self._finalise(large_batch)
            self._splitting.end_step()
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
        self._fitting = Fitting(
            *(self._modules, self._loss_fn, self._optimizer, device),
            *(self._memory_budget, self._wanted_size, self._has_cost),
            *(self._activations, self._plan_options),
        )
        self._ring = make_ring(device)
        self._finaliser = Finaliser(self._backend, self._max_grad_norm)
        self._transaction = Transaction(self._modules, parameters.all)
        self._buffers = Buffers(self._modules, earlier=self._transaction.buffers)
        self._hooks = GradientHooks(
            parameters.trainable,
            names,
            unwatched=[
                position
                for position, parameter in enumerate(parameters.trainable)
                if automatic and autograd_can_accumulate(parameter)
            ],
        )
        self._fused = FusedGradients(self._hooks)

    def _stream(self, micro_batches: Iterable[MicroBatch], shares: Shares) -> LargeBatch:
        """Runs every micro-batch forward and backward; gradients go to accumulators as they appear."""
        micro_batches = self._first_look.at(micro_batches, self._forward, self._device)
        must_meet = self._must_meet()
        all_at_once = must_meet or self._cross_sample_loss
        meter = PeakMeter(self._device)
        arrivals = self._arrivals(micro_batches, keep=all_at_once)
        with (
            torch.enable_grad(),
            Sampling(
                self._modules,
                self._device,
                self._layouts,
                reseed=all_at_once,
                backend=self._backend,
            ) as sampling,
            self._fused.during(),
            self._activations.during(
                self._device, meter.counter, meets=has_batch_norm if must_meet else None
            ) as store,
        ):

            def start_over() -> None:
                self._transaction.start_over()
                shares.start_over()

            def begin() -> Computation:
                large_batch = LargeBatch(
                    *(shares, self._new_accumulators(), meter),
                    *(str(self._activations), self._noise),
                )
                return Computation(
                    *(self._device, self._forward, large_batch, sampling),
                    *(self._grad_scaler, self._fused),
                )

            if must_meet:
                if self._waiting is not None and isinstance(micro_batches, list):
                    self._waiting.check(
                        micro_batches, self._forward, self._modules, self._host_store(meter)
                    )
                computation = compute_until_it_fits(
                    arrivals, begin, self._compute_together, start_over, self._splitting
                )
            elif self._cross_sample_loss:
                compute = partial(compute_twice, buffers=self._transaction.buffers)
                computation = compute_until_it_fits(
                    arrivals, begin, compute, start_over, self._splitting
                )
            else:
                computation = begin()
                compute_one_by_one(
                    arrivals,
                    computation,
                    self._splitting,
                    at_beginning=self._transaction.buffers,
                    later=self._buffers,
                )
        if store is not None:
            computation.large_batch.note_waiting(store)
        return computation.large_batch

    def _compute_together(self, arriving: Iterable[MicroBatch], computation: Computation) -> None:
        # Here, since nothing else needs greenlet, which a machine without network may lack.
        from .passes.together import compute_together

        store = self._host_store(computation.large_batch.meter)
        compute_together(
            arriving,
            computation,
            self._modules,
            self._hooks.deliver,
            store,
            cross_sample_loss=self._cross_sample_loss,
            backend=self._backend,
        )
        computation.large_batch.note_waiting(store)

    def _new_accumulators(self) -> Accumulators:
        return Accumulators(self._hooks, backend=self._backend)

    def _arrivals(self, micro_batches: Iterable[MicroBatch], keep: bool) -> Iterator[Arrival]:
        return stream_to(self._device, micro_batches, self._ring, keep=keep)

    def _must_meet(self) -> bool:
        """Whether there are statistics to be computed from all micro-batches."""
        if self._batch_norm != "exact":
            return False
        return has_batch_norm(self._modules) or self._survey.calls_batch_norm

    def _host_store(self, meter: PeakMeter) -> HostStore:
        store = HostStore(
            self._device,
            self._host_budget,
            self._spill_directory,
            meter.counter,
            # Half of what is free is left to the micro-batch that computes.
            device_room=free_bytes(self._device) // 2,
        )
        store.leave_alone(self._parameters.all)
        store.leave_alone(buffer for module in self._modules for buffer in module.buffers())
        return store

    def _finalise(self, large_batch: LargeBatch) -> None:
        """Writes the large batch's gradient into ``p.grad``: scaled, clipped, cast."""
        sums = large_batch.accumulators.finish()
        scale = large_batch.close(self._grad_scaler)
        self._finaliser.write(self._parameters.trainable, sums, scale, large_batch.grad_norm)
        self._finaliser.check_narrowed(
            self._parameters.trainable, large_batch.accumulators.statistics
        )
