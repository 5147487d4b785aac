"""The driver's calls, against a library that stands in for libcuda and reads what it is given as the driver would."""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import Any

import pytest
import torch

from ldmrt.kernels import cuda_driver
from ldmrt.kernels.cuda_driver import CudaError, Driver, Kernel

CONTEXT, MODULE, FUNCTION = 11, 22, 33


class FakeCuda:
    """Notes its calls. `parameters` are the sizes that the loaded kernel declares."""

    def __init__(self, parameters: tuple[int, ...] = ()) -> None:
        self.parameters = parameters
        self.calls: list[str] = []
        self.failing: dict[str, int] = {}
        self.context = CONTEXT
        self.attributes: dict[int, int] = {}
        self.launches: list[tuple[tuple[Any, ...], list[bytes]]] = []

    def _note(self, name: str) -> int:
        self.calls.append(name)
        return self.failing.get(name, 0)

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self._note("cuInit")

    def cuGetErrorString(self, status: int, text: Any) -> int:  # noqa: N802
        text._obj.value = {201: b"invalid device context"}.get(status)
        return 0

    def cuCtxGetCurrent(self, context: Any) -> int:  # noqa: N802
        context._obj.value = self.context
        return self._note("cuCtxGetCurrent")

    def cuCtxSetCurrent(self, context: Any) -> int:  # noqa: N802
        self.context = context.value
        return self._note("cuCtxSetCurrent")

    def cuDeviceGet(self, number: Any, ordinal: int) -> int:  # noqa: N802
        number._obj.value = 100 + ordinal
        return self._note("cuDeviceGet")

    def cuDevicePrimaryCtxRetain(self, context: Any, number: Any) -> int:  # noqa: N802
        context._obj.value = 1000 + number.value
        return self._note("cuDevicePrimaryCtxRetain")

    def cuModuleLoadData(self, module: Any, code: bytes) -> int:  # noqa: N802
        assert code == b"code"
        module._obj.value = MODULE
        return self._note("cuModuleLoadData")

    def cuModuleGetFunction(self, function: Any, module: Any, symbol: bytes) -> int:  # noqa: N802
        assert (module.value, symbol) == (MODULE, b"step")
        function._obj.value = FUNCTION
        return self._note("cuModuleGetFunction")

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:  # noqa: N802
        assert function.value == FUNCTION
        self.attributes[attribute] = value
        return self._note("cuFuncSetAttribute")

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:  # noqa: N802
        *numbers, pointers, extra = rest
        assert function.value == FUNCTION
        assert extra is None
        assert len(pointers) == len(self.parameters)
        read = [ctypes.string_at(pointer, size) for pointer, size in zip(pointers, self.parameters, strict=True)]
        self.launches.append((tuple(numbers), read))
        return self._note("cuLaunchKernel")

    def cuLaunchKernelEx(self, address: int, function: Any, pointers: Any, extra: None) -> int:  # noqa: N802
        """Reads CUlaunchConfig by its layout in cuda.h: seven numbers, a stream, a pointer to attributes, their number."""
        assert function.value == FUNCTION
        assert extra is None
        *numbers, stream, attributes, count = struct.unpack("<7I4xQQI", ctypes.string_at(address, 52))
        assert count == 1
        # An attribute is 72 bytes: a number that says which, and from byte 8 on its value.
        attribute = ctypes.string_at(attributes, 72)
        assert struct.unpack_from("<i4xi", attribute) == (6, 1)
        read = [ctypes.string_at(pointer, size) for pointer, size in zip(pointers, self.parameters, strict=True)]
        self.launches.append(((*numbers, stream), read))
        return self._note("cuLaunchKernelEx")


def load(
    library: FakeCuda,
    types: tuple[str, ...] = (),
    hidden: int = 0,
    threads: int = 64,
    shared: int = 0,
    dependent: bool = False,
) -> Kernel:
    return Kernel(Driver(library), b"code", "step", types, hidden, threads, shared, dependent=dependent)


def test_parameters_lie_where_the_kernel_reads_them_and_hidden_ones_are_null() -> None:
    library = FakeCuda((8, 4, 8, 4, 8, 4, 8, 8))
    kernel = load(library, ("*fp16", "i32", "i64", "fp32", "*i64", "i32"), hidden=2, threads=256, shared=1024)
    values = (2**63 + 16, -5, -(2**40), 0.1, 0, 2**31 - 1)
    kernel.launch((3, 2, 1), values, 77)
    numbers, found = library.launches[0]
    assert numbers == (3, 2, 1, 256, 1, 1, 1024, 77)
    formats = ["<Q", "<i", "<q", "<f", "<Q", "<i", "<Q", "<Q"]
    assert found == [struct.pack(kind, value) for kind, value in zip(formats, (*values, 0, 0), strict=True)]


def test_a_second_launch_has_its_own_values() -> None:
    library = FakeCuda((8, 4, 8))
    kernel = load(library, ("*fp32", "i32"), hidden=1)
    for value in (1, 2):
        kernel.launch((1, 1, 1), (16 * value, value), 0)
    assert [found for _, found in library.launches] == [
        [struct.pack("<Q", 16 * value), struct.pack("<i", value), bytes(8)] for value in (1, 2)
    ]


def test_a_kernel_that_waits_by_itself_says_so_to_the_driver() -> None:
    library = FakeCuda((8, 4, 8))
    kernel = load(library, ("*fp32", "i32"), hidden=1, threads=96, shared=1024, dependent=True)
    for value in (1, 2):
        kernel.launch((5, 4, value), (16 * value, value), 70 + value)
    assert library.launches == [
        ((5, 4, value, 96, 1, 1, 1024, 70 + value), [struct.pack("<Q", 16 * value), struct.pack("<i", value), bytes(8)])
        for value in (1, 2)
    ]
    assert "cuLaunchKernel" not in library.calls


@pytest.mark.parametrize(("shared", "expected"), [(0, {}), (48 * 1024, {}), (48 * 1024 + 16, {8: 48 * 1024 + 16})])
def test_much_shared_memory_is_asked_for(shared: int, expected: dict[int, int]) -> None:
    library = FakeCuda()
    load(library, shared=shared)
    assert library.attributes == expected


@pytest.mark.parametrize(
    "name", ["cuInit", "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel"]
)
def test_an_error_is_named(name: str) -> None:
    library = FakeCuda()
    library.failing[name] = 201
    with pytest.raises(CudaError, match=rf"^{name} failed: invalid device context \(CUDA error 201\)$"):
        load(library, shared=2**16).launch((1, 1, 1), (), 0)
    assert library.calls[-1] == name  # nothing is called after it


def test_an_error_that_the_driver_cannot_name_has_its_number() -> None:
    library = FakeCuda()
    library.failing["cuInit"] = 9999
    with pytest.raises(CudaError, match=r"cuInit failed: unknown error \(CUDA error 9999\)"):
        Driver(library)


def test_a_thread_without_a_context_gets_that_of_the_device_once() -> None:
    library = FakeCuda()
    driver = Driver(library)
    driver.ensure_context(1)
    assert library.calls == ["cuInit", "cuCtxGetCurrent"]  # this one has a context

    def other() -> None:
        library.context = None  # type: ignore[assignment]
        driver.ensure_context(1)
        driver.ensure_context(1)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert library.calls[2:] == ["cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    assert library.context == 1101


def test_launches_from_threads_do_not_mix_their_values() -> None:
    library = FakeCuda((8, 8))
    kernel = load(library, ("*fp32", "i64"))

    def work(number: int) -> None:
        for _ in range(200):
            kernel.launch((1, 1, 1), (number, number), 0)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(library.launches) == 800
    assert all(first == second for _, (first, second) in library.launches)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a driver")
def test_without_a_driver_the_error_says_so() -> None:
    with pytest.raises(CudaError, match=r"libcuda\.so\.1 cannot be loaded .*; install NVIDIA's driver"):
        cuda_driver.driver()


@pytest.mark.gpu
def test_the_machines_driver_refuses_what_is_no_cubin() -> None:
    torch.zeros(1, device="cuda")
    driver = cuda_driver.driver()
    driver.ensure_context(0)
    with pytest.raises(CudaError, match=r"cuModuleLoadData failed: .* \(CUDA error"):
        Kernel(driver, b"no cubin", "step", (), 0, 32, 0)
