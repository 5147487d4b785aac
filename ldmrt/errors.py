"""Every error that ldmrt raises on purpose.

A message is one line: what happened, what was found against what was expected, and the command or value that cures it.
The command line prints it as it stands, so it must read well without a traceback.
"""

from __future__ import annotations

# Characters of a message. Names in it may be as long as whoever wrote a file liked.
_LONGEST = 2000


class LdmrtError(Exception):
    """Base of all errors raised by ldmrt. `except ldmrt.LdmrtError` catches each of the others."""

    def __str__(self) -> str:
        """The message, one line whatever the names in it: what a terminal would not print but obey is escaped."""
        text = super().__str__()
        if text.isprintable() and len(text) <= _LONGEST:
            return text
        shown = text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
        return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in shown)


class BadRequest(LdmrtError, ValueError):
    """A value given by the caller cannot be used.

    Attributes:
        param: the name of the offending parameter as the caller knows it, or None.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BundleError(LdmrtError):
    """A bundle is missing, damaged, incomplete, or of a format this version cannot read."""


class EngineMismatch(LdmrtError):
    """An engine does not fit this machine, this library version, or the shape that was asked for."""


class BuildError(LdmrtError):
    """A model cannot be turned into engines."""


class Overloaded(LdmrtError):
    """There is no room for another request now.

    Attributes:
        retry_after: seconds after which there should be.
    """

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(LdmrtError):
    """What was asked is closed, broken, or lent to another."""


class Quarantined(LdmrtError):
    """The engine was lost again and again while it made such a request, which is not tried again for a while."""


class Cancelled(LdmrtError):
    """The caller withdrew the request."""


class DeadlineExceeded(LdmrtError):
    """The request was not finished in the time it was given."""


class NumericalError(LdmrtError):
    """The model produced NaN or infinity where finite numbers were due."""
