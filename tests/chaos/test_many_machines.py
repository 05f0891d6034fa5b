"""Accidents on several machines, on every backend: what becomes of the run, who is named, how long it takes, what is left over.

Short by default: one accident. TUNELAUNCH_CHAOS_ROUNDS=N does each N times; `make chaos` writes what came of it into
docs/chaos_hosts.md. TUNELAUNCH_CHAOS_BOOK=FILE keeps what was seen, for a page of several commands. Needs root, `ip` and sshd.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.accidents import ACCIDENTS, Scene
from support.chaos import every_loss
from support.chaos_hosts import EVERY, Book, page
from support.commands import ROOT, losses, train_only
from support.machines import Machines, machines
from support.submitted import ACCIDENT, BACKEND, kill_supervisor, site

ROUNDS = int(os.environ.get("TUNELAUNCH_CHAOS_ROUNDS", "0"))
CELLS = tuple((name, backend) for name, (_, backends) in ACCIDENTS.items() for backend in backends)
QUICK = (("kill -9 of a worker", "ssh"),)
RELATIVE = 1e-4


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Book]:
    """Of all tests; the long ones leave it as a page."""
    found = Book(Path(os.environ.get("TUNELAUNCH_CHAOS_BOOK") or tmp_path_factory.mktemp("book") / "seen.jsonl"))
    yield found
    if ROUNDS:
        (ROOT / "docs" / "chaos_hosts.md").write_text(
            page(found.all(), (*CELLS, (ACCIDENT, BACKEND))), encoding="utf-8"
        )


@pytest.fixture(scope="module")
def many(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> Iterator[Machines]:
    with machines(request.param, tmp_path_factory.mktemp(request.param), environment) as found:
        yield found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> dict[int, float]:
    """Step -> loss without any accident."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELAUNCH_CACHE", environment["TUNELAUNCH_CACHE"])
        folder = Scene.folder_for(tmp_path_factory.mktemp("straight"))
        return losses(train_only(folder, "chaos.yaml", 2, "straight"))


@pytest.mark.parametrize(
    ("many", "accident"), [(backend, name) for name, backend in (CELLS if ROUNDS else QUICK)], indirect=["many"]
)
def test_an_accident_costs_a_checkpoint_interval_at_most_and_leaves_nothing_behind(
    many: Machines, accident: str, book: Book, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    straight = request.getfixturevalue("straight") if ROUNDS else {}
    happen: Callable[[Scene], object] = ACCIDENTS[accident][0]
    for number in range(max(ROUNDS, 1)):
        many.bring_back()
        folder = tmp_path / f"round_{number}"
        folder.mkdir()
        scene = Scene(many, accident, Scene.folder_for(folder))
        try:
            happen(scene)
        finally:
            scene.end()
        seen = scene.seen
        assert seen is not None
        book.add(seen)
        assert seen.left == 0
        assert seen.cause
        if scene.run is not None:
            taken = every_loss(scene.run)
            assert len(taken) >= 5
            # Where there is no straight run, steps that were done twice are compared with each other.
            expected = straight or dict(taken)
            assert all(loss == pytest.approx(expected[step], rel=RELATIVE) for step, loss in taken)
            assert seen.lost_steps is not None
            assert 0 <= seen.lost_steps <= EVERY


# Not in CI: two minutes more, of which test_submit_to_ray.py there already proves all but the accident.
@pytest.mark.skipif(
    not ROUNDS, reason="a Ray with a dashboard, and a run that is submitted to it: only in the long one"
)
def test_a_submitted_run_ends_with_a_checkpoint_when_rays_supervisor_of_it_is_killed(
    book: Book, tmp_path: Path, environment: dict[str, str]
) -> None:
    with site(tmp_path, environment) as where:
        for _ in range(ROUNDS):
            seen = kill_supervisor(where)
            book.add(seen)
            assert seen.state.startswith("stopped with a checkpoint")
            assert seen.lost_steps == 0
