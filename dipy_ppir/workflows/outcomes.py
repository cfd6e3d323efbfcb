"""What became of the pairs of a cohort: a table in a file, and in words."""

from collections import Counter
import csv
from dataclasses import astuple, dataclass, fields
import io
from pathlib import Path

from dipy_ppir.workflows.outputs import OutputFiles
from dipy_ppir.workflows.progress import size_text
from dipy_ppir.workflows.receiptfile import printable

FILE = "outcomes.tsv"
#: In the order of the summary.
STATUSES = ("done", "failed", "skipped", "open")


@dataclass(frozen=True)
class Outcome:
    """What became of a pair, a row of the table.

    Attributes
    ----------
    pair, moving, static : str
    status : str
        "done", "failed", "skipped" (a site did not come) or "open" (not tried yet).
    seconds : float or None
        that the command took, this time.
    bytes : int or None
        that all parties sent.
    warnings : str
        of the receipt.
    bits_moving_owner, bits_static_owner : float or None
        that were opened to them.
    error : str
        the one line that this site's own command said.
    receipt : str
        path of the receipt.
    """

    pair: str
    moving: str
    static: str
    status: str
    seconds: float | None = None
    bytes: int | None = None
    warnings: str = ""
    bits_moving_owner: float | None = None
    bits_static_owner: float | None = None
    error: str = ""
    receipt: str = ""


COLUMNS = tuple(field.name for field in fields(Outcome))


def table_text(outcomes):
    """The table with a row for each outcome, tabs between columns.

    Parameters
    ----------
    outcomes : iterable of Outcome

    Returns
    -------
    text : str
        without any other control character.
    """
    stream = io.StringIO()
    writer = csv.writer(
        stream, "excel-tab", lineterminator="\n", quoting=csv.QUOTE_NONE
    )
    writer.writerow(COLUMNS)
    for outcome in outcomes:
        row = ["n/a" if value in (None, "") else value for value in astuple(outcome)]
        writer.writerow(
            # A quote would need an escape of its own.
            printable(str(value), 4000).replace('"', "'")
            for value in row
        )
    return stream.getvalue()


def write_table(folder, outcomes):
    """Write the table of outcomes whole, or not at all."""
    file = Path(folder) / FILE
    with OutputFiles([file], [], force=True) as out:
        out.temporary(file).write_text(table_text(outcomes), encoding="utf-8")
        out.commit()


def summary(outcomes):
    """The outcomes in words, for people.

    Parameters
    ----------
    outcomes : sequence of Outcome

    Returns
    -------
    text : str
    """
    counts = Counter(outcome.status for outcome in outcomes)
    said = ", ".join(f"{counts[s]} {s}" for s in STATUSES if counts[s])
    lines = [f"{len(outcomes)} pair{'s'[: len(outcomes) != 1]}: {said}."]
    sent = sum(o.bytes or 0 for o in outcomes)
    if sent:
        lines.append(f"All parties of those that are done sent {size_text(sent)}.")
    for outcome in outcomes:
        if outcome.warnings:
            lines.append(f"{outcome.pair}, warning: {outcome.warnings}")
    for outcome in outcomes:
        if outcome.status in ("failed", "skipped"):
            lines.append(f"{outcome.pair}, {outcome.status}: {outcome.error}")
    return "\n".join(lines)
