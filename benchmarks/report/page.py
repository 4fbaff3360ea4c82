"""A report as one HTML page that loads nothing else, for a browser or a mail."""

from html import escape

from benchmarks.report.document import Cell, Chart, Report, Sentence, Table, Verdict
from benchmarks.report.figures import Figure, short
from benchmarks.report.machine import Machine

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #777; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; max-width: 860px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.machine { color: var(--soft); font-size: .85rem }
table { border-collapse: collapse; font-size: .85rem; width: 100%; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .5rem; text-align: right; vertical-align: top }
.text { text-align: left } td small { display: block; color: var(--soft) }
svg { width: 100%; height: auto; font-size: 12px } svg text { fill: currentColor }
svg .grid { stroke: var(--line) } svg .spread { stroke: currentColor; stroke-width: 1.5 }
.legend span { margin-right: 1.2rem } .legend i { display: inline-block; width: 1em; height: .7em; margin-right: .4em }
.good { color: #12804f } .bad { color: #c62828; font-weight: 600 } .plain { color: var(--soft) }
"""

_VERDICT_CLASSES = {True: "good", False: "bad", None: "plain"}


def render(report: Report) -> str:
    """Return the whole file."""
    title = escape(report.title)
    content = "".join(_part(part) for part in report.parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{title}</h1><p class="machine">{escape(_described(report.machine))}</p>{content}</body></html>\n'
    )


def _described(machine: Machine) -> str:
    return (
        f"{machine.summary}; {machine.memory_gb} GB, Linux {machine.kernel}, "
        f"load average {machine.load_average:.1f} before the run"
    )


def _part(part: Table | Chart | Sentence) -> str:
    if isinstance(part, Chart):
        return f"<h2>{escape(part.title)}</h2>{part.svg}"
    if isinstance(part, Sentence):
        return f'<p class="bad">{escape(part.text)}</p>' if part.is_bad else f"<p>{escape(part.text)}</p>"
    return f"<h2>{escape(part.title)}</h2>{_table(part)}"


def _table(table: Table) -> str:
    aligned = [' class="text"' if place < table.text_columns else "" for place in range(len(table.head))]
    head = "".join(f"<th{style}>{escape(name)}</th>" for style, name in zip(aligned, table.head, strict=True))
    rows = (
        "".join(f"<td{style}>{_cell(cell)}</td>" for style, cell in zip(aligned, row, strict=True))
        for row in table.rows
    )
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _cell(cell: Cell) -> str:
    if isinstance(cell, Figure):
        return f"{short(cell.median)}<small>{cell.spread(short)}</small>"
    if isinstance(cell, Verdict):
        return f'<span class="{_VERDICT_CLASSES[cell.is_good]}">{escape(cell.text)}</span>'
    return escape(cell or "")
