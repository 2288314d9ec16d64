"""What is looked at: the last answer, its rates, and how the operator wants to see them. Keys change the latter."""

from collections.abc import Callable

from forwarder.summary import InstanceStatus
from forwarder.top.columns import SHOWN
from forwarder.top.meters import Key, Meters
from forwarder.top.rows import Row, every_key, tree

INTERVALS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

HELP = (
    ("q", "quit"),
    ("up, down, page up, page down, home, end", "choose a row"),
    ("enter, space", "expand the row, or fold it"),
    ("a", "expand all rows, or fold all"),
    ("left, right, s", "choose the column to sort by"),
    ("r", "the other way round"),
    ("+, -", "look less often, more often"),
    ("p", "pause, go on"),
    ("?", "this help, and back"),
)


class Model:
    """`title` names the instance. `status` is None while nobody answers, and `silence` says why."""

    def __init__(self, title: str, interval_s: float) -> None:
        self.title = title
        self.interval_s = interval_s
        self.status: InstanceStatus | None = None
        self.silence = "no answer yet"
        self.meters = Meters()
        self.sort = 0
        self.reverse = False
        self.paused = self.help = self.done = False
        self.columns: list[int] = list(range(len(SHOWN)))
        self.page = 10
        self._expanded: set[Key] = set()
        self._rows: list[Row] | None = None
        self._cursor = 0
        self._chosen: Key | None = None
        self._first = 0
        self._seen = False
        self._keys: dict[str, Callable[[], None]] = self._key_table()

    # What the instance says

    def on_answer(self, status: InstanceStatus) -> None:
        """A single tunnel is expanded from the beginning."""
        self.meters.on_answer(status)
        self.status, self._rows = status, None
        if not self._seen and len(status.tunnels) == 1:
            self._expanded.add((status.tunnels[0].name,))
        self._seen = True

    def on_silence(self, why: str) -> None:
        """Nobody answers. What is expanded, and the cursor, wait for the instance to come back."""
        self.meters.on_silence()
        self.status, self.silence, self._rows = None, why, None

    # What is seen

    @property
    def rows(self) -> list[Row]:
        """The whole tree in its order."""
        if self._rows is None:
            order = SHOWN[self.sort].order(self.reverse)
            self._rows = tree(self.status, self.meters, self._expanded, order) if self.status is not None else []
            self._find_cursor(self._rows)
        return self._rows

    def is_expanded(self, row: Row) -> bool:
        return row.key in self._expanded

    def window(self, height: int) -> tuple[int, int]:
        """The numbers of the first row that is seen, and of the row with the cursor, which is one of these."""
        count = len(self.rows)
        self.page = max(1, height - 1)
        highest = max(0, count - height)
        self._first = min(max(self._first, self._cursor - height + 1, 0), self._cursor, highest)
        return self._first, self._cursor

    def _find_cursor(self, rows: list[Row]) -> None:
        """The cursor stays with its row wherever that goes, and at its place in the list if the row is gone."""
        if self._chosen is not None:
            for number, row in enumerate(rows):
                if row.key == self._chosen:
                    self._cursor = number
                    return
        self._cursor = max(0, min(self._cursor, len(rows) - 1)) if rows else self._cursor

    # What the operator does

    def on_key(self, key: str) -> None:
        """Keys without a meaning do nothing."""
        if self.help and key != "q":
            self.help = False
        elif key in self._keys:
            self._keys[key]()

    def _key_table(self) -> dict[str, Callable[[], None]]:
        return {
            "q": self._quit,
            "up": lambda: self._move(-1),
            "down": lambda: self._move(1),
            "k": lambda: self._move(-1),
            "j": lambda: self._move(1),
            "page up": lambda: self._move(-self.page),
            "page down": lambda: self._move(self.page),
            "home": lambda: self._move(-len(self.rows)),
            "end": lambda: self._move(len(self.rows)),
            "enter": self._toggle,
            "space": self._toggle,
            "a": self._toggle_all,
            "left": lambda: self._sort_by(-1),
            "right": lambda: self._sort_by(1),
            "s": lambda: self._sort_by(1),
            "S": lambda: self._sort_by(-1),
            "r": self._turn_round,
            "+": lambda: self._look(1),
            "=": lambda: self._look(1),
            "-": lambda: self._look(-1),
            "p": self._pause,
            "?": self._show_help,
            "h": self._show_help,
        }

    def _quit(self) -> None:
        self.done = True

    def _pause(self) -> None:
        self.paused = not self.paused

    def _show_help(self) -> None:
        self.help = True

    def _move(self, by: int) -> None:
        rows = self.rows
        if rows:
            self._cursor = min(max(self._cursor + by, 0), len(rows) - 1)
            self._chosen = rows[self._cursor].key

    def _toggle(self) -> None:
        """A tunnel's only session is expanded with it. On a row that cannot be expanded the row above it is folded."""
        rows = self.rows
        if not rows:
            return
        row = rows[self._cursor]
        if row.key in self._expanded:
            self._expanded = {key for key in self._expanded if key[: len(row.key)] != row.key}
        elif row.expandable:
            self._expanded.add(row.key)
            self._expanded.update(self._only_session(row.key))
        elif row.depth:
            row_above = next(each for each in rows[self._cursor :: -1] if each.depth < row.depth)
            self._expanded.discard(row_above.key)
            self._chosen = row_above.key
        self._rows = None

    def _only_session(self, key: Key) -> list[Key]:
        assert self.status is not None
        sessions = [each for each in every_key(self.status) if each[:-1] == key]
        return sessions if len(sessions) == 1 else []

    def _toggle_all(self) -> None:
        if self.status is not None:
            every = set(every_key(self.status))
            self._expanded = set() if every <= self._expanded else every
            self._rows = None

    def _sort_by(self, step: int) -> None:
        """The next column of those that the terminal has room for."""
        shown = self.columns
        place = shown.index(self.sort) if self.sort in shown else 0
        self.sort, self.reverse = shown[(place + step) % len(shown)], False
        self._rows = None

    def _turn_round(self) -> None:
        self.reverse, self._rows = not self.reverse, None

    def _look(self, direction: int) -> None:
        if direction > 0:
            self.interval_s = next((each for each in INTERVALS_S if each > self.interval_s), self.interval_s)
        else:
            self.interval_s = next((each for each in INTERVALS_S[::-1] if each < self.interval_s), self.interval_s)
