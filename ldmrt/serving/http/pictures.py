"""Pictures as answers carry them."""

from __future__ import annotations

import base64
import io

from PIL import Image

from ldmrt.serving.http.fields import Format


def encoded(picture: Image.Image, form: Format, compression: int | None) -> str:
    """A picture's file, in base64. It says nothing of how it was made.

    Args:
        picture: RGB.
        form: the file's.
        compression: OpenAI's word for the quality of JPEG and WebP, 0 to 100; None for 95.
    """
    out = io.BytesIO()
    quality = 95 if compression is None else compression
    if form == "png":
        picture.save(out, format="PNG", compress_level=4)
    elif form == "jpeg":
        picture.save(out, format="JPEG", quality=quality, subsampling=0)
    else:
        picture.save(out, format="WEBP", quality=quality)
    return base64.b64encode(out.getbuffer()).decode("ascii")
