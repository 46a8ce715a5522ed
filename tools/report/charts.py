"""The report's charts, as Vega-Lite specifications."""

from __future__ import annotations

from fasfx.equivalence import Equivalence
from fasfx.runtime.countings import COUNTINGS
from fasfx.runtime.energy import EnergyReport
from fasfx.tools.report.theme import BLUE, ORANGE, TEAL, THEME, Spec
from fasfx.tools.report.treemap import coverage

MOST = 30  # modules in the chart of layers


def charts(measured: Equivalence, spent: EnergyReport) -> Spec:
    """theme: for all; charts: element -> specification; raster, histogram: those that wait for a site's values."""
    found = {
        "error-chart": error(measured),
        "energy-chart": energy(spent),
        "layers-chart": layers(spent),
        "coverage-chart": coverage(spent),
    }
    return {"theme": THEME, "charts": found, "raster": raster(), "histogram": histogram()}


def error(measured: Equivalence) -> Spec:
    """Error of the output and bound of one neuron against T, logarithmic."""
    names = {"relative_l2": "output, relative L2 error", "bound": "bound of one neuron, share of its threshold"}
    values = [
        {"T": int(row["timesteps"]), "what": what, "value": row[name]}
        for row in measured.table.to_dict("records")
        for name, what in names.items()
        if row[name] > 0
    ]
    tick = "tick" if measured.config.schedule == "synchronous" else "time steps T"
    return {
        "description": "Error of the output, and bound of one neuron, against the number of time steps.",
        "data": {"values": values},
        "width": "container",
        "height": 260,
        "mark": {"type": "line", "point": {"size": 60}, "tooltip": True},
        "encoding": {
            "x": {"field": "T", "type": "quantitative", "title": tick, "axis": {"tickMinStep": 1, "format": "d"}}
            | {"scale": {"zero": False}},
            "y": {"field": "value", "type": "quantitative", "scale": {"type": "log"}, "title": None},
            "color": _color("what", list(names.values()), [BLUE, ORANGE]),
            "strokeDash": {"field": "what", "scale": {"domain": list(names.values()), "range": [[1, 0], [6, 4]]}},
        },
    }


def energy(spent: EnergyReport) -> Spec:
    """Original and spiking network by each counting, what is not spiking apart."""
    values = []
    for row in spent.totals.to_dict("records"):
        left = row["spiking_pj"] * row["not_spiking"]
        parts = (
            ("original", "float or integers", row["original_pj"]),
            ("spiking", "by spikes", row["spiking_pj"] - left),
        )
        for network, part, pj in (*parts, ("spiking", "not spiking", left)):
            values.append({"counting": row["counting"], "network": network, "part": part, "uJ": pj / 1e6})
    return {
        "description": "Energy of the original and of the spiking network by three countings, in microjoule.",
        "data": {"values": values},
        "facet": {"row": {"field": "counting", "title": None, "sort": [c.name for c in COUNTINGS]}},
        "resolve": {"scale": {"x": "independent"}},
        "spec": {
            "width": 640,
            "height": 56,
            "mark": {"type": "bar", "tooltip": True},
            "encoding": {
                "x": {"field": "uJ", "type": "quantitative", "title": "µJ, all batches together"},
                "y": {"field": "network", "type": "nominal", "title": None},
                "color": _color("part", ["float or integers", "by spikes", "not spiking"], [ORANGE, BLUE, TEAL]),
            },
        },
    }


def layers(spent: EnergyReport) -> Spec:
    """The modules that cost the spiking network most, by the counting that is chosen."""
    values = []
    for one in COUNTINGS:
        frame = spent.layers.nlargest(MOST, f"{one.name}_spiking")
        for row in frame.to_dict("records"):
            for network in ("original", "spiking"):
                uj = row[f"{one.name}_{network}"] / 1e6
                module = row["module"] or "(the model)"
                values.append({"counting": one.name, "module": module, "network": network, "uJ": uj})
    choose = {"input": "select", "options": [c.name for c in COUNTINGS], "name": "counting "}
    return {
        "description": f"Energy of the {MOST} modules that cost the spiking network most, in microjoule.",
        "data": {"values": values},
        "params": [{"name": "counting", "value": COUNTINGS[0].name, "bind": choose}],
        "transform": [{"filter": "datum.counting == counting"}],
        "width": 560,
        "height": {"step": 9},
        "mark": {"type": "bar", "tooltip": True},
        "encoding": {
            "x": {"field": "uJ", "type": "quantitative", "title": "µJ, all batches together"},
            "y": {"field": "module", "type": "nominal", "title": None, "sort": "-x"},
            "yOffset": {"field": "network"},
            "color": _color("network", ["original", "spiking"], [ORANGE, BLUE]),
        },
    }


def raster() -> Spec:
    """A mark for every spike; the page fills in neuron, step, event."""
    return {
        "description": "Spikes of some neurons of a site, step by step.",
        "width": "container",
        "height": 320,
        "data": {"values": []},
        "transform": [
            {"calculate": "datum.event > 0 ? 'positive' : 'negative'", "as": "sign"},
            {"calculate": "pow(0.85, abs(datum.event) - 1)", "as": "weight"},
        ],
        "mark": {"type": "point", "filled": True, "opacity": 0.9, "tooltip": True},
        "encoding": {
            "x": {"field": "step", "type": "ordinal", "title": "time step", "axis": {"labelAngle": 0}},
            "y": {"field": "neuron", "type": "quantitative", "title": "neuron", "axis": {"grid": False}},
            "size": {"field": "weight", "type": "quantitative", "legend": None}
            | {"scale": {"domain": [0, 1], "range": [4, 70]}},
            "color": _color("sign", ["positive", "negative"], [BLUE, ORANGE]),
            "shape": {"field": "sign", "scale": {"domain": ["positive", "negative"], "range": ["circle", "diamond"]}},
        },
    }


def histogram() -> Spec:
    """|value| and thresholds of a site, shares of each; the page fills in low, high, share, what."""
    return {
        "description": "Histogram of the values of a site beside that of its thresholds.",
        "width": "container",
        "height": 320,
        "data": {"values": []},
        "mark": {"type": "bar", "opacity": 0.65, "tooltip": True},
        "encoding": {
            "x": {"field": "low", "bin": "binned", "title": "|value|, unit of the model"},
            "x2": {"field": "high"},
            "y": {"field": "share", "type": "quantitative", "stack": None, "title": "share"}
            | {"scale": {"type": "sqrt", "domainMin": 0}, "axis": {"format": "%"}},
            "color": _color("what", ["values", "thresholds"], [BLUE, ORANGE]),
        },
    }


def _color(field: str, domain: list[str], colors: list[str]) -> Spec:
    return {"field": field, "type": "nominal", "scale": {"domain": domain, "range": colors}}
