"""The paper's evaluation, tables 2 to 5, on the models and the data that it names: ``python -m
benchmarks.paper``."""
