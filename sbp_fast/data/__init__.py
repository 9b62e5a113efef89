"""Data sets: rows by index, and real images for the demo and the tests, without a network."""

from .fashion_mnist import FashionMnist, load_fashion_mnist
from .rows import Rows

__all__ = ["FashionMnist", "Rows", "load_fashion_mnist"]
