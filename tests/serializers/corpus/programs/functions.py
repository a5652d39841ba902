"""Functions of every kind, and the variables that they share."""

from ..cases import case


@case
def closures_that_share_a_variable():
    class Counter:
        def __init__(self):
            count = 0

            def up():
                nonlocal count
                count += 1
                return count

            def down():
                nonlocal count
                count -= 1
                return count

            self.up, self.down = up, down

    def build():
        counter = Counter()
        counter.up()
        counter.up()
        return counter

    def check(counter):
        assert counter.up() == 3 and counter.down() == 2 and counter.up() == 3


@case
def recursive_closures():
    class Math:
        def __init__(self):
            known = {}

            def fib(n):
                if n not in known:
                    known[n] = n if n < 2 else fib(n - 1) + fib(n - 2)
                return known[n]

            def even(n):
                return n == 0 or odd(n - 1)

            def odd(n):
                return n != 0 and even(n - 1)

            self.fib, self.even, self.known = fib, even, known

    def build():
        math = Math()
        math.fib(10)
        return math

    def check(math):
        assert len(math.known) == 11
        assert math.fib(20) == 6765 and len(math.known) == 21
        assert math.even(10) and not math.even(7)


@case
def lambdas_in_containers():
    class Dispatcher:
        def __init__(self, factor):
            self.table = {"add": lambda x: x + factor, "mul": lambda x: x * factor}
            self.pipeline = [self.table["add"], self.table["mul"], str]

        def run(self, value):
            for step in self.pipeline:
                value = step(value)
            return value

    def build():
        return Dispatcher(3)

    def check(dispatcher):
        assert dispatcher.run(1) == "12"
        assert dispatcher.pipeline[0] is dispatcher.table["add"]


@case
def bound_methods_as_callbacks():
    class Bus:
        def __init__(self):
            self.handlers = {}

        def on(self, name, handler):
            self.handlers.setdefault(name, []).append(handler)

        def emit(self, name, *args):
            return [handler(*args) for handler in self.handlers.get(name, ())]

    class Listener:
        def __init__(self, bus):
            self.seen = []
            bus.on("x", self.handle)
            bus.on("x", self.seen.append)

        def handle(self, value):
            return len(self.seen), value

    def build():
        bus = Bus()
        bus.listener = Listener(bus)
        bus.emit("x", 1)
        return bus

    def check(bus):
        assert bus.emit("x", 2) == [(1, 2), None]
        assert bus.listener.seen == [1, 2]
        assert bus.handlers["x"][0].__self__ is bus.listener


@case
def partials_nested_and_with_state():
    import functools

    class Job:
        def __init__(self):
            self.log = []
            self.run = functools.partial(self.work, 1, extra=functools.partial(max, 5))

        def work(self, a, b, extra):
            self.log.append((a, extra(b)))
            return self.log

    def build():
        job = Job()
        job.run(9)
        return job

    def check(job):
        assert job.run(2) == [(1, 9), (1, 5)] and job.run.func.__self__ is job
        assert job.run.keywords["extra"].args == (5,)


@case
def decorated_functions_and_their_attributes():
    import functools

    def counted(function):
        @functools.wraps(function)
        def inner(*args):
            inner.calls += 1
            return function(*args)

        inner.calls = 0
        return inner

    class Holder:
        def __init__(self):
            @counted
            def double(x):
                """Doubles."""
                return 2 * x

            self.double = double

    def build():
        holder = Holder()
        holder.double(1)
        return holder

    def check(holder):
        assert holder.double(4) == 8 and holder.double.calls == 2
        assert holder.double.__doc__ == "Doubles." and holder.double.__wrapped__(1) == 2


@case
def functions_that_share_globals():
    state = {"total": 0}
    history = []

    def add(n):
        state["total"] += n
        history.append(n)
        return state["total"]

    def read():
        return state["total"], list(history)

    class Account:
        def __init__(self):
            self.add, self.read = (lambda n: add(n)), (lambda: read())

    def build():
        account = Account()
        account.add(5)
        return account

    def check(account):
        # Those of an importable module stay at home, with the module.
        before, _ = account.read()
        assert account.add(2) == before + 2
        now, history = account.read()
        assert now == before + 2 and history[-1] == 2


@case
def lru_cache_with_contents():
    import functools

    class Loader:
        def __init__(self):
            self.loads = []
            self.get = functools.lru_cache(maxsize=2)(self._load)

        def _load(self, name, *, mode="r"):
            self.loads.append(name)
            return [name, mode]

    def build():
        loader = Loader()
        loader.get("a").append("changed")
        loader.get("b", mode="w")
        loader.get("a")
        return loader

    def check(loader):
        assert loader.get("a") == ["a", "r", "changed"]
        assert loader.loads == ["a", "b"]
        info = loader.get.cache_info()
        assert (info.misses, info.maxsize, info.currsize) == (2, 2, 2) and info.hits == 2
        loader.get("c")
        loader.get("a")
        assert loader.loads == ["a", "b", "c"]
        loader.get("b", mode="w")
        assert loader.loads == ["a", "b", "c", "b"]


@case
def unbounded_cache_in_a_class():
    import functools

    class Tree:
        def __init__(self):
            @functools.cache
            def node(path):
                return {"path": path}

            self.node = node

    def build():
        tree = Tree()
        tree.root = tree.node("/")
        tree.root["seen"] = True
        return tree

    def check(tree):
        assert tree.node("/") is tree.root and tree.root["seen"]
        assert tree.node("/x") == {"path": "/x"}
        tree.node.cache_clear()
        assert tree.node("/") is not tree.root
        tree.node.cache_clear()


@case
def single_dispatch():
    import functools

    class Encoder:
        def __init__(self):
            @functools.singledispatch
            def encode(value):
                return "?"

            @encode.register(int)
            def _(value):
                return f"i{value}"

            self.encode = encode

    def build():
        encoder = Encoder()
        encoder.encode.register(list, lambda value: "l")
        encoder.encode(1)
        return encoder

    def check(encoder):
        assert [encoder.encode(v) for v in (1, True, [], "x")] == ["i1", "iTrue", "l", "?"]
        encoder.encode.register(str, lambda value: "s")
        assert encoder.encode("x") == "s"


@case
def operators_and_method_callers():
    import operator

    class Query:
        def __init__(self):
            self.key = operator.itemgetter("a", 0)
            self.attr = operator.attrgetter("real.imag")
            self.call = operator.methodcaller("replace", "x", "y")
            self.builtin = "a-b".split
            self.method = list.append
            self.static = dict.fromkeys

    def build():
        return Query()

    def check(query):
        assert query.key({"a": 1, 0: 2}) == (1, 2)
        assert query.attr(5) == 0 and query.call("xx") == "yy"
        assert query.builtin("-") == ["a", "b"] and query.static("ab") == {"a": None, "b": None}
        items = []
        query.method(items, 1)
        assert items == [1]


@case
def default_arguments_with_state():
    class Collector:
        def __init__(self):
            def collect(item, into=[], *, key=self):  # noqa: B006
                into.append(item)
                return into, key

            self.collect = collect

    def build():
        collector = Collector()
        collector.collect(1)
        return collector

    def check(collector):
        items, key = collector.collect(2)
        assert items == [1, 2] and key is collector


@case
def functions_made_at_run_time():
    import types

    class Compiler:
        def __init__(self, source):
            self.code = compile(source, "<rule>", "eval")
            namespace = {"limit": 3}
            exec("def check(x):\n    return x < limit", namespace)
            self.check = namespace["check"]
            self.copy = types.FunctionType(self.check.__code__, {"limit": 10}, "copy")

        def run(self, **names):
            return eval(self.code, {}, names)

    def build():
        return Compiler("a * 2 + b")

    def check(compiler):
        assert compiler.run(a=2, b=1) == 5
        assert compiler.check(2) and not compiler.check(5) and compiler.copy(5)


@case
def context_managers_not_yet_entered():
    import contextlib

    class Tool:
        def __init__(self):
            self.log = []

            @contextlib.contextmanager
            def noted(name):
                self.log.append(f"+{name}")
                try:
                    yield name
                finally:
                    self.log.append(f"-{name}")

            self.noted = noted

    def build():
        tool = Tool()
        with tool.noted("a"):
            pass
        tool.next = tool.noted("b")
        return tool

    def check(tool):
        with tool.next as name:
            assert name == "b"
        with tool.noted("c"):
            pass
        assert tool.log == ["+a", "-a", "+b", "-b", "+c", "-c"]


@case
def exit_stack_in_use():
    import contextlib

    class Resource:
        def __init__(self, log, name):
            self.log, self.name = log, name

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.log.append(self.name)

    class Owner:
        def __init__(self):
            self.log = []
            self.stack = contextlib.ExitStack()
            self.stack.enter_context(Resource(self.log, "first"))
            self.stack.callback(self.log.append, "second")
            self.stack.push(self.leave)

        def leave(self, *exc):
            self.log.append("third")

    def build():
        return Owner()

    def check(owner):
        owner.stack.close()
        assert owner.log == ["third", "second", "first"]


@case
def coroutine_functions_and_async_methods():
    import asyncio

    class Service:
        def __init__(self):
            self.calls = 0
            self.step = None

        async def work(self, n):
            self.calls += n
            await asyncio.sleep(0)
            return self.calls

        async def stream(self):
            for n in range(self.calls):
                yield n

    def build():
        service = Service()
        asyncio.run(service.work(2))
        service.step = service.work
        return service

    def check(service):
        async def main():
            return await service.step(1), [n async for n in service.stream()]

        assert asyncio.run(main()) == (3, [0, 1, 2])


@case
def state_machine_by_dispatch_table():
    class Machine:
        def __init__(self):
            self.state = self.start
            self.seen = []

        def start(self, char):
            self.seen.append(("start", char))
            return self.word if char.isalpha() else self.start

        def word(self, char):
            self.seen.append(("word", char))
            return self.start if char.isspace() else self.word

        def feed(self, text):
            for char in text:
                self.state = self.state(char)

    def build():
        machine = Machine()
        machine.feed("ab")
        return machine

    def check(machine):
        machine.feed("c d")
        assert [name for name, _ in machine.seen] == ["start", "word", "word", "word", "start"]


@case
def sentinel_objects_by_identity():
    MISSING = object()

    class Missing:
        pass

    NOTHING = Missing()

    class Field:
        UNSET = object()

        def __init__(self, default=MISSING):
            self.default = default
            self.other = NOTHING
            self.third = self.UNSET

        def required(self):
            return self.default is MISSING, self.other is NOTHING, self.third is type(self).UNSET

    def build():
        return [Field(), Field(1)]

    def check(fields):
        assert fields[0].required() == (True, True, True)
        assert fields[1].required() == (False, True, True)


@case
def constants_that_are_instances():
    class Action:
        def __init__(self, name):
            self.name = name

    SHIFT, REDUCE = Action("shift"), Action("reduce")

    class Parser:
        def __init__(self):
            self.table = {0: (SHIFT, 1), 1: (REDUCE, 0)}

        def kinds(self):
            return [entry[0] is SHIFT for entry in self.table.values()]

    def build():
        return Parser()

    def check(parser):
        assert parser.kinds() == [True, False]


@case
def decorators_with_state():
    import functools

    def counted(fn):
        @functools.wraps(fn)
        def wrapper(*a, **k):
            wrapper.calls += 1
            return fn(*a, **k)

        wrapper.calls = 0
        return wrapper

    class memo:
        def __init__(self, fn):
            self.fn, self.cache = fn, {}
            functools.update_wrapper(self, fn)

        def __get__(self, obj, owner=None):
            return functools.partial(self, obj) if obj is not None else self

        def __call__(self, obj, n):
            if n not in self.cache:
                self.cache[n] = self.fn(obj, n)
            return self.cache[n]

    class S:
        @counted
        def hit(self):
            return 1

        @memo
        def square(self, n):
            self.computed = getattr(self, "computed", 0) + 1
            return n * n

    def build():
        s = S()
        s.square(3)
        s.callback = s.square
        s.hitter = s.hit
        return s

    def check(s):
        assert s.callback(4) == 16 and s.square(4) == 16
        c = s.computed
        s.square(4)
        assert s.computed == c
        assert s.hitter() == 1


@case
def closures_that_undo():
    def outer():
        total = 0
        history = []

        def add(n):
            nonlocal total

            def commit():
                nonlocal total
                total += n
                history.append(total)
                return undo

            def undo():
                nonlocal total
                total -= n
                return total

            return commit

        def read():
            return total, history

        return add, read

    def build():
        add, read = outer()
        undo = add(5)()
        pending = add(7)
        return {"add": add, "read": read, "undo": undo, "pending": pending}

    def check(s):
        assert s["read"]() == (5, [5])
        s["pending"]()
        assert s["read"]() == (12, [5, 12])
        s["undo"]()
        assert s["read"]()[0] == 7
        s["add"](1)()
        assert s["read"]() == (8, [5, 12, 8])


@case
def program_and_its_namespace():
    class Engine:
        def __init__(self):
            self.ns = {"__name__": "script", "x": 1}
            exec(
                "def get():\n    return x\n"
                "def put(v):\n    global x\n    x = v\n"
                "class K:\n    def read(self): return x",
                self.ns,
            )
            self.get = self.ns["get"]
            self.k = self.ns["K"]()

    def build():
        e = Engine()
        e.ns["put"](5)
        return e

    def check(e):
        assert e.get() == 5 and e.ns["x"] == 5
        e.ns["x"] = 7
        assert e.get() == 7 and e.k.read() == 7
        e.ns["put"](5)
        assert e.ns["x"] == 5


@case
def session_of_a_console():
    import code

    class S:
        def __init__(self):
            self.c = code.InteractiveInterpreter()
            self.c.runsource("a = 1")
            self.c.runcode(compile("def f():\n    return a", "<c>", "exec"))

    def build():
        return S()

    def check(s):
        s.c.runsource("a = 5")
        assert s.c.locals["f"]() == 5


@case
def functions_whose_parts_are_shared():
    class S:
        def __init__(self):
            self.defaults = []

            def f(x, acc=self.defaults, *, k={"n": 1}):
                acc.append(x)
                return len(acc)

            self.f = f
            self.kw = f.__kwdefaults__
            self.meta = f.__dict__
            f.tag = 1

    def build():
        s = S()
        s.f(1)
        return s

    def check(s):
        s.f(2)
        assert s.defaults[:2] == [1, 2] and s.kw is s.f.__kwdefaults__
        s.meta["new"] = 1
        assert s.f.new == 1
        del s.meta["new"]
