"""Errors keep every field wherever they go, and say what became of the request."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

import migrate
from migrate import errors
from migrate.errors import MigrateError, Outcome

SAMPLES = {
    "str | None": "text",
    "str": "text",
    "int | None": 7,
    "float | None": 2.5,
    "tuple[str, ...]": ("a", "b", "a"),
    "Outcome | None": Outcome.DONE,
    "Any": ("anything", 1),
}


def subclasses(cls: type) -> list[type]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in subclasses(child))]


ALL = sorted(
    {cls for cls in subclasses(MigrateError) if cls.__module__ == "migrate.errors"},
    key=lambda cls: cls.__name__,
)


def filled(cls: type[MigrateError]) -> tuple[MigrateError, dict[str, object]]:
    """Make an error in which every field that any of its classes takes is set."""
    fields: dict[str, object] = {}
    for base in cls.__mro__:
        if not issubclass(base, MigrateError) or "__init__" not in vars(base):
            continue
        for parameter in inspect.signature(base.__init__).parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                fields[parameter.name] = SAMPLES[str(parameter.annotation)]
    return cls("it failed", **fields), fields  # type: ignore[arg-type]


TRAVELS = [copy.copy, copy.deepcopy] + [
    lambda error, protocol=protocol: pickle.loads(pickle.dumps(error, protocol))
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
]


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("travel", TRAVELS)
def test_every_field_survives_copying_and_pickling(cls, travel):
    error, fields = filled(cls)
    error.add_note("seen at node b")

    arrived = travel(error)

    assert type(arrived) is cls
    assert {name: getattr(arrived, name) for name in fields} == fields
    assert arrived.args == ("it failed",)
    assert arrived.__notes__ == ["seen at node b"]
    assert str(arrived) == str(error)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_needs_only_its_message_and_states_an_outcome(cls):
    error = cls("it failed")

    assert isinstance(error.outcome, Outcome)
    assert str(error) == f"it failed; outcome={error.outcome.value}"
    assert pickle.loads(pickle.dumps(error)).outcome is error.outcome


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_the_text_names_server_node_and_cause(cls):
    error, _ = filled(cls)

    first_line = str(error).splitlines()[0]

    assert first_line.startswith("it failed; ")
    assert "server=text, node=text, cause=text" in first_line
    assert first_line.endswith("outcome=done")


def test_a_given_outcome_wins_over_the_default_of_the_class():
    assert errors.CallTimeout("late").outcome is Outcome.UNKNOWN
    assert errors.CallTimeout("late", outcome=Outcome.NOT_DONE).outcome is Outcome.NOT_DONE


def test_the_hierarchy_is_the_written_one():
    assert {cls.__name__: cls.__bases__[0].__name__ for cls in ALL} == {
        "MigrateError": "Exception",
        "WorkerLost": "CallError",
        "UsageError": "MigrateError",
        "NameTaken": "UsageError",
        "NodeNotFound": "UsageError",
        "CallError": "MigrateError",
        "CallTimeout": "CallError",
        "CallCycle": "CallError",
        "MailboxFull": "CallError",
        "ResultForgotten": "CallError",
        "ReplayDiverged": "CallError",
        "ServerNotFound": "CallError",
        "ServerLost": "CallError",
        "RolledBack": "CallError",
        "HandlerFailed": "CallError",
        "MoveError": "MigrateError",
        "NotPicklable": "MoveError",
        "TargetRefused": "MoveError",
        "MoveRolledBack": "MoveError",
        "MoveInDoubt": "MoveError",
        "StandbyError": "MigrateError",
        "StaleJournal": "StandbyError",
        "CheckpointError": "MigrateError",
        "Fenced": "MigrateError",
        "AuthError": "MigrateError",
        "PeerError": "MigrateError",
        "InternalError": "MigrateError",
    }


def test_the_outcomes_that_callers_rely_on():
    assert errors.MailboxFull("x").outcome is Outcome.NOT_DONE
    assert errors.MoveRolledBack("x").outcome is Outcome.NOT_DONE
    assert errors.CallTimeout("x").outcome is Outcome.UNKNOWN
    assert errors.ResultForgotten("x").outcome is Outcome.UNKNOWN
    assert errors.ReplayDiverged("x").outcome is Outcome.UNKNOWN
    assert errors.ServerLost("x").outcome is Outcome.UNKNOWN
    assert errors.MoveInDoubt("x").outcome is Outcome.UNKNOWN


def test_errors_are_caught_as_the_builtin_errors_that_they_also_are():
    with pytest.raises(TimeoutError):
        raise errors.CallTimeout("late", timeout_s=3.0)
    with pytest.raises(LookupError):
        raise errors.ServerNotFound("gone")
    with pytest.raises(LookupError):
        raise errors.NodeNotFound("no node b")


def test_a_remote_traceback_and_a_story_stand_on_lines_of_their_own():
    failed = errors.HandlerFailed("boom", exception_type="m:E", remote_traceback="line 1\nline 2\n")
    bug = errors.InternalError("impossible", story=("PREPARE", "TargetReady"))

    assert str(failed).endswith("outcome=done\n\nRemote traceback:\nline 1\nline 2")
    assert "exception_type=m:E" in str(failed)
    assert str(bug) == (
        "impossible; outcome=unknown\nStory, oldest first:\n  PREPARE\n  TargetReady"
    )


def test_every_error_is_public():
    assert {cls.__name__ for cls in ALL} <= set(migrate.__all__)
    assert set(errors.__all__) == {cls.__name__ for cls in ALL} | {"Outcome"}
