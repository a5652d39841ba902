"""What is committed belongs to the project: no traces of the machine it was made on."""

from __future__ import annotations

import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Written so that no pattern matches its own text.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.~])/(?:wor[k]|roo[t])(?=[/\s'\"`)]|$)",
    "the home of one user": r"(?<![\w.~])/(?:hom[e]|User[s])/\w",
    "a virtual environment of one machine": r"/tm[p]/\w*ven[v]|\bpyen[v]\b",
    "the host of a package registry": r"\b(?:pyp[i]\.org|pythonhoste[d]|npmj[s]\.|golan[g]\.org)",
    "a trailer that names an author": r"(?im)^\s*(?:co-authored|signed-of[f])-b[y]:",
    "how a text was made": r"(?i)\b(?:generated|written) (?:by|with) (?:an? )?(?:A[I]|LL[M])\b",
    "unfinished work": r"\b(?:TOD[O]|FIXM[E]|XX[X])\b",
    "a conflict left in the text": r"(?m)^(?:<{7}|>{7}) ",
}

# The bytes of the licence and of generated code are not ours to choose.
NOT_OURS = re.compile(r"LICENSE$|rpc/v1/.*_pb2")


def tracked_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = [name for name in listed.stdout.split("\0") if name]
    if not names:
        # An unpacked source distribution has no repository.
        names = [
            str(path.relative_to(ROOT))
            for folder in ("migrate", "rpc", "serializers", "tests", "proto", "examples")
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ]
    return [name for name in names if (ROOT / name).is_file()]


def offences(text: str) -> list[str]:
    patterns = {**FORBIDDEN, "the path of this checkout": re.escape(str(ROOT) + "/")}
    return [
        f"{what}: {match[0].strip()!r} in line {text.count(chr(10), 0, match.start()) + 1}"
        for what, pattern in patterns.items()
        for match in re.finditer(pattern, text)
    ]


def test_tracked_files_hold_no_traces_of_a_machine():
    names = tracked_files()
    found = {}
    for name in names:
        if NOT_OURS.search(name):
            continue
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # Saved messages and pictures; not text.
        if problems := offences(text):
            found[name] = problems

    assert found == {}
    assert "migrate/__init__.py" in names


def test_no_tracked_file_is_a_build_product_or_huge():
    products = [
        name
        for name in tracked_files()
        if re.search(r"__pycache__|\.py[co]$|\.egg-info|\.db$|\.(?:mypy|ruff|pytest)_cache", name)
        or (ROOT / name).stat().st_size > 1_000_000
    ]

    assert products == []


@pytest.mark.parametrize(
    "text",
    [
        "see /wor" + "k/main",
        "open('/roo" + "t/x')",
        "/hom" + "e/me/x",
        "/tm" + "p/venv-3/bin",
        "https://pyp" + "i.org/simple",
        "Co-authored-b" + "y: someone",
        "TOD" + "O: later",
        "<" * 7 + " HEAD",
        str(ROOT) + "/x",
    ],
)
def test_a_trace_is_found(text: str):
    assert offences(text) != []


@pytest.mark.parametrize("text", ["the server's work/life", "proto/root", "~/home", "a/work"])
def test_ordinary_text_is_no_trace(text: str):
    assert offences(text) == []
