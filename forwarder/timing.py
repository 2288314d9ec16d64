"""How patient the supervisor is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """A worker beats once a tick; one that dies before `young_s` delays the next."""

    tick_s: float = 0.5
    hung_ticks: int = 4
    start_ticks: int = 60
    young_s: float = 10.0
    backoff_first_s: float = 0.25
    backoff_max_s: float = 5.0
    early_deaths_max: int = 5
    drain_margin_s: float = 5.0
    quit_grace_s: float = 1.0
    status_s: float = 2.0
    predecessor_s: float = 2.0  # for the ports of an instance that was killed a moment ago

    def respawn_delay_s(self, young_deaths: int) -> float:
        """How long a slot stays empty: not at all after the first death, then longer while they keep dying young."""
        if young_deaths < 2:
            return 0.0
        return min(self.backoff_max_s, self.backoff_first_s * 2.0 ** min(young_deaths - 2, 32))
