"""Whether this host's own firewall answers segments of fake TCP with a reset.

This host's conntrack never sees what a packet socket sends, so what comes in belongs to no state that it knows:
INVALID. Packet sockets see it before any rule does. A rule that drops it is harmless; one that answers with a reset
ends the connection in every NAT on the way, and at the other end.

The rules of nft and of iptables become one form, and a segment in state INVALID walks through them.
"""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from forwarder.doctor.finding import Finding, not_applicable, ok, shortfall, unknown
from forwarder.doctor.host import Host, Unseen
from forwarder.doctor.subject import Subject
from workers.settings import SprayServerTunnel

JUMPS_MAX = 16  # as deep as the kernel goes
PORTS_TRIED_MAX = 64
_NAME = "firewall"


class Match(Enum):
    """Whether a rule is about our segment. PERHAPS: it asks for something that is not looked at here."""

    YES = auto()
    PERHAPS = auto()
    NO = auto()


@dataclass(slots=True)
class Rule:
    """verdict: accept, drop, reset, jump, goto or return; "" goes on. ports: (first, last) of destinations, None: any.

    invalid: it names that state. place: where it stands, for people.
    """

    place: str
    match: Match = Match.YES
    invalid: bool = False
    ports: list[tuple[int, int]] | None = None
    other_ports: bool = False
    verdict: str = ""
    target: str = ""
    command: str = ""

    def matches(self, port: int | None) -> Match:
        """Whether it is about a segment to `port`; None: a port that no rule names."""
        if self.ports is not None:
            inside = port is not None and any(first <= port <= last for first, last in self.ports)
            if inside == self.other_ports:
                return Match.NO
        return self.match

    def perhaps(self) -> None:
        """One of its conditions is not known to hold."""
        self.match = Match.NO if self.match is Match.NO else Match.PERHAPS


@dataclass(slots=True)
class Rules:
    """Chains by name, and those at which a segment for this host starts."""

    chains: dict[str, list[Rule]] = field(default_factory=dict)
    starts: list[str] = field(default_factory=list)

    def resetting(self, port: int | None) -> Rule | None:
        """The first rule that answers the segment with a reset."""
        for start in self.starts:
            rule = self._walk(start, port, 0)
            if rule is not None and rule.verdict == "reset":
                return rule
        return None

    def _walk(self, chain: str, port: int | None, depth: int) -> Rule | None:
        """The rule that ends the way through a chain; None: it comes out at the end."""
        for rule in self.chains.get(chain, ()) if depth <= JUMPS_MAX else ():
            match = rule.matches(port)
            if match is Match.NO or not rule.verdict:
                continue
            if rule.verdict in ("jump", "goto"):
                last = self._walk(rule.target, port, depth + 1)
                if last is not None and (match is Match.YES or last.verdict == "reset"):
                    return last
                if match is Match.YES and rule.verdict == "goto":
                    return None
            elif match is Match.YES or (rule.verdict == "reset" and rule.invalid):
                return None if rule.verdict == "return" else rule
        return None


def firewall(host: Host, subject: Subject) -> Iterator[Finding]:
    """The finding, from whatever tools are installed."""
    if not subject.wants_fake_tcp:
        yield not_applicable(_NAME, "no tunnel with fake TCP")
        return
    try:
        if host.read("proc/sys/net/netfilter/nf_conntrack_max") is None:
            yield not_applicable(_NAME, "conntrack is not loaded, so no rule can ask for its states")
            return
        nft = host.run("nft", "-j", "list", "ruleset")
        tables = [(name, host.run(f"{name}-save")) for name in ("iptables", "ip6tables")]
    except Unseen as reason:
        yield unknown(_NAME, str(reason) if host.is_root else f"only root may see its rules ({reason})")
        return
    if nft is None and all(text is None for _, text in tables):
        yield unknown(_NAME, "neither nft nor iptables-save is installed")
        return
    try:
        everything = [read_nft(nft)] if nft else []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield unknown(_NAME, f"nft answers in a form that is not known here ({type(error).__name__})")
        return
    everything += [read_iptables(name, text) for name, text in tables if text]
    yield _verdict(everything, _ports(subject))


def _ports(subject: Subject) -> list[int | None]:
    """Where segments arrive: a server's ports, or any port of a client."""
    tunnels = [tunnel for tunnel in subject.fake_tcp_tunnels if isinstance(tunnel, SprayServerTunnel)]
    ports = [port for tunnel in tunnels for port in tunnel.ports]
    return [*ports[:PORTS_TRIED_MAX]] if ports else [None]


def _verdict(everything: Iterable[Rules], ports: Iterable[int | None]) -> Finding:
    why = (
        "to this host's conntrack, data of fake TCP is INVALID: dropping it is harmless, since packet sockets have "
        "seen it before; a reset ends the connection for every NAT on the way"
    )
    for rules in everything:
        for port in ports:
            if rule := rules.resetting(port):
                found = f"{rule.place} answers INVALID segments with a reset"
                return shortfall(_NAME, found, "drop, or no answer", why, rule.command)
    return ok(_NAME, "answers no INVALID segment with a reset")


# nft -j list ruleset


def read_nft(text: str) -> Rules:
    """Raises ValueError, KeyError, TypeError or AttributeError for what is not nft's JSON."""
    rules = Rules()
    for item in json.loads(text)["nftables"]:
        if "chain" in item:
            chain = item["chain"]
            name = _chain(chain, chain["name"])
            rules.chains.setdefault(name, [])
            if chain.get("hook") in ("input", "prerouting"):
                rules.starts.append(name)
        elif "rule" in item:
            rule = item["rule"]
            rules.chains.setdefault(_chain(rule, rule["chain"]), []).append(_nft_rule(rule))
    return rules


def _chain(where: Mapping[str, Any], name: str) -> str:
    return f"{where['family']} {where['table']} {name}"


def _nft_rule(rule: Mapping[str, Any]) -> Rule:
    chain = _chain(rule, rule["chain"])
    made = Rule(f"nft: {chain}, handle {rule['handle']}:")
    made.command = f"nft insert rule {chain} position {rule['handle']} ct state invalid drop"
    for statement in rule.get("expr", ()):
        for kind, content in statement.items():
            _nft_statement(made, kind, content, rule)
    return made


def _nft_statement(made: Rule, kind: str, content: Any, rule: Mapping[str, Any]) -> None:
    match kind:
        case "match":
            _nft_match(made, content)
        case "accept" | "drop" | "return":
            made.verdict = kind
        case "reject":
            made.verdict = "reset" if content and content.get("type") == "tcp reset" else "drop"
        case "jump" | "goto":
            made.verdict, made.target = kind, _chain(rule, content["target"])
        case "vmap" if content["key"] == {"ct": {"key": "state"}} and isinstance(content["data"], dict):
            for state, verdict in content["data"]["set"]:
                if state == "invalid":
                    made.invalid = True
                    for each, inner in verdict.items():
                        _nft_statement(made, each, inner, rule)
        case "counter" | "log" | "comment":
            pass
        case _:
            made.perhaps()


def _nft_match(made: Rule, content: Mapping[str, Any]) -> None:
    left, right, negated = content["left"], content["right"], content["op"] == "!="
    members = right.get("set", [right]) if isinstance(right, dict) else right if isinstance(right, list) else [right]
    key = left.get("ct", left.get("meta", {})).get("key")
    payload = left.get("payload", {})
    if "ct" in left and key == "state":
        _on_state(made, "invalid" in members, negated)
    elif payload.get("protocol") in ("tcp", "th") and payload.get("field") == "dport":
        ports = [_nft_ports(member) for member in members]
        if None in ports:
            made.perhaps()
        else:
            made.ports, made.other_ports = [each for each in ports if each], negated
    elif key == "l4proto" or payload.get("field") in ("protocol", "nexthdr"):
        _on(made, "tcp" in members or 6 in members, negated)
    elif payload.get("protocol") in ("udp", "icmp", "icmpv6"):
        made.match = Match.NO
    elif key in ("iif", "iifname") and members == ["lo"]:
        _on(made, False, negated)
    elif key != "nfproto":
        made.perhaps()


def _nft_ports(member: Any) -> tuple[int, int] | None:
    if isinstance(member, dict) and "range" in member:
        first, last = member["range"]
        return int(first), int(last)
    return (member, member) if isinstance(member, int) else None


def _on_state(made: Rule, has_invalid: bool, negated: bool) -> None:
    made.invalid = has_invalid and not negated
    _on(made, has_invalid, negated)


def _on(made: Rule, holds: bool, negated: bool) -> None:
    if holds == negated:
        made.match = Match.NO


# iptables-save


def read_iptables(program: str, text: str) -> Rules:
    """The tables of iptables-save or ip6tables-save."""
    rules, table = Rules(), ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(":"):
            name = line[1:].split()[0]
            rules.chains.setdefault(f"{table} {name}", [])
            if name in ("INPUT", "PREROUTING"):
                rules.starts.append(f"{table} {name}")
        elif line.startswith("-A "):
            words = _words(line)
            rules.chains.setdefault(f"{table} {words[1]}", []).append(_iptables_rule(program, table, words, line))
    return rules


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # a comment with quotes of its own
        return line.split()


def _iptables_rule(program: str, table: str, words: Sequence[str], line: str) -> Rule:
    made = Rule(f"{program}: {line}", command=f"{program} -I {words[1]} -m conntrack --ctstate INVALID -j DROP")
    negated, at = False, 2
    while at < len(words):
        option = words[at]
        value = words[at + 1] if at + 1 < len(words) and not words[at + 1].startswith("-") else ""
        at += 2 if value else 1
        if option == "!":
            # The word after it is the option, not its value.
            negated, at = True, at - 1 if value else at
            continue
        _iptables_option(made, option, value, negated, table)
        negated = False
    return made


def _iptables_option(made: Rule, option: str, value: str, negated: bool, table: str) -> None:
    match option:
        case "-j" | "-g":
            _iptables_target(made, value, "jump" if option == "-j" else "goto", table)
        case "--reject-with":
            made.verdict = "reset" if value == "tcp-reset" else "drop"
        case "--ctstate" | "--state":
            _on_state(made, "INVALID" in value.split(","), negated)
        case "-p":
            _on(made, value in ("tcp", "all"), negated)
        case "-i" if value == "lo":
            _on(made, False, negated)
        case "--dport" | "--dports" | "--destination-ports":
            ranges = [part.split(":") for part in value.split(",")]
            made.ports = [(int(part[0] or 0), int(part[-1] or 65535)) for part in ranges]
            made.other_ports = negated
        case "-m" | "--comment" | "--log-prefix" | "--log-level":
            pass
        case _:
            made.perhaps()


def _iptables_target(made: Rule, target: str, how: str, table: str) -> None:
    verdicts = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return"}
    if target in ("LOG", "NFLOG", "CT", "TCPMSS", "MARK", "CONNMARK", "CHECKSUM", "TRACE", "NOTRACK"):
        made.verdict = ""
    elif target in verdicts:
        made.verdict = verdicts[target]
    else:
        made.verdict, made.target = how, f"{table} {target}"
