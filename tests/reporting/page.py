"""What a report's page holds, for tests without a browser."""

import base64
import gzip
import html
import json
import re


def data_of(path):
    """Return the data that a report's tables and figures are drawn from."""
    packed = re.search(r'<script type="application/gzip" id="data">(.*?)</script>', path.read_text())[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def text_of(path):
    """Return the page's own text, without scripts and styles."""
    text = re.sub(r"<(script|style)\b.*?</\1>", "", path.read_text(), flags=re.DOTALL)
    return html.unescape(text).replace("\xa0", " ")


def rows_of(data, query, difference):
    """Return the rows of a query's table, as dictionaries; the difference by its position."""
    columns = data["queries"][query]["ranked"][difference]["rows"]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
