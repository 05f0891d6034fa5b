"""Do the hosts of a run fit together? Asks all of them at the same time, and compares what they answer."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .inventory import Inventory
from .node_link import NodeLink, ask_all, close_all, log_of, open_links

CLOCK_SKEW_S = 5.0
"""Of two hosts. More, and files and log lines of one seem to come from the other's future."""
LOW_DISK_GB = 2.0
LOW_MEMORY_GB = 1.0
"""In 2**30 bytes. Less free than this, and not even a rank's own program fits; what a run needs is estimated in its plan."""
SHARED_HINT = "Put it on a file system that all hosts mount at the same path (NFS, Lustre, ...)"
OWN_PACKAGE = "tunelaunch"
Ask = Callable[[str, list[dict[str, Any]]], list[Any]]
"""(what, arguments for each host) -> the answer of each host, asked at the same time. What: report (`node_report.collect`),
or write_tokens, missing_tokens, remove_tokens of the same module."""


@dataclass(frozen=True)
class Questions:
    """What the hosts are asked."""

    packages: tuple[str, ...]
    """Names whose versions must be equal."""
    shared_folders: Mapping[str, str]
    """Folder that must be writable and the same on all hosts -> what to do when it is not."""
    files: tuple[str, ...]
    """Files and folders that must exist with the same content on all hosts."""


@dataclass(frozen=True)
class Finding:
    """Something that keeps hosts from working together."""

    host: str
    message: str
    """What, with both values."""
    hint: str


@dataclass(frozen=True)
class HostReport:
    """One host's answers."""

    host: str
    report: Mapping[str, Any]
    """See `node_report.collect`."""
    clock_ahead_s: float
    """This host's clock against ours."""
    unwritable: Mapping[str, str]
    """Shared folder -> why nothing could be written there."""
    unseen: Mapping[str, Sequence[str]]
    """Shared folder -> hosts whose token could not be read there."""
    computes: bool = True
    """Ranks may run there. Else only what it shares with the others counts: folders, files, clock and our own code."""

    @property
    def inventory(self) -> Inventory:
        return Inventory.from_dict(self.report["inventory"])


def survey(
    hosts: Sequence[tuple[str, str]], questions: Questions, silence_s: float, wait_s: float
) -> tuple[HostReport, ...]:
    """Ask every (host, python). Raises ClusterError for hosts that cannot be reached or do not answer within `wait_s`.

    Side effect: the shared folders are made, and for a moment each holds one file of every host.
    """
    with tempfile.TemporaryDirectory(prefix="tunelaunch-survey-") as logs:
        log_files = [log_of(logs, number) for number in range(len(hosts))]
        links = open_links(list(hosts), log_files, silence_s, wait_s)
        try:
            return _ask(links, questions, wait_s)
        finally:
            close_all(links)


def _ask(links: list[NodeLink], questions: Questions, wait_s: float) -> tuple[HostReport, ...]:
    ahead = [_clock_ahead_s(link, wait_s) for link in links]
    hosts = [link.host for link in links]
    reports = put_questions(hosts, lambda what, given: ask_all(links, what, wait_s, given), questions)
    return tuple(replace(report, clock_ahead_s=s) for report, s in zip(reports, ahead, strict=True))


def put_questions(hosts: Sequence[str], ask: Ask, questions: Questions) -> list[HostReport]:
    """What every host has, and whether each reads what the others write. Clocks are not compared here: 0 for all.

    Raises what `ask` raises. Side effect: see `survey`.
    """
    everyone = range(len(hosts))
    folders, files = list(questions.shared_folders), list(questions.files)
    asked = {"packages": list(questions.packages), "folders": folders, "files": files}
    reports = ask("report", [asked for _ in hosts])
    nonce = secrets.token_hex(8)
    names = [f".tunelaunch-{nonce}-{number}" for number in everyone]
    try:
        unwritable = ask("write_tokens", [{"folders": folders, "name": name} for name in names])
        written = [names[i] for i in everyone if not unwritable[i]]
        missing = ask("missing_tokens", [{"folders": folders, "names": written} for _ in hosts])
    finally:
        ask("remove_tokens", [{"folders": folders, "name": name} for name in names])
    host_of = dict(zip(names, hosts, strict=True))
    return [
        HostReport(
            host=hosts[i],
            report=reports[i],
            clock_ahead_s=0.0,
            unwritable=unwritable[i],
            unseen={folder: [host_of[name] for name in lost] for folder, lost in missing[i].items()},
        )
        for i in everyone
    ]


def _clock_ahead_s(link: NodeLink, wait_s: float) -> float:
    """By how much the host's clock is ahead of ours, to half the time that question and answer took."""
    before = time.time()
    (there,) = ask_all([link], "clock", wait_s, [{}])
    return there - (before + time.time()) / 2


def compare(reports: Sequence[HostReport], questions: Questions) -> list[Finding]:
    """All that does not fit, host by host, with both values. The first host is the measure. Pure."""
    first = reports[0]
    findings: list[Finding] = []
    for other in reports[1:]:
        findings += _versions(first, other, questions)
    for host in reports:
        findings += _memory(host)
        findings += _folders(host, reports, questions)
        findings += _files(first, host, questions)
    findings += _clocks(reports)
    return findings


def _versions(first: HostReport, other: HostReport, questions: Questions) -> list[Finding]:
    findings = []
    compared = [name for name in questions.packages if other.computes or name == OWN_PACKAGE]
    pairs = {name: (first.report["packages"][name], other.report["packages"][name]) for name in compared}
    if other.computes:
        python, cuda = ((first.report[key], other.report[key]) for key in ("python", "cuda"))
        pairs = {"Python": python, **pairs, "torch's CUDA": cuda}
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            here, there = (value or "none" for value in (ours, theirs))
            install = f"pip install {name}=={ours}" if name in questions.packages and ours else "the same environment"
            findings.append(
                Finding(
                    other.host,
                    f"{name} {there}, but {here} on {first.host}",
                    f"Ranks of different versions fail late, or compute different things. On {other.host}, with "
                    f"{other.report['executable']}: {install}",
                )
            )
    same_version = not any(f.message.startswith(f"{OWN_PACKAGE} ") for f in findings)
    if same_version and other.report["code"] != first.report["code"]:
        findings.append(
            Finding(
                other.host,
                f"tunelaunch's code is another one ({other.report['code']}, {first.report['code']} on {first.host})",
                "The version is the same, the files are not: bring both checkouts to the same commit.",
            )
        )
    return findings


def _memory(host: HostReport) -> list[Finding]:
    free_gb = host.report["memory_free_gb"]
    if not host.computes or free_gb >= LOW_MEMORY_GB:
        return []
    return [
        Finding(
            host.host,
            f"{free_gb:.1f} GB of its {host.inventory.memory_gb:.0f} GB of memory are free",
            f"End other programs there (ps aux --sort -rss): at least {LOW_MEMORY_GB:g} GB are needed.",
        )
    ]


def _folders(host: HostReport, reports: Sequence[HostReport], questions: Questions) -> list[Finding]:
    findings = []
    for folder, hint in questions.shared_folders.items():
        there = host.report["folders"][folder]
        if folder in host.unwritable:
            findings.append(Finding(host.host, f"cannot write to {folder}: {host.unwritable[folder]}", hint))
        elif others := ", ".join(_unseen(host, reports, folder)):
            findings.append(
                Finding(host.host, f"{folder} is another folder there: what {others} wrote into it is not seen", hint)
            )
        if there["free_gb"] < LOW_DISK_GB:
            findings.append(
                Finding(host.host, f"{there['free_gb']:.1f} GB free at {folder}", f"Free at least {LOW_DISK_GB:g} GB.")
            )
    return findings


def _unseen(host: HostReport, reports: Sequence[HostReport], folder: str) -> list[str]:
    """Hosts whose token is not there, without those that lie elsewhere themselves: that is told of them, once."""
    measure = next((r.host for r in reports if not r.unwritable), "")
    elsewhere = {r.host for r in reports if measure in r.unseen.get(folder, ())}
    return [other for other in host.unseen.get(folder, ()) if host.host in elsewhere or other not in elsewhere]


def _files(first: HostReport, host: HostReport, questions: Questions) -> list[Finding]:
    findings = []
    for file in questions.files:
        ours, theirs = first.report["files"][file], host.report["files"][file]
        if theirs is None:
            findings.append(Finding(host.host, f"{file} does not exist there", f"{SHARED_HINT}, or copy it."))
        elif ours is not None and theirs != ours:
            findings.append(
                Finding(host.host, f"{file} differs ({theirs}, {ours} on {first.host})", f"{SHARED_HINT}, or copy it.")
            )
    return findings


def _clocks(reports: Sequence[HostReport]) -> list[Finding]:
    ahead, behind = (pick(reports, key=lambda r: r.clock_ahead_s) for pick in (max, min))
    skew_s = ahead.clock_ahead_s - behind.clock_ahead_s
    if skew_s <= CLOCK_SKEW_S:
        return []
    return [
        Finding(
            ahead.host,
            f"its clock is {skew_s:.1f} s ahead of that of {behind.host}",
            "Set both by NTP (chronyc tracking, timedatectl): logs and file times of a run are compared across hosts.",
        )
    ]


def host_table(reports: Sequence[HostReport]) -> str:
    """One line a host: what it has."""
    rows = [("host", "name", "devices", "cores", "memory", "Python", "clock")]
    for r in reports:
        inventory = r.inventory
        free_gb: dict[str, list[float]] = {}
        for device in inventory.devices:
            if not device.mig_mode:
                free_gb.setdefault(device.name, []).append(device.memory_free_gb)
        devices = ", ".join(f"{len(gb)} x {name} ({min(gb):.0f} GB free)" for name, gb in free_gb.items()) or "no GPU"
        memory = f"{r.report['memory_free_gb']:.0f} of {inventory.memory_gb:.0f} GB free"
        rows.append(
            (
                r.host,
                r.report["host"],
                devices,
                str(inventory.cpu_count),
                memory,
                r.report["python"],
                f"{r.clock_ahead_s:+.2f} s",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
