"""Collections of all kinds, alone and in classes that keep them."""

from ..cases import case


@case
def deque_with_maxlen():
    from collections import deque

    class Log:
        def __init__(self):
            self.items = deque(maxlen=3)

        def add(self, item):
            self.items.append(item)

    def build():
        log = Log()
        for n in range(5):
            log.add(n)
        return log

    def check(log):
        assert list(log.items) == [2, 3, 4]
        log.add(5)
        assert list(log.items) == [3, 4, 5] and log.items.maxlen == 3


@case
def ordered_dict_that_reorders():
    from collections import OrderedDict

    class Lru:
        def __init__(self, size):
            self.size, self.data = size, OrderedDict()

        def get(self, key):
            self.data.move_to_end(key)
            return self.data[key]

        def put(self, key, value):
            self.data[key] = value
            if len(self.data) > self.size:
                self.data.popitem(last=False)

    def build():
        cache = Lru(2)
        cache.put("a", 1)
        cache.put("b", 2)
        cache.get("a")
        return cache

    def check(cache):
        cache.put("c", 3)
        assert list(cache.data) == ["a", "c"]


@case
def chain_map_with_shared_layers():
    from collections import ChainMap

    class Settings:
        def __init__(self):
            self.defaults = {"size": 1, "name": "x"}
            self.own = {}
            self.all = ChainMap(self.own, self.defaults)

    def build():
        settings = Settings()
        settings.all["size"] = 2
        return settings

    def check(settings):
        assert settings.all["size"] == 2 and settings.own == {"size": 2}
        settings.defaults["name"] = "y"
        assert settings.all["name"] == "y"
        assert settings.all.parents["size"] == 1


@case
def counters_and_heaps():
    import heapq
    from collections import Counter

    class Words:
        def __init__(self):
            self.count = Counter()
            self.queue = []

        def add(self, text):
            self.count.update(text.split())
            heapq.heappush(self.queue, (len(text), text))

    def build():
        words = Words()
        words.add("a b a")
        words.add("c")
        return words

    def check(words):
        words.add("a a")
        assert words.count.most_common(1) == [("a", 4)]
        assert words.count["unseen"] == 0
        assert heapq.heappop(words.queue) == (1, "c")


@case
def defaultdict_of_lambda():
    from collections import defaultdict

    class Index:
        def __init__(self, start):
            self.by_key = defaultdict(lambda: [start])

    def build():
        index = Index(7)
        index.by_key["a"].append(1)
        return index

    def check(index):
        assert index.by_key["a"] == [7, 1]
        assert index.by_key["new"] == [7]
        assert index.by_key["new"] is index.by_key["new"]


@case
def nested_defaultdicts():
    from collections import defaultdict

    class Tree:
        def __init__(self):
            def node():
                return defaultdict(node)

            self.root = node()

    def build():
        tree = Tree()
        tree.root["a"]["b"]["c"] = 1
        return tree

    def check(tree):
        tree.root["x"]["y"]["z"] = 2
        assert tree.root["a"]["b"]["c"] == 1 and tree.root["x"]["y"]["z"] == 2


@case
def user_containers_with_attributes():
    from collections import UserDict, UserList, UserString

    class Headers(UserDict):
        def __setitem__(self, key, value):
            super().__setitem__(key.lower(), value)

    class Rows(UserList):
        source = "?"

    class Name(UserString):
        pass

    class All:
        pass

    def build():
        found = All()
        found.headers = Headers()
        found.headers["Content-Type"] = "text"
        found.rows = Rows([1, 2])
        found.rows.source = "file"
        found.name = Name("abc")
        return found

    def check(found):
        found.headers["ACCEPT"] = 1
        assert dict(found.headers) == {"content-type": "text", "accept": 1}
        assert found.rows + [3] == [1, 2, 3] and found.rows.source == "file"
        assert found.name.upper() == "ABC"


@case
def subclasses_of_builtins_with_state():
    class Temperature(float):
        def __new__(cls, value, unit):
            made = super().__new__(cls, value)
            made.unit = unit
            return made

    class Tag(str):
        __slots__ = ("weight",)

    class Blob(bytes):
        pass

    class Stack(list):
        def __init__(self, limit):
            super().__init__()
            self.limit = limit

        def push(self, item):
            if len(self) >= self.limit:
                raise OverflowError(self.limit)
            self.append(item)

    class Pair(tuple):
        def __new__(cls, a, b):
            return super().__new__(cls, (a, b))

    class Bag(set):
        pass

    def build():
        stack = Stack(2)
        stack.push(Temperature(21.5, "C"))
        tag = Tag("big")
        tag.weight = 3
        blob = Blob(b"xy")
        blob.origin = tag
        bag = Bag({1})
        bag.label = "odd"
        return {"stack": stack, "tag": tag, "blob": blob, "pair": Pair(1, [tag]), "bag": bag}

    def check(all):
        stack = all["stack"]
        assert stack[0] == 21.5 and stack[0].unit == "C"
        stack.push(1)
        try:
            stack.push(2)
        except OverflowError as exc:
            assert exc.args == (2,)
        else:
            raise AssertionError("the limit is lost")
        assert all["blob"].origin is all["tag"] and all["tag"].weight == 3
        assert all["pair"][1][0] is all["tag"] and type(all["pair"]).__name__ == "Pair"
        assert all["bag"].label == "odd" and all["bag"] == {1}


@case
def simple_namespace_and_mapping_proxy():
    from types import MappingProxyType, SimpleNamespace

    class Config:
        def __init__(self):
            self._values = {"a": 1}
            self.values = MappingProxyType(self._values)
            self.more = SimpleNamespace(x=self._values)

        def set(self, key, value):
            self._values[key] = value

    def build():
        config = Config()
        config.set("b", 2)
        return config

    def check(config):
        config.set("c", 3)
        assert dict(config.values) == {"a": 1, "b": 2, "c": 3}
        assert config.more.x is config._values
        try:
            config.values["d"] = 4
        except TypeError:
            pass
        else:
            raise AssertionError("a proxy became writable")


@case
def arrays_and_bytearrays():
    import array

    class Signal:
        def __init__(self):
            self.samples = array.array("d")
            self.raw = bytearray()
            self.wide = array.array("i", range(5))

    def build():
        signal = Signal()
        signal.samples.extend([1.5, 2.5])
        signal.raw += b"abc"
        return signal

    def check(signal):
        signal.samples.append(3.5)
        signal.raw[0:1] = b"XY"
        assert signal.samples.tolist() == [1.5, 2.5, 3.5] and signal.samples.typecode == "d"
        assert signal.raw == b"XYbc" and sum(signal.wide) == 10


@case
def sets_of_objects_with_their_own_hash():
    class Point:
        def __init__(self, x):
            self.x = x
            self.friends = set()

        def __hash__(self):
            return hash(self.x)

        def __eq__(self, other):
            return isinstance(other, Point) and self.x == other.x

    def build():
        a, b = Point("a"), Point("b")
        a.friends |= {a, b}
        b.friends |= {a}
        return a

    def check(a):
        kind = type(a)
        assert a in a.friends and kind("b") in a.friends and kind("c") not in a.friends
        b = next(friend for friend in a.friends if friend.x == "b")
        assert a in b.friends and len(a.friends) == 2


@case
def dict_whose_key_refers_back_to_it():
    class Key:
        def __init__(self, name):
            self.name = name
            self.table = None

        def __hash__(self):
            return hash(self.name)

        def __eq__(self, other):
            return isinstance(other, Key) and self.name == other.name

    def build():
        key = Key("k")
        key.table = {key: 1, Key("other"): 2}
        return key

    def check(key):
        assert key.table[key] == 1 and key.table[type(key)("other")] == 2
        key.table[key] = 5
        assert len(key.table) == 2


@case
def frozenset_reached_from_its_own_member():
    class Node:
        def __init__(self, name):
            self.name = name
            self.group = frozenset()

        def __hash__(self):
            return hash(self.name)

        def __eq__(self, other):
            return isinstance(other, Node) and other.name == self.name

    def build():
        a, b = Node("a"), Node("b")
        group = frozenset((a, b))
        a.group = b.group = group
        return a

    def check(a):
        assert len(a.group) == 2 and a in a.group
        b = next(node for node in a.group if node.name == "b")
        assert b.group is a.group


@case
def self_containing_collections():
    class Cycle:
        def __init__(self):
            self.items = [1]
            self.items.append(self.items)
            self.map = {"me": self}
            self.pair = ([],)
            self.pair[0].append(self.pair)

    def build():
        return Cycle()

    def check(cycle):
        assert cycle.items[1] is cycle.items
        assert cycle.map["me"] is cycle
        assert cycle.pair[0][0] is cycle.pair


@case
def collection_abstract_base_classes():
    from collections.abc import MutableMapping, Sequence, Set

    class Folded(MutableMapping):
        def __init__(self):
            self.data = {}

        def __getitem__(self, key):
            return self.data[key.lower()]

        def __setitem__(self, key, value):
            self.data[key.lower()] = value

        def __delitem__(self, key):
            del self.data[key.lower()]

        def __iter__(self):
            return iter(self.data)

        def __len__(self):
            return len(self.data)

    class Squares(Sequence):
        def __init__(self, size):
            self.size = size

        def __len__(self):
            return self.size

        def __getitem__(self, index):
            if not 0 <= index < self.size:
                raise IndexError(index)
            return index * index

    class Bits(Set):
        def __init__(self, items):
            self.bits = sum(1 << item for item in set(items))

        def __contains__(self, item):
            return bool(self.bits >> item & 1)

        def __iter__(self):
            return (n for n in range(self.bits.bit_length()) if n in self)

        def __len__(self):
            return self.bits.bit_count()

    def build():
        folded = Folded()
        folded["A"] = 1
        return [folded, Squares(4), Bits({1, 3})]

    def check(found):
        folded, squares, bits = found
        folded["B"] = 2
        assert folded.pop("a") == 1 and isinstance(folded, MutableMapping)
        assert 9 in squares and squares.index(4) == 2
        assert set(bits | {5}) == {1, 3, 5} and bits <= {1, 2, 3}


@case
def sorted_lists_by_bisect():
    import bisect

    class Table:
        def __init__(self, key):
            self.key, self.rows = key, []

        def add(self, row):
            bisect.insort(self.rows, row, key=self.key)

    def build():
        table = Table(lambda row: -row[0])
        for n in (3, 1, 2):
            table.add((n,))
        return table

    def check(table):
        table.add((2.5,))
        assert [row[0] for row in table.rows] == [3, 2.5, 2, 1]


@case
def views_of_dicts():
    from collections import OrderedDict

    class Watch:
        def __init__(self):
            self.data = {"a": 1}
            self.keys, self.values, self.items = (
                self.data.keys(), self.data.values(), self.data.items(),
            )  # fmt: skip
            self.ordered = OrderedDict(x=1)
            self.ordered_keys = self.ordered.keys()

    def build():
        watch = Watch()
        watch.data["b"] = 2
        return watch

    def check(watch):
        watch.data["c"] = 3
        watch.ordered["y"] = 2
        assert list(watch.keys) == ["a", "b", "c"] and list(watch.values) == [1, 2, 3]
        assert ("c", 3) in watch.items and list(watch.ordered_keys) == ["x", "y"]
        assert watch.keys & {"a", "z"} == {"a"}


@case
def linked_list_of_a_few_thousand():
    class Node:
        def __init__(self, value, next):
            self.value, self.next = value, next

    class Chain:
        def __init__(self):
            self.head = None

        def push(self, value):
            self.head = Node(value, self.head)

    def build():
        chain = Chain()
        for n in range(3000):
            chain.push(n)
        return chain

    def check(chain):
        total, node = 0, chain.head
        while node is not None:
            total, node = total + node.value, node.next
        assert total == 3000 * 2999 // 2


@case
def doubly_linked_ring():
    class Node:
        __slots__ = ("next", "previous", "value")

        def __init__(self, value):
            self.value, self.next, self.previous = value, self, self

        def insert(self, value):
            node = Node(value)
            node.previous, node.next = self, self.next
            self.next.previous = node
            self.next = node

    def build():
        ring = Node(0)
        for n in range(300):
            ring.insert(n)
        return ring

    def check(ring):
        node, count = ring.next, 1
        while node is not ring:
            assert node.previous.next is node
            node, count = node.next, count + 1
        assert count == 301


@case
def one_string_and_one_list_in_many_places():
    class Shares:
        def __init__(self):
            self.log = []
            self.by_name = {"a": self.log, "b": self.log}
            self.key = "".join(["k", "ey"])
            self.keys = [self.key, self.key]

    def build():
        return Shares()

    def check(shares):
        shares.by_name["a"].append(1)
        assert shares.by_name["b"] is shares.log and shares.log == [1]
        assert shares.keys[0] is shares.keys[1] is shares.key


@case
def sorted_collections_by_a_key_function():
    class Ranking:
        def __init__(self, key):
            self.key = key
            self.items = []

        def add(self, item):
            self.items.append(item)
            self.items.sort(key=self.key)

    def build():
        import functools

        ranking = Ranking(functools.cmp_to_key(lambda a, b: (b > a) - (b < a)))
        ranking.add(1)
        ranking.add(3)
        return ranking

    def check(ranking):
        ranking.add(2)
        assert ranking.items == [3, 2, 1]


@case
def weak_containers_with_attributes():
    import weakref

    class Thing:
        pass

    class Cache(weakref.WeakValueDictionary):
        def __init__(self, limit):
            super().__init__()
            self.limit, self.hits = limit, 0

        def __getitem__(self, k):
            self.hits += 1
            return super().__getitem__(k)

    class Names(weakref.WeakKeyDictionary):
        label = "x"

        def __init__(self, label="d"):
            super().__init__()
            self.label = label

    class Members(weakref.WeakSet):
        def __init__(self, owner):
            super().__init__()
            self.owner = owner

    def build():
        o = Thing()
        c = Cache(5)
        c["o"] = o
        c["o"]
        n = Names("mine")
        n[o] = 1
        m = Members("me")
        m.add(o)
        return [o, c, n, m]

    def check(s):
        o, c, n, m = s
        assert c.limit == 5 and c.hits >= 1 and c["o"] is o
        assert n.label == "mine" and n[o] == 1 and m.owner == "me" and o in m


@case
def defaultdicts_that_call_their_owner():
    import collections

    class S:
        def __init__(self):
            self.made = 0
            self.d = collections.defaultdict(self.make)
            self.nested = collections.defaultdict(lambda: collections.defaultdict(int))
            self.d["a"]
            self.nested["x"]["y"] += 1

        def make(self):
            self.made += 1
            return self.made

    def build():
        return S()

    def check(s):
        assert (
            s.d["a"] == 1
            and s.d["b"] == s.made
            and s.nested["q"]["z"] == 0
            and s.nested["x"]["y"] == 1
        )
        del s.d["b"]


@case
def graph_by_identity():
    class Node:
        def __init__(self, n):
            self.n = n
            self.edges = set()

    def build():
        a, b = Node(1), Node(2)
        a.edges |= {a, b}
        b.edges.add(a)
        return {"graph": {a: b, b: a}, "order": [a, b], "frozen": frozenset([a, b])}

    def check(d):
        a, b = d["order"]
        assert d["graph"][a] is b and d["graph"][b] is a and a in a.edges and b in a.edges
        assert d["frozen"] == {a, b}


@case
def one_object_in_everything_that_it_holds():
    import collections
    import types

    class N:
        pass

    def build():
        n = N()
        n.t = (n, [n])
        n.d = collections.OrderedDict(me=n)
        n.dd = collections.defaultdict(list, {1: [n]})
        n.dq = collections.deque([n])
        n.s = {n}
        n.ns = types.SimpleNamespace(n=n)
        n.f = lambda: n
        n.m = n.__init__
        n.own = []
        n.own.append((n.own,))
        return n

    def check(n):
        assert n.t[0] is n and n.t[1][0] is n and n.d["me"] is n and n.dd[1][0] is n
        assert n.dq[0] is n and n in n.s and n.ns.n is n and n.f() is n and n.m.__self__ is n
        assert n.own[0][0] is n.own
