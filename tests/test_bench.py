"""The benchmarks' own machinery; what they measure is `make bench`."""
import json
import subprocess
import tempfile

import pytest
from conftest import make_model

from program import InputError
from studies import bench, bench_real


def test_a_race_leaves_no_process_and_no_file_when_a_worker_dies(tmp_path, monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: started.append(popen(*args, **kwargs)) or started[-1])
    with pytest.raises(RuntimeError, match="--worker=lambda: os._exit.* ended"):
        bench.race(1, good="tempfile.mkdtemp", bad="lambda: os._exit(3)")
    assert [w.returncode for w in started] == [-9, 3] and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ the table of the real LM

TINY = bench_real.Place(str(bench.TINY), "")                # and the miniature editions


@pytest.fixture
def canned(monkeypatch):
    """Rounds that answer without a process; gives the cases that were asked for."""
    asked = []

    def answer(times: int, cases: dict[str, str], script: str) -> dict[str, list[dict]]:
        asked.extend(cases.values())
        said = {"sampling": 2.0, "update": 4.0, "rows": 32, "sampled": 900, "forwarded": 2200, "distinct": 2000, "unshared": 40_000,
                "flops": 8e12, "flops_per_second": 4e12, "ms": 5.0, "dtype": "bfloat16"}
        return {name: [{"seconds": 60.0, "peak": 3.0, "said": said}] * times for name in cases}

    monkeypatch.setattr(bench, "rounds", answer)
    for cached in (bench_real.our_rounds, bench_real.trl_round):
        cached.cache_clear()
    yield asked
    for cached in (bench_real.our_rounds, bench_real.trl_round):
        cached.cache_clear()


@pytest.mark.parametrize("task", ["banking77", "hover"])
def test_a_step_says_what_it_took_and_forwards_each_distinct_token_once(task):
    said = bench_real.our_step(TINY, task, "", examples=2, rollouts=4, labelled_demos=1)()
    assert said["sampling"] > 0 and said["update"] > 0 and said["flops"] > 0 and said["dtype"] == "float32"
    assert 0 < said["sampled"] and 1 < said["rows"] and said["distinct"] < said["unshared"]
    assert said["distinct"] <= said["forwarded"] <= 1.1 * said["distinct"]      # modules, which are trees of their own, begin alike


def test_necessary_flops_are_those_of_every_matrix_once_and_every_pair_once():
    config = make_model(vocab_size=100).config
    matrices = [p for n, p in make_model(vocab_size=100).named_parameters() if p.dim() == 2 and n.startswith("layers")]
    rows = [(1, 2, 3), (1, 2, 4, 5), (6,)]
    seen = {row[:i] for row in rows for i in range(1, len(row) + 1)}            # every distinct prefix is a node
    pairs = [(node, node[:i]) for node in seen for i in range(1, len(node) + 1)]
    wanted = (6 * sum(p.numel() for p in matrices) * len(seen) + 6 * 100 * config.hidden_size * 7
              + 14 * config.layers * config.heads * config.head_dim * len(pairs))
    assert bench_real.necessary_flops(config, [len(node) - 1 for node in seen], 7) == wanted


def test_decoding_and_the_machines_peak_are_measured():
    assert 0 < bench_real.our_decoding(TINY, length=4)()["ms"] < 1e4
    assert bench_real.matrix_peak((16,), 1)()["flops_per_second"] > 0


def test_the_figures_of_the_real_lm_have_the_fields_of_the_others_and_run_trl_once(canned):
    figures = {name: figure(TINY) for name, figure in bench_real.FIGURES.items()}
    assert all({"ours", "peer", "ratio", "what"} <= f.keys() for f in figures.values())
    ratios = {"real_step": 10, "real_distinct": 1.1, "real_step_hover": 1.1, "real_memory": 1, "real_memory_lora": 1,
              "real_decode": 1, "real_update_efficiency": 0.5}
    assert {name: f["ratio"] for name, f in figures.items()} == pytest.approx(ratios)
    assert sum("trl_step" in case for case in canned) == 1
    assert len(bench_real.table(figures).splitlines()) == 2 + len(figures)


def test_ours_is_kept_where_trl_does_not_fit(canned, monkeypatch):
    answer = bench.rounds

    def without_trl(times: int, cases: dict[str, str], script: str):
        if "peer" in cases:
            raise RuntimeError("--worker=trl ended")
        return answer(times, cases, script)
    monkeypatch.setattr(bench, "rounds", without_trl)
    figure = bench_real.real_step(TINY)
    assert figure["ours"] == 6 and figure["peer"] is None and "ended" in figure["peer_failed"]


@pytest.mark.parametrize("missing", ["config.json", "banking77/train.csv", "hotpotqa/corpus.jsonl"])
def test_a_missing_model_or_file_is_named(missing, tmp_path):
    there = ["config.json", *(f"banking77/{f}" for f in ("train.csv", "categories.json")),
             *(f"hotpotqa/{f}" for f in ("corpus.jsonl", "questions.jsonl"))]
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    place = bench_real.Place(str(tmp_path), str(tmp_path))
    bench_real.check(place, list(bench_real.FIGURES))
    (tmp_path / missing).unlink()
    with pytest.raises(InputError, match="make smollm2" if missing == "config.json" else missing):
        bench_real.check(place, list(bench_real.FIGURES))
    if missing.startswith("hotpotqa"):
        bench_real.check(place, ["real_step", "real_decode"])                   # which do not need it


def test_a_measurement_leaves_the_other_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "OUT", tmp_path / "bench.json")
    monkeypatch.setattr(bench.importlib.metadata, "version", lambda name: "1")
    for name in ("decode", "real_decode"):
        bench.measure({name: lambda: {"ours": 1.0, "peer": 2.0, "ratio": 2.0, "what": "a figure"}})
    assert json.loads(bench.OUT.read_text())["figures"].keys() == {"decode", "real_decode"}
