"""STAR files as text: blocks by name, every cell as the text it was.

A file is read a line at a time and its large tables by pandas' reader in C; no pattern is matched
against more than a line, so that the time is proportional to the file.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

# Bytes of lines that pandas reads as STAR does: no quotes, comments or control characters.
_PLAIN_BYTES = bytes({9, *range(32, 256)} - {*b"\"'#", 127})
_CELL = re.compile(r"\"([^\"]*)\"(?=\s|$)|'([^']*)'(?=\s|$)|(\S+)")
# A longer line is no row of a table; RELION's have some hundred characters.
_MAX_LINE = 1_000_000


@dataclass(eq=False)
class _StarBlock:
    """What was seen of a block while its lines passed; rows are read afterwards."""

    path: Path
    name: str
    is_loop: bool = False
    columns: list[str] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)
    # Byte at which the first row of a loop begins, and line of the file that it is.
    start: int = -1
    first_line: int = 0
    n_rows: int = 0
    is_plain: bool = True
    after_comment: bool = False

    def take(self, line: bytes, number: int, offset: int) -> None:
        """Take one line of the block that is neither blank nor a comment."""
        if line.startswith(b"_") and (not self.is_loop or self.n_rows == 0):
            self._take_name(line, number)
        elif line.startswith(b"loop_"):
            self.is_loop = True
        elif self.is_loop and self.columns:
            self._take_row(line, number, offset)
        else:
            reason = f"line {number} is neither a name nor a row: {_line_start(line)}"
            raise _broken(self.path, reason)

    def _take_name(self, line: bytes, number: int) -> None:
        cells = _cells(line.decode("utf-8"))
        name = cells[0][1:]
        if not name or name in self.columns or name in self.values:
            raise _broken(self.path, f"line {number} names no new column: {_line_start(line)}")
        if self.is_loop:
            self.columns.append(name)
        elif len(cells) == 2:
            self.values[name] = cells[1]
        else:
            raise _broken(self.path, f"line {number} has no single value: {_line_start(line)}")

    def _take_row(self, line: bytes, number: int, offset: int) -> None:
        if self.n_rows == 0:
            self.start = offset
            self.first_line = number
        self.n_rows += 1
        # A comment among the rows, which pandas would take for a row.
        self.is_plain = self.is_plain and not self.after_comment
        if line.translate(None, _PLAIN_BYTES):
            self.is_plain = False
            n_cells = len(_cells(line.decode("utf-8")))
        else:
            n_cells = len(line.split())
        if n_cells != len(self.columns):
            reason = f"line {number} has {n_cells} cells for {len(self.columns)} columns"
            raise _broken(self.path, reason)


def read_star(path: Path) -> dict[str, pd.DataFrame | dict[str, str]]:
    """Blocks of a STAR file by name: a DataFrame of text for a loop, a dictionary for pairs.

    Raises
    ------
    ValueError
        Where a line is no part of such a file, or is no UTF-8 text.

    Examples
    --------
    >>> path = Path("results/doc/tiny.star")
    >>> _ = path.write_text("data_a\\n_x 1\\n\\ndata_b\\nloop_\\n_y\\n_z #2\\n1 'b c'\\n")
    >>> blocks = read_star(path)
    >>> blocks["a"], blocks["b"].to_dict("records")
    ({'x': '1'}, [{'y': '1', 'z': 'b c'}])
    """
    blocks: dict[str, pd.DataFrame | dict[str, str]] = {}
    try:
        for block in _scan(path):
            if block.is_loop:
                blocks[block.name] = _read_rows(path, block)
            elif block.values:
                blocks[block.name] = block.values
    except (UnicodeDecodeError, OSError) as error:
        raise _broken(path, str(error)) from error
    return blocks


def _broken(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"expected a RELION .star file, got {path} ({reason}); try exporting it again"
    )


def _scan(path: Path) -> list[_StarBlock]:
    """The blocks of the file, with the positions of their rows."""
    blocks: list[_StarBlock] = []
    offset = 0
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise _broken(path, "it is compressed, and has to be unpacked with gunzip first")
        file.seek(0)
        for number, raw in enumerate(iter(lambda: file.readline(_MAX_LINE + 1), b""), 1):
            if len(raw) > _MAX_LINE:
                raise _broken(path, f"line {number} has more than {_MAX_LINE:,} characters")
            line = raw.strip()
            if line.startswith(b"data_"):
                blocks.append(_StarBlock(path, line[5:].split(b"#")[0].strip().decode("utf-8")))
            elif line.startswith(b"#"):
                if blocks:
                    blocks[-1].after_comment = blocks[-1].n_rows > 0
            elif line and blocks:
                blocks[-1].take(line, number, offset)
            offset += len(raw)
    return blocks


def _read_rows(path: Path, block: _StarBlock) -> pd.DataFrame:
    if not block.n_rows:
        return pd.DataFrame({name: pd.Series(dtype=object) for name in block.columns})
    if block.is_plain:
        table = _read_plain_rows(path, block)
        if table is not None:
            return table
    rows: list[list[str]] = []
    with open(path, "rb") as file:
        file.seek(block.start)
        while len(rows) < block.n_rows:
            line = file.readline().strip()
            if line and not line.startswith(b"#"):
                rows.append(_cells(line.decode("utf-8")))
    return pd.DataFrame(rows, columns=block.columns, dtype=object)


def _read_plain_rows(path: Path, block: _StarBlock) -> pd.DataFrame | None:
    """The rows as pandas reads them; None where it sees others than were counted."""
    with open(path, "rb") as file:
        file.seek(block.start)
        try:
            table = pd.read_csv(
                file,
                sep=r"\s+",
                header=None,
                names=block.columns,
                index_col=False,
                nrows=block.n_rows,
                # Not pandas' own text: equal cells then share one object, and reading is faster.
                dtype=object,
                na_filter=False,
                quoting=3,
                engine="c",
            )
        except UnicodeDecodeError:
            raise
        except ValueError:
            return None
    is_whole = table.shape == (block.n_rows, len(block.columns))
    if not is_whole or bool((table.iloc[:, -1] == "").any()):
        return None
    return table


def _cells(line: str) -> list[str]:
    """Cells of a line, without their quotes; a # where a cell would begin opens a comment."""
    cells = []
    for match in _CELL.finditer(line):
        if match[0].startswith("#"):
            break
        double, single, plain = match.groups()
        cells.append(next(text for text in (double, single, plain) if text is not None))
    return cells


def _line_start(line: bytes) -> str:
    return repr(line[:60].decode("utf-8", errors="replace"))


def parse_numbers(text: pd.Series) -> np.ndarray:
    """(n,) float64 values of text; NaN where a cell is no number.

    Examples
    --------
    >>> parse_numbers(pd.Series(["1", "2e3", "x"])).tolist()
    [1.0, 2000.0, nan]
    """
    try:
        return pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64)
    except (OverflowError, TypeError):
        return np.array([_number(cell) for cell in text], dtype=np.float64)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return np.nan
