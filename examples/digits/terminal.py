"""The demo on a terminal: progress bars while it runs, then the table."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.digits.protocol import QUICK_NOTE, Protocol
from examples.digits.report import COLUMNS, cells, save, summary
from examples.digits.run import run


def show(out: Path, *, seeds: int | None, quick: bool) -> None:
    """Run the demo, print its table and write its files into the folder `out`."""
    console = Console()
    if quick:
        protocol = Protocol.quick(seeds or 1)
        console.print(QUICK_NOTE, style="bold yellow", highlight=False)
    else:
        protocol = Protocol() if seeds is None else Protocol(seeds=seeds)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("updates,")
    with Progress(*columns, TimeElapsedColumn(), console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        results = run(protocol, progress)
    table = Table(title="Prompt tuning on handwritten digits")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if i else "left")
    for row in results.rows:
        table.add_row(*cells(row))
    console.print(table)
    for line in summary(results):
        console.print(line, highlight=False)
    for path in save(results, out):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)  # a path in one piece, to be copied
