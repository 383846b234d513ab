"""A recipe holds what the command line takes, and nothing in it is ever ignored."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from graphprune.errors import RecipeError
from graphprune.iterating import Iterating
from graphprune.recipe import Recipe, parse, read

FULL = """
source = "nets:small"
target = "arm"
out = "build/small"
backend = "auto"
inputs = ["1x3x8x8"]
providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
dynamic-batch = true
threads = 2
verify = true
measure = false
overwrite = true
compress = "zstd"
seed = 3
calibration = "data:batches"
evaluate = "data:accuracy"
dump = "stages"
macs = 0.5
params = 1000
bytes = 4096.0
latency = "5ms"
repair = false
precision = "int8"
max-drop = 0.01
allow-float = true

[[passes]]
name = "clean-up"

[[passes]]
name = "fold-constants"
max-bytes = 4096
"""
ITERATE = """
[iterate]
data = "training:batches"
loss = "training:loss"
optimizer = "training:optimizer"
distil = "training:terms"
temperature = 4
alpha = 0.9
macs = 0.5
params = 100
per-round = 0.05
epochs = 3
lr = 0.001
clip = 2
repair = false
directory = "state"

[iterate.pruning]
align = 4
"""


def test_every_option(tmp_path: Path) -> None:
    path = tmp_path / "graphprune.toml"
    path.write_text(FULL)
    recipe = read(path)
    assert recipe == Recipe(
        source="nets:small", target="arm", out="build/small", backend="auto", inputs=("1x3x8x8",),
        pipeline="clean-up,fold-constants{max-bytes=4096}", dynamic_batch=True, threads=2, verify=True,
        measure=False, overwrite=True, compress="zstd", seed=3, calibration="data:batches",
        evaluate="data:accuracy", dump="stages", macs=0.5, params=1000, bytes=4096.0, latency="5ms",
        repair=False, precision="int8", max_drop=0.01, allow_float=True, directory=tmp_path,
        providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
    )  # fmt: skip
    assert recipe.path("out") == tmp_path / "build" / "small"
    assert all(getattr(recipe, f.name) is not None for f in fields(Recipe) if f.name != "iterate")


def test_the_table_of_rounds() -> None:
    table = parse(ITERATE).iterate
    assert table == Iterating(
        data="training:batches", loss="training:loss", optimizer="training:optimizer",
        distil="training:terms", temperature=4, alpha=0.9, macs=0.5, params=100, per_round=0.05, epochs=3,
        lr=0.001, clip=2, repair=False, directory="state", pruning={"align": 4},
    )  # fmt: skip
    assert all(getattr(table, f.name) is not None for f in fields(Iterating))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iterate = 3", "must be a table"),
        ('[iterate]\nloss = "a:b"', r"\[iterate\] needs data"),
        (ITERATE.replace("per-round", "per-rund"), "did you mean 'per-round'"),
        (ITERATE.replace("align = 4", "alignn = 4"), r"\[iterate.pruning\]: .*did you mean 'align'"),
        (
            ITERATE.replace("temperature = 4\n", "").replace('distil = "training:terms"\n', ""),
            "there are none; give temperature as well",
        ),
        (ITERATE.replace("epochs = 3", "epochs = 3.5"), "epochs in .* must be a whole number"),
        (ITERATE.replace("repair = false", "repair = 0"), "repair in .* must be true or false"),
        *((f"{name} = 0.5{ITERATE}", "has the budget") for name in ("macs", "params", "bytes")),
        (f"latency = '5ms'{ITERATE}", "has the budget"),
    ],
)
def test_a_table_of_rounds_that_would_be_ignored_in_part(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(text)


def test_flags_override() -> None:
    recipe = parse('target = "arm"\nthreads = 2\nverify = true').override(
        threads=4, verify=False, target=None
    )
    assert (recipe.target, recipe.threads, recipe.verify) == ("arm", 4, False)


def test_a_latency_is_a_share_or_a_time() -> None:
    assert parse("latency = 0.5").latency == parse('latency = "0.5"').latency == "0.5"
    with pytest.raises(RecipeError, match="latency must be a text, not True"):
        parse("latency = true")


def test_underscores_read_as_dashes() -> None:
    assert parse("dynamic_batch = true").dynamic_batch is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            'taget = "arm"',
            r"unknown key 'taget' \(did you mean 'target'\?\); known: allow-float, backend, bytes",
        ),
        ("threads = true", "threads must be a whole number, not True"),
        ('verify = "yes"', "verify must be true or false, not 'yes'"),
        ("out = 3", "out must be a text, not 3"),
        ("inputs = [1, 2]", "inputs must be a list of texts"),
        ('pipeline = "clean-upp"', "did you mean 'clean-up'"),
        ('pipeline = "clean-up,"', "ends with a comma"),
        ('pipeline = "clean-up"\n[[passes]]\nname = "clean-up"', "either pipeline or"),
        ('[[passes]]\nmax-bytes = 3\nname = "fold-constants"\n[[passes]]\nx = 1', "pass 2 .* has no name"),
        (
            '[[passes]]\nname = "fold-constants"\nmax-byte = 3',
            "no option 'max-byte' .did you mean 'max-bytes'",
        ),
        ('[passes]\nname = "clean-up"', r"\[\[passes\]\] tables"),
        ("target = arm", "line 1"),
    ],
)
def test_a_mistake_names_the_file_and_the_key(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*absent\.toml: No such file"):
        read(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*binary\.toml"):
        read(tmp_path / "binary.toml")
