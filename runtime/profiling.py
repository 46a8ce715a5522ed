"""Where the nodes of an exported network ran, and how long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

KERNEL = "_kernel_time"


def read_profile(file: Path) -> pandas.DataFrame:
    """ONNX Runtime's own profile as a table: node, operator, provider, microseconds; a row for every node that ran."""
    import pandas

    events = json.loads(file.read_text(encoding="utf-8"))
    rows = [
        {
            "node": event["name"].removesuffix(KERNEL),
            "operator": event["args"]["op_name"],
            "provider": event["args"]["provider"],
            "microseconds": event["dur"],
        }
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL)
    ]
    return pandas.DataFrame(rows, columns=["node", "operator", "provider", "microseconds"])
