"""The mutants are diffs that still fit the sources; that each turns a test red is `make mutants`."""

import ast
import shutil
import subprocess
import sys

import mutate
import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git applies the diffs")


def test_every_mutant_fits_its_file():
    assert len(mutate.mutants()) > 200
    misfits = [m.law for m in mutate.mutants() if mutate.apply(m, ROOT, check=True)]
    assert not misfits


def test_every_mutant_names_a_law_of_its_own_and_tests_that_there_are():
    laws = [m.law for m in mutate.mutants()]
    assert len(set(laws)) == len(laws)
    for mutant in mutate.mutants():
        assert mutant.tests
        for name in mutant.tests:
            assert (ROOT / "tests" / f"test_{name}.py").is_file(), mutant.law


def test_a_mutant_is_a_program_that_breaks_one_place(tmp_path):
    """One that does not even parse would turn any test red."""
    for mutant in mutate.mutants():
        copy = tmp_path / mutant.file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / mutant.file, copy)
        assert mutate.apply(mutant, tmp_path) == ""
        assert copy.read_text() != (ROOT / mutant.file).read_text(), mutant.law
        ast.parse(copy.read_text())


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A law, `twice`, its test, and a mutant of it; gives a function that sets what the test says."""
    (tmp_path / "tests" / "mutants").mkdir(parents=True)
    (tmp_path / "law.py").write_text("def twice(x):\n    return 2 * x\n")
    diff = "--- a/law.py\n+++ b/law.py\n@@ -2 +2 @@\n-    return 2 * x\n+    return 3 * x\n"
    header = "law: twice is twice\ntests: law\n"
    (tmp_path / "tests" / "mutants" / "twice.diff").write_text(header + diff)
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setattr(mutate, "FOLDER", tmp_path / "tests" / "mutants")

    def write(claim: str) -> mutate.Mutant:
        path = tmp_path / "tests" / "test_law.py"
        path.write_text(
            "import sys\nsys.path.insert(0, '.')\nfrom law import twice\n\n"
            f"def test_law():\n    assert {claim}\n"
        )
        return mutate.mutants()[0]

    return write


def test_a_mutant_that_a_test_sees_is_red(project):
    assert mutate.survives(project("twice(2) == 4")) == ""


def test_a_mutant_that_no_test_sees_survives(project):
    assert "survives" in mutate.survives(project("twice(0) == 0"))


def test_a_mutant_that_no_longer_fits_is_told(project, tmp_path):
    mutant = project("twice(2) == 4")
    (tmp_path / "law.py").write_text("def twice(x):\n    return x + x\n")
    assert "patch does not apply" in mutate.survives(mutant)


def test_laws_are_chosen_by_their_words_and_by_what_changed(project, tmp_path, monkeypatch):
    project("True")
    assert [m.law for m in mutate.chosen(["twice"], "")] == ["twice is twice"]
    assert mutate.chosen(["thrice"], "") == []
    monkeypatch.setattr(mutate, "changed_since", lambda commit: {"law.py"})
    assert len(mutate.chosen([], "HEAD")) == 1
    monkeypatch.setattr(mutate, "changed_since", lambda commit: {"other.py"})
    assert mutate.chosen([], "HEAD") == []


def test_a_diff_without_its_header_is_refused(tmp_path):
    (tmp_path / "x.diff").write_text("--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n")
    with pytest.raises(ValueError, match="expected two lines"):
        mutate.read(tmp_path / "x.diff")


def test_the_command_lists_what_it_tried():
    command = [sys.executable, str(ROOT / "tests" / "mutate.py"), "no law has these words"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 passed, 0 failed" and done.returncode == 0
