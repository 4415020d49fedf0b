"""What the READMEs say of the model types is what the tests have."""

from __future__ import annotations

from families import ABOUT, TYPES
from table_of_types import COLUMNS, READMES, kept, largest, names, printed, table


def test_the_readmes_have_all_types_and_no_other() -> None:
    assert ABOUT.keys() == TYPES.keys()
    assert kept("names of types") == names()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in kept("types").splitlines() if "|" in line]
    assert [row[:2] for row in rows[2:]] == [[kind, ABOUT[kind][1]] for kind in TYPES]
    assert f"for {len(TYPES)} model types" in READMES[0].read_text(encoding="utf-8")


def test_the_table_has_the_largest_of_what_was_printed() -> None:
    output = "=== model types ===\n| type | grid | loss | norm | weight |\n| --- | --- | --- | --- | --- |\n"
    output += "| llama | 2×1 | 1e-07 | 2e-06 | 6e-05 |\n| llama | 4×1 | 6e-08 | 3e-06 | 2e-05 |\n2 passed\n"
    exports = [["llama", "4", "0e+00", "1e-08", "0e+00", "0e+00", "unknown", ""],
               ["llama", "5", "0e+00", "", "2e-08", "0e+00", "0e+00", "7e-06"]]  # fmt: skip
    line = next(line for line in table(printed("model types", output), exports).splitlines() if "| llama |" in line)
    found = "1e-07 | 3e-06 | 6e-05 | 0e+00 | 1e-08 | 2e-08 | 0e+00 | unknown | 7e-06"
    assert line == f"| llama |  | {found} |" and len(found.split("|")) == len(COLUMNS)
    assert largest([]) == ""
