"""The servers of the demo: parts of an index, and a ledger that they report to.

Each keeps, as part of its state, an account of what it was sent: every sender numbers its
requests to every server, and the receiver notes what is missing, comes twice or comes late. The
accounts travel with the servers, so a request that a move loses, repeats or overtakes shows.
"""

from __future__ import annotations

from typing import Any

import migrate
from migrate.tools import demo_text


class Account:
    """What a receiver knows of the numbered requests of its senders.

    The numbers of each sender begin with 1 and are consecutive.

    Attributes:
        last: The highest number that came from each sender.
        missing: Numbers below it that did not come, by sender.
        duplicated: How many came again.
        out_of_order: How many came after a higher one.
    """

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self.missing: dict[str, set[int]] = {}
        self.duplicated = 0
        self.out_of_order = 0

    def note(self, sender: str, number: int) -> None:
        """Note that a request has come."""
        last = self.last.get(sender, 0)
        if number > last:
            if number > last + 1:
                self.missing.setdefault(sender, set()).update(range(last + 1, number))
            self.last[sender] = number
        elif number in self.missing.get(sender, ()):
            self.missing[sender].remove(number)
            self.out_of_order += 1
        else:
            self.duplicated += 1

    def lost(self, sent: dict[str, int]) -> int:
        """How many of the requests that were sent have not come.

        Args:
            sent: The highest number that each sender has used.
        """
        lost = 0
        for sender, number in sent.items():
            lost += max(0, number - self.last.get(sender, 0))
            lost += len(self.missing.get(sender, ()))
        return lost


@migrate.server
class Shard:
    """One part of the index: which names occur in which files, and how often."""

    def __init__(self, name: str, ledger: migrate.Ref[Ledger]) -> None:
        self.name = name
        self.index: dict[str, list[int]] = {}
        self.account = Account()
        self.ledger = ledger
        self.reported = 0

    @migrate.call
    async def add(self, sender: str, number: int, file: int, names: dict[str, int]) -> int:
        """Take in what a file holds; returns `number`.

        A report of it goes to the ledger, as a cast, so that servers that move send to a server
        that moves.
        """
        self.account.note(sender, number)
        for name, count in names.items():
            self.index.setdefault(name, []).extend((file, count))
        self.reported += 1
        await self.ledger.report.cast(self.name, self.reported, sum(names.values()))
        return number

    @migrate.call
    async def close_account(self) -> dict[str, Any]:
        """Report once more, as a call, so that every cast before it is handled; the account."""
        self.reported += 1
        await self.ledger.report(self.name, self.reported, 0)
        return {"account": self.account, "reported": self.reported}

    @migrate.call
    def result(self) -> dict[str, Any]:
        """The digest of this part of the index, and how often each name occurs."""
        return {
            "digest": demo_text.digest(self.index),
            "names": demo_text.occurrences(self.index),
        }


@migrate.server
class Ledger:
    """Keeps the books: how many occurrences each shard has taken in, by its own reports."""

    def __init__(self) -> None:
        self.account = Account()
        self.taken_in: dict[str, int] = {}

    @migrate.call
    def report(self, shard: str, number: int, occurrences: int) -> None:
        """Note what a shard has taken in."""
        self.account.note(shard, number)
        self.taken_in[shard] = self.taken_in.get(shard, 0) + occurrences

    @migrate.call
    def books(self) -> dict[str, Any]:
        """The account of the reports, and the occurrences by shard."""
        return {"account": self.account, "taken_in": self.taken_in}


@migrate.server
class Catalogue:
    """Knows which files are indexed, and which of them do not tokenise."""

    def __init__(self) -> None:
        self.account = Account()
        self.names_in: dict[str, int | None] = {}

    @migrate.call
    def enter(self, sender: str, number: int, path: str, names: int | None) -> int:
        """Enter a file with the number of its NAME tokens, None if it does not tokenise."""
        self.account.note(sender, number)
        self.names_in[path] = names
        return number

    @migrate.call
    def result(self) -> dict[str, Any]:
        """The account, and the files with the number of their NAME tokens."""
        return {"account": self.account, "names_in": self.names_in}
