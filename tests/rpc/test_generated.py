from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from rpc.generate import TOOLS_RELEASE, generate
from rpc.v1 import api_pb2, link_pb2, types_pb2

ROOT = Path(__file__).parents[2]


def test_the_committed_code_is_what_the_schema_generates(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    written = generate(ROOT, tmp_path)

    committed = {
        path.relative_to(ROOT) for path in (ROOT / "rpc" / "v1").iterdir() if path.is_file()
    }
    assert set(written) == committed
    for name in written:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), name


def test_another_release_of_the_tools_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "1.99.0")

    with pytest.raises(RuntimeError, match=TOOLS_RELEASE):
        generate(ROOT, tmp_path)


def test_generating_outside_a_checkout_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkout"):
        generate(tmp_path, tmp_path)


@pytest.mark.parametrize("module", [api_pb2, link_pb2, types_pb2], ids=lambda m: m.__name__)
def test_names_and_zeros_follow_the_rules(module: object) -> None:
    descriptor = module.DESCRIPTOR  # type: ignore[attr-defined]
    assert descriptor.package == "livemigrate.v1"
    for enum in descriptor.enum_types_by_name.values():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")


def test_the_services_have_the_methods_that_other_languages_call() -> None:
    api = api_pb2.DESCRIPTOR.services_by_name["Api"]
    assert [method.name for method in api.methods] == [
        "Spawn",
        "Call",
        "Cast",
        "WhereIs",
        "List",
        "Info",
        "Migrate",
        "Replicate",
    ]
    for name in ("rpc.v1.api_pb2_grpc", "rpc.v1.link_pb2_grpc"):
        importlib.import_module(name)


def test_importing_the_generated_code_warns_of_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import rpc.v1.api_pb2, rpc.v1.link_pb2_grpc"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
