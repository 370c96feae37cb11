"""Output for people: lines, progress bars and the summary of a command.

A closed pipe, a full disk behind the log or a closed terminal drops output and stops nothing.
"""

import logging
import os
import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

log = logging.getLogger(__name__)

PLAIN_INTERVAL = 30.0
"""Seconds between two lines of progress where there is no terminal."""

BAR_WITHOUT_RATE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

_lost: set[int] = set()


def say(text: str, *, error: bool = False) -> None:
    """Print a line on standard output, or on standard error.

    The first loss of one stream is reported on the other.
    """
    stream = sys.stderr if error else sys.stdout
    number = 2 if error else 1
    try:
        if stream is not None:
            print(_encodable(text, stream), file=stream, flush=True)
    except (OSError, ValueError) as reason:  # ValueError: closed
        _report_loss(number, reason)


def amount(count: int, one: str, many: str | None = None) -> str:
    """Write a count with its noun: "1 cell", "2,000 cells"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _encodable(text: str, stream: TextIO) -> str:
    """Escape the characters that a stream's encoding lacks, such as those of a path under LANG=C."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _report_loss(number: int, reason: Exception) -> None:
    """Say once, on the other stream, that one of the two standard streams is lost."""
    if number in _lost:
        return
    _lost.add(number)
    name = {1: "standard output", 2: "standard error"}[number]
    why = getattr(reason, "strerror", None) or str(reason)
    say(f"The {name} cannot be written to ({why}); output to it is dropped from here on.", error=number == 1)


class TolerantStream:
    """A text stream that drops what cannot be written, for progress bars and loggers."""

    def __init__(self, number: int) -> None:
        self._number = number

    @property
    def _stream(self) -> TextIO | None:
        return sys.stderr if self._number == 2 else sys.stdout

    def write(self, text: str) -> int:
        """Write, or drop."""
        try:
            if self._stream is not None:
                self._stream.write(_encodable(text, self._stream))
        except (OSError, ValueError) as reason:
            _report_loss(self._number, reason)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError) as reason:
            _report_loss(self._number, reason)

    def isatty(self) -> bool:
        """True on a terminal."""
        return is_terminal(self._number)

    def fileno(self) -> int:
        """Descriptor of the stream; tqdm asks for the width of its terminal."""
        return self._number


def is_terminal(number: int) -> bool:
    """True if a standard stream is a terminal."""
    try:
        return os.isatty(number)
    except OSError:
        return False


class Progress:
    """Progress of long work on standard error: a bar on a terminal, elsewhere a line every half minute.

    Parameters
    ----------
    total
        Units of work in all, if known.
    description
        A verb and its object, such as "tokenize".
    unit
        Name of one unit, such as "cell".
    initial
        Units done before.
    enabled
        False draws nothing, on ranks other than the first.
    exact
        For units that take long, such as steps: the bar counts each, the first line comes at once, and the rate is left
        to the note.
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        unit: str,
        *,
        initial: int = 0,
        enabled: bool = True,
        exact: bool = False,
    ) -> None:
        self.done, self.total, self.description, self.unit = initial, total, description, unit
        self.note = ""
        self._initial, self._started = initial, time.monotonic()
        self._printed, self._printed_at = -1, self._started
        self._prints, self._exact = enabled and not is_terminal(2), exact
        self._bar: Any = None
        if self._prints and exact:
            self._print()
        elif enabled and not self._prints:
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=description,
                unit=unit,
                unit_scale=not exact,
                bar_format=BAR_WITHOUT_RATE if exact else None,
                dynamic_ncols=True,
                file=TolerantStream(2),
            )

    def advance(self, count: int, note: str = "") -> None:
        """Count units of work as done; `note` stands at the end of the line."""
        self.done, self.note = self.done + count, note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._prints and time.monotonic() - self._printed_at >= PLAIN_INTERVAL:
            self._print()

    def _print(self) -> None:
        self._printed, self._printed_at = self.done, time.monotonic()
        say(self._line(), error=True)

    def _line(self) -> str:
        parts = [amount(self.done, self.unit)]
        if self.total is not None:
            parts = [f"{self.done:,} of {amount(self.total, self.unit)}"]
        rate = (self.done - self._initial) / max(time.monotonic() - self._started, 1e-9)
        if rate > 0:
            if not self._exact:
                parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
            if self.total is not None and self.done < self.total:
                parts.append(f"{(self.total - self.done) / rate / 60:.1f} min left")
        if self.note:
            parts.append(self.note)
        return f"{self.description}: {', '.join(parts)}"

    def close(self) -> None:
        """Close the bar; without one, print where the work ended, if lines were printed before."""
        if self._bar is not None:
            self._bar.close()
        elif self._printed not in (-1, self.done):
            self._print()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@dataclass
class Summary:
    """Result of a command: lines for people, and the same as values for `--report`.

    Attributes
    ----------
    lines
        Printed at the end, one by one.
    values
        JSON-serialisable; written to the file of `--report`.
    """

    lines: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
