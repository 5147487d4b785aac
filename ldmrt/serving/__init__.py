"""Many requests on one model: batches that images join and leave between two steps."""

from ldmrt.serving.batcher import Batcher
from ldmrt.serving.handle import Handle, Progress
from ldmrt.serving.process import EngineProcess
from ldmrt.serving.register import Stats

__all__ = ["Batcher", "EngineProcess", "Handle", "Progress", "Stats"]
