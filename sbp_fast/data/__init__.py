"""Real images for the demo and the tests, without a network."""

from .fashion_mnist import FashionMnist, load_fashion_mnist

__all__ = ["FashionMnist", "load_fashion_mnist"]
