"""What `doctor --fix` changes, and that it lowers nothing."""

from pathlib import Path

import pytest

from forwarder.doctor.examine import examine
from forwarder.doctor.finding import Setting, Status
from forwarder.doctor.mend import FILE, mend, merged
from forwarder.doctor.subject import Subject
from tests.forwarder.picture import Picture


@pytest.fixture
def host(tmp_path: Path) -> Picture:
    return Picture(tmp_path)


def test_what_is_too_small_is_raised_for_now_and_for_every_boot(host: Picture) -> None:
    host.set("net.core.somaxconn", "128")
    host.set("net.ipv4.tcp_rmem", "8192 262144 6291456")
    host.set("net.netfilter.nf_conntrack_max", "65536")
    done = mend(host, examine(host, Subject()))
    assert [(change.key, change.before, change.after) for change in done.changes] == [
        ("net.core.somaxconn", "128", "4096"),
        ("net.ipv4.tcp_rmem", "8192 262144 6291456", "8192 262144 16777216"),
        ("net.netfilter.nf_conntrack_max", "65536", "131072"),
    ]
    assert host.get("net.ipv4.tcp_rmem") == "8192 262144 16777216" and done.refused == []
    lines = host.path(FILE).read_text().splitlines()
    assert lines[0].startswith("# Set by `forwarder doctor --fix`")
    assert lines[1:] == [
        "net.core.somaxconn = 4096",
        "net.ipv4.tcp_rmem = 8192 262144 16777216",
        "-net.netfilter.nf_conntrack_max = 131072",
    ]
    assert host.path(FILE).stat().st_mode & 0o777 == 0o644
    assert [file.name for file in host.path(FILE).parent.iterdir() if file.name.startswith(".")] == []
    assert not any(each.status is Status.SHORTFALL for each in examine(host, Subject()))


def test_host_that_lacks_nothing_is_left_alone(host: Picture) -> None:
    done = mend(host, examine(host, Subject()))
    assert (done.changes, done.refused, done.notes) == ([], [], [])
    assert not host.path(FILE).exists()


def test_buckets_are_mended_beside_the_table(host: Picture) -> None:
    host.set("net.netfilter.nf_conntrack_max", "16384")
    host.set("net.netfilter.nf_conntrack_buckets", "4096")
    keys = [change.key for change in mend(host, examine(host, Subject())).changes]
    assert keys == ["net.netfilter.nf_conntrack_max", "net.netfilter.nf_conntrack_buckets"]
    assert host.get("net.netfilter.nf_conntrack_buckets") == "32768"


def test_what_was_raised_meanwhile_is_not_lowered(host: Picture) -> None:
    host.set("net.core.somaxconn", "128")
    findings = examine(host, Subject())
    host.set("net.core.somaxconn", "65535")
    assert mend(host, findings).changes[0].after == "65535"


def test_what_cannot_be_set_stays_and_is_not_in_the_file(host: Picture) -> None:
    host.set("net.core.somaxconn", "128")
    host.set("net.core.rmem_max", "212992")
    findings = examine(host, Subject())
    host.remove("net.core.rmem_max")
    host.path("proc/sys/net/core/rmem_max").mkdir()
    done = mend(host, findings)
    assert [(change.key, bool(change.reason)) for change in done.refused] == [("net.core.rmem_max", True)]
    assert "rmem_max" not in host.path(FILE).read_text()


def test_file_that_cannot_be_written_is_told(host: Picture) -> None:
    host.set("net.core.somaxconn", "128")
    host.path(FILE).mkdir()
    done = mend(host, examine(host, Subject()))
    assert done.changes and "the changes last until the next boot" in done.notes[0]
    assert [file.name for file in host.path(FILE).parent.iterdir() if file.name.startswith(".")] == []


def test_file_that_comes_later_is_told(host: Picture) -> None:
    host.set("net.core.somaxconn", "128")
    host.write("etc/sysctl.d/10-early.conf", "net.core.somaxconn = 1\n")
    host.write("etc/sysctl.d/99-late.conf", "# net.core.somaxconn = 2\nnet/core/somaxconn=3\n")
    notes = mend(host, examine(host, Subject())).notes
    assert notes[1:] == [
        "/etc/sysctl.d/99-late.conf: comes later at boot and sets net.core.somaxconn = 3: take it out there"
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["net.core.somaxconn=200\n"], "net.core.somaxconn = 4096\n"),
        (["# mine\n", "net.core.somaxconn = 65535"], "# mine\nnet.core.somaxconn = 65535\n"),
        (["net.core.somaxconn = many\n"], "net.core.somaxconn = 4096\n"),
        (["vm.swappiness = 1\n", "\n"], "vm.swappiness = 1\n\nnet.core.somaxconn = 4096\n"),
    ],
)
def test_lines_that_the_file_had_stay(old: list[str], new: str) -> None:
    assert merged(old, [Setting("net.core.somaxconn", "4096")]) == new
