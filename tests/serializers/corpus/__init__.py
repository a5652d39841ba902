"""Stateful classes as real programs write them, carried to fresh processes by several serializers.

A case is a function whose body is the source of a small program: imports, classes, `build()`, which
makes an object and uses it, and `check(obj)`, which asserts how the object behaves afterwards. The
body is never run as a function of this package; the runner takes its source and runs it as a module
of its own, in `__main__`, in a notebook's cell, or inside a function. See `cases` and `runner`.

`python -m tests.serializers.corpus` prints what pickle, cloudpickle, dill and ours do with it.
"""
