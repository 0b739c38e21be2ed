"""A store that other programs use or that cannot be used: the study waits, says what is wrong, and never advises to delete it."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest

from pipeline.tracking import database
from pipeline.tracking.database import check_database, explain
from pipeline.tracking.store import STORE, create_store, database_path, prepare, relocate_artifacts

LOCK = """
import sqlite3, sys, time
connection = sqlite3.connect("mlflow.db", isolation_level=None)
connection.execute("begin " + sys.argv[1])
connection.execute("select * from experiments").fetchone()
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def store_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        create_store()
    return folder / STORE


@pytest.fixture
def store(store_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    STORE.write_bytes(store_file.read_bytes())
    return STORE


def lock(kind, seconds):
    program = subprocess.Popen([sys.executable, "-c", LOCK, kind, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert program.stdout.readline() == "locked\n"
    return program


@pytest.mark.parametrize("kind", ["exclusive", "immediate", "deferred"])
def test_a_locked_store_is_waited_for(store, kind, capsys):
    with lock(kind, 1.5):
        assert check_database(store)
    assert capsys.readouterr().err.splitlines() == ["mlflow.db: in use by another program; waiting up to 30 s"]


def test_a_store_that_stays_locked_is_not_to_be_deleted(store, monkeypatch):
    monkeypatch.setattr(database, "WAIT_SECONDS", 1.0)
    with lock("exclusive", 60) as program:
        with pytest.raises(ValueError, match=r"^mlflow.db: in use by another program. Fix: stop that program") as raised:
            check_database(store)
        program.kill()
    assert "delete" not in str(raised.value)


def test_a_free_store_needs_no_message(store, capsys):
    assert check_database(store)
    assert capsys.readouterr().err == ""


def test_an_empty_file_is_a_store_without_tables(store):
    store.write_bytes(b"")
    assert not check_database(store)


@pytest.mark.parametrize(
    ("sql", "problem"),
    [
        ("update alembic_version set version_num = 'ffffffffffff'", "written by a newer MLflow. Fix: install"),
        ("delete from alembic_version", "no complete store of MLflow. Fix: move"),
        ("drop table alembic_version", "no complete store of MLflow. Fix: move"),
        ("drop table experiments", "no complete store of MLflow. Fix: move"),
    ],
)
def test_another_schema_is_told_as_what_it_is(store, sql, problem):
    with closing(sqlite3.connect(store)) as connection, connection:
        connection.execute(sql)
    for check in (lambda: check_database(store), lambda: prepare(["copying"])):
        with pytest.raises(ValueError, match=f"^mlflow.db: {problem}"):
            check()


def damage(store):
    content = bytearray(store.read_bytes())
    content[4096 : len(content) // 2] = b"x" * (len(content) // 2 - 4096)
    store.write_bytes(content)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_store_is_damaged_only_if_sqlite_cannot_read_it(store, is_damaged):
    if is_damaged:
        damage(store)
    line = explain(store, sqlite3.OperationalError("disk I/O error"))
    assert ("damaged" in line, "move the file" in line) == (is_damaged, is_damaged)


def test_a_store_that_another_program_reads_is_no_damage(store, monkeypatch):
    monkeypatch.setattr(database, "WAIT_SECONDS", 0.1)
    with lock("exclusive", 60) as program:
        line = explain(store, sqlite3.OperationalError("disk I/O error"))
        program.kill()
    assert "damaged" not in line


def test_only_the_artifacts_of_the_moved_study_get_new_paths(store):
    old, here = "file:///old/mlartifacts", Path("mlartifacts").resolve().as_uri()
    kept = {"own": f"{old}/other", "mine": "file:///old/elsewhere/mine"}
    runs = {"moved": f"{old}/copying/1/artifacts", "kept": "file:///old/artifacts"}
    with closing(sqlite3.connect(store)) as connection, connection:
        for name, location in {**kept, "copying": f"{old}/copying", "a b": f"{old}/a%20b"}.items():
            connection.execute("insert into experiments (name, artifact_location) values (?, ?)", [name, location])
        for name, location in runs.items():
            connection.execute("insert into runs (run_uuid, artifact_uri) values (?, ?)", [name, location])
        connection.execute("insert into registered_models (name) values ('copying')")
        model = f"{old}/copying/models/1/artifacts"
        connection.execute("insert into model_versions (name, version, storage_location) values ('copying', 1, ?)", [model])
    relocate_artifacts()
    with closing(sqlite3.connect(store)) as connection:
        found = dict(connection.execute("select name, artifact_location from experiments where name != 'Default'"))
        assert found == {**kept, "copying": f"{here}/copying", "a b": f"{here}/a%20b"}
        found = dict(connection.execute("select run_uuid, artifact_uri from runs"))
        assert found == {"moved": f"{here}/copying/1/artifacts", "kept": runs["kept"]}
        assert list(connection.execute("select storage_location from model_versions")) == [
            (f"{here}/copying/models/1/artifacts",)
        ]


@pytest.mark.parametrize(
    ("pragma", "problem"),
    [
        ("max_page_count = 1", "database or disk is full. Fix: free space"),
        ("query_only = on", "attempt to write a readonly database"),
    ],
)
def test_a_full_disk_and_a_missing_permission_are_told_as_what_they_are(store, pragma, problem):
    with closing(sqlite3.connect(store)) as connection:
        connection.execute(f"pragma {pragma}")
        with pytest.raises(sqlite3.Error) as raised:
            connection.execute("create table large as select randomblob(100000)")
    line = explain(store, raised.value)
    assert line.startswith(f"mlflow.db: {problem}")
    assert line.endswith("the store is intact")


def test_tables_that_another_program_changed_are_no_damage(store):
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("alter table experiments rename column name to title")
        with pytest.raises(sqlite3.Error) as raised:
            connection.execute("select name from experiments")
    line = explain(store, raised.value)
    assert line.startswith("mlflow.db: no such column: name: another program changed the tables of the store. Fix: move the file")
    assert "keep them" in line


def test_a_folder_in_place_of_the_store_is_named(store):
    store.unlink()
    store.mkdir()
    with pytest.raises(ValueError, match=r"^mlflow.db: is a folder, not a file. Fix: move it away"):
        check_database(store)


@pytest.mark.parametrize(
    ("folder", "uri", "is_own"),
    [
        ("study", "", True),
        ("study", "sqlite:///mlflow.db", True),
        ("study", "sqlite:///./mlflow.db", True),
        ("study", "sqlite+pysqlite:///../study/mlflow.db?timeout=9", True),
        ("study", "sqlite:///{here}/mlflow.db", True),
        ("study", "sqlite:///{here}/%6dlflow.db", True),
        ("a b?c%20d", "sqlite:///{here}/mlflow.db", True),
        ("a b?c%20d", "sqlite:///{quoted}/mlflow.db", True),
        ("study", "sqlite:///other.db", False),
        ("study", "sqlite:///{here}/../mlflow.db", False),
        ("study", "http://localhost:5000", False),
        ("study", "postgresql:///mlflow.db", False),
    ],
)
def test_the_own_store_is_found_by_any_address(folder, uri, is_own, tmp_path, monkeypatch):
    here = tmp_path / folder
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(here=here, quoted=quote(str(here))))
    assert (database_path() == STORE) == is_own
