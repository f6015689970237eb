"""Progress of anything that takes more than two seconds: one line for each stage, live on a terminal."""

from __future__ import annotations

import sys
import time
from typing import Self

from netship.targets.commands import as_called
from netship.targets.escapes import one_line

_SPINNER = "|/-\\"


class Progress:
    """Prints stages on stderr: one line for each that is finished, and on a terminal a moving line for the current one.

    Without a terminal there are no escape codes and nothing is overwritten.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = not quiet and sys.stderr.isatty()
        self._text = ""
        self._started = 0.0
        self._turns = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif self._live:
            self._write("\r\x1b[K")

    def stage(self, text: str) -> None:
        """End the current stage and begin the next."""
        self.finish()
        self._text = one_line(text)
        self._started = time.monotonic()
        self.tick()

    def tick(self) -> None:
        """Show that the work goes on; call it a few times a second."""
        if self._live and self._text:
            self._turns += 1
            spinner = _SPINNER[self._turns % len(_SPINNER)]
            self._write(f"\r\x1b[K{spinner} {self._text} {self._elapsed():.0f} s")

    def finish(self) -> None:
        """End the current stage and print how long it took."""
        if self._text:
            self._line(f"{self._elapsed():5.1f} s  {self._text}")
            self._text = ""

    def note(self, text: str) -> None:
        """Print a line that stays, between stages."""
        self._line(f"         {one_line(as_called(text))}")

    def _line(self, text: str) -> None:
        if not self._quiet:
            clear = "\r\x1b[K" if self._live else ""
            self._write(f"{clear}  {text}\n")

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    @staticmethod
    def _write(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)
