"""Tables of `ledger.sqlite`, and how the file is opened: one writer, many readers, safe on network file systems.

Each fact is written once, under its natural key. Integers stand for phases and samples inside the file; everything
that leaves it (reads, exports, digests) carries their names.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import time
from pathlib import Path
from typing import IO

from dppo_mcore.runtime.errors import UserError

SCHEMA_VERSION = 1

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS samples (
  key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, pool TEXT NOT NULL, objective TEXT NOT NULL,
  dimension TEXT NOT NULL, source TEXT NOT NULL, question TEXT NOT NULL, gold TEXT, answer TEXT, media TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS phases (
  key INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, loop INTEGER NOT NULL, kind TEXT NOT NULL, horizon REAL,
  state TEXT NOT NULL DEFAULT 'planned' CHECK (state IN ('planned', 'running', 'done')),
  start_step INTEGER, end_step INTEGER, cursor TEXT NOT NULL DEFAULT '{}', reason TEXT NOT NULL DEFAULT '',
  started_at REAL, ended_at REAL);
CREATE TABLE IF NOT EXISTS rollouts (
  key INTEGER PRIMARY KEY, phase INTEGER NOT NULL, step INTEGER NOT NULL, sample INTEGER NOT NULL,
  idx INTEGER NOT NULL, reward REAL NOT NULL, task REAL NOT NULL, success INTEGER NOT NULL, tokens INTEGER NOT NULL,
  finish TEXT NOT NULL, written_at REAL NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS rollouts_by_step ON rollouts (phase, step, sample, idx);
CREATE INDEX IF NOT EXISTS rollouts_by_sample ON rollouts (sample);
CREATE TABLE IF NOT EXISTS payloads (
  key INTEGER PRIMARY KEY, text, token_ids BLOB, logprobs BLOB, parts TEXT NOT NULL, versions TEXT NOT NULL,
  error TEXT);
CREATE TABLE IF NOT EXISTS success (
  phase INTEGER NOT NULL, step INTEGER NOT NULL, sample INTEGER NOT NULL, trials INTEGER NOT NULL,
  successes INTEGER NOT NULL, PRIMARY KEY (phase, step, sample)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS buffers (
  phase INTEGER NOT NULL, sample INTEGER NOT NULL, status TEXT NOT NULL, trials INTEGER NOT NULL,
  successes INTEGER NOT NULL, PRIMARY KEY (phase, sample)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS decisions (
  phase INTEGER NOT NULL, step INTEGER NOT NULL, kind TEXT NOT NULL, numbers TEXT NOT NULL, reason TEXT NOT NULL,
  written_at REAL NOT NULL, PRIMARY KEY (phase, step, kind)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS teacher_answers (
  phase INTEGER NOT NULL, sample INTEGER NOT NULL, round INTEGER NOT NULL, idx INTEGER NOT NULL, model TEXT NOT NULL,
  text TEXT NOT NULL, reward REAL NOT NULL, success INTEGER NOT NULL, kept INTEGER NOT NULL, error TEXT,
  tokens INTEGER NOT NULL, written_at REAL NOT NULL, PRIMARY KEY (phase, sample, round, idx));
CREATE TABLE IF NOT EXISTS sft_items (
  phase INTEGER NOT NULL, position INTEGER NOT NULL, sample INTEGER NOT NULL, source TEXT NOT NULL,
  answer TEXT NOT NULL, tokens INTEGER NOT NULL, why TEXT NOT NULL, PRIMARY KEY (phase, position));
CREATE TABLE IF NOT EXISTS evaluations (
  phase INTEGER NOT NULL, step INTEGER NOT NULL, name TEXT NOT NULL, metrics TEXT NOT NULL, written_at REAL NOT NULL,
  PRIMARY KEY (phase, step, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS evaluation_answers (
  phase INTEGER NOT NULL, step INTEGER NOT NULL, name TEXT NOT NULL, sample INTEGER NOT NULL, idx INTEGER NOT NULL,
  text TEXT NOT NULL, reward REAL NOT NULL, task REAL NOT NULL, success INTEGER NOT NULL, tokens INTEGER NOT NULL,
  finish TEXT NOT NULL, parts TEXT NOT NULL, error TEXT, PRIMARY KEY (phase, step, name, sample, idx));
CREATE TABLE IF NOT EXISTS quarantine (
  path TEXT PRIMARY KEY, sample TEXT NOT NULL, reason TEXT NOT NULL, written_at REAL NOT NULL) WITHOUT ROWID;
"""

BIRTH_S = 5.0
NETWORK_FILE_SYSTEMS = {
    "nfs", "nfs4", "lustre", "cifs", "smb3", "ceph", "gpfs", "beegfs", "glusterfs", "9p", "afs", "wekafs", "panfs",
    "pvfs2", "vastnfs",
}  # fmt: skip


class LedgerError(UserError):
    """The ledger can't be used as asked; the message says what to do."""


def file_system(path: Path) -> str:
    """Type of the file system that holds `path` (as in mountinfo: ext4, nfs4, ...); empty where unknown."""
    mounts = Path("/proc/self/mountinfo")
    if not mounts.exists():
        return ""
    folder = path.resolve().parent
    best, kind = -1, ""
    for line in mounts.read_text().splitlines():
        left, _, right = line.partition(" - ")
        mount = left.split()[4].replace("\\040", " ")
        if folder.is_relative_to(mount) and len(mount) >= best:
            best, kind = len(mount), right.split()[0]
    return kind


def is_network(kind: str) -> bool:
    """Whether shared memory between processes can't be relied on there (WAL's index needs it)."""
    return kind in NETWORK_FILE_SYSTEMS or kind.startswith("fuse")


class WriterLock:
    """Held by the one process that writes. The kernel drops it when that process dies, however it dies."""

    _held: set[str] = set()

    def __init__(self, ledger: Path) -> None:
        self.path = ledger.with_name(ledger.name + ".lock")
        name = str(self.path.resolve())
        if name in self._held:
            raise LedgerError(f"{ledger} is already open for writing in this process")
        self._file: IO[str] = open(self.path, "a+")
        try:
            # POSIX locks are not inherited by forked workers, which may outlive a killed run.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                self._file.close()
                raise LedgerError(f"{self.path} can't be locked ({error}): its file system has no locks") from None
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            self._file.close()
            raise LedgerError(f"{ledger} is being written by process {owner}; end that run first") from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()} on {os.uname().nodename}\n")
        self._file.flush()
        self._name = name
        self._held.add(name)

    def release(self) -> None:
        """Let another process write."""
        if not self._file.closed:
            self._held.discard(self._name)
            self._file.close()


def _first_version(connection: sqlite3.Connection) -> tuple[str] | None:
    """The schema's version; a file that a starting run has only just made gets a few seconds to become a ledger."""
    deadline = time.monotonic() + BIRTH_S
    while True:
        try:
            return connection.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone()
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def connect(path: Path, *, write: bool, kind: str | None = None) -> sqlite3.Connection:
    """Open the file. `kind` overrides the detected file system.

    WAL lets readers in while the run writes. On a network file system WAL is unsafe, so the writer takes the whole
    file and keeps a rollback journal; readers then have a copy as of the last finished phase (`Ledger.publish`).
    """
    if not write:
        if not path.exists():
            raise LedgerError(f"no ledger at {path}")
        patience = 2 if is_network(file_system(path) if kind is None else kind) else 60
        connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=patience, isolation_level=None
        )
        try:
            version = _first_version(connection)
        except sqlite3.OperationalError as error:
            connection.close()
            advice = "is it a run's ledger?"
            if "locked" in str(error):
                advice = "on a network file system the run that writes it keeps it to itself; as of its last finished "
                advice += "phase there is a copy beside it"
            raise LedgerError(f"{path} can't be read now ({error}): {advice}") from None
    else:
        connection = sqlite3.connect(path, timeout=60, isolation_level=None)
        if is_network(file_system(path) if kind is None else kind):
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = TRUNCATE")
        else:
            connection.execute("PRAGMA journal_mode = WAL")
        # FULL: a checkpoint must never be newer than the ledger, even after a power cut.
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript("BEGIN IMMEDIATE;" + SCHEMA + "COMMIT;")
        connection.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?)", (str(SCHEMA_VERSION),))
        version = connection.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone()
    connection.execute("PRAGMA cache_size = -65536")
    connection.execute("PRAGMA temp_store = MEMORY")
    if version is None or int(version[0]) != SCHEMA_VERSION:
        connection.close()
        raise LedgerError(f"{path} has schema {version and version[0]}, this version reads {SCHEMA_VERSION}")
    return connection
