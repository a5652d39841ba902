"""Generates `rpc/v1` from `proto/rpc/v1`.

Run `python -m rpc.generate` at the root of a checkout after each edit of a
`.proto` file, and commit what it writes. It needs grpcio-tools of the release
named by `TOOLS_RELEASE`, because generated code refuses runtimes older than
its generator.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

TOOLS_RELEASE = "1.71."
"""Prefix of the versions of grpcio-tools that make the committed code.

Source: measured; what 1.71 generates (for protobuf 5.29) loads on protobuf
5.29, 6 and 7, what later releases generate does not load on 5.29.
"""

_MARKER = '''"""Generated from `proto/rpc/v1` by `python -m rpc.generate`; never edited."""\n'''


def generate(root: Path, into: Path) -> list[Path]:
    """Generate the Python modules of every `.proto` file below `proto/`.

    Args:
        root: The checkout; `proto/rpc/v1/*.proto` are read from it.
        into: Folder that receives `rpc/v1/*.py` and `*.pyi`; made if absent.

    Returns:
        The files written, relative to `into`, sorted.

    Raises:
        FileNotFoundError: There is no `.proto` file below `root`.
        ImportError: grpcio-tools is not installed.
        RuntimeError: The installed grpcio-tools is of another release, or the
            compiler failed; `into` may then hold part of the files.
    """
    sources = sorted((root / "proto" / "rpc" / "v1").glob("*.proto"))
    if not sources:
        raise FileNotFoundError(
            f"no .proto files in {root / 'proto' / 'rpc' / 'v1'}; run this in a checkout"
        )
    # Only those who generate have it, and it has no types.
    protoc = importlib.import_module("grpc_tools.protoc")

    release = importlib.metadata.version("grpcio-tools")
    if not release.startswith(TOOLS_RELEASE):
        raise RuntimeError(
            f"grpcio-tools {release} is installed, but the generated code is made with "
            f"{TOOLS_RELEASE}x; install 'grpcio-tools=={TOOLS_RELEASE}*'"
        )
    bundled = Path(str(protoc.__file__)).parent / "_proto"
    package = into / "rpc" / "v1"
    package.mkdir(parents=True, exist_ok=True)
    status = protoc.main(
        [
            "protoc",
            f"-I{root / 'proto'}",
            f"-I{bundled}",
            f"--python_out={into}",
            f"--pyi_out={into}",
            f"--grpc_python_out={into}",
            *(str(source) for source in sources),
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc ended with status {status}; its messages are above")
    (package / "__init__.py").write_text(_MARKER, encoding="utf-8")
    for stub in package.glob("*_pb2_grpc.py"):
        # A file without a service still gets an empty module, which says nothing.
        if "class " not in stub.read_text(encoding="utf-8"):
            stub.unlink()
    return sorted(path.relative_to(into) for path in package.iterdir() if path.is_file())


def main(arguments: Sequence[str] = ()) -> int:
    """Regenerate the modules of the checkout in the current folder.

    Args:
        arguments: Nothing, or one folder: the root of the checkout.

    Returns:
        0 after success; a failure raises.
    """
    root = Path(arguments[0] if arguments else ".").resolve()
    with tempfile.TemporaryDirectory() as scratch:
        written = generate(root, Path(scratch))
        target = root / "rpc" / "v1"
        target.mkdir(parents=True, exist_ok=True)
        # Modules of removed .proto files go too: the folder holds nothing else.
        for old in [*target.glob("*_pb2*.py"), *target.glob("*_pb2*.pyi")]:
            old.unlink()
        for name in written:
            shutil.copyfile(Path(scratch) / name, root / name)
            print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
