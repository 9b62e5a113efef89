"""Measures the kernels and the step against their peers: the command ``sbp-fast bench``.

``timing`` takes times, ``case`` turns them into rows, ``kernels`` and ``step`` say what is measured,
``rows`` is the one format of the results.
"""
