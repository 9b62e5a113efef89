"""The Triton ops on CPU tensors, interpreted, and what surrounds the kernels on any machine."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("triton_parity")

from triton_parity import CHUNK, TritonParity, scale_accumulate_  # noqa: E402

from sbp_fast.ops import chunk_table, triton_backend  # noqa: E402

usable, _why = triton_backend.is_available()
interpreting = usable and triton_backend._import_kernels().INTERPRETED.value


@pytest.mark.skipif(
    not interpreting,
    reason="Triton interprets only with TRITON_INTERPRET=1; on a CUDA device tests/gpu runs these",
)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, on infinities
class TestInterpreted(TritonParity):
    device = "cpu"
    many = 200  # 7 ms each; the chunk table is tested with 2,000 below


class TestWhereTritonCannotBeUsed:
    """Every refusal names the cure. The kernels are replaced, so that any machine can play any."""

    def refused(self, match: str, device: str = "cpu") -> None:
        tensor = torch.ones(3, device=device)
        with pytest.raises(RuntimeError, match=match):
            scale_accumulate_([tensor], [tensor.clone()], 1.0)

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise ImportError("No module named 'triton'")

        monkeypatch.setattr(triton_backend, "_import_kernels", fail)
        assert triton_backend.is_available()[0] is False
        assert "pip install triton" in triton_backend.is_available()[1]
        self.refused("pip install triton, or choose another backend")

    def test_compiled_kernels_cannot_take_cpu_tensors(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kernels = SimpleNamespace(
            INTERPRETED=SimpleNamespace(value=False), triton=SimpleNamespace(__version__="3")
        )
        monkeypatch.setattr(triton_backend, "_import_kernels", lambda: kernels)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
        usable, reason = triton_backend.is_available()
        assert not usable
        assert "set TRITON_INTERPRET=1" in reason
        self.refused("set TRITON_INTERPRET=1 before Python starts")

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("Failed to find C compiler."),
            subprocess.CalledProcessError(1, ["gcc", "driver.c"]),  # no Python.h
            None,
        ],
        ids=["no_compiler", "no_headers", "nothing_missing"],
    )
    def test_a_driver_that_cannot_be_built(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception | None
    ) -> None:
        class Driver:
            @property
            def active(self) -> SimpleNamespace:
                if error is not None:
                    raise error
                return SimpleNamespace(get_current_target=lambda: None)

        kernels = SimpleNamespace(
            INTERPRETED=SimpleNamespace(value=False),
            triton=SimpleNamespace(__version__="3", runtime=SimpleNamespace(driver=Driver())),
        )
        monkeypatch.setattr(triton_backend, "_import_kernels", lambda: kernels)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        usable, reason = triton_backend.is_available()
        assert usable == (error is None)
        if error is not None:
            assert str(error) in reason
            assert "install a C compiler and Python's headers" in reason

    def test_interpreted_kernels_cannot_take_device_tensors(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kernels = SimpleNamespace(INTERPRETED=SimpleNamespace(value=True))
        monkeypatch.setattr(triton_backend, "_import_kernels", lambda: kernels)
        with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1 is set .* unset it"):
            triton_backend._kernels_for("op", torch.device("cuda"))


class TestChunkTable:
    """Pure functions: no tensor is allocated, so sizes are no limit."""

    @staticmethod
    def plan(
        pairs: list[tuple[int, int, int, int]], itemsizes: list[list[int]]
    ) -> tuple[np.ndarray, list[chunk_table.Group]]:
        written, read, numels, kinds = np.array(pairs, np.int64).T
        return chunk_table.plan(written, read, numels, kinds, np.array(itemsizes), 0.1)

    @pytest.mark.parametrize("numel", [2**31 - 1, 2**31 + 5, 2**33 + CHUNK])
    def test_beyond_two_to_the_31_elements(self, numel: int) -> None:
        base = 2**46
        rows, groups = self.plan([(base, 3 * base, numel, 0)], [[8, 2]])
        assert rows[:, 2].sum() == numel
        assert rows[:, 2].min() > 0
        # Chunk follows on chunk, without gap or overlap, on both sides.
        begin = np.concatenate([[0], rows[:, 2].cumsum()[:-1]])
        assert (rows[:, 0] == base + begin * 8).all()
        assert (rows[:, 1] == 3 * base + begin * 2).all()
        assert groups == [chunk_table.Group(0, True, 0, len(rows))]

    def test_one_group_per_kind_and_alignment_in_the_order_of_the_list(self) -> None:
        rows, groups = self.plan(
            [(64, 640, 3, 1), (128, 1280, 0, 0), (4, 192, 5, 1), (256, 512, CHUNK + 1, 1)],
            [[4, 4], [4, 2]],
        )
        assert groups == [
            chunk_table.Group(1, False, 0, 1),
            chunk_table.Group(1, True, 1, 3),
        ]
        assert rows[:, :3].tolist() == [
            [4, 192, 5],
            [64, 640, 3],
            [256, 512, CHUNK],
            [256 + 4 * CHUNK, 512 + 2 * CHUNK, 1],
        ]
        assert (rows[:, 3].copy().view(np.float64) == 0.1).all()

    def test_two_thousand_pairs(self) -> None:
        pairs = [(1024 * index, 2**40 + 512 * index, index % 7, index % 3) for index in range(2000)]
        rows, groups = self.plan(pairs, [[4, 2], [4, 4], [8, 2]])
        assert len(rows) == sum(numel > 0 for _, _, numel, _ in pairs)
        for group in groups:
            expected = [pair[:3] for pair in pairs if pair[3] == group.kind and pair[2]]
            listed = rows[group.first : group.first + group.chunks, :3]
            assert listed.tolist() == [list(pair) for pair in expected]
        assert [group.kind for group in groups] == [0, 1, 2]

    def test_nothing(self) -> None:
        rows, groups = self.plan([(0, 0, 0, 0), (64, 64, 0, 0)], [[4, 4]])
        assert rows.shape == (0, 4)
        assert groups == []

    def test_addresses_in_the_upper_half(self) -> None:
        high = -(2**40)  # 0xffffff0000000000, as a signed integer
        rows, _ = self.plan([(high, high, CHUNK + 1, 0)], [[4, 2]])
        assert rows[:, 0].view(np.uint64).tolist() == [2**64 - 2**40, 2**64 - 2**40 + 4 * CHUNK]
