"""The one table of tolerances. A figure here is a bound on ||result - oracle|| / ||oracle||, the oracle
being computed in float64; each has its reason beside it.
"""

import torch

# One op on one tensor, by the dtype that is written. Rounding to nearest costs at most half a unit in
# the last place per element; sums of two roundings (product, then sum) stay under two units.
RELATIVE: dict[torch.dtype, float] = {
    torch.float64: 1e-14,  # unit roundoff 1.1e-16, times the few operations, times a margin for sums
    torch.float32: 3e-7,  # unit roundoff 6.0e-8
    torch.bfloat16: 4e-3,  # unit roundoff 3.9e-3
    torch.float16: 5e-4,  # unit roundoff 4.9e-4
}

# Sums of squares are taken in float64 over float32 values that are exact in float64; float64 inputs
# round once per product. The bound is on the relative error of the sum.
SUM_OF_SQUARES = 1e-12

# Sums over a batch norm's samples, taken in float64. The bound is on the error relative to the sum of the
# terms' magnitudes: rounding errors of thousands of additions, each 1.1e-16 at most.
BATCH_NORM_SUMS = 1e-13

# What merging means and M2 adds to the relative error of M2, for each time that the mean is larger than
# the deviation: means are rounded to float64, unit roundoff 1.1e-16, and their differences are squared.
MERGED_MEANS = 1e-15

# A batch norm in float64 against torch's own over the same samples: both round every step, and a sum over
# all samples is in every element.
BATCH_NORM = 1e-12

# A whole step against the large batch in float64: total relative error of all gradients, by the dtype
# that the model computes in (the promise in the design document).
STEP: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    # bfloat16 parameters and activations round at every layer, in the large batch as well: the bound
    # is on the distance to the float64 oracle, which the large batch itself in bfloat16 has too.
    torch.bfloat16: 5e-2,
}

# In float32 the whole batch itself is off the float64 oracle, in a net of fifty batch norms by as much as
# STEP allows: rounding errors grow with depth. A split may then be off by this many times as much: it
# rounds as often, in another order.
AS_WHOLE = 2.0

# And the whole batch's own error is no measure any more where it is above this: an activation within
# rounding error of a kink, or a defect of torch's.
WHOLE_AT_MOST = 2e-4

# Below this distance two steps are not told apart with confidence. What a test shows to be wrong (plain
# accumulation through batch norm, another seed of dropout) is off by more, whatever the dtype.
CLEARLY_WRONG = 0.05

# A parameter's gradient below this part of the norm of all gradients has nearly cancelled: its error is
# measured against this part instead, because it has the rounding errors of the terms that cancelled.
VANISHING = 1e-3

# Parameters after 20 optimizer steps: every step starts from the last one's error. Momentum passes
# it on; Adam divides small gradients by their own size, so errors of all magnitudes count fully.
TRAJECTORY: dict[torch.dtype, float] = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
}

# A gradient read off as the difference that a float32 step made to the parameters: the difference has the
# rounding errors of parameters and update, 6e-8 each, over a step that is a tenth of the parameters.
MOVED = 1e-5

# Sums over a channel, by the dtype that is read. Single products are rounded in float32 (float64 for
# float64), unit roundoff 6.0e-8, a few of them are added there, and the rest is float64. The bound is
# on the error relative to the sum of absolute terms; for a mean, relative to the deviation.
CHANNEL_SUMS: dict[torch.dtype, float] = {
    torch.float64: 1e-14,
    torch.float32: 3e-7,
    torch.bfloat16: 3e-7,
    torch.float16: 3e-7,
}

# A planned peak against the counted one, relative. On the CPU both count the same storages of the same
# operations; what is drawn on from two and three micro-batches to more is off by a layer's statistics,
# which count in the smallest models only. On CUDA workspaces of cuBLAS and cuDNN come on top, which no
# plan sees.
PLANNED_PEAK: dict[str, float] = {"cpu": 0.03, "cuda": 0.1}
