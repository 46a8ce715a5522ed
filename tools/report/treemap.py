"""Coverage as a treemap, which Vega-Lite has not: a Vega specification."""

from __future__ import annotations

from fasfx.runtime.energy import EnergyReport
from fasfx.tools.report.theme import BLUE, ORANGE, TEAL, Spec

WIDTH, HEIGHT = 900, 420
ROOM = "datum.x1 - datum.x0 > 70 && datum.y1 - datum.y0 > 18"  # for a label


def coverage(spent: EnergyReport) -> Spec:
    """A Vega treemap: every operator, its area what it computes, its colour what drives it."""
    table = spent.table[(spent.table["macs"] + spent.table["functions"]) > 0]
    kinds = {"spikes, weights": BLUE, "spikes, functions": TEAL, "float": ORANGE}
    modules = [{"id": f"/{module}", "parent": "/"} for module in dict.fromkeys(table["module"])]
    leaves = [
        {
            "id": row["node"],
            "parent": f"/{row['module']}",
            "name": f"{row['module'] or 'the model'}: {row['operator']}",
            "size": row["macs"] + row["functions"],
            "by": "float" if not row["spike_driven"] else f"spikes, {'functions' if row['functions'] else 'weights'}",
        }
        for row in table.to_dict("records")
    ]
    box = {"x": {"field": "x0"}, "x2": {"field": "x1"}, "y": {"field": "y0"}, "y2": {"field": "y1"}}
    tree: Spec = {
        "name": "tree",
        "values": [{"id": "/"}, *[m for m in modules if m["id"] != "/"], *leaves],
        "transform": [
            {"type": "stratify", "key": "id", "parentKey": "parent"},
            {"type": "treemap", "field": "size", "round": True, "paddingInner": 1, "size": [WIDTH, HEIGHT]}
            | {"sort": {"field": "value", "order": "descending"}},
        ],
    }
    shown = {"name": "leaves", "source": "tree", "transform": [{"type": "filter", "expr": "datum.by"}]}
    big = {"name": "big", "source": "leaves", "transform": [{"type": "filter", "expr": ROOM}]}
    label = {"signal": "truncate(datum.name, (datum.x1 - datum.x0) / 6.5, 'left')"}
    return {
        "description": "Every operator by what it computes and by what drives it: spikes or float.",
        "width": WIDTH,
        "height": HEIGHT,
        "data": [tree, shown, big],
        "scales": [{"name": "by", "type": "ordinal", "domain": list(kinds), "range": list(kinds.values())}],
        "legends": [{"fill": "by", "orient": "top", "direction": "horizontal", "symbolType": "square"}],
        "marks": [
            {
                "type": "rect",
                "from": {"data": "leaves"},
                "encode": {
                    "enter": {
                        "fill": {"scale": "by", "field": "by"},
                        "tooltip": {
                            "signal": "{operator: datum.name, 'computed': format(datum.size, ','), by: datum.by}"
                        },
                        **box,
                    }
                },
            },
            {
                "type": "text",
                "from": {"data": "big"},
                "interactive": False,
                "encode": {
                    "enter": {
                        "x": {"field": "x0", "offset": 4},
                        "y": {"field": "y0", "offset": 13},
                        "text": label,
                        "fill": {"value": "#ffffff"},
                        "fontSize": {"value": 11},
                    }
                },
            },
        ],
    }
