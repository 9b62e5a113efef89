"""Which parts of a model are computed again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import convolutional, from_transformers, language
from zoo.case import Builder

from sbp_fast.activations.blocks import find_blocks
from sbp_fast.bench.models import resnet50


def names_of_blocks(model: nn.Module) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in find_blocks(model).whole]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


class Tower(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Tower(5), Tower(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (language.gpt, ["blocks.0", "blocks.1"]),
        (convolutional.unet, ["down.0", "down.1", "bottom", "up.0", "up.1"]),
        (convolutional.residual, ["3", "4", "5"]),
    ],
    ids=["gpt", "unet", "residual"],
)
def test_blocks_side_by_side(build: Builder, expected: list[str]) -> None:
    assert names_of_blocks(build().model) == expected


def test_stages_are_taken_apart_and_layers_are_not() -> None:
    """In Transformers' ResNet-50 stages repeat, layers within stages, and convolutions within layers."""
    names = names_of_blocks(from_transformers.resnet50().model)
    assert len(names) == 3 + 4 + 6 + 3
    assert names[0] == "model.resnet.encoder.stages.0.layers.0"


def test_a_residual_network_of_the_benchmark() -> None:
    assert names_of_blocks(resnet50(4)) == [str(position) for position in range(4, 20)]


def test_towers_are_taken_apart() -> None:
    names = names_of_blocks(Towers())
    assert names == [f"{side}.layers.{layer}" for side in ("left", "right") for layer in range(5)]


def test_towers_of_one_layer_are_not() -> None:
    model = Towers()
    model.left, model.right = Tower(1), Tower(1)
    assert names_of_blocks(model) == ["left", "right"]


def test_a_block_in_two_places_is_one_block() -> None:
    shared = Layer()
    assert find_blocks(nn.Sequential(shared, shared, Layer())).whole[0] is shared
    assert len(find_blocks(nn.Sequential(shared, shared, Layer())).whole) == 2


def test_a_row_of_single_layers_falls_into_pieces() -> None:
    layers = [nn.Linear(4, 4) for _ in range(10)]
    blocks = find_blocks(nn.Sequential(*layers))
    ((sequence, pieces),) = blocks.cut
    assert blocks.whole == []
    assert [len(piece) for piece in pieces] == [4, 4, 2]
    assert [layer for piece in pieces for layer in piece] == list(sequence) == layers


def test_long_rows_side_by_side_fall_into_pieces() -> None:
    """An encoder and a decoder, say."""
    model = nn.ModuleDict(
        {
            "encoder": nn.Sequential(*(nn.Linear(4, 4) for _ in range(16))),
            "decoder": nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))),
        }
    )
    blocks = find_blocks(model)
    assert blocks.whole == []
    assert {sequence: [len(piece) for piece in pieces] for sequence, pieces in blocks.cut} == {
        model["encoder"]: [4, 4, 4, 4],
        model["decoder"]: [4, 4, 4],
    }


def test_a_single_layer_is_one_block() -> None:
    model = nn.Linear(4, 4)
    assert find_blocks(model).whole == [model]


def test_a_sequence_with_a_way_of_its_own_is_not_cut() -> None:
    class Backwards(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in reversed(self):
                x = layer(x)
            return x

    model = Backwards(*(nn.Linear(4, 4) for _ in range(5)))
    assert find_blocks(model).whole == [model]


def test_what_is_inside_of_compiled_code_is_out_of_reach() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    model.compile(backend="eager")
    for outer in (model, nn.ModuleDict({"inner": model})):
        blocks = find_blocks(outer)
        assert (list(blocks.whole), list(blocks.cut)) == ([], [])
        assert blocks.compiled is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_scripted_modules_are_no_blocks() -> None:
    scripted = [torch.jit.script(Layer()) for _ in range(2)]
    assert names_of_blocks(nn.Sequential(*scripted, Layer(), Layer(), Layer())) == ["2", "3", "4"]
