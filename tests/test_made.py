"""What results say of the commit that they were made by."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

made = pytest.importorskip("train.made", reason="away from the source tree")


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_only_results_may_differ_from_the_commit(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True)

    copy, results = tmp_path / "train" / "made.py", tmp_path / "benchmarks" / "results" / "table.md"
    for file, text in ((copy, Path(made.__file__).read_text()), (results, "1.0\n")):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    spec = importlib.util.spec_from_file_location("made_in_a_repository", copy)
    there = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(there)

    git("rm", "-q", "--cached", copy)
    assert there.commit() is None  # a copy that somebody else's repository does not hold
    git("add", copy)
    clean = there.commit()
    assert clean.isalnum()
    results.write_text("2.0\n")
    assert there.commit() == clean
    copy.write_text("")
    assert there.commit() == f"{clean}-dirty"


def test_outside_of_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "__file__", str(tmp_path / "made.py"))
    assert made.commit() is None
