"""How tests share one machine when several processes run them (``make test``): the lock of exclusive tests, the order,
and the compilation of test modules.

Nearly all tests wait more than they compute, so there are more processes than cores. Tests that need all cores for
themselves are marked ``exclusive``: such a test starts when no other test runs, and no other starts before it ends.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest


@contextlib.contextmanager
def machine_lock(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """Held while a test runs, by all processes that name the same ``folder``: shared, or exclusively.

    There are two locks on files. A running test holds ``running``, shared or exclusively. Before that each test takes
    ``queue`` for a moment, so that others do not overtake a waiting exclusive test for ever. There is no time limit: a
    process holds the lock for one test at a time, tests have time-outs, and the kernel releases the locks of a process
    that dies.
    """
    import fcntl  # missing on Windows, where tests run in one process only

    with (folder / "queue").open("ab") as queue, (folder / "running").open("ab") as running:
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield


def import_share(root: Path, folders: Sequence[Path], process: int, processes: int) -> None:
    """Imports each ``processes``-th test module in ``folders``, from the one with number ``process`` on.

    pytest rewrites the asserts of each test module, compiles it and writes the result into a file. That takes twice as
    long as all the rest of the collection. Processes that start at the same time on a new checkout would all do it for
    all modules. This way each does a part, and finds the files of the others when it collects the tests.

    A module that cannot be imported is none of its concern: the collection reports it.
    """
    modules = sorted(path for folder in folders for path in folder.rglob("test_*.py"))
    for path in modules[process::processes]:
        with contextlib.suppress(Exception, pytest.skip.Exception):
            importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))


def order_tests(tests: Sequence[pytest.Item], processes: int) -> list[pytest.Item]:
    """The order for ``--dist worksteal``, which gives each process an equal, contiguous part of the list.

    Each part begins with slow tests, whole modules dealt in turn, so that no slow test is left for the end, and goes on
    with fast ones. The exclusive tests come last of all: then no other test has to wait for them.
    """
    exclusive = [test for test in tests if is_exclusive(test)]
    slow = [test for test in tests if not is_exclusive(test) and _is_slow(test)]
    fast = [test for test in tests if not is_exclusive(test) and not _is_slow(test)]
    modules = [list(module) for _, module in itertools.groupby(slow, key=lambda test: test.path)]
    ordered: list[pytest.Item] = []
    for number in range(processes):
        part = list(itertools.chain.from_iterable(modules[number::processes]))
        size = (len(tests) - len(ordered)) // (processes - number) - len(part)
        if number == processes - 1:
            size = len(fast)
        ordered += part + fast[: max(size, 0)]
        del fast[: max(size, 0)]
    return ordered + exclusive


def is_exclusive(test: pytest.Item) -> bool:
    return test.get_closest_marker("exclusive") is not None


def _is_slow(test: pytest.Item) -> bool:
    return test.get_closest_marker("slow") is not None or test.get_closest_marker("real") is not None
