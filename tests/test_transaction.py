"""What a transaction puts back: gradients, buffers of every kind, and which buffers there are."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbp_fast.transaction import Transaction

MANY = (1 << 20) // 4 + 1  # float32 elements of a buffer that is not copied at every step

# PyTorch says of sparse CSR tensors, once per process, that they are in beta.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")


def module_with(**buffers: Tensor | None) -> nn.Module:
    module = nn.Module()
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer)
    return module


def transaction_on(*modules: nn.Module) -> Transaction:
    return Transaction(modules, [p for module in modules for p in module.parameters()])


def complete(transaction: Transaction) -> None:
    with transaction:
        pass


def fail(transaction: Transaction, during: Callable[[], Any]) -> None:
    """A step that does something and then raises the user's own error."""

    def step() -> None:
        with transaction:
            during()
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        step()


# --- Gradients ----------------------------------------------------------------------------------


def test_gradients_are_set_aside_and_put_back() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3), requires_grad=False)]
    before = [torch.ones(2), torch.ones(3)]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient
    transaction = Transaction([], parameters)

    def during() -> None:
        assert all(parameter.grad is None for parameter in parameters)
        parameters[0].grad = torch.zeros(2)

    fail(transaction, during)
    assert all(p.grad is gradient for p, gradient in zip(parameters, before, strict=True))
    with transaction:
        parameters[1].grad = torch.zeros(3)
        transaction.clear_gradients()
    assert all(parameter.grad is None for parameter in parameters)


# --- The contents of buffers --------------------------------------------------------------------


KINDS: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: torch.ones(4),
    "scalar": lambda: torch.tensor(3),
    "empty": lambda: torch.empty(0, 4),
    "large": lambda: torch.ones(MANY),
    "transposed": lambda: torch.arange(6.0).view(2, 3).t(),
    "sliced": lambda: torch.arange(8.0)[::2],
    "expanded": lambda: torch.arange(3.0)[:, None].expand(3, 4),
    "expanded_to_none": lambda: torch.ones(1, 1).expand(0, 1),
    "large_expanded": lambda: torch.arange(float(MANY)).expand(2, MANY),
    "windows": lambda: torch.arange(6.0).unfold(0, 3, 1),
    "sparse_coo": lambda: torch.eye(4).to_sparse(),
    "sparse_csr": lambda: torch.eye(4).to_sparse_csr(),
    "half": lambda: torch.ones(3, dtype=torch.bfloat16),
    "boolean": lambda: torch.tensor([True, False]),
}


def dense(buffer: Tensor) -> Tensor:
    return buffer.to_dense() if buffer.layout is not torch.strided else buffer.clone()


def change(buffer: Tensor) -> None:
    """In place; through what it was expanded from, where it cannot be written to itself."""
    target = buffer if buffer._base is None else buffer._base
    target.zero_() if target.dtype is torch.bool else target.mul_(2)


@pytest.mark.parametrize("kind", KINDS)
def test_contents_are_put_back_in_place(kind: str) -> None:
    buffer = KINDS[kind]()
    module = module_with(buffer=buffer)
    transaction = transaction_on(module)
    before = dense(buffer)
    for _ in range(2):
        complete(transaction)
        fail(transaction, lambda: None)
        assert torch.equal(dense(buffer), before)
        fail(transaction, lambda: change(buffer))
        assert module.buffer is buffer
        assert torch.equal(dense(buffer), before)
    # What a completed step has changed is where the next one begins.
    with transaction:
        change(buffer)
    after = dense(buffer)
    fail(transaction, lambda: change(buffer))
    assert torch.equal(dense(buffer), after)


def test_an_expanded_buffer_keeps_no_other_from_being_put_back() -> None:
    module = module_with(mask=torch.ones(1).expand(4), seen=torch.zeros(1))
    fail(transaction_on(module), lambda: module.seen.add_(1))
    assert module.seen.item() == 0


def test_only_the_memory_of_an_expanded_buffer_is_written() -> None:
    """What lies between its elements belongs to others."""
    base = torch.zeros(3, 2)
    module = module_with(column=base[:, :1].expand(3, 5))
    fail(transaction_on(module), lambda: base.add_(1))
    assert torch.equal(base, torch.tensor([[0.0, 1.0]] * 3))


@pytest.mark.parametrize("size", [3, MANY], ids=["small", "large"])
def test_a_buffer_resized_during_the_step(size: int) -> None:
    module = module_with(cache=torch.ones(size))
    buffer = module.cache

    def during() -> None:
        buffer.data = torch.zeros(5)

    transaction = transaction_on(module)
    fail(transaction, during)
    assert module.cache is buffer
    assert torch.equal(buffer, torch.ones(size))


def test_a_buffer_resized_between_steps() -> None:
    module = module_with(cache=torch.ones(3))
    transaction = transaction_on(module)
    complete(transaction)
    module.cache.data = torch.arange(5.0)
    fail(transaction, lambda: module.cache.zero_())
    assert torch.equal(module.cache, torch.arange(5.0))


class Unwritable(torch.Tensor):
    """Refuses to be written to in place."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._foreach_copy_:
            raise RuntimeError("unwritable")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_one_that_cannot_be_put_back_is_warned_of_and_the_others_are() -> None:
    module = module_with(bad=torch.ones(7).as_subclass(Unwritable), good=torch.ones(2))
    with pytest.warns(UserWarning, match=r"a buffer of shape \(7,\) was not put back.*unwritable"):
        fail(transaction_on(module), lambda: module.good.zero_())
    assert torch.equal(module.good, torch.ones(2))


def test_copies_of_large_buffers_are_made_once() -> None:
    """Again only when the version says that the buffer has changed; small ones are copied always."""
    module = module_with(large=torch.ones(MANY), sparse=torch.eye(3).to_sparse())
    transaction = transaction_on(module)
    complete(transaction)
    copies = [copy.contents for copy in transaction.buffers._copies.values()]
    versions = [copy._version for copy in copies]
    complete(transaction)
    assert [copy._version for copy in copies] == versions
    module.large.add_(1)
    complete(transaction)
    assert all(
        a is c.contents for a, c in zip(copies, transaction.buffers._copies.values(), strict=True)
    )
    assert torch.equal(copies[0], module.large)


def test_running_statistics_are_put_back() -> None:
    """Their kernels do not raise the version."""
    norm = nn.BatchNorm1d(3)
    transaction = transaction_on(norm)
    for _ in range(2):
        with transaction:
            norm(torch.randn(4, 3))
        before = {name: value.clone() for name, value in norm.state_dict().items()}
        fail(transaction, lambda: norm(torch.randn(4, 3)))
        assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


# --- Inference mode -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, MANY], ids=["small", "large"])
def test_entered_in_inference_mode_first(size: int) -> None:
    module = module_with(count=torch.zeros(size))
    transaction = transaction_on(module)
    with torch.inference_mode():
        fail(transaction, lambda: module.count.add_(1))
    module.count.add_(1)
    fail(transaction, lambda: module.count.add_(1))
    assert torch.equal(module.count, torch.ones(size))


def test_a_buffer_made_in_inference_mode() -> None:
    with torch.inference_mode():
        module = module_with(count=torch.zeros(3), large=torch.zeros(MANY))

    @torch.inference_mode()
    def during() -> None:
        module.count.add_(1)

    transaction = transaction_on(module)
    for _ in range(2):
        fail(transaction, during)
        assert torch.equal(module.count, torch.zeros(3))


# --- Which buffers there are --------------------------------------------------------------------


def test_a_buffer_replaced_during_the_step() -> None:
    module = module_with(count=torch.zeros(()))
    buffer = module.count
    fail(transaction_on(module), lambda: setattr(module, "count", module.count + 1))
    assert module.count is buffer


def test_a_buffer_set_to_none_between_steps_stays_none() -> None:
    module = module_with(mask=torch.ones(3))
    transaction = transaction_on(module)
    complete(transaction)
    module.mask = None
    fail(transaction, lambda: None)
    assert module.mask is None


def test_a_buffer_that_was_none_is_none_again() -> None:
    module = module_with(count=None, other=torch.zeros(1))
    fail(transaction_on(module), lambda: setattr(module, "count", torch.zeros(())))
    assert module.count is None


def test_a_buffer_registered_during_the_step_is_gone_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    fail(transaction_on(model), lambda: model[0].register_buffer("late", torch.zeros(1)))
    assert not hasattr(model[0], "late")


def test_a_buffer_deleted_during_the_step_is_back_in_its_place() -> None:
    module = module_with(first=torch.zeros(1), second=torch.ones(1))
    fail(transaction_on(module), lambda: delattr(module, "first"))
    assert list(module.state_dict()) == ["first", "second"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_the_buffers_of_a_scripted_module() -> None:
    """It refuses to change which they are; what they hold is put back."""
    module = torch.jit.script(nn.BatchNorm1d(3))
    transaction = transaction_on(module)
    fail(transaction, lambda: module(torch.randn(4, 3)))
    assert torch.equal(module.running_mean, torch.zeros(3))
    assert int(module.num_batches_tracked) == 0


def test_modules_that_gain_buffers_later() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    transaction = transaction_on(model)
    complete(transaction)
    model[0].register_buffer("count", torch.zeros(1))
    model.append(nn.BatchNorm1d(2))
    fail(transaction, lambda: (model[0].count.add_(1), model(torch.randn(4, 2))))
    assert model[0].count.item() == 0
    assert model[1].num_batches_tracked.item() == 0


def test_every_root_is_watched_and_shared_buffers_are_copied_once() -> None:
    shared = torch.zeros(1)
    model, loss = module_with(a=shared), module_with(b=shared, own=torch.zeros(1))
    transaction = transaction_on(model, loss)
    fail(transaction, lambda: (shared.add_(1), loss.own.add_(1)))
    assert shared.item() == loss.own.item() == 0
    assert len(transaction.buffers._copies) == 2


def test_buffers_that_are_gone_are_not_kept() -> None:
    module = module_with(mask=torch.ones(3))
    gone = weakref.ref(module.mask)
    transaction = transaction_on(module)
    complete(transaction)
    module.mask = None
    complete(transaction)
    assert gone() is None
    assert not transaction.buffers._copies
