"""The ledger's tables as JSONL or Parquet files, for pandas, DuckDB or a spreadsheet.

python -m dppo_mcore.practice.ledger_export RUN/ledger.sqlite --out FOLDER [--format parquet] [--tables rollouts ...]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from dppo_mcore.practice.ledger import TABLES, Ledger
from dppo_mcore.practice.ledger_rollouts import unpack_numbers

JSON_COLUMNS = {"cursor", "numbers", "metrics", "parts", "versions", "media", "gold"}
BATCH_ROWS = 10_000


def export(
    ledger: Ledger,
    folder: str | Path,
    *,
    form: Literal["jsonl", "parquet"] = "jsonl",
    tables: Sequence[str] = tuple(TABLES),
    tokens: bool = True,
) -> list[Path]:
    """Write one file per table and return their paths. `tokens=False` leaves token ids and log-probs out."""
    unknown = set(tables) - set(TABLES)
    if unknown:
        raise ValueError(f"unknown tables {sorted(unknown)}; there are {', '.join(TABLES)}")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for table in tables:
        path = target / f"{table}.{form}"
        rows = _rows(ledger, table, tokens)
        if form == "parquet":
            _write_parquet(path, rows)
        else:
            with open(path, "w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row) + "\n")
        paths.append(path)
    return paths


def _rows(ledger: Ledger, table: str, tokens: bool) -> Iterator[dict[str, Any]]:
    for row in ledger.table(table, TABLES[table]):
        if table == "rollouts":
            ids, logprobs, count = row.pop("token_ids"), row.pop("logprobs"), row["tokens"]
            if tokens:
                row["token_ids"] = None if ids is None else unpack_numbers(ids, count, {2: "<u2", 4: "<i4"})
                row["logprobs"] = None if logprobs is None else unpack_numbers(logprobs, count, {4: "<f4", 8: "<f8"})
            row["success"] = bool(row["success"])
        yield {name: _decoded(name, value) for name, value in row.items()}


def _decoded(name: str, value: Any) -> Any:
    return json.loads(value) if name in JSON_COLUMNS and isinstance(value, str) else value


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Columns that hold JSON of any shape are written as JSON text, so that every file of a table has one schema."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise RuntimeError("Parquet needs pyarrow: install it, or export JSONL") from None
    writer, stream = None, iter(rows)
    while batch := list(islice(stream, BATCH_ROWS)):
        flat = [{n: json.dumps(v) if n in JSON_COLUMNS else v for n, v in row.items()} for row in batch]
        table = pa.Table.from_pylist(flat, schema=None if writer is None else writer.schema)
        if writer is None:
            fields = [pa.field(f.name, pa.string() if pa.types.is_null(f.type) else f.type) for f in table.schema]
            table = table.cast(pa.schema(fields))
            writer = pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is None:
        pq.write_table(pa.table({}), path)
    else:
        writer.close()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger")
    parser.add_argument("--out", required=True)
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--no-tokens", action="store_true")
    arguments = parser.parse_args()
    with Ledger(arguments.ledger, write=False) as ledger:
        for path in export(
            ledger, arguments.out, form=arguments.format, tables=arguments.tables, tokens=not arguments.no_tokens
        ):
            print(path)


if __name__ == "__main__":
    main()
