"""The part of the CUDA driver that launches a compiled kernel, over ctypes: nothing is compiled for it, and no toolkit is needed."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_...
_SHARED_WITHOUT_ASKING = 48 * 1024
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_...

# Every parameter gets eight bytes of its own, from which the driver copies as many as the kernel declares.
_SLOT = 8
_FORMATS = {"i64": "q", "i32": "i4x", "fp32": "f4x"}  # and Q for a pointer

_handle, _int, _uint = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
_PROTOTYPES: dict[str, list[Any]] = {
    "cuInit": [_uint],
    "cuGetErrorString": [_int, ctypes.POINTER(ctypes.c_char_p)],
    "cuCtxGetCurrent": [ctypes.POINTER(_handle)],
    "cuCtxSetCurrent": [_handle],
    "cuDeviceGet": [ctypes.POINTER(_int), _int],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(_handle), _int],
    "cuModuleLoadData": [ctypes.POINTER(_handle), ctypes.c_char_p],
    "cuModuleGetFunction": [ctypes.POINTER(_handle), _handle, ctypes.c_char_p],
    "cuFuncSetAttribute": [_handle, _int, _int],
    "cuLaunchKernel": [_handle, *[_uint] * 7, _handle, ctypes.POINTER(_handle), _handle],
    "cuLaunchKernelEx": [_handle, _handle, ctypes.POINTER(_handle), _handle],
}


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: its value is a union of 64 bytes, of which ours is a number at the beginning."""

    _fields_ = (("id", _int), ("padding", ctypes.c_char * 4), ("value", _int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((f"{what}_{axis}", _uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared", _uint),
        ("stream", _handle),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", _uint),
    )


class CudaError(RuntimeError):
    """A call of the driver failed."""


class Driver:
    """The driver's functions.

    Args:
        library: libcuda, or what stands in for it in a test: its functions give 0 or the number of an error.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._threads = threading.local()
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function.

        Raises:
            CudaError: it gave an error.
        """
        self.check(name, getattr(self._library, name)(*arguments))

    def check(self, name: str, status: int) -> None:
        """Raise what a function gave, unless it is 0."""
        if status != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise CudaError(f"{name} failed: {(text.value or b'unknown error').decode()} (CUDA error {status})")

    def ensure_context(self, device: int) -> None:
        """Give this thread the device's context, if it has none yet; torch gives it one only when it allocates or launches."""
        if getattr(self._threads, "ready", False):
            return
        context = _handle()
        self.call("cuCtxGetCurrent", ctypes.byref(context))
        if not context.value:
            number = _int()
            self.call("cuDeviceGet", ctypes.byref(number), device)
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
            self.call("cuCtxSetCurrent", context)
        self._threads.ready = True

    @property
    def launch_kernel(self) -> Any:
        return self._library.cuLaunchKernel

    @property
    def launch_kernel_ex(self) -> Any:
        return self._library.cuLaunchKernelEx


class Kernel:
    """A compiled kernel in the memory of the current context's device, ready to launch. It stays there."""

    def __init__(
        self,
        driver: Driver,
        code: bytes,
        symbol: str,
        types: Sequence[str],
        hidden: int,
        threads: int,
        shared: int,
        *,
        dependent: bool = False,
    ) -> None:
        """Load it. This cannot be done while a CUDA graph is being captured: launch once before.

        Args:
            driver: the driver.
            code: a cubin for the device.
            symbol: the kernel's name in it.
            types: Triton's types of its parameters, `*fp16`, `i32`, `i64`, `fp32`.
            hidden: how many more pointers it declares, which are to be null.
            threads: of a block.
            shared: bytes of dynamic shared memory of a block.
            dependent: it waits for the kernel before it by itself (programmatic dependent launch), so that it may be put on the
                GPU while that one still runs.

        Raises:
            CudaError: the driver refuses it.
        """
        module, function = _handle(), _handle()
        driver.call("cuModuleLoadData", ctypes.byref(module), code)
        driver.call("cuModuleGetFunction", ctypes.byref(function), module, symbol.encode())
        if shared > _SHARED_WITHOUT_ASKING:
            driver.call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        self._driver = driver
        self._launch = driver.launch_kernel
        self._config: _Config | None = None
        if dependent:
            self._launch = driver.launch_kernel_ex
            self._attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
            self._config = _Config(
                block_x=threads,
                block_y=1,
                block_z=1,
                shared=shared,
                attributes=ctypes.pointer(self._attribute),
                count=1,
            )
        self._function = function
        self._threads = threads
        self._shared = shared
        # Written by every launch, under the lock, and read by the driver before it returns. What is hidden stays null.
        slots = len(types) + hidden
        self._lock = threading.Lock()
        self._values = ctypes.create_string_buffer(_SLOT * slots)
        self._pack = struct.Struct("<" + "".join("Q" if kind[0] == "*" else _FORMATS[kind] for kind in types)).pack_into
        first = ctypes.addressof(self._values)
        self._pointers = (_handle * slots)(*(first + _SLOT * slot for slot in range(slots)))

    def launch(self, grid: tuple[int, int, int], values: Sequence[int | float], stream: int) -> None:
        """Launch on a stream.

        Args:
            grid: blocks along the three axes.
            values: the parameters that are not hidden; pointers as addresses.
            stream: its handle; 0 is the default stream.

        Raises:
            CudaError: the driver refuses, or an earlier launch has failed meanwhile.
        """
        with self._lock:
            self._pack(self._values, 0, *values)
            config = self._config
            if config is None:
                status = self._launch(
                    self._function, *grid, self._threads, 1, 1, self._shared, stream, self._pointers, None
                )
            else:
                config.grid_x, config.grid_y, config.grid_z = grid
                config.stream = stream
                status = self._launch(ctypes.addressof(config), self._function, self._pointers, None)
        if status:
            self._driver.check("cuLaunchKernel", status)


@cache
def driver() -> Driver:
    """The machine's.

    Raises:
        CudaError: there is none, or it finds no GPU.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"libcuda.so.1 cannot be loaded ({error}); install NVIDIA's driver") from None
    for name, types in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = _int, types
    return Driver(library)
