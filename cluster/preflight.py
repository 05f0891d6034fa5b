"""Do the hosts of a run fit together? Asks all of them at the same time, and compares what they answer."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .inventory import Inventory
from .node_link import NodeLink, ask_all, close_all, log_of, open_links

CLOCK_SKEW_S = 5.0
"""Of two hosts. More, and files and log lines of one seem to come from the other's future."""
LOW_DISK_GB = 2.0
SHARED_HINT = "Put it on a file system that all hosts mount at the same path (NFS, Lustre, ...)"


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
    everyone = range(len(links))
    ahead = [_clock_ahead_s(link, wait_s) for link in links]
    folders, files = list(questions.shared_folders), list(questions.files)
    asked = {"packages": list(questions.packages), "folders": folders, "files": files}
    reports = ask_all(links, "report", wait_s, [asked for _ in links])
    nonce = secrets.token_hex(8)
    names = [f".tunelaunch-{nonce}-{number}" for number in everyone]
    try:
        unwritable = ask_all(links, "write_tokens", wait_s, [{"folders": folders, "name": names[i]} for i in everyone])
        written = [i for i in everyone if not unwritable[i]]
        looked_for = [{"folders": folders, "names": [names[i] for i in written]} for _ in links]
        missing = ask_all(links, "missing_tokens", wait_s, looked_for)
    finally:
        ask_all(links, "remove_tokens", wait_s, [{"folders": folders, "name": names[i]} for i in everyone])
    host_of = {names[i]: links[i].host for i in everyone}
    return tuple(
        HostReport(
            host=links[i].host,
            report=reports[i],
            clock_ahead_s=ahead[i],
            unwritable=unwritable[i],
            unseen={folder: [host_of[name] for name in lost] for folder, lost in missing[i].items()},
        )
        for i in everyone
    )


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
        findings += _folders(host, questions)
        findings += _files(first, host, questions)
    findings += _clocks(reports)
    return findings


def _versions(first: HostReport, other: HostReport, questions: Questions) -> list[Finding]:
    findings = []
    pairs = {"Python": (first.report["python"], other.report["python"])}
    pairs |= {name: (first.report["packages"][name], other.report["packages"][name]) for name in questions.packages}
    pairs["torch's CUDA"] = (first.report["cuda"], other.report["cuda"])
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
    same_version = not any(f.message.startswith("tunelaunch ") for f in findings)
    if same_version and other.report["code"] != first.report["code"]:
        findings.append(
            Finding(
                other.host,
                f"tunelaunch's code is another one ({other.report['code']}, {first.report['code']} on {first.host})",
                "The version is the same, the files are not: bring both checkouts to the same commit.",
            )
        )
    return findings


def _folders(host: HostReport, questions: Questions) -> list[Finding]:
    findings = []
    for folder, hint in questions.shared_folders.items():
        there = host.report["folders"][folder]
        if folder in host.unwritable:
            findings.append(Finding(host.host, f"cannot write to {folder}: {host.unwritable[folder]}", hint))
        elif folder in host.unseen:
            others = ", ".join(host.unseen[folder])
            findings.append(
                Finding(host.host, f"{folder} is another folder there: what {others} wrote into it is not seen", hint)
            )
        if there["free_gb"] < LOW_DISK_GB:
            findings.append(
                Finding(host.host, f"{there['free_gb']:.1f} GB free at {folder}", f"Free at least {LOW_DISK_GB:g} GB.")
            )
    return findings


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
        names = [d.name for d in inventory.devices if not d.mig_mode]
        devices = ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names)) or "no GPU"
        memory = f"{inventory.memory_gb:.0f} GB"
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
