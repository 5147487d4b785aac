"""What a server logs: lines of JSON, one for each request, without prompts, and one for whatever else there is to say."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime

FIELDS = "ldmrt_fields"  # where a record carries more than its message

log = logging.getLogger("ldmrt.serving")


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON. Of an exception it tells the type and where it was raised, not the message, which may hold what a
    client sent.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = [
                f"{type(error).__name__} at "
                + " < ".join(
                    f"{frame.filename}:{frame.lineno}"
                    for frame in reversed(traceback.extract_tb(error.__traceback__)[-5:])
                )
                for error in _causes(record.exc_info[1])
            ]
        return json.dumps(line)


def to_stderr() -> None:
    """Let the whole process log that way."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(capture=True)


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error, and what it was raised from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__
    return found
