"""The command line of the fits: any table in, one JSON out, and one clear line for whatever is wrong."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from peerscale.errors import exit_code
from programs import program as script

fit = script("fit")
SURFACE = ["--params", "N", "--tokens", "D", "--loss", "loss"]


def surface_loss(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return 1.8 + 480 / n**0.34 + 2100 / d**0.37


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two methods' runs, seven sizes for each of four budgets, the second with half the loss above 1.8."""
    rng = np.random.default_rng(0)
    rows = []
    for c in (1e18, 1e19, 1e20, 1e21):
        for factor in np.geomspace(0.25, 4, 7):
            n = 0.09 * c**0.5 * factor
            loss = surface_loss(n, c / (6 * n)) + 0.002 * rng.standard_normal()
            rows += [(c, n, c / (6 * n), loss, "dense"), (c, n, c / (6 * n), 0.9 + loss / 2, "peer")]
    path = tmp_path / "runs.csv"
    pd.DataFrame(rows, columns=["C", "N", "D", "loss", "method"]).to_csv(path, index=False)
    return path


def run(*arguments: object) -> int:
    return exit_code(lambda: fit.main([str(argument) for argument in arguments]))


def test_parametric(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "fit.json"
    where = "method == 'dense'"
    assert run("parametric", table, *SURFACE, "--where", where, "--bootstrap", 200, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "28 runs" in printed and "alpha" in printed and "[" in printed and str(out) in printed
    stored = json.loads(out.read_text())
    assert stored["law"] == "parametric" and stored["n"] == 28 and stored["objective_name"] == "huber-log"
    assert stored["source"] == {
        "table": "runs.csv", "where": where, "params": "N", "tokens": "D", "flops": None, "loss": "loss",
        "objective": "huber-log", "delta": 1e-3,
    }  # fmt: skip
    assert stored["ci"]["a"][0] < stored["a"] < stored["ci"]["a"][1]


def test_flops_and_objective(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "fit.json"
    options = ("--where", "method == 'dense'", "--bootstrap", 0, "--out", out)
    assert run("parametric", table, "--params", "N", "--flops", "C", "--loss", "loss", *options) == 0
    by_flops = json.loads(out.read_text())
    assert run("parametric", table, *SURFACE, *options) == 0
    assert json.loads(out.read_text())["alpha"] == pytest.approx(by_flops["alpha"], abs=1e-6)
    assert by_flops["ci"] == {} and by_flops["bootstrap"] is None
    assert run("parametric", table, *SURFACE, "--objective", "mse", *options) == 0
    assert json.loads(out.read_text())["objective_name"] == "mse"


def test_isoflop_by_method(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fit.json"
    columns = ("--budget", "C", "--x", "N", "--loss", "loss")
    assert run("isoflop", table, *columns, "--by", "method", "--bootstrap", 100, "--out", out) == 0
    stored = json.loads(out.read_text())
    assert list(stored["groups"]) == ["dense", "peer"] and stored["n"] == 56
    assert {"law", "n", "status", "objective_name", "objective_value", "ci"} <= stored.keys()
    dense, peer = stored["groups"].values()
    assert dense["exponent"] == pytest.approx(peer["exponent"], abs=1e-6)  # the same losses, halved
    assert [optimum["budget"] for optimum in dense["vertices"]] == [1e18, 1e19, 1e20, 1e21]
    assert len(dense["vertices"][0]["x_interval"]) == 2
    assert "method = peer" in capsys.readouterr().out


def test_flagged_minima_are_shown_and_optional(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = pd.read_csv(table).query("method == 'dense'")
    concave = runs["C"] == 1e18
    runs.loc[concave, "loss"] = 8 - runs.loc[concave, "loss"]
    outside = runs["C"] == 1e19
    runs.loc[outside, "loss"] = 2 + (np.log10(runs.loc[outside, "N"]) - 20) ** 2 / 100
    runs.to_csv(table, index=False)
    arguments = ("isoflop", table, "--budget", "C", "--x", "N", "--loss", "loss", "--out", tmp_path / "fit.json")
    assert run(*arguments) == 0
    printed = capsys.readouterr().out
    assert "curvature" in printed and "outside_range" in printed and "no exponent: 2 usable budgets" in printed
    assert json.loads((tmp_path / "fit.json").read_text())["exponent"] is None
    assert run(*arguments, "--include-flagged") == 0
    assert json.loads((tmp_path / "fit.json").read_text())["exponent"] is not None


def test_routed_and_granular(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes, counts = (grid.ravel() for grid in np.meshgrid([1.5e7, 1e8, 1e9], [1, 2, 8, 32, 128, 512]))
    routed = 10 ** (1.1 - 0.08 * np.log10(sizes) - 0.04 * np.log10(2 * counts / (1 + counts / 300)))
    pd.DataFrame({"N": sizes, "E": counts, "loss": routed}).to_csv(tmp_path / "routed.csv", index=False)
    n, d, g = (grid.ravel() for grid in np.meshgrid([1e8, 5e8, 3e9], [1e10, 6e10, 2e11], [1, 4, 16]))
    granular = 0.47 + (2.1 / g**0.58 + 18.1) / n**0.115 + 30.8 / d**0.147
    pd.DataFrame({"N": n, "D": d, "G": g, "loss": granular}).to_csv(tmp_path / "granular.csv", index=False)
    out = tmp_path / "fit.json"
    routed_columns = ("--dense-params", "N", "--experts", "E", "--loss", "loss")
    assert run("routed", tmp_path / "routed.csv", *routed_columns, "--bootstrap", 20, "--out", out) == 0
    stored = json.loads(out.read_text())
    assert {"a", "b", "c", "d", "E_start", "E_max", "rms_log10", "ci"} <= stored.keys()
    granular_columns = ("--params", "N", "--tokens", "D", "--granularity", "G", "--loss", "loss")
    assert run("granular", tmp_path / "granular.csv", *granular_columns, "--bootstrap", 0, "--out", out) == 0
    assert json.loads(out.read_text())["gamma"] == pytest.approx(0.58, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, ["--params", "M"], "no column 'M' in the table; there are: C, N, D, loss, method"),
        ({"loss": "nan"}, [], "column 'loss' must hold finite numbers above 0, not so in line 5: nan"),
        ({"N": "-3"}, [], "'N' must hold finite numbers above 0, not so in line 5: -3"),
        ({"D": "inf"}, [], "'D' must hold finite numbers above 0, not so in line 5: inf"),
        ({"D": "1,000"}, [], "'D' must hold finite numbers above 0, not so in line 5: 1,000"),
        ({}, ["--budget", "budget"], "no column 'budget'"),
        ({}, ["--where", "@pd.io.common.os.getcwd() > 0"], "--where"),
        ({}, ["--where", "C < 2e18 and N < 4e7"], "too few for the parametric law: it has 5 coefficients"),
        ({}, ["--where", "C > 1e30"], "leaves none of the 56 rows"),
        ({}, ["--where", "C >"], "--where 'C >': invalid syntax"),
        ({}, ["--where", "budget > 3"], "name 'budget' is not defined; columns: C, N, D"),
        ({}, ["--where", "N"], "is not a condition on rows"),
        ({}, ["--where", "N = 3"], "is not a condition on rows"),
        ({}, ["--where", "method > 3"], "--where 'method > 3'"),
        ({}, ["--flops", "C"], "exactly one of tokens and flops"),
        ({}, ["--cluster", "run"], "no column 'run'"),
    ],
)
def test_bad_input_is_one_line(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, options: list, message: str
) -> None:
    runs = pd.read_csv(table).astype(object)
    for column, value in change.items():
        runs.loc[3, column] = value
    runs.to_csv(table, index=False)
    out = tmp_path / "fit.json"
    assert run("parametric", table, *SURFACE, "--out", out, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists()


def test_one_budget_is_refused(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ("--where", "C == 1e20", "--out", tmp_path / "fit.json")
    assert run("isoflop", table, "--budget", "C", "--x", "N", "--loss", "loss", *one) == 2
    assert run("parametric", table, "--params", "N", "--flops", "C", "--loss", "loss", *one) == 2
    assert capsys.readouterr().err.count("holds one budget, 1e+20") == 2
    few = ("--where", "N < 1.6e8 and C < 2e19", "--out", tmp_path / "fit.json")
    assert run("isoflop", table, "--budget", "D", "--x", "N", "--loss", "loss", *few) == 2
    assert "three different sizes" in capsys.readouterr().err


def test_unreadable_files(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.csv"
    empty.touch()
    for path in (tmp_path / "none.csv", tmp_path, empty):
        assert run("parametric", path, *SURFACE, "--out", tmp_path / "fit.json") == 2
    assert run("parametric", table, *SURFACE, "--bootstrap", 0, "--out", tmp_path) == 2
    assert run("parametric", table, *SURFACE, "--bootstrap", 0, "--out", table / "fit.json") == 2
    errors = capsys.readouterr().err
    assert errors.count("error: ") == errors.count("\n") == 5 and "Traceback" not in errors


def test_unfit_numbers_are_refused(table: Path, tmp_path: Path) -> None:
    for option in (("--delta", "0"), ("--delta", "x"), ("--bootstrap", "-1"), ("--seed", "1.5"), ("--objective", "l1")):
        assert run("parametric", table, *SURFACE, *option, "--out", tmp_path / "fit.json") == 2


def test_duplicates_are_named(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = pd.read_csv(table).query("method == 'dense'")
    pd.concat([runs, runs.head(1)]).to_csv(table, index=False)
    assert run("parametric", table, *SURFACE, "--bootstrap", 0, "--out", tmp_path / "fit.json") == 0
    assert "1 duplicated rows, kept and so counted again: line 30" in capsys.readouterr().out


def test_the_commands_of_the_help_text_can_be_typed() -> None:
    text = (fit.__doc__ or "").replace("\\\n", " ")
    commands = [line.split() for line in text.splitlines() if line.startswith("    ")]
    assert {words[2] for words in commands} == {*fit.COMMANDS}
    for python, program, *words in commands:
        assert f"{python} {program}" == fit.PROGRAM == fit.parser().prog
        fit.parser().parse_args(words)


def test_the_largest_budget_is_held_out_and_shown(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fit.json"
    options = ("--where", "method == 'dense'", "--bootstrap", 100, "--out", out)
    assert run("parametric", table, *SURFACE, "--budget", "C", *options) == 0
    assert "held out from 1e+21: loss of 7: " in capsys.readouterr().out
    assert json.loads(out.read_text())["hold_out"]["n"] == 7
    assert run("parametric", table, *SURFACE, "--hold-out", "5e19", *options) == 0
    assert json.loads(out.read_text())["hold_out"]["n"] == 14
    assert run("isoflop", table, "--budget", "C", "--x", "N", "--loss", "loss", *options) == 0
    assert "held out from 1e+21: N of 1: " in (printed := capsys.readouterr().out)
    assert "exponent of approach 3 on the same runs 0.5" in printed


def test_odd_names_measured_budgets_and_mixtures(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = pd.read_csv(table).query("method == 'dense'").drop(columns="method")
    rng = np.random.default_rng(0)
    runs["C"] *= 1 + 0.02 * rng.uniform(-1, 1, len(runs))
    runs["Tokenizer"] = np.where(runs.index % 4, "bpe", "bytes")
    runs["N"] = runs["N"].round().astype("int64") * 10**6  # 6 N D is beyond int64
    runs["D"] = runs["D"].round().astype("int64")
    runs.columns = ["Training FLOP's", "# Params (non-emb)", " tokens", "Loss, nats", "Tokenizer"]
    runs.to_csv(table, index=False)
    out = tmp_path / "fit.json"
    columns = ("--budget", "Training FLOP's", "--x", "# Params (non-emb)", "--loss", "Loss, nats", "--out", out)
    assert run("isoflop", table, *columns) == 2
    assert "three different sizes" in (error := capsys.readouterr().err) and "--tolerance .1" in error
    assert run("isoflop", table, *columns, "--tolerance", ".1", "--bootstrap", 0) == 0
    stored = json.loads(out.read_text())
    assert [optimum["n"] for optimum in stored["vertices"]] == [7] * 4 and stored["exponent"] == pytest.approx(
        0.5, abs=0.1
    )
    assert "column 'Tokenizer' mixes bytes, bpe" in capsys.readouterr().out
    options = ("--params", "# Params (non-emb)", "--tokens", "tokens", "--loss", "Loss, nats", "--out", out)
    assert run("parametric", table, *options, "--where", "`# Params (non-emb)` > 1e9", "--bootstrap", 0) == 0
    assert json.loads(out.read_text())["n"] == 28


def test_rates_of_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"layer": layer, "d": d, "D": tokens, "lr": best * factor, "L": 4 + 0.05 * np.log(factor) ** 2}
        for layer, m in (("dense", 0.004), ("peer", 0.006))
        for d, tokens in ((32, 2e6), (64, 2e6), (64, 1e7), (96, 1e7))
        for best in [m * (d / 64) ** -0.5 * (tokens / 1e7) ** -0.3]
        for factor in (0.5, 1.0, 2.0)
    ]
    path, out = tmp_path / "rates.csv", tmp_path / "fit.json"
    pd.DataFrame(rows).to_csv(path, index=False)
    columns = ("--lr", "lr", "--loss", "L", "--width", "d", "--tokens", "D", "--by", "layer", "--out", out)
    assert run("rates", path, *columns, "--hold-out", "d == 96") == 0
    printed = capsys.readouterr().out
    assert "18 runs on 6 curves" in printed and "one set of exponents for all: F" in printed
    assert "held out dense 96 1e+07: best 0.00327, predicted 0.00327, costs" in printed
    stored = json.loads(out.read_text())
    assert stored["groups"]["peer"]["a"] == pytest.approx(0.5) and stored["groups"]["peer"]["b"] == pytest.approx(0.3)
    assert stored["source"]["hold_out"] == "d == 96" and stored["held_out_cost"] == pytest.approx(0, abs=1e-9)
    assert run("rates", path, *columns, "--hold-out", "d == 5") == 2
    assert "--hold-out 'd == 5' holds out none of the 24 rows" in capsys.readouterr().err
    assert run("rates", path, *columns, "--hold-out", "d") == 2
    assert "--hold-out 'd' is not a condition on rows" in capsys.readouterr().err


@pytest.mark.parametrize(("a", "b", "own"), [(0.5, 0.3, False), (0.0, 0.6, True)])
def test_each_method_is_shown_with_its_own_exponents_unless_the_test_lets_them_share(
    a: float, b: float, own: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"layer": layer, "d": d, "D": tokens, "lr": best * factor, "L": 4 + 0.05 * np.log(factor) ** 2 + error}
        for layer, m, (of_d, of_tokens) in (("dense", 0.004, (0.5, 0.3)), ("peer", 0.006, (a, b)))
        for d, tokens in ((32, 2e6), (64, 2e6), (64, 1e7), (96, 1e7))
        for best in [m * (d / 64) ** -of_d * (tokens / 1e7) ** -of_tokens]
        for factor in (0.5, 1.0, 2.0)
        for error in [1e-4 * rng.standard_normal()]
    ]
    path, out = tmp_path / "rates.csv", tmp_path / "fit.json"
    pd.DataFrame(rows).to_csv(path, index=False)
    columns = ("--lr", "lr", "--loss", "L", "--width", "d", "--tokens", "D", "--by", "layer", "--out", out)
    assert run("rates", path, *columns) == 0
    printed = capsys.readouterr().out
    shown = [(name, float(value)) for name, value in re.findall(r"^ {4}([abc]) +(\S+)", printed, re.MULTILINE)]
    assert [name for name, _ in shown] == ["a", "b"] * 2
    expected = [0.5, 0.3, a, b] if own else [0.5, 0.3] * 2
    assert [value for _, value in shown] == pytest.approx(expected, abs=0.02)
    assert ("own exponents" in printed) == own
