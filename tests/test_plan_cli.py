"""``sbp-fast plan``: from a name to a table and an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sbp_fast.cli import main, plan
from sbp_fast.report import extra

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

MODULE = """
import torch
from torch import nn
from torch.nn import functional

def small():
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    return model, nn.CrossEntropyLoss(), torch.randn(12, 6), torch.randint(4, (12,))

def with_options():
    model, loss_fn, inputs, targets = small()
    return dict(model=model, loss_fn=loss_fn, inputs=inputs, targets=targets, device="cpu",
                budget="2KiB", batch_size=40, optimizer=torch.optim.SGD)

def own_loss():
    class Model(nn.Linear):
        def forward(self, x):
            return super().forward(x).square().mean()
    return Model(6, 6), None, torch.randn(5, 6), None

def three():
    return 1, 2, 3

def wrong_shape():
    model, loss_fn, inputs, targets = small()
    return model, loss_fn, inputs[:, 1:], targets
"""


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planned_subject.py").write_text(MODULE)
    yield
    sys.modules.pop("planned_subject", None)


def test_status_says_whether_a_micro_batch_fits(capsys: pytest.CaptureFixture[str]) -> None:
    name = "planned_subject:small"
    assert main(["plan", name, "--device", "cpu", "--budget", "1MiB"]) == 0
    printed = capsys.readouterr()
    # As many samples as the function returned.
    assert printed.out.startswith("Batch 12 within 1.0 MiB on cpu: micro_batch_size=12 (1 micro")
    assert main(["plan", name, "--device", "cpu", "--budget", "1KiB"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(
        "sbp-fast plan: no micro-batch of a batch of 12 fits into 1.0 KiB"
    )


def test_options_go_before_what_the_function_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "planned_subject:with_options"]) == 0
    assert capsys.readouterr().out.startswith("Batch 40 within 2.0 KiB on cpu: micro_batch_size=")
    options = "--batch-size 1024 --budget 64KiB --device cuda"
    assert main(["plan", "./planned_subject.py:with_options", *options.split()]) == 0
    assert capsys.readouterr().out.startswith("Batch 1024 within 64.0 KiB on cuda: micro_batch")


def test_a_model_that_returns_its_own_loss(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "planned_subject:own_loss", "--budget", "1MiB", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("Batch 5 within 1.0 MiB on cpu: micro_batch_size=5")


def test_all_options_reach_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(plan, "make_plan", lambda *_, **options: given.update(options))
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    line = (
        "planned_subject:small --batch-size 64 --budget 8GiB --device cpu --activations keep "
        "--batch-norm micro_batch --dropout native --cross-sample-loss"
    )
    sys.path.insert(0, ".")
    try:
        plan.plan_of(parser.parse_args(line.split()))
    finally:
        sys.path.remove(".")
    assert given == {
        "batch_size": 64,
        "budget": "8GiB",
        "device": "cpu",
        "activations": "keep",
        "batch_norm": "micro_batch",
        "dropout": "native",
        "cross_sample_loss": True,
    }


def test_figure(capsys: pytest.CaptureFixture[str]) -> None:
    line = "planned_subject:small --device cpu --budget 1MiB --output plan.png"
    assert main(["plan", *line.split()]) == 0
    assert Path("plan.png").read_bytes().startswith(PNG_SIGNATURE)
    assert capsys.readouterr().out.endswith("Figure: plan.png\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "planned_subject",
            "'planned_subject' names no function; expected package.module:function",
        ),
        ("planned_subject:small", "there is no budget, neither as --budget nor in what planned_"),
        ("planned_subject:three --budget 1MiB", "returned a tuple of 3; expected (model, loss_fn"),
        ("planned_subject:small --budget much", "memory budget 'much' is no size"),
        ("planned_subject:small --budget 1MiB --device tpu", "tpu"),
        ("planned_subject:small --budget 1MiB --activations some", "it must be one of 'auto'"),
        (
            "planned_subject:small --budget 1MiB --output no/p.png",
            "there is no directory no; create",
        ),
        ("planned_subject:small --budget 1MiB --output p.word", "must end in a format that can be"),
    ],
)
def test_bad_input_ends_in_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.splitlines()[-1].startswith("sbp-fast plan: ")


def test_what_the_users_code_raises_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "planned_subject:wrong_shape", "--budget", "1MiB", "--device", "cpu"]) == 2
    assert "linear" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "many"])
def test_batch_sizes_that_are_none(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", "planned_subject:small", "--batch-size", size])
    assert end.value.code == 2
    assert "expected a whole number >= 1" in capsys.readouterr().err


def test_figure_without_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name.partition(".")[0])

    monkeypatch.setattr(extra.importlib, "import_module", missing)
    assert main(["plan", "planned_subject:small", "--output", "p.png"]) == 2
    assert "pip install 'sbp_fast[demo]'" in capsys.readouterr().err
