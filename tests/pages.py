"""A page, parsed, and a report in each of its forms."""

from __future__ import annotations

from html.parser import HTMLParser

from qkit.report import write as report

VOID = {"meta", "link", "img", "br", "hr", "input", "rect", "circle", "line"}


class Page(HTMLParser):
    """Checks nesting, and collects tags, attributes and text."""

    def __init__(self, page: str):
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] != "style":
            self.text += data


def bodies(result):
    return {
        "html": Page(report.to_html(result)).text,
        "markdown": report.to_markdown(result).replace("\\", ""),
        "summary": report.summary(result),
    }
