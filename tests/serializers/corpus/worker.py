"""A process that builds and dumps, or loads and checks, the cases that it is told to.

It reads one JSON request a line from standard input and answers each with one line on the
descriptor it was given, so that its reader knows which one killed it.
"""

from __future__ import annotations

import builtins
import faulthandler
import importlib
import json
import os
import pathlib
import sys
import textwrap
import traceback
import types
from collections.abc import Callable
from typing import Any

NOTEBOOK = "__notebook__"
HANG_S = {"ours": 240.0}
HANG_OTHERS_S = 15.0
"""A step that takes longer than this hangs. It bounds a failure: nothing waits for it to pass, and
other tools' known hangs would else take an hour."""


def tool(name: str) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    """The two functions of a serializer."""
    if name == "ours":
        import serializers

        return serializers.dumps, serializers.loads
    module: Any = importlib.import_module(name)
    if name == "pickle":
        return (lambda obj: module.dumps(obj, 5)), module.loads
    return module.dumps, module.loads


def builder_of(request: dict[str, Any], folder: pathlib.Path) -> Callable[[], Any]:
    """The case's `build`, defined where its variant says."""
    name, variant, source = request["name"], request["variant"], request["builder"]
    if variant in ("importable", "local"):
        module = importlib.import_module(f"{variant}_{name}")
        found: Any = module.scope() if variant == "local" else module.build
        return found
    if variant == "main":
        namespace = sys.modules["__main__"].__dict__
        filename = "<main>"
    else:
        # Like a notebook's own module: known to this process, and to be found on no disk.
        cell = types.ModuleType(NOTEBOOK)
        sys.modules[NOTEBOOK] = cell
        namespace = cell.__dict__
        filename = "<cell 1>"
    exec(compile(source, filename, "exec"), namespace)
    build: Any = namespace["build"]
    return build


def write_modules(folder: pathlib.Path, name: str, builder: str, checker: str) -> None:
    """Write the modules of the variants that can be imported, in whole."""
    (folder / f"importable_{name}.py").write_text(builder, encoding="utf-8")
    inside = textwrap.indent(builder, "    ") + "    return build\n"
    (folder / f"local_{name}.py").write_text(f"def scope():\n{inside}", encoding="utf-8")


def check_of(request: dict[str, Any]) -> Callable[[Any], None]:
    namespace: dict[str, Any] = {"__name__": "checker", "__builtins__": builtins}
    exec(compile(request["checker"], f"<check {request['name']}>", "exec"), namespace)
    check: Callable[[Any], None] = namespace["check"]
    return check


def describe(exc: BaseException) -> str:
    """An exception on one line, with the last place of a case's own source in it."""
    places = [
        f"{entry.name}:{entry.lineno}"
        for entry in traceback.extract_tb(exc.__traceback__)
        if entry.filename.startswith("<") and not entry.filename.startswith("<frozen")
    ]
    text = " ".join(f"{type(exc).__name__}: {exc}".split())
    return f"{text[:500]}" + (f" [{places[-1]}]" if places else "")


def answer(request: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Do one step.

    Returns:
        `status`: ok, refused, load, wrong or harmed; and `detail`.
    """
    dumps, loads = tool(request["tool"])
    step = request["step"]
    if step == "build":
        obj = builder_of(request, folder)()
        try:
            data = dumps(obj)
        except Exception as exc:
            facts = {key: getattr(exc, key, "") for key in ("path", "reason", "remedy")}
            result: dict[str, Any] = {"status": "refused", "detail": describe(exc), "facts": facts}
        else:
            pathlib.Path(request["data"]).write_bytes(data)
            result = {"status": "ok", "detail": f"{len(data)}"}
        if request["harmless"] and not request.get("is_refusal"):
            try:
                check_of(request)(obj)
            except Exception as exc:
                return {"status": "harmed", "detail": describe(exc)}
        # What is refused keeps resources of the system; the end of the process frees them.
        kept.append(obj)
        return result
    try:
        obj = loads(pathlib.Path(request["data"]).read_bytes())
    except Exception as exc:
        return {"status": "load", "detail": describe(exc)}
    if step == "hop":
        try:
            data = dumps(obj)
        except Exception as exc:
            return {"status": "refused", "detail": f"second hop: {describe(exc)}"}
        pathlib.Path(request["next"]).write_bytes(data)
        kept.append(obj)
        return {"status": "ok", "detail": ""}
    check = check_of(request)
    try:
        check(obj)
    except Exception as exc:
        return {"status": "wrong", "detail": describe(exc)}
    kept.append(obj)
    return {"status": "ok", "detail": ""}


kept: list[Any] = []


def main(folder: pathlib.Path, out: int) -> None:
    """Answer requests until there are no more."""
    sys.path.insert(0, str(folder))
    with os.fdopen(out, "w", encoding="utf-8") as answers:
        for line in sys.stdin:
            request = json.loads(line)
            limit_s = HANG_S.get(request["tool"], HANG_OTHERS_S)
            faulthandler.dump_traceback_later(limit_s, exit=True, file=sys.__stderr__)
            try:
                found = answer(request, folder)
            except BaseException as exc:
                found = {"status": "crash", "detail": describe(exc)}
            faulthandler.cancel_dump_traceback_later()
            answers.write(json.dumps(found) + "\n")
            answers.flush()
    # Threads, pools and loops of cases must not keep this process.
    os._exit(0)
