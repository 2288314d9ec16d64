"""The real command tells a service manager how it is."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.free_ports import free_port
from tests.system.test_exit_codes import ROOT, write_client


def test_service_manager_hears_of_start_reload_health_and_stop(tmp_path: Path) -> None:
    client = write_client(tmp_path, free_port())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(15)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
        command = [sys.executable, "-m", "forwarder", "start", "-c", str(client)]
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stderr=subprocess.DEVNULL)

        def next_told(name: str) -> list[str]:
            while not (message := manager.recv(4096).decode()).startswith(f"{name}=1"):
                pass
            return message.split("\n")

        try:
            assert next_told("READY") == ["READY=1", "STATUS=serves (workers: 1)"]
            next_told("WATCHDOG")
            process.send_signal(signal.SIGHUP)
            next_told("RELOADING")
            next_told("READY")
            next_told("WATCHDOG")
            process.send_signal(signal.SIGTERM)
            patience_us = next_told("STOPPING")[1].partition("=")[2]
            assert int(patience_us) > 30e6
            assert process.wait(15) == 0
        finally:
            process.kill()
            process.wait()
