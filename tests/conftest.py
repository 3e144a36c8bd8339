"""Hooks for all tests: in CI a missing system part is a failure instead of a skip, and tests that run in several
processes share the machine (``parallel_runs``)."""

from __future__ import annotations

import gc
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.parallel_runs import import_share, is_exclusive, machine_lock, order_tests
from tests.prerequisites import REASON, in_ci

_LOCK_FOLDER = pytest.StashKey[Path]()

# On a busy machine an example may take any time.
settings.register_profile("gpumesh", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gpumesh")


def pytest_configure(config: pytest.Config) -> None:
    # A shell that runs the tests in the background has them ignore Ctrl-C, and all programs that they start inherit it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):
        config.stash[_LOCK_FOLDER] = Path(config.workerinput["lock_folder"])


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """A hook of pytest-xdist, for each process that will run tests: all get the same folder for the lock."""
    if _LOCK_FOLDER not in node.config.stash:
        node.config.stash[_LOCK_FOLDER] = Path(tempfile.mkdtemp(prefix="gm-lock-"))
    node.workerinput["lock_folder"] = str(node.config.stash[_LOCK_FOLDER])


def pytest_unconfigure(config: pytest.Config) -> None:
    if _LOCK_FOLDER in config.stash and not hasattr(config, "workerinput"):
        shutil.rmtree(config.stash[_LOCK_FOLDER])


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workerinput"):
        gc.disable()  # until all tests are collected: nothing of that is garbage
        folders = [path for path in map(Path, config.args) if path.is_dir()]
        process, processes = int(config.workerinput["workerid"].removeprefix("gw")), config.workerinput["workercount"]
        import_share(config.rootpath, [config.rootpath / folder for folder in folders], process, processes)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items[:] = order_tests(items, int(config.workerinput["workercount"]))


def pytest_collection_finish() -> None:
    """Modules and tests live until the end: the garbage collector need not look at these two million objects again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """For tests of CPU time: what other tests have left takes up to 0.1 s to collect."""
    gc.disable()
    yield
    gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool | None, bool | None]:
    """Runs outside pytest-timeout's hook, so that waiting for the lock does not count as the test's time."""
    if _LOCK_FOLDER not in item.config.stash:
        return (yield)
    with machine_lock(item.config.stash[_LOCK_FOLDER], exclusive=is_exclusive(item)):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """The output of a test goes to the reporting process as UTF-8. Some tests log text that UTF-8 cannot encode."""
    return _encodable((yield))


def _encodable(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {key: _encodable(member) for key, member in value.items()}
        case list() | tuple():
            return type(value)(_encodable(member) for member in value)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and in_ci() and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason.startswith(REASON):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: {reason}; in CI a part that is not there is a failure"
    return report
