"""Memory that the judge owns and a scorer writes into: on the device, pinned, or plainly shared.

Device memory is CUDA's virtual memory: the judge makes an allocation and exports it as a file descriptor, the scorer
imports that; both map it and see it as a tensor. A descriptor goes through every sandbox. The older CUDA IPC handles do
not: the driver takes them to the other process over an abstract Unix socket, and looks for it by its process id.

| kind | what it is |
|---|---|
| cuda | device memory |
| pinned | anonymous host memory that the device reads and writes itself; needs no cuda-bindings |
| shared | anonymous host memory |

A `Buffer` releases all that it holds when it is closed, and at once where its making fails half way.
"""

import math
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._wire import shared_array, shared_memory

Shape = tuple[int, ...]


class Unsupported(Exception):
    """This kind of memory cannot be shared here."""


def kinds(device: torch.device) -> tuple[str, ...]:
    """Return the kinds of memory to try for logits of a model on `device`, the best first."""
    return ("cuda", "pinned", "shared") if device.type == "cuda" else ("shared",)


class Buffer:
    """A float32 tensor in memory of one `kind`, and the descriptor by which another process gets the same memory.

    Without `fd` it is new memory; with one it is the other side's, and the descriptor is the buffer's from then on.
    Raises Unsupported, and torch.OutOfMemoryError where the device has no room.
    """

    def __init__(self, kind: str, shape: Shape, fd: int = -1) -> None:
        self.kind = kind
        with ExitStack() as stack:
            if fd >= 0:
                stack.callback(os.close, fd)
            make = _device_memory if kind == "cuda" else _host_memory
            self.fd, self.tensor = make(stack, shape, fd)
            if kind == "pinned":
                _pin(stack, self.tensor)
            self._held = stack.pop_all()

    def close(self) -> None:
        """Give everything back; the tensor and every view of it must not be used again."""
        if self.kind != "shared":
            torch.cuda.synchronize()
        self._held.close()
        self.tensor = torch.empty(0)  # last: host memory lives as long as a tensor that names it


def _host_memory(stack: ExitStack, shape: Shape, fd: int) -> tuple[int, Tensor]:
    if fd < 0:
        fd = shared_memory(math.prod(shape) * 4)
        stack.callback(os.close, fd)
    return fd, torch.from_numpy(shared_array(fd, shape, np.float32))


def _pin(stack: ExitStack, tensor: Tensor) -> None:
    """Let the device read and write host memory by itself, without a copy of the driver's in between."""
    try:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        failed = int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
    except (RuntimeError, AttributeError, AssertionError) as error:  # no CUDA at all
        raise Unsupported(f"host memory cannot be pinned: {error}") from error
    if failed:
        with suppress(RuntimeError):  # the runtime remembers the failure, and would blame the next kernel for it
            torch.zeros(1, device="cuda")
        raise Unsupported(f"host memory cannot be pinned: CUDA error {failed}")
    stack.callback(runtime.cudaHostUnregister, tensor.data_ptr())


def _device_memory(stack: ExitStack, shape: Shape, fd: int) -> tuple[int, Tensor]:
    """Make or import an allocation and map it; what undoes it, in reverse order, goes onto the stack."""
    driver = _driver()
    call = _caller(driver)
    device = torch.cuda.current_device()
    torch.cuda.synchronize()  # starts the device's context, which a mapping needs
    for name in ("VIRTUAL_MEMORY_MANAGEMENT", "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR"):
        attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}_SUPPORTED")
        if not call("cuDeviceGetAttribute", attribute, device):
            raise Unsupported(f"the device has no {name}")
    place = driver.CUmemAllocationProp()
    place.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    place.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    place.location.id = device
    by_descriptor = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    place.requestedHandleTypes = by_descriptor
    least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    unit = call("cuMemGetAllocationGranularity", place, least)
    size = -(-math.prod(shape) * 4 // unit) * unit
    new = fd < 0
    if new:
        memory = call("cuMemCreate", size, place, 0)
        stack.callback(call, "cuMemRelease", memory)
        fd = int(call("cuMemExportToShareableHandle", memory, by_descriptor, 0))
        stack.callback(os.close, fd)
    else:
        memory = call("cuMemImportFromShareableHandle", fd, by_descriptor)
        stack.callback(call, "cuMemRelease", memory)
    address = call("cuMemAddressReserve", size, 0, 0, 0)
    stack.callback(call, "cuMemAddressFree", address, size)
    call("cuMemMap", address, size, 0, memory, 0)
    stack.callback(call, "cuMemUnmap", address, size)
    access = driver.CUmemAccessDesc()
    access.location = place.location
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    call("cuMemSetAccess", address, size, [access], 1)
    if new:  # what an earlier scorer wrote there must not reach the next one; nothing promises that memory comes empty
        call("cuMemsetD8", address, 0, size)
        torch.cuda.synchronize()
    return fd, _tensor(int(address), shape, device)


def _driver() -> Any:
    """Import CUDA's driver API, which PyTorch's builds for CUDA bring along from 2.10 on."""
    try:
        return import_module("cuda.bindings.driver")
    except ImportError as error:
        raise Unsupported(f"no cuda-bindings: {error}") from error


def _caller(driver: Any) -> Callable[..., Any]:
    """Return what calls the driver by name and raises for each failure."""

    def call(name: str, *given: Any) -> Any:
        try:
            status, *values = getattr(driver, name)(*given)
        except (RuntimeError, AttributeError) as error:  # an older driver lacks the function
            raise Unsupported(f"{name}: {error}") from error
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"{name}: CUDA out of memory")
        if status != driver.CUresult.CUDA_SUCCESS:
            raise Unsupported(f"{name}: {status.name}")
        return values[0] if values else None

    return call


class _Span:
    """Device memory at an address, as numba's array interface for CUDA names it."""

    def __init__(self, address: int, shape: Shape) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "<f4",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _tensor(address: int, shape: Shape, device: int) -> Tensor:
    tensor = torch.as_tensor(_Span(address, shape), device=torch.device("cuda", device))
    assert tensor.data_ptr() == address  # a view, never a copy
    return tensor
