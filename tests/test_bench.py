"""The benchmarks' own machinery; what they measure is `make bench`."""

import json
import subprocess
import tempfile

import pytest
from conftest import make_model

from program import InputError
from studies import bench, bench_real

# the shipped LM and the miniature editions of the tasks
TINY = bench_real.Place(str(bench.TINY), "")


def test_a_race_leaves_no_process_and_no_file_when_a_worker_dies(tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen

    def start(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(RuntimeError, match="--worker=lambda: os._exit.* ended"):
        bench.race(1, good="tempfile.mkdtemp", bad="lambda: os._exit(3)")

    assert [worker.returncode for worker in started] == [-9, 3]
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------- the table of the real LM
SAID = {
    "sampling": 2.0,
    "update": 4.0,
    "rows": 32,
    "sampled": 900,
    "forwarded": 2200,
    "distinct": 2000,
    "unshared": 40_000,
    "flops": 8e12,
    "flops_per_second": 4e12,
    "ms": 5.0,
    "dtype": "bfloat16",
}


def forget_rounds():
    bench_real.our_rounds.cache_clear()
    bench_real.trl_round.cache_clear()


@pytest.fixture
def canned(monkeypatch):
    """Rounds that answer without a process; gives the cases that were asked for."""
    asked = []

    def answer(times: int, cases: dict[str, str], script: str) -> dict[str, list[dict]]:
        asked.extend(cases.values())
        result = {"seconds": 60.0, "peak": 3.0, "said": SAID}
        return {name: [result] * times for name in cases}

    monkeypatch.setattr(bench, "rounds", answer)
    forget_rounds()
    yield asked
    forget_rounds()


@pytest.mark.parametrize("task", ["banking77", "hover"])
def test_a_step_says_what_it_took_and_forwards_each_distinct_token_once(task):
    said = bench_real.our_step(TINY, task, "", examples=2, rollouts=4, labelled_demos=1)()
    for quantity in ("sampling", "update", "flops", "sampled"):
        assert said[quantity] > 0
    assert said["dtype"] == "float32"
    assert said["rows"] > 1
    assert said["distinct"] < said["unshared"]
    # modules, which are trees of their own, begin alike
    assert said["distinct"] <= said["forwarded"] <= 1.1 * said["distinct"]


def test_necessary_flops_are_those_of_each_matrix_and_each_pair_once():
    model = make_model(vocab_size=100)
    config = model.config
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("layers")]
    predicting = 7
    rows = [(1, 2, 3), (1, 2, 4, 5), (6,)]

    # every distinct prefix is a node, and sees those that it begins with
    nodes = {row[:i] for row in rows for i in range(1, len(row) + 1)}
    pairs = sum(len(node) for node in nodes)
    of_layers = 6 * sum(p.numel() for p in matrices) * len(nodes)
    of_head = 6 * 100 * config.hidden_size * predicting
    of_attention = 14 * config.layers * config.heads * config.head_dim * pairs

    depths = [len(node) - 1 for node in nodes]
    found = bench_real.necessary_flops(config, depths, predicting)
    assert found == of_layers + of_head + of_attention


def test_decoding_and_the_machines_peak_are_measured():
    assert 0 < bench_real.our_decoding(TINY, length=4)()["ms"] < 1e4
    assert bench_real.matrix_peak((16,), 1)()["flops_per_second"] > 0


def test_figures_of_the_real_lm_have_the_usual_fields_and_run_trl_once(canned):
    figures = {name: figure(TINY) for name, figure in bench_real.FIGURES.items()}

    for figure in figures.values():
        assert {"ours", "peer", "ratio", "what"} <= figure.keys()
    ratios = {
        "real_step": 10,
        "real_distinct": 1.1,
        "real_step_hover": 1.1,
        "real_memory": 1,
        "real_memory_lora": 1,
        "real_decode": 1,
        "real_update_efficiency": 0.5,
    }
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
    assert figure["ours"] == 6
    assert figure["peer"] is None
    assert "ended" in figure["peer_failed"]


NEEDED = [
    "config.json",
    "banking77/train.csv",
    "banking77/categories.json",
    "hotpotqa/corpus.jsonl",
    "hotpotqa/questions.jsonl",
]


@pytest.mark.parametrize("missing", ["config.json", "banking77/train.csv", "hotpotqa/corpus.jsonl"])
def test_a_missing_model_or_file_is_named(missing, tmp_path):
    for name in NEEDED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    place = bench_real.Place(str(tmp_path), str(tmp_path))
    bench_real.check(place, list(bench_real.FIGURES))

    (tmp_path / missing).unlink()
    named = "make smollm2" if missing == "config.json" else missing
    with pytest.raises(InputError, match=named):
        bench_real.check(place, list(bench_real.FIGURES))
    # these figures do without it
    if missing.startswith("hotpotqa"):
        bench_real.check(place, ["real_step", "real_decode"])


def test_a_measurement_leaves_the_other_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "OUT", tmp_path / "bench.json")
    monkeypatch.setattr(bench.importlib.metadata, "version", lambda name: "1")
    figure = {"ours": 1.0, "peer": 2.0, "ratio": 2.0, "what": "a figure"}
    for name in ("decode", "real_decode"):
        bench.measure({name: lambda: dict(figure)})
    assert json.loads(bench.OUT.read_text())["figures"].keys() == {"decode", "real_decode"}
