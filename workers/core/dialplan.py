"""Which stripe to dial next, by which route, and when. Sans-IO.

A route is one server address and one source address. Stripe i belongs to route i modulo their number, its home.
1. A stripe that is missing, or up and stale (it stalls), waits in its home's `todo`; `next_dial` makes an attempt of
   it.
2. While a route works, attempts follow each other at `spacing_us`. A route is in trouble while dials fail or hang, or
   while all its stripes are stale: then a fresh attempt starts every 0.4 to 0.8 s, beside those that hang.
3. After MOVE_US of trouble other routes dial its stripes, too; attempts at home go on, and take over when one succeeds.

Times are whole microseconds of any monotonic clock.
"""

from collections.abc import Callable, Iterable

CONCURRENT = 32
"""Attempts of one route at a time; twice as many while it is in trouble, spaced so that no more fit into their life."""
PAUSE_MIN_US, PAUSE_MAX_US = 100_000, 800_000
"""Between attempts while a route is in trouble, less a jitter of up to a half: what comes back is found in 0.8 s."""
HANG_US = 1_000_000
"""An attempt that takes longer, with no success since, means trouble."""
MOVE_US = 2_000_000
YOUNG_US = 5_000_000
"""A stripe lost at this age is as good as a failed dial: a server may accept a handshake and then drop the stripe."""
SETTLED_US = 1_000_000
"""Failures are over when a stripe has stayed up for so long."""


class Attempt:
    """A dial of stripe `index` by route number `route`."""

    __slots__ = ("index", "route", "started_us")

    def __init__(self, index: int, route: int, started_us: int) -> None:
        self.index, self.route, self.started_us = index, route, started_us


class Route:
    """`up`: its stripes, and since when; `stale`: those of them that stall."""

    __slots__ = (
        "attempts",
        "failing_since_us",
        "failures",
        "next_us",
        "number",
        "paused_until_us",
        "proven_us",
        "stale",
        "todo",
        "trouble_since_us",
        "up",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.todo: dict[int, None] = {}
        self.attempts: dict[Attempt, None] = {}
        self.up: dict[int, int] = {}
        self.stale: set[int] = set()
        self.failures = 0
        self.failing_since_us = self.paused_until_us = self.next_us = self.proven_us = 0
        self.trouble_since_us: int | None = None

    def is_troubled(self, now_us: int) -> bool:
        """Whether dials fail or hang, or every stripe is stale."""
        if self.failures or (self.stale and len(self.stale) == len(self.up)):
            return True
        if not self.attempts:
            return False
        oldest = next(iter(self.attempts))
        return now_us - max(oldest.started_us, self.proven_us) > HANG_US

    def drop(self, index: int) -> bool:
        """The stripe is not up by this route any more; whether it was."""
        self.stale.discard(index)
        return self.up.pop(index, None) is not None


class DialPlan:
    """One worker's dials. An attempt may take `life_us`; `jitter` gives numbers from 0.5 to 1."""

    def __init__(self, routes: int, spacing_us: int, life_us: int, jitter: Callable[[], float]) -> None:
        self.routes = [Route(number) for number in range(routes)]
        self.wanted: set[int] = set()
        self.pace(spacing_us, life_us)
        self._jitter = jitter
        self._next_us = 0
        self._turn = 0

    def pace(self, spacing_us: int, life_us: int) -> None:
        """Of dials from now on."""
        self._spacing_us = spacing_us
        self._least_pause_us = life_us // CONCURRENT

    @property
    def attempts(self) -> int:
        """Dials on their way."""
        return sum(len(route.attempts) for route in self.routes)

    @property
    def has_work(self) -> bool:
        """Whether any stripe waits to be dialled."""
        return any(route.todo for route in self.routes)

    def home(self, index: int) -> Route:
        """The route that the stripe belongs to."""
        return self.routes[index % len(self.routes)]

    # What is wanted

    def want(self, indices: Iterable[int]) -> None:
        """These stripes are wanted from now on, and no others."""
        before, self.wanted = self.wanted, set(indices)
        for index in sorted(self.wanted - before):
            if index not in self.home(index).up:
                self.home(index).todo[index] = None
        gone = before - self.wanted
        for route in self.routes:
            for index in gone:
                route.todo.pop(index, None)

    def on_stale(self, index: int) -> None:
        """The stripe, which is up, stalls: replace it."""
        for route in self.routes:
            if index in route.up and index not in route.stale:
                route.stale.add(index)
                self.home(index).todo[index] = None

    def on_fresh(self, index: int) -> None:
        """The stripe works again."""
        for route in self.routes:
            route.stale.discard(index)

    def refresh(self, index: int) -> None:
        """Replace a stripe although it works."""
        if self.has_attempt(index) or any(index in route.stale for route in self.routes):
            return
        for route in self.routes:
            if route.up.pop(index, None) is not None:
                self.home(index).todo[index] = None

    def move(self, index: int) -> None:
        """The other end wants the stripe, which is up, replaced."""
        for route in self.routes:
            route.drop(index)
        if index in self.wanted and not self.has_attempt(index):
            self.home(index).todo[index] = None

    def has_attempt(self, index: int) -> bool:
        """Whether a dial of that stripe is on its way."""
        return any(each.index == index for route in self.routes for each in route.attempts)

    def _is_needed(self, index: int, route: Route) -> bool:
        """Whether `route` should dial the stripe: it is not up or stale, or up elsewhere than at its home."""
        if index not in self.wanted:
            return False
        for other in self.routes:
            if index in other.up and index not in other.stale:
                return other is not route and route is self.home(index)
        return True

    # Dials

    def next_dial(self, now_us: int) -> Attempt | None:
        """The attempt to start now."""
        if now_us < self._next_us:
            return None
        for _ in self.routes:
            self._turn = (self._turn + 1) % len(self.routes)
            attempt = self._next_by(self.routes[self._turn], now_us)
            if attempt is not None:
                self._next_us = now_us + self._spacing_us
                return attempt
        return None

    def _next_by(self, route: Route, now_us: int) -> Attempt | None:
        is_troubled = route.is_troubled(now_us)
        if now_us < route.next_us or len(route.attempts) >= CONCURRENT << is_troubled:
            return None
        todo = route.todo
        while todo:
            index = next(iter(todo))
            del todo[index]
            if not self._is_needed(index, route):
                continue
            attempt = Attempt(index, route.number, now_us)
            route.attempts[attempt] = None
            if is_troubled:
                todo[index] = None  # there may be more attempts than stripes: who knows which one comes through
                route.next_us = now_us + max(int(PAUSE_MAX_US * self._jitter()), self._least_pause_us)
            return attempt
        return None

    def wait_us(self, now_us: int) -> int | None:
        """How long until `next_dial` may have an attempt; None: not before something happens."""
        due = [
            route.next_us
            for route in self.routes
            if route.todo and len(route.attempts) < CONCURRENT << route.is_troubled(now_us)
        ]
        return max(min(due), self._next_us) - now_us if due else None

    def is_current(self, attempt: Attempt) -> bool:
        """Whether the attempt, which has come through, is still of use."""
        route = self.routes[attempt.route]
        return attempt in route.attempts and self._is_needed(attempt.index, route)

    def end(self, attempt: Attempt) -> None:
        """The attempt is given up, as nobody needs it."""
        self.routes[attempt.route].attempts.pop(attempt, None)

    def on_up(self, attempt: Attempt, now_us: int) -> list[Attempt]:
        """The attempt has become a stripe, which replaces any other of that index. Returns attempts to give up."""
        route, index = self.routes[attempt.route], attempt.index
        route.attempts.pop(attempt, None)
        route.proven_us = now_us
        home = self.home(index)
        useless = []
        for other in self.routes:
            other.drop(index)
            if other is not home or route is home:
                other.todo.pop(index, None)
                useless += [each for each in other.attempts if each.index == index]
        route.up[index] = now_us
        if route is not home:
            home.todo[index] = None
        for each in useless:
            self.end(each)
        return useless

    def on_failed(self, attempt: Attempt, now_us: int) -> bool:
        """The attempt failed; whether that is news."""
        route = self.routes[attempt.route]
        if attempt not in route.attempts:
            return False
        del route.attempts[attempt]
        if self._is_needed(attempt.index, route):
            route.todo[attempt.index] = None
        return self._on_failure(route, now_us)

    def on_lost(self, index: int, now_us: int) -> Route | None:
        """A stripe is gone. Its route if that is the first of its failures."""
        news = None
        for route in self.routes:
            since_us = route.up.get(index)
            if route.drop(index) and since_us is not None and now_us - since_us < YOUNG_US and index in self.wanted:
                news = route if self._on_failure(route, now_us) else None
        if index in self.wanted:
            self.home(index).todo[index] = None
        return news

    def _on_failure(self, route: Route, now_us: int) -> bool:
        """Pause before the next dial. What fails during a pause has the same cause and makes it no longer."""
        if now_us < route.paused_until_us:
            return False
        is_news = not route.failures
        if is_news:
            route.failing_since_us = now_us
        pause_us = min(PAUSE_MIN_US << min(route.failures, 10), PAUSE_MAX_US)
        route.failures += 1
        route.next_us = route.paused_until_us = now_us + int(pause_us * self._jitter())
        return is_news

    # Time

    def on_time(self, now_us: int) -> list[Route]:
        """Every 100 ms. Returns routes that work again after failures."""
        recovered = []
        for route in self.routes:
            if route.failures and any(
                since_us > route.failing_since_us and now_us - since_us > SETTLED_US for since_us in route.up.values()
            ):
                route.failures = 0
                recovered.append(route)
            if not route.is_troubled(now_us):
                route.trouble_since_us = None
                continue
            for attempt in route.attempts:
                if self._is_needed(attempt.index, route):
                    route.todo.setdefault(attempt.index)
            if route.trouble_since_us is None:
                route.trouble_since_us = now_us
            elif now_us - route.trouble_since_us > MOVE_US:
                self._move(route)
        return recovered

    def _move(self, route: Route) -> None:
        """Let routes that work dial what a troubled one does not get up."""
        others = [other for other in self.routes if other.trouble_since_us is None]
        for place, index in enumerate(route.todo):
            other = others[place % len(others)] if others else route
            if route is not self.home(index) or other is route or not self._is_needed(index, other):
                continue
            if not any(each.index == index for each in other.attempts):
                other.todo[index] = None
