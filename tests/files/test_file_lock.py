"""Locks on files and folders, among descriptors of one process: flock treats each open file as its own holder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpumesh.files import file_lock


def test_one_holder_at_a_time_until_its_descriptor_is_closed(tmp_path: Path) -> None:
    with file_lock.open_folder(tmp_path) as second:
        with file_lock.open_folder(tmp_path) as first:
            assert file_lock.try_acquire(first)
            assert not file_lock.try_acquire(second)
            file_lock.release(first)
            assert file_lock.try_acquire(second)
            file_lock.release(second)
            file_lock.acquire(first)
            assert not file_lock.try_acquire(second)
        assert file_lock.try_acquire(second)


def test_shared_locks_exclude_the_exclusive_one_only(tmp_path: Path) -> None:
    with file_lock.open_folder(tmp_path) as first, file_lock.open_folder(tmp_path) as second:
        file_lock.acquire(first, shared=True)
        file_lock.acquire(second, shared=True)
        with file_lock.open_folder(tmp_path) as third:
            assert not file_lock.try_acquire(third)


def test_a_locked_folder_is_free_after_the_block(tmp_path: Path) -> None:
    with file_lock.open_folder(tmp_path) as other:
        with file_lock.locked_folder(tmp_path):
            assert not file_lock.try_acquire(other)
        assert file_lock.try_acquire(other)


def test_what_cannot_be_locked_raises(tmp_path: Path) -> None:
    closed = os.open(tmp_path, os.O_RDONLY)
    os.close(closed)
    with pytest.raises(OSError, match="descriptor"):
        file_lock.try_acquire(closed)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OSError, match=r"."), file_lock.open_folder(tmp_path / "link", follow_links=False):
        pass
