"""A CUDA graph without a GPU: records the calls of torch operators on the CPU and makes them again, on the same tensors.

Like a CUDA graph it knows tensors by their memory, runs no Python, and keeps the numbers that Python had when it recorded; and
it refuses to record what a capture would refuse: reading a value back to the host, or a result whose size depends on values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What waits for the device, on a GPU.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "item"}


class HostSyncError(RuntimeError):
    """Something that cannot be captured."""


class Recorder:
    """Stands in for `ldmrt.capture.Recorder`.

    Attributes:
        calls: the operators recorded, in order, by recording.
    """

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run the work twice to warm up, record it, and return what replays it."""
        work()
        work()
        tape = _Tape()
        with tape:
            work()
        self.calls.append([str(function) for function, *_ in tape.entries])
        return tape.replay


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__.split(".")[0] in _WAITING:
            raise HostSyncError(f"{func} waits for the device")
        result = func(*args, **kwargs)
        self.entries.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        """Make every call again; new results go where the first ones lay."""
        for function, args, kwargs, result in self.entries:
            read = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, tuple(kwargs.values())))}
            again = function(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old.untyped_storage().data_ptr() not in read:  # else a view, or written in place
                    old.copy_(new)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
