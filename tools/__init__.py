"""The pass tools, as functions; `fasfx passes` has a command for each."""

if __name__ != "fasfx.tools":
    raise ImportError("import fasfx.tools, not tools")

from fasfx.tools.bisecting import Culprit, bisect
from fasfx.tools.diffing import diff
from fasfx.tools.explaining import Explanation, explain
from fasfx.tools.reducing import Reduced, reduce, replay
from fasfx.tools.running import run
from fasfx.tools.subjects import Subject, subject
from fasfx.tools.verifying import Broken, verify

__all__ = [
    "Broken",
    "Culprit",
    "Explanation",
    "Reduced",
    "Subject",
    "bisect",
    "diff",
    "explain",
    "reduce",
    "replay",
    "run",
    "subject",
    "verify",
]
