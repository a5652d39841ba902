"""Files, temporary ones, archives, databases and mapped memory."""

from ..cases import case


@case(harmless=False)
def files_open_for_writing_and_appending():
    import os
    import tempfile

    class Journal:
        def __init__(self, folder):
            self.text = open(os.path.join(folder, "log"), "w", encoding="utf-16")
            self.raw = open(os.path.join(folder, "raw"), "ab")
            self.bare = open(os.path.join(folder, "bare"), "wb", buffering=0)
            self.both = open(os.path.join(folder, "both"), "w+", newline="")

        def add(self, line):
            self.text.write(line)
            self.raw.write(line.encode())
            self.bare.write(line.encode())
            self.both.write(line + "\r\n")

    def build():
        journal = Journal(tempfile.mkdtemp())
        journal.add("äb")
        return journal

    def check(journal):
        assert journal.text.encoding == "utf-16" and journal.text.mode == "w"
        journal.add("c")
        for file in vars(journal).values():
            file.flush()
        assert open(journal.text.name, encoding="utf-16").read() == "äbc"
        assert open(journal.raw.name, "rb").read() == "äbc".encode()
        assert open(journal.bare.name, "rb").read() == "äbc".encode()
        journal.both.seek(0)
        assert journal.both.read() == "äb\r\nc\r\n"


@case
def files_being_read():
    import os
    import tempfile

    class Reader:
        def __init__(self, path):
            self.lines = open(path, encoding="latin-1")
            self.universal = open(path, newline="")
            self.raw = open(path, "rb")
            self.same = self.raw

    def build():
        path = os.path.join(tempfile.mkdtemp(), "data")
        with open(path, "wb") as file:
            file.write(b"one\r\ntwo\r\nthree\r\n")
        reader = Reader(path)
        next(reader.lines)
        reader.universal.readline()
        reader.raw.read(3)
        return reader

    def check(reader):
        assert next(reader.lines) == "two\n" and list(reader.lines) == ["three\n"]
        assert reader.universal.read() == "two\r\nthree\r\n"
        assert reader.raw.read(2) == b"\r\n" and reader.same is reader.raw
        assert reader.lines.encoding == "latin-1"


@case
def files_closed_and_standard_streams():
    import os
    import sys
    import tempfile

    class Done:
        def __init__(self, path):
            self.file = open(path, "w")
            self.file.write("kept")
            self.file.close()
            self.out, self.err = sys.stdout, sys.stderr

    def build():
        return Done(os.path.join(tempfile.mkdtemp(), "x"))

    def check(done):
        assert done.file.closed and done.file.mode == "w"
        assert open(done.file.name).read() == "kept"
        assert done.out is sys.stdout and done.err is sys.stderr


@case
def files_in_memory():
    import io

    class Buffer:
        def __init__(self):
            self.text, self.raw = io.StringIO("abc\ndef\n"), io.BytesIO(b"0123")
            self.wrapped = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\r\n")
            self.buffered = io.BufferedReader(io.BytesIO(b"xyz"))

    def build():
        buffer = Buffer()
        buffer.text.readline()
        buffer.raw.seek(2)
        buffer.wrapped.write("ä\n")
        buffer.buffered.read(1)
        return buffer

    def check(buffer):
        assert buffer.text.read() == "def\n" and buffer.raw.read() == b"23"
        buffer.wrapped.write("b")
        buffer.wrapped.seek(0)
        assert buffer.wrapped.buffer.getvalue() == "ä\r\nb".encode()
        assert buffer.buffered.read() == b"yz"


@case
def csv_over_a_file():
    import csv
    import os
    import tempfile

    class Table:
        def __init__(self, path):
            self.file = open(path, newline="")
            self.reader = csv.DictReader(self.file)

    def build():
        path = os.path.join(tempfile.mkdtemp(), "t.csv")
        with open(path, "w", newline="") as file:
            file.write('a,b\r\n1,"x\r\ny"\r\n2,z\r\n')
        table = Table(path)
        table.first = next(table.reader)
        return table

    def check(table):
        assert table.first == {"a": "1", "b": "x\r\ny"}
        assert next(table.reader) == {"a": "2", "b": "z"} and table.reader.line_num == 4


@case
def temporary_files():
    import tempfile

    class Scratch:
        def __init__(self):
            self.named = tempfile.NamedTemporaryFile("w+", suffix=".txt")
            self.bare = tempfile.TemporaryFile()
            self.small = tempfile.SpooledTemporaryFile(max_size=100)

    def build():
        scratch = Scratch()
        scratch.named.write("hello")
        scratch.bare.write(b"bare")
        scratch.small.write(b"small")
        scratch.named.seek(1)
        return scratch

    def check(scratch):
        import os

        assert scratch.named.read() == "ello" and scratch.named.name.endswith(".txt")
        assert open(scratch.named.name).read() == "hello"
        scratch.bare.write(b"!")
        scratch.bare.seek(0)
        assert scratch.bare.read() == b"bare!"
        scratch.small.write(b"x" * 200)
        scratch.small.seek(0)
        assert scratch.small.read(6) == b"smallx"
        scratch.named.close()
        assert not os.path.exists(scratch.named.name)


@case
def temporary_folders():
    import os
    import tempfile

    class Build:
        def __init__(self):
            self.folder = tempfile.TemporaryDirectory()
            os.mkdir(os.path.join(self.folder.name, "sub"))
            with open(os.path.join(self.folder.name, "sub", "f"), "w") as file:
                file.write("x")
            os.symlink("sub/f", os.path.join(self.folder.name, "link"))

    def build():
        return Build()

    def check(built):
        assert open(os.path.join(built.folder.name, "link")).read() == "x"
        built.folder.cleanup()
        assert not os.path.exists(built.folder.name)


@case
def file_deleted_while_open():
    import os
    import tempfile

    class Keeper:
        def __init__(self, path):
            self.file = open(path, "w+")
            self.file.write("abc")
            os.unlink(path)

    def build():
        return Keeper(os.path.join(tempfile.mkdtemp(), "gone"))

    def check(keeper):
        keeper.file.write("d")
        keeper.file.seek(0)
        assert keeper.file.read() == "abcd"


@case
def compressed_files_being_read():
    import bz2
    import gzip
    import lzma
    import os
    import tempfile

    class Archive:
        def __init__(self, folder):
            self.files = []
            for module in (gzip, bz2, lzma):
                path = os.path.join(folder, module.__name__)
                with module.open(path, "wb") as file:
                    file.write(b"line one\nline two\nline three\n")
                self.files.append(module.open(path, "rb"))
            self.text = gzip.open(os.path.join(folder, "gzip"), "rt")

    def build():
        archive = Archive(tempfile.mkdtemp())
        for file in archive.files:
            file.readline()
        archive.text.readline()
        return archive

    def check(archive):
        for file in archive.files:
            assert file.readline() == b"line two\n" and file.tell() == 18
            file.seek(0)
            assert file.read(4) == b"line"
        assert archive.text.read() == "line two\nline three\n"


@case
def zip_and_tar_archives():
    import io
    import os
    import tarfile
    import tempfile
    import zipfile

    class Assets:
        def __init__(self, folder):
            self.zip = zipfile.ZipFile(os.path.join(folder, "a.zip"))
            self.memory = zipfile.ZipFile(io.BytesIO(open(self.zip.filename, "rb").read()))
            self.tar = tarfile.open(os.path.join(folder, "a.tar"))

    def build():
        folder = tempfile.mkdtemp()
        with zipfile.ZipFile(os.path.join(folder, "a.zip"), "w") as archive:
            archive.writestr("x/y", "content")
        with tarfile.open(os.path.join(folder, "a.tar"), "w") as archive:
            info = tarfile.TarInfo("t")
            info.size = 3
            archive.addfile(info, io.BytesIO(b"tar"))
        assets = Assets(folder)
        assets.zip.read("x/y")
        return assets

    def check(assets):
        assert assets.zip.read("x/y") == b"content" and assets.memory.namelist() == ["x/y"]
        assert assets.memory.open("x/y").read() == b"content"
        assert assets.tar.extractfile("t").read() == b"tar"


@case
def database_in_memory():
    import sqlite3

    class Store:
        def __init__(self):
            self.db = sqlite3.connect(":memory:", isolation_level=None)
            self.db.row_factory = sqlite3.Row
            self.db.execute("PRAGMA foreign_keys = ON")
            self.db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT UNIQUE)")
            self.db.execute("CREATE TABLE u (t REFERENCES t(id))")
            self.cursor = self.db.cursor()

        def add(self, name):
            self.cursor.execute("INSERT INTO t (name) VALUES (?)", (name,))
            return self.cursor.lastrowid

    def build():
        store = Store()
        store.add("a")
        store.row = store.db.execute("SELECT * FROM t").fetchone()
        return store

    def check(store):
        assert (
            store.add("b") == 2 and store.row["name"] == "a" and store.row.keys() == ["id", "name"]
        )
        assert [row["name"] for row in store.db.execute("SELECT * FROM t")] == ["a", "b"]
        for bad in ("INSERT INTO t (name) VALUES ('a')", "INSERT INTO u VALUES (99)"):
            try:
                store.db.execute(bad)
            except sqlite3.IntegrityError:
                pass
            else:
                raise AssertionError(bad)
        assert store.cursor.connection is store.db


@case
def database_with_types_and_factories():
    import sqlite3

    class Store:
        def __init__(self):
            self.db = sqlite3.connect(":memory:", detect_types=sqlite3.PARSE_COLNAMES)
            self.db.text_factory = bytes
            self.db.row_factory = lambda cursor, row: {
                d[0]: v for d, v in zip(cursor.description, row)
            }
            self.db.execute("ATTACH ':memory:' AS other")
            self.db.execute("CREATE TABLE other.t (x)")
            self.db.execute("INSERT INTO other.t VALUES ('text')")
            self.db.commit()

    def build():
        return Store()

    def check(store):
        sqlite3.register_converter("upper", lambda raw: raw.upper())
        assert store.db.execute("SELECT x FROM other.t").fetchone() == {"x": b"text"}
        assert store.db.execute("SELECT 'a' AS 'y [upper]'").fetchone() == {"y": b"A"}
        assert store.db.isolation_level == ""


@case(harmless=False)
def database_in_a_file():
    import os
    import sqlite3
    import tempfile

    class Store(sqlite3.Connection):
        def add(self, value):
            with self:
                self.execute("INSERT INTO t VALUES (?)", (value,))
            return [row[0] for row in self.execute("SELECT x FROM t")]

    def build():
        path = os.path.join(tempfile.mkdtemp(), "a ?b.db")
        store = sqlite3.connect(path, factory=Store)
        store.label = "mine"
        store.execute("CREATE TABLE t (x)")
        store.add(1)
        return store

    def check(store):
        assert store.add(2) == [1, 2] and store.label == "mine"


@case
def mapped_memory():
    import mmap
    import os
    import tempfile

    class Shared:
        def __init__(self, path):
            self.anonymous = mmap.mmap(-1, 100)
            with open(path, "r+b") as file:
                self.mapped = mmap.mmap(file.fileno(), 0)
                self.readable = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self.private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def build():
        path = os.path.join(tempfile.mkdtemp(), "m")
        with open(path, "wb") as file:
            file.write(b"0123456789")
        shared = Shared(path)
        shared.anonymous.write(b"hello")
        shared.mapped[0:1] = b"X"
        shared.private[1:2] = b"P"
        shared.readable.seek(3)
        return shared

    def check(shared):
        assert shared.anonymous[:5] == b"hello" and shared.anonymous.tell() == 5
        assert shared.mapped[:] == b"X123456789" and shared.readable.read(2) == b"34"
        assert shared.private[:2] in (b"XP", b"0P")
        shared.mapped[9:10] = b"E"
        assert shared.readable[9:10] == b"E"
        shared.mapped[9:10] = b"9"
        shared.readable.seek(3)


@case(harmless=False)
def loggers_and_handlers_with_files():
    import logging
    import os
    import tempfile

    class Service:
        def __init__(self, path):
            self.log = logging.getLogger("service.part")
            self.own = logging.Logger("own", logging.INFO)
            handler = logging.FileHandler(path)
            handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
            handler.addFilter(lambda record: "secret" not in record.getMessage())
            self.own.addHandler(handler)
            self.adapter = logging.LoggerAdapter(self.own, {"id": 1})

    def build():
        service = Service(os.path.join(tempfile.mkdtemp(), "log"))
        service.own.info("one %s", 1)
        return service

    def check(service):
        assert service.log is logging.getLogger("service.part")
        service.own.debug("no")
        service.own.info("a secret")
        service.adapter.warning("two")
        (handler,) = service.own.handlers
        handler.flush()
        assert open(handler.baseFilename).read() == "INFO one 1\nWARNING two\n"


@case
def config_parsers_and_shelves():
    import configparser
    import os
    import shelve
    import tempfile
    from dbm import dumb

    class Settings:
        def __init__(self, folder):
            self.config = configparser.ConfigParser(
                interpolation=configparser.ExtendedInterpolation(), converters={"list": str.split}
            )
            self.config.read_string("[a]\nx = 1\ny = ${x}2\nz = p q\n")
            self.shelf = shelve.Shelf(dumb.open(os.path.join(folder, "s")), writeback=True)
            self.shelf["k"] = [1]

    def build():
        settings = Settings(tempfile.mkdtemp())
        settings.config["a"]["w"] = "5"
        settings.shelf["k"].append(2)
        settings.shelf.sync()
        return settings

    def check(settings):
        assert settings.config.getint("a", "y") == 12 and settings.config["a"].getint("w") == 5
        assert settings.config.getlist("a", "z") == ["p", "q"]
        assert settings.shelf["k"] == [1, 2]


@case
def memory_streams_closed_and_sparse():
    import io

    def build():
        c = io.StringIO("x")
        c.close()
        b = io.BytesIO(b"abc")
        b.close()
        z = io.BytesIO()
        z.write(b"12345")
        z.seek(10)
        return [c, b, z]

    def check(s):
        assert s[0].closed and s[1].closed
        s[2].write(b"x")
        assert s[2].getvalue() == b"12345\0\0\0\0\0x"


@case
def environment_of_the_process():
    import os

    class E:
        def __init__(self):
            self.env = os.environ

    def build():
        return E()

    def check(e):
        assert e.env["PATH"]


@case
def temporary_files_of_each_kind():
    import tempfile

    def build():
        s = tempfile.SpooledTemporaryFile(max_size=20, mode="w+")
        s.write("hello\nworld")
        s.seek(6)
        b = tempfile.SpooledTemporaryFile(max_size=5, mode="w+b")
        b.write(b"0123456789")
        b.seek(3)
        n = tempfile.NamedTemporaryFile("w+", suffix=".txt", encoding="latin-1")
        n.write("é1\né2\n")
        n.seek(0)
        n.readline()
        t = tempfile.TemporaryFile("w+b")
        t.write(b"abc")
        t.seek(1)
        return dict(s=s, b=b, n=n, t=t)

    def check(d):
        import os

        assert d["s"].read() == "world"
        assert d["b"].read() == b"3456789"
        assert d["n"].readline() == "é2\n" and os.path.exists(d["n"].name)
        assert d["t"].read() == b"bc"
        d["t"].write(b"Z")
        d["t"].seek(0)
        assert d["t"].read() == b"abcZ"


@case
def text_file_and_its_buffer():
    import os
    import tempfile

    class S:
        def __init__(self):
            path = os.path.join(tempfile.mkdtemp(), "f")
            with open(path, "w") as f:
                f.write("one\ntwo\nthree\n")
            self.f = open(path)
            self.buf = self.f.buffer
            self.raw = self.buf.raw
            self.f.readline()

    def build():
        return S()

    def check(s):
        assert s.f.readline() == "two\n" and s.f.buffer is s.buf and s.buf.raw is s.raw


@case
def loggers_with_a_manager_of_their_own():
    import logging

    class S:
        def __init__(self):
            self.root = logging.RootLogger(logging.WARNING)
            self.manager = logging.Manager(self.root)
            self.log = self.manager.getLogger("a.b")
            self.out = []
            h = logging.Handler()
            h.emit = lambda r: self.out.append(r.getMessage())
            self.root.addHandler(h)

    def build():
        s = S()
        s.log.error("x")
        return s

    def check(s):
        s.log.error("y")
        assert s.out[-1] == "y"
