"""bench/demo: what the loaders make of files, how they refuse bad ones, and what a run writes."""

import argparse
import gzip
import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pandas")
pytest.importorskip("sklearn")
ROOT = Path(__file__).resolve().parents[2]

from bench.demo import datasets, train  # noqa: E402

GENRES = ["Comedy", "Drama", "War"]


def movielens_lines(ratings, users=4, films=30):
    """The three tables; ``ratings`` are (user, film, rating, time)."""
    return {
        "inter": ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
        + ["\t".join(map(str, rating)) for rating in ratings],
        "user": ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"]
        + [f"{u}\t{20 + u}\t{'FM'[u % 2]}\twriter\t{u}5711" for u in range(1, users + 1)],
        "item": ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
        + [f"{i}\tFilm {i}\t{1970 + i % 3}\t{' '.join(GENRES[: 1 + i % 3])}" for i in range(1, films + 1)],
    }


def wheel(folder, tables):
    path = folder / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, lines in tables.items():
            archive.writestr(f"recbole/dataset_example/ml-100k/ml-100k.{name}", "\n".join(lines) + "\n")
    return path


def random_ratings(rng, users=4, films=30):
    """Each user rates 13, 16, 19, 22 films within a few seconds, so that many share their time; in random order."""
    rows = [
        (user, int(film) + 1, int(rng.integers(1, 6)), int(rng.integers(100, 108)))
        for user in range(1, users + 1)
        for film in rng.permutation(films)[: 10 + 3 * user]
    ]
    return [rows[i] for i in rng.permutation(len(rows))]


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def criteo_lines(rng, n=60):
    def line(i):
        numbers = [str(x) if x > -3 else "" for x in rng.integers(-4, 500, 13)]
        return "\t".join([str(i % 2), *numbers, *(f"{x:08x}" for x in rng.integers(0, 9, 26))])

    return [line(i) for i in range(n)]


# ---------------------------------------------------------------------------------------------------------- MovieLens


def test_movielens_splits_by_time_and_keeps_the_future_out_of_histories(tmp_path, rng):
    ratings = random_ratings(rng)
    data = datasets.movielens(wheel(tmp_path, movielens_lines(ratings)), "din")
    parts = {"train": data.train, "test": data.test}
    seen = {user: {"train": [], "test": []} for user in range(1, 5)}
    for name, part in parts.items():
        columns = [part[key].tolist() for key in ("user", "item", "history_item", "history_genre", "label")]
        for user, item, history, genres, label in zip(*columns):
            seen[user][name].append(item)
            mine = sorted(((time, film, rating) for u, film, rating, time in ratings if u == user))
            before = mine[: [film for _, film, _ in mine].index(item)]
            liked = [film for _, film, rating in before if rating >= 4][-datasets.HISTORY_LENGTH :]
            assert history == liked + [0] * (datasets.HISTORY_LENGTH - len(liked))
            assert [g > 0 for g in genres] == [h > 0 for h in history]
            assert label == (dict((film, rating) for _, film, rating in mine)[item] >= 4)
    for user, both in seen.items():
        n = 10 + 3 * user
        order = [film for _, film in sorted((time, film) for u, film, _, time in ratings if u == user)]
        assert both["train"] == order[: n - n // 5] and both["test"] == order[n - n // 5 :]


def test_movielens_deepfm_has_multi_hot_genres(tmp_path, rng):
    data = datasets.movielens(wheel(tmp_path, movielens_lines(random_ratings(rng))), "deepfm")
    genres = {int(item): row.tolist() for item, row in zip(data.train["item"], data.train["genres"])}
    assert all(row == [1, 2, 3][: 1 + item % 3] + [0] * (2 - item % 3) for item, row in genres.items())
    for field in data.fields:
        assert data.train[field.name].max() < field.vocab_size and data.test[field.name].max() < field.vocab_size


def test_histories_are_cut_to_the_last():
    user = np.array([0, 0, 0, 0, 0, 3, 3])
    past = datasets.histories(user, np.array([1, 1, 0, 1, 1, 0, 1], bool), length=2)
    assert past.tolist() == [[-1, -1], [0, -1], [0, 1], [0, 1], [1, 3], [-1, -1], [-1, -1]]
    assert (datasets.histories(user, np.zeros(7, bool), length=2) == -1).all()


# --------------------------------------------------------------------------------------------------------- own files


@pytest.mark.parametrize("packed", [False, True])
def test_criteo(tmp_path, rng, packed):
    lines = criteo_lines(rng)
    cells = [line.split("\t") for line in lines]
    text = ("\n".join(lines) + "\n").encode()
    path = tmp_path / ("clicks.tsv.gz" if packed else "clicks.tsv")
    path.write_bytes(gzip.compress(text) if packed else text)
    data = datasets.load([str(path)], ["deepfm", "din"], seed=0)
    assert list(data) == ["deepfm"]
    data = data["deepfm"]
    assert len(data.train["label"]) == 48 and len(data.test["label"]) == 12
    assert data.train["label"].tolist() == [i % 2 for i in range(48)]
    x = np.array([float(row[1] or 0) for row in cells])
    np.testing.assert_allclose(data.test["I1"], (np.sign(x) * np.log1p(abs(x)))[48:], rtol=1e-6)
    counts = {}
    for row in cells[:48]:
        counts[row[14]] = counts.get(row[14], 0) + 1
    ids = {row[14]: int(i) for row, i in zip(cells, [*data.train["C1"], *data.test["C1"]])}
    for category, i in ids.items():
        assert (i == 0) == (counts.get(category, 0) < datasets.CRITEO_MIN_COUNT)
    by_id = [counts[category] for category in sorted(ids, key=ids.get) if ids[category]]
    assert by_id == sorted(by_id, reverse=True)


@pytest.mark.parametrize("separator, header", [("\t", ""), (",", "user,item,time\n")])
def test_interactions(tmp_path, rng, separator, header):
    rows = [(f"u{u}", f"i{i:02}", t) for u in range(6) for t, i in enumerate(rng.permutation(12)[: 3 + u])]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    path = tmp_path / "events.csv"
    path.write_text(header + "".join(separator.join(map(str, row)) + "\n" for row in rows))
    data = datasets.load([str(path)], ["din"], seed=0)["din"]
    items_of = {
        u: [int(i[1:]) + 1 for _, i, _ in sorted((t, i, t) for v, i, t in rows if v == f"u{u}")] for u in range(6)
    }
    positives = 0
    for part in (data.train, data.test):
        for user, item, history, label in zip(*(part[k].tolist() for k in ("user", "item", "history_item", "label"))):
            mine = items_of[user - 1]
            past = [i for i in history if i]
            position = len(past)
            assert past == mine[:position] and position > 0
            assert (position == len(mine) - 1) == (part is data.test)
            assert item == mine[position] if label else (item not in mine and 1 <= item <= 12)
            positives += int(label)
    assert positives == sum(len(mine) - 1 for mine in items_of.values())
    assert data.test["label"].sum() == 6 and len(data.test["label"]) == 12


def edit(lines, line, text):
    return [*lines[: line - 1], text, *lines[line:]]


def bad_files(rng):
    """name, content, the line that is wrong (None: the file as a whole), a part of the message."""
    criteo = criteo_lines(rng)
    events = [f"u{i % 4},i{i},{i}" for i in range(20)]
    cells = criteo[16].split("\t")

    def joined(lines):
        return ("\n".join(lines) + "\n").encode()

    yield "short", joined(edit(criteo, 17, "\t".join(cells[:-1]))), 17, "expected 40 tab-separated columns"
    yield "blank", joined(edit(criteo, 60, "")), 60, "expected 40 tab-separated columns"
    yield (
        "label",
        joined(edit(criteo, 17, "\t".join(["2", *cells[1:]]))),
        17,
        "expected 0 or 1 in column 'label'",
    )
    yield (
        "number",
        joined(edit(criteo, 17, "\t".join(["1", "x", *cells[2:]]))),
        17,
        "a number or nothing in column 'I1'",
    )
    yield "utf8", joined(criteo[:16]) + b"\xff" + joined(criteo[16:]), 17, "not UTF-8"
    yield "one-label", joined(["0" + line[1:] for line in criteo]), 60, "expected both labels"
    yield "cut.gz", gzip.compress(joined(criteo * 50))[:-2000], ..., "cannot be read"
    yield "not.gz", joined(criteo), None, "cannot be read"
    yield "columns", b"1,2,3,4\n", 1, "expected 40 tab-separated columns"
    yield "empty", b"", 1, "got an empty file"
    yield "events", joined(edit(events, 7, "u1,i3")), 7, "expected 3 columns (user, item, time)"
    yield (
        "time",
        joined(["user,item,time", *edit(events, 7, "u1,i3,soon")]),
        8,
        "a number in column 'time', got 'soon'",
    )
    yield "nan", joined(edit(events, 7, "u1,i3,nan")), 7, "expected a number in column 'time'"
    yield "few", joined(events[:5]), 5, "expected at least one user with three interactions"
    yield "header", b"user,item,time\n", 2, "expected 3 columns"


BAD_FILES = list(bad_files(np.random.default_rng(7)))


@pytest.mark.parametrize("name, content, line, message", BAD_FILES, ids=[case[0] for case in BAD_FILES])
def test_bad_file_is_one_line_on_stderr(tmp_path, capsys, name, content, line, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert train.main(["--data", str(path), "--out", str(tmp_path / "out.json")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    place = f"train.py: {path}" + ("" if line is None else ", line " if line is ... else f", line {line}: ")
    assert err.startswith(place)
    assert not (tmp_path / "out.json").exists()


def test_an_unwritable_result_is_known_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load", lambda *_: pytest.fail("went on"))
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file" / "out.json", tmp_path):
        assert train.main(["--out", str(out)]) == 2
        assert capsys.readouterr().err.startswith("train.py: --out: ")
    assert train.unwritable(tmp_path / "file") is None and (tmp_path / "file").read_text() == "kept"
    assert train.unwritable(tmp_path / "a" / "b.json") is None and not (tmp_path / "a" / "b.json").exists()


def test_files_that_do_not_fit(tmp_path, capsys, rng):
    first, second = tmp_path / "a.tsv", tmp_path / "b.tsv"
    for path in (first, second):
        path.write_text("\n".join(criteo_lines(rng)) + "\n")
    assert train.main(["--data", str(first), str(second)]) == 2
    assert f"{second}: expected one file a model, but a.tsv is a deepfm file too" in capsys.readouterr().err
    assert train.main(["--data", str(first), "--models", "din"]) == 2
    assert "expected a file for din, got deepfm only" in capsys.readouterr().err


@pytest.mark.parametrize(
    "table, line, text, message",
    [
        (
            "inter",
            5,
            "1\t2\t3",
            "line 5: expected 4 tab-separated columns (user_id item_id rating",
        ),
        ("inter", 9, "1\t2\tgood\t100", "line 9: expected a number in column 'rating', got 'good'"),
        ("inter", 3, "1\t999\t3\t100", "line 3: expected one that ml-100k.item has in column 'item_id', got '999'"),
        ("user", 2, "1\t20", "line 2: expected 5 tab-separated columns"),
    ],
)
def test_bad_table_in_the_wheel(tmp_path, capsys, monkeypatch, rng, table, line, text, message):
    tables = movielens_lines(random_ratings(rng))
    tables[table] = edit(tables[table], line, text)
    path = wheel(tmp_path, tables)
    monkeypatch.setenv("RANKKERNELS_CACHE", str(tmp_path))
    assert train.main([]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{path}/recbole/dataset_example/ml-100k/ml-100k.{table}, {message}" in err


def test_bad_wheel(tmp_path, capsys, monkeypatch, rng):
    monkeypatch.setenv("RANKKERNELS_CACHE", str(tmp_path))
    path = wheel(tmp_path, {"inter": movielens_lines(random_ratings(rng))["inter"]})
    assert train.main([]) == 2
    assert "ml-100k.user: expected 5 tab-separated columns" in capsys.readouterr().err
    path.write_bytes(b"not a zip")
    assert train.main([]) == 2
    assert capsys.readouterr().err.startswith(f"train.py: {path}: expected a wheel of recbole==1.2.1, cannot be read")


# --------------------------------------------------------------------------------------------------------- whole runs


def run(folder, *options, **environment):
    command = [sys.executable, "-m", "bench.demo.train", "--quiet", "--threads", "1", *options]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True
    )


def test_unreadable_file_ends_with_2_and_no_traceback(tmp_path):
    done = run(tmp_path, "--data", "nowhere.tsv")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("train.py: nowhere.tsv: expected 40 tab-separated columns")
    assert done.stderr.endswith("cannot be read: No such file or directory\n") and done.stderr.count("\n") == 1


def test_a_whole_run(tmp_path, monkeypatch, capsys, rng):
    pytest.importorskip("torch_rechub")
    (tmp_path / "criteo.tsv").write_text("\n".join(criteo_lines(rng, 500)) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert train.main(["--data", "criteo.tsv", "--batch-size", "40", "--epochs", "1", "--threads", "1", "--quiet"]) == 0
    report = json.loads((tmp_path / "results" / "train.json").read_text())
    results, comparison = report["models"]["deepfm"]["results"], report["models"]["deepfm"]["comparison"]
    assert [r["library"] for r in results] == ["torch-rechub", "rankkernels"]
    assert results[0]["steps"] == results[1]["steps"] == comparison["compared_steps"] == 10
    assert comparison["largest_relative_loss_difference"] < 1e-5 and "rankkernels" in capsys.readouterr().out


@pytest.mark.slow
def test_without_network_and_cache_the_synthetic_data_are_used(tmp_path):
    pytest.importorskip("torch_rechub")
    offline = {
        "PIP_NO_INDEX": "1",
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
    }
    options = ["--models", "deepfm", "--epochs", "1", "--batch-size", "1600", "--optimizer", "sgd", "--lr", "0.1"]
    done = run(tmp_path, *options, RANKKERNELS_CACHE=str(tmp_path / "cache"), **offline)
    assert done.returncode == 0, done.stderr
    assert f"MovieLens-100k is not in {tmp_path / 'cache'} and pip cannot download it" in done.stderr
    assert "going on with the synthetic data" in done.stderr and "the true model" in done.stdout

    report = json.loads((tmp_path / "results" / "train.json").read_text())
    assert report["settings"]["batch_size"] == 1600 and report["settings"]["threads"] == 1
    assert {"python", "torch", "torch-rechub", "rankkernels"} <= set(report["versions"])
    assert report["machine"]["cpu"] and list(report["models"]) == ["deepfm"]
    part = report["models"]["deepfm"]
    assert part["data"]["train_rows"] == 80_000 and part["data"]["test_rows"] == 20_000
    assert [r["library"] for r in part["results"]] == ["torch-rechub", "rankkernels"]
    for r in part["results"]:
        assert r["steps"] == 50 and len(r["first_losses"]) == 50
        assert r["samples_per_second"] > 0 and r["peak_memory_mib"] > 0
        assert 0.5 < r["auc"] < part["ceiling"]["auc"] and r["logloss"] > part["ceiling"]["logloss"]
    assert part["comparison"]["compared_steps"] == 50
    assert part["comparison"]["largest_relative_loss_difference"] < 1e-5
    assert abs(part["comparison"]["auc_difference"]) < 0.002


@pytest.mark.parametrize("model, rows", [("deepfm", 30_000), ("din", 6_000), ("base", 6_000)])
def test_no_model_beats_the_one_that_drew_the_data(model, rows):
    make = {"deepfm": datasets.synthetic_deepfm, "din": datasets.synthetic_din}[train.DATA_OF.get(model, model)]
    data = make(3, rows)
    settings = argparse.Namespace(threads=1, batch_size=500, epochs=2, lr=3e-3, seed=3, optimizer="adam", quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an op runs the reference is no matter here
        trainer = train.Trainer("rankkernels", model, data, settings)
        assert sum(1 for _ in trainer.train()) == len(trainer.losses) // train.TURN_STEPS
        result = trainer.result()
    auc, logloss = train.metrics(data.test["label"], data.true_probability.numpy())
    noise = 2 / np.sqrt(len(data.test["label"]))
    assert 0.6 < result["auc"] < auc + noise
    assert result["logloss"] > logloss - noise
