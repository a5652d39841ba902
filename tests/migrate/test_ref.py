"""Refs: what they refuse, how they travel, and what a call through one does."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import math
import pickle
import threading
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

import migrate
from migrate import ref as ref_module
from migrate.errors import UsageError
from migrate.ref import (
    Ref,
    RemoteMethod,
    class_info,
    current_runtime,
    loading_runtime,
    ref_object,
    runtime_closed,
    runtime_opened,
)

INFO = class_info("shop:Counter", ("peek", "incr", "increase_all"))


class Recorder:
    """A runtime that notes what it was asked and answers with the name."""

    def __init__(self):
        self.calls = []

    def call(self, ref, method, args, kwargs, timeout_s):
        self.calls.append(("call", ref, method, args, kwargs, timeout_s))
        return self.answer(method)

    def cast(self, ref, method, args, kwargs, timeout_s):
        self.calls.append(("cast", ref, method, args, kwargs, timeout_s))
        return self.answer(None)

    async def answer(self, value):
        return value


@pytest.fixture
def runtime():
    return Recorder()


@pytest.fixture
def ref(runtime):
    return Ref("s1", INFO, runtime, "a", 3)


@contextlib.contextmanager
def opened(*runtimes):
    for runtime in runtimes:
        runtime_opened(runtime)
    try:
        yield
    finally:
        for runtime in runtimes:
            runtime_closed(runtime)


# ------------------------------------------------------------------- refusals


def test_an_unknown_method_is_refused_with_the_likely_one_and_all_of_them(ref):
    with pytest.raises(AttributeError) as caught:
        ref.inrc(3)

    text = str(caught.value)
    assert "Counter has no method 'inrc'" in text
    assert "did you mean 'incr'?" in text
    assert "incr, increase_all, peek" in text
    assert caught.value.name == "inrc"


@pytest.mark.parametrize("name", ["_private", "__len__", "__array__", "__iter__", "_repr_html_"])
def test_names_with_a_leading_underscore_are_no_methods(ref, name):
    assert not hasattr(ref, name)


def test_setting_an_attribute_on_a_ref_is_refused(ref):
    with pytest.raises(AttributeError, match="a ref holds nothing"):
        ref.n = 5
    assert not hasattr(ref, "n")


@pytest.mark.parametrize("timeout", [0, -1, math.nan, True, "5", [1]])
def test_a_time_out_that_is_no_positive_number_is_refused(ref, timeout):
    with pytest.raises(UsageError, match="above 0"):
        ref.incr.with_options(timeout=timeout)


@pytest.mark.parametrize(
    ("thing", "remedy"),
    [(int, "spawn it first"), ("hits", "whereis"), (3, "node.spawn"), (None, "node.spawn")],
)
def test_what_is_no_ref_is_refused_with_the_remedy(thing, remedy):
    with pytest.raises(UsageError, match=remedy):
        ref_object(thing)


def test_an_unbound_ref_without_an_open_runtime_says_how_to_open_one():
    with pytest.raises(UsageError, match="open one first"):
        Ref("s1", INFO).incr(3)
    with pytest.raises(UsageError, match="open one first"):
        Ref("s1", INFO).incr.cast(3)


def test_an_unbound_ref_does_not_choose_among_several_open_runtimes(runtime):
    other = Recorder()
    with opened(runtime, other), pytest.raises(UsageError, match=r"2 nodes or clients.*node\.call"):
        Ref("s1", INFO).incr(3)
    assert runtime.calls == other.calls == []


# --------------------------------------------------------------------- calling


def test_a_call_reaches_the_runtime_with_its_arguments_at_once(ref, runtime):
    pending = ref.incr(3, by=4)

    assert runtime.calls == [("call", ref, "incr", (3,), {"by": 4}, None)]
    assert asyncio.run(pending) == "incr"


def test_a_cast_reaches_the_runtime(ref, runtime):
    asyncio.run(ref.incr.cast(3))

    assert runtime.calls == [("cast", ref, "incr", (3,), {}, None)]


@pytest.mark.parametrize(("timeout", "timeout_s"), [(5, 5.0), (0.25, 0.25), (None, math.inf)])
def test_options_hold_for_calls_and_casts_of_that_method_only(ref, runtime, timeout, timeout_s):
    patient = ref.incr.with_options(timeout=timeout)

    for pending in (patient(1), patient.cast(2), ref.incr(3)):
        asyncio.run(pending)

    assert [call[-1] for call in runtime.calls] == [timeout_s, timeout_s, None]


def test_a_method_is_made_once_and_then_found_in_the_instance(ref):
    assert ref.incr is ref.incr
    assert isinstance(ref.incr, RemoteMethod)
    assert ref.incr != ref.peek
    assert ref.incr == Ref("s1", INFO).incr
    assert hash(ref.incr) == hash(Ref("s1", INFO).incr)


def test_inside_a_handler_an_unbound_ref_calls_through_the_handlers_node(runtime):
    with opened(Recorder(), Recorder()):
        token = current_runtime.set(runtime)
        try:
            asyncio.run(Ref("s1", INFO).incr(3))
        finally:
            current_runtime.reset(token)

    assert len(runtime.calls) == 1


def test_an_unbound_ref_follows_the_only_open_runtime_as_it_changes(runtime):
    unbound, later = Ref("s1", INFO), Recorder()

    with opened(runtime):
        asyncio.run(unbound.incr(1))
    with opened(later):
        asyncio.run(unbound.incr(2))

    assert [call[3] for call in runtime.calls] == [(1,)]
    assert [call[3] for call in later.calls] == [(2,)]


def test_opening_and_closing_a_runtime_twice_changes_nothing(runtime):
    runtime_opened(runtime)
    with opened(runtime):
        asyncio.run(Ref("s1", INFO).incr(1))
    runtime_closed(runtime)
    with pytest.raises(UsageError):
        Ref("s1", INFO).incr(2)


# ---------------------------------------------------------- a value like others


def test_refs_to_the_same_server_are_equal_wherever_they_point():
    here, there = Ref("s1", INFO, Recorder(), "a", 1), Ref("s1", INFO, None, "b", 9)

    assert here == there
    assert hash(here) == hash(there)
    assert here != Ref("s2", INFO)
    assert here != "s1"
    assert {here: 1}[there] == 1


def test_copies_of_a_ref_are_the_ref(ref):
    assert copy.copy(ref) is ref
    assert copy.deepcopy({"ref": ref})["ref"] is ref


def test_a_ref_is_an_instance_of_ref_and_ref_can_be_parametrised(ref):
    assert isinstance(ref, migrate.Ref)
    assert migrate.Ref is Ref
    assert migrate.Ref[int].__origin__ is Ref
    assert pickle.loads(pickle.dumps(Ref)) is Ref


def test_a_ref_has_no_public_names_of_its_own(ref):
    # Otherwise a server's method of that name could not be called.
    assert [name for name in dir(Ref) if not name.startswith("_")] == []
    assert [name for name in dir(ref) if not name.startswith("_")] == [
        "incr",
        "increase_all",
        "peek",
    ]


def test_the_text_of_a_ref_names_class_server_and_node(ref):
    assert repr(ref) == "<Ref Counter s1 at a>"
    assert repr(Ref("s1", INFO)) == "<Ref Counter s1>"
    assert "incr" in repr(ref.incr) and "s1" in repr(ref.incr)


def test_a_ref_that_was_used_goes_when_nobody_holds_it(runtime):
    ref = Ref("s1", INFO, runtime)
    asyncio.run(ref.incr(1))
    gone = weakref.ref(ref)
    runtime.calls.clear()

    del ref
    gc.collect()

    assert gone() is None


# ---------------------------------------------------------------------- travel


def loaded_by(runtime, data):
    token = loading_runtime.set(runtime)
    try:
        return pickle.loads(data)
    finally:
        loading_runtime.reset(token)


def test_a_ref_is_bound_to_the_runtime_that_loads_it(ref):
    target = Recorder()

    arrived = loaded_by(target, pickle.dumps(ref))
    asyncio.run(arrived.incr(3))

    assert arrived == ref
    assert [call[2:4] for call in target.calls] == [("incr", (3,))]


def test_a_method_travels_with_its_ref_and_options(ref):
    target = Recorder()

    arrived = loaded_by(target, pickle.dumps(ref.incr.with_options(timeout=2.0)))
    asyncio.run(arrived(3))

    assert [call[2:] for call in target.calls] == [("incr", (3,), {}, 2.0)]


def test_a_runtime_does_not_travel_with_a_ref():
    class Unpicklable(Recorder):
        def __reduce__(self):
            raise AssertionError("the runtime was pickled")

    ref = Ref("s1", INFO, Unpicklable())
    assert ref.incr is not None

    assert pickle.loads(pickle.dumps(ref))._runtime is None


@given(
    server_id=st.text(min_size=1),
    cls_name=st.text(min_size=1),
    methods=st.lists(st.from_regex(r"[a-z]\w{0,8}", fullmatch=True), unique=True, max_size=5),
    node=st.none() | st.text(),
    epoch=st.integers(0, 2**63),
    protocol=st.integers(2, pickle.HIGHEST_PROTOCOL),
)
def test_everything_a_ref_knows_survives_pickling(
    server_id, cls_name, methods, node, epoch, protocol
):
    ref = Ref(server_id, class_info(cls_name, tuple(methods)), None, node, epoch)

    arrived = pickle.loads(pickle.dumps(ref, protocol))

    assert arrived == ref
    assert arrived._info is ref._info
    assert (arrived._node_hint, arrived._epoch_hint) == (node, epoch)
    assert arrived._info.methods == tuple(sorted(methods))


def test_many_refs_of_a_class_share_its_facts_in_one_pickle():
    refs = [Ref(f"s{number}", INFO) for number in range(100)]
    alone = len(pickle.dumps(refs[0], 5))

    together = len(pickle.dumps(refs, 5))

    assert together < 100 * (alone - len(pickle.dumps(INFO.methods, 5)) // 2)
    assert len({id(ref._info) for ref in pickle.loads(pickle.dumps(refs))}) == 1


def test_facts_of_classes_go_with_their_last_ref():
    before = len(ref_module._class_infos)
    ref = Ref("s1", class_info("only:Here", ("x",)))
    assert len(ref_module._class_infos) == before + 1

    del ref
    gc.collect()

    assert len(ref_module._class_infos) == before


def test_a_runtime_bound_elsewhere_is_bound_anew_or_kept(ref, runtime):
    other = Recorder()

    assert ref._bound_to(runtime) is ref
    assert ref._bound_to(other)._runtime is other
    assert ref._runtime is runtime


def test_a_thread_without_a_handler_uses_the_only_open_runtime(runtime):
    failures = []

    def use():
        try:
            asyncio.run(Ref("s1", INFO).incr(1))
        except BaseException as error:
            failures.append(error)

    token = current_runtime.set(Recorder())
    with opened(runtime):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    current_runtime.reset(token)

    assert failures == []
    assert len(runtime.calls) == 1
