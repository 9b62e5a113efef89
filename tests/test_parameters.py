"""Which parameters a step trains, clears and refuses: those of the model, the loss and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tolerances
import torch
from reference.full_batch import (
    assert_close,
    assert_gradients_match,
    full_batch,
    gradients_of,
    total_norm,
)
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from sbp_fast import StreamedAccumulator
from sbp_fast.ops import availability

SAMPLES = 12
MICRO = 5


class Tempered(nn.Module):
    """Cross entropy with a temperature to be learned, and a buffer that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(outputs / self.temperature, targets)


def vectors() -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, 6), torch.randint(4, (SAMPLES,))


def accumulator_for(
    model: nn.Module, parameters: Any = None, loss_fn: Any = None, **options: Any
) -> StreamedAccumulator:
    parameters = model.parameters() if parameters is None else parameters
    return StreamedAccumulator(
        model,
        torch.optim.SGD(parameters, lr=0.1),
        nn.CrossEntropyLoss() if loss_fn is None else loss_fn,
        micro_batch_size=MICRO,
        **options,
    )


@pytest.mark.usefixtures("adding")
class TestBesideTheModel:
    """A loss has parameters; an optimizer may have some that no module holds."""

    @pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
    @pytest.mark.parametrize("max_grad_norm", [None, 0.05])
    @pytest.mark.parametrize("held", ["by the loss", "by the optimizer"])
    def test_trained_like_the_models(
        self, streamed: bool, max_grad_norm: float | None, held: str
    ) -> None:
        model, loss_fn = nn.Linear(6, 4).double(), Tempered().double()
        plain_model, plain_loss = nn.Linear(6, 4).double(), Tempered().double()
        plain_model.load_state_dict(model.state_dict())
        plain = [*plain_model.parameters(), *plain_loss.parameters()]
        optimizer = torch.optim.SGD(plain, lr=0.1)
        # A plain function hides the loss's parameters: then only the optimizer knows them.
        given = loss_fn if held == "by the loss" else lambda *a: loss_fn(*a)
        accumulator = accumulator_for(
            model,
            [*model.parameters(), *loss_fn.parameters()],
            given,
            normalization="mean",
            max_grad_norm=max_grad_norm,
        )
        for _ in range(5):
            inputs, targets = (
                torch.randn(SAMPLES, 6, dtype=torch.float64),
                torch.randint(4, (SAMPLES,)),
            )
            expected = plain_loss(plain_model(inputs), targets)
            expected.backward()
            norm = total_norm({str(i): p.grad for i, p in enumerate(plain)})
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(plain, max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

            def stream(inputs: Tensor = inputs, targets: Tensor = targets) -> Iterator[Any]:
                yield from zip(inputs.split(4), targets.split(4), strict=True)

            result = accumulator.step(stream()) if streamed else accumulator.step(inputs, targets)
            assert_close(result.loss, expected.detach(), tolerances.STEP[torch.float64])
            assert_close(result.grad_norm, norm, tolerances.STEP[torch.float64])
        ours = [*model.parameters(), *loss_fn.parameters()]
        for value, reference in zip(ours, plain, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-14)
            assert value.grad is None

    def test_a_step_that_fails_puts_them_back(self) -> None:
        model, loss_fn = nn.Linear(6, 4), Tempered()
        parameters = [*model.parameters(), *loss_fn.parameters()]
        accumulator = accumulator_for(model, parameters, loss_fn, normalization="mean")
        accumulator.backward(*vectors())
        kept, calls = [p.grad for p in parameters], float(loss_fn.calls)
        inputs, targets = vectors()
        targets[MICRO + 1] = 99  # no such class: the second micro-batch fails
        with pytest.raises(IndexError):
            accumulator.step(inputs, targets)
        assert all(p.grad is g for p, g in zip(parameters, kept, strict=True))
        assert float(loss_fn.calls) == calls

    def test_a_frozen_layer_stays(self) -> None:
        """Its gradient is left from before it was frozen, and an optimizer would go on with it."""
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
        accumulator = accumulator_for(model)
        accumulator.backward(*vectors())
        model[0].requires_grad_(False)
        before = model[0].weight.clone()
        accumulator.step(*vectors())
        after_one = model[0].weight.clone()
        accumulator.step(*vectors())
        assert torch.equal(model[0].weight, after_one)
        assert torch.equal(after_one, before)


class TestChanges:
    def test_a_model_cast_after_construction(self) -> None:
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
        accumulator = accumulator_for(model)
        for dtype in (torch.bfloat16, torch.float64, torch.float32):
            model.to(dtype)
            inputs, targets = vectors()
            inputs = inputs.to(dtype)
            oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
            accumulator.backward(inputs, targets)
            gradients = gradients_of(model)
            assert {g.dtype for g in gradients.values() if g is not None} == {dtype}
            assert_gradients_match(gradients, oracle.gradients, tolerances.STEP[dtype])

    @pytest.mark.usefixtures("adding")
    def test_a_change_that_is_refused_and_taken_back(self) -> None:
        model = nn.Linear(6, 4)
        accumulator = accumulator_for(model)
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="none of which requires a gradient"):
            accumulator.step(*vectors())
        model.requires_grad_(True)
        inputs, targets = vectors()
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        accumulator.backward(inputs, targets)
        assert_gradients_match(
            gradients_of(model), oracle.gradients, tolerances.STEP[torch.float32]
        )

    @pytest.mark.skipif(not availability("cpu").usable, reason=availability("cpu").reason)
    def test_a_device_that_the_backend_refuses_is_refused_each_time(self) -> None:
        """Were anything kept of the first refusal, the second step would go on with the old backend."""
        model = nn.Linear(6, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        accumulator = StreamedAccumulator(
            model, optimizer, nn.CrossEntropyLoss(), micro_batch_size=MICRO, backend="cpu"
        )
        model.to_empty(device="meta")
        optimizer.param_groups[0]["params"] = list(model.parameters())
        for _ in range(2):
            with pytest.raises(ValueError, match="these are on meta"):
                accumulator.step(*vectors())

    def test_parameters_that_join_the_optimizer(self) -> None:
        model, extra = nn.Linear(6, 4), torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        accumulator = StreamedAccumulator(
            model,
            optimizer,
            lambda outputs, targets: nn.functional.cross_entropy(outputs + extra, targets),
            micro_batch_size=MICRO,
            normalization="mean",
        )
        accumulator.step(*vectors())
        assert not extra.any()
        optimizer.add_param_group({"params": [extra]})
        accumulator.step(*vectors())
        assert bool(extra.any())
        assert extra.grad is None

    def test_a_hook_that_takes_gradients_away(self) -> None:
        """Installed later, as optimizers that step in backward do."""
        model = nn.Linear(6, 4)
        accumulator = accumulator_for(model)
        accumulator.step(*vectors())

        def take(parameter: Tensor) -> None:
            parameter.grad = None

        handle = model.weight.register_post_accumulate_grad_hook(take)
        with pytest.raises(
            RuntimeError, match="another hook has taken the gradient of parameter 'weight'"
        ):
            accumulator.step(*vectors())
        handle.remove()
        accumulator.step(*vectors())


class DistributedDataParallel(nn.Module):
    """Of that name: the real one needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class TestRefused:
    def test_a_wrapper_that_reduces_gradients(self) -> None:
        with pytest.raises(
            NotImplementedError, match=r"DistributedDataParallel.*pass the plain model"
        ):
            accumulator_for(DistributedDataParallel(nn.Linear(6, 4)))

    def test_a_wrapped_parameter(self) -> None:
        model = nn.Linear(6, 4)
        model.weight = nn.Parameter(TwoTensor(torch.randn(4, 6), torch.randn(4, 6)))
        with pytest.raises(NotImplementedError, match="parameter 'weight' is a TwoTensor"):
            accumulator_for(model)

    def test_a_complex_parameter(self) -> None:
        model = nn.Linear(6, 4, dtype=torch.complex64)
        with pytest.raises(TypeError, match=r"parameter 'weight' has dtype torch.complex64"):
            accumulator_for(model)

    def test_parameters_on_several_devices(self) -> None:
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4, device="meta"))
        with pytest.raises(
            ValueError, match=r"parameter '1.weight' is on meta but parameter '0.weight' is on cpu"
        ):
            accumulator_for(model)

    def test_another_models_optimizer(self) -> None:
        with pytest.raises(ValueError, match="the optimizer holds no parameter of the model"):
            accumulator_for(nn.Linear(6, 4), nn.Linear(6, 4).parameters())

    def test_an_optimizer_that_needs_a_closure(self) -> None:
        model = nn.Linear(6, 4)
        with pytest.raises(TypeError, match=r"LBFGS.step\(\) demands a closure"):
            StreamedAccumulator(
                model,
                torch.optim.LBFGS(model.parameters()),
                nn.CrossEntropyLoss(),
                micro_batch_size=1,
            )

    def test_inference_mode_and_nothing_is_left_of_it(self) -> None:
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4).eval())
        accumulator = accumulator_for(model)
        with torch.inference_mode(), pytest.raises(RuntimeError, match="leave that context first"):
            accumulator.step(*vectors())
        assert not accumulator.step(*vectors()).skipped
