"""Logits' way from a scorer to the judge, and what is asked of a GPU: all that can be proved without one.

CUDA's driver is a recording stand-in here; tests/gpu has the real one. Needs the `cache` fixture for two scorers.
"""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save

from oracle import _cuda, _gpu, _processes, scoring
from oracle._cuda import Buffer, Unsupported
from oracle._processes import Crash
from oracle._wire import sealed_copy, shared_memory
from oracle.constants import TINY
from oracle.corpus import DataError
from oracle.prepared import Prepared
from oracle.report import PEAK_TFLOPS, part
from oracle.scoring import Scorer
from tests.processes.judging import JUDGE, judge
from tests.processes.test_judge import HONEST

SHAPE = (2, 3, 5)
GRANULE = 2**21


class Driver:
    """CUDA's driver API as far as it is used: counts what is held, notes every call, fails where it is told to."""

    CUDA_SUCCESS, CUDA_ERROR_OUT_OF_MEMORY, OTHER = 0, 2, 999

    def __init__(self, failing: str = "", status: int = OTHER) -> None:
        self.calls: list[str] = []
        self.held: list[str] = []
        self._failing, self._status = failing, status
        self.CUresult = SimpleNamespace(CUDA_SUCCESS=0, CUDA_ERROR_OUT_OF_MEMORY=2)
        self.CUmemAllocationProp = lambda: SimpleNamespace(location=SimpleNamespace())
        self.CUmemAccessDesc = SimpleNamespace

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):  # an enumeration
            return SimpleNamespace(**{value: value for value in ENUMERATED})

        def call(*given: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name == self._failing:
                return (SimpleNamespace(name="CUDA_ERROR_OTHER") if self._status == self.OTHER else self._status, None)
            if name in GIVES_BACK:
                assert self.held.pop() == GIVES_BACK[name]  # the newest first
            if name in GIVES_BACK.values():
                self.held.append(name)
            match name:
                case "cuMemExportToShareableHandle":
                    return 0, shared_memory(4)
                case "cuMemGetAllocationGranularity":
                    return 0, GRANULE
                case "cuMemCreate" | "cuMemAddressReserve":
                    assert given[0] == GRANULE  # rounded up
            return 0, 1

        return call


GIVES_BACK = {"cuMemRelease": "cuMemCreate", "cuMemAddressFree": "cuMemAddressReserve", "cuMemUnmap": "cuMemMap"}
ENUMERATED = (
    "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED",
    "CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED",
    "CU_MEM_ALLOCATION_TYPE_PINNED",
    "CU_MEM_LOCATION_TYPE_DEVICE",
    "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR",
    "CU_MEM_ALLOC_GRANULARITY_MINIMUM",
    "CU_MEM_ACCESS_FLAGS_PROT_READWRITE",
)
MAKING = (
    "cuDeviceGetAttribute",
    "cuMemGetAllocationGranularity",
    "cuMemCreate",
    "cuMemExportToShareableHandle",
    "cuMemAddressReserve",
    "cuMemMap",
    "cuMemSetAccess",
    "cuMemsetD8",
)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Put a driver in the place of CUDA's; check that no descriptor is left open."""
    before = len(os.listdir("/proc/self/fd"))

    def install(driver: Driver) -> Driver:
        monkeypatch.setattr(_cuda, "_driver", lambda: driver)
        return driver

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(_cuda, "_tensor", lambda address, shape, device: torch.zeros(shape))
    yield install
    assert len(os.listdir("/proc/self/fd")) == before


def test_device_memory_is_made_mapped_and_given_back_in_reverse(use: Any) -> None:
    driver = use(Driver())
    with closing(Buffer("cuda", SHAPE)) as buffer:
        assert driver.held == ["cuMemCreate", "cuMemAddressReserve", "cuMemMap"]
        assert buffer.tensor.shape == SHAPE and os.fstat(buffer.fd)
    assert "cuMemsetD8" in driver.calls  # an earlier scorer's words must not reach the next
    assert driver.held == [] and driver.calls[-3:] == ["cuMemUnmap", "cuMemAddressFree", "cuMemRelease"]
    buffer.close()  # once more is no harm
    assert driver.held == []


@pytest.mark.parametrize("failing", MAKING)
@pytest.mark.parametrize("status", [Driver.OTHER, Driver.CUDA_ERROR_OUT_OF_MEMORY])
def test_whatever_fails_nothing_is_left(use: Any, failing: str, status: int) -> None:
    driver = use(Driver(failing, status))
    expected = Unsupported if status == Driver.OTHER else torch.OutOfMemoryError
    with pytest.raises(expected, match=failing):
        Buffer("cuda", SHAPE)
    assert driver.held == []


def test_the_other_side_imports_what_it_is_handed_and_closes_it(use: Any) -> None:
    driver = use(Driver())
    driver.held.append("cuMemCreate")  # an import counts as a reference to the same memory
    Buffer("cuda", SHAPE, shared_memory(4)).close()
    assert not {"cuMemCreate", "cuMemsetD8"} & set(driver.calls) and "cuMemImportFromShareableHandle" in driver.calls
    assert driver.held == []
    use(Driver("cuMemImportFromShareableHandle"))
    with pytest.raises(Unsupported):
        Buffer("cuda", SHAPE, shared_memory(4))


def test_host_memory_is_the_same_on_both_sides(use: Any) -> None:
    with closing(Buffer("shared", SHAPE)) as mine, closing(Buffer("shared", SHAPE, os.dup(mine.fd))) as theirs:
        theirs.tensor.fill_(7.0)
        assert mine.tensor.eq(7.0).all()


# --- a scorer that can use only some of it ---------------------------------------------------------------------------


def test_a_kind_that_fails_on_either_side_is_followed_by_the_next(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """cuda fails here, where there is no driver; pinned fails in the scorer. What is scored is the same."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(cache))
    monkeypatch.setattr(scoring, "kinds", lambda device: ("cuda", "pinned", "shared"))
    monkeypatch.setattr(_cuda, "_pin", lambda stack, tensor: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    (tmp_path / "train.py").write_text(HONEST)
    table = torch.randn(1024, 1024)
    weights = sealed_copy(save({"table": table}))
    prepared = Prepared.open(TINY)
    rows = prepared.val_rows()[:70]
    with Scorer(prepared, candidate=tmp_path, scratch=tmp_path, seed=0) as scorer:
        scorer.load(weights)
        assert scorer.share() == "shared"
        seen = 0
        for which, logits in scorer.logits(rows):  # more batches than slots, the last one not full
            assert torch.equal(logits, table[torch.from_numpy(rows[which, :-1].astype(np.int64))])
            seen += len(logits)
    assert seen == 70
    os.close(weights)
    said = capfd.readouterr()
    assert "no cuda memory for logits" in said.out and "cannot write logits to pinned memory" in said.out


def test_who_is_held_stands_still_and_goes_on(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a scorer has started stands still too; ended while it is held, it is gone at once."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(cache))
    spinning = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
    (tmp_path / "train.py").write_text(spinning + HONEST)
    weights = sealed_copy(save({"table": torch.randn(1024, 1024)}))
    prepared = Prepared.open(TINY)

    def states() -> set[str]:
        return {process.status() for process in psutil.Process().children(recursive=True)}

    for _ in range(2):
        with Scorer(prepared, candidate=tmp_path, scratch=tmp_path, seed=0) as scorer:
            scorer.hold(weights)
            assert states() == {psutil.STATUS_STOPPED}
            monkeypatch.setattr(_processes, "GOODBYE_S", 10_000.0)  # who waits for what stands still is timed out
        assert not states()
        monkeypatch.undo()
        monkeypatch.setenv("AUTORESEARCH_CACHE", str(cache))
        with Scorer(prepared, candidate=tmp_path, scratch=tmp_path, seed=0) as scorer:
            scorer.hold(weights)
            scorer.load(weights)
            assert psutil.STATUS_STOPPED not in states()
            scorer.share()
            assert sum(len(logits) for _, logits in scorer.logits(prepared.val_rows()[:20])) == 20
    os.close(weights)


def test_no_memory_for_the_judge_is_a_crash_with_a_hint(tmp_path: Path, cache: Path) -> None:
    code = f"""
import torch
from oracle import _gpu, scoring
def none(*given): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")
scoring.Buffer = none
{JUDGE}
"""
    result = judge(tmp_path, cache, HONEST, code=code).result
    assert (result["status"], result["kind"]) == ("crash", "memory"), result
    assert result["reason"].startswith("no device memory left to judge in: CUDA out of memory.")
    assert result["reason"].endswith("try a smaller model")


def test_a_scorer_without_memory_is_a_crash_with_a_hint(tmp_path: Path, cache: Path) -> None:
    """Which the error's own text, of more than 600 characters in torch, does not push out of the reason."""
    source = HONEST.replace(
        "return self.table[tokens]",
        "if 'oracle.scorer' in open('/proc/self/cmdline').read():\n"
        "            raise torch.OutOfMemoryError('CUDA out of memory. ' + 30 * 'Tried to allocate 9 GiB. ')\n"
        "        return self.table[tokens]",
    )
    result = judge(tmp_path, cache, source).result
    assert (result["status"], result["kind"]) == ("crash", "memory"), result
    assert result["reason"].startswith("while scoring: OutOfMemoryError: CUDA out of memory.")
    assert result["reason"].endswith("; try a smaller DEVICE_BATCH_SIZE or model"), result["reason"]


# --- what a GPU is asked ---------------------------------------------------------------------------------------------


class Nvml:
    class NVMLError(Exception):
        pass

    nvmlMemory_v2 = 2

    def __init__(self, old: bool = False) -> None:
        self.used_mb, self.old = 700.0, old
        self.later: list[float] = []  # what the next readings change it to

    def nvmlDeviceGetMemoryInfo(self, handle: object, version: int | None) -> SimpleNamespace:
        if version is not None and self.old:
            raise self.NVMLError
        if self.later:
            self.used_mb = self.later.pop(0)
        return SimpleNamespace(used=int(self.used_mb * 2**20))


@pytest.mark.parametrize("old", [False, True])
def test_the_peak_is_what_came_on_top_and_memory_is_waited_for(monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    nvml = Nvml(old)
    monkeypatch.setattr(_gpu, "_nvml", lambda gpu: (nvml, object()))
    monkeypatch.setattr(_gpu, "SAMPLE_S", 0.01)
    with _gpu.Memory() as memory:
        nvml.used_mb = 5_700.0
        while memory.peak_mb != 5_000.0:
            pass
        nvml.used_mb = 2_700.0
        memory.stop()
        assert memory.peak_mb == 5_000.0
        assert memory.missing_mb(0.05) == 2_000.0
        nvml.later = [2_700.0, 2_700.0, 800.0]
        assert memory.missing_mb(30.0) == 0.0
        assert not nvml.later
        assert memory.peak_mb == 5_000.0


def test_without_nvml_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu, "_nvml", lambda gpu: (None, None))
    with _gpu.Memory() as memory:
        assert memory.used_mb() is None and memory.peak_mb is None and memory.missing_mb() == 0.0


@pytest.mark.parametrize(
    ("name", "peak"),
    {
        "NVIDIA H200": 989.5,
        "NVIDIA H200 NVL": 835.5,
        "NVIDIA H100 80GB HBM3": 989.5,
        "NVIDIA H100 PCIe": 756.5,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "NVIDIA GH200 480GB": 989.5,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA A100-PCIE-40GB": 312.0,
        "NVIDIA A10": 125.0,
        "NVIDIA A10G": None,
        "NVIDIA L40S": 362.05,
        "NVIDIA L4": 121.0,
        "NVIDIA GeForce RTX 4090": 165.2,
        "NVIDIA GeForce RTX 4090 D": None,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA H20": None,
        "Tesla T4": None,
    }.items(),
)
def test_a_peak_is_that_of_the_very_part(name: str, peak: float | None) -> None:
    assert PEAK_TFLOPS.get(part(name)) == peak


def test_the_users_word_on_the_peak_counts_and_must_be_a_number(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTORESEARCH_PEAK_TFLOPS", "419.5")
    assert _gpu.stated_peak() == 419.5
    for bad in ("fast", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("AUTORESEARCH_PEAK_TFLOPS", bad)
        with pytest.raises(DataError, match=f"AUTORESEARCH_PEAK_TFLOPS is '{bad}'"):
            _gpu.stated_peak()
    result = judge(tmp_path, cache, op="check").result
    assert result["status"] == "unusable" and "AUTORESEARCH_PEAK_TFLOPS is 'inf'" in result["reason"]


def test_a_crash_is_blamed_on_others_only_where_they_hold_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from oracle import judge as judging
    from oracle import run

    monkeypatch.setattr(run, "pick_device", lambda: torch.device("cuda"))
    nvml = Nvml()
    monkeypatch.setattr(_gpu, "_nvml", lambda gpu: (nvml, object()))
    short = Crash("memory", "OutOfMemoryError: CUDA out of memory.", "trace")
    assert judging.blamed(short) is short
    nvml.used_mb = 30_000.0
    monkeypatch.setattr(_gpu.Memory.settled_mb, "__defaults__", (0.05,))
    busy = judging.blamed(short)
    assert (busy.kind, busy.detail) == ("busy", "trace")
    assert str(busy).startswith("30000 MB of the device's memory are used by other processes: OutOfMemoryError")
    other = Crash("error", "no")
    assert judging.blamed(other) is other


def test_a_small_device_shares_one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GiB each, as on climbmix; CPU memory is never the narrow place."""
    monkeypatch.delenv("AUTORESEARCH_MEMORY_GB", raising=False)
    for total, slots in ((141, 2), (24, 2), (16, 2), (12, 1), (8, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda total=total: (0, total * 2**30))
        assert scoring._slots(torch.device("cuda"), 2**30) == slots
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 141 * 2**30))
    monkeypatch.setenv("AUTORESEARCH_MEMORY_GB", "8")
    assert scoring._slots(torch.device("cuda"), 2**30) == 1
    assert scoring._slots(torch.device("cpu"), 2**40) == 2


def test_two_models_start_at_once_only_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GiB of logits a pass, as on climbmix."""
    monkeypatch.delenv("AUTORESEARCH_MEMORY_GB", raising=False)
    assert not scoring._room(torch.device("cpu"), 1)
    for free, total, room in ((140, 141, True), (40, 141, True), (30, 141, False), (23, 24, False), (7, 8, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free, total=total: (free * 2**30, total * 2**30))
        assert scoring._room(torch.device("cuda"), 2**30) is room
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (140 * 2**30, 141 * 2**30))
    monkeypatch.setenv("AUTORESEARCH_MEMORY_GB", "24")
    assert not scoring._room(torch.device("cuda"), 2**30)
