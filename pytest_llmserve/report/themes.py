"""The colours of the report, light and dark.

Colours are names (`@ink`, `@blue`, …) that a theme of `THEMES` resolves. The data colours are those
of Okabe and Ito, which stay apart for colour-blind readers; lines differ in dash or marker too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

THEMES: Mapping[str, Mapping[str, str]] = {
    "light": {
        "@ink": "#1f2328", "@muted": "#59616b", "@line": "#d5d9de", "@paper": "#fffefb",
        "@blue": "#0072b2", "@sky": "#56b4e9", "@orange": "#d55e00", "@amber": "#b87900",
        "@green": "#00795a", "@pink": "#b0578d", "@region": "#009e73", "@band": "#8c959f",
    },
    "dark": {
        "@ink": "#e6e4df", "@muted": "#a3a7ad", "@line": "#3a3f46", "@paper": "#16181b",
        "@blue": "#56b4e9", "@sky": "#2f86bd", "@orange": "#f08a4b", "@amber": "#e6b84c",
        "@green": "#3cc79e", "@pink": "#d98fbd", "@region": "#3cc79e", "@band": "#8b949e",
    },
}  # fmt: skip

_FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', sans-serif"


def config(theme: str) -> dict[str, Any]:
    """The Vega-Lite configuration of a theme: thin axes, few grid lines, no frames."""
    plain: dict[str, Any] = {
        "background": "transparent",
        "font": _FONT,
        "view": {"stroke": None},
        "padding": {"left": 2, "right": 8, "top": 4, "bottom": 2},
        "axis": {
            "domainColor": "@line", "tickColor": "@line", "gridColor": "@line", "gridOpacity": 0.6,
            "labelColor": "@muted", "titleColor": "@muted", "titleFontWeight": "normal",
            "labelFontSize": 11, "titleFontSize": 11, "tickSize": 4, "domain": False,
        },
        "axisX": {"grid": False, "domain": True},
        "title": {
            "anchor": "start", "color": "@ink", "fontSize": 13, "fontWeight": 600, "frame": "group",
            "subtitleColor": "@orange", "subtitleFontSize": 11, "subtitleFontStyle": "italic",
            "offset": 8,
        },
        "legend": {
            "labelColor": "@muted", "title": None, "orient": "top", "labelFontSize": 11,
            "direction": "horizontal", "symbolStrokeWidth": 2, "offset": 4, "labelLimit": 300,
        },
        "text": {"color": "@muted", "fontSize": 11},
        "rule": {"color": "@muted"},
    }  # fmt: skip
    resolved: dict[str, Any] = painted(plain, theme)
    return resolved


def painted(tree: Any, theme: str) -> Any:
    """A specification with its colour names resolved: for the theme "page" into CSS variables,
    so that a page changes its theme without drawing anew."""
    if isinstance(tree, dict):
        return {key: painted(value, theme) for key, value in tree.items()}
    if isinstance(tree, list):
        return [painted(value, theme) for value in tree]
    if isinstance(tree, str) and tree in THEMES["light"]:
        return f"var(--{tree[1:]})" if theme == "page" else THEMES[theme][tree]
    return tree
