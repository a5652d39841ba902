from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc import auth
from rpc.errors import SecretFileError

ROOT = Path(__file__).parents[2]


def test_a_file_that_others_can_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(bytes(32))
    path.chmod(0o640)

    with pytest.raises(SecretFileError, match="chmod 600") as caught:
        auth.load_or_create_secret(path)

    assert caught.value.path == str(path)
    assert path.read_bytes() == bytes(32)


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    auth.load_or_create_secret(path)
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)

    with pytest.raises(SecretFileError, match="belongs to user"):
        auth.load_or_create_secret(path)


@pytest.mark.parametrize("size", [0, 31, 4097])
def test_a_file_of_a_wrong_size_is_refused_and_kept(tmp_path: Path, size: int) -> None:
    path = tmp_path / "secret"
    path.write_bytes(bytes(size))
    path.chmod(0o600)

    with pytest.raises(SecretFileError, match="bytes instead of"):
        auth.load_or_create_secret(path)

    assert path.stat().st_size == size


def test_something_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SecretFileError, match="cannot read"):
        auth.load_or_create_secret(tmp_path)
    with pytest.raises(SecretFileError, match="not a regular file"):
        auth.load_or_create_secret("/dev/null")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(SecretFileError, match="file"):
        auth.load_or_create_secret(tmp_path / "file" / "folder" / "secret")


def test_the_first_node_makes_a_secret_for_its_user_only(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "secret"

    secret = auth.load_or_create_secret(path)

    assert len(secret) == auth.SECRET_BYTES
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert os.listdir(path.parent) == ["secret"]
    assert auth.load_or_create_secret(path) == secret


def test_first_nodes_that_start_at_once_agree_on_one_secret(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "secret"
    code = (
        "import sys; from rpc.auth import load_or_create_secret as load; "
        "sys.stdin.read(); print(load(sys.argv[1]).hex())"
    )
    nodes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for node in nodes:
        assert node.stdin is not None
        node.stdin.close()  # All wait for this before they look for the file.
        node.stdin = None
    secrets = {node.communicate(timeout=60)[0] for node in nodes}

    assert secrets == {path.read_bytes().hex() + "\n"}
    assert os.listdir(path.parent) == ["secret"]


def test_whoever_comes_second_takes_the_secret_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret"
    link = os.link

    def other_node_first(source: Path, target: Path) -> None:
        path.write_bytes(b"o" * 32)
        path.chmod(0o600)
        link(source, target)

    monkeypatch.setattr(os, "link", other_node_first)

    assert auth.load_or_create_secret(path) == b"o" * 32


def test_the_environment_names_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(auth.SECRET_FILE_VARIABLE, str(tmp_path / "mine"))
    assert auth.default_secret_path() == tmp_path / "mine"

    monkeypatch.delenv(auth.SECRET_FILE_VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert auth.default_secret_path() == tmp_path / "livemigrate" / "cluster.secret"

    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert auth.default_secret_path() == tmp_path / ".config" / "livemigrate" / "cluster.secret"


transcripts = st.builds(auth.Transcript, *[st.binary(max_size=40)] * 4)


@given(st.binary(min_size=32, max_size=32), transcripts, transcripts)
def test_proofs_and_keys_fit_one_conversation_one_role_and_one_direction(
    secret: bytes, one: auth.Transcript, other: auth.Transcript
) -> None:
    made = [
        auth.dialler_proof(secret, one),
        auth.acceptor_proof(secret, one),
        *auth.link_keys(secret, one)[:2],
    ]
    assert len(set(made)) == 4
    assert auth.proves(made[0], auth.dialler_proof(secret, one))
    assert not auth.proves(made[0], auth.dialler_proof(secret[:-1] + b"?" * 2, one))
    if one != other:
        assert not auth.proves(made[0], auth.dialler_proof(secret, other))
        assert auth.link_keys(secret, one).link_id != auth.link_keys(secret, other).link_id


def test_bytes_moved_from_one_field_to_the_next_change_the_proof() -> None:
    one = auth.Transcript(b"ab", b"c", b"", b"")
    other = auth.Transcript(b"a", b"bc", b"", b"")

    assert auth.dialler_proof(b"s" * 32, one) != auth.dialler_proof(b"s" * 32, other)


def test_nonces_are_fresh() -> None:
    assert len({auth.new_nonce() for _ in range(100)}) == 100
