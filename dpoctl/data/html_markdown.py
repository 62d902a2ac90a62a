"""HTML of posts as Markdown: code, lists, links, images, headings, quotes and tables; other marks leave their text."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

from dpoctl.data.records import Reject

DEEPEST = 50
"""Levels of nesting beyond which tags leave their text alone."""
HEADINGS = {f"h{level}": level for level in range(1, 7)}
BLOCKS = {"p", "div", "pre", "blockquote", "ul", "ol", "li", "dl", "dt", "dd", "table", "tr", "td", "th", *HEADINGS}
INLINE = {"code", "a", "sup", "sub"}
ENDED_BY = {"li": {"li"}, "tr": {"tr"}, "td": {"td", "th", "tr"}, "th": {"td", "th", "tr"}, "dt": {"dt", "dd"}}
ENDED_BY |= {"dd": {"dt", "dd"}, "p": BLOCKS - {"td", "th", "tr"}, **{tag: {*HEADINGS, "p"} for tag in HEADINGS}}
"""Elements that may lack their end tag, and the elements whose start ends them."""
HIDDEN = {"script", "style"}
LISTS = ("ul", "ol")
LANGUAGE = re.compile(r"\blang(?:uage)?-(?!none\b)([\w+#-]{1,20})")
BLANKS = re.compile(r"\s+")
TICKS = re.compile(r"`+")


@dataclass
class _Element:
    """An element that is open: the blocks that it holds so far, and the text that is no block yet."""

    tag: str
    attributes: dict[str, str]
    blocks: list[tuple[str, str]] = field(default_factory=list)
    """The tag and the Markdown of each."""
    line: list[str] = field(default_factory=list)

    def end_line(self) -> None:
        """Make a paragraph of the text that is no block yet."""
        if text := "".join(self.line).strip(" \n"):
            self.blocks.append(("p", text))
        self.line = []

    def add_text(self, text: str) -> None:
        """Add text, with one blank for each run of white space."""
        text = BLANKS.sub(" ", text)
        if not self.line or self.line[-1].endswith((" ", "\n")):
            text = text.lstrip(" ")
        if text:
            self.line.append(text)

    def break_line(self) -> None:
        """Start a new line within a paragraph."""
        if self.line:
            self.line[-1] = self.line[-1].rstrip(" ")
            self.line.append("\n")


def html_to_markdown(html: str) -> str:
    """Convert HTML to Markdown, with a blank line between paragraphs; code keeps its white space.

    Emphasis is left out, and characters that mean something in Markdown are not escaped: a model should learn the
    text, and its code. Only `|` is escaped, in the cells of tables.

    Raises:
        Reject: A script or a style sheet does not end, so that what follows it is lost.
    """
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.result()


class _Reader(HTMLParser):
    """Builds Markdown from tags, in which end tags may be missing or stray."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open = [_Element("", {})]
        self._hidden = ""
        """The element that is open whose text is left out."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        if tag in HIDDEN:
            self._hidden = tag
        if self._verbatim and tag != "code":
            self._break_code(tag)
            return
        while self._top.tag in ENDED_BY and tag in ENDED_BY[self._top.tag]:
            self._close()
        if tag == "br":
            self._top.break_line()
        elif tag == "hr":
            self._top.end_line()
        elif tag == "img" and attributes.get("src"):
            self._top.line.append(f"![{attributes.get('alt', '')}]({attributes['src']})")
        elif tag in BLOCKS | INLINE and len(self._open) < DEEPEST:
            if tag in BLOCKS:
                self._top.end_line()
            if tag in ("td", "th") and self._top.tag == "table":
                self._open.append(_Element("tr", {}))
            self._open.append(_Element(tag, attributes))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in HIDDEN:
            self.handle_starttag(tag, attrs)
        if tag in BLOCKS | INLINE:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == self._hidden:
            self._hidden = ""
        if tag in BLOCKS | INLINE and any(element.tag == tag for element in self._open):
            while self._close() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if self._verbatim:
            self._top.line.append(data)
        else:
            self._top.add_text(data)

    def result(self) -> str:
        """Return the Markdown of everything that was read, or raise `Reject` if some of it was left out by mistake."""
        if self._hidden:
            raise Reject("unclosed_html", f"<{self._hidden}> does not end, and hides the rest of the text")
        while len(self._open) > 1:
            self._close()
        return _body(self._top)

    @property
    def _top(self) -> _Element:
        return self._open[-1]

    @property
    def _verbatim(self) -> bool:
        """Whether white space counts: inside of code."""
        return any(element.tag in ("pre", "code") for element in self._open[-2:])

    def _break_code(self, tag: str) -> None:
        if tag == "br":
            self._top.line.append("\n")

    def _close(self) -> str:
        """End the innermost element, and give its Markdown to the one around it."""
        element = self._open.pop()
        around = self._top
        if element.tag == "code" and around.tag == "pre":
            around.line += element.line
            around.attributes = {
                "class": around.attributes.get("class", "") + " " + element.attributes.get("class", "")
            }
        elif element.tag == "pre" or (element.tag == "code" and "\n" in "".join(element.line).strip("\n")):
            around.end_line()
            around.blocks.append(("pre", _fenced(element)))
        elif element.tag in INLINE:
            if text := _inline(element):
                around.line.append(text)
        elif text := _block(element):
            around.blocks.append((element.tag, text))
        return element.tag


def _body(element: _Element) -> str:
    """Join the blocks of an element: those of a list or a table stand close, others have a blank line between them."""
    element.end_line()
    text = ""
    for tag, block in element.blocks:
        is_close = tag in ("li", "tr", "dd", *(LISTS if element.tag == "li" else ()))
        text += ("\n" if is_close else "\n\n") * bool(text) + block
    return text


def _block(element: _Element) -> str:
    match element.tag:
        case "ul":
            return _list(element, ["- "] * len(element.blocks))
        case "ol":
            first = int(start) if (start := element.attributes.get("start", "")).isdecimal() and len(start) < 9 else 1
            return _list(element, [f"{first + place}. " for place in range(len(element.blocks))])
        case "blockquote":
            return "\n".join(f"> {line}".rstrip() for line in _body(element).split("\n"))
        case "tr":
            element.end_line()
            cells = [" ".join(block.split()).replace("|", "\\|") for _, block in element.blocks]
            return f"| {' | '.join(cells)} |" if cells else ""
        case "table":
            element.end_line()
            # A caption, and whatever else stands between the rows, would break the table apart.
            others = [block for block in element.blocks if block[0] != "tr"]
            rows = [block for block in element.blocks if block[0] == "tr"]
            if rows:
                rows.insert(1, ("tr", f"|{' --- |' * (rows[0][1].count(' | ') + 1)}"))
                rows[0] = ("table", rows[0][1])  # a blank line before it
            element.blocks = others + rows
            return _body(element)
        case heading if heading in HEADINGS:
            text = " ".join(_body(element).split())
            return f"{'#' * HEADINGS[heading]} {text}" if text else ""
        case _:
            return _body(element)


def _list(element: _Element, markers: list[str]) -> str:
    element.end_line()
    items = []
    for marker, (_, block) in zip(markers, element.blocks, strict=False):
        inner = block.replace("\n", "\n" + " " * len(marker))
        items.append(marker + re.sub(r"(?m)^ +$", "", inner))
    return "\n".join(items)


def _inline(element: _Element) -> str:
    if element.tag == "code":
        return _ticked("".join(element.line).strip("\n"))
    text = _body(element) if element.blocks else "".join(element.line)
    inner = text.strip()
    if not inner:
        return " " * bool(text)
    if element.tag == "a":
        target = element.attributes.get("href", "")
        marked = inner if target in ("", inner) else f"[{inner}]({target})"
    else:
        mark = "^" if element.tag == "sup" else "_"
        marked = mark + (inner if len(inner) == 1 or inner.isalnum() else f"({inner})")
    before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return " " * bool(before) + marked + " " * bool(after)


def _ticked(code: str) -> str:
    """Mark code in a line by more backticks than it holds in a row."""
    if not code:
        return ""
    ticks = "`" * (_longest_ticks(code) + 1)
    blank = " " if code.startswith("`") or code.endswith("`") else ""
    return f"{ticks}{blank}{code}{blank}{ticks}"


def _fenced(element: _Element) -> str:
    """Mark a block of code by a fence, with its language where the class names one."""
    code = "".join(element.line).strip("\n")
    fence = "`" * max(3, _longest_ticks(code) + 1)
    language = LANGUAGE.search(element.attributes.get("class", ""))
    return f"{fence}{language[1] if language else ''}\n{code}\n{fence}"


def _longest_ticks(code: str) -> int:
    return max(map(len, TICKS.findall(code)), default=0)
