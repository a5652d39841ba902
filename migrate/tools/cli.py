"""The command line `migrate`: what can be done with a cluster, from a shell.

Each verb is a thin layer over a verb of `Client`; what is specific to a shell (finding the
cluster, reading arguments, printing) is here and in the modules beside this one. Imports that
take long are made by the verbs that need them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import json
import logging
import os
import pathlib
import re
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, ParamSpec, TypeVar

import click

from migrate import __version__
from migrate.errors import MigrateError, ServerNotFound, UsageError
from migrate.options import LEAST_LOADED, STANDBYS_MAX, NodeOptions, SpawnOptions
from migrate.tools import loops, output

if TYPE_CHECKING:
    from migrate.client import Client
    from migrate.tools.clusters import Place

P = ParamSpec("P")
T = TypeVar("T")

NEGATIVE_NUMBER: Final = re.compile(r"-\.?\d")
LOG_LEVELS: Final = ["debug", "info", "warning", "error"]


# ------------------------------------------------------------------ click


class Verbs(click.Group):
    """A group that suggests what may have been meant, and lists verbs in the order written."""

    def list_commands(self, context: click.Context) -> list[str]:
        """The verbs, in the order in which they are defined."""
        return list(self.commands)

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but with a suggestion for a verb that does not exist."""
        name = args[0]
        if self.get_command(context, name) is None and not name.startswith("-"):
            close = difflib.get_close_matches(name, self.commands, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(close)}?" if close else "; see `migrate --help`"
            raise click.UsageError(f"there is no verb {name!r}{hint}", context)
        return super().resolve_command(context, args)


class TakesNumbers(click.Command):
    """A command whose arguments may be negative numbers, as in `migrate call hits incr -3`."""

    _MARK = "\0"

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """As click's, but what looks like a negative number is no option."""
        marked = [self._MARK + a if NEGATIVE_NUMBER.match(a) else a for a in args]
        return super().parse_args(context, marked)

    @classmethod
    def plain(cls, argument: str) -> str:
        """An argument as it was typed."""
        return argument.removeprefix(cls._MARK)


def _exit(code: int) -> NoReturn:
    sys.exit(code)


@contextlib.contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    """Turn what may happen to anybody into a message and an exit status."""
    try:
        yield
    except MigrateError as error:
        _exit(output.fail(error, as_json))
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        _exit(output.INTERRUPTED)


def _is_json(function: Callable[P, T]) -> Callable[P, T]:
    option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    return option(function)


def _of_cluster(function: Callable[P, T]) -> Callable[P, T]:
    """The options of every verb that talks to a cluster."""
    for option in (
        click.option(
            "--secret-file", metavar="FILE", help="The cluster secret; by default the user's."
        ),
        click.option(
            "--cluster",
            metavar="ADDRESS",
            help="host:port of one of its nodes, or the name it is up under; by default "
            "LIVEMIGRATE_CLUSTER, else the cluster that `migrate up` runs.",
        ),
        _is_json,
    ):
        function = option(function)
    return function


def _with_client(
    verb: Callable[[Client, Place], Awaitable[T]],
    cluster: str | None,
    secret_file: str | None,
) -> T:
    """Run a verb with a client of the cluster that is meant.

    Raises:
        MigrateError: It cannot be found or reached, or the verb failed.
    """
    from migrate.tools import clusters

    async def run() -> T:
        place = clusters.find(cluster)
        async with clusters.client_of(place, secret_file) as client:
            return await verb(client, place)

    return loops.run(run())


def _arguments(given: Sequence[str], named: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a call or constructor, from words: JSON where it is JSON, else strings.

    Raises:
        click.BadParameter: One of `named` is not NAME=VALUE.
    """
    keywords = {}
    for pair in named:
        name, separator, value = pair.partition("=")
        if not separator or not name.isidentifier():
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="--kw")
        keywords[name] = _json_or_text(value)
    return [_json_or_text(TakesNumbers.plain(word)) for word in given], keywords


def _json_or_text(word: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(word, parse_constant=refuse)
    except (ValueError, RecursionError):
        return word


async def _ref(client: Client, who: str) -> Any:
    """The ref of a server that is named, has this id, or the only id that begins so.

    Raises:
        ServerNotFound: There is none; the message suggests what may have been meant.
        UsageError: Several ids begin so.
    """
    try:
        return await client.whereis(who)
    except ServerNotFound:
        pass
    infos = await client.servers()
    found = [info for info in infos if info.id == who] or [
        info for info in infos if info.id.startswith(who)
    ]
    if len(found) == 1:
        return client._ref(await client._read(found[0].id))
    if found:
        listed = ", ".join(info.id for info in found[:5])
        raise UsageError(f"the ids of {len(found)} servers begin with {who!r}: {listed}")
    known = [info.name for info in infos if info.name] + [info.id for info in infos]
    close = difflib.get_close_matches(who, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`migrate ls` lists the servers"
    raise ServerNotFound(f"no server has the name or id {who!r}; {hint}", server=who)


# ------------------------------------------------------------------ the group


@click.group(
    cls=Verbs,
    epilog=output.EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="livemigrate")
def cli() -> None:
    """Stateful servers that move live between node processes.

    Begin with `migrate demo`, or with `migrate up` and, in another terminal, `migrate status`.
    A SERVER is given by its name, its id, or the beginning of its id.
    """


# ------------------------------------------------------------------ clusters


def _options(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> NodeOptions | None:
    if value is None:
        return None
    try:
        given: Any = json.loads(value)
        if not isinstance(given, dict):
            raise ValueError(f"a JSON object is needed, not {value!r}")
        return NodeOptions().replace(**given)
    except (ValueError, UsageError) as error:
        text = error.message if isinstance(error, UsageError) else str(error)
        raise click.BadParameter(text, context, parameter) from error


_tunables = click.option(
    "--options",
    callback=_options,
    metavar="JSON",
    help="Tunables of migrate.NodeOptions, as a JSON object.",
)
_allow = click.option(
    "--allow",
    multiple=True,
    envvar="LIVEMIGRATE_ALLOW",
    metavar="MODULE:CLASS",
    help="A class that the public gRPC API may spawn; repeatable.",
)
_log_level = click.option(
    "--log-level",
    default="warning",
    show_default=True,
    envvar="LIVEMIGRATE_LOG_LEVEL",
    type=click.Choice(LOG_LEVELS),
    help="What is logged to stderr.",
)


@cli.command()
@click.option("--nodes", type=click.IntRange(2, 64), help="Node processes; by default one a core.")
@click.option(
    "--shards",
    type=click.IntRange(1, 512),
    default=14,
    show_default=True,
    help="Parts of the index.",
)
@click.option(
    "--callers",
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    help="Concurrent callers.",
)
@click.option(
    "--files", type=click.IntRange(1), help="Index so many files, evenly chosen; by default all."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=25.0,
    show_default=True,
    help="Stop moving after this time, so that a slow machine gets done.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write what the servers counted, as JSON: files, skipped, names.",
)
@click.option(
    "--kill",
    is_flag=True,
    help="Give each server a hot standby, and kill node processes (SIGKILL) all the while.",
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
@_is_json
def demo(
    nodes: int | None,
    shards: int,
    callers: int,
    files: int | None,
    seconds: float,
    out: str | None,
    kill: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Index the standard library with servers that move all the time.

    Every .py file under this Python's standard library folder is tokenised with `tokenize`,
    but for folders named site-packages, dist-packages, test, tests, idle_test and
    __pycache__. Concurrent callers feed what is found to servers, which are moved between node
    processes again and again meanwhile. Then the index and the counts are compared with those of
    a plain single-process run, digest by digest. The exit status is 0 only if nothing failed,
    nothing was lost, repeated or reordered, and both are identical.

    With --kill there are three nodes at least, and one after the other is killed at a random moment
    and started again, while each server has a standby.
    """
    from migrate.tools import demo as program

    if out is not None:
        try:
            # Now, rather than when everything is done.
            open(out, "a").close()
        except OSError as error:
            raise click.BadParameter(
                f"it cannot be written: {error}", param_hint="--out"
            ) from error
    plan = program.Plan(
        nodes=nodes or max(3 if kill else 2, os.cpu_count() or 1),
        shards=shards,
        callers=callers,
        files_max=files,
        seconds=seconds,
        kill=kill,
    )
    with _errors(as_json):
        _exit(program.main(plan, out, as_json, quiet))


@cli.command()
@click.option("-n", "--nodes", type=click.IntRange(1, 64), help="How many; by default one a core.")
@click.option(
    "--name", default="default", show_default=True, help="The cluster's name, for --cluster."
)
@click.option(
    "--directory",
    metavar="URL",
    help="Who owns what: sqlite:///PATH. By default one that goes with the cluster.",
)
@click.option(
    "--data",
    metavar="FOLDER|URL",
    help="Keep durable servers, and who owns what, here; what is here comes back. With a URL "
    "(s3://BUCKET/FOLDER), who owns what is kept on this machine, or in --directory.",
)
@_tunables
@_allow
@click.option("--secret-file", metavar="FILE", help="The cluster secret; by default the user's.")
@_log_level
@_is_json
def up(
    nodes: int | None,
    name: str,
    directory: str | None,
    data: str | None,
    options: NodeOptions | None,
    allow: tuple[str, ...],
    secret_file: str | None,
    log_level: str,
    as_json: bool,
) -> None:
    """Run a cluster on this machine until Ctrl-C.

    The other verbs find it without arguments. A node that dies is reported and not started
    again. The exit status is 0 when it was stopped, 1 when every node died.
    """
    from migrate.tools import up as program
    from rpc import auth

    secret = os.path.abspath(secret_file or auth.default_secret_path())
    with _errors(as_json):
        loops.run(
            program.run(
                name=name,
                nodes=nodes or os.cpu_count() or 1,
                directory=directory,
                data=data,
                options=options,
                secret_file=secret,
                spawnable=allow,
                log_level=log_level,
                as_json=as_json,
            )
        )


@cli.command()
@click.option("--name", help="Its name, unique in the cluster; made up by default.")
@click.option(
    "--listen",
    default="127.0.0.1:0",
    show_default=True,
    metavar="HOST:PORT",
    help="Where links are accepted; port 0 takes a free one.",
)
@click.option(
    "--directory",
    metavar="URL",
    help="Who owns what: sqlite:///PATH, shared by the nodes of a host, or "
    "etcd://HOST:PORT,.../PREFIX, by those of many. By default one of its own.",
)
@click.option(
    "--advertise",
    metavar="HOST:PORT",
    help="Where others reach it, if that is not where it listens; port 0: the one it listens on.",
)
@click.option(
    "--data",
    metavar="FOLDER|URL",
    help="Where durable servers are kept; what is there comes back. A folder is for this node "
    "alone, a URL (s3://BUCKET/FOLDER) for all nodes of the cluster.",
)
@click.option(
    "--tls",
    metavar="FOLDER",
    help="Certificates as `migrate certs init` makes them; by default those beside the cluster "
    "secret when it listens beyond loopback.",
)
@_tunables
@click.option("--announce", is_flag=True, help="Print one line of JSON when up.")
@click.option("--with-parent", is_flag=True, help="End when stdin ends, as when the parent dies.")
@_allow
@click.option("--secret-file", metavar="FILE", help="The cluster secret; by default the user's.")
@click.option(
    "--token-file",
    metavar="FILE",
    help="The token that the public gRPC API asks for; by default beside the secret.",
)
@_log_level
def node(
    name: str | None,
    listen: str,
    directory: str | None,
    advertise: str | None,
    data: str | None,
    tls: str | None,
    options: NodeOptions | None,
    announce: bool,
    with_parent: bool,
    allow: tuple[str, ...],
    secret_file: str | None,
    token_file: str | None,
    log_level: str,
) -> None:
    """Run one node in this process until Ctrl-C or SIGTERM.

    Its servers are stopped in order then, and the exit status is 0; a second signal ends it at
    once, with 128 and the signal's number.
    """
    from migrate.tools.node_process import serve

    who = name or "node"
    logging.basicConfig(format=f"%(asctime)s {who} %(levelname)s %(name)s: %(message)s")
    for ours in ("migrate", "rpc", "serializers"):
        logging.getLogger(ours).setLevel(log_level.upper())
    _import_from_here()
    with _errors(as_json=False):
        loops.run(
            serve(
                name=name,
                listen=listen,
                directory=directory,
                options=options or NodeOptions(),
                secret_file=secret_file,
                spawnable=allow,
                token_file=token_file,
                tls=tls,
                advertise=advertise,
                data=data,
                announce=announce,
                with_parent=with_parent,
            )
        )


@cli.group()
def certs() -> None:
    """Certificates, for clusters of more than one machine."""


@certs.command("init")
@click.option(
    "--dir",
    "folder",
    metavar="FOLDER",
    help="Where they are kept; by default `tls` beside the cluster secret.",
)
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="Name or address of a host, for etcd and for clients in other languages; repeatable.",
)
@click.option("--days", type=click.IntRange(1, 3650), default=825, show_default=True)
@click.option("--renew", is_flag=True, help="Make those anew that are there; the authority stays.")
@_is_json
def certs_init(
    folder: str | None, hosts: tuple[str, ...], days: int, renew: bool, as_json: bool
) -> None:
    """Make an authority, a certificate for nodes and one for clients.

    What is there stays; nodes read certificates when they start. Copy the folder to every host,
    but for ca.key, which only makes further certificates: it is not needed by nodes. The cluster
    secret is made too if it is missing, since the hosts need a copy of it as well.
    """
    from migrate.tools import certs as program
    from rpc import auth
    from rpc.errors import RpcError
    from rpc.tls import default_tls_folder

    secret = auth.default_secret_path()
    with _errors(as_json):
        made = program.init(
            pathlib.Path(folder) if folder else default_tls_folder(secret), hosts, days, renew
        )
        try:
            auth.load_or_create_secret(secret)
        except RpcError as error:
            raise UsageError(str(error), cause=str(error)) from error
    if as_json:
        output.emit_json(made._asdict())
    elif made.files:
        click.echo(f"{', '.join(made.files)} made in {made.folder}; good until {made.until}")
    else:
        click.echo(f"{made.folder} is complete; --renew makes the certificates anew")


def _import_from_here() -> None:
    """Let classes be imported from the working directory, as `python -m migrate` does."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


@cli.command()
@click.option("-v", "--verbose", is_flag=True, help="Show also what each link costs.")
@_of_cluster
def status(verbose: bool, cluster: str | None, secret_file: str | None, as_json: bool) -> None:
    """Show the nodes of a cluster and how they are."""

    async def verb(client: Client, place: Place) -> tuple[str, list[Any], list[str]]:
        # Read first: a node that joins meanwhile is no silent one.
        listed = {row.name for row in await client._node_rows()}
        infos = await client.nodes()
        return place.name, infos, sorted(listed - {info.name for info in infos})

    with _errors(as_json):
        name, infos, silent = _with_client(verb, cluster, secret_file)
    servers = sum(info.servers for info in infos)
    if as_json:
        output.emit_json({"cluster": name, "servers": servers, "nodes": infos, "silent": silent})
        return
    rows = [
        (i.name, i.address, i.pid, i.host, i.servers, i.load, _node_state(i)) for i in infos
    ] + [(name, None, None, None, None, None, "silent") for name in silent]
    output.table(["NODE", "ADDRESS", "PID", "HOST", "SERVERS", "LOAD", "STATUS"], rows)
    if verbose:
        output.table(
            ["NODE", "PEER", "LINK", "ROUND TRIP", "RATE", "SENT", "RECEIVED"],
            [_link_row(info.name, link) for info in infos for link in info.links],
        )


def _link_row(node: str, link: Any) -> tuple[Any, ...]:
    trip = "" if link.rtt_s is None else f"{link.rtt_s * 1e6:,.0f} us"
    rate = "" if link.bytes_per_s is None else f"{link.bytes_per_s / 1e6:,.0f} MB/s"
    sent, received = f"{link.bytes_sent:,} B", f"{link.bytes_received:,} B"
    return node, link.peer, link.kind, trip, rate, sent, received


def _node_state(info: Any) -> str:
    if info.draining:
        return "draining" if info.servers else "drained"
    return "cordoned" if info.cordoned else "ready"


# ------------------------------------------------------------------ servers


@cli.command()
@click.option("--node", "on", metavar="NODE", help="Only those of this node.")
@_of_cluster
def ls(on: str | None, cluster: str | None, secret_file: str | None, as_json: bool) -> None:
    """List the servers."""

    async def verb(client: Client, place: Place) -> list[Any]:
        if on is not None:
            await client._node_named(on)
        return [info for info in await client.servers() if on is None or info.node == on]

    with _errors(as_json):
        infos = _with_client(verb, cluster, secret_file)
    if as_json:
        output.emit_json(infos)
        return
    rows = [(i.name, i.id, i.cls, i.node, i.epoch, i.mailbox) for i in infos]
    output.table(["NAME", "ID", "CLASS", "NODE", "EPOCH", "MAILBOX"], rows)


@cli.command()
@click.argument("server")
@_of_cluster
def info(server: str, cluster: str | None, secret_file: str | None, as_json: bool) -> None:
    """Tell what is known of a server."""

    async def verb(client: Client, place: Place) -> dict[str, Any]:
        ref = await _ref(client, server)
        told = dataclasses.asdict(await client.info(ref))
        return {**told, "methods": list(ref._info.methods)}

    with _errors(as_json):
        told = _with_client(verb, cluster, secret_file)
    if as_json:
        output.emit_json(told)
        return
    lists = {key: ", ".join(told[key]) for key in ("standbys", "methods")}
    lists["followers"] = ", ".join(
        f"{it['node']} {it['state']}" + (f", {it['lag']} behind" if it["lag"] else "")
        for it in told["followers"]
    )
    output.facts(list({**told, **lists}.items()))


@cli.command(cls=TakesNumbers)
@click.argument("server")
@click.argument("method")
@click.argument("arguments", nargs=-1, metavar="[ARGS]...")
@click.option(
    "--kw", "keywords", multiple=True, metavar="NAME=VALUE", help="A keyword argument; repeatable."
)
@click.option("--cast", is_flag=True, help="Send without waiting for a reply.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the reply.",
)
@_of_cluster
def call(
    server: str,
    method: str,
    arguments: tuple[str, ...],
    keywords: tuple[str, ...],
    cast: bool,
    timeout: float,
    cluster: str | None,
    secret_file: str | None,
    as_json: bool,
) -> None:
    """Call a method of a server and print the reply.

    ARGS are JSON where they are JSON, else strings: 3, '"3"', true, '[1, 2]', hello. The reply is
    printed as JSON, a string as it is. What the handler raises ends in exit status 5.
    """
    args, kwargs = _arguments(arguments, keywords)

    async def verb(client: Client, place: Place) -> Any:
        ref = await _ref(client, server)
        _check_method(ref, method)
        remote = getattr(ref, method).with_options(timeout=timeout)
        with _handlers_error():
            return await (remote.cast if cast else remote)(*args, **kwargs)

    with _errors(as_json):
        try:
            result = _with_client(verb, cluster, secret_file)
        except _Raised as raised:
            _exit(output.fail(raised.error, as_json))
    if as_json:
        output.emit_json({"server": server, "method": method, "cast": cast, "result": result})
    elif isinstance(result, str):
        click.echo(result)
    elif not cast:
        output.emit_json(result)


class _Raised(Exception):
    """Carries what a handler or constructor raised past the handlers of our own errors."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@contextlib.contextmanager
def _handlers_error() -> Iterator[None]:
    try:
        yield
    except MigrateError:
        raise
    except Exception as error:
        raise _Raised(error) from error


def _check_method(ref: Any, method: str) -> None:
    try:
        getattr(ref, method)
    except AttributeError as error:
        raise UsageError(str(error)) from error


@cli.command(cls=TakesNumbers)
@click.argument("cls", metavar="MODULE:CLASS")
@click.argument("arguments", nargs=-1, metavar="[ARGS]...")
@click.option(
    "--kw", "keywords", multiple=True, metavar="NAME=VALUE", help="A keyword argument; repeatable."
)
@click.option("--name", help="A name to find it by.")
@click.option("--on", metavar="NODE", help="The node; by default the least loaded one.")
@click.option("--near", metavar="SERVER", help="The node of another server.")
@click.option(
    "--standbys",
    type=click.IntRange(0, STANDBYS_MAX),
    default=0,
    metavar="N",
    help="So many hot standbys; see `migrate replicate`.",
)
@click.option("--durable", is_flag=True, help="Give it a journal (see `up --data`).")
@_of_cluster
def spawn(
    cls: str,
    arguments: tuple[str, ...],
    keywords: tuple[str, ...],
    name: str | None,
    on: str | None,
    near: str | None,
    standbys: int,
    durable: bool,
    cluster: str | None,
    secret_file: str | None,
    as_json: bool,
) -> None:
    """Make a server of a class, and print its id.

    The class is imported here and at the node, from the working directory or from PYTHONPATH.
    ARGS go to its constructor; they are read as those of `migrate call`.
    """
    args, kwargs = _arguments(arguments, keywords)
    if on is not None and near is not None:
        raise click.UsageError("--on and --near exclude each other")
    if "options" in kwargs:
        raise click.UsageError("an argument named options can only be given by position")
    found = _imported(cls)

    async def verb(client: Client, place: Place) -> tuple[Any, str]:
        neighbour = await _ref(client, near) if near is not None else None
        options = SpawnOptions(
            name=name,
            on=on or (None if near is not None else LEAST_LOADED),
            near=neighbour,
            standbys=standbys,
            durable=durable,
        )
        with _handlers_error():
            ref = await client.spawn(found, *args, options=options, **kwargs)
        return ref, (await client.info(ref)).node

    with _errors(as_json):
        try:
            ref, at = _with_client(verb, cluster, secret_file)
        except _Raised as raised:
            _exit(output.fail(raised.error, as_json, output.FAILED))
    if as_json:
        output.emit_json({"id": ref._server_id, "name": name, "node": at})
    else:
        click.echo(ref._server_id)


def _imported(cls: str) -> type:
    module_name, separator, qualname = cls.partition(":")
    if not separator or not module_name or not qualname:
        raise click.BadParameter(f"{cls!r} is not MODULE:CLASS", param_hint="MODULE:CLASS")
    _import_from_here()
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise click.BadParameter(
            f"the module {module_name!r} cannot be imported: {type(error).__name__}: {error}; run "
            "this in its folder, or name that in PYTHONPATH",
            param_hint="MODULE:CLASS",
        ) from error
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise click.BadParameter(
            f"the module {module_name!r} has no class {qualname!r}", param_hint="MODULE:CLASS"
        )
    return found


@cli.command()
@click.argument("servers", nargs=-1, required=True, metavar="SERVER...")
@click.argument("node")
@_of_cluster
def mv(
    servers: tuple[str, ...],
    node: str,
    cluster: str | None,
    secret_file: str | None,
    as_json: bool,
) -> None:
    """Move servers to a node.

    If some cannot be moved the others are moved all the same, and the exit status tells of the
    first that failed.
    """

    async def verb(client: Client, place: Place) -> list[Any]:
        await client._node_named(node)

        async def one(who: str) -> Any:
            ref = await _ref(client, who)
            return await _telling(client, who, ref, client.migrate(ref, to=node), as_json)

        return await asyncio.gather(*map(one, servers), return_exceptions=True)

    with _errors(as_json):
        results = _with_client(verb, cluster, secret_file)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, MigrateError):
                raise result
    reports = {
        who: result
        for who, result in zip(servers, results, strict=True)
        if not isinstance(result, BaseException)
    }
    if as_json and reports:
        output.emit_json([{"server": who, **_report(r)} for who, r in reports.items()])
    elif reports:
        _print_reports(list(reports.items()))
    codes = [output.fail(e, as_json) for e in results if isinstance(e, MigrateError)]
    if codes:
        _exit(codes[0])


@cli.command()
@click.argument("server")
@click.argument("nodes", nargs=-1, metavar="[NODE]...")
@click.option(
    "--count",
    type=click.IntRange(0, STANDBYS_MAX),
    metavar="N",
    help="How many, on nodes that are chosen: other hosts first, then the less loaded. 0: none.",
)
@click.option(
    "--mode",
    type=click.Choice(["sync", "async"]),
    default="sync",
    show_default=True,
    help="sync: nothing acknowledged is lost. async: faster; the last second may be.",
)
@_of_cluster
def replicate(
    server: str,
    nodes: tuple[str, ...],
    count: int | None,
    mode: Literal["sync", "async"],
    cluster: str | None,
    secret_file: str | None,
    as_json: bool,
) -> None:
    """Keep hot standbys of a server, on these nodes and no others.

    One of them takes over when the server's owner dies. It returns when all of them are in sync; if
    one cannot be, those that there were stay.
    """
    if bool(nodes) == (count is not None):
        raise click.UsageError("name the nodes, or give --count; --count 0 ends it")

    async def verb(client: Client, place: Place) -> Any:
        ref = await _ref(client, server)
        return await client.replicate(ref, list(nodes) if count is None else count, mode=mode)

    with _errors(as_json):
        told = _with_client(verb, cluster, secret_file)
    if as_json:
        output.emit_json(told)
    elif told.standbys:
        click.echo(f"{server} on {told.node}, {told.mode} standbys: {', '.join(told.standbys)}")
    else:
        click.echo(f"{server} on {told.node}, without standbys")


PROGRESS_S: Final = 0.5
"""A move that takes longer is told about, step by step."""


async def _telling(
    client: Client, who: str, ref: Any, move: Coroutine[Any, Any, Any], as_json: bool
) -> Any:
    """Wait for a move; on stderr, tell how far it is."""
    moving = asyncio.ensure_future(move)
    told = ""
    while not (await asyncio.wait([moving], timeout=PROGRESS_S))[0]:
        try:
            progress = (await client.info(ref)).moving
        except MigrateError:
            continue  # On its way just now; the move itself will tell.
        if progress is None or as_json:
            continue
        text = f"{who}: {progress.step}"
        if progress.bytes_sent:
            mib = progress.bytes_sent / (1 << 20)
            text += f", {mib:.1f} MiB sent ahead, {progress.rounds} rounds ended"
        if text != told:
            click.echo(text, err=True)
            told = text
    return await moving


def _report(report: Any) -> dict[str, Any]:
    return dataclasses.asdict(report)


def _print_reports(reports: Sequence[tuple[str, Any]]) -> None:
    rows = [
        (
            who,
            f"{r.source} -> {r.target}",
            r.epoch,
            f"{r.downtime_s * 1000:.1f} ms",
            f"{r.total_s * 1000:.1f} ms",
            f"{r.bytes_sent:,}",
            r.rounds,
        )
        for who, r in reports
    ]
    output.table(["SERVER", "MOVE", "EPOCH", "DOWNTIME", "TOTAL", "BYTES", "ROUNDS"], rows)


@cli.command()
@click.argument("servers", nargs=-1, required=True, metavar="SERVER...")
@_of_cluster
def stop(
    servers: tuple[str, ...], cluster: str | None, secret_file: str | None, as_json: bool
) -> None:
    """Stop servers; their state is gone, their names are free again."""

    async def verb(client: Client, place: Place) -> list[str]:
        refs = [await _ref(client, who) for who in servers]
        for ref in refs:
            await client.stop(ref)
        return [ref._server_id for ref in refs]

    with _errors(as_json):
        stopped = _with_client(verb, cluster, secret_file)
    if as_json:
        output.emit_json({"stopped": stopped})
    else:
        click.echo("\n".join(f"stopped {server}" for server in stopped))


# ------------------------------------------------------------------ checkpoints


def _place(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """A URL, or the path of a file as people type it."""
    from migrate.shell import stores

    try:
        return stores.url_of(value if "://" in value else pathlib.Path(value))
    except UsageError as error:
        raise click.BadParameter(error.message, context, parameter) from error


def _key(context: click.Context, parameter: click.Parameter, value: str | None) -> bytes | None:
    if value is None:
        return None
    try:
        key = pathlib.Path(value).read_bytes().strip()
    except OSError as error:
        raise click.BadParameter(str(error), context, parameter) from error
    if len(key) < 16:
        raise click.BadParameter(f"it holds fewer than 16 bytes: {value}", context, parameter)
    return key


_url = click.argument("url", callback=_place)
_key_file = click.option(
    "--key-file",
    "key",
    callback=_key,
    metavar="FILE",
    help="The key that signs it, at least 16 bytes; by default one of the cluster's.",
)


@cli.command()
@click.argument("server")
@_url
@click.option(
    "--every",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="Take it now and then again and again, under names that begin with URL; 0 ends that.",
)
@click.option(
    "--keep",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="With --every: how many are kept.",
)
@_key_file
@_of_cluster
def checkpoint(
    server: str,
    url: str,
    every: float | None,
    keep: int,
    key: bytes | None,
    cluster: str | None,
    secret_file: str | None,
    as_json: bool,
) -> None:
    """Write a server's state to a file or object store; it goes on serving.

    URL is file:///FOLDER/NAME, s3://BUCKET/NAME or the path of a file, on the owner's host. What is
    there is replaced only when the new one is whole.
    """

    async def verb(client: Client, place: Place) -> Any:
        ref = await _ref(client, server)
        return await client.checkpoint(ref, url, every=every, keep=keep, key=key)

    with _errors(as_json):
        written = _with_client(verb, cluster, secret_file)
    if as_json:
        output.emit_json(written)
    else:
        click.echo(f"{written.url}  {written.bytes:,} bytes  {written.digest}")


@cli.command()
@_url
@click.option("--on", metavar="NODE", help="The node; by default any.")
@click.option("--name", help="A name to find it by; by default the one that it had.")
@click.option("--replace", is_flag=True, help="Also while the original lives: replace it.")
@click.option("--fork", is_flag=True, help="As another server, with a new id and no name.")
@_key_file
@_of_cluster
def restore(
    url: str,
    on: str | None,
    name: str | None,
    replace: bool,
    fork: bool,
    key: bytes | None,
    cluster: str | None,
    secret_file: str | None,
    as_json: bool,
) -> None:
    """Bring a server back from a checkpoint, and print its id.

    It keeps its id. Who called it before is told once that it went back in time. While the original
    lives that is refused, unless --replace or --fork is given.
    """
    if replace and (fork or name is not None):
        raise click.UsageError("--replace excludes --fork and --name")

    async def verb(client: Client, place: Place) -> tuple[Any, Any]:
        ref = await client.restore(url, on=on, name=name, replace=replace, fork=fork, key=key)
        return ref, await client.info(ref)

    with _errors(as_json):
        ref, told = _with_client(verb, cluster, secret_file)
    if as_json:
        output.emit_json(told)
    else:
        click.echo(ref._server_id)


@cli.command()
@click.argument("server")
@click.option("--on", metavar="NODE", help="The node of the clone; by default the original's.")
@_of_cluster
def fork(
    server: str, on: str | None, cluster: str | None, secret_file: str | None, as_json: bool
) -> None:
    """Clone a server under a new id, and print that: state and timers, no mailbox, no name."""

    async def verb(client: Client, place: Place) -> tuple[Any, Any]:
        twin = await client.fork(await _ref(client, server), on=on)
        return twin, await client.info(twin)

    with _errors(as_json):
        twin, told = _with_client(verb, cluster, secret_file)
    if as_json:
        output.emit_json(told)
    else:
        click.echo(twin._server_id)


@cli.command()
@_url
@click.option("--verify", is_flag=True, help="Read all of it, and check every byte.")
@_key_file
@click.option("--secret-file", metavar="FILE", help="The cluster secret; by default the user's.")
@_is_json
def inspect(
    url: str, verify: bool, key: bytes | None, secret_file: str | None, as_json: bool
) -> None:
    """Tell what a checkpoint holds, without a cluster and without unpickling any of it.

    The exit status is 0 if its header is signed with the key at hand (and with --verify, if all of
    it is as it was written), and 1 if not.
    """
    from migrate.tools import checkpoint_text

    with _errors(as_json):
        told = checkpoint_text.inspected(url, key, secret_file, verify)
    if as_json:
        output.emit_json(told)
    else:
        checkpoint_text.show(told)
    if told["flaw"]:
        _exit(output.FAILED)


# ------------------------------------------------------------------ nodes


@cli.command()
@click.argument("node")
@_of_cluster
def cordon(node: str, cluster: str | None, secret_file: str | None, as_json: bool) -> None:
    """Let a node take in no servers; those that it has stay."""
    _cordon(node, True, cluster, secret_file, as_json)


@cli.command()
@click.argument("node")
@_of_cluster
def uncordon(node: str, cluster: str | None, secret_file: str | None, as_json: bool) -> None:
    """Let a node take in servers again, also one that was drained."""
    _cordon(node, False, cluster, secret_file, as_json)


@cli.command()
@click.argument("node")
@_of_cluster
def forget(node: str, cluster: str | None, secret_file: str | None, as_json: bool) -> None:
    """Say that a node is dead for good, where no other node can see it.

    A process's death is seen by the nodes of its host. If the whole host is gone, its nodes are
    only unreachable, until somebody who knows says so. Their servers are lost then, and their names
    free.
    """

    async def verb(client: Client, place: Place) -> None:
        await client.forget(node)

    with _errors(as_json):
        _with_client(verb, cluster, secret_file)
    if as_json:
        output.emit_json({"node": node, "forgotten": True})
    else:
        click.echo(f"node {node} is forgotten; its servers are lost")


def _cordon(
    node: str, on: bool, cluster: str | None, secret_file: str | None, as_json: bool
) -> None:
    async def verb(client: Client, place: Place) -> None:
        await client.cordon(node, on)

    with _errors(as_json):
        _with_client(verb, cluster, secret_file)
    if as_json:
        output.emit_json({"node": node, "cordoned": on})
    else:
        click.echo(f"node {node} {'takes in no servers' if on else 'takes in servers'}")


@cli.command()
@click.argument("node")
@_of_cluster
def drain(node: str, cluster: str | None, secret_file: str | None, as_json: bool) -> None:
    """Move every server off a node, which then takes in none.

    `migrate uncordon` opens it again.
    """

    async def verb(client: Client, place: Place) -> list[Any]:
        if not output.is_watched(sys.stderr):
            return await client.drain(node)
        async with _counting(client, node):
            return await client.drain(node)

    with _errors(as_json):
        reports = _with_client(verb, cluster, secret_file)
    if as_json:
        output.emit_json({"node": node, "moves": [_report(report) for report in reports]})
        return
    moved = "1 server was" if len(reports) == 1 else f"{len(reports)} servers were"
    click.echo(f"node {node} is empty: {moved} moved")


@contextlib.asynccontextmanager
async def _counting(client: Client, node: str) -> Any:
    """Show how many servers a node still has, while a drain goes on."""
    from rich.console import Console

    async def count() -> None:
        while True:
            left = next((i.servers for i in await client.nodes() if i.name == node), 0)
            shown.update(f"draining {node}: {left} servers left")
            await asyncio.sleep(0.25)

    with Console(stderr=True).status(f"draining {node}") as shown:
        counting = asyncio.create_task(count())
        try:
            yield
        finally:
            counting.cancel()
            # What it failed with, if it did, the verb beside it reports better.
            await asyncio.wait([counting])


# ------------------------------------------------------------------ bench


def _add_bench() -> None:
    if importlib.util.find_spec("migrate.tools.bench") is None:
        return

    @cli.command(
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def bench(arguments: tuple[str, ...]) -> None:
        """Measure what calls and moves cost on this machine."""
        program = importlib.import_module("migrate.tools.bench")
        with _errors(as_json="--json" in arguments):
            _exit(program.main(list(arguments)) or 0)


_add_bench()


def main() -> None:
    """Run the command line; the entry point of the console script."""
    # gRPC tells on stderr of every connection that ends; set before it is loaded.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # asyncio says so if a pipe to a child is closed just as the child ends: both look for that.
    said = "Unknown child process pid"
    logging.getLogger("asyncio").addFilter(lambda record: not str(record.msg).startswith(said))
    cli(prog_name="migrate")
