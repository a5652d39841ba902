"""Keep the samples in the present format: `python -m tests.compat NAME`, from the root.

NAME is that of the release, as in `0.1.0`; the file `tests/compat/NAME.json` is made, and never
changed once that release is out. Run it on the oldest Python that is supported.
"""

from __future__ import annotations

import base64
import json
import pathlib
import sys
import zlib

from tests.compat.samples import make


def main(name: str) -> None:
    path = pathlib.Path(__file__).with_name(f"{name}.json")
    if path.exists():
        raise SystemExit(f"{path} is there already: what was released is not made anew")
    kept = {key: base64.b64encode(zlib.compress(data, 9)).decode() for key, data in make().items()}
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    path.write_text(json.dumps({"python": python, "samples": kept}, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
