"""An accident in one rank of a real training: on PYTHONPATH, with ACCIDENT="what:rank:attempt:call", it happens at that call.

data: sleeps for ever where a micro batch is read. sum: sleeps for ever before the sum over all ranks. slow: from that call
on every micro batch takes a second more, and every save five. An attempt of 0 means each.
"""

import os
import sys
import time

EVER_S = 3600.0


def arrange(what: str, call: int) -> None:
    import trainer.data
    import trainer.saver
    import trainer.train

    calls = 0

    def disturbed(real, disturb):
        def function(*args, **kwargs):
            nonlocal calls
            calls += 1
            disturb()
            return real(*args, **kwargs)

        return function

    def sleep_for_ever() -> None:
        if calls == call:
            time.sleep(EVER_S)

    if what == "data":
        trainer.data.TokenData.batch = disturbed(trainer.data.TokenData.batch, sleep_for_ever)
    elif what == "sum":
        trainer.train._totals = disturbed(trainer.train._totals, sleep_for_ever)
    else:
        trainer.data.TokenData.batch = disturbed(
            trainer.data.TokenData.batch, lambda: time.sleep(calls >= call and 1.0)
        )
        trainer.saver.Saver._begin = disturbed(trainer.saver.Saver._begin, lambda: time.sleep(5.0))


if "ACCIDENT" in os.environ and "--attempt" in sys.orig_argv:
    name, rank, attempt, at = os.environ["ACCIDENT"].split(":")
    here = sys.orig_argv[sys.orig_argv.index("--attempt") + 1]
    # The agent has the worker's arguments on its command line too, and no rank.
    if os.environ.get("RANK") == rank and attempt in ("0", here):
        arrange(name, int(at))
