"""Click-through data for DeepFM and DIN: MovieLens-100k, synthetic data with a known ceiling, and your own files.

``load`` gives a ``Dataset`` a model: fields, and a training and a test part as dicts of tensors, one row a sample.
Whatever cannot be read raises ``tables.DataError``, which names the file, the line and what was expected there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bench.demo.models import Field
from bench.demo.tables import DataError, Table, open_bytes

HISTORY_LENGTH = 50
MOVIELENS_WHEEL = "recbole==1.2.1"
MOVIELENS_MEMBER = "recbole/dataset_example/ml-100k/ml-100k."
#: A Criteo category seen fewer times than this in the training part shares the id 0, "other".
CRITEO_MIN_COUNT = 4


class Unavailable(Exception):
    """MovieLens-100k is neither in the cache nor to be had from pip."""


@dataclass
class Dataset:
    """Training and test samples: ``{field name: tensor, "label": float32 [N]}`` each."""

    name: str
    fields: list[Field]
    train: dict[str, Tensor]
    test: dict[str, Tensor]
    #: P(label = 1) of each test sample under the model that drew the data; None where nobody knows it.
    true_probability: Tensor | None = None

    @classmethod
    def split(cls, name, fields, columns, is_test, true_probability=None):
        parts = [
            {key: torch.from_numpy(np.ascontiguousarray(value[rows])) for key, value in columns.items()}
            for rows in (~is_test, is_test)
        ]
        if true_probability is not None:
            true_probability = torch.from_numpy(true_probability[is_test])
        return cls(name, fields, *parts, true_probability)


def load(data: list[str], models: list[str], seed: int) -> dict[str, Dataset]:
    """The data set of each model that ``data`` serves: ``["ml-100k"]``, ``["synthetic"]`` or paths of files."""
    if data == ["ml-100k"]:
        wheel = movielens_wheel()
        return {model: movielens(wheel, model) for model in models}
    if data == ["synthetic"]:
        return {model: {"deepfm": synthetic_deepfm, "din": synthetic_din}[model](seed) for model in models}
    datasets: dict[str, Dataset] = {}
    for path in map(Path, data):
        model, dataset = from_file(path, seed)
        if model in datasets:
            raise DataError(path, None, f"expected one file a model, but {datasets[model].name} is a {model} file too")
        datasets[model] = dataset
    if not any(model in datasets for model in models):
        raise DataError(
            ", ".join(data), None, f"expected a file for {' or '.join(models)}, got {', '.join(datasets)} only"
        )
    return {model: datasets[model] for model in models if model in datasets}


# -------------------------------------------------------------------------------------------------------- histories


def histories(user: np.ndarray, keep: np.ndarray, length: int = HISTORY_LENGTH) -> np.ndarray:
    """The last ``length`` rows of the same user before each row, among those with ``keep``; -1 fills up at the end.

    Rows are sorted by user and time, so what comes before a row in the table is its past: [N, length], oldest first.
    """
    kept = np.flatnonzero(keep)
    end = np.cumsum(keep) - keep
    begin = np.maximum(end[np.searchsorted(user, user)], end - length)
    slots = begin[:, None] + np.arange(length)
    return np.where(slots < end[:, None], np.append(kept, -1)[np.minimum(slots, len(kept))], -1)


def position_from_end(user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For rows sorted by user: how many rows the user has after each one, and in all."""
    first, last = np.searchsorted(user, user), np.searchsorted(user, user, side="right")
    return last - 1 - np.arange(len(user)), last - first


# -------------------------------------------------------------------------------------------------------- MovieLens


def cache_folder() -> Path:
    return Path(os.environ.get("RANKKERNELS_CACHE") or Path.home() / ".cache" / "rankkernels")


def movielens_wheel() -> Path:
    """The wheel that carries MovieLens-100k, from the cache folder, else by ``pip download``."""
    cache, name = cache_folder(), MOVIELENS_WHEEL.replace("==", "-")
    if not (found := sorted(cache.glob(f"{name}-*.whl"))):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--quiet",
            "--retries=1",
            "--timeout=20",
            "--disable-pip-version-check",
            "-d",
            str(cache),
            MOVIELENS_WHEEL,
        ]
        pip = subprocess.run(command, capture_output=True, text=True)
        if not (found := sorted(cache.glob(f"{name}-*.whl"))):
            reason = (pip.stderr.strip() or "pip said nothing").splitlines()[-1]
            raise Unavailable(f"MovieLens-100k is not in {cache} and pip cannot download it ({reason})")
    return found[-1]


def genres_of(items: Table) -> tuple[dict[str, int], np.ndarray]:
    """The genres numbered from 1, and those of each film: [films, L], 0 fills up at the end."""
    names = [text.split() for text in items.frame["class"].astype(str)]
    genres = {name: i for i, name in enumerate(sorted({name for film in names for name in film}), 1)}
    item_genres = np.zeros((len(names), max(map(len, names))), np.int64)
    for film, row in zip(names, item_genres):
        row[: len(film)] = [genres[name] for name in film]
    return genres, item_genres


def movielens(wheel: Path, model: str) -> Dataset:
    """MovieLens-100k as click data: does a user who rates a film give it four stars or more?

    The data are GroupLens Research's, free for research under the README of ml-100k (no commercial use without
    permission, no redistribution without the same conditions); F. M. Harper and J. A. Konstan, The MovieLens Datasets:
    History and Context, ACM TiiS 5(4), 2015. They are read straight out of the wheel of RecBole, which carries them.

    The last 20 % of each user's ratings (rounded down) by time, ties by film, are the test part. A history holds the
    films that the user *liked* before: with all the rated ones, what the user thought of them, the only thing that
    tells a like from a dislike here, would be lost. Only earlier ratings enter it, so no label reaches its own sample.
    """

    def table(name, columns):
        member = zipfile.Path(wheel, MOVIELENS_MEMBER + name)
        return Table.read(
            member, columns.split(), f"{len(columns.split())} tab-separated columns ({columns})", header=True
        )

    try:
        ratings = table("inter", "user_id item_id rating timestamp")
        users = table("user", "user_id age gender occupation zip_code")
        items = table("item", "item_id movie_title release_year class")
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(wheel, None, f"expected a wheel of {MOVIELENS_WHEEL}, cannot be read: {error}") from None

    time, rating = ratings.numbers("timestamp"), ratings.numbers("rating")
    user_row, item_row = ratings.find("user_id", users, "user_id"), ratings.find("item_id", items, "item_id")
    order = np.lexsort((items.numbers("item_id")[item_row], time, user_row))
    user_row, item_row, liked = user_row[order], item_row[order], rating[order] >= 4

    genres, item_genres = genres_of(items)
    zip_area = users.frame["zip_code"].astype(str).str[:1].astype("category").cat.codes.to_numpy().astype(np.int64) + 1
    columns = {
        "user": user_row + 1,
        "age": users.ids("age")[user_row],
        "gender": users.ids("gender")[user_row],
        "occupation": users.ids("occupation")[user_row],
        "zip_area": zip_area[user_row],
        "release_year": items.ids("release_year")[item_row],
        "item": item_row + 1,
    }
    fields = [Field(name, "sparse", int(ids.max()) + 1) for name, ids in columns.items()]
    columns["genres"] = item_genres[item_row]
    fields.append(Field("genres", "multi", len(genres) + 1, padded=True))
    if model == "din":
        item = fields.pop(-2)
        fields += [
            Field("item", "target", item.vocab_size, padded=True),
            Field("genre", "target", len(genres) + 1, padded=True),
            Field("history_item", "history", item.vocab_size, "item", padded=True),
            Field("history_genre", "history", len(genres) + 1, "genre", padded=True),
        ]
        past = histories(user_row, liked)
        columns["genre"] = columns["genres"][:, 0]
        columns["history_item"] = np.append(columns["item"], 0)[past]
        columns["history_genre"] = np.append(columns["genre"], 0)[past]
    columns["label"] = liked.astype(np.float32)
    after, ratings_of_user = position_from_end(user_row)
    return Dataset.split("MovieLens-100k", fields, columns, after < ratings_of_user // 5)


# -------------------------------------------------------------------------------------------------------- your files


CRITEO = ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
CRITEO_FORMAT = "40 tab-separated columns (label, 13 numbers, 26 categories)"
FORMATS = f"{CRITEO_FORMAT} or 3 columns (user, item, time) separated by tabs or commas"


def from_file(path: Path, seed: int) -> tuple[str, Dataset]:
    """A Criteo-format file for DeepFM or a file of interactions for DIN, told apart by the number of columns."""
    try:
        with open_bytes(path) as file:
            first = file.readline()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            path, None, f"expected {FORMATS}, cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not first:
        raise DataError(path, 1, f"expected {FORMATS}, got an empty file")
    cells = first.rstrip(b"\r\n").split(b"\t")
    if len(cells) == len(CRITEO):
        return "deepfm", criteo(path)
    separator = "\t" if len(cells) > 1 else ","
    cells = first.rstrip(b"\r\n").split(separator.encode())
    if len(cells) != 3:
        raise DataError(path, 1, f"expected {FORMATS}, got {len(cells)}")
    has_header = not np.isfinite(pd.to_numeric(cells[2].decode(errors="replace"), errors="coerce"))
    return "din", interactions(path, separator, has_header, seed)


def criteo(path: Path) -> Dataset:
    """Criteo's display-advertising format; the last 20 % of the lines, which are in order of time, are the test part.

    Numbers become sign(x)·ln(1 + |x|), 0 where empty; categories are numbered by frequency in the training part.
    """
    table = Table.read(path, CRITEO, CRITEO_FORMAT)
    label = table.numbers("label", "0 or 1", choices=(0, 1)).astype(np.float32)
    is_test = np.arange(len(label)) >= len(label) - len(label) // 5
    if any(len(np.unique(label[rows])) < 2 for rows in (is_test, ~is_test)):
        raise DataError(path, len(label), "expected both labels among the first 80 % and the last 20 % of the lines")
    columns, fields = {}, []
    for name in CRITEO[1:14]:
        x = table.numbers(name, "a number or nothing", empty=0.0)
        columns[name] = (np.sign(x) * np.log1p(np.abs(x))).astype(np.float32)
        fields.append(Field(name, "dense"))
    for name in CRITEO[14:]:
        codes = table.frame[name].cat.codes.to_numpy()
        count = np.bincount(codes[~is_test], minlength=codes.max() + 1)
        by_count = np.argsort(-count, kind="stable")
        vocabulary = by_count[: np.count_nonzero(count >= CRITEO_MIN_COUNT)]
        number = np.zeros(len(count), np.int64)
        number[vocabulary] = np.arange(1, len(vocabulary) + 1)
        columns[name] = number[codes]
        fields.append(Field(name, "sparse", len(vocabulary) + 1))
    return Dataset.split(path.name, fields, {**columns, "label": label}, is_test)


def interactions(path: Path, separator: str, has_header: bool, seed: int) -> Dataset:
    """Next-item prediction: each interaction is a positive, beside a negative drawn from what its user never touched.

    The last interaction of each user by time is the test part; a user's first one has no history and is only history.
    """
    table = Table.read(path, ["user", "item", "time"], "3 columns (user, item, time)", separator, has_header)
    time, user, item = table.numbers("time"), table.ids("user"), table.ids("item")
    order = np.lexsort((item, time, user))
    user, item = user[order], item[order]
    items = int(item.max())
    after, in_all = position_from_end(user)

    # The r-th unseen item is r plus the number of seen ones up to it, which is the number of seen ones s_j (ascending)
    # with s_j - j <= r. One sorted array serves all users: user u's part of it lies in [u·stride, (u + 1)·stride).
    stride = items + 1
    seen_user, seen_item = np.divmod(np.unique(user * stride + item), stride)
    first_seen, end_seen = np.searchsorted(seen_user, user), np.searchsorted(seen_user, user, side="right")
    gaps = seen_user * stride + seen_item - (np.arange(len(seen_item)) - np.searchsorted(seen_user, seen_user))
    unseen = items - (end_seen - first_seen)
    r = 1 + (np.random.default_rng(seed).random(len(user)) * unseen).astype(np.int64)
    negative = r + np.searchsorted(gaps, user * stride + r, side="right") - first_seen

    rows = (after < in_all - 1) & (unseen > 0)
    if not (rows & (after > 0)).any() or not (rows & (after == 0)).any():
        message = "expected at least one user with three interactions or more, and an item that this user never touched"
        raise DataError(path, table.first_line + len(user) - 1, message)
    past = np.append(item, 0)[histories(user, np.ones(len(user), bool))][rows]
    columns = {
        "user": np.tile(user[rows], 2),
        "item": np.concatenate([item[rows], negative[rows]]),
        "history_item": np.tile(past, (2, 1)),
        "label": np.repeat(np.float32([1, 0]), rows.sum()),
    }
    fields = [
        Field("user", "sparse", int(user.max()) + 1),
        Field("item", "target", items + 1, padded=True),
        Field("history_item", "history", items + 1, "item", padded=True),
    ]
    return Dataset.split(path.name, fields, columns, np.tile(after[rows] == 0, 2))


# --------------------------------------------------------------------------------------------------------- synthetic


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def draw(name, rng, fields, columns, logit) -> Dataset:
    """Labels drawn from sigmoid(logit); the last fifth of the rows is the test part."""
    probability = sigmoid(logit)
    columns["label"] = (rng.random(len(logit)) < probability).astype(np.float32)
    return Dataset.split(name, fields, columns, np.arange(len(logit)) >= len(logit) * 4 // 5, probability)


def synthetic_deepfm(seed: int, rows: int = 100_000) -> Dataset:
    """Eight categories and two numbers x: logit = -1 + Σ_f w_f + Σ_{f<g} ⟨v_f, v_g⟩ + x_1 - x_2 / 2, D = 4."""
    rng = np.random.default_rng(seed)
    vocab_sizes = {"user": 1000, "ad": 500, "site": 200, "app": 100, "city": 50, "hour": 24, "device": 10, "slot": 5}
    columns = {name: rng.integers(size, size=rows) for name, size in vocab_sizes.items()}
    w = np.stack([rng.normal(0, 0.4, size)[columns[name]] for name, size in vocab_sizes.items()], 1)
    v = np.stack([rng.normal(0, 0.3, (size, 4))[columns[name]] for name, size in vocab_sizes.items()], 1)
    fields = [Field(name, "sparse", size) for name, size in vocab_sizes.items()]
    x = rng.normal(size=(rows, 2)).astype(np.float32)
    columns |= {"x_1": x[:, 0], "x_2": x[:, 1]}
    fields += [Field("x_1", "dense"), Field("x_2", "dense")]
    pairs = (v.sum(1) ** 2 - (v**2).sum(1)).sum(1) / 2
    return draw("synthetic (factorization machine)", rng, fields, columns, -1 + w.sum(1) + pairs + x @ [1, -0.5])


def zipf_clicks(name: str, vocab_sizes: tuple[int, ...], numbers: int, rows: int, seed: int) -> Dataset:
    """Categories whose id of rank r is drawn in proportion to r^-1.05, and numbers x: logit = -1 + Σ_f w_f + Σ_{f<g}
    ⟨v_f, v_g⟩ + Σ x / 5, with w and v (of width 4) such that their two sums have the variance 1 each."""
    rng, fields, columns, w, v = np.random.default_rng(seed), [], {}, [], []
    F = len(vocab_sizes)
    for f, size in enumerate(vocab_sizes):
        cumulated = (np.arange(1, size + 1) ** -1.05).cumsum()
        rank = np.minimum(np.searchsorted(cumulated, rng.random(rows) * cumulated[-1]), size - 1)
        columns[f"c_{f}"] = ids = rng.permutation(size)[rank]
        fields.append(Field(f"c_{f}", "sparse", size))
        w.append(rng.normal(0, F**-0.5, size)[ids])
        v.append(rng.normal(0, (2 * F * (F - 1)) ** -0.25, (size, 4))[ids])
    x = rng.normal(size=(rows, numbers)).astype(np.float32)
    columns |= {f"x_{i}": x[:, i] for i in range(numbers)}
    fields += [Field(f"x_{i}", "dense") for i in range(numbers)]
    pairs = (np.sum(v, 0) ** 2 - np.sum(np.square(v), 0)).sum(1) / 2
    return draw(name, rng, fields, columns, -1 + np.sum(w, 0) + pairs + x.sum(1) / 5)


def synthetic_din(seed: int, rows: int = 100_000) -> Dataset:
    """Users with two favourite categories of twenty: logit = -2 + a_item + b_group + 1.5 ln(1 + m), m being the number
    of items in the history that are of the target's category."""
    rng = np.random.default_rng(seed)
    categories, items, groups = 20, 1000, 10
    favourites = rng.integers(categories, size=(rows, 2))

    def items_of_interest(share, length):
        """Item ids from 1; an item's category is (id - 1) mod 20. ``share`` of them are of a favourite category."""
        favourite = favourites[np.arange(rows)[:, None], rng.integers(2, size=(rows, length))]
        category = np.where(
            rng.random((rows, length)) < share, favourite, rng.integers(categories, size=(rows, length))
        )
        return 1 + category + categories * rng.integers(items // categories, size=(rows, length))

    history_item, item = items_of_interest(0.6, HISTORY_LENGTH), items_of_interest(0.5, 1)[:, 0]
    history_item[np.arange(HISTORY_LENGTH) >= rng.integers(HISTORY_LENGTH + 1, size=(rows, 1))] = 0
    category, history_category = [np.where(ids > 0, (ids - 1) % categories + 1, 0) for ids in (item, history_item)]
    group = rng.integers(groups, size=rows)
    matches = (history_category == category[:, None]).sum(1)
    logit = -2 + rng.normal(0, 0.5, items + 1)[item] + rng.normal(0, 0.5, groups)[group] + 1.5 * np.log1p(matches)
    fields = [
        Field("group", "sparse", groups),
        Field("item", "target", items + 1, padded=True),
        Field("category", "target", categories + 1, padded=True),
        Field("history_item", "history", items + 1, "item", padded=True),
        Field("history_category", "history", categories + 1, "category", padded=True),
    ]
    columns = {
        "group": group,
        "item": item,
        "category": category,
        "history_item": history_item,
        "history_category": history_category,
    }
    return draw("synthetic (interest)", rng, fields, columns, logit)
