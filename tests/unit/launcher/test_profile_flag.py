"""`--profile`: which steps it means, and what is no step."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import ROOT

from launcher.errors import LaunchError
from launcher.start import Request, make_plan, parse_profile


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("10", (10,)),
        ("3-5", (3, 4, 5)),
        (" 3 - 5 ", (3, 4, 5)),
        ("3,4,5", (3, 4, 5)),
        ("5, 4, 3, 3", (3, 4, 5)),
        ("7-7", (7,)),
        ("1-10", tuple(range(1, 11))),
    ],
)
def test_steps(text: str, steps: tuple[int, ...]) -> None:
    assert parse_profile(text) == steps


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is not a list of steps"),
        ("all", "is not a list of steps"),
        ("3-", "is not a list of steps"),
        ("-3", "is not a list of steps"),
        ("3..5", "is not a list of steps"),
        ("1.5", "is not a list of steps"),
        ("3,,5", "is not a list of steps"),
        ("0", "there is no such step"),
        ("0-2", "there is no such step"),
        ("5-3", "there is no such step"),
        ("3,7", "are not consecutive"),
        ("1-11", "11 steps are too many"),
        ("1-999999999", "999999999 steps are too many"),
        ("1,2,3,4,5,6,7,8,9,10,11", "11 steps are too many"),
    ],
)
def test_what_is_refused(text: str, what: str) -> None:
    with pytest.raises(LaunchError, match=what) as error:
        parse_profile(text)
    assert "Allowed: one step (10), or at most 10 consecutive ones (3-5, or 3,4,5)" in str(error.value)


def request(tmp_path: Path, steps: tuple[int, ...], sets: tuple[str, ...] = (), debug: bool = False) -> Request:
    return Request(str(ROOT / "recipes" / "tiny_cpu.yaml"), None, 1, None, 1, tmp_path / "run", sets, debug, steps)


def test_the_plan_holds_the_steps(tmp_path: Path) -> None:
    plan, _, _ = make_plan(request(tmp_path, (3, 4)))
    assert plan.spec.profile_steps == (3, 4)
    assert make_plan(request(tmp_path, ()))[0].spec.profile_steps == ()


def test_steps_beyond_a_known_end_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"step 7 does not exist\nThis run has 6 steps"):
        make_plan(request(tmp_path, (6, 7), ("train.max_steps=6",)))
    with pytest.raises(LaunchError, match="This run has 10 steps"):
        make_plan(request(tmp_path, (11,), debug=True))
    assert make_plan(request(tmp_path, (6,), ("train.max_steps=6",)))[0].spec.profile_steps == (6,)
