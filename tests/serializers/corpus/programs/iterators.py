"""Iterators in the middle of what they iterate over."""

from ..cases import case


@case
def iterators_of_builtin_containers():
    class Cursor:
        def __init__(self):
            self.data = [1, 2, 3]
            self.forward, self.back = iter(self.data), reversed(self.data)
            self.text, self.range = iter("abc"), iter(range(0, 10, 3))
            self.pair, self.raw = iter((1, 2)), iter(b"xy")
            self.calls = iter([5, 6, 0].pop, 5)
            self.memory = iter(memoryview(bytearray(b"abc")))

    def build():
        cursor = Cursor()
        for it in (cursor.forward, cursor.back, cursor.text, cursor.range, cursor.pair, cursor.raw):
            next(it)
        next(cursor.calls)
        next(cursor.memory)
        return cursor

    def check(cursor):
        cursor.data.append(4)
        assert list(cursor.forward) == [2, 3, 4] and list(cursor.back) == [2, 1]
        assert "".join(cursor.text) == "bc" and list(cursor.range) == [3, 6, 9]
        assert list(cursor.pair) == [2] and list(cursor.raw) == [121]
        assert list(cursor.calls) == [6] and list(cursor.memory) == [98, 99]


@case
def iterators_of_dicts_and_sets():
    from collections import Counter, OrderedDict, deque

    class Scan:
        def __init__(self):
            self.table = {"a": 1, "b": 2, "c": 3}
            self.keys, self.values = iter(self.table), iter(self.table.values())
            self.items, self.back = iter(self.table.items()), reversed(self.table)
            self.set, self.seen = iter({1, 2, 3}), []
            self.deque = iter(deque([7, 8, 9]))
            self.ordered = iter(OrderedDict(x=1, y=2))
            self.elements = Counter(a=2, b=1).elements()

    def build():
        scan = Scan()
        for it in (scan.keys, scan.values, scan.items, scan.back, scan.deque, scan.ordered):
            next(it)
        next(scan.elements)
        scan.seen.append(next(scan.set))
        return scan

    def check(scan):
        scan.table["b"] = 20
        assert list(scan.keys) == ["b", "c"] and list(scan.values) == [20, 3]
        assert list(scan.items) == [("b", 20), ("c", 3)] and list(scan.back) == ["b", "a"]
        assert sorted([*scan.set, *scan.seen]) == [1, 2, 3]
        assert list(scan.deque) == [8, 9] and list(scan.ordered) == ["y"]
        assert list(scan.elements) == ["a", "b"]


@case
def zip_map_filter_enumerate():
    class Pipeline:
        def __init__(self, rows):
            self.source = iter(rows)
            self.numbered = enumerate(self.source, start=10)
            self.big = filter(lambda pair: pair[1] > 1, self.numbered)
            self.out = map(lambda pair: (pair[0], pair[1] * 2), self.big)
            self.zipped = zip("abc", [1, 2, 3], strict=True)

    def build():
        pipeline = Pipeline([1, 2, 3, 4])
        next(pipeline.out)
        next(pipeline.zipped)
        return pipeline

    def check(pipeline):
        assert next(pipeline.out) == (12, 6)
        assert next(pipeline.source) == 4 and list(pipeline.out) == []
        assert list(pipeline.zipped) == [("b", 2), ("c", 3)]


@case
def itertools_that_never_end():
    import itertools

    class Ids:
        def __init__(self):
            self.ids = itertools.count(10, 5)
            self.fractions = itertools.count(0.5, 0.25)
            self.turns = itertools.cycle(["a", "b", "c"])
            self.same = itertools.repeat("x")
            self.thrice = itertools.repeat("y", 3)

    def build():
        ids = Ids()
        for it in (ids.ids, ids.fractions, ids.turns, ids.thrice):
            next(it)
        for _ in range(3):
            next(ids.turns)
        return ids

    def check(ids):
        assert next(ids.ids) == 15 and next(ids.fractions) == 0.75
        assert [next(ids.turns) for _ in range(4)] == ["b", "c", "a", "b"]
        assert next(ids.same) == "x" and list(ids.thrice) == ["y", "y"]


@case
def itertools_that_end():
    import itertools
    import operator

    class Steps:
        def __init__(self):
            t = itertools
            self.all = {
                "chain": t.chain([1, 2], [3]),
                "flat": t.chain.from_iterable([[1, 2], [3]]),
                "slice": t.islice(range(10), 1, 8, 2),
                "take": t.takewhile(lambda x: x < 3, [1, 2, 3, 1]),
                "drop": t.dropwhile(lambda x: x < 2, [1, 2, 1]),
                "star": t.starmap(pow, [(2, 1), (2, 2), (2, 3)]),
                "sum": t.accumulate([1, 2, 3], operator.add),
                "pairs": t.pairwise("abc"),
                "long": t.zip_longest("ab", "c", fillvalue="-"),
                "not": t.filterfalse(bool, [0, 1, "", None]),
                "compress": t.compress("abc", [1, 0, 1]),
            }

    def build():
        steps = Steps()
        for it in steps.all.values():
            next(it)
        return steps

    def check(steps):
        left = {name: list(it) for name, it in steps.all.items()}
        assert left == {
            "chain": [2, 3],
            "flat": [2, 3],
            "slice": [3, 5, 7],
            "take": [2],
            "drop": [1],
            "star": [4, 8],
            "sum": [3, 6],
            "pairs": [("b", "c")],
            "long": [("b", "-")],
            "not": ["", None],
            "compress": ["c"],
        }


@case
def itertools_of_combinations():
    import itertools

    class Search:
        def __init__(self):
            self.product = itertools.product("ab", repeat=2)
            self.permutations = itertools.permutations("abc", 2)
            self.combinations = itertools.combinations([1, 2, 3], 2)
            self.more = itertools.combinations_with_replacement("xy", 2)

    def build():
        search = Search()
        for it in vars(search).values():
            next(it)
            next(it)
        return search

    def check(search):
        assert ["".join(p) for p in search.product] == ["ba", "bb"]
        assert ["".join(p) for p in search.permutations] == ["ba", "bc", "ca", "cb"]
        assert list(search.combinations) == [(2, 3)] and list(search.more) == [("y", "y")]


@case(python=(3, 12))
def batches():
    import itertools

    class Upload:
        def __init__(self):
            self.batches = itertools.batched("abcdefg", 3)

    def build():
        upload = Upload()
        next(upload.batches)
        return upload

    def check(upload):
        assert ["".join(batch) for batch in upload.batches] == ["def", "g"]


@case
def tee_and_groupby():
    import itertools

    class Split:
        def __init__(self):
            self.left, self.right = itertools.tee(iter([1, 2, 3, 4]))
            self.groups = itertools.groupby("aabbcc")

    def build():
        split = Split()
        next(split.left)
        next(split.left)
        next(split.right)
        next(split.groups)
        return split

    def check(split):
        assert list(split.right) == [2, 3, 4] and list(split.left) == [3, 4]
        assert [(key, len(list(group))) for key, group in split.groups] == [("b", 2), ("c", 2)]


@case
def generators_not_begun_and_over():
    class Feed:
        def __init__(self, items):
            self.items = items
            self.ahead = self.read(start=1)
            self.expression = (item * 2 for item in self.items)
            self.over = self.read()
            for _ in self.over:
                pass

        def read(self, start=0):
            yield from self.items[start:]

    def build():
        feed = Feed([1, 2])
        feed.items.append(3)
        return feed

    def check(feed):
        assert list(feed.over) == [] and list(feed.ahead) == [2, 3]
        assert list(feed.expression) == [2, 4, 6] or list(feed.expression) == []


@case
def iterator_classes_of_ones_own():
    class Primes:
        def __init__(self):
            self.known, self.n = [], 1

        def __iter__(self):
            return self

        def __next__(self):
            self.n += 1
            while any(self.n % p == 0 for p in self.known):
                self.n += 1
            self.known.append(self.n)
            return self.n

    def build():
        primes = Primes()
        return [primes, zip(primes, primes)]

    def check(found):
        primes, pairs = found
        first = next(pairs)
        assert first[0] < first[1] == primes.known[-1]
        assert next(primes) > first[1]


@case
def csv_readers_and_writers():
    import csv
    import io

    class Import:
        def __init__(self):
            self.source = io.StringIO("a;b\n1;2\n3;'x;y'\n")
            self.reader = csv.reader(self.source, delimiter=";", quotechar="'")
            self.out = io.StringIO()
            self.writer = csv.writer(self.out, delimiter="|", lineterminator="\n")
            self.rows = csv.DictReader(["n,m", "1,2", "3,4"])
            self.table = csv.DictWriter(self.out, ["p", "q"])

    def build():
        found = Import()
        found.writer.writerow(next(found.reader))
        next(found.rows)
        return found

    def check(found):
        assert next(found.reader) == ["1", "2"] and found.reader.line_num == 2
        assert next(found.reader) == ["3", "x;y"]
        found.writer.writerow(["c", "d|e"])
        found.table.writerow({"p": 1, "q": 2})
        assert found.out.getvalue() == 'a|b\nc|"d|e"\n1,2\r\n'
        assert next(found.rows) == {"n": "3", "m": "4"} and found.rows.line_num == 3


@case
def matches_of_regular_expressions():
    import re

    class Lexer:
        def __init__(self, text):
            self.pattern = re.compile(r"(?P<word>\w+)|(?P<space>\s+)", re.ASCII)
            self.text, self.pos = text, 0
            self.last = None

        def next(self):
            self.last = self.pattern.match(self.text, self.pos)
            self.pos = self.last.end()
            return self.last.lastgroup

    def build():
        lexer = Lexer("ab cd")
        lexer.next()
        lexer.next()
        lexer.found = [m for m in re.finditer(r"(?<=b) (c)", "b c b c")][1]
        return lexer

    def check(lexer):
        assert lexer.last.span() == (2, 3) and lexer.last.re is lexer.pattern
        assert lexer.next() == "word" and lexer.last["word"] == "cd"
        assert lexer.found.span(1) == (6, 7) and lexer.found.string == "b c b c"
        lexer.pos, lexer.last = 3, lexer.pattern.match(lexer.text, 2)


@case
def unpackers_and_scanners():
    import re
    import struct

    class Decoder:
        def __init__(self):
            self.header = struct.Struct("<HB")
            self.records = self.header.iter_unpack(bytes(range(9)))
            self.scanner = re.Scanner([(r"\d+", lambda s, t: int(t)), (r"\s+", None)])

    def build():
        decoder = Decoder()
        next(decoder.records)
        return decoder

    def check(decoder):
        assert list(decoder.records) == [(1027, 5), (1798, 8)]
        assert decoder.header.size == 3 and decoder.scanner.scan("12 3")[0] == [12, 3]


@case
def iterators_that_share_a_source():
    import itertools

    def build():
        src = iter(range(100))
        a = itertools.chain(["x"], src)
        b = zip(src, src)
        c = map(str, itertools.islice(src, 10))
        next(a)
        next(b)
        next(c)
        return [src, a, b, c]

    def check(s):
        src, a, b, c = s
        assert next(a) == 3
        assert next(b) == (4, 5)
        assert next(c) == "6"
        assert next(src) == 7
        assert next(a) == 8


@case
def chains_over_each_other():
    import itertools

    def build():
        one = itertools.chain([1, 2, 3], "ab")
        two = itertools.chain.from_iterable([one, [9], one])
        three = itertools.zip_longest(two, itertools.count(5, 5), fillvalue=None)
        next(three)
        next(three)
        return {"one": one, "two": two, "three": three}

    def check(s):
        assert next(s["one"]) == 3
        assert next(s["three"]) == ("a", 15)
        assert next(s["two"]) == "b"
        assert next(s["two"]) == 9
        assert next(s["three"]) == (None, 20)


@case
def iterators_that_are_used_up():
    import itertools

    class S:
        def __init__(self):
            self.l = [1]
            self.it = iter(self.l)
            list(self.it)
            self.sl = itertools.islice(iter([1, 2, 3, 4]), 2)
            list(self.sl)
            self.src = iter([1, 2, 3, 4])
            self.sl2 = itertools.islice(self.src, 2)
            list(self.sl2)
            self.rev = reversed([1])
            list(self.rev)
            self.en = enumerate([])
            list(self.en)
            self.d = {1: 1}
            self.di = iter(self.d)
            list(self.di)
            self.z = zip([1], [2])
            list(self.z)
            self.call = iter(lambda: 0, 0)
            list(self.call)
            self.s = {1}
            self.si = iter(self.s)
            list(self.si)
            self.rng = iter(range(2))
            list(self.rng)

    def build():
        return S()

    def check(s):
        s.l.append(2)
        assert list(s.it) == [] and list(s.sl) == [] and list(s.sl2) == [] and list(s.src) == [3, 4]
        assert (
            list(s.rev) == []
            and list(s.en) == []
            and list(s.di) == []
            and list(s.z) == []
            and list(s.call) == []
        )
        assert list(s.si) == [] and list(s.rng) == []
        s.l.pop()
        s.src = iter([3, 4])


@case
def pipeline_over_lines():
    import io
    import itertools

    class S:
        def __init__(self):
            self.lines = iter(io.StringIO("a\nb\nc\n"))
            next(self.lines)
            self.stripped = map(str.strip, self.lines)
            self.windowed = itertools.pairwise(self.stripped)
            self.chunk = itertools.islice(self.stripped, 1)

    def build():
        return S()

    def check(s):
        assert list(s.chunk) == ["b"] and next(s.lines) == "c\n"
