"""Terminal output: a report's tables and sentences, a line for each run, and a progress line."""

from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from benchmarks.report.document import Cell, Chart, Report, Sentence, Table, Verdict
from benchmarks.report.figures import Figure, short

console = Console()

_VERDICT_STYLES = {True: "green", False: "red", None: "yellow"}


def show(report: Report) -> None:
    """Print a report. Charts are left out."""
    console.print(Text(report.machine.summary))
    for part in report.parts:
        if isinstance(part, Sentence):
            show_line(part.text, is_bad=part.is_bad)
        elif not isinstance(part, Chart):
            _show_table(part)


def show_line(text: str, *, is_bad: bool = False) -> None:
    """Print one line, in red when `is_bad`."""
    console.print(Text(text, style="red" if is_bad else ""))


def _show_table(table: Table) -> None:
    is_wide = len(table.head) > 6
    shown = RichTable(title=table.title, padding=(0, 0 if is_wide else 1), show_edge=not is_wide, pad_edge=False)
    for place, name in enumerate(table.head):
        is_text = place < table.text_columns
        shown.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text)
    for row in table.rows:
        shown.add_row(*map(_cell, row))
    console.print(shown)


def _cell(cell: Cell) -> Text:
    """Render a cell. A figure's spread is on a line of its own, and in thousands, so that tables fit a terminal."""
    if isinstance(cell, Figure):
        spread = cell.spread(_brief)
        return Text.assemble(_brief(cell.median), (f"\n{spread}" if spread else "", "dim"))
    if isinstance(cell, Verdict):
        return Text(cell.text, style=_VERDICT_STYLES[cell.is_good])
    return Text(cell or "")


def _brief(value: float) -> str:
    return f"{short(value / 1000)}k" if value >= 10_000 else short(value)


class Progress:
    """A line that is overwritten every second. Into a pipe, a line every PLAIN_EVERY_S seconds."""

    PLAIN_EVERY_S = 5

    def __init__(self) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, second: int, line: str) -> None:
        """Show the state at `second` of the run."""
        if console.is_terminal:
            self._live.update(Text(line), refresh=True)
        elif second % self.PLAIN_EVERY_S == 0:
            show_line(line)
