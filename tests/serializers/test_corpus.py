"""The corpus of stateful classes: each is carried twice and behaves, or is refused as it should."""

from __future__ import annotations

import pytest

from tests.serializers.corpus.cases import Case, case
from tests.serializers.corpus.runner import VARIANTS, Outcome, failures, run, select, table

CASES = select()


def test_the_corpus_is_large_and_has_all_kinds_of_subjects() -> None:
    assert len([c for c in CASES if not c.refused]) >= 150
    assert len([c for c in CASES if c.refused]) >= 20
    assert len({c.subject for c in CASES}) >= 8


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    """All cases and variants through one chain of processes, which import the packages once."""
    return run(CASES, hops=[2])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_case_is_carried_over_two_hops_or_refused(
    outcomes: list[Outcome], variant: str
) -> None:
    found = [o for o in outcomes if o.variant == variant]

    assert failures(found) == ""
    assert sum(o.status != "skip" for o in found) > 150


BROKEN = Case(
    name="broken",
    subject="none",
    source="""
class Thing:
    def __init__(self):
        self.n = 1
    def __getstate__(self):
        return {"n": 2}

def build():
    return Thing()

def check(thing):
    assert thing.n == 1
""",
)


def _one(source: str, **options: str) -> Outcome:
    made = Case(name="made", subject="none", source=source, **options)  # type: ignore[arg-type]
    (outcome,) = run([made], variants=["importable"], hops=[1])
    return outcome


def test_a_copy_that_misbehaves_is_wrong() -> None:
    (outcome,) = run([BROKEN], variants=["main"], hops=[1])

    assert outcome.status == "wrong" and not outcome.good
    assert "broken" in failures([outcome]) and "0.0 %" in table([outcome])


def test_an_original_that_a_dump_has_changed_is_harmed() -> None:
    outcome = _one(
        """
class Thing:
    def __getstate__(self):
        self.dumped = True
        return {}

def build():
    return Thing()

def check(thing):
    assert not hasattr(thing, "dumped")
"""
    )

    assert outcome.status == "harmed"


def test_a_process_that_dies_is_a_crash_and_is_replaced() -> None:
    fatal = Case("fatal", "none", "def build():\n    import os\n    os._exit(3)\ndef check(x): ...")

    found = run([fatal, BROKEN], variants=["importable"], hops=[1])

    assert [o.status for o in found] == ["crash", "wrong"]


def test_a_refusal_has_to_name_its_path() -> None:
    source = "import socket\ndef build():\n    return {'a': socket.socketpair()}\ndef check(x): ..."

    assert _one(source, refused="['a'][0]", reason="connected").good
    assert not _one(source, refused="['b']").good
    assert not _one(source, refused="['a'][0]", reason="something else").good
    assert not _one("def build():\n    return 1\ndef check(x): ...", refused="int").good


def test_two_cases_of_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match="two cases"):

        @case
        def deque_with_maxlen() -> None: ...


def test_what_is_not_installed_is_skipped_with_the_reason() -> None:
    absent = Case("absent", "none", "def build(): ...\ndef check(x): ...", needs=("no_such_thing",))
    (outcome,) = run([absent], variants=["main"], hops=[1])

    assert (outcome.status, outcome.detail) == ("skip", "not installed: no_such_thing")
