"""Values of the standard library, and small machines that it keeps state in."""

from ..cases import case


@case
def random_generators():
    import random

    class Dice:
        def __init__(self):
            self.random = random.Random(7)
            self.system = random.SystemRandom()
            self.pick = self.random.choice

    def build():
        dice = Dice()
        dice.random.gauss(0, 1)
        return dice

    def check(dice):
        twin = random.Random(7)
        twin.gauss(0, 1)
        assert dice.random.gauss(0, 1) == twin.gauss(0, 1)
        assert dice.pick("abc") == twin.choice("abc") and 0 <= dice.system.random() < 1
        dice.random.seed(7)
        dice.random.gauss(0, 1)


@case
def numbers_and_decimal_contexts():
    import decimal
    import fractions
    import statistics

    class Money(decimal.Decimal):
        def __new__(cls, value, currency):
            made = super().__new__(cls, value)
            made.currency = currency
            return made

    class Bank:
        def __init__(self):
            self.context = decimal.Context(prec=5, rounding=decimal.ROUND_UP)
            self.rate = fractions.Fraction(1, 3)
            self.model = statistics.NormalDist.from_samples([1, 2, 3])
            self.money = Money("1.50", "EUR")

    def build():
        bank = Bank()
        bank.context.divide(1, 3)
        return bank

    def check(bank):
        assert str(bank.context.divide(1, 3)) == "0.33334" and bank.context.flags[decimal.Inexact]
        assert bank.rate * 3 == 1 and bank.model.mean == 2
        assert bank.money * 2 == 3 and bank.money.currency == "EUR"


@case
def dates_zones_and_identifiers():
    import datetime
    import uuid
    import zoneinfo

    class Event(datetime.datetime):
        def __new__(cls, *args, label="", **rest):
            made = super().__new__(cls, *args, **rest)
            made.label = label
            return made

    class Fixed(datetime.tzinfo):
        def utcoffset(self, when):
            return datetime.timedelta(hours=3)

        def dst(self, when):
            return datetime.timedelta(0)

    class Calendar:
        def __init__(self):
            self.zone = zoneinfo.ZoneInfo("UTC")
            self.own = Fixed()
            self.start = datetime.datetime(2024, 3, 1, 12, tzinfo=self.own, fold=1)
            self.event = Event(2024, 5, 6, 7, label="x", tzinfo=datetime.UTC)
            self.id = uuid.uuid5(uuid.NAMESPACE_DNS, "a")
            self.span = datetime.timedelta(days=1, microseconds=5)

    def build():
        return Calendar()

    def check(calendar):
        assert calendar.start.tzinfo is calendar.own and calendar.start.fold == 1
        assert calendar.start.utcoffset().total_seconds() == 10800
        assert calendar.event.label == "x" and calendar.event.hour == 7
        assert calendar.zone is zoneinfo.ZoneInfo("UTC")
        assert calendar.id == uuid.uuid5(uuid.NAMESPACE_DNS, "a") and calendar.span.days == 1


@case
def paths_and_patterns():
    import fnmatch
    import pathlib
    import re
    import string

    class Locked(string.Template):
        delimiter = "%"

    class Files:
        def __init__(self):
            self.root = pathlib.PurePosixPath("/a/b")
            self.here = pathlib.Path("x") / "y"
            self.pattern = re.compile(fnmatch.translate("*.py"))
            self.template = string.Template("$a-${b}")
            self.locked = Locked("%a")

    def build():
        return Files()

    def check(files):
        assert (files.root / "c").parts == ("/", "a", "b", "c") and files.here.name == "y"
        assert files.pattern.match("x.py") and not files.pattern.match("x.c")
        assert files.template.substitute(a=1, b=2) == "1-2" and files.locked.substitute(a=3) == "3"


@case
def views_of_shared_memory():
    import array

    class Frame:
        def __init__(self):
            self.data = bytearray(range(16))
            self.view = memoryview(self.data)
            self.part = self.view[4:8]
            self.wide = self.view.cast("I")
            self.even = self.view[::2]
            self.fixed = self.view.toreadonly()
            self.numbers = array.array("i", [1, 2, 3])
            self.of_numbers = memoryview(self.numbers)[1:]
            self.of_bytes = memoryview(b"abcdef")[2:4]

    def build():
        frame = Frame()
        frame.part[0] = 100
        return frame

    def check(frame):
        assert frame.data[4] == 100
        frame.data[4] = 7
        assert frame.part[0] == 7 and frame.wide[1] & 0xFF == 7 and frame.even[2] == 7
        assert frame.fixed.readonly and frame.fixed[4] == 7
        frame.of_numbers[0] = 9
        assert frame.numbers[1] == 9 and bytes(frame.of_bytes) == b"cd"
        frame.data[4], frame.of_numbers[0] = 100, 2


@case
def ctypes_values():
    import ctypes

    class Point(ctypes.Structure):
        _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_double)]

    class Box(ctypes.Structure):
        _fields_ = [("corner", Point), ("tags", ctypes.c_ubyte * 4)]

    class Holder:
        def __init__(self):
            self.box = Box(Point(1, 2.5), (1, 2, 3, 4))
            self.array = (ctypes.c_int * 3)(1, 2, 3)
            self.number = ctypes.c_longlong(-5)
            self.buffer = ctypes.create_string_buffer(b"hello", 16)
            self.kind = ctypes.c_int * 3

    def build():
        holder = Holder()
        holder.box.corner.x = 9
        return holder

    def check(holder):
        assert holder.box.corner.x == 9 and holder.box.corner.y == 2.5
        assert list(holder.box.tags) == [1, 2, 3, 4] and list(holder.array) == [1, 2, 3]
        assert holder.number.value == -5 and holder.buffer.value == b"hello"
        assert holder.kind is type(holder.array) and len(holder.buffer) == 16


@case
def exceptions_with_everything():
    class Failure(Exception):
        def __init__(self, message, *, code):
            super().__init__(message)
            self.code = code

    class Network(OSError):
        def __init__(self, host, *, port):
            super().__init__(111, "refused", host)
            self.port = port

    class Log:
        def __init__(self):
            self.errors = []

        def note(self, function):
            try:
                function()
            except Exception as exc:
                exc.add_note("noted")
                self.errors.append(exc)

    def build():
        log = Log()

        def first():
            try:
                raise Network("h", port=5)
            except Network as exc:
                raise Failure("bad", code=7) from exc

        log.note(first)
        log.errors.append(ExceptionGroup("many", [ValueError(1), Failure("in", code=1)]))
        log.errors.append(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "why"))
        return log

    def check(log):
        import traceback

        failure, group, unicode = log.errors
        assert failure.code == 7 and failure.args == ("bad",) and failure.__notes__ == ["noted"]
        cause = failure.__cause__
        assert (cause.errno, cause.filename, cause.port) == (111, "h", 5)
        assert isinstance(cause, OSError) and failure.__suppress_context__
        names = [entry.name for entry in traceback.extract_tb(failure.__traceback__)]
        assert names == ["note", "first"]
        assert group.subgroup(ValueError).exceptions[0].args == (1,)
        assert group.exceptions[1].code == 1 and unicode.start == 0 and unicode.reason == "why"
        try:
            raise failure
        except type(failure) as again:
            assert again is failure
        failure.__traceback__ = failure.__traceback__.tb_next


@case
def topological_sorter_in_mid_use():
    import graphlib

    class Build:
        def __init__(self):
            self.sorter = graphlib.TopologicalSorter({"d": {"b", "c"}, "b": {"a"}, "c": {"a"}})
            self.sorter.prepare()
            self.done = []

        def step(self):
            ready = sorted(self.sorter.get_ready())
            self.done += ready
            self.sorter.done(*ready)

    def build():
        made = Build()
        made.step()
        return made

    def check(made):
        made.step()
        made.step()
        assert made.done == ["a", "b", "c", "d"] and not made.sorter.is_active()


@case
def parsers_of_arguments_and_text():
    import argparse
    import html.parser
    import shlex

    class Links(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.found = []

        def handle_starttag(self, tag, attrs):
            self.found += [value for name, value in attrs if name == "href"]

    class Tool:
        def __init__(self):
            self.parser = argparse.ArgumentParser(prog="tool", exit_on_error=False)
            self.parser.add_argument("--level", type=int, choices=[1, 2], default=1)
            self.parser.add_argument("-v", action="count", default=0)
            commands = self.parser.add_subparsers(dest="command")
            commands.add_parser("run").add_argument("name")
            self.links, self.words = Links(), shlex.shlex("a 'b c' d", posix=True)

    def build():
        tool = Tool()
        tool.links.feed("<a href=1><a hr")
        tool.words.get_token()
        return tool

    def check(tool):
        found = tool.parser.parse_args(["--level", "2", "-vv", "run", "x"])
        assert (found.level, found.v, found.command, found.name) == (2, 2, "run", "x")
        tool.links.feed("ef=2>")
        assert tool.links.found == ["1", "2"]
        assert list(tool.words) == ["b c", "d"]


@case
def json_encoders_and_decoders():
    import json

    class Encoder(json.JSONEncoder):
        def default(self, obj):
            return sorted(obj) if isinstance(obj, set) else super().default(obj)

    class Codec:
        def __init__(self):
            self.encoder = Encoder(indent=1, sort_keys=True)
            self.decoder = json.JSONDecoder(object_hook=lambda found: list(found.items()))

    def build():
        codec = Codec()
        codec.decoder.decode('{"a": 1}')
        return codec

    def check(codec):
        assert json.loads(codec.encoder.encode({"b": {2, 1}})) == {"b": [1, 2]}
        assert codec.decoder.decode('{"a": [1.5, null]}') == [("a", [1.5, None])]


@case
def documents_of_xml_and_mail():
    import email.message
    import http.cookies
    import xml.dom.minidom
    import xml.etree.ElementTree as etree

    class Documents:
        def __init__(self):
            self.tree = etree.ElementTree(etree.fromstring("<a><b x='1'>t</b>tail</a>"))
            self.part = self.tree.getroot()[0]
            self.dom = xml.dom.minidom.parseString("<r><c k='v'/></r>")
            self.mail = email.message.EmailMessage()
            self.mail["Subject"] = "Hi"
            self.mail.set_content("text")
            self.cookies = http.cookies.SimpleCookie("a=1; b=2")

    def build():
        documents = Documents()
        documents.part.set("y", "2")
        documents.mail.add_attachment(
            b"raw", maintype="application", subtype="octet-stream", filename="f"
        )
        return documents

    def check(documents):
        documents.part.text = "new"
        assert b'<b x="1" y="2">new</b>tail' in etree.tostring(documents.tree.getroot())
        child = documents.dom.documentElement.firstChild
        assert child.getAttribute("k") == "v" and child.ownerDocument is documents.dom
        assert documents.mail["subject"] == "Hi"
        assert next(documents.mail.iter_attachments()).get_content() == b"raw"
        documents.cookies["c"] = "3"
        assert documents.cookies.output(header="", sep=";").count("=") == 3
        del documents.cookies["c"]


@case
def syntax_trees_and_code():
    import ast

    class Rename(ast.NodeTransformer):
        def __init__(self, names):
            self.names = names

        def visit_Name(self, node):
            node.id = self.names.get(node.id, node.id)
            return node

    class Rule:
        def __init__(self, text):
            self.tree = ast.parse(text, mode="eval")
            self.rename = Rename({"a": "b"})
            self.code = compile(self.tree, "<rule>", "eval")

    def build():
        return Rule("a + 1")

    def check(rule):
        assert eval(rule.code, {"a": 1}) == 2
        renamed = rule.rename.visit(rule.tree)
        assert ast.unparse(renamed) == "b + 1"
        rule.tree.body.left.id = "a"


@case
def modules_made_at_run_time():
    import types

    class Plugins:
        def __init__(self):
            self.module = types.ModuleType("made_up_plugin", "Made up.")
            exec(
                "state = []\ndef add(x):\n    state.append(x)\n    return state", vars(self.module)
            )
            self.add = self.module.add

    def build():
        plugins = Plugins()
        plugins.add(1)
        return plugins

    def check(plugins):
        assert plugins.add(2) == [1, 2] and plugins.module.state == [1, 2]
        assert plugins.module.add(3) is plugins.module.state
        del plugins.module.state[1:]


@case
def differences_and_text_tools():
    import difflib
    import gettext
    import textwrap

    class Diff:
        def __init__(self):
            self.matcher = difflib.SequenceMatcher(None, "abcd", "bcde")
            self.wrapper = textwrap.TextWrapper(width=10, initial_indent="* ")
            self.null = gettext.NullTranslations()

    def build():
        diff = Diff()
        diff.matcher.get_matching_blocks()
        return diff

    def check(diff):
        assert diff.matcher.ratio() == 0.75
        diff.matcher.set_seq2("abcd")
        assert diff.matcher.ratio() == 1
        diff.matcher.set_seq2("bcde")
        assert diff.wrapper.fill("aa bb cc dd").startswith("* aa bb")
        assert diff.null.gettext("x") == "x"


@case
def processes_that_are_over():
    import subprocess
    import sys

    class Build:
        def __init__(self):
            self.process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
            self.process.wait()
            self.result = subprocess.run([sys.executable, "-V"], capture_output=True, text=True)

    def build():
        return Build()

    def check(built):
        assert built.process.poll() == 3 == built.process.wait() and built.process.args[1] == "-c"
        assert built.result.stdout.startswith("Python") and built.result.returncode == 0


@case
def sockets_not_connected():
    import selectors
    import socket

    class Client:
        def __init__(self):
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.socket.settimeout(2.5)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            self.closed = socket.socket()
            self.closed.close()
            self.selector = selectors.DefaultSelector()

    def build():
        return Client()

    def check(client):
        assert client.socket.gettimeout() == 2.5 and client.closed.fileno() == -1
        assert client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST)
        assert client.selector.select(0) == [] and client.socket.type == socket.SOCK_DGRAM


@case
def security_contexts():
    import hashlib
    import ssl

    class Client:
        def __init__(self):
            self.context = ssl.create_default_context()
            self.context.minimum_version = ssl.TLSVersion.TLSv1_3
            self.context.set_alpn_protocols(["h2"])
            self.open = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self.open.check_hostname, self.open.verify_mode = False, ssl.CERT_NONE
            self.hash = hashlib.sha256
            self.fresh = hashlib.blake2b()

    def build():
        return Client()

    def check(client):
        context = client.context
        assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
        assert context.minimum_version == ssl.TLSVersion.TLSv1_3
        assert client.open.verify_mode == ssl.CERT_NONE and not client.open.check_hostname
        assert client.hash(b"x").hexdigest() == hashlib.sha256(b"x").hexdigest()
        copy = client.fresh.copy()
        copy.update(b"x")
        assert copy.digest() == hashlib.blake2b(b"x").digest()


@case
def weak_references_and_callbacks():
    import weakref

    class Node:
        def __init__(self, name):
            self.name, self.log = name, []

    class Graph:
        def __init__(self):
            self.nodes = {name: Node(name) for name in "abc"}
            self.first = weakref.ref(self.nodes["a"], lambda ref: self.gone.append("a"))
            self.gone = []
            self.by_name = weakref.WeakValueDictionary(self.nodes)
            self.extra = weakref.WeakKeyDictionary({self.nodes["b"]: 2})
            self.all = weakref.WeakSet(self.nodes.values())
            self.proxy = weakref.proxy(self.nodes["c"])
            self.method = weakref.WeakMethod(
                self.nodes["c"].log.append.__self__.__class__ and self.tell
            )
            self.dead = weakref.ref(Node("x"))

        def tell(self):
            return len(self.all)

    def build():
        return Graph()

    def check(graph):
        assert graph.first() is graph.nodes["a"] and graph.dead() is None
        assert graph.by_name["b"] is graph.nodes["b"] and graph.extra[graph.nodes["b"]] == 2
        assert graph.proxy.name == "c" and graph.method()() == 3
        kept = graph.nodes.pop("a")
        assert graph.gone == []
        del kept
        assert graph.gone == ["a"] and len(graph.all) == 2 and "a" not in graph.by_name
        graph.nodes["a"] = type(graph.nodes["b"])("a")


@case
def finalizers():
    import weakref

    class Handle:
        def __init__(self, log):
            self.close = weakref.finalize(self, log.append, "closed")

    class Owner:
        def __init__(self):
            self.log = []
            self.handle = Handle(self.log)
            self.closed = Handle(self.log)
            self.closed.close()

    def build():
        return Owner()

    def check(owner):
        assert owner.log == ["closed"] and not owner.closed.close.alive
        assert owner.handle.close.alive
        owner.handle.close()
        assert owner.log == ["closed", "closed"] and not owner.handle.close.alive
        owner.log.pop()
        owner.handle = type(owner.handle)(owner.log)
        owner.handle.close.atexit = False


@case
def observer_pattern_with_weak_methods():
    import weakref

    class Subject:
        def __init__(self):
            self.observers = []

        def attach(self, method):
            self.observers.append(weakref.WeakMethod(method))

        def notify(self, value):
            for ref in self.observers:
                method = ref()
                if method is not None:
                    method(value)

    class Watcher:
        def __init__(self, subject):
            self.seen = []
            subject.attach(self.update)

        def update(self, value):
            self.seen.append(value)

    def build():
        subject = Subject()
        subject.watcher = Watcher(subject)
        subject.notify(1)
        return subject

    def check(subject):
        subject.notify(2)
        assert subject.watcher.seen == [1, 2]


@case
def tree_with_weak_parents():
    import weakref

    class Node:
        def __init__(self, name, parent=None):
            self.name, self.children = name, []
            self._parent = weakref.ref(parent) if parent else None
            if parent:
                parent.children.append(self)

        @property
        def parent(self):
            return self._parent() if self._parent else None

    def build():
        root = Node("root")
        Node("leaf", Node("branch", root))
        return root

    def check(root):
        leaf = root.children[0].children[0]
        assert leaf.parent.parent is root and root.parent is None


@case
def game_with_entities_and_systems():
    import heapq
    import itertools
    import random
    from collections import defaultdict, deque

    class Entity:
        ids = itertools.count()

        def __init__(self, world, kind):
            self.world, self.kind, self.id = world, kind, len(world.entities)
            self.inbox = deque(maxlen=5)

        def on(self, event):
            self.inbox.append(event)

    class World:
        def __init__(self):
            self.entities, self.time = [], 0
            self.random = random.Random(3)
            self.timers, self.order = [], itertools.count()
            self.listeners = defaultdict(list)

        def spawn(self, kind):
            entity = Entity(self, kind)
            self.entities.append(entity)
            self.listeners[kind].append(entity.on)
            return entity

        def later(self, delay, action):
            heapq.heappush(self.timers, (self.time + delay, next(self.order), action))

        def run(self, until):
            while self.timers and self.timers[0][0] <= until:
                self.time, _, action = heapq.heappop(self.timers)
                action()

    def build():
        world = World()
        orc = world.spawn("orc")
        world.later(2, lambda: orc.on("two"))
        world.later(1, lambda: [listen("one") for listen in world.listeners["orc"]])
        world.later(1, lambda: orc.on(world.random.randint(1, 6)))
        world.run(0)
        return world

    def check(world):
        world.run(5)
        orc = world.entities[0]
        assert list(orc.inbox) == ["one", random.Random(3).randint(1, 6), "two"]
        assert world.time == 2 and orc.world is world


@case
def order_book():
    import bisect
    import dataclasses
    import decimal
    import enum
    import itertools

    class Side(enum.Enum):
        BUY = enum.auto()
        SELL = enum.auto()

    @dataclasses.dataclass(order=True)
    class Order:
        price: decimal.Decimal
        number: int
        side: Side = dataclasses.field(compare=False)
        left: int = dataclasses.field(compare=False)

    class Book:
        def __init__(self):
            self.sells, self.numbers, self.trades = [], itertools.count(1), []

        def sell(self, price, size):
            order = Order(decimal.Decimal(price), next(self.numbers), Side.SELL, size)
            bisect.insort(self.sells, order)
            return order

        def buy(self, price, size):
            while size and self.sells and self.sells[0].price <= decimal.Decimal(price):
                best = self.sells[0]
                traded = min(size, best.left)
                best.left -= traded
                size -= traded
                self.trades.append((best.number, traded))
                if not best.left:
                    self.sells.pop(0)

    def build():
        book = Book()
        book.sell("2.0", 5)
        book.first = book.sell("1.5", 5)
        book.buy("1.7", 2)
        return book

    def check(book):
        assert book.first.left == 3 and book.first.side is type(book.first.side).SELL
        assert book.sells[0] is book.first
        book.buy("3", 4)
        assert book.trades == [(2, 2), (2, 3), (1, 1)]
        assert book.sell("1", 1).number == 3


@case
def time_zones_of_ones_own():
    import datetime

    class Fixed(datetime.tzinfo):
        def __init__(self, minutes, name):
            self.minutes, self.name = minutes, name

        def utcoffset(self, dt):
            return datetime.timedelta(minutes=self.minutes)

        def tzname(self, dt):
            return self.name

        def dst(self, dt):
            return datetime.timedelta(0)

    class Stamp(datetime.datetime):
        label = "x"

    def build():
        tz = Fixed(90, "T")
        a = datetime.datetime(2024, 1, 1, tzinfo=tz)
        b = datetime.time(1, 2, tzinfo=tz, fold=1)
        c = Stamp(2020, 2, 3, tzinfo=datetime.UTC)
        return dict(tz=tz, a=a, b=b, c=c)

    def check(d):
        assert d["a"].tzinfo is d["tz"] and d["b"].tzinfo is d["tz"]
        assert d["a"].tzname() == "T" and d["b"].fold == 1
        assert type(d["c"]).label == "x" and d["c"].year == 2020
        assert d["tz"].name == "T"


@case
def generator_of_random_numbers_with_attributes():
    import random

    class R(random.Random):
        def __init__(self, seed, label):
            self.label = label
            self.n = 0
            super().__init__(seed)

        def random(self):
            self.n += 1
            return super().random()

        def __new__(cls, seed, label):
            return super().__new__(cls, seed)

    def build():
        r = R(3, "l")
        r.random()
        import random as q

        p = q.Random(3)
        p.random()
        r.want = p.random()
        return r

    def check(r):
        assert r.random() == r.want and r.label == "l" and r.n == 2


@case
def ctypes_inside_of_other_memory():
    import ctypes

    class P(ctypes.Structure):
        _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_int)]

    class L(ctypes.Structure):
        _fields_ = [("a", P), ("b", P * 2)]

    class H:
        def __init__(self):
            self.l = L()
            self.inner = self.l.a
            self.el = self.l.b[1]
            self.raw = bytearray(16)
            self.over = (ctypes.c_uint16 * 4).from_buffer(self.raw, 4)
            self.one = ctypes.c_uint32.from_buffer(self.raw)
            self.mv = memoryview(self.l)

    def build():
        h = H()
        h.inner.x = 5
        h.over[0] = 0x0201
        return h

    def check(h):
        assert h.l.a.x == 5 and h.raw[4:6] == b"\x01\x02"
        h.inner.y = 9
        assert h.l.a.y == 9
        h.el.x = 7
        assert h.l.b[1].x == 7
        h.raw[6] = 0xAA
        assert h.over[1] & 0xFF == 0xAA
        h.one.value = 1
        assert h.raw[0] == 1
        h.raw[6] = 0
        h.one.value = 0
        h.el.x = 0
        h.inner.y = 0


@case
def hashes_not_yet_used():
    import hashlib

    class B:
        def __init__(self):
            self.h = hashlib.blake2s(digest_size=8)
            self.shake = hashlib.shake_128()
            self.sha = hashlib.sha3_256()

    def build():
        return B()

    def check(s):
        import hashlib

        s.h.update(b"a")
        s.shake.update(b"b")
        s.sha.update(b"c")
        assert s.h.hexdigest() == hashlib.blake2s(b"a", digest_size=8).hexdigest()
        assert s.shake.hexdigest(5) == hashlib.shake_128(b"b").hexdigest(5)
        assert s.sha.hexdigest() == hashlib.sha3_256(b"c").hexdigest()


@case
def exceptions_of_every_kind():
    class E(Exception):
        def __init__(self, a, b):
            super().__init__(a)
            self.b = b

        def __reduce__(self):
            return type(self), (self.args[0], self.b)

    class K(KeyError):
        code = 5

        def __init__(self, *, name):
            self.name = name

        def __str__(self):
            return self.name

    def build():
        try:
            raise E(1, 2)
        except E as e:
            x = e
        try:
            raise K(name="n")
        except K as e:
            k = e
        try:
            "x".nope
        except AttributeError as e:
            a = e
        try:
            __import__("nonexistent_mod_q")
        except ImportError as e:
            i = e
        s = StopIteration(5)
        u = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")
        se = SyntaxError("m", ("f", 1, 2, "text"))
        return [x, k, a, i, s, u, se, SystemExit(3), BaseExceptionGroup("g", [KeyboardInterrupt()])]

    def check(found):
        x, k, a, i, s, u, se, sx, g = found
        assert (x.args, x.b) == ((1,), 2) and str(k) == "n" and k.code == 5
        assert a.name == "nope" and i.name == "nonexistent_mod_q" and s.value == 5
        assert (
            u.start == 0
            and u.object == b"\xff"
            and se.lineno == 1
            and se.text == "text"
            and sx.code == 3
        )
        assert type(g.exceptions[0]) is KeyboardInterrupt


@case
def memory_in_and_out_of_the_stream():
    class S:
        def __init__(self):
            self.big = bytes(range(256)) * 1000
            self.ba = bytearray(b"x" * 200_000)
            self.text = "é" * 100_000
            self.same = self.big
            self.alias = self.ba
            self.l = [
                self.big,
                self.ba,
                b"B\x00\x00\x01\x00" * 20000,
                bytearray(70000),
                b"",
                bytearray(),
            ]
            self.ints = list(range(100000))

    def build():
        return S()

    def check(s):
        assert s.same is s.big is s.l[0] and s.alias is s.ba is s.l[1] and len(s.text) == 100_000
        assert s.l[2] == b"B\x00\x00\x01\x00" * 20000 and s.l[3] == bytearray(70000)
        s.ba.append(1)
        assert len(s.alias) == 200_001 and s.ints[-1] == 99999
        s.ba.pop()


@case
def module_made_and_its_functions():
    import types

    class Host:
        def __init__(self):
            self.m = types.ModuleType("plug")
            exec("n = 0\ndef inc():\n    global n\n    n += 1\n    return n", self.m.__dict__)
            self.inc = self.m.inc

    def build():
        h = Host()
        h.inc()
        return h

    def check(h):
        h.m.n = 10
        assert h.inc() == 11 and h.m.n == 11
        h.m.n = 1
