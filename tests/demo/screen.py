"""What the demo shows: a progress bar for each download on a terminal, a line for each elsewhere, then the table."""

from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.demo.web import MIB, Download


class Screen:
    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description:<23}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TextColumn("{task.fields[speed]:>12}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_interactive,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def begin(self, name: str, size: int) -> "Bar":
        return Bar(self, self._progress, name, size)

    def finish(self, results: dict[str, Download], compared: dict[str, str]) -> None:
        """The bars stay, the table follows. `compared`, unless empty, says which each speed is set against."""
        self._progress.stop()
        table = Table(box=box.SIMPLE_HEAD if self.console.is_interactive else None, padding=(0, 2, 0, 0))
        table.add_column("download")
        for heading in ("size", "time", "Mbit/s", *(["times direct"] if compared else [])):
            table.add_column(heading, justify="right")
        table.add_column("sha256")
        for name, result in results.items():
            cells = [f"{result.size // MIB} MiB", f"{result.seconds:.1f} s", f"{result.mbit_s:.1f}"]
            if compared:
                cells.append(f"{result.mbit_s / results[compared[name]].mbit_s:.1f}")
            table.add_row(name, *cells, "equal" if result.equal else "DIFFERENT")
        self.console.print()
        self.console.print(table)
        self.console.print()


class Bar:
    """One download's."""

    def __init__(self, screen: Screen, progress: Progress, name: str, size: int) -> None:
        self._screen, self._progress, self._name = screen, progress, name
        self._task = progress.add_task(name, total=size, speed="starting", start=False)
        self._started = False

    def on_progress(self, done: int, seconds: float) -> None:
        if not self._started:
            self._progress.start_task(self._task)
            self._started = True
        self._progress.update(self._task, completed=done, speed=_speed(done * 8 / 1e6 / seconds))

    def end(self, result: Download) -> None:
        self._progress.update(self._task, completed=result.size, speed=_speed(result.mbit_s))
        self._progress.stop_task(self._task)
        if self._progress.disable:
            self._screen.say(f"{self._name}: {result.size // MIB} MiB in {result.seconds:.1f} s")


def _speed(mbit_s: float) -> str:
    return f"{mbit_s:.1f} Mbit/s"
