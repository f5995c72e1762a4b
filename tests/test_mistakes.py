"""The likeliest mistakes, answered word for word: one line that says what was expected, what came, and how to mend it."""

import json
import pickle

import pytest
import torch

FILES = {
    "notes.py": '"""No recipe."""\n',
    "number.py": '"""A number."""\n\n\ndef number() -> int:\n    return 3\n',
    "broken.py": '"""Broken."""\n\n\ndef broken(:\n',
    "broken.toml": "bits = \n",
    "typo.json": '{"bit": 4}',
}
RUN = ("recipe", "run", "pretrained_int8")
SWEEP = ("recipe", "run", "quantization_sweep", "--channels")
MISTAKES = [  # command, what is said, exit code
    (
        ("recipe", "run", "pretraned_int8"),
        "Unknown recipe 'pretraned_int8'. Did you mean 'pretrained_int8'? `qleak recipe ls` lists them.",
        2,
    ),
    (("recipe", "run", "./absent.py"), "Expected a recipe file at ./absent.py, found none.", 2),
    (("recipe", "run", "./notes.py"), "Expected notes.py to define a function notes(…) that returns a plan.", 2),
    (("recipe", "run", "./number.py"), "Expected number(…) to return a plan, got int.", 2),
    (("recipe", "run", "./broken.py"), "Expected Python in broken.py, line 4: invalid syntax.", 2),
    ((*RUN, "--bits", "0"), "Expected bits=0 in [1, 24].", 2),
    ((*RUN, "--data", "mnnist"), "Unknown data set 'mnnist'. Did you mean 'mnist'? `qleak data ls` lists them.", 2),
    (
        (*RUN, "--data", "mnist"),
        "Expected mnist in empty: MNIST/raw/train-images-idx3-ubyte is not there. `qleak data fetch mnist` downloads it (12 MB).",
        2,
    ),
    ((*RUN, "--data", "photos"), "Expected data 'photos' of shape (1, 28, 28) for this model, got (3, 32, 32).", 2),
    (
        (*RUN, "--device", "cuda"),
        "Expected a device of this machine, --device cuda: torch finds no CUDA GPU here; --device auto takes what there is.",
        2,
    ),
    ((*RUN, "--model", "run:gone"), "Expected a run's folder, or its name below ./runs, got 'gone'.", 2),
    ((*RUN, "--config", "none.toml"), "Expected a readable --config file: none.toml: No such file or directory.", 2),
    (
        (*RUN, "--config", "broken.toml"),
        "Expected JSON or TOML in --config broken.toml: Invalid value (at line 1, column 8).",
        2,
    ),
    ((*RUN, "--config", "typo.json"), "Unknown key 'bit' in --config typo.json. Did you mean 'bits'?", 2),
    (
        (*SWEEP, "chain(unifrom(bits=4))"),
        "Unknown channel 'unifrom'. Did you mean 'uniform'? `qleak ls channels` lists them.",
        2,
    ),
    (
        (*SWEEP, "chain(uniform(bit=4))"),
        "Expected uniform(levels, bits, range, per, bucket): got an unexpected keyword argument 'bit'. Did you mean 'bits'?",
        2,
    ),
    (
        (*SWEEP, "chain(laplace(eps=1.0))"),
        "Expected a bounded input before laplace(eps=1.0): put clip_l1(...) in front, or pass unbounded=True to run "
        "without a guarantee.",
        2,
    ),
    (
        (*SWEEP, "chain(clip_l2(1.0), laplace(eps=1.0))"),
        "Expected an input bounded in L1, not L2, before laplace(eps=1.0): put clip_l1(...) in front, or pass "
        "unbounded=True to run without a guarantee.",
        2,
    ),
    (("report", "runs/gone"), "Expected a run folder with a run.json at runs/gone, found none.", 2),
    (("compare", "gone"), "Expected a run folder, or a run below runs, got 'gone'.", 2),
    (("epsilon", "--sigma", "0"), "Expected sigma=0.0 > 0.", 2),
    (("audit", "absent.pt", "--model", "lenet_mnist"), "Expected an update at absent.pt, found none.", 2),
    (
        ("audit", "program.pt", "--model", "lenet_mnist"),
        "Expected program.pt to be a whole file of tensors, but it is a pickle or an old torch.save, which can hold "
        "programs and is not read; save tensors with safetensors, numpy.savez, or "
        'torch.save({"gradients": {name: tensor}}, …).',
        2,
    ),
]


class Program:
    """A pickle that would run code: it writes a file when it is loaded."""

    def __reduce__(self):
        return open, ("it-ran", "w")


@pytest.fixture
def said(qleak, tmp_path, monkeypatch):
    """Runs a command among the files of `FILES`: (exit code, the lines it wrote to stderr)."""
    monkeypatch.setenv("QLEAK_DATA", "empty")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "program.pt").write_bytes(pickle.dumps(Program()))

    def run(*argv):
        code, _, err = qleak(*argv)
        return code, [line for line in err.splitlines() if line.startswith("qleak: ")]

    return run


@pytest.mark.parametrize(("argv", "text", "code"), MISTAKES, ids=[" ".join(m[0][-2:])[:40] for m in MISTAKES])
def test_word_for_word(said, tmp_path, argv, text, code):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    assert said(*argv) == (code, [f"qleak: {text}"])
    assert not (tmp_path / "it-ran").exists()


def test_a_misspelt_flag_is_named(qleak):
    code, _, err = qleak(*RUN, "--bitz", 4)
    assert code == 2
    assert "No such option: --bitz" in err
    assert "--bits" in err


def test_another_plans_folder_is_left_alone(tmp_path):
    from qleak import store
    from qleak.errors import Expected

    (tmp_path / "run").mkdir()
    header = {"kind": "audit", "plan_id": "aaaaaaaaaa", "plan": {}, "recipe": "x", "flags": {}}
    with store.open_run(tmp_path / "run", header):
        pass
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(Expected) as error, store.open_run(tmp_path / "run", {**header, "plan_id": "bbbbbbbbbb"}):
        pass
    print(error.value)
    assert "\n" not in str(error.value)
    assert "aaaaaaaaaa" in str(error.value)
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == json.loads(before)


def test_the_program_would_have_run(tmp_path, monkeypatch):
    """The file of the table is a program indeed: read by pickle, it leaves its mark."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Program())).close()
    assert (tmp_path / "it-ran").exists()
