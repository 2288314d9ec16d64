"""Rules that answer INVALID segments with a reset are found, however they are written; others are let be."""

import json
from pathlib import Path
from typing import Any

import pytest

from forwarder.doctor.finding import Finding, Status
from forwarder.doctor.firewall import firewall
from forwarder.doctor.host import Unseen
from forwarder.doctor.subject import Subject, subject_of
from tests.forwarder.examples import SPRAY_EXAMPLES, write
from tests.forwarder.picture import Picture

RESET = {"reject": {"type": "tcp reset"}}
TCP = {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "tcp"}}
LO = {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "lo"}}
FROM_ONE = {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": "192.0.2.1"}}
ACCEPT: dict[str, Any] = {"accept": None}
DROP: dict[str, Any] = {"drop": None}


def state(*states: str, op: str = "in") -> dict[str, Any]:
    right = states[0] if len(states) == 1 else list(states)
    return {"match": {"op": op, "left": {"ct": {"key": "state"}}, "right": right}}


def dport(*ports: Any, op: str = "==") -> dict[str, Any]:
    right = ports[0] if len(ports) == 1 else {"set": list(ports)}
    return {"match": {"op": op, "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": right}}


def ruleset(*rules: list[dict[str, Any]], other: tuple[list[dict[str, Any]], ...] = (), hook: str = "input") -> str:
    where = {"family": "inet", "table": "filter"}
    items: list[dict[str, Any]] = [
        {"metainfo": {"version": "1.0.6"}},
        {"table": {"family": "inet", "name": "filter"}},
        {"chain": where | {"name": "input", "hook": hook, "prio": 0, "type": "filter"}},
        {"chain": where | {"name": "other"}},
    ]
    for chain, its in (("input", rules), ("other", other)):
        items += [{"rule": where | {"chain": chain, "handle": 10 + at, "expr": expr}} for at, expr in enumerate(its)]
    return json.dumps({"nftables": items})


def look(tmp_path: Path, nft: Any = None, iptables: Any = None, server: bool = False) -> Finding:
    host = Picture(tmp_path / "root")
    host.programs = {name: text for name, text in (("nft", nft), ("iptables-save", iptables)) if text is not None}
    subject = subject_of(write(tmp_path, "server", SPRAY_EXAMPLES["server"])) if server else Subject()
    (found,) = firewall(host, subject)
    return found


@pytest.mark.parametrize(
    "nft",
    [
        ruleset([state("invalid"), RESET]),
        ruleset([state("established", "related"), ACCEPT], [LO, ACCEPT], [TCP, state("invalid"), RESET]),
        ruleset([state("invalid", "new"), {"counter": {"packets": 0, "bytes": 0}}, {"log": None}, RESET]),
        ruleset([state("established", op="!="), TCP, RESET]),
        ruleset([state("invalid"), {"jump": {"target": "other"}}], other=([TCP, RESET],)),
        ruleset([{"goto": {"target": "other"}}], other=([state("new"), ACCEPT], [RESET])),
        ruleset(
            [
                {
                    "vmap": {
                        "key": {"ct": {"key": "state"}},
                        "data": {"set": [["new", ACCEPT], ["invalid", {"jump": {"target": "other"}}]]},
                    }
                }
            ],
            other=([RESET],),
        ),
        ruleset([FROM_ONE, state("invalid"), RESET]),
        ruleset([FROM_ONE, ACCEPT], [TCP, RESET]),
        ruleset([dport(22), ACCEPT], [RESET]),
        ruleset([dport(22, op="!="), RESET]),
        ruleset([state("invalid"), RESET], hook="prerouting"),
    ],
)
def test_nft_rule_that_resets_is_found(tmp_path: Path, nft: str) -> None:
    found = look(tmp_path, nft)
    assert found.status is Status.SHORTFALL, found
    assert found.command.startswith("nft insert rule inet filter ") and found.command.endswith(" ct state invalid drop")


@pytest.mark.parametrize(
    "nft",
    [
        ruleset(),
        ruleset([state("invalid"), DROP], [TCP, RESET]),
        ruleset([state("invalid"), ACCEPT], [TCP, RESET]),
        ruleset([state("established"), RESET]),
        ruleset([state("invalid", op="!="), RESET]),
        ruleset([state("invalid"), {"reject": None}]),
        ruleset([state("invalid"), {"reject": {"type": "icmpx", "expr": "port-unreachable"}}]),
        ruleset([LO, state("invalid"), RESET]),
        ruleset([FROM_ONE, RESET]),
        ruleset([dport(22), RESET]),
        ruleset([state("invalid"), {"jump": {"target": "other"}}], [DROP], other=([{"return": None}], [RESET])),
        ruleset([state("invalid"), RESET], hook="output"),
        ruleset([{"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "udp"}}, RESET]),
        ruleset([{"jump": {"target": "other"}}], other=([{"jump": {"target": "other"}}],)),
        ruleset([{"xt": {"type": "match", "name": "conntrack"}}, {"xt": {"type": "target", "name": "REJECT"}}]),
    ],
)
def test_nft_rules_that_do_not_are_let_be(tmp_path: Path, nft: str) -> None:
    assert look(tmp_path, nft).status is Status.OK


SAVED = "*filter\n:INPUT {policy} [0:0]\n:OUTPUT ACCEPT [0:0]\n:bad - [0:0]\n{rules}COMMIT\n"


def saved(*rules: str, policy: str = "ACCEPT") -> str:
    return SAVED.format(policy=policy, rules="".join(f"-A {rule}\n" for rule in rules))


@pytest.mark.parametrize(
    "rules",
    [
        ["INPUT -m conntrack --ctstate INVALID -j REJECT --reject-with tcp-reset"],
        ["INPUT -p tcp -m state --state INVALID,NEW -j REJECT --reject-with tcp-reset"],
        [
            "INPUT -i lo -j ACCEPT",
            "INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "INPUT -p tcp -m conntrack --ctstate INVALID -j bad",
            'bad -p tcp -m comment --comment "it\\\'s -j DROP" -j REJECT --reject-with tcp-reset',
        ],
        ["INPUT -p tcp -m conntrack ! --ctstate ESTABLISHED -j REJECT --reject-with tcp-reset"],
        ["INPUT -p tcp -m tcp --dport 22 -j ACCEPT", "INPUT -p tcp -j REJECT --reject-with tcp-reset"],
        ["INPUT -j LOG --log-prefix odd", "INPUT -g bad", "bad -p tcp -j REJECT --reject-with tcp-reset"],
        ["INPUT -m comment --comment 'odd -j LOG", "INPUT -p tcp -j REJECT --reject-with tcp-reset"],
    ],
)
def test_iptables_rule_that_resets_is_found(tmp_path: Path, rules: list[str]) -> None:
    found = look(tmp_path, iptables=saved(*rules))
    assert found.status is Status.SHORTFALL and rules[-1] in found.found
    assert found.command.startswith("iptables -I ") and found.command.endswith("--ctstate INVALID -j DROP")


@pytest.mark.parametrize(
    "rules",
    [
        [],
        [
            "INPUT -m conntrack --ctstate INVALID -j DROP",
            "INPUT -p tcp -j REJECT --reject-with tcp-reset",
        ],
        ["INPUT -m conntrack --ctstate INVALID -j REJECT --reject-with icmp-port-unreachable"],
        ["INPUT -p tcp -m conntrack ! --ctstate INVALID -j REJECT --reject-with tcp-reset"],
        ["INPUT -p udp -j REJECT --reject-with tcp-reset"],
        ["INPUT -p tcp -m tcp --dport 1:1024 -j REJECT --reject-with tcp-reset"],
        ["INPUT -s 192.0.2.1/32 -p tcp -j REJECT --reject-with tcp-reset"],
        ["OUTPUT -p tcp -j REJECT --reject-with tcp-reset"],
    ],
)
def test_iptables_rules_that_do_not_are_let_be(tmp_path: Path, rules: list[str]) -> None:
    assert look(tmp_path, iptables=saved(*rules)).status is Status.OK


def test_ports_of_the_configuration_decide(tmp_path: Path) -> None:
    open_port = [dport({"range": [80, 443]}, {"range": [10000, 10005]}), ACCEPT]
    assert look(tmp_path, ruleset(open_port, [TCP, RESET]), server=True).status is Status.OK
    new_only = [state("new"), dport(80), ACCEPT]
    assert look(tmp_path, ruleset(new_only, [TCP, RESET]), server=True).status is Status.SHORTFALL
    rules = saved("INPUT -p tcp -m multiport --dports 80,10000:10005 -j REJECT --reject-with tcp-reset")
    assert look(tmp_path, iptables=rules, server=True).status is Status.SHORTFALL


@pytest.mark.parametrize("nft", ["{}", "nft", '{"nftables": [{"rule": {}}]}', '{"nftables": [1]}'])
def test_unknown_answer_of_nft_is_not_known(tmp_path: Path, nft: str) -> None:
    assert look(tmp_path, nft).status is Status.UNKNOWN


def test_without_tools_or_rights_it_is_not_known(tmp_path: Path) -> None:
    assert look(tmp_path).found == "neither nft nor iptables-save is installed"
    assert look(tmp_path, Unseen("nft: exit code 1")).status is Status.UNKNOWN
