"""The CUDA library without a GPU: its argument checks, its tables, its choice of kernels and the kernels,
compiled for the host and called through torch's dispatcher on CPU tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cuda_source
import pytest
import torch
from torch import Tensor

pytest.register_assert_rewrite("cuda_parity", "batch_norm_parity", "dropout_parity")

from batch_norm_parity import BatchNormParity  # noqa: E402
from cuda_parity import CudaParity  # noqa: E402
from dropout_parity import DropoutParity  # noqa: E402

import sbp_fast.ops  # noqa: E402, F401  (defines the ops that the library implements)


@pytest.fixture(scope="module", autouse=True)
def _emulated(tmp_path_factory: pytest.TempPathFactory) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here: tests/gpu runs the real library instead")
    folder = tmp_path_factory.mktemp("emulated")
    objects = [folder / f"{source.stem}.o" for source in cuda_source.SOURCES]
    flags = ["-O0", "-fPIC", "-fvisibility=hidden", "-c"]
    cuda_source.run_all(
        [
            cuda_source.for_host(source, target, flags)
            for source, target in zip(cuda_source.SOURCES, objects, strict=True)
        ]
    )
    library: Path = folder / "libsbp_fast_cuda_emulated.so"
    cuda_source.run_all([cuda_source.library_of(objects, library)])
    torch.ops.load_library(str(library))


def call_emulated(name: str, *arguments: Any) -> Any:
    # CPU tensors would go to the CPU kernels: this asks for what is registered for CUDA.
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return getattr(torch.ops.sbp_fast, name).default.redispatch(keys, *arguments)


class TestEmulated(CudaParity):
    device = "cpu"

    def call(self, name: str, *arguments: Any) -> None:
        call_emulated(name, *arguments)


class TestBatchNormEmulated(BatchNormParity):
    device = "cpu"

    def call(self, name: str, *arguments: Any) -> Tensor:
        result: Tensor = call_emulated(name, *arguments)
        return result


class TestEmulatedDropout(DropoutParity):
    device = "cpu"

    def call(self, input: torch.Tensor, *arguments: Any) -> torch.Tensor:
        result: torch.Tensor = call_emulated("dropout", input, *arguments)
        return result
