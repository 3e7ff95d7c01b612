"""The benchmarks' own machinery; what they measure is `make bench`."""
import subprocess
import tempfile

import bench
import pytest


def test_a_race_leaves_no_process_and_no_file_when_a_worker_dies(tmp_path, monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: started.append(popen(*args, **kwargs)) or started[-1])
    with pytest.raises(RuntimeError, match="--worker=lambda: os._exit.* ended"):
        bench.race(1, good="tempfile.mkdtemp", bad="lambda: os._exit(3)")
    assert [w.returncode for w in started] == [-9, 3] and not list(tmp_path.iterdir())
