"""Embed the runtime in a program: many requests at once, from threads and from coroutines, on one model.

python examples/embed_batch.py pictures

Requests share batches, whatever their prompts, samplers and steps, and join and leave them between two steps. docs/embedding.md says what
may be called from where.
"""

from __future__ import annotations

import argparse
import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ldmrt
from ldmrt.request import Request
from ldmrt.serving import Batcher, Handle, Progress

PROMPTS = (
    "a red circle on a white background",
    "a blue square",
    "a green star left of a yellow circle",
    "a purple triangle on a black background",
)


def from_threads(batcher: Batcher, folder: Path) -> None:
    """Each thread hands in a request and waits for it; what is refused because too many wait is the caller's to try again."""

    def client(number: int) -> None:
        request = Request(prompt=PROMPTS[number], seed=number, num_inference_steps=10 * (1 + number % 2))
        try:
            result = batcher.submit(request, timeout=60.0).result()
        except ldmrt.Overloaded as error:
            raise SystemExit(f"try again in {error.retry_after:.1f} seconds") from error
        result.images[0].save(folder / f"thread-{number}.png")

    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        list(threads.map(client, range(len(PROMPTS))))


async def from_coroutines(batcher: Batcher, folder: Path) -> None:
    """A handle can be awaited in any event loop; a task that is cancelled withdraws its request."""
    loop = asyncio.get_running_loop()
    previews: asyncio.Queue[Progress] = asyncio.Queue()

    def on_progress(progress: Progress) -> None:
        """On the batcher's thread: hand it on, and return."""
        if progress.preview is not None:
            loop.call_soon_threadsafe(previews.put_nowait, progress)

    urgent = batcher.submit(
        Request(prompt=PROMPTS[0], seed=1, sampler="dpm++ 2m karras"), priority=1, on_progress=on_progress, previews=2
    )
    others = [batcher.submit(Request(prompt=prompt, seed=1)) for prompt in PROMPTS]
    withdrawn = asyncio.ensure_future(wait(batcher.submit(Request(prompt="a grey ring", num_inference_steps=500))))
    for number in range(2):
        progress = await previews.get()
        if progress.preview is not None:
            progress.preview.save(folder / f"preview-{number}.png")
    withdrawn.cancel()
    for number, result in enumerate(await asyncio.gather(urgent, *others)):
        result.images[0].save(folder / f"coroutine-{number}.png")


async def wait(handle: Handle) -> ldmrt.Result:
    """A coroutine that can be cancelled."""
    return await handle


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the pictures")
    parser.add_argument("--engines", type=Path, default=None, help="a bundle; the built-in model without it")
    parser.add_argument("--device", default=None)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    pipe = ldmrt.Pipeline.from_bundle(arguments.engines, arguments.device)
    with Batcher(pipe) as batcher:
        from_threads(batcher, arguments.out)
        asyncio.run(from_coroutines(batcher, arguments.out))
        print(batcher.stats())


if __name__ == "__main__":
    main()
