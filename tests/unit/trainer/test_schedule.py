"""The learning rate of every step."""

import dataclasses

import pytest

from trainer.spec import OptimSpec
from trainer.train import learning_rate

OPTIM = OptimSpec(1.0, 0, 1, 1, 2.0, "cosine", 0.2, 0.0, (0.9, 0.999), 1e-8, 1.0, 0, False, False)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", [1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, 2.0, 2.0, 1.923880, 1.707107, 1.382683, 1.0, 0.617317, 0.292893, 0.076120]),
    ],
)
def test_rates(schedule: str, rates: list[float]) -> None:
    optim = dataclasses.replace(OPTIM, schedule=schedule)
    assert [learning_rate(step, 10, optim) for step in range(10)] == pytest.approx(rates, abs=1e-6)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(0, 5, dataclasses.replace(OPTIM, warmup_ratio=0.0)) == 2.0
