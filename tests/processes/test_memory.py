"""A candidate that asks for more memory than there is: a crash of kind memory with a hint, however the error arrives.

Needs no GPU: the errors are raised as CUDA, its libraries and the compilers raise them.
"""

import pytest
import torch

from oracle._candidate import _crash
from oracle._processes import DeviceError, memory_limit_gb

CUDA = "CUDA out of memory. Tried to allocate 8.00 GiB. GPU 0 has a total capacity of 7.79 GiB"
HINT = "; try a smaller DEVICE_BATCH_SIZE or model"


class BackendCompilerFailed(RuntimeError):
    """As torch._dynamo raises it: the error of the compiler is in the text alone, `from None`."""


def raised(error: Exception, wrapper: Exception | None = None, *, from_none: bool = False) -> Exception:
    try:
        try:
            raise error
        except Exception as inner:
            if wrapper is None:
                raise
            raise wrapper from (None if from_none else inner)
    except Exception as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (raised(torch.OutOfMemoryError(CUDA)), f"OutOfMemoryError: {CUDA}"),
        (raised(torch.OutOfMemoryError(CUDA), RuntimeError("while compiling")), f"OutOfMemoryError: {CUDA}"),
        (
            raised(
                torch.OutOfMemoryError(CUDA),
                BackendCompilerFailed(f"backend='inductor' raised:\nOutOfMemoryError: {CUDA}\n\nSet TORCH_LOGS"),
                from_none=True,
            ),
            f"BackendCompilerFailed: OutOfMemoryError: {CUDA}",
        ),
        (raised(RuntimeError("CUDA error: out of memory\nCUDA kernel")), "RuntimeError: CUDA error: out of memory"),
        (
            raised(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
            "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        ),
        (
            raised(RuntimeError("Triton Error [CUDA]: out of memory")),
            "RuntimeError: Triton Error [CUDA]: out of memory",
        ),
        (raised(MemoryError("numpy")), "MemoryError: numpy"),
    ],
)
def test_it_is_told_from_any_other_error(error: Exception, reason: str) -> None:
    crash = _crash(error)
    assert (crash["kind"], crash["reason"]) == ("memory", reason + HINT)


@pytest.mark.parametrize(
    "error",
    [
        raised(RuntimeError("out of resource: shared memory, Required: 264192, Hardware limit: 232448")),
        raised(ValueError("CUDA out of memory")),
        raised(torch.OutOfMemoryError(CUDA), ValueError("caught, then wrong"), from_none=True),
    ],
)
def test_another_error_is_none(error: Exception) -> None:
    assert _crash(error)["kind"] == "error"


def test_a_loop_of_causes_ends() -> None:
    error = RuntimeError("one")
    error.__cause__ = ValueError("two")
    error.__cause__.__cause__ = error
    assert _crash(error)["reason"] == "RuntimeError: one"


def test_a_limit_is_a_number_of_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTORESEARCH_MEMORY_GB", raising=False)
    assert memory_limit_gb() is None
    monkeypatch.setenv("AUTORESEARCH_MEMORY_GB", "7.5")
    assert memory_limit_gb() == 7.5
    for wrong in ("0", "-1", "nan", "inf", "8 GB"):
        monkeypatch.setenv("AUTORESEARCH_MEMORY_GB", wrong)
        with pytest.raises(DeviceError, match="AUTORESEARCH_MEMORY_GB is "):
            memory_limit_gb()
