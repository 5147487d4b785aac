"""An engine's process that starts at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ldmrt.request import Defaults
from ldmrt.serving import life
from ldmrt.serving.engine import Facts
from ldmrt.serving.wire import facts_fields

from . import stand_in

FACTS = Facts(
    name="shapes",
    kind="stable-diffusion",
    defaults=Defaults(
        width=stand_in.SIZE[0],
        height=stand_in.SIZE[1],
        num_inference_steps=20,
        guidance_scale=5.0,
        sizes=(stand_in.SIZE,),
    ),
    begins=True,
    needs_image=False,
    takes_mask=True,
    needs_mask=False,
    reads_text=True,
)


@pytest.fixture
def standing_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`EngineProcess` starts `stand_in.py`; returns the folder where its mood may be written."""
    (tmp_path / "facts.json").write_text(json.dumps(facts_fields(FACTS)), encoding="utf-8")
    monkeypatch.setattr(life, "COMMAND", (sys.executable, "-I", "-S", str(Path(stand_in.__file__)), str(tmp_path)))
    return tmp_path
