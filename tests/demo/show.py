"""The demo from start to end. Exit code 0 if every sha256 is equal and, with the limit, ten stripes are worth five and
ten ports three."""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tests.demo import kcptun
from tests.demo.place import Loopback, Place, namespaces
from tests.demo.screen import Screen
from tests.demo.signals import Interrupted, Signals
from tests.demo.tunnel import spray, stripes
from tests.demo.web import FILE, MIB, DemoError, Download, download, make_file, programs, web_server
from tests.netlab import LabError, NamespacesRefused, RunVoid


@dataclass(frozen=True, slots=True)
class Way:
    """What is downloaded that way, in MiB: as much as takes some seconds, or a second or two where it is to be quick.

    `window`: packets that kcptun has under way, since it knows no congestion; 0: not through kcptun.
    """

    name: str
    mib: int
    quick_mib: int
    stripes: int = 0
    window: int = 0
    sprayed: bool = False


_DIRECT, _TEN = Way("directly", 8, 2), Way("through 10 stripes", 72, 16, stripes=10)
_STRIPED = (_DIRECT, Way("through 1 stripe", 8, 2, stripes=1), _TEN, Way("through 40 stripes", 216, 48, stripes=40))
# Of some windows, the fastest for each: where more is under way, more of it is dropped and sent again.
_KCPTUN = Way("kcptun directly", 5, 2, window=128)
_SPRAYED = Way("kcptun through 10 ports", 40, 16, window=640, sprayed=True)
_LEAST_GAINS = ((_TEN, _DIRECT, 5.0), (_SPRAYED, _KCPTUN, 3.0))

_SIGNALLED = 128


def main(signals: Signals) -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.demo", description="Downloads a file in six ways.")
    arguments.add_argument("--quick", action="store_true", help="smaller files: rougher figures")
    arguments.add_argument("--loopback", action="store_true", help="as where namespaces are refused: nothing limits")
    options = arguments.parse_args()
    with Screen() as screen:
        try:
            if not options.loopback:
                try:
                    return _run(namespaces(), options.quick, screen, signals)
                except NamespacesRefused as refused:
                    screen.say(f"Network namespaces are refused here ({refused}).")
            return _run(nullcontext(Loopback()), options.quick, screen, signals)
        except (Interrupted, DemoError, LabError, OSError) as error:
            if signals.noted:  # whatever came of it
                screen.say("\nInterrupted. Nothing is left running.")
                return _SIGNALLED + signals.noted
            screen.say(f"make demo: {error}")
            return 1


def _run(where: AbstractContextManager[Place], quick: bool, screen: Screen, signals: Signals) -> int:
    found = programs()
    signals.check()
    ways = [*_STRIPED, *([_KCPTUN, _SPRAYED] if kcptun.programs() else [])]
    sizes = {way: (way.quick_mib if quick else way.mib) * MIB for way in ways}
    with tempfile.TemporaryDirectory(prefix="forwarder-demo-") as name, where as place:
        folder = Path(name)
        _introduce(place, screen, _KCPTUN in ways)
        digests = make_file(folder, list(sizes.values()), signals)
        results: dict[Way, Download] = {}
        with web_server(place, found["nginx"], folder, signals) as web_port:
            for way, size in sizes.items():
                bar = screen.begin(way.name, size)
                with _open(place, way, folder / way.name.replace(" ", "-"), web_port, signals) as at:
                    results[way] = download(
                        place,
                        found["curl"],
                        f"http://{at}/{FILE}",
                        folder,
                        digests[size],
                        size,
                        signals,
                        bar.on_progress,
                    )
                bar.end(results[way])
        return _judge(place, results, screen)


@contextlib.contextmanager
def _open(place: Place, way: Way, folder: Path, web_port: int, signals: Signals) -> Iterator[str]:
    """Yields address and port for curl to connect to."""
    with contextlib.ExitStack() as opened:
        if way.window:
            folder.mkdir()
            found = kcptun.programs()
            assert found is not None
            client, server = found
            to = opened.enter_context(kcptun.server(place, server, folder, way.window, web_port, signals))
            remote = f"{place.server}:{to}"
            if way.sprayed:
                remote = f"127.0.0.1:{opened.enter_context(spray(place, folder / 'forwarder', to, signals))}"
            port = opened.enter_context(kcptun.client(place, client, folder, way.window, remote, signals))
            yield f"127.0.0.1:{port}"
        elif way.stripes:
            port = opened.enter_context(stripes(place, folder, way.stripes, web_port, signals))
            yield f"127.0.0.1:{port}"
        else:
            yield f"{place.server}:{web_port}"


def _introduce(place: Place, screen: Screen, with_kcptun: bool) -> None:
    if place.lab is None:
        screen.say("On loopback, where nothing limits a connection: this shows that it works, not what it gains.")
    else:
        screen.say(
            "Two hosts (namespaces), 50 ms apart, on a link of 500 Mbit/s that gives each connection 10 Mbit/s.\n"
            "nginx serves random bytes, curl downloads them. Speeds are of what curl writes, from connect to end;\n"
            f"congestion control is {place.congestion} everywhere."
        )
    if not with_kcptun:
        screen.say("The part with kcptun is left out: it is not installed (apt-get install kcptun).")
    elif place.lab is not None:
        screen.say("kcptun carries TCP in UDP; of a connection's datagrams, those above 10 Mbit/s are dropped.")


def _judge(place: Place, results: dict[Way, Download], screen: Screen) -> int:
    bases = {way.name: (_KCPTUN if way.window else _DIRECT).name for way in results} if place.lab is not None else {}
    screen.finish({way.name: result for way, result in results.items()}, bases)
    if not all(result.equal for result in results.values()):
        screen.say("FAILED: what arrived is not what was served.")
        return 1
    if place.lab is None:
        return 0
    try:
        place.lab.check()
    except RunVoid as void:
        screen.say(f"This machine was too busy for exact figures: {void}.")
    failed = False
    for way, base, least in _LEAST_GAINS:
        if way in results and (gain := results[way].mbit_s / results[base].mbit_s) < least:
            screen.say(f"FAILED: {way.name} it is {gain:.1f} times as fast; expected at least {least:g} times.")
            failed = True
    return int(failed)
