"""In the manner of MLPerf Inference's benchmark of text to image with Stable Diffusion XL; unofficial.

What it asks of a model, and the two scenarios of machines at an edge, are of the reference implementation
(https://github.com/mlcommons/inference, `text_to_image`): one picture after the other, of whose latencies the 90th percentile counts, and pictures
that are all there at once, of which as many a second as can be. Here every picture has the same prompt, and nobody judges them: MLPerf takes
5,000 captions, and demands FID and CLIP scores of their pictures, an hour or so of runs, and a review.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldmrt.bench.report import Case, MlPerf
from ldmrt.errors import BadRequest

KIND = "stable-diffusion-xl"
SIZE = (1024, 1024)
STEPS = 20
SAMPLER = "euler"
GUIDANCE_SCALE = 8.0
NEGATIVE_PROMPT = "normal quality, low quality, worst quality, low res, blurry, nsfw, nude"


def check_model(kind: str) -> None:
    """Check that it is the benchmark's model.

    Raises:
        BadRequest: it is another.
    """
    if kind != KIND:
        raise BadRequest(f"--mlperf is of {KIND}, and this model is {kind}: use --arch sdxl", param="mlperf")


def scenarios(cases: Sequence[Case]) -> MlPerf:
    """Both scenarios, of the cases with guidance: one picture alone, and whatever batch makes most pictures a second.

    Args:
        cases: one of them of a single picture.
    """
    guided = [case for case in cases if case.guidance]
    alone = next(case for case in guided if case.images == 1)
    offline = max(guided, key=lambda case: case.images_per_second)
    return MlPerf(
        single_stream_p90_seconds=float(np.percentile(alone.picture_seconds.samples, 90)),
        single_stream_pictures=len(alone.picture_seconds.samples),
        offline_images_per_second=offline.images_per_second,
        offline_batch=offline.images,
    )
