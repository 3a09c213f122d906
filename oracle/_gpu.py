"""The GPU that is in use, asked without torch and without starting a context on it: its name, and its memory by NVML.

CUDA's driver says which device is the first that this process may see; NVML, where nvidia-ml-py is installed, says how
much of that device's memory is taken, by whatever process.
"""

import ctypes
import functools
import os
import threading
import time
import uuid
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any, Self

from .corpus import DataError

SAMPLE_S = 0.1  # between two readings; allocators keep what they had reserved, so little passes between them
BACK_S = 10.0  # for the memory of processes that have ended to be free again
BACK_MB = 256  # of it that may be missing: other processes come and go too


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device, or one MIG slice of it."""

    name: str
    uuid: str


@functools.cache
def selected() -> Gpu | None:
    """Return the first device that CUDA lets this process see; None where there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        device, name, identity = ctypes.c_int(), ctypes.create_string_buffer(256), (ctypes.c_ubyte * 16)()
        failed = (
            cuda.cuInit(0)
            or cuda.cuDeviceGet(ctypes.byref(device), 0)
            or cuda.cuDeviceGetName(name, len(name), device)
            or cuda.cuDeviceGetUuid_v2(identity, device)  # of the slice, under MIG
        )
    except (OSError, AttributeError):
        return None
    return None if failed else Gpu(name=name.value.decode(errors="replace"), uuid=str(uuid.UUID(bytes=bytes(identity))))


def stated_peak() -> float | None:
    """Return AUTORESEARCH_PEAK_TFLOPS, a GPU's dense bf16 peak by its user's word; DataError for no such number."""
    given = os.environ.get("AUTORESEARCH_PEAK_TFLOPS", "")
    try:
        peak = float(given) if given else None
    except ValueError:
        peak = 0.0
    if peak is not None and not 0 < peak < float("inf"):
        raise DataError(f"AUTORESEARCH_PEAK_TFLOPS is {given!r}: give the device's dense bf16 TFLOP/s, or unset it")
    return peak


class Memory:
    """The selected device's memory from now on: what is taken, what was taken at most, all in MiB.

    Inside `with` a thread of its own reads it, until `stop`. Without a GPU or NVML every figure is None.
    """

    def __init__(self) -> None:
        self._nvml, self._handle = _nvml(selected())
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._before = self._highest = self.used_mb()
        self._thread = threading.Thread(target=self._watch, name="gpu-memory", daemon=True)

    def __enter__(self) -> Self:
        if self._before is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def used_mb(self) -> float | None:
        """Return what all processes together have taken now."""
        if self._handle is None:
            return None
        for version in (self._nvml.nvmlMemory_v2, None):  # the first one leaves out what the driver keeps for itself
            try:
                return float(self._nvml.nvmlDeviceGetMemoryInfo(self._handle, version=version).used) / 2**20
            except self._nvml.NVMLError:
                pass
        return None

    def stop(self) -> None:
        """Read once more, and then no more."""
        if self._before is not None and not self._stopped.is_set():
            self._stopped.set()
            self._thread.join()
            self._read()

    @property
    def peak_mb(self) -> float | None:
        """The most that was taken until `stop`, less what was taken before."""
        with self._lock:
            if self._before is None or self._highest is None:
                return None
            return max(self._highest - self._before, 0.0)

    def missing_mb(self, limit_s: float = BACK_S) -> float:
        """Wait until what was taken since is free again, for `limit_s` at most; return how much is not, else 0."""
        if self._before is None:
            return 0.0
        missing = self.settled_mb(self._before + BACK_MB, limit_s) - self._before
        return missing if missing > BACK_MB else 0.0

    def settled_mb(self, enough_mb: float, limit_s: float = BACK_S) -> float:
        """Wait until no more than `enough_mb` is taken, for `limit_s` at most; return what is taken, 0 if unknown."""
        deadline = time.monotonic() + limit_s
        while (used := self.used_mb() or 0.0) > enough_mb and time.monotonic() < deadline:
            time.sleep(SAMPLE_S / 2)
        return used

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            self._read()

    def _read(self) -> None:
        used = self.used_mb()
        with self._lock:
            if used is not None and self._highest is not None:
                self._highest = max(self._highest, used)


def _nvml(gpu: Gpu | None) -> tuple[Any, Any]:
    """Return NVML's module and its handle of a device; two None where there is no such thing."""
    if gpu is None:
        return None, None
    try:
        pynvml: Any = import_module("pynvml")
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, None
    for kind in ("GPU", "MIG"):
        try:
            return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{gpu.uuid}")
        except pynvml.NVMLError:
            pass
    return None, None
