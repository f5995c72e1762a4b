"""The command line: wrong input is one line and the right exit code, and help needs no torch."""

import json
import subprocess
import sys

import pytest

RECIPE = '''"""A tiny audit. Second sentence.

More text.
"""
from qleak.attacks import cells, idlg
from qleak.catalog import build
from qleak.channels import chain, identity, uniform
from qleak.plans import Audit


def tiny(bits: int = 8, steps: int = 2, data: str = "mnist5k", full: bool = False) -> Audit:
    """The plan.

    Args:
        bits: bits of the quantizer,
            on two lines.
        steps: closures of a stage.
    """
    return Audit(
        model=build("models", "lenet(channels=1, size=28, classes=10, width=2)"), data=data, victims=(3, 4000),
        channels=(identity(), chain(uniform(bits=bits))),
        attacks=(idlg(outer=1, inner=2), cells(stages=1, steps=steps, last=1)), bounds="no",
    )
'''


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(RECIPE)
    return str(path)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["recipe", "run", "pretraned_int8"], "Unknown recipe 'pretraned_int8'. Did you mean 'pretrained_int8'?"),
        (["recipe", "show", "nothing_like_it"], "Unknown recipe 'nothing_like_it'."),
        (["recipe", "run", "./absent.py"], "Expected a recipe file at ./absent.py, found none."),
        (["recipe", "run", "pretrained_int8", "--bits", "0"], "Expected bits=0 in [1, 24]."),
        (["recipe", "run", "pretrained_int8", "--victims", "0"], "Expected victims=0 >= 1."),
        (["recipe", "run", "pretrained_int8", "--model", "lenett"], "Unknown model 'lenett'. Did you mean 'lenet'?"),
        (["recipe", "run", "pretrained_int8", "--device", "tpu9"], "Expected a device of this machine, --device tpu9"),
        (["recipe", "run", "pretrained_int8", "--workers", "-1"], "Expected workers=-1 >= 0."),
        (["recipe", "run", "pretrained_int8", "--config", "no.json"], "Expected a readable --config file: no.json"),
        (["recipe", "run", "pretrained_int8", "--name", "a/b"], "Expected --name 'a/b' of letters"),
        (["ls", "chanels"], "Did you mean 'channels'?"),
        (["report", "nowhere"], "Expected a run folder"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(qleak, argv, text):
    code, _, err = qleak(*argv)
    assert code == 2
    last = [line for line in err.splitlines() if line.startswith("qleak: ")]
    assert len(last) == 1
    assert text in last[0]


def test_an_unknown_flag_is_refused_by_name(qleak):
    code, _, err = qleak("recipe", "run", "pretrained_int8", "--bitz", "3")
    assert code == 2
    assert "--bitz" in err


def test_unknown_and_malformed_config(qleak, tiny, tmp_path):
    file = tmp_path / "flags.json"
    file.write_text('{"bit": 4}')
    code, _, err = qleak("recipe", "run", tiny, "--config", file)
    assert (code, err.strip()) == (2, f"qleak: Unknown key 'bit' in --config {file}. Did you mean 'bits'?")
    file.write_text("{")
    assert qleak("recipe", "run", tiny, "--config", file)[0] == 2


def test_a_run_writes_its_folder_and_config_repeats_it(qleak, tiny, tmp_path):
    toml = tmp_path / "flags.toml"
    toml.write_text("bits = 5\nsteps = 3\nworkers = 1\n")
    more = ("--steps", 2, "--seed", 7, "--bounds", "yes", "--film", 2)
    code, out, err = qleak("recipe", "run", tiny, "--config", toml, *more)
    assert code == 0, err
    assert "Verdict:" in out
    (folder,) = (tmp_path / "runs").iterdir()
    header = json.loads((folder / "run.json").read_text())
    assert header["status"] == "done"
    assert (header["flags"]["bits"], header["flags"]["steps"], header["plan"]["seed"]) == (5, 2, 7)
    assert (folder / "report.html").stat().st_size > 1000
    assert (folder / "bounds.jsonl").read_text()
    assert list((folder / "tensors").glob("film-*"))
    rows = (folder / "rows.jsonl").read_text().splitlines()
    code, out, _ = qleak("recipe", "run", tiny, "--config", folder / "run.json", "--json")
    assert code == 0
    assert json.loads(out)["plan_id"] == header["plan_id"]
    assert (folder / "rows.jsonl").read_text().splitlines() == rows  # nothing was run again


def test_the_gate_and_names(qleak, tiny, tmp_path):
    code, _, err = qleak("recipe", "run", tiny, "--name", "ci", "--workers", 1, "--quiet", "--fail-above", 0.1)
    assert code == 3
    assert "exceeds --fail-above 0.1" in err
    assert [p.name for p in (tmp_path / "runs").glob("ci_*")]
    assert qleak("recipe", "run", tiny, "--name", "ci", "--workers", 1, "--quiet", "--fail-above", 500)[0] == 0


def test_unwritable_out_is_a_failure_of_the_run(qleak, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = qleak("recipe", "run", tiny, "--out", tmp_path / "file" / "below", "--quiet", "--workers", 1)
    assert code == 1
    assert "Not a directory" in err


def test_a_corrupt_tail_is_dropped_and_done_again(qleak, tiny, tmp_path):
    assert qleak("recipe", "run", tiny, "--workers", 1, "--quiet")[0] == 0
    (folder,) = (tmp_path / "runs").iterdir()
    rows = folder / "rows.jsonl"
    whole = rows.read_text()
    rows.write_text(whole[:-40])
    code, _, err = qleak("recipe", "run", tiny, "--workers", 1)
    assert code == 0, err
    strip = lambda text: sorted(json.loads(line)["key"] for line in text.splitlines())  # noqa: E731
    assert strip(rows.read_text()) == strip(whole)


def test_bad_data_is_one_line(qleak, tiny, tmp_path):
    import numpy as np

    (tmp_path / "pics").mkdir()
    assert qleak("recipe", "run", tiny, "--data", "./pics", "--quiet", "--workers", 1)[0] == 2
    x = np.full((5, 1, 28, 28), np.nan, dtype=np.float32)
    np.savez(tmp_path / "nan.npz", x_train=x, y_train=np.zeros(5, np.int64), x_test=x, y_test=np.zeros(5, np.int64))
    code, _, err = qleak("recipe", "run", tiny, "--data", "./nan.npz", "--quiet", "--workers", 1)
    assert code == 2
    assert "NaN" in err or "finite" in err


def test_dry_run_runs_nothing(qleak, tiny, tmp_path):
    code, _, err = qleak("recipe", "run", tiny, "--dry-run", "--workers", 1)
    assert code == 0
    assert "Nothing was run" in err
    assert "memory" in err
    assert not (tmp_path / "runs").exists()


def test_recipe_help_lists_its_own_flags(qleak, tiny):
    code, out, _ = qleak("recipe", "run", tiny, "--help")
    assert code == 0
    assert "--bits" in out
    assert "on two lines" in " ".join(out.split())
    assert "--fail-above" in out


def test_copy_and_show(qleak, tmp_path):
    assert qleak("recipe", "copy", "pretrained_int8", "mine.py")[0] == 0
    assert qleak("recipe", "copy", "pretrained_int8", "mine.py")[0] == 2
    code, out, _ = qleak("recipe", "show", "pretrained_int8")
    assert code == 0
    assert out == (tmp_path / "mine.py").read_text()


@pytest.mark.parametrize("room", ["channels", "attacks", "models", "clients", "data"])
def test_listings(qleak, room):
    code, out, _ = qleak("ls", room)
    assert code == 0
    assert len(out.splitlines()) > 1


def test_doctor(qleak):
    code, out, _ = qleak("doctor")
    assert code == 0
    assert "torch" in out


def test_help_and_recipe_ls_import_no_torch():
    script = (
        "import sys\nfrom qleak.cli.app import app\nfrom qleak.cli import recipes\n"
        "recipes.print_list()\nassert 'torch' not in sys.modules\nassert 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pretrained_int8" in done.stdout


def test_completion_offers_recipes():
    from qleak.cli import recipes

    assert recipes.names("pre") == ["pretrained_int8"]
