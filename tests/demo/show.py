"""The demo from start to end. Exit code 0 if every sha256 is equal and, with the limit, ten stripes are worth five."""

import argparse
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from tests.demo.place import Loopback, Place, namespaces
from tests.demo.screen import Screen
from tests.demo.signals import Interrupted, Signals
from tests.demo.tunnel import tunnel
from tests.demo.web import FILE, MIB, DemoError, Download, download, make_file, programs, web_server
from tests.netlab import LabError, NamespacesRefused, RunVoid

# Stripes (0: directly) and MiB: about ten seconds each at 10 Mbit/s a stripe. Quick: two.
_PLAN = {0: 12, 1: 12, 10: 100, 40: 288}
_QUICK = {0: 2, 1: 2, 10: 16, 40: 48}
_LEAST_GAIN = 5.0
"""Of ten stripes over none."""

_SIGNALLED = 128


def main(signals: Signals) -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.demo", description="Downloads a file in four ways.")
    arguments.add_argument("--quick", action="store_true", help="smaller files: rougher figures")
    arguments.add_argument("--loopback", action="store_true", help="as where namespaces are refused: nothing limits")
    options = arguments.parse_args()
    plan = _QUICK if options.quick else _PLAN
    with Screen() as screen:
        try:
            if not options.loopback:
                try:
                    return _run(namespaces(), plan, screen, signals)
                except NamespacesRefused as refused:
                    screen.say(f"Network namespaces are refused here ({refused}).")
            return _run(nullcontext(Loopback()), plan, screen, signals)
        except (Interrupted, DemoError, LabError, OSError) as error:
            if signals.noted:  # whatever came of it
                screen.say("\nInterrupted. Nothing is left running.")
                return _SIGNALLED + signals.noted
            screen.say(f"make demo: {error}")
            return 1


def _run(where: AbstractContextManager[Place], plan: dict[int, int], screen: Screen, signals: Signals) -> int:
    found = programs()
    signals.check()
    sizes = {stripes: size * MIB for stripes, size in plan.items()}
    with tempfile.TemporaryDirectory(prefix="forwarder-demo-") as name, where as place:
        folder = Path(name)
        _introduce(place, screen)
        digests = make_file(folder, list(sizes.values()), signals)
        results: dict[int, Download] = {}
        with web_server(place, found["nginx"], folder, signals) as web_port:
            for stripes, size in sizes.items():
                bar = screen.begin(_name(stripes), size)
                way: AbstractContextManager[int] = nullcontext(web_port)
                host = place.server
                if stripes:
                    way, host = tunnel(place, folder / str(stripes), stripes, web_port, signals), "127.0.0.1"
                with way as port:
                    results[stripes] = download(
                        place,
                        found["curl"],
                        f"http://{host}:{port}/{FILE}",
                        folder,
                        digests[size],
                        size,
                        signals,
                        bar.on_progress,
                    )
                bar.end(results[stripes])
        return _judge(place, results, screen)


def _introduce(place: Place, screen: Screen) -> None:
    if place.lab is None:
        screen.say("On loopback, where nothing limits a connection: this shows that it works, not what it gains.")
    else:
        screen.say(
            "Two hosts (namespaces), 50 ms apart, on a link of 500 Mbit/s that gives each connection 10 Mbit/s.\n"
            "nginx serves random bytes, curl downloads them. Speeds are of what curl writes, from connect to end;\n"
            f"congestion control is {place.congestion} everywhere."
        )


def _judge(place: Place, results: dict[int, Download], screen: Screen) -> int:
    limited = place.lab is not None
    screen.finish({_name(stripes): result for stripes, result in results.items()}, compare=limited)
    if not all(result.equal for result in results.values()):
        screen.say("FAILED: what arrived is not what was served.")
        return 1
    gain = results[10].mbit_s / results[0].mbit_s
    if place.lab is not None:
        try:
            place.lab.check()
        except RunVoid as void:
            screen.say(f"This machine was too busy for exact figures: {void}.")
    if limited and gain < _LEAST_GAIN:
        screen.say(f"FAILED: 10 stripes are {gain:.1f} times as fast as none; expected at least {_LEAST_GAIN:g} times.")
        return 1
    return 0


def _name(stripes: int) -> str:
    return "directly" if not stripes else f"through {stripes} stripe{'s' * (stripes > 1)}"
