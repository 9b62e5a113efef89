"""The evaluation's networks are those of their papers, and their reduced forms train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the evaluation's networks come from Transformers")

from benchmarks.paper.amoebanet import AmoebaNetD
from benchmarks.paper.models import MODELS, SEGMENTATION, Model

every_model = pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))


def parameters_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def auxiliary_head(width: int, classes: int) -> int:
    """Parameters of the head that AmoebaNet's authors add at two thirds of the depth, at 0.4 of its width
    (``_build_aux_head``, 5 x 5 positions for images of 299 pixels): 1 x 1, 5 x 5, linear."""
    inputs, narrow, wide = 4 * 2 * width, int(0.4 * 128), int(0.4 * 768)
    convolutions = inputs * narrow + 25 * narrow * wide
    return convolutions + 2 * (narrow + wide) + (wide + 1) * classes


@every_model
def test_full_form_has_the_published_number_of_parameters(model: Model) -> None:
    with torch.device("meta"):
        network = model.make(2 if model.task == SEGMENTATION else 1000, 224, reduced=False)
    counted = parameters_of(network)
    if model.name == "AmoebaNet-D":
        counted += auxiliary_head(208, 1000)
    assert round(counted / 1e6, model.decimals) == model.parameters


@pytest.mark.parametrize(
    ("cells", "width", "millions"), [(18, 208, 82), (18, 416, 318), (36, 544, 1054)]
)
def test_amoebanet_has_the_sizes_of_gpipe_table_1(cells: int, width: int, millions: int) -> None:
    """82 and 318 million, and 1.05 billion."""
    with torch.device("meta"):
        network = AmoebaNetD(cells, width)
    assert round((parameters_of(network) + auxiliary_head(width, 1000)) / 1e6) == millions


def test_amoebanet_has_its_cells_and_halves_five_times() -> None:
    network = AmoebaNetD(6, 32, stem=8, classes=10)
    sizes: list[tuple[int, int]] = []
    for cell in network.cells:
        cell.register_forward_hook(lambda _, __, y: sizes.append((y.shape[1], y.shape[2])))
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    assert sizes == [
        *((24, 16), (48, 8)),
        *((128, 8), (128, 8)),
        *((192, 4), (256, 4), (256, 4)),
        *((384, 2), (512, 2), (512, 2)),
    ]


def test_amoebanet_sees_every_row_and_column() -> None:
    """Also where heights are odd: nothing is cut off at the borders."""
    torch.manual_seed(0)
    network = AmoebaNetD(3, 16, classes=2, stem=4).eval()
    images = torch.randn(1, 3, 28, 28, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(images)[0, 0], images)
    seen = (gradient[0] != 0).any(0)
    assert seen.any(0).all()
    assert seen.any(1).all()


@pytest.mark.parametrize(("cells", "width"), [(4, 32), (0, 32), (3, 24), (3, 0)])
def test_amoebanet_refuses_sizes_it_cannot_have(cells: int, width: int) -> None:
    with pytest.raises(ValueError, match="expected a multiple of"):
        AmoebaNetD(cells, width)


def test_unet_has_the_23_convolutions_of_its_paper() -> None:
    with torch.device("meta"):
        network = MODELS["U-Net"].make(2, 64, reduced=False)
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    assert sum(isinstance(module, kinds) for module in network.modules()) == 23


@every_model
def test_reduced_form_learns_a_few_images_by_heart(model: Model) -> None:
    torch.manual_seed(0)
    network = model.make(3, 32, reduced=True)
    assert parameters_of(network) < 1e6
    images = torch.randint(0, 256, (6, 1, 32, 32), dtype=torch.uint8)
    targets = torch.arange(6) % 3
    if model.task == SEGMENTATION:
        targets = (images[:, 0] // 86).long()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(network(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_pixels_become_what_the_parameters_are() -> None:
    network = MODELS["U-Net"].make(2, 32, reduced=True).double()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert network(images).dtype == torch.float64
