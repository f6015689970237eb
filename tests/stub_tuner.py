"""``python -m tests.stub_tuner MODE FLAG OPTION…``: `tuning.tune` with a measurer that does as a test wants.

It measures a round, makes the file FLAG and then does not end (``stuck``) or ends its process (``abort``, once).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from netship.devices.sessions.session import Origin
from netship.targets.engine import compiler
from netship.targets.errors import run_command
from netship.tuning import tune

ROUND = 4


class _Measurer:
    origin, how = Origin.ESTIMATED, "by a test"

    def __init__(self, mode: str, flag: Path) -> None:
        self._mode, self._flag, self._count = mode, flag, 0

    def measure(self, kernels: Sequence[Any]) -> list[list[float]]:
        if self._count >= ROUND and not self._flag.exists():
            self._flag.touch()
            if self._mode == "abort":
                os.abort()
            threading.Event().wait()
        self._count += len(kernels)
        return [[1.0 / (self._count + i)] for i in range(len(kernels))]

    def stop(self) -> None: ...

    def close(self) -> None: ...


def main() -> None:
    _, mode, flag, *options = sys.argv

    def measurer(*_: object) -> _Measurer:
        compiler()
        from netship.tuning import search

        vars(search)["_ROUND"] = ROUND
        search._SEARCH |= {
            "evolutionary_search_population": 16,
            "evolutionary_search_num_iters": 1,
            "sample_init_min_population": 8,
        }
        return _Measurer(mode, Path(flag))

    vars(tune)["_measurer"] = measurer
    # It compiles the network.
    vars(tune)["_gain"] = lambda *_: None
    run_command(lambda _: tune.main(options))


if __name__ == "__main__":
    main()
