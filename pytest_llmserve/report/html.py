"""The HTML report: one file that opens from disk, holds all it needs and asks nobody for more.

Needs the extra `report` (Altair, vl-convert, Jinja2). The page's own Content-Security-Policy allows
its two scripts by their hashes and no connection at all, so that foreign text can neither run nor
phone even if something here failed to escape it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.report.digest import WORDS, Json, cases_of
from pytest_llmserve.report.files import write_whole

if TYPE_CHECKING:
    from pytest_llmserve.report.charts import Figure


def require() -> None:
    """Raises ConfigError, naming the mend, if the packages of the extra are not installed."""
    if any(find_spec(name) is None for name in ("altair", "vl_convert", "jinja2")):
        raise ConfigError(
            "the HTML report (--llmserve-report) needs packages that are not installed: "
            "pip install pytest-llmserve[report]"
        )


def write_report(
    path: Path,
    documents: Sequence[Json],
    *,
    base: Path | Sequence[Path],
    baselines: Path | None = None,
) -> None:
    """Write the report of one or more result documents, whole or not at all.

    `base` is the folder (or one a document) that the `events` paths of their runs are relative
    to; `baselines` the folder of baselines to draw runs against. Raises ConfigError without the
    extra `report`, and if the file cannot be written.
    """
    require()
    bases = [base] * len(documents) if isinstance(base, Path) else list(base)
    try:
        write_whole(path, render(documents, bases, baselines))
    except OSError as error:
        raise ConfigError(
            f"report {path} cannot be written ({error.strerror}): name a file in a folder that is "
            "there and writable"
        ) from None


def render(documents: Sequence[Json], bases: Sequence[Path], baselines: Path | None = None) -> str:
    """The report's HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from pytest_llmserve.report.charts import specifications
    from pytest_llmserve.report.page import Page

    page = Page(baselines)
    context = page.context(cases_of(documents, bases))
    data = {
        "specs": _paint(specifications()),
        "figures": [_figure(figure) for figure in page.gallery.figures],
        "config": _config(),
    }
    scripts = (_library(), _template("page.js"))
    environment = Environment(
        loader=PackageLoader("pytest_llmserve.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        **context,
        data=_json(data),
        scripts=scripts,
        hashes=[_hash(script) for script in scripts],
        style=_themes() + _template("page.css"),
        figures=page.gallery.figures,
        words=WORDS,
    )


def _figure(figure: Figure) -> dict[str, Any]:
    plain = asdict(figure)
    return {k: v for k, v in plain.items() if v not in ("", {})}


def _config() -> Any:
    from pytest_llmserve.report.themes import config

    return config("page")


def _paint(tree: Any) -> Any:
    from pytest_llmserve.report.themes import painted

    return painted(tree, "page")


def _themes() -> str:
    """The colours as CSS variables: light, dark where the system or the reader wants it, light on
    paper."""
    from pytest_llmserve.report.themes import THEMES

    light, dark = (
        "".join(f"--{name[1:]}:{colour};" for name, colour in THEMES[theme].items())
        for theme in ("light", "dark")
    )
    return (
        f":root{{{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark)"
        f"{{:root:not([data-theme=light]){{{dark}color-scheme:dark}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{{dark}color-scheme:dark}}}}\n"
    )


@functools.cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script."""
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return str(script).replace("</script", "<\\/script")


def _template(name: str) -> str:
    return resources.files("pytest_llmserve.report").joinpath("templates", name).read_text("utf-8")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(data: Any) -> str:
    """JSON that no HTML parser can take for markup."""
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    return data
