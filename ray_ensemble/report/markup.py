"""HTML that is escaped unless it was built here, and the page's style."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from ray_ensemble.report.theme import DARK, DPI, LIGHT, Theme

SHOWN_DPI = 108  # CSS pixels an inch of a figure takes on the page


class Html(str):
    """Markup made by this module. Any other string is text from somewhere and gets escaped."""

    __slots__ = ()


_VOID = {"img", "meta", "source"}


def escape(content: object) -> Html:
    """Markup as it is, anything else as escaped text without control characters."""
    if isinstance(content, Html):
        return content
    text = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in str(content))
    return Html(html.escape(text, quote=True))


def element(name: str, *children: object, **attributes: str | None) -> Html:
    """`<name …>children</name>`, children and attribute values escaped; a trailing `_` of an attribute is dropped."""
    written = "".join(
        f' {key.rstrip("_")}="{html.escape(value, quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{''.join(map(escape, children))}</{name}>")


def join(parts: Iterable[object], between: object = "") -> Html:
    """Parts one after the other, with `between` between them."""
    return Html(escape(between).join(escape(part) for part in parts))


def paragraph(*children: object, class_: str | None = None) -> Html:
    """A paragraph."""
    return element("p", *children, class_=class_)


def bullets(items: Iterable[object]) -> Html:
    """A list, one item a line."""
    return element("ul", *(element("li", item) for item in items))


def section(title: str, *children: object) -> Html:
    """A section with its heading."""
    return element("section", element("h2", title), *children)


def table(head: Sequence[object], rows: Sequence[Sequence[object]], foot: Sequence[object] = (), text: int = 1) -> Html:
    """A table that scrolls sideways where it is too wide.

    Args:
        head: one cell a column.
        rows: cells, markup or text; a cell that is a whole `<td>` already is taken as it is.
        foot: a last row, set apart.
        text: how many columns from the left are text; the others are figures and stand to the right.
    """

    def row(cells: Sequence[object], tag: str) -> Html:
        made = []
        for place, cell in enumerate(cells):
            whole = isinstance(cell, Html) and cell.startswith("<td")
            made.append(cell if whole else element(tag, cell, class_=None if place < text else "n"))
        return element("tr", *made)

    body = [element("thead", row(head, "th")), element("tbody", *(row(cells, "td") for cells in rows))]
    if foot:
        body.append(element("tfoot", row(foot, "td")))
    return element("div", element("table", *body), class_="wide")


def picture(light: bytes, dark: bytes, alt: str) -> Html:
    """One PNG for light and one for dark mode, inside the page."""

    def uri(data: bytes) -> str:
        return "data:image/png;base64," + base64.b64encode(data).decode("ascii")

    # Bytes 16 to 19 of a PNG hold its width in pixels; shown at one scale, all figures have letters of one size.
    width = str(int.from_bytes(light[16:20], "big") * SHOWN_DPI // DPI)
    in_dark = element("source", srcset=uri(dark), media="(prefers-color-scheme: dark)")
    return element("picture", in_dark, element("img", src=uri(light), alt=alt, width=width))


def figure(content: object, caption: str) -> Html:
    """A figure with its caption."""
    return element("figure", content, element("figcaption", caption))


def document(title: str, *children: object) -> Html:
    """The whole page. Nothing in it is fetched: the policy in its head forbids it."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name_="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(_style())),
    )
    body = element("body", element("main", *children))
    return Html(f'<!doctype html>\n<html lang="en">{head}{body}</html>\n')


def _variables(theme: Theme, page: str) -> str:
    return (
        f"--page:{page};--card:{theme.surface};--ink:{theme.ink};--muted:{theme.muted};--line:{theme.grid};"
        f"--joint:{theme.joint};--ours:{theme.ours};--hurts:{theme.hurts}"
    )


def _style() -> str:
    light, dark = _variables(LIGHT, "#f6f5f2"), _variables(DARK, "#121211")
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{_RULES}"


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;line-height:1.25;margin:0 0 6px}
h2{font-size:19px;margin:0 0 10px}
h3{font-size:15px;margin:18px 0 6px}
section,.tile{background:var(--card);border:1px solid var(--line);border-radius:8px}
section{padding:20px 22px;margin:18px 0}
p{margin:8px 0;max-width:80ch}
ul{margin:8px 0;padding-left:20px}
li{max-width:80ch}
dt{font-weight:600;margin-top:8px}
dd{margin:0 0 0 18px;max-width:78ch}
.lead{color:var(--muted);overflow-wrap:anywhere}
.muted,small,figcaption{color:var(--muted)}
.bad{color:var(--hurts);font-weight:600}
.note{border-left:3px solid var(--line);padding-left:10px;color:var(--muted)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));gap:12px;margin:18px 0}
.tile{padding:14px 16px}
.tile b{display:block;font-size:25px;line-height:1.2;font-variant-numeric:tabular-nums}
.tile small{display:block}
.wide{overflow-x:auto;margin:10px 0 14px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:5px 12px 5px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);overflow-wrap:break-word}
th{color:var(--muted);font-weight:600;vertical-align:bottom;overflow-wrap:normal}
td,th{max-width:26em}
td:first-child{max-width:15em}
td:nth-child(-n+2){min-width:5em}
.n{text-align:right;padding-left:12px}
td.n{white-space:nowrap}
td small{display:block;font-size:12px}
tfoot td{border-top:2px solid var(--muted);border-bottom:0;font-weight:600}
tfoot td{white-space:nowrap}
tfoot small{font-weight:400}
td.w{background:color-mix(in srgb,var(--ours) calc(var(--share)*70%),transparent)}
figure{margin:16px 0 8px}
figure img{display:block;max-width:100%;height:auto}
figcaption{font-size:13.5px;max-width:85ch;margin-top:6px}
pre{overflow-x:auto;font:12.5px/1.45 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
summary{cursor:pointer;font-weight:600}
.group{display:inline-block;padding:1px 8px;margin:2px 4px 2px 0;border:1px solid var(--line);border-radius:10px}
@media print{section{break-inside:avoid}}
"""
