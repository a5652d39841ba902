"""The command line `migrate`: what can be done with a cluster, from a shell."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

import click

from migrate import __version__
from migrate.errors import MigrateError, UsageError
from migrate.options import NodeOptions
from migrate.tools import loops


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="livemigrate")
def cli() -> None:
    """Stateful servers that move live between node processes."""


def _options(context: click.Context, parameter: click.Parameter, value: str | None) -> NodeOptions:
    try:
        given: Any = json.loads(value) if value else {}
        if not isinstance(given, dict):
            raise ValueError(f"a JSON object is needed, not {value!r}")
        return NodeOptions().replace(**given)
    except (ValueError, UsageError) as error:
        text = error.message if isinstance(error, UsageError) else str(error)
        raise click.BadParameter(text, context, parameter) from error


@cli.command()
@click.option("--name", help="Its name, unique in the cluster; made up by default.")
@click.option(
    "--listen",
    default="127.0.0.1:0",
    show_default=True,
    envvar="LIVEMIGRATE_LISTEN",
    metavar="HOST:PORT",
    help="Where links are accepted; port 0 takes a free one.",
)
@click.option(
    "--directory",
    envvar="LIVEMIGRATE_DIRECTORY",
    metavar="URL",
    help="Who owns what: sqlite:///PATH, shared by the nodes of a host. By default one of its own.",
)
@click.option(
    "--options",
    callback=_options,
    metavar="JSON",
    help="Tunables of migrate.NodeOptions, as a JSON object.",
)
@click.option("--announce", is_flag=True, help="Print a line of JSON when up, then nothing.")
@click.option("--with-parent", is_flag=True, help="End when stdin ends, as when the parent dies.")
@click.option(
    "--allow",
    multiple=True,
    metavar="MODULE:CLASS",
    help="A class that the public gRPC API may spawn; repeatable.",
)
@click.option("--secret-file", metavar="FILE", help="The cluster secret; by default the user's.")
@click.option(
    "--log-level",
    default="warning",
    show_default=True,
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="What is logged to stderr.",
)
def node(
    name: str | None,
    listen: str,
    directory: str | None,
    options: NodeOptions,
    announce: bool,
    with_parent: bool,
    allow: tuple[str, ...],
    secret_file: str | None,
    log_level: str,
) -> None:
    """Run one node in this process until Ctrl-C or SIGTERM."""
    from migrate.tools.node_process import serve

    _log_to_stderr(log_level, name or "node")
    _import_from_here()
    loops.run(
        serve(
            name=name,
            listen=listen,
            directory=directory,
            options=options,
            secret_file=secret_file,
            spawnable=allow,
            announce=announce,
            with_parent=with_parent,
        )
    )


def _log_to_stderr(level: str, who: str) -> None:
    logging.basicConfig(
        level=level.upper(), format=f"%(asctime)s {who} %(levelname)s %(name)s: %(message)s"
    )


def _import_from_here() -> None:
    """Let classes be imported from the working directory, as `python -m migrate` does."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def main() -> None:
    """Run the command line; the entry point of the console script."""
    try:
        cli(prog_name="migrate")
    except MigrateError as error:
        click.echo(f"migrate: {error}", err=True)
        sys.exit(1)
