"""Local text: which files of a source are read, and which split each belongs to.

The rule is the first that applies:

    names      a file or folder name announces a split (test.txt, wiki.test.tokens, train-00000-of-00010.txt, valid/a.txt);
               then every file must announce one, and every split must have one
    position   a single file is cut 8 : 1 : 1
    digest     a digest of the path assigns each file, 8 : 1 : 1; equal files follow the first of them
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

SUFFIXES = (".txt", ".md", ".tokens")
SPLITS = ("train", "valid", "test")
_SPLIT_OF = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}
_PART_OF_NAME = {
    **_SPLIT_OF,
    **{f"{word}{end}": split for word, split in _SPLIT_OF.items() for end in ("set", "data", "split")},
    "training": "train",
    "eval": "valid",
    "evaluation": "valid",
    "testing": "test",
}
_ABOUT = {"readme", "license", "licence", "copying", "notice", "authors", "citation", "changelog"}
_SHARD = re.compile(r"[-_ (]*\d+\)?([-_ ]?of[-_ ]?\d+)?$", re.IGNORECASE)
_WORDS = re.compile(r"[-_ ]+|(?<=[a-z0-9])(?=[A-Z])")
"""What separates the words of a name: a sign, or a capital letter as in myTrain.txt."""
_SHOWN = 5
_BLANK = 4096
"""Largest file in bytes that is searched for text: a larger file of white space only is unlikely."""


class Local(NamedTuple):
    """The files of a source: names relative to it, sorted."""

    source: Path
    rule: Literal["names", "position", "digest"]
    files: dict[str, list[str]]
    """By split. With the rule `position`, each split has the same file."""
    skipped: dict[str, list[str]]
    """By reason."""
    equal: list[list[str]]
    """Groups of files with equal contents."""

    def path(self, name: str) -> Path:
        return self.source / name if self.source.is_dir() else self.source

    def report(self) -> list[str]:
        """List the split rule, the skipped files and the equal files, one line each."""
        if not self.source.exists():
            return [f"{self.source}: is missing; generate needs it"]
        rule = {
            "names": "file names announce the splits",
            "position": "one file, cut 8 : 1 : 1",
            "digest": "no name announces a split, so a digest of the path assigns each file, 8 : 1 : 1",
        }[self.rule]
        sizes = {split: sum(self.path(name).stat().st_size for name in names) for split, names in self.files.items()}
        if self.rule == "position":
            total = sizes["train"]
            sizes = {"train": total * 8 // 10, "valid": total * 9 // 10 - total * 8 // 10, "test": total - total * 9 // 10}
        parts = ", ".join(f"{s} {_count(len(names), 'file')} and {sizes[s]:,} bytes" for s, names in self.files.items())
        lines = [f"{self.source}: {rule}: {parts}"]
        if self.skipped:
            lines.append(f"{self.source}: skips {_skips(self.skipped)}")
        split_of = {name: split for split, names in self.files.items() for name in names}
        across = [group for group in self.equal if len({split_of[name] for name in group}) > 1]
        within = [group for group in self.equal if group not in across]
        if across:
            shown = [" = ".join(_few([f"{name} ({split_of[name]})" for name in group])) for group in across]
            texts = _count(len(across), "text")
            lines.append(f"{self.source}: splits overlap, {texts} in more than one: {', '.join(_few(shown))}")
        if within:
            shown = [" = ".join(_few(group)) for group in within]
            lines.append(f"{self.source}: equal files, each group in one split: {', '.join(_few(shown))}")
        return lines


def find(source: Path, limit: int) -> Local:
    """Find the files of a source, a file or a folder of at most `limit` bytes, and their splits.

    Raises ValueError if there is no text or too much, if only some names announce a split, or if a split would be empty.
    """
    if not source.is_dir():
        return Local(source, "position", {split: [source.name] for split in SPLITS}, {}, [])
    names, skipped = walk(source)
    kinds = " or ".join((", ".join(SUFFIXES[:-1]), SUFFIXES[-1]))
    if not names:
        also = f" (skipped: {_skips(skipped)})" if skipped else ""
        raise ValueError(f"{source}: contains no {kinds} file with text{also}")
    check_size(source, sum((source / name).stat().st_size for name in names), limit)
    announced = _announced(source, names)
    equal = _equal(source, names)
    if announced is None and len(names) == 1:
        return Local(source, "position", dict.fromkeys(SPLITS, names), skipped, [])
    if announced is None:
        local = Local(source, "digest", _by_digest(names, equal), skipped, equal)
    else:
        if about := [name for name in names if name not in announced]:
            skipped["about the text"] = about
        equal = [group for group in ([name for name in group if name in announced] for group in equal) if len(group) > 1]
        files = {split: [name for name in names if announced.get(name) == split] for split in SPLITS}
        local = Local(source, "names", files, skipped, equal)
    if empty := [split for split in SPLITS if not local.files[split]]:
        raise ValueError(_no_file(local, empty))
    return local


def digest_split(name: str) -> str:
    """The split of a text by a digest of its name, 8 : 1 : 1."""
    return {0: "valid", 1: "test"}.get(hashlib.sha256(os.fsencode(name)).digest()[0] % 10, "train")


def check_size(path: Path, size: int, limit: int) -> None:
    """Raise ValueError if a file or folder has more text than `limit`."""
    if size > limit:
        raise ValueError(f"{path}: has {size:,} bytes of text, more than the limit of {limit:,}")


def walk(source: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Find the text files below a folder, and everything else by the reason to skip it.

    Raises ValueError if a part of the folder cannot be read.
    """
    names: list[str] = []
    skipped: defaultdict[str, list[str]] = defaultdict(list)

    def fail(error: OSError) -> None:
        raise ValueError(f"{error.filename}: {error.strerror}")

    for folder, subfolders, files in os.walk(source, onerror=fail):
        relative = Path(folder).relative_to(source)
        for name in list(subfolders):
            reason = _reason_to_skip_folder(Path(folder) / name)
            if reason:
                subfolders.remove(name)
                skipped[reason].append(f"{(relative / name).as_posix()}/")
        for name in files:
            reason = _reason_to_skip(Path(folder) / name)
            (skipped[reason] if reason else names).append((relative / name).as_posix())
    return sorted(names), {reason: sorted(skipped[reason]) for reason in sorted(skipped)}


def _reason_to_skip_folder(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    return "link to a folder" if path.is_symlink() else None


def _reason_to_skip(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if path.suffix.lower() not in SUFFIXES:
        return "another extension"
    if not path.is_file():
        return "broken link" if path.is_symlink() else "not a file"
    try:
        size = path.stat().st_size
        return "empty" if size == 0 or (size <= _BLANK and not path.read_bytes().strip()) else None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def _announced(source: Path, names: list[str]) -> dict[str, str] | None:
    """The split that each name announces; None if no name does.

    A word of a longer name, as in wiki-test.txt or how-to-test.md, counts only if the names have both train and another split.
    """
    clear = {name: _clear_splits(name) for name in names}
    found = {name: clear[name] or _splits_in_words(name) for name in names}
    splits = set().union(*found.values())
    if not (any(clear.values()) or ("train" in splits and len(splits) > 1)):
        return None
    for name, both in found.items():
        if len(both) > 1:
            raise ValueError(f"{source}: {name} announces {' and '.join(sorted(both))}. Fix: rename it to announce one split")
    about = {name for name in names if not found[name] and Path(name).name.lower().split(".")[0] in _ABOUT}
    yes, no = [name for name in names if found[name]], [name for name in names if not found[name] and name not in about]
    if no:
        raise ValueError(
            f"{source}: {_listed(yes, 2)} announce{'s' * (len(yes) == 1)} a split, but {_listed(no, 3)}"
            f" do{'es' * (len(no) == 1)} not. Fix: put each file in train/, valid/ or test/, remove it,"
            " or rename the files that announce a split by mistake"
        )
    return {name: min(found[name]) for name in yes}


def _clear_splits(name: str) -> set[str]:
    """The splits announced by the top folder, or by a part of the file name between dots."""
    *folders, file = name.lower().split("/")
    parts = [*folders[:1], *file.split(".")[:-1]]
    return {_SPLIT_OF[word] for word in (_SHARD.sub("", part) for part in parts) if word in _SPLIT_OF}


def _splits_in_words(name: str) -> set[str]:
    """The splits announced by the first or last word of a part of the path."""
    *folders, file = name.split("/")
    parts = [_WORDS.split(_SHARD.sub("", part)) for part in (*folders, *file.split(".")[:-1])]
    words = {word.lower() for words in parts for word in (words[0], words[-1])}
    return {_PART_OF_NAME[word] for word in words if word in _PART_OF_NAME}


def _equal(source: Path, names: list[str]) -> list[list[str]]:
    """Groups of names whose files have equal contents. Only files of equal size are read."""
    by_size, by_digest = defaultdict(list), defaultdict(list)
    try:
        for name in names:
            by_size[(source / name).stat().st_size].append(name)
        for name in (name for group in by_size.values() if len(group) > 1 for name in group):
            with (source / name).open("rb") as file:
                by_digest[hashlib.file_digest(file, "sha256").digest()].append(name)
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from None
    return sorted(group for group in by_digest.values() if len(group) > 1)


def _by_digest(names: list[str], equal: list[list[str]]) -> dict[str, list[str]]:
    first = {name: group[0] for group in equal for name in group}
    split_of = {name: digest_split(first.get(name, name)) for name in names}
    return {split: [name for name in names if split_of[name] == split] for split in SPLITS}


def _no_file(local: Local, empty: list[str]) -> str:
    problem = f"{local.source}: {' and '.join(empty)} would have no file"
    skipped = f"; it skips {_skips(local.skipped)}" if local.skipped else ""
    if local.rule == "names":
        first = next(name for split in SPLITS for name in local.files[split])
        fix = f"add {' and '.join(f'{split}.txt' for split in empty)}, or set source to one file to cut it 8 : 1 : 1"
        return f"{problem}: names such as {first} announce the splits{skipped}. Fix: {fix}"
    count = _count(sum(map(len, local.files.values())), "file")
    same = ", and equal files share one" if local.equal else ""
    fix = "put the files in train/, valid/ and test/, or join them to one file, to cut it 8 : 1 : 1"
    return f"{problem}: a digest of the path gives each of {count} a split{same}{skipped}. Fix: {fix}"


def _skips(skipped: dict[str, list[str]]) -> str:
    return ", ".join(f"{len(names)} ({reason}: {', '.join(_few(names))})" for reason, names in skipped.items())


def _few(names: list[str]) -> list[str]:
    return names if len(names) <= _SHOWN else [*names[: _SHOWN - 1], f"{len(names) - _SHOWN + 1} more"]


def _listed(names: Iterable[str], shown: int) -> str:
    names = list(names)
    rest = [f"{len(names) - shown} more"] if len(names) > shown else []
    return " and ".join(filter(None, [", ".join(names[:shown]), *rest]))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
