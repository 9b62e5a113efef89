"""``sbp-fast verify``: from a name to a certificate and an exit status."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sbp_fast import Certificate
from sbp_fast.cli import main, verify
from sbp_fast.cli.named_function import POSITIONAL
from sbp_fast.report import extra

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

MODULE = """
import torch
from torch import nn
from torch.nn import functional

from neighbour import WIDTH

def holding():
    model = nn.Sequential(nn.Linear(WIDTH, 10), nn.Tanh(), nn.Linear(10, 4))
    return model, nn.CrossEntropyLoss(), torch.randn(12, WIDTH), torch.randint(4, (12,))

def tokens(logits, targets):
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

def ragged():
    targets = torch.randint(11, (12, 7))
    targets[:9, 2:] = -100
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))
    inputs = torch.randint(11, (12, 7))
    return dict(model=model, loss_fn=tokens, inputs=inputs, targets=targets,
                normalization="tokens", micro_batch_sizes=(4,), seed=5)

def compares_samples():
    return {**ragged(), "cross_sample_loss": False, "normalization": "auto"}

def three():
    return 1, 2, 3

def incomplete():
    return {"model": nn.Linear(2, 2)}

def raising():
    raise KeyError("who knows")

def wrong_shape():
    model, loss_fn, inputs, targets = holding()
    return model, loss_fn, inputs[:, 1:], targets

def demanding(batch_size):
    pass

number = 3
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory to be in, with modules, a package, and what cannot be imported."""
    before = set(sys.modules)
    (tmp_path / "elsewhere" / "package").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "elsewhere"):
        (folder / "neighbour.py").write_text("WIDTH = 6\n")
    (tmp_path / "subject.py").write_text(MODULE)
    (tmp_path / "elsewhere" / "subject.py").write_text(MODULE)
    (tmp_path / "elsewhere" / "package" / "subject.py").write_text(MODULE)
    (tmp_path / "hungry.py").write_text("import no_such_dependency\n")
    (tmp_path / "garbled.py").write_text("def :\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        # Of this test only: the next one has a directory, and modules, of its own.
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    sys.modules.pop("elsewhere", None)


def test_status_says_whether_the_promise_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "subject:holding"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Equivalence certificate: 12 samples, float32 on cpu")
    assert "sbp_fast            HOLDS" in printed
    assert main(["verify", "subject:ragged", "--normalization", "mean"]) == 1
    assert "sbp_fast            BROKEN: first in layer '0' at" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["./elsewhere/subject.py:holding", "elsewhere.package.subject:holding"]
)
def test_function_of_a_file_and_of_a_package(name: str) -> None:
    before = list(sys.path)
    assert main(["verify", name]) == 0
    assert sys.path == before


def test_options_go_before_what_the_function_says(tmp_path: Path) -> None:
    assert main(["verify", "subject:ragged", "--json", "of_the_dict.json"]) == 0
    certificate = Certificate.load("of_the_dict.json")
    assert [total.micro_batch_size for total in certificate.totals] == [4]
    assert certificate.samples == 12
    assert certificate.environment["seed"] == "5"

    options = "--micro-batch-sizes 2,3 --samples 9 --seed 7 --json given.json"
    assert main(["verify", "subject:ragged", *options.split()]) == 0
    certificate = Certificate.load("given.json")
    assert [total.micro_batch_size for total in certificate.totals] == [2, 3]
    assert certificate.samples == 9
    assert certificate.environment["seed"] == "7"


def test_all_options_reach_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    class ReachedError(BaseException):
        pass

    def catch(**given: Any) -> None:
        raise ReachedError(given)

    monkeypatch.setattr(verify, "make_certificate", catch)
    options = (
        "--micro-batch-sizes 1,3 --samples 7 --seed 2 --normalization sum --batch-norm exact "
        "--dropout native --cross-sample-loss"
    )
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    for line, expected in (
        ("", {}),
        (
            options,
            {
                "micro_batch_sizes": (1, 3),
                "samples": 7,
                "seed": 2,
                "normalization": "sum",
                "batch_norm": "exact",
                "dropout": "native",
                "cross_sample_loss": True,
            },
        ),
    ):
        arguments = parser.parse_args(["subject:holding", *line.split()])
        with pytest.raises(ReachedError) as reached:
            verify.run(arguments)
        given = reached.value.args[0]
        assert {name: given[name] for name in given if name not in POSITIONAL} == expected


def test_seed_is_that_of_the_function_too() -> None:
    for seed, name in (("1", "a"), ("1", "b"), ("2", "c")):
        main(["verify", "subject:holding", "--seed", seed, "--json", f"{name}.json"])
        torch.rand(1)
    first, again, other = (json.loads(Path(f"{name}.json").read_text()) for name in "abc")
    assert first["rows"] == again["rows"] != other["rows"]


def test_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "subject:holding", "--json", "c.json", "--plot", "c.png"]) == 0
    assert Path("c.png").read_bytes().startswith(PNG_SIGNATURE)
    assert json.loads(Path("c.json").read_text())["holds"] is True
    assert capsys.readouterr().out.endswith("Certificate: c.json\n\nFigure: c.png\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("subject", "'subject' names no function; expected package.module:function or path/to"),
        (":holding", "':holding' names no function"),
        ("nowhere:holding", "there is no module 'nowhere', neither installed nor in"),
        ("subject.inner:holding", "there is no module 'subject.inner'"),
        ("hungry:holding", "No module named 'no_such_dependency'"),
        ("nowhere.py:holding", "there is no file nowhere.py"),
        ("subject:nothing", "subject has no 'nothing'; expected a function without arguments"),
        ("subject:number", "subject has 'number', which is no function; expected"),
        ("subject:demanding", "subject:demanding needs arguments (missing a required argument"),
        ("subject:three", "subject:three returned a tuple of 3; expected (model, loss_fn, inputs"),
        ("subject:incomplete", "a dict with ['model'] (missing a required argument: 'loss_fn')"),
        ("subject:compares_samples", "cannot see how loss_fn=tokens averages. Declare it"),
        ("subject:holding --samples 13", "samples is 13; it must be from 1 to 12"),
        ("subject:holding --micro-batch-sizes 0", "micro_batch_sizes holds 0; each must be"),
        ("subject:holding --batch-norm best", "batch_norm is 'best'; it must be one of"),
        ("subject:holding --json no/c.json", "there is no directory no; create it"),
        ("subject:holding --plot no/c.png", "there is no directory no; create it"),
        ("subject:holding --plot c.word", "must end in a format that can be drawn, such as .png"),
    ],
)
def test_bad_input_is_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sbp-fast verify: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("name", "where", "kind"),
    [
        ("subject:raising", 'in raising\n    raise KeyError("who knows")', "KeyError"),
        ("subject:wrong_shape", "linear", "RuntimeError"),
        ("garbled:holding", "def :", "SyntaxError"),
    ],
)
def test_what_the_users_code_raises_is_shown(
    name: str, where: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is no verdict."""
    assert main(["verify", name]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert where in printed
    assert printed.endswith(f"sbp-fast verify: ended in {kind}, see above\n")


@pytest.mark.parametrize("sizes", ["", "1,", "1;2", "many"])
def test_sizes_that_are_no_numbers(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["verify", "subject:holding", "--micro-batch-sizes", sizes])
    assert end.value.code == 2
    assert f"{sizes!r}, expected whole numbers between commas" in capsys.readouterr().err


def test_plot_without_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name.partition(".")[0])

    monkeypatch.setattr(extra.importlib, "import_module", missing)
    assert main(["verify", "subject:holding", "--plot", "c.png"]) == 2
    assert "pip install 'sbp_fast[demo]'" in capsys.readouterr().err


def test_as_a_module(project: Path) -> None:
    # Not -P: the current directory is there because the command puts it there, not Python.
    code = "import sys; sys.path.remove(''); from sbp_fast.cli import main; sys.exit(main())"
    for program in (["-m", "sbp_fast"], ["-c", code]):
        command = [
            sys.executable,
            *program,
            "verify",
            "subject:holding",
            "--micro-batch-sizes",
            "5",
        ]
        run = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert "HOLDS" in run.stdout
