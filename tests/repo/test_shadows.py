"""A foreign package in the place of one of ours is named at import, not later."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("migrate", "rpc", "serializers")


def run(code: str, *path: pathlib.Path) -> subprocess.CompletedProcess[str]:
    # Isolated and without site-packages, where an installed livemigrate may be: the
    # path is exactly the given folders and the standard library.
    program = f"import sys; sys.path[:0] = {[str(entry) for entry in path]!r}\n{code}"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def installed(tmp_path: pathlib.Path) -> pathlib.Path:
    """The three packages in a folder of their own, as an installation has them."""
    folder = tmp_path / "installed"
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return folder


@pytest.fixture
def foreign(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "foreign"
    folder.mkdir()
    return folder


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: "), done.stderr
    return last


@pytest.mark.parametrize("name", ["rpc", "serializers"])
@pytest.mark.parametrize("kind", ["module", "package", "namespace"])
def test_a_foreign_package_before_ours_is_named_and_not_run(installed, foreign, name, kind):
    crash = "raise SystemExit('foreign code ran')"
    if kind == "module":
        offender = foreign / f"{name}.py"
        offender.write_text(crash)
    else:
        offender = foreign / name / "__init__.py"
        offender.parent.mkdir()
        offender.write_text(crash)
    path = (foreign, installed)
    if kind == "namespace":
        # Without an __init__.py it is found only if there is no ordinary package.
        offender.unlink()
        shutil.rmtree(installed / name)
        offender = offender.parent

    text = refusal(run("import migrate", *path))

    assert str(offender) in text
    assert "shadows livemigrate's package" in text
    assert str(installed / name) in text
    assert "rename or uninstall it" in text


@pytest.mark.parametrize("name", ["rpc", "serializers"])
def test_a_distribution_installed_over_ours_is_named(installed, name):
    (installed / name / "__init__.py").write_text("raise SystemExit('foreign code ran')")

    text = refusal(run("import migrate", installed))

    assert str(installed / name / "__init__.py") in text
    assert "another distribution was installed over" in text


def test_a_package_that_is_missing_is_named(installed):
    shutil.rmtree(installed / "rpc")

    assert "the installation is incomplete" in refusal(run("import migrate", installed))


def test_a_foreign_module_that_was_imported_earlier_is_named(installed, foreign):
    (foreign / "rpc.py").write_text("")
    code = f"import rpc; sys.path.remove({str(foreign)!r})\nimport migrate"

    text = refusal(run(code, foreign, installed))

    assert str(foreign / "rpc.py") in text


def test_a_second_migrate_that_a_new_process_would_find_first_is_named(installed, foreign):
    (foreign / "migrate.py").write_text("")
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location(
    "migrate", {str(installed / "migrate" / "__init__.py")!r}
)
module = importlib.util.module_from_spec(spec)
sys.modules["migrate"] = module
spec.loader.exec_module(module)
"""

    text = refusal(run(code, foreign, installed))

    assert f"{foreign / 'migrate.py'} shadows" in text


def test_migrate_under_another_name_is_refused(installed):
    code = f"sys.path.insert(0, {str(installed.parent)!r})\nimport installed.migrate"

    assert "which would load it twice" in refusal(run(code, installed))


def test_foreign_packages_behind_ours_do_no_harm(installed, foreign):
    for name in PACKAGES:
        (foreign / f"{name}.py").write_text("raise SystemExit('foreign code ran')")

    done = run("import migrate; print(migrate.__file__)", installed, foreign)

    assert done.stdout.strip() == str(installed / "migrate" / "__init__.py"), done.stderr


def test_an_installation_behind_a_symbolic_link_is_ours(installed, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(installed)

    done = run("import rpc, migrate; print('fine')", link)

    assert done.stdout.strip() == "fine", done.stderr
