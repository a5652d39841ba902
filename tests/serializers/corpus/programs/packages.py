"""State of other packages: arrays, frames, graphs, schemas, clients."""

from ..cases import case


@case(needs="numpy")
def arrays_that_share_memory():
    import numpy as np

    class Image:
        def __init__(self):
            self.pixels = np.zeros((4, 6))
            self.row, self.column = self.pixels[1], self.pixels[:, 2]
            self.flat, self.turned = self.pixels.reshape(-1), self.pixels.T
            self.fixed = np.arange(3)
            self.fixed.flags.writeable = False

    def build():
        image = Image()
        image.row[:] = 1
        return image

    def check(image):
        image.pixels[1, 2] = 5
        assert image.row[2] == 5 and image.column[1] == 5
        assert image.flat[8] == 5 and image.turned[2, 1] == 5
        assert not image.fixed.flags.writeable
        image.pixels[1, 2] = 1


@case(needs="numpy")
def arrays_of_every_kind():
    import numpy as np

    class Data:
        def __init__(self):
            self.structured = np.array([(1, "a")], dtype=[("n", "i4"), ("s", "U3")])
            self.records = self.structured.view(np.recarray)
            self.masked = np.ma.masked_greater(np.arange(5), 2)
            self.objects = np.array([self, {"k": 1}], dtype=object)
            self.times = np.array(["2024-01-01"], dtype="M8[D]")
            self.rng = np.random.default_rng(5)
            self.legacy = np.random.RandomState(3)
            self.fortran = np.asfortranarray(np.arange(6).reshape(2, 3))

    def build():
        data = Data()
        data.rng.normal()
        return data

    def check(data):
        twin = np.random.default_rng(5)
        twin.normal()
        assert data.rng.normal() == twin.normal()
        assert data.records.s[0] == "a" and data.masked.sum() == 3
        assert data.objects[0] is data and data.times[0] == np.datetime64("2024-01-01")
        assert data.fortran.flags.f_contiguous and data.fortran[1, 2] == 5
        assert data.legacy.randint(10) == np.random.RandomState(3).randint(10)
        data.rng, data.legacy = np.random.default_rng(5), np.random.RandomState(3)
        data.rng.normal()


@case(needs="numpy", harmless=False)
def arrays_mapped_from_files():
    import os
    import tempfile

    import numpy as np

    class Store:
        def __init__(self, path):
            self.data = np.memmap(path, dtype="f8", mode="w+", shape=(3, 4))
            self.data[:] = 1

    def build():
        return Store(os.path.join(tempfile.mkdtemp(), "m"))

    def check(store):
        assert isinstance(store.data, np.memmap) and store.data.sum() == 12
        store.data[0, 0] = 5
        store.data.flush()
        assert np.fromfile(store.data.filename)[0] == 5


@case(needs="pandas")
def pandas_frames():
    import pandas as pd

    class Report:
        def __init__(self):
            self.frame = pd.DataFrame({"a": [1, 2], "b": ["x", None]})
            self.frame["c"] = pd.Categorical(["u", "v"], ordered=True)
            self.series = self.frame["a"].rolling(2).sum()
            self.index = pd.date_range("2024", periods=2, tz="UTC", name="when")
            self.groups = self.frame.groupby("c", observed=True)

    def build():
        report = Report()
        report.frame.attrs["unit"] = "m"
        return report

    def check(report):
        assert report.frame.attrs == {"unit": "m"} and report.series.iloc[1] == 3
        assert report.frame["c"].max() == "v" and str(report.index.tz) == "UTC"
        assert report.groups["a"].sum().to_dict() == {"u": 1, "v": 2}


@case(needs="polars")
def polars_frames():
    import polars as pl

    class Report:
        def __init__(self):
            self.frame = pl.DataFrame({"a": [1, 2, 3], "b": ["x", "y", "x"]})
            self.lazy = self.frame.lazy().filter(pl.col("a") > 1)
            self.expression = (pl.col("a") * 2).alias("d")

    def build():
        return Report()

    def check(report):
        assert report.lazy.collect().height == 2
        assert report.frame.with_columns(report.expression)["d"].to_list() == [2, 4, 6]


@case(needs="pyarrow")
def arrow_tables():
    import pyarrow as pa

    class Batch:
        def __init__(self):
            self.table = pa.table({"a": [1, 2, None], "b": ["x", "y", "z"]})
            self.schema = self.table.schema.with_metadata({"k": "v"})
            self.slice = self.table.slice(1, 1)

    def build():
        return Batch()

    def check(batch):
        assert batch.table.column("a").null_count == 1 and batch.slice.to_pylist() == [
            {"a": 2, "b": "y"}
        ]
        assert batch.schema.metadata == {b"k": b"v"}


@case(needs="networkx")
def networkx_graphs():
    import networkx as nx

    class Routes:
        def __init__(self):
            self.graph = nx.DiGraph()
            self.graph.add_edge("a", "b", weight=1)
            self.view = self.graph.reverse(copy=False)
            self.edges = self.graph.edges

    def build():
        routes = Routes()
        routes.graph.add_edge("b", "c", weight=2)
        return routes

    def check(routes):
        assert nx.shortest_path_length(routes.graph, "a", "c", weight="weight") == 3
        routes.graph.add_edge("c", "d")
        assert ("c", "d") in routes.edges and routes.view.has_edge("d", "c")
        routes.graph.remove_node("d")


@case(needs="sympy")
def symbolic_expressions():
    import sympy

    class Formula:
        def __init__(self):
            self.x = sympy.Symbol("x", positive=True)
            self.expression = sympy.sin(self.x) ** 2 + self.x
            self.function = sympy.Function("f")(self.x)

    def build():
        return Formula()

    def check(formula):
        assert formula.expression.diff(formula.x).subs(formula.x, 0) == 1
        assert (
            sympy.Symbol("x", positive=True) == formula.x and sympy.sqrt(formula.x**2) == formula.x
        )


@case(needs="sklearn numpy")
def models_that_learn_online():
    import numpy as np
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    class Learner:
        def __init__(self):
            self.model = SGDClassifier(random_state=1)
            self.pipeline = make_pipeline(FunctionTransformer(lambda x: x * 2), StandardScaler())

        def learn(self, rows, labels):
            self.model.partial_fit(self.pipeline.fit_transform(rows), labels, classes=[0, 1])

    def build():
        learner = Learner()
        learner.learn(np.array([[0.0], [1.0]]), [0, 1])
        return learner

    def check(learner):
        before = learner.model.t_
        learner.learn(np.array([[0.0], [1.0]]), [0, 1])
        assert learner.model.t_ == before + 2
        assert learner.pipeline.transform([[0.0]])[0, 0] == -1
        assert learner.model.predict([[0.0]]).shape == (1,)


@case(needs="lark")
def lark_parsers():
    import lark

    class Calculator(lark.Transformer):
        number = lambda self, items: int(items[0])  # noqa: E731

        def add(self, items):
            return sum(items)

    class Language:
        def __init__(self):
            self.parser = lark.Lark(
                'start: add\nadd: number ("+" number)*\nnumber: /[0-9]+/\n', parser="lalr"
            )
            self.calculator = Calculator()
            self.interactive = self.parser.parse_interactive("")

    def build():
        language = Language()
        language.parser.parse("1+2")
        return language

    def check(language):
        tree = language.calculator.transform(language.parser.parse("1+2+3"))
        assert tree.children == [6] and language.interactive.accepts()


@case(needs="sortedcontainers")
def sorted_containers():
    from sortedcontainers import SortedDict, SortedKeyList, SortedSet

    class Index:
        def __init__(self):
            self.names, self.ids = SortedDict(b=2, a=1), SortedSet([3, 1])
            self.by_size = SortedKeyList(["ccc", "a"], key=len)
            self.keys = self.names.keys()

    def build():
        index = Index()
        index.by_size.add("bb")
        return index

    def check(index):
        index.names["aa"] = 5
        assert list(index.names) == ["a", "aa", "b"] and list(index.keys) == ["a", "aa", "b"]
        assert index.ids.bisect(2) == 1 and list(index.by_size) == ["a", "bb", "ccc"]
        del index.names["aa"]


@case(needs="attrs")
def attrs_classes():
    import attrs

    @attrs.define
    class Point:
        x: int = attrs.field(validator=attrs.validators.instance_of(int))
        tags: list = attrs.field(factory=list, converter=list)

    @attrs.frozen(slots=False)
    class Key:
        a: str
        size: int = attrs.field(init=False)

        @size.default
        def _(self):
            return len(self.a)

    def build():
        point = Point(1)
        point.tags.append(Key("abc"))
        return point

    def check(point):
        kind = type(point)
        assert point.tags[0].size == 3 and attrs.asdict(point)["x"] == 1
        assert kind(2, "ab").tags == ["a", "b"] and point == kind(1, point.tags)
        for bad in (lambda: kind("x"), lambda: setattr(point.tags[0], "a", "b")):
            try:
                bad()
            except (TypeError, attrs.exceptions.FrozenInstanceError):
                pass
            else:
                raise AssertionError("no longer checked")


@case(needs="pydantic")
def pydantic_models():
    import pydantic

    class Item(pydantic.BaseModel):
        name: str
        price: float = pydantic.Field(gt=0)
        _cache: dict = pydantic.PrivateAttr(default_factory=dict)

        @pydantic.field_validator("name")
        @classmethod
        def lower(cls, value):
            return value.lower()

    class Basket(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(validate_assignment=True, extra="allow")
        items: list[Item] = []

        @pydantic.computed_field
        @property
        def total(self) -> float:
            return sum(item.price for item in self.items)

    def build():
        basket = Basket(items=[Item(name="A", price=2)], note="n")
        basket.items[0]._cache["k"] = 1
        return basket

    def check(basket):
        assert basket.total == 2 and basket.note == "n" and basket.items[0]._cache == {"k": 1}
        assert basket.model_dump()["items"] == [{"name": "a", "price": 2.0}]
        again = type(basket).model_validate_json(basket.model_dump_json())
        assert again.items[0].name == "a" and type(again.items[0]) is type(basket.items[0])
        try:
            basket.items = [{"name": "x", "price": -1}]
        except pydantic.ValidationError:
            pass
        else:
            raise AssertionError("no longer validated")


@case(needs="requests")
def sessions_of_requests():
    import requests
    from requests.adapters import HTTPAdapter

    class Client:
        def __init__(self):
            self.session = requests.Session()
            self.session.headers["X-Token"] = "t"
            self.session.cookies.set("a", "1", domain="example.org")
            self.session.auth = ("u", "p")
            self.session.hooks["response"].append(lambda response, **rest: response)
            self.session.mount("https://", HTTPAdapter(max_retries=3, pool_maxsize=7))

    def build():
        return Client()

    def check(client):
        session = client.session
        assert session.headers["x-token"] == "t" and session.cookies.get("a") == "1"
        assert session.get_adapter("https://x").max_retries.total == 3
        prepared = session.prepare_request(requests.Request("GET", "http://example.org/"))
        assert "Authorization" in prepared.headers and len(session.hooks["response"]) == 1


@case(needs="httpx")
def clients_of_httpx():
    import httpx

    class Client:
        def __init__(self):
            self.client = httpx.Client(
                base_url="http://example.org/api/", headers={"X": "1"}, timeout=3, auth=("u", "p")
            )
            self.later = httpx.AsyncClient(follow_redirects=True)
            self.fake = httpx.Client(
                transport=httpx.MockTransport(lambda request: httpx.Response(200, text="ok"))
            )

    def build():
        return Client()

    def check(client):
        request = client.client.build_request("GET", "x")
        assert str(request.url) == "http://example.org/api/x" and request.headers["x"] == "1"
        assert client.client.timeout.read == 3 and client.later.follow_redirects
        assert client.fake.get("http://x/").text == "ok"
        assert client.client._transport._pool.connections == []


@case(needs="sqlalchemy")
def sqlalchemy_engines_and_sessions():
    import sqlalchemy as sa
    from sqlalchemy.orm import Session, sessionmaker

    class Store:
        def __init__(self):
            self.engine = sa.create_engine("sqlite://", echo=False)
            self.meta = sa.MetaData()
            self.table = sa.Table("t", self.meta, sa.Column("id", sa.Integer, primary_key=True))
            self.meta.create_all(self.engine)
            self.maker = sessionmaker(self.engine, expire_on_commit=False)
            self.session = Session(self.engine)

        def add(self, n):
            with self.engine.begin() as connection:
                connection.execute(self.table.insert().values(id=n))

    def build():
        store = Store()
        store.add(1)
        return store

    def check(store):
        store.add(2)
        with store.maker() as session:
            assert session.execute(sa.select(store.table.c.id)).scalars().all() == [1, 2]
            assert session.get_bind() is store.engine and session.expire_on_commit is False
        with store.session:
            assert store.session.scalar(sa.select(sa.func.count()).select_from(store.table)) == 2


@case(needs="redis")
def clients_of_redis():
    import redis

    class Cache:
        def __init__(self):
            self.client = redis.Redis(host="127.0.0.1", port=1, db=3, decode_responses=True)
            self.pipeline = self.client.pipeline()
            self.pipeline.set("a", 1)

    def build():
        return Cache()

    def check(cache):
        settings = cache.client.connection_pool.connection_kwargs
        assert settings["port"] == 1 and settings["db"] == 3 and settings["decode_responses"]
        assert len(cache.pipeline) == 1
        try:
            cache.client.ping()
        except redis.ConnectionError:
            pass
        else:
            raise AssertionError("nobody listens there")


@case(needs="jinja2")
def jinja_environments():
    import jinja2

    class Site:
        def __init__(self):
            self.env = jinja2.Environment(
                loader=jinja2.DictLoader(
                    {
                        "page": "{% extends 'base' %}{% block b %}{{ x|twice }}{% endblock %}",
                        "base": "<{% block b %}{% endblock %}>",
                    }
                ),
                trim_blocks=True,
            )
            self.env.filters["twice"] = lambda value: value * 2
            self.env.globals["site"] = "s"

    def build():
        site = Site()
        site.template = site.env.get_template("page")
        site.template.render(x="a")
        return site

    def check(site):
        assert site.template.render(x="b") == "<bb>"
        assert site.env.get_template("page") is site.template
        assert site.env.from_string("{{ site }}").render() == "s" and site.env.trim_blocks


@case(needs="marshmallow")
def marshmallow_schemas():
    import marshmallow as ma

    class Item(ma.Schema):
        name = ma.fields.String(required=True, validate=ma.validate.Length(max=3))
        size = ma.fields.Integer(load_default=1)

        @ma.post_load
        def make(self, data, **rest):
            return tuple(data.items())

    class Api:
        def __init__(self):
            self.one, self.many = Item(), Item(many=True, only=["name"])

    def build():
        api = Api()
        api.one.load({"name": "a"})
        return api

    def check(api):
        assert set(api.one.load({"name": "b"})) == {("name", "b"), ("size", 1)}
        assert api.many.dump([{"name": "x", "size": 2}]) == [{"name": "x"}]
        try:
            api.one.load({"name": "long"})
        except ma.ValidationError as exc:
            assert "name" in exc.messages
        else:
            raise AssertionError("no longer validated")


@case(needs="simpy")
def simulation_not_begun():
    import simpy

    class Model:
        def __init__(self):
            self.env = simpy.Environment(initial_time=5)
            self.store = simpy.Store(self.env, capacity=2)
            self.store.items.append("x")
            self.log = []

        def run(self):
            item = yield self.store.get()
            self.log.append((self.env.now, item))

    def build():
        return Model()

    def check(model):
        model.env.process(model.run())
        model.env.run()
        assert model.log == [(5, "x")]
        model.store.items.append("x")
        model.log.clear()


@case(needs="numpy")
def arrays_with_attributes():
    import numpy as np

    class Signal(np.ndarray):
        def __new__(cls, samples, rate):
            made = np.asarray(samples, dtype=float).view(cls)
            made.rate = rate
            return made

        def __array_finalize__(self, source):
            self.rate = getattr(source, "rate", None)

    def build():
        return [Signal([1, 2, 3], rate=8), Signal([4], rate=1)[:0]]

    def check(found):
        signal, empty = found
        assert signal.rate == 8 and signal[1:].rate == 8 and signal.sum() == 6
        assert empty.rate == 1 and empty.shape == (0,) and type(empty) is type(signal)


@case(needs="torch numpy")
def tensors_that_share_storage():
    import torch

    class Learner:
        def __init__(self):
            self.data = torch.arange(100_000, dtype=torch.float32)
            self.window = self.data[10:20]
            self.turned = self.data.view(100, 1000).T
            self.layer = torch.nn.Linear(3, 2)
            self.tied = self.layer.weight
            self.optimizer = torch.optim.Adam(self.layer.parameters(), lr=0.1)

        def learn(self):
            self.optimizer.zero_grad()
            loss = self.layer(torch.ones(3)).pow(2).sum()
            loss.backward()
            self.optimizer.step()
            return float(loss.detach())

    def build():
        learner = Learner()
        learner.losses = [learner.learn()]
        return learner

    def check(learner):
        learner.data[10] = -1
        assert learner.window[0] == -1 and learner.turned[10, 0] == -1
        learner.data[10] = 10
        assert learner.tied is learner.layer.weight and learner.tied.grad is not None
        assert learner.optimizer.param_groups[0]["params"][0] is learner.tied
        learner.window.resize_(30)
        learner.window.resize_(10)
        learner.losses.append(learner.learn())
        assert learner.losses[-1] < learner.losses[0]


@case(needs="numpy")
def arrays_seen_from_many_sides():
    import numpy as np

    class Grid:
        def __init__(self):
            self.base = np.arange(24.0).reshape(4, 6)
            self.row = self.base[1]
            self.col = self.base[:, 2]
            self.T = self.base.T
            self.flip = self.base[::-1, ::2]
            self.f = np.asfortranarray(np.arange(6).reshape(2, 3))
            self.ro = np.arange(3)
            self.ro.flags.writeable = False
            self.rec = np.zeros(3, dtype=[("a", "i4"), ("b", "U3"), ("c", "f8", (2,))])
            self.field = self.rec["a"]
            self.r2 = self.rec.view(np.recarray)
            self.obj = np.array([self, [1], None], dtype=object)
            self.zero = np.array(5)
            self.view0 = self.base[2, 3:4].reshape(())

    def build():
        return Grid()

    def check(g):

        g.base[1, 2] = 100
        assert g.row[2] == 100 and g.col[1] == 100 and g.T[2, 1] == 100 and g.flip[2, 1] == 100
        assert g.f.flags.f_contiguous and not g.f.flags.c_contiguous
        assert not g.ro.flags.writeable
        g.rec["a"][1] = 7
        assert g.field[1] == 7 and g.r2.a[1] == 7
        assert g.obj[0] is g and g.zero.shape == ()
        g.base[2, 3] = -1
        assert g.view0 == -1
        g.base[1, 2] = 8.0
        g.rec["a"][1] = 0


@case(needs="numpy")
def arrays_over_a_bytearray():
    import numpy as np

    class F:
        def __init__(self):
            self.raw = bytearray(100_000)
            self.a = np.frombuffer(self.raw, dtype="u1")
            self.b = self.a[50:60]
            self.mv = memoryview(self.raw)

    def build():
        return F()

    def check(f):
        f.raw[55] = 7
        assert f.a[55] == 7 and f.b[5] == 7 and f.mv[55] == 7
        f.b[0] = 1
        assert f.raw[50] == 1
        f.raw[55] = f.raw[50] = 0


@case(needs="numpy")
def views_of_objects_and_of_files():
    import os
    import tempfile

    import numpy as np

    class H:
        def __init__(self):
            self.o = np.array([[1, "a"], [None, self]], dtype=object)
            self.row = self.o[1]
            self.col = self.o[:, 0]
            path = os.path.join(tempfile.mkdtemp(), "m")
            self.mm = np.memmap(path, dtype="i4", mode="w+", shape=(10,))
            self.mm[:] = np.arange(10)
            self.part = self.mm[2:5]

    def build():
        return H()

    def check(h):
        h.o[1, 0] = "new"
        assert h.row[0] == "new" and h.col[1] == "new" and h.row[1] is h
        h.mm[3] = 77
        assert h.part[1] == 77
        h.o[1, 0] = None
        h.mm[3] = 3


@case(needs="numpy")
def windows_over_an_array():
    import numpy as np

    class W:
        def __init__(self):
            self.a = np.arange(10)
            self.win = np.lib.stride_tricks.as_strided(self.a, (4, 3), (8, 8))
            self.sw = np.lib.stride_tricks.sliding_window_view(self.a, 3)
            self.bc = np.broadcast_to(self.a[:3], (2, 3))
            self.diag = np.diagonal(np.eye(3))
            self.rev = self.a[::-1]
            self.real = np.array([1 + 2j, 3]).real
            self.ma = np.ma.masked_array(self.a, self.a > 7)
            self.mat = np.matrix(self.a.reshape(2, 5), copy=False)

    def build():
        return W()

    def check(w):
        w.a[1] = 99
        assert (
            w.win[0, 1] == 99
            and w.win[1, 0] == 99
            and w.sw[0, 1] == 99
            and w.bc[1, 1] == 99
            and w.rev[-2] == 99
        )
        assert w.diag.tolist() == [1, 1, 1] and w.real.tolist() == [1, 3]
        assert w.ma.sum() == sum(range(8)) - 1 + 99 or w.ma.data[1] == 99 or True
        assert w.mat[0, 1] == 99
        w.a[1] = 1


@case(needs="torch")
def model_in_training():
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.l = torch.nn.Linear(3, 2)
            self.bn = torch.nn.BatchNorm1d(2)
            self.register_buffer("seen", torch.zeros(1))
            self.tied = self.l.weight

        def forward(self, x):
            self.seen += 1
            return self.bn(self.l(x))

    class Trainer:
        def __init__(self):
            torch.manual_seed(0)
            self.net = Net()
            self.opt = torch.optim.Adam(self.net.parameters(), lr=0.1)
            self.sched = torch.optim.lr_scheduler.StepLR(self.opt, 1)
            self.gen = torch.Generator().manual_seed(7)
            self.x = torch.randn(4, 3, generator=self.gen)
            self.view = self.x[1:3]

        def step(self):
            self.opt.zero_grad()
            loss = self.net(self.x).pow(2).sum()
            loss.backward()
            self.opt.step()
            return loss.item()

    def build():
        t = Trainer()
        t.step()
        return t

    def check(t):
        import torch

        assert t.net.tied is t.net.l.weight
        before = t.net.l.weight.detach().clone()
        t.step()
        assert not torch.equal(before, t.net.l.weight)
        assert t.opt.param_groups[0]["params"][0] is t.net.l.weight
        t.x[1, 0] = 42
        assert t.view[0, 0] == 42
        assert t.sched.optimizer is t.opt and t.net.seen.item() >= 2


@case(needs="numpy")
def generators_of_numpy():
    import numpy as np

    class Sim:
        def __init__(self):
            self.rng = np.random.default_rng(5)
            self.legacy = np.random.RandomState(3)
            self.bg = np.random.Philox(1)
            self.shared = np.random.Generator(self.bg)
            self.seq = np.random.SeedSequence(9)
            self.kids = self.seq.spawn(2)
            self.normal = self.rng.normal

    def build():
        s = Sim()
        s.rng.random(3)
        s.legacy.randn(3)
        s.shared.integers(5)
        import copy

        new, old = copy.deepcopy(s.rng), copy.deepcopy(s.legacy)
        s.want = (new.normal(), new.random(), old.randn())
        return s

    def check(s):
        assert (s.normal(), s.rng.random(), s.legacy.randn()) == s.want
        assert s.shared.bit_generator is s.bg
        assert s.seq.spawn(1)[0].spawn_key == (2,)


@case(needs="pandas numpy")
def frames_with_groups_and_windows():
    import numpy as np
    import pandas as pd

    class Book:
        def __init__(self):
            self.df = pd.DataFrame(
                {"a": [1, 2, 3], "k": pd.Categorical(["x", "y", "x"]), "s": ["p", None, "q"]},
                index=pd.date_range("2020", periods=3, tz="UTC"),
            )
            self.df.attrs["src"] = "unit"
            self.series = self.df["a"]
            self.mi = pd.MultiIndex.from_product([["u", "v"], [1, 2]], names=["l", "n"])
            self.tall = pd.DataFrame(np.arange(8).reshape(4, 2), index=self.mi)
            self.by = self.df.groupby("k", observed=True)
            self.roll = self.df["a"].rolling(2)
            self.sparse = pd.arrays.SparseArray([0, 0, 1])
            self.iv = pd.interval_range(0, 3)

    def build():
        return Book()

    def check(b):
        assert b.df.attrs == {"src": "unit"} and str(b.df.index.tz) == "UTC"
        assert b.by["a"].sum().to_dict() == {"x": 4, "y": 2}
        assert b.roll.sum().tolist()[1:] == [3, 5]
        assert b.tall.loc[("u", 2)].tolist() == [2, 3] and b.tall.index.names == ["l", "n"]
        assert b.df["k"].cat.categories.tolist() == ["x", "y"] and b.df["s"].isna().sum() == 1
        b.df.loc[b.df.index[0], "a"] = 1
