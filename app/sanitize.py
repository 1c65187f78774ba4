"""HTML that a model wrote, or copied from a page, to HTML that is safe to show."""

from __future__ import annotations

import re
from html import escape
from html.parser import HTMLParser


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Structure and looks of a document. Nothing that runs, loads, navigates or asks.
_TAGS = _names(
    "a abbr address article aside b blockquote body br caption center cite code col colgroup dd "
    "del details dfn div dl dt em figcaption figure font footer h1 h2 h3 h4 h5 h6 head header hr "
    "html i ins kbd li main mark nav ol p pre q s samp section small span strike strong sub "
    "summary sup table tbody td tfoot th thead time title tr tt u ul var wbr"
)
_DROPPED = _names(  # with all that is in them
    "script style iframe object embed applet template noscript noembed noframes svg math textarea "
    "select xmp plaintext"
)
_VOID = _names("br col hr wbr")
_ATTRIBUTES = _names(
    "align alt bgcolor border cellpadding cellspacing class color colspan datetime dir headers "
    "height lang rowspan scope size span start title type valign value width"
)
_STYLES = _names(
    "background-color border border-bottom border-collapse border-left border-right border-top "
    "color font-family font-size font-style font-weight height letter-spacing line-height "
    "list-style-type margin margin-bottom margin-left margin-right margin-top padding "
    "padding-bottom padding-left padding-right padding-top text-align text-decoration text-indent "
    "text-transform vertical-align white-space width"
)
_PAGE = """<style>
body {{ font-family: system-ui, sans-serif; line-height: 1.5; margin: 1rem; color: #18181b;
  background: #fff; overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; }} td, th {{ border: 1px solid #a1a1aa; padding: .3em .6em; }}
.picture {{ border: 1px dashed #a1a1aa; padding: .3em .6em; color: #52525b; }}
</style>{body}"""


def sanitize(html: str) -> str:
    """Only what lays a document out. Pictures become their descriptions, links plain text."""
    parser = _Sanitizer()
    parser.feed(html)
    parser.close()
    return parser.result()


def framed(html: str, title: str) -> str:
    """A frame that shows a document and can do nothing else: no script, no form, no request."""
    page = _PAGE.format(body=sanitize(html))
    return (
        f'<iframe class="page" sandbox="" title="{escape(title)}" srcdoc="{escape(page)}"></iframe>'
    )


class _Sanitizer(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._open: list[str] = []
        self._dropped: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _DROPPED:
            self._dropped.append(tag)
        if self._dropped:
            return
        if tag == "img":
            described = dict(attrs).get("alt") or "picture"
            self._parts.append(f'<span class="picture">{escape(described)}</span>')
        elif tag in _TAGS:
            kept = "".join(f' {n}="{escape(v)}"' for n, v in map(_attribute, attrs) if v)
            self._parts.append(f"<{tag}{kept}>")
            if tag not in _VOID:
                self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _DROPPED:  # HTML knows no self-closing; an empty one drops nothing
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if self._dropped:
            if tag == self._dropped[-1]:
                self._dropped.pop()
            return
        if tag in self._open:
            while (last := self._open.pop()) != tag:
                self._parts.append(f"</{last}>")
            self._parts.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if not self._dropped:
            self._parts.append(escape(data, quote=False))

    def result(self) -> str:
        return "".join([*self._parts, *(f"</{tag}>" for tag in reversed(self._open))])


def _attribute(pair: tuple[str, str | None]) -> tuple[str, str]:
    """A name and a value to keep; an empty value where neither is."""
    name, value = pair
    if name == "style":
        return name, _style(value or "")
    return name, (value or "") if name in _ATTRIBUTES else ""


def _style(text: str) -> str:
    """The declarations that only change looks: no URL, no function, no position."""
    kept = []
    for declaration in text.split(";"):
        name, _, value = declaration.partition(":")
        name, value = name.strip().lower(), value.strip()
        if name in _STYLES and re.fullmatch(r"[\w\s#.,%'\"-]+", value):
            kept.append(f"{name}: {value}")
    return "; ".join(kept)
