"""Write params.yaml in its canonical layout, with its comments.

DVC rewrites the whole file when an experiment changes one number: it breaks lines at column 80 and drops the alignment. The
canonical layout has each list, and each variant, in one line; the values of the variants start in one column; the data of a task
continue on a second line, which begins with `length`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.tokens import CommentToken

from pipeline.config.errors import config_error
from pipeline.config.yaml_file import check_rewritten, read_yaml
from pipeline.storage.files import atomic_write


def format_file(path: Path) -> bool:
    """Write the file in the canonical layout and return whether that changed it. Raises ParamsError if it cannot be read."""
    check_rewritten(path)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise config_error(path, ["has no mapping of sections"])
    text = path.read_text(encoding="utf-8")
    if (new := formatted(text)) == text:
        return False
    with atomic_write(path.resolve()) as part:  # a link stays: the file is the user's
        part.write_text(new, encoding="utf-8")
        if repr(read_yaml(part)) != repr(values):  # the text, because nan differs from itself
            raise ValueError(f"{path}: cannot be formatted without a change of its values; it stays as it is")
    return True


def formatted(text: str) -> str:
    """Return the text of a parameter file, a mapping, in the canonical layout."""
    content = _reader().load(text)
    for task in _mappings(content, "tasks"):
        for key in task:
            _write_in_one_line(task, key)
    for name in content.get("variants") or ():
        _write_in_one_line(content["variants"], name)
    _write_lists_in_one_line(content)
    lines = [_keep_comment_column(line.rstrip(), 0) for line in _dump(content).splitlines()]
    lines = _align_variants(lines, _reader().load("\n".join(lines)))
    lines = _break_data(lines, _reader().load("\n".join(lines)))
    return "\n".join(lines) + "\n"


def _reader() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 2**31 - 1
    return yaml


def _dump(content: Any) -> str:
    with io.StringIO() as text:
        _reader().dump(content, text)
        return text.getvalue()


def _mappings(content: Any, section: str) -> list[CommentedMap]:
    entries = content.get(section)
    return [value for value in entries.values() if isinstance(value, CommentedMap)] if isinstance(entries, CommentedMap) else []


def _write_lists_in_one_line(content: Any) -> None:
    for key in content if isinstance(content, CommentedMap) else ():
        if isinstance(content[key], CommentedSeq):
            _write_in_one_line(content, key)
        else:
            _write_lists_in_one_line(content[key])


def _write_in_one_line(parent: CommentedMap, key: Any) -> None:
    """Write the mapping or list parent[key] in braces or brackets, unless it has comments between its entries.

    The comment at its key or after its last entry moves behind it.
    """
    value = parent[key]
    if not isinstance(value, CommentedMap | CommentedSeq) or value.fa.flow_style():
        return
    at_key = [token for place in parent.ca.items.get(key, ()) for token in _flat(place)]
    after = list(_last_comments(value))
    between = {id(token) for token in _comments(value)} - {id(token) for token in (*at_key, *after)}
    if between or (at_key and any(token.value.startswith("#") for token in after if token not in at_key)):
        return  # the line has place for one comment
    _clear_comments(value)
    value.fa.set_flow_style()
    if tokens := list({id(token): token for token in (*at_key, *after)}.values()):
        tokens[0].value = "".join(token.value for token in tokens)
        parent.ca.items[key] = [None, None, tokens[0], None]


def _children(value: Any) -> list[Any]:
    return list(value.values() if isinstance(value, CommentedMap) else value if isinstance(value, CommentedSeq) else ())


def _flat(place: Any) -> list[CommentToken]:
    """The comments of one place of ruamel.yaml: None, a comment, or a list of these."""
    return [token for part in place for token in _flat(part)] if isinstance(place, list) else [place] if place else []


def _comments(value: Any) -> Iterator[CommentToken]:
    if isinstance(value, CommentedMap | CommentedSeq):
        yield from _flat([value.ca.comment, *value.ca.items.values(), value.ca.end])
        for child in _children(value):
            yield from _comments(child)


def _last_comments(value: Any) -> Iterator[CommentToken]:
    if isinstance(value, CommentedMap | CommentedSeq):
        if len(value):
            last = [*value][-1] if isinstance(value, CommentedMap) else len(value) - 1
            yield from _flat(value.ca.items.get(last))
            yield from _last_comments(value[last])
        yield from _flat(value.ca.end)


def _clear_comments(value: Any) -> None:
    if isinstance(value, CommentedMap | CommentedSeq):
        value.ca.items.clear()
        value.ca.comment, value.ca.end = None, []
        for child in _children(value):
            _clear_comments(child)


def _align_variants(lines: list[str], content: Any) -> list[str]:
    """Start the value of each variant in one column. The comment behind a value keeps its column if it can."""
    variants = content.get("variants")
    if not isinstance(variants, CommentedMap):
        return lines
    # A key of a merged mapping has no place of its own.
    places = [(variants.lc.key(name)[0], *variants.lc.value(name)) for name in variants if name in variants.lc.data]
    columns = {key_row: column for key_row, row, column in places if key_row == row}
    keys = {row: lines[row][:column].rstrip() for row, column in columns.items()}
    start = max(map(len, keys.values()), default=0) + 1
    return [
        keys[row].ljust(start) + _keep_comment_column(line[columns[row] :], start - columns[row]) if row in columns else line
        for row, line in enumerate(lines)
    ]


def _keep_comment_column(value: str, moved: int) -> str:
    """Shorten the gap before a comment by the number of columns that the value moves to the right; two spaces remain."""
    code, mark, comment = value.rpartition(" #")
    if not mark or not code.rstrip().endswith(("}", "]")):
        return value
    gap = len(code) - len(code.rstrip()) + 1
    return f"{code.rstrip()}{' ' * max(2, gap - moved)}#{comment}"


def _break_data(lines: list[str], content: Any) -> list[str]:
    """Begin a second line with `length` in the data of each task."""
    broken: dict[int, str] = {}
    for task in _mappings(content, "tasks"):
        data = task.get("data")
        if isinstance(data, CommentedMap) and data.fa.flow_style() and "length" in data and next(iter(data)) != "length":
            row, column = data.lc.key("length")
            start = task.lc.value("data")[1] + 1
            broken[row] = f"{lines[row][:column].rstrip()}\n{' ' * start}{lines[row][column:]}"
    return [broken.get(row, line) for row, line in enumerate(lines)]
