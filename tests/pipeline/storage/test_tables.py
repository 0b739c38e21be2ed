"""The declared columns of every table are those that the stages write."""

import csv
from dataclasses import fields
from pathlib import Path

import pytest

from cat.training.fit import ValidationRecord
from pipeline.storage import tables
from pipeline.storage.files import write_csv
from tests.helpers.study import shared_study

COLUMNS = {
    "results/copying.csv": tables.RESULTS_COLUMNS,
    "results/filters/copying.csv": tables.FILTER_COLUMNS,
    "results/rates/copying.csv": tables.RATE_COLUMNS,
    "results/references/copying.csv": tables.REFERENCE_COLUMNS,
    "runs/copying/k/history.csv": tables.HISTORY_COLUMNS,
    "verdicts/comparisons.csv": tables.COMPARISON_COLUMNS,
    "verdicts/claims.csv": tables.CLAIM_COLUMNS,
    "reports/diagnosis.csv": tables.DIAGNOSIS_COLUMNS,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return shared_study(tmp_path_factory, tasks=["copying"])


def test_history_has_the_fields_of_a_validation_record():
    names = [field.name for field in fields(ValidationRecord)]
    assert list(tables.HISTORY_COLUMNS) == ["learning_rate", "seed", *names]
    assert [name for name in names if name != "step"] == list(tables.CURVES)


def test_written_tables_have_the_declared_columns(finished):
    written = {
        str(path.relative_to(finished)) for folder in ("results", "verdicts") for path in (finished / folder).rglob("*.csv")
    }
    assert written <= COLUMNS.keys()
    for name, columns in COLUMNS.items():
        with (finished / name).open() as file:
            assert next(csv.reader(file)) == list(columns), name
        tables.read_table(finished / name, columns)


def test_a_float_keeps_all_bits_and_a_missing_value_is_nan(tmp_path):
    path = Path(tmp_path, "table.csv")
    write_csv(path, [{"name": "nan", "value": 0.1 + 0.2}, {"name": "null", "value": None}], ["name", "value"])
    table = tables.read_table(path, {"name": str, "value": float})
    assert list(table["name"]) == ["nan", "null"]
    assert table["value"][0] == 0.1 + 0.2
    assert table["value"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("content", "reason"), [("name\nx\n", "lacks the column value"), ("name,value\nx,y\n", "y"), ("name,value\nx,1", "last line")]
)
def test_a_table_without_the_declared_columns_is_refused(tmp_path, content, reason):
    path = Path(tmp_path, "table.csv")
    path.write_text(content)
    with pytest.raises(ValueError, match=f"table.csv: is not a CSV table.*{reason}"):
        tables.read_table(path, {"name": str, "value": float})
