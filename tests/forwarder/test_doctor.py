"""Each check of `doctor` on a picture of a host: what is lacking is named, with the command that mends it."""

import dataclasses
import json
import os
import shlex
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from forwarder.doctor.command import run_doctor
from forwarder.doctor.examine import examine
from forwarder.doctor.finding import Finding, Status
from forwarder.doctor.host import Unseen
from forwarder.doctor.report import as_json, print_report
from forwarder.doctor.subject import Subject, subject_of
from forwarder.doctor.wanted import SYSCTLS
from forwarder.errors import NotPermitted
from tests.forwarder.examples import CLIENT, EXAMPLES, KEY_TEXT, SERVER, SPRAY_TUNNELS, write
from tests.forwarder.picture import LIMITS, STATUS, Picture

ROOT = Path(__file__).parents[2]
BOTH_MODES = {role: EXAMPLES[role] + SPRAY_TUNNELS[role] for role in EXAMPLES}


@pytest.fixture
def host(tmp_path: Path) -> Picture:
    return Picture(tmp_path / "root")


def subject(tmp_path: Path, host: Picture, role: str, text: str | None = None, **changes: Any) -> Subject:
    """A configuration that no instance runs; its files are in the picture, too."""
    body = BOTH_MODES[role] if text is None else text
    if "[control]" not in body:
        body = f'{body}[control]\nsocket = "{role}.sock"\n'
    found = subject_of(write(tmp_path, role, body))
    for each in found.key_files:
        host.write(str(each.path), each.path.read_text())
        host.path(str(each.path)).chmod(0o600)
    return dataclasses.replace(found, **changes)


def finding(host: Picture, of: Subject, name: str) -> Finding:
    found = [each for each in examine(host, of) if each.name == name]
    assert len(found) == 1, [each.name for each in examine(host, of)]
    return found[0]


def lacking(host: Picture, of: Subject) -> list[str]:
    return [each.name for each in examine(host, of) if each.status is Status.SHORTFALL]


@pytest.mark.parametrize("role", [None, "client", "server"])
def test_host_that_lacks_nothing(tmp_path: Path, host: Picture, role: str | None) -> None:
    of = Subject() if role is None else subject(tmp_path, host, role)
    findings = examine(host, of)
    assert lacking(host, of) == []
    assert {each.status for each in findings} <= {Status.OK, Status.NOT_APPLICABLE}, findings
    assert len({each.name for each in findings}) == len(findings) > 20


# Kernel settings


@pytest.mark.parametrize("wanted", SYSCTLS, ids=lambda wanted: wanted.key)
def test_setting_that_is_too_small(host: Picture, wanted: Any) -> None:
    host.set(wanted.key, " ".join(map(str, (*wanted.before, wanted.value // 2))))
    found = finding(host, Subject(), wanted.key)
    assert (found.status, found.found) == (Status.SHORTFALL, str(wanted.value // 2)) and found.why
    assert found.setting is not None and found.setting.key == wanted.key
    words = shlex.split(found.command)
    assert words[:2] == ["sysctl", "-w"] and words[2].startswith(f"{wanted.key}=")
    assert int(words[2].split()[-1].split("=")[-1]) >= wanted.value


def test_sysctl_file_sets_what_doctor_wants() -> None:
    text = (ROOT / "deploy/sysctl/60-forwarder.conf").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines == [wanted.line for wanted in SYSCTLS]


def test_setting_that_is_larger_is_well(host: Picture) -> None:
    host.set("net.core.somaxconn", "65535")
    assert finding(host, Subject(), "net.core.somaxconn").status is Status.OK


def test_handshake_queue_is_no_shortfall_while_there_are_cookies(host: Picture) -> None:
    host.set("net.ipv4.tcp_max_syn_backlog", "128")
    host.set("net.ipv4.tcp_syncookies", "1")
    found = finding(host, Subject(), "net.ipv4.tcp_max_syn_backlog")
    assert found.status is Status.HINT and found.setting is not None


def test_setting_that_cannot_be_seen_is_not_known(host: Picture) -> None:
    host.remove("net.core.rmem_max")
    host.denied.add("proc/sys/net/core/wmem_max")
    host.set("net.core.somaxconn", "many")
    for key in ("net.core.rmem_max", "net.core.wmem_max", "net.core.somaxconn"):
        assert finding(host, Subject(), key).status is Status.UNKNOWN


def test_buffers_need_not_exceed_the_windows(tmp_path: Path, host: Picture) -> None:
    host.set("net.ipv4.tcp_rmem", "4096 131072 6291456")
    small = CLIENT.replace("local_port", 'window_max = "2MiB"\nlocal_port')
    assert finding(host, subject(tmp_path, host, "client", small), "net.ipv4.tcp_rmem").wanted == str(4 << 20)
    assert finding(host, subject(tmp_path, host, "client", CLIENT), "net.ipv4.tcp_rmem").wanted == str(16 << 20)


def test_modes_that_are_not_configured_need_nothing(tmp_path: Path, host: Picture) -> None:
    of = subject(tmp_path, host, "server", SERVER)
    for name in ("net.core.rmem_max", "net.core.wmem_max", "capabilities", "devices", "firewall", "pcap"):
        assert finding(host, of, name).status is Status.NOT_APPLICABLE


def test_conntrack_that_is_not_loaded_needs_nothing(host: Picture) -> None:
    host.remove("net.netfilter.nf_conntrack_max")
    for name in ("net.netfilter.nf_conntrack_max", "firewall"):
        assert finding(host, Subject(), name).status is Status.NOT_APPLICABLE


def test_conntrack_table_for_many_tunnels(tmp_path: Path, host: Picture) -> None:
    more = SERVER.replace("remote_port = 80", "remote_port = 80\nmax_streams = 1000000")
    found = finding(host, subject(tmp_path, host, "server", more), "net.netfilter.nf_conntrack_max")
    assert (found.status, found.wanted) == (Status.SHORTFALL, "2000000")


def test_conntrack_table_that_is_nearly_full(host: Picture) -> None:
    host.set("net.netfilter.nf_conntrack_count", "250000")
    found = finding(host, Subject(), "conntrack entries in use")
    assert found.status is Status.SHORTFALL and "nf_conntrack_max=524288" in found.command


def test_too_few_local_ports(tmp_path: Path, host: Picture) -> None:
    host.set("net.ipv4.ip_local_port_range", "60000 60999")
    found = finding(host, Subject(), "net.ipv4.ip_local_port_range")
    assert found.status is Status.SHORTFALL and found.found.endswith(": 1000 ports")
    assert finding(host, subject(tmp_path, host, "client"), found.name).status is Status.OK
    thousand = CLIENT.replace("local_port", "somaxconn = 1000\nlocal_port")
    assert finding(host, subject(tmp_path, host, "client", thousand), found.name).wanted == "2000 ports"


def test_ports_that_any_connection_may_take(tmp_path: Path, host: Picture) -> None:
    of = subject(tmp_path, host, "server", BOTH_MODES["server"].replace("10000-10005", "40000-40005"))
    found = finding(host, of, "net.ipv4.ip_local_reserved_ports")
    assert (found.status, found.command) == (Status.HINT, "sysctl -w net.ipv4.ip_local_reserved_ports=40000-40005")
    host.set("net.ipv4.ip_local_reserved_ports", "1,40000-50000")
    assert finding(host, of, "net.ipv4.ip_local_reserved_ports").status is Status.OK


@pytest.mark.parametrize(("everywhere", "there", "status"), [(0, 1, "shortfall"), (1, 0, "shortfall"), (2, 1, "ok")])
def test_strict_reverse_path_filter_with_several_sources(
    tmp_path: Path, host: Picture, everywhere: int, there: int, status: str
) -> None:
    sources = CLIENT.replace("local_port", 'source = ["192.0.2.1", "198.51.100.1"]\nlocal_port')
    for device, mode in (("all", everywhere), ("eth0", 0), ("eth1", there)):
        host.set(f"net.ipv4.conf.{device}.rp_filter", str(mode))
    found = finding(host, subject(tmp_path, host, "client", sources), "net.ipv4.conf.eth1.rp_filter")
    assert found.status == status and (status == "ok" or found.command == "sysctl -w net.ipv4.conf.eth1.rp_filter=2")


def test_source_that_is_not_here(tmp_path: Path, host: Picture) -> None:
    sources = CLIENT.replace("local_port", 'source = ["192.0.2.1", "192.0.2.9"]\nlocal_port')
    host.set("net.ipv4.conf.all.rp_filter", "0")
    host.set("net.ipv4.conf.eth0.rp_filter", "0")
    assert lacking(host, subject(tmp_path, host, "client", sources)) == ["source 192.0.2.9"]


def test_congestion_control_that_is_missing(tmp_path: Path, host: Picture) -> None:
    host.set("net.ipv4.tcp_available_congestion_control", "reno cubic")
    host.congestions = {"cubic"}
    found = finding(host, Subject(), "congestion control")
    assert (found.status, found.command) == (Status.HINT, "modprobe tcp_bbr")
    named = CLIENT.replace("local_port", 'congestion = "bbr"\nlocal_port')
    assert lacking(host, subject(tmp_path, host, "client", named)) == ["congestion bbr"]


# What an instance may use


def test_too_few_open_files(tmp_path: Path, host: Picture) -> None:
    host.write("proc/self/limits", LIMITS.format(1024, 1024))
    found = finding(host, subject(tmp_path, host, "client"), "open files")
    assert (found.status, found.found) == (Status.OK, "soft 1024, hard 1024")
    many = CLIENT.replace("local_port", "somaxconn = 4096\nlocal_port")
    found = finding(host, subject(tmp_path, host, "client", many), "open files")
    assert found.status is Status.SHORTFALL and f"LimitNOFILE={found.wanted}" in found.command
    assert int(found.wanted) > 2 * 4096
    host.write("proc/self/limits", LIMITS.format("unlimited", "unlimited"))
    assert finding(host, Subject(), "open files").status is Status.OK


def test_open_files_of_the_running_instance(tmp_path: Path, host: Picture) -> None:
    of = subject(tmp_path, host, "client", pids=(10, 11))
    host.write("proc/10/limits", LIMITS.format(4096, 4096))
    host.write("proc/11/limits", LIMITS.format(256, 4096))
    host.write("proc/11/status", STATUS.format(0))
    host.path("proc/10/fd").mkdir()
    found = finding(host, of, "open files, running instance")
    assert (found.status, found.found) == (Status.SHORTFALL, "soft 256, hard 4096")
    assert "for pid in 10 11; do prlimit --pid $pid" in found.command


def test_memory_that_is_scarce(tmp_path: Path, host: Picture) -> None:
    of = subject(tmp_path, host, "client", CLIENT.replace("[auth]", "workers = 8\n[auth]"))
    host.write("proc/meminfo", "MemAvailable:   204800 kB\n")
    found = finding(host, of, "memory")
    assert (found.status, found.command) == (Status.SHORTFALL, "workers = 3  # in FILE")
    host.write("proc/meminfo", "MemAvailable:   2048000 kB\n")
    assert finding(host, of, "memory").status is Status.HINT
    host.write("proc/self/cgroup", "0::/system.slice/x.service\n")
    host.write("sys/fs/cgroup/system.slice/x.service/memory.max", f"{100 << 20}\n")
    assert "control group" in finding(host, of, "memory").found


def test_log_without_room_or_place(tmp_path: Path, host: Picture) -> None:
    of = subject(tmp_path, host, "client", CLIENT + '[log]\nfile = "/var/log/forwarder/client.log"\n')
    found = finding(host, of, "log file")
    assert (found.status, found.command) == (Status.SHORTFALL, "mkdir -p /var/log/forwarder")
    host.path("/var/log/forwarder").mkdir(parents=True)
    assert finding(host, of, "log file").status is Status.OK
    host.free = 1 << 20
    assert finding(host, of, "log file").status is Status.SHORTFALL


@pytest.mark.parametrize("mode", [0o644, 0o602, 0o620])
def test_key_that_others_may_read_or_write(tmp_path: Path, host: Picture, mode: int) -> None:
    of = subject(tmp_path, host, "client")
    host.path(str(tmp_path / "laptop.key")).chmod(mode)
    found = finding(host, of, "key of auth")
    assert (found.status, found.command) == (Status.SHORTFALL, f"chmod o=,g-w {tmp_path / 'laptop.key'}")


def test_key_that_is_missing_or_none(tmp_path: Path, host: Picture) -> None:
    of = subject(tmp_path, host, "server")
    host.path(str(tmp_path / "laptop.key")).write_text("mine")
    assert "3 bytes" in finding(host, of, 'key of client "laptop"').found
    host.path(str(tmp_path / "laptop.key")).unlink()
    assert "forwarder genkey" in finding(host, of, 'key of client "laptop"').command


def test_key_that_this_user_may_not_read(tmp_path: Path, host: Picture) -> None:
    of = subject(tmp_path, host, "client")
    host.denied.add(str(tmp_path / "laptop.key"))
    assert finding(host, of, "key of auth").status is Status.UNKNOWN


def test_configuration_is_read_without_its_keys(tmp_path: Path) -> None:
    file = write(tmp_path, "client")
    (tmp_path / "laptop.key").unlink()
    settings = subject_of(file).settings
    assert settings is not None and settings.keys[0].secret == bytes(32)


def test_key_in_the_configuration_itself(tmp_path: Path, host: Picture) -> None:
    of = subject(tmp_path, host, "client", CLIENT.replace('key_file = "laptop.key"', f'key = "{KEY_TEXT}"'))
    host.path(str(tmp_path / "client.toml")).chmod(0o644)
    assert lacking(host, of) == ["key of client.toml"]


# Ports and names


def listening(host: Picture, table: str, address: str, inode: int) -> None:
    state = "0A" if table.startswith("tcp") else "07"
    rows = f"   0: {address} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1\n"
    host.write(f"proc/net/{table}", "  sl  local_address rem_address   st\n" + rows)


@pytest.mark.parametrize(
    ("role", "table", "address", "name"),
    [
        ("client", "tcp", "0100007F:1F90", "ports of web"),
        ("client", "tcp", "00000000:1F90", "ports of web"),
        ("client", "udp6", f"{'0' * 32}:7530", "ports of kcp"),
        ("server", "tcp6", f"{'0' * 32}:2328", "ports of web"),
        ("server", "tcp", "0100007F:01BB", "ports of kcp"),
    ],
)
def test_port_that_is_taken(tmp_path: Path, host: Picture, role: str, table: str, address: str, name: str) -> None:
    listening(host, table, address, 4711)
    of = subject(tmp_path, host, role)
    assert lacking(host, of) == [name]
    assert "lnp sport = :" in finding(host, of, name).command
    hidden = dataclasses.replace(of, unseen="permission denied")
    assert finding(host, hidden, name).status is Status.UNKNOWN


def test_port_that_the_own_instance_holds(tmp_path: Path, host: Picture) -> None:
    listening(host, "tcp", "0100007F:1F90", 4711)
    of = subject(tmp_path, host, "client", pids=(10,))
    host.path("proc/10/fd").mkdir(parents=True)
    host.path("proc/10/fd/7").symlink_to("socket:[4711]")
    host.write("proc/10/limits", LIMITS.format(1 << 20, 1 << 20))
    assert finding(host, of, "ports of web").found == "tcp 127.0.0.1:8080: held by pid 10"


def test_port_that_the_own_instance_does_not_hold_yet(tmp_path: Path, host: Picture) -> None:
    of = subject(tmp_path, host, "client", pids=(10,))
    host.path("proc/10/fd").mkdir(parents=True)
    found = finding(host, of, "ports of web")
    assert found.status is Status.HINT and found.command.startswith("forwarder reload -c ")


def test_port_of_a_named_address(tmp_path: Path, host: Picture) -> None:
    host.names["localhost"] = ["::1", "127.0.0.1"]
    listening(host, "tcp", "0100007F:1F90", 4711)
    of = subject(tmp_path, host, "client", CLIENT.replace("local_port = 8080", 'local = "localhost:8080"'))
    assert lacking(host, of) == ["ports of web"]


def test_port_of_the_metrics_is_a_child_s(tmp_path: Path, host: Picture) -> None:
    listening(host, "tcp", "0100007F:24F8", 4711)
    text = BOTH_MODES["client"] + '[metrics]\nlisten = "127.0.0.1:9464"\n'
    assert lacking(host, subject(tmp_path, host, "client", text)) == ["port of the metrics"]
    of = subject(tmp_path, host, "client", text, pids=(10,))
    host.write("proc/10/task/10/children", "12 13 ")
    for pid in (10, 13):
        host.path(f"proc/{pid}/fd").mkdir(parents=True)
    host.path("proc/13/fd/7").symlink_to("socket:[4711]")
    assert finding(host, of, "port of the metrics").found == "tcp 127.0.0.1:9464: held by pid 10"


def test_other_port_or_address_is_not_in_the_way(tmp_path: Path, host: Picture) -> None:
    listening(host, "tcp", "0200007F:1F90", 1)
    listening(host, "udp", "0100007F:1F90", 2)
    assert lacking(host, subject(tmp_path, host, "client")) == []


def test_low_port_without_the_right_to_it(tmp_path: Path, host: Picture) -> None:
    host.write("proc/self/status", STATUS.format(0))
    of = subject(tmp_path, host, "server")
    assert "low ports of kcp" in lacking(host, of)
    host.set("net.ipv4.ip_unprivileged_port_start", "80")
    assert "low ports of kcp" not in lacking(host, of)


def test_name_that_is_not_known(tmp_path: Path, host: Picture) -> None:
    host.names.clear()
    found = finding(host, subject(tmp_path, host, "client"), "name server.example.net")
    assert (found.status, found.found) == (Status.SHORTFALL, "name or service not known")


# Fake TCP


def test_rights_that_fake_tcp_lacks(tmp_path: Path, host: Picture) -> None:
    host.write("proc/self/status", STATUS.format(1 << 12))
    found = finding(host, subject(tmp_path, host, "client"), "CAP_NET_RAW")
    assert found.status is Status.SHORTFALL and "AmbientCapabilities=CAP_NET_RAW" in found.command
    host.write("proc/self/status", STATUS.format(1 << 13))
    assert finding(host, Subject(), "CAP_NET_ADMIN").status is Status.HINT
    assert finding(host, Subject(), "CAP_NET_RAW").status is Status.OK
    host.write("proc/self/status", STATUS.format(0))
    assert finding(host, Subject(), "CAP_NET_RAW").status is Status.HINT


def test_rights_are_those_of_the_running_workers(tmp_path: Path, host: Picture) -> None:
    of = subject(tmp_path, host, "client", pids=(10, 11, 12))
    host.path("proc/10/fd").mkdir(parents=True)
    host.write("proc/11/status", STATUS.format(3 << 12))
    host.write("proc/12/status", STATUS.format(0))
    assert finding(host, of, "CAP_NET_RAW").found == "its workers: not held"


@pytest.mark.parametrize(
    ("device", "name", "command"),
    [
        (None, "device eth7", "ip -brief link"),
        ((False, False, 1500), "device eth7", "ip link set eth7 up"),
        ((True, False, 1500), "device eth7", "ip link set eth7 up"),
        ((True, True, 576), "device eth7, MTU", "ip link set eth7 mtu 1400"),
    ],
)
def test_device_that_will_not_do(tmp_path: Path, host: Picture, device: Any, name: str, command: str) -> None:
    if device is not None:
        host.devices["eth7"] = device
    text = BOTH_MODES["server"].replace("ports", 'dev = "eth7"\nmtu = 1400\nports', 1)
    of = subject(tmp_path, host, "server", text)
    assert lacking(host, of) == [name] and finding(host, of, name).command == command


def test_offloads_that_are_off(host: Picture) -> None:
    host.its_offloads = {"gso": False, "gro": False}
    for offload in ("gso", "gro"):
        found = finding(host, Subject(), f"device eth0, {offload}")
        assert (found.status, found.command) == (Status.HINT, f"ethtool -K eth0 {offload} on")


def test_host_without_a_way_out(host: Picture) -> None:
    host.write("proc/net/route", "Iface\tDestination\n")
    assert finding(host, Subject(), "device eth0").status is Status.OK
    host.devices.clear()
    assert finding(host, Subject(), "devices").status is Status.UNKNOWN


def test_pcap_that_is_not_installed(tmp_path: Path, host: Picture) -> None:
    text = BOTH_MODES["server"].replace("ports", 'backend = "pcap"\nports', 1)
    assert lacking(host, subject(tmp_path, host, "server", text)) == ["pcap"]


# The machine


def test_kernel_that_is_too_old(host: Picture) -> None:
    host.set("kernel.osrelease", "4.14.0-rt1")
    found = finding(host, Subject(), "kernel")
    assert found.status is Status.SHORTFALL and "UDP_GRO" in found.why and "BBR" not in found.why


def test_clock_that_nobody_sets_is_a_hint(host: Picture) -> None:
    host.synchronised = False
    assert finding(host, Subject(), "wall clock").status is Status.HINT


def test_container_is_told(host: Picture) -> None:
    host.write(".dockerenv", "")
    host.write("proc/self/uid_map", "         0     100000      65536\n")
    assert finding(host, Subject(), "container").found == "/.dockerenv, a user namespace"


def test_check_that_may_not_look_says_so(host: Picture) -> None:
    host.denied |= {"proc/meminfo", "proc/self/limits", "proc/self/status", "proc/sys/net/ipv4/ip_local_port_range"}
    host.programs["nft"] = Unseen("nft: Operation not permitted")
    host.root_user = False
    unknown = {each.name for each in examine(host, Subject()) if each.status is Status.UNKNOWN}
    assert unknown == {"memory", "open files", "capabilities", "net.ipv4.ip_local_port_range", "firewall"}
    assert finding(host, Subject(), "firewall").found.startswith("only root may see")


# The command


def shortened(host: Picture) -> None:
    host.set("net.core.somaxconn", "128")
    host.set("net.netfilter.nf_conntrack_max", "65536")


def test_report_names_shortfalls_with_reason_and_command(host: Picture) -> None:
    shortened(host)
    findings = examine(host, Subject())
    for width in (40, 80, 200):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        print_report(findings, None, console)
        text = console.export_text()
        assert "    $ sysctl -w net.core.somaxconn=4096\n" in text and "2 shortfalls, 0 hints" in text
        assert all(len(line) <= width or "sysctl" in line or line.startswith("ok ") for line in text.splitlines())


def test_json_has_every_finding(host: Picture) -> None:
    shortened(host)
    document = json.loads(json.dumps(as_json(examine(host, Subject()), None)))
    assert (document["shortfalls"], document["fixed"]) == (2, None)
    assert all(
        set(check) == {"name", "status", "found", "wanted", "why", "command", "fixable"} for check in document["checks"]
    )
    fixable = [check["name"] for check in document["checks"] if check["fixable"]]
    assert fixable == ["net.core.somaxconn", "net.netfilter.nf_conntrack_max"]


def test_exit_code_tells_of_shortfalls(host: Picture, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor(None, False, False, host) == 0
    shortened(host)
    assert run_doctor(None, False, True, host) == 1
    assert run_doctor(None, True, True, host) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["fixed"]["changes"][0] == {"key": "net.core.somaxconn", "before": "128", "after": "4096"}
    assert run_doctor(None, True, False, host) == 0


def test_fix_is_for_root(host: Picture) -> None:
    shortened(host)
    host.root_user = False
    with pytest.raises(NotPermitted, match="only root"):
        run_doctor(None, True, False, host)
    assert host.get("net.core.somaxconn") == "128"


def test_control_socket_without_a_place(tmp_path: Path, host: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    of = subject(tmp_path, host, "client")
    monkeypatch.setattr(Picture, "may_write", lambda self, path: False)
    assert "control socket" in lacking(host, of)


def test_running_instance_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "client", CLIENT + '[control]\nsocket = "sock"\n')
    answers: list[Callable[[], Any]] = []
    monkeypatch.setattr("forwarder.doctor.subject.request", lambda *_: answers.pop()())
    answers.append(lambda: {"pid": 10, "workers": [{"pid": 11}, {"pid": 0}]})
    assert subject_of(file).pids == (10, 11)
    answers.append(lambda: {"pid": 10, "workers": "none"})
    assert "another version" in subject_of(file).unseen
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "sock"))
        monkeypatch.undo()
        assert (subject_of(file).pids, subject_of(file).unseen) == ((), "")
