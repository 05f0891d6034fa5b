"""How a run ended, in one word and one paragraph. Pure."""

from __future__ import annotations

import re

from .cases import PRODUCT, Case

DONE, CUT_SHORT, REFUSED, FAILED = "done", "cut short", "refused", "failed"
EXIT_USER = 2
"""This project's exit code for something that the user must change: here, a combination that it does not train."""
MAX_REASON_LINES = 3
_ERROR = re.compile(r"^\s*(?:\[rank\d+\]:\s*)?(?:[\w.]+\.)?\w*(?:Error|Exception)\b(?::|$)")


def judge(case: Case, num_steps: int, exit_code: int, timed_out: bool, log: str) -> tuple[str, str]:
    """(state, reason). `num_steps` were taken, `log` is the whole output. The reason is empty when all went well."""
    if num_steps >= case.steps:
        return DONE, ""
    if timed_out and num_steps > 1:
        return CUT_SHORT, f"{num_steps} of {case.steps} steps within {case.limit_s} s"
    if timed_out:
        return FAILED, f"{num_steps} of {case.steps} steps within {case.limit_s} s"
    if case.contender == PRODUCT and exit_code == EXIT_USER:
        return REFUSED, first_error(log)
    return FAILED, f"exit code {exit_code}: {first_error(log)}"


def first_error(log: str) -> str:
    """The first error that a program printed: its own line and what follows, or the last lines when there is none."""
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", log) if line.strip()]
    for at, line in enumerate(lines):
        if line.startswith("error:") or _ERROR.match(line):
            return "\n".join(lines[at : at + MAX_REASON_LINES])
    return "\n".join(lines[-MAX_REASON_LINES:])
