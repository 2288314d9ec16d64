"""Where an instance's settings come from, the first time and again: its file, and what the command line said."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from forwarder import config
from forwarder.config import Loaded
from forwarder.errors import Unavailable
from forwarder.kernel import check_congestion
from workers.settings import Settings

Level = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Source:
    """A configuration file by its absolute path; `workers` and `log_level` go before what it says."""

    file: Path
    workers: int | None = None
    log_level: Level | None = None

    def read(self) -> Loaded:
        """Raises ForwarderError."""
        try:
            loaded = config.load(self.file)
            return Loaded(self.applied(loaded.settings), loaded.warnings)
        except OSError as error:  # no descriptor is free to look at this host
            raise Unavailable(f"{self.file}: {str(error.strerror).lower()}") from None

    def applied(self, settings: Settings) -> Settings:
        """The file's settings, checked against this host, with the command line's. Raises ConfigError."""
        check_congestion(self.file, settings)
        if self.workers is not None:
            settings = replace(settings, workers=self.workers or config.usable_cores())
        if self.log_level is not None:
            settings = replace(settings, log=replace(settings.log, level=self.log_level))
        return settings
