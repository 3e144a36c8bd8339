"""The tables of the SQLite file. Texts of any size (chunks of files, results) stand in tables that are never searched.

Rows of ``batches`` and ``files`` have a small number beside their id, which the other tables use.
"""

from __future__ import annotations

APPLICATION_ID = 0x67704D62  # "gpMb": tells a store of batches from other SQLite files
VERSION = 1  # ``user_version``: a newer version of gpumesh may have other tables

# ``state`` of a file: it is being written; it is whole; its chunks are being deleted.
WRITING, WHOLE, DELETED = 0, 1, 2

TABLES = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL, size INTEGER NOT NULL,
    purpose TEXT NOT NULL, owner TEXT NOT NULL, created_at REAL NOT NULL, used_at REAL NOT NULL, state INTEGER NOT NULL
);
CREATE INDEX files_by_time ON files (created_at, id);
CREATE TABLE chunks (file INTEGER NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (file, number));

CREATE TABLE batches (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, endpoint TEXT NOT NULL, file INTEGER NOT NULL,
    file_id TEXT NOT NULL, name TEXT NOT NULL, window_s REAL NOT NULL, owner TEXT NOT NULL, metadata TEXT NOT NULL,
    status TEXT NOT NULL, created_at REAL NOT NULL, expires_at REAL NOT NULL, in_progress_at REAL, cancelling_at REAL,
    ended_at REAL, read_lines INTEGER NOT NULL DEFAULT 0, is_validated INTEGER NOT NULL DEFAULT 0,
    error_count INTEGER NOT NULL DEFAULT 0, total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0, output_bytes INTEGER NOT NULL DEFAULT 0,
    error_bytes INTEGER NOT NULL DEFAULT 0, has_expired INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX batches_by_time ON batches (created_at, id);
CREATE INDEX batches_by_status ON batches (status, created_at);
CREATE TABLE line_errors (
    batch INTEGER NOT NULL, line INTEGER NOT NULL, code TEXT NOT NULL, message TEXT NOT NULL, PRIMARY KEY (batch, line)
) WITHOUT ROWID;

CREATE TABLE requests (
    batch INTEGER NOT NULL, line INTEGER NOT NULL, start INTEGER NOT NULL, size INTEGER NOT NULL, sort BLOB NOT NULL,
    prompt_group TEXT NOT NULL, has_result INTEGER NOT NULL DEFAULT 0, worker TEXT, leased_until REAL,
    not_before REAL NOT NULL DEFAULT 0, tries INTEGER NOT NULL DEFAULT 0, lost INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (batch, line)
) WITHOUT ROWID;
CREATE INDEX open_requests ON requests (batch, sort, line) WHERE has_result = 0 AND worker IS NULL;
CREATE INDEX claimed_requests ON requests (batch, leased_until) WHERE worker IS NOT NULL;

CREATE TABLE results (
    position INTEGER PRIMARY KEY AUTOINCREMENT, batch INTEGER NOT NULL, line INTEGER NOT NULL, failed INTEGER NOT NULL,
    size INTEGER NOT NULL, recorded_at REAL NOT NULL
);
CREATE UNIQUE INDEX results_by_line ON results (batch, line);
CREATE INDEX results_by_position ON results (batch, position);
CREATE INDEX results_by_failure ON results (batch, failed, position);
CREATE INDEX results_by_time ON results (batch, recorded_at);
CREATE TABLE result_contents (position INTEGER PRIMARY KEY, content BLOB NOT NULL);
"""
