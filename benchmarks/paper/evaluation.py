"""Accuracy of a classifier, mean intersection over union of a segmentation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .batches import as_tensors
from .data import Split

_AT_ONCE = 250


def refresh_statistics(model: nn.Module, split: Split, samples: int, device: torch.device) -> None:
    """Batch norm's running statistics become those of training images under the final weights.

    Running averages lag behind: after a few large steps they are mostly those of weights long gone, the
    more so the fewer updates they had, so that they would say less of a way's weights than of how often
    it updates them. Source: Wu, Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3.

    Args:
        samples: of the split, from its start, at most; the same for all ways.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        # The plain mean over what follows.
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for start in range(0, min(samples, len(split)), _AT_ONCE):
            stop = min(start + _AT_ONCE, samples, len(split))
            images, _ = as_tensors(split, slice(start, stop))
            model(images.to(device))


def confusion(
    model: nn.Module, split: Split, classes: int, samples: int, device: torch.device
) -> Tensor:
    """How many samples (pixels) of each class are taken for each: int64 [classes, classes], on the host.

    The model computes in eval mode, with running statistics, and is left in training mode.

    Args:
        samples: of the split, from its start, at most.
    """
    model.eval()
    counts = torch.zeros(classes * classes, dtype=torch.int64)
    with torch.no_grad():
        for start in range(0, min(samples, len(split)), _AT_ONCE):
            stop = min(start + _AT_ONCE, samples, len(split))
            images, targets = as_tensors(split, slice(start, stop))
            guesses = model(images.to(device)).argmax(1).cpu()
            pairs = targets.flatten() * classes + guesses.flatten()
            counts += torch.bincount(pairs, minlength=classes * classes)
    model.train()
    return counts.view(classes, classes)


def accuracy(counts: Tensor) -> float:
    """The share of samples that are taken for what they are, in percent."""
    return 100 * float(counts.diag().sum() / counts.sum())


def mean_iou(counts: Tensor) -> float:
    """Intersection over union of truth and guess, the mean over the classes that occur in either, in
    percent. Source: Everingham et al., "The Pascal Visual Object Classes Challenge", IJCV 2010, section
    4.3."""
    both = counts.diag().double()
    either = counts.sum(0) + counts.sum(1) - counts.diag()
    occurs = either > 0
    return 100 * float((both[occurs] / either[occurs]).mean())
