"""Data sets of the evaluation, from files on disk; one file per format."""

from .dataset import DamagedFileError, Dataset, MissingDataError, Split
from .registry import CLASSIFICATION, SEGMENTATION, load

__all__ = [
    "CLASSIFICATION",
    "SEGMENTATION",
    "DamagedFileError",
    "Dataset",
    "MissingDataError",
    "Split",
    "load",
]
