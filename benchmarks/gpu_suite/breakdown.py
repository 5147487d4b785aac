"""Where the time of one step goes, by class of operator: kernel times from torch's profiler, the step not captured."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from gpu_suite.results import Figures
from gpu_suite.session import Session
from ldmrt.kernels import launch

_OURS = {
    "attention": "attention",
    "convolution": "convolution",
    "group_norm": "group norm",
    "layer_norm": "layer norm",
    "linear_geglu": "gemm with geglu",
    "geglu": "geglu",
    "sampler": "sampler",
    "upsample": "sums and upsampling",
}
# Of libraries' kernels, by name: the first that fits. A convolution's name may hold `gemm`, an attention's `cudnn`.
_PATTERNS = (
    ("attention", r"flash|fmha|attention|attn|sdpa|softmax"),
    ("convolution", r"conv|fprop|winograd|implicit"),
    ("group norm", r"group_?norm|rowwisemoments|computefusedparams"),
    ("layer norm", r"layer_?norm"),
    ("gemm", r"gemm|gemv|cublas|nvjet|splitk|aten::(linear|addmm|mm|bmm|matmul)|cutlass"),
    (
        "elementwise and copies",
        r"elementwise|copy|cat|memcpy|memset|fill|index|upsample|reduce|nchw|nhwc|transpose|gelu|silu|aten::",
    ),
)
_LARGEST = 25


def classify(name: str) -> str:
    """The class of a library's kernel."""
    return next((label for label, pattern in _PATTERNS if re.search(pattern, name, re.IGNORECASE)), "other")


def name_launches(kernels: Sequence[str], launched: Sequence[str]) -> list[str | None]:
    """Which of our launches each kernel of a trace is, or None.

    A kernel of ours appears under its function's name, which several files may have: the n-th `forward` of the trace is the n-th
    launch of any `forward`.

    Args:
        kernels: names in the trace, in the order of their start.
        launched: `file.function` in the order of the launches.
    """
    waiting: dict[str, deque[str]] = defaultdict(deque)
    for name in launched:
        waiting[name.split(".")[1]].append(name)
    return [waiting[name].popleft() if waiting.get(name) else None for name in kernels]


def breakdown(session: Session, unit: str, name: str) -> None:
    """One step of a model at batch 1, and one run of its decoder."""
    model = session.only_model(name)
    with session.results.part(unit, "step") as figures:
        denoiser = model.denoiser(1, None)
        model.admit(denoiser)
        _profile(session, denoiser.step, figures, f"{unit}.step")
    with session.results.part(unit, "decoder") as figures:
        engine = model.engine("decoder", 1)
        inputs = {"latents": model.noise(1, *model.latent_shape, seed=1).to(model.dtype)}
        _profile(session, lambda: engine.run(inputs), figures, f"{unit}.decoder")


def _profile(session: Session, work: Any, figures: Figures, name: str) -> None:
    """Classes and largest kernels into the figures, and every kernel in its order into a file beside the results."""
    for _ in range(3):
        work()
    session.synchronize()
    activity = ProfilerActivity.CUDA if session.cuda else ProfilerActivity.CPU
    with _logged() as launched, profile(activities=[activity]) as profiler:
        work()
        session.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"} if session.cuda else {"cpu_op"}
    events = sorted((event for event in trace if event.get("cat") in kinds), key=lambda event: float(event["ts"]))
    kernels = [(str(event["name"]), float(event["dur"]) / 1e6) for event in events]
    figures.update(summarize(kernels, launched))
    lines = [json.dumps([kernel[:200], round(1e6 * seconds, 2)]) for kernel, seconds in kernels]
    (session.results.folder / f"{name}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def summarize(kernels: Sequence[tuple[str, float]], launched: Sequence[str]) -> Figures:
    """Seconds by class, and the largest kernels, of (name, seconds) in the order of their start."""
    classes: dict[str, list[float]] = defaultdict(list)
    names: dict[tuple[str, str], list[float]] = defaultdict(list)
    ours = name_launches([name for name, _ in kernels], launched)
    for (name, seconds), own in zip(kernels, ours, strict=True):
        label = classify(name) if own is None else _OURS[own.split(".")[0]]
        classes[label].append(seconds)
        names[label, own or name].append(seconds)
    largest = sorted(names.items(), key=lambda item: -sum(item[1]))[:_LARGEST]
    return {
        "kernels": len(kernels),
        "launches_of_ours": len(launched),
        "launches_not_found": len(launched) - sum(own is not None for own in ours),
        "seconds": float(f"{sum(seconds for _, seconds in kernels):.4g}"),
        "classes": {
            label: {"kernels": len(times), "seconds": float(f"{sum(times):.4g}")}
            for label, times in sorted(classes.items(), key=lambda item: -sum(item[1]))
        },
        "largest": [
            {"class": label, "name": name[:300], "kernels": len(times), "seconds": float(f"{sum(times):.4g}")}
            for (label, name), times in largest
        ],
    }


@contextmanager
def _logged() -> Iterator[list[str]]:
    """The names of the kernels that are launched meanwhile, in order."""
    original, launched = launch.run, []

    def run(kernel: str, *arguments: Any, **options: Any) -> None:
        launched.append(kernel)
        original(kernel, *arguments, **options)

    launch.run = run
    try:
        yield launched
    finally:
        launch.run = original
