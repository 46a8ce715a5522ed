"""Colours and type of the report's charts."""

from __future__ import annotations

from typing import Any

Spec = dict[str, Any]
INK = "currentColor"  # text and lines follow the page, light or dark
BLUE, ORANGE, TEAL = "#3b82c4", "#d9731a", "#1a9988"  # 3 : 1 or more on white and on the dark ground; colour-blind safe
THEME: Spec = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {"labelColor": INK, "titleColor": INK, "domainColor": INK, "tickColor": INK, "gridColor": INK}
    | {"gridOpacity": 0.15, "labelFontSize": 12, "titleFontSize": 12, "labelLimit": 320},
    "legend": {"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "labelLimit": 400}
    | {"orient": "top", "title": None},
    "header": {
        "labelColor": INK,
        "labelAngle": 0,
        "labelAlign": "left",
        "labelFontSize": 12,
        "labelFontWeight": "bold",
    },
}
