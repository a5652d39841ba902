"""`python -m tests.fuzz TARGET [--runs N] [--minutes M] [--seed S]`: a campaign on one parser.

With `atheris` installed (`pip install atheris`; not needed otherwise) the campaign is guided by
the coverage of our Python code; without it, or with `--blind`, inputs come from the seeded mutator
that the suite uses. The first input that fails is written to a file, and how to run it again is
said. `--input FILE` runs that one.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import os
import pathlib
import shutil
import sys
import tempfile
import time
from typing import Any, NoReturn

from tests.fuzz.mutate import SIZE_MAX, Mutator

HANG_S = 20
"""An input that takes longer is a finding; the slowest take milliseconds."""

MEMORY_MB = 1024


class Campaign:
    """Runs inputs, counts them, and shows how far it is."""

    def __init__(self, judge: Any, runs: int, minutes: float) -> None:
        self._judge = judge
        self.runs = runs
        self._began = time.monotonic()
        self._end = self._began + 60 * minutes if minutes else None
        self._shown = self._began
        self.done = 0
        self.accepted = 0

    def over(self) -> bool:
        """Whether enough was done."""
        if self._end is not None:
            return time.monotonic() >= self._end
        return self.done >= self.runs

    def run(self, data: bytes) -> None:
        """Judge one input; raises what a bug raises."""
        self.accepted += self._judge(data)
        self.done += 1
        if self.done % 1_000 == 0 and sys.stderr.isatty() and time.monotonic() - self._shown > 1:
            self._shown = time.monotonic()
            sys.stderr.write(f"\r{self.summary()} ")

    def summary(self) -> str:
        """Counts and rate so far."""
        took = time.monotonic() - self._began
        return (
            f"{self.done} runs in {took:.0f} s ({self.done / took:.0f}/s), {self.accepted} accepted"
        )


def save(data: bytes, name: str) -> str:
    """Keep an input that failed."""
    handle, path = tempfile.mkstemp(prefix=f"fuzz-{name}-", suffix=".bin")
    with open(handle, "wb") as file:
        file.write(data)
    return path


def blind(campaign: Campaign, name: str, seeds: list[bytes], seed: int) -> int:
    """The seeded mutator."""
    mutator = Mutator(seeds, seed)
    while not campaign.over():
        if campaign.done % 256 == 0:
            faulthandler.dump_traceback_later(HANG_S, exit=True)
        data = mutator.next()
        try:
            campaign.run(data)
        except BaseException:
            print(f"\nseed {seed}, run {campaign.done}: {save(data, name)}")
            raise
    faulthandler.cancel_dump_traceback_later()
    print(f"\n{name}: {campaign.summary()}, seed {seed}, not guided")
    return 0


def guided(atheris: Any, campaign: Campaign, name: str, seeds: list[bytes], seed: int) -> NoReturn:
    """Guided by coverage. libFuzzer never returns: the process ends, with 0 if it found nothing."""
    mutator = Mutator(seeds, seed)
    folder = tempfile.mkdtemp(prefix="fuzz-")

    def mutate(data: bytes, size_max: int, _seed: int) -> bytes:
        # Half of the inputs are changed by libFuzzer, which knows comparisons that failed.
        if _seed % 2:
            return bytes(atheris.Mutate(data, size_max))
        return mutator.changed(bytes(data))[:size_max]

    def run(data: bytes) -> None:
        if campaign.over():
            print(f"\n{name}: {campaign.summary()}, seed {seed}, guided by coverage")
            sys.stdout.flush()
            shutil.rmtree(folder)
            # NB: an ordinary exit is a crash to libFuzzer.
            os._exit(0)
        try:
            campaign.run(bytes(data))
        except Exception:
            print(f"\nseed {seed}, run {campaign.done}: {save(bytes(data), name)}")
            raise

    for number, data in enumerate(seeds):
        (pathlib.Path(folder) / f"seed{number}").write_bytes(data)
    options = [
        sys.argv[0],
        f"-timeout={HANG_S}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-max_len={SIZE_MAX}",
        f"-seed={seed + 1}",
        "-verbosity=0",
        f"-artifact_prefix={tempfile.gettempdir()}/fuzz-{name}-",
        folder,
    ]
    atheris.Setup(options, run, custom_mutator=mutate)
    atheris.Fuzz()
    raise AssertionError("libFuzzer returned")


def main() -> int:
    """Run the campaign; not 0 if an input failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", help="a name, or `list`")
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs")
    parser.add_argument("--minutes", type=float, default=0, help="instead of --runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true", help="the seeded mutator alone")
    parser.add_argument("--input", metavar="FILE", type=pathlib.Path, help="run one input, and end")
    options = parser.parse_args()
    atheris = None
    if not options.blind and options.input is None and options.target != "list":
        try:
            import atheris  # type: ignore[no-redef]
        except ImportError:
            print("atheris is not installed: inputs are not guided by coverage", file=sys.stderr)
    if atheris is not None:
        ours = ["migrate", "rpc", "serializers"]
        # It names every module that it instruments.
        with contextlib.redirect_stderr(io.StringIO()), atheris.instrument_imports(include=ours):
            from tests.fuzz.parsers import TARGETS
    else:
        from tests.fuzz.parsers import TARGETS
    if options.target == "list":
        for name, target in TARGETS.items():
            print(f"{name:<16}{(target.judge.__doc__ or '').partition(chr(10))[0]}")
        return 0
    if options.target not in TARGETS:
        parser.error(f"there is no target {options.target!r}; known are: {', '.join(TARGETS)}")
    target = TARGETS[options.target]
    if options.input is not None:
        print("accepted" if target.judge(options.input.read_bytes()) else "refused")
        return 0
    campaign = Campaign(target.judge, options.runs, options.minutes)
    if atheris is not None:
        guided(atheris, campaign, options.target, target.seeds(), options.seed)
    return blind(campaign, options.target, target.seeds(), options.seed)


if __name__ == "__main__":
    sys.exit(main())
