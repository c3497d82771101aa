"""What the records of some examples come to."""

from collections.abc import Iterable, Sequence
from typing import Any

from evocert.certify.records import Row


def summary(rows: Iterable[Row], methods: Sequence[str]) -> dict[str, Any]:
    """Fractions of all examples, in [0, 1].

    Returns:
        ``natural``: classified correctly; ``attacked``: correctly, and no counterexample is known; ``certified``: for each
        method the part that it was the first to prove, and their ``total``; ``undecided``; ``examples`` and ``seconds``;
        ``contradictions``: the examples that are certified and broken at once.
    """
    rows = list(rows)
    count = max(1, len(rows))
    verdicts = [row.verdict for row in rows]
    proved = [row.by for row in rows if row.verdict == "certified"]
    order = [*methods, *sorted({by for by in proved if by is not None} - set(methods))]
    certified = {method: proved.count(method) / count for method in order if method != "attack"}
    correct = len(rows) - verdicts.count("misclassified")
    return {
        "examples": len(rows),
        "natural": correct / count,
        "attacked": (correct - verdicts.count("attacked")) / count,
        "certified": {**certified, "total": len(proved) / count},
        "undecided": verdicts.count("undecided") / count,
        "seconds": round(sum(row.seconds for row in rows), 3),
        "contradictions": [
            {"index": row.index, "certified_by": row.by, "broken_by": row.contradicted}
            for row in rows
            if row.contradicted is not None
        ],
    }
