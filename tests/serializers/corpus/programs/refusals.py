"""What cannot honestly travel: refused with its path, reason and remedy."""

from ..cases import case


@case(refused=".conn", reason="connected", remedy="on_depart")
def connected_socket():
    import socket

    class Client:
        def __init__(self):
            self.conn, self.other = socket.socketpair()

    def build():
        return Client()

    def check(client): ...


@case(refused=".servers['main']", reason="bound", remedy="on_depart")
def listening_socket():
    import socket

    class Server:
        def __init__(self):
            self.servers = {"main": socket.create_server(("127.0.0.1", 0))}

    def build():
        return Server()

    def check(server): ...


@case(refused=".thread", reason="running", remedy="on_arrive")
def running_thread():
    import threading

    class Worker:
        def __init__(self):
            gate = threading.Lock()
            gate.acquire()
            self.thread = threading.Thread(target=gate.acquire, daemon=True)
            self.thread.start()

    def build():
        return Worker()

    def check(worker): ...


@case(refused=".child", reason="runs", remedy="on_arrive")
def running_process():
    import subprocess
    import sys

    class Manager:
        def __init__(self):
            self.child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    def build():
        return Manager()

    def check(manager): ...


@case(refused=".feed", reason="suspended", remedy="position")
def generator_in_mid_run():
    class Reader:
        def __init__(self):
            self.feed = self.read()

        def read(self):
            yield 1
            yield 2

    def build():
        reader = Reader()
        next(reader.feed)
        return reader

    def check(reader): ...


@case(refused=".stack._exit_callbacks[0][1].__self__.gen", reason="suspended")
def open_context_manager():
    import contextlib

    class Owner:
        def __init__(self):
            self.stack = contextlib.ExitStack()

        @contextlib.contextmanager
        def part(self):
            yield 1

    def build():
        owner = Owner()
        owner.stack.enter_context(owner.part())
        return owner

    def check(owner): ...


@case(refused=".task", reason="suspended", remedy="on_depart")
def suspended_task():
    import asyncio

    class Service:
        async def start(self):
            self.task = asyncio.ensure_future(asyncio.sleep(3600))
            await asyncio.sleep(0)

    def build():
        service = Service()
        loop = asyncio.new_event_loop()
        loop.run_until_complete(service.start())
        return service

    def check(service): ...


@case(refused=".lock", reason="wait")
def asyncio_lock_with_a_waiter():
    import asyncio

    class Room:
        async def start(self):
            self.lock = asyncio.Lock()
            await self.lock.acquire()
            asyncio.ensure_future(self.lock.acquire())
            await asyncio.sleep(0)

    def build():
        room = Room()
        loop = asyncio.new_event_loop()
        loop.run_until_complete(room.start())
        return room

    def check(room): ...


@case(refused=".db", reason="transaction", remedy="commit")
def database_in_a_transaction():
    import sqlite3

    class Store:
        def __init__(self):
            self.db = sqlite3.connect(":memory:")
            self.db.execute("CREATE TABLE t (x)")
            self.db.execute("INSERT INTO t VALUES (1)")

    def build():
        return Store()

    def check(store): ...


@case(refused=".db", reason="function 'twice'")
def database_with_functions():
    import sqlite3

    class Store:
        def __init__(self):
            self.db = sqlite3.connect(":memory:")
            self.db.create_function("twice", 1, lambda x: 2 * x)

    def build():
        return Store()

    def check(store): ...


@case(refused=".rows", reason="left to be fetched")
def database_cursor_in_mid_query():
    import sqlite3

    class Store:
        def __init__(self):
            self.db = sqlite3.connect(":memory:")
            self.rows = self.db.execute("VALUES (1), (2), (3)")
            next(self.rows)

    def build():
        return Store()

    def check(store): ...


@case(refused=".digest", reason="give away")
def hash_in_mid_stream():
    import hashlib

    class Upload:
        def __init__(self):
            self.digest = hashlib.sha256(b"part one")

    def build():
        return Upload()

    def check(upload): ...


@case(refused=".parts[1]", reason="give its inner state")
def compressor_in_mid_stream():
    import zlib

    class Upload:
        def __init__(self):
            self.parts = [b"", zlib.compressobj()]

    def build():
        return Upload()

    def check(upload): ...


@case(refused=".out", reason="written", remedy="close")
def gzip_file_being_written():
    import gzip
    import os
    import tempfile

    class Log:
        def __init__(self):
            self.out = gzip.open(os.path.join(tempfile.mkdtemp(), "x.gz"), "wb")

    def build():
        return Log()

    def check(log): ...


@case(refused=".ends[0]", reason="pipe")
def pipe():
    import os

    class Link:
        def __init__(self):
            self.ends = [open(end, mode) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True)]

    def build():
        return Link()

    def check(link): ...


@case(refused=".pool", reason="it has work")
def pool_with_work():
    import threading
    from concurrent.futures import ThreadPoolExecutor

    class Service:
        def __init__(self):
            self.pool = ThreadPoolExecutor(1)
            self.stop = threading.Event()
            self.pool.submit(self.stop.wait, 60)

    def build():
        return Service()

    def check(service): ...


@case(refused=".held", reason="another thread holds it")
def lock_of_another_thread():
    import threading

    class Guard:
        def __init__(self):
            self.held = threading.RLock()
            thread = threading.Thread(target=self.held.acquire)
            thread.start()
            thread.join()

    def build():
        return Guard()

    def check(guard): ...


@case(refused=".reset", reason="context")
def context_token():
    import contextvars

    class Request:
        def __init__(self):
            self.reset = contextvars.ContextVar("user").set(1)

    def build():
        return Request()

    def check(request): ...


@case(refused=".scanner", reason="where it is")
def scanner_of_a_pattern():
    import re

    class Lexer:
        def __init__(self):
            self.scanner = re.compile("a").scanner("aaa")
            self.scanner.search()

    def build():
        return Lexer()

    def check(lexer): ...


@case(refused=".secret", reason="not to be copied")
def class_that_refuses_itself():
    class Secret:
        def __getstate__(self):
            raise TypeError("a secret is not to be copied")

    class Holder:
        def __init__(self):
            self.secret = Secret()

    def build():
        return Holder()

    def check(holder): ...


@case(refused=".loop", reason="registered", remedy="on_arrive")
def event_loop_with_callbacks():
    import asyncio

    class Driver:
        def __init__(self):
            self.loop = asyncio.new_event_loop()
            self.loop.call_later(3600, print)

    def build():
        return Driver()

    def check(driver): ...


@case(refused=".selector", reason="1 files", remedy="on_arrive")
def selector_in_use():
    import selectors
    import socket

    class Reactor:
        def __init__(self):
            self.selector = selectors.DefaultSelector()
            self.selector.register(socket.socket(), selectors.EVENT_READ)

    def build():
        return Reactor()

    def check(reactor): ...


@case(refused="._generator", needs="simpy", reason="Model.run at")
def simulation_in_mid_run():
    import simpy

    class Model:
        def __init__(self):
            self.env = simpy.Environment()
            self.process = self.env.process(self.run())

        def run(self):
            while True:
                yield self.env.timeout(1)

    def build():
        model = Model()
        model.env.run(until=3)
        return model

    def check(model): ...


@case(refused=".link", reason="belongs to its process", remedy="on_arrive")
def connection_between_processes():
    import multiprocessing

    class Worker:
        def __init__(self):
            self.link, self.other = multiprocessing.Pipe()

    def build():
        return Worker()

    def check(worker): ...


@case(refused=".poller")
def poller_of_the_system():
    import select

    class Reactor:
        def __init__(self):
            self.poller = select.epoll()

    def build():
        return Reactor()

    def check(reactor): ...


@case(refused=".decoder")
def decoder_in_the_middle_of_a_character():
    import codecs

    class Input:
        def __init__(self):
            self.decoder = codecs.getincrementaldecoder("shift_jis")()
            self.decoder.decode(b"\x82")

    def build():
        return Input()

    def check(found): ...


@case(refused="conn", reason="connected")
def field_of_a_frozen_dataclass():
    import dataclasses
    import socket

    @dataclasses.dataclass(frozen=True, slots=True)
    class F:
        name: str
        conn: object

    def build():
        return [F("n", socket.socketpair()[0])]

    def check(o): ...


@case(refused="gen", reason="suspended")
def field_of_a_named_tuple():
    import collections

    P = collections.namedtuple("P", "a gen")

    def g():
        yield 1
        yield 2

    def build():
        x = g()
        next(x)
        return {("k", 1): [P(1, x)]}

    def check(o): ...


@case(refused="['conn']", reason="connected")
def item_that_is_an_attribute():
    import socket

    class A(dict):
        def __init__(self):
            self.__dict__ = self

    def build():
        a = A()
        a.conn = socket.socketpair()[0]
        return a

    def check(o): ...


@case(refused="conn", reason="connected")
def attribute_of_a_proxy():
    import socket

    class P:
        def __init__(self):
            self.__dict__["conn"] = socket.socketpair()[0]

        def __getattr__(self, n):
            raise AttributeError(n)

    def build():
        return P()

    def check(o): ...


@case(refused="conn", reason="connected")
def slot_behind_a_partial():
    import functools
    import socket

    class Inner:
        __slots__ = ("conn", "peer")

        def __init__(self):
            self.conn, self.peer = socket.socketpair()

    class Outer:
        def __init__(self):
            i = Inner()
            self.cb = functools.partial(lambda a, b: None, b=i)

    def build():
        return Outer()

    def check(o): ...


@case(refused="shm", reason="removes it for all")
def shared_memory():
    from multiprocessing import shared_memory

    class P:
        def __init__(self):
            self.shm = shared_memory.SharedMemory(create=True, size=10)
            self.shm.unlink()

    def build():
        return P()

    def check(p): ...


@case(refused="fut", reason="running in another")
def future_of_running_work():
    import concurrent.futures

    class S:
        def __init__(self):
            self.fut = concurrent.futures.Future()
            self.fut.set_running_or_notify_cancel()

    def build():
        return S()

    def check(o): ...


@case(refused="tail", reason="pointers")
def structure_with_a_pointer():
    import ctypes

    class Node(ctypes.Structure):
        pass

    Node._fields_ = [("v", ctypes.c_int), ("next", ctypes.POINTER(Node))]

    class List:
        def __init__(self):
            self.tail = Node(2)
            self.head = Node(1, ctypes.pointer(self.tail))

    def build():
        return List()

    def check(chain): ...


@case(refused="buf", reason="no object owns")
def view_into_a_memory_stream():
    import io

    class S:
        def __init__(self):
            self.f = io.BytesIO(b"abc")
            self.buf = self.f.getbuffer()

    def build():
        return S()

    def check(s): ...


@case(refused="scan")
def listing_of_a_folder():
    import os

    class S:
        def __init__(self):
            self.scan = os.scandir("/")
            next(self.scan)

    def build():
        return S()

    def check(o): ...


@case(refused="cond", reason="wait")
def condition_with_a_waiter():
    import threading
    import time

    class S:
        def __init__(self):
            self.cond = threading.Condition()

    def build():
        s = S()

        def wait():
            with s.cond:
                s.cond.wait(60)

        threading.Thread(target=wait, daemon=True).start()
        while not s.cond._waiters:
            time.sleep(0.001)
        return s

    def check(s): ...
