# Every task is one line; `just` lists them.

default:
    @just --list

# install for development
[group('dev')]
setup:
    pip install -e '.[dev]'

# fast tests
[group('dev')]
test *args:
    pytest -n auto --dist loadfile {{args}}

# all tests, slow ones included
[group('dev')]
test-all:
    pytest -n auto --dist loadfile --slow

# lint and types
[group('dev')]
lint:
    ruff check . && ruff format --check . && pyright

# what CI runs, in a fresh environment
[group('dev')]
ci:
    bash .ci/run

# train and write the shipped weights (needs MNIST: qleak data fetch mnist)
[group('reproduce')]
assets:
    python scripts/make_assets.py

# the shipped example run
[group('reproduce')]
example:
    python scripts/make_example.py

# the README's picture, from a stored run
[group('reproduce')]
picture:
    python scripts/make_picture.py

# speed against the sequential twin, interleaved
[group('reproduce')]
bench *args:
    python benchmarks/bench.py {{args}}

# the recipes of issue size, their docstrings compared with what comes out
[group('reproduce')]
verify:
    python scripts/verify.py

# every recipe at default size, resumable
[group('reproduce')]
reproduce:
    for recipe in {{recipes}}; do qleak recipe run $recipe || exit 1; done
    qleak recipe run accuracy_under_channel --data cifar10-12k

# every recipe at the papers' size, resumable
[group('reproduce')]
full:
    for recipe in {{recipes}}; do qleak recipe run $recipe --full || exit 1; done

# closures a second against the sequential closure, one core and two
[group('reproduce')]
bench-closures *args:
    python benchmarks/closures.py {{args}}

# correctness and rates on one CUDA device; without one it says so
[group('reproduce')]
gpu *args:
    python benchmarks/gpu.py {{args}}

# together against one after another: many trainings as lanes of one
[group('reproduce')]
bench-lanes:
    python benchmarks/lanes.py

# two Flower clients whose updates are recorded, in an environment of its own (fetches Flower)
[group('reproduce')]
flower out="":
    bash examples/flower/run.sh {{out}}

recipes := "pretrained_int8 untrained_int8 quantization_sweep attackers rounds_to_recovery accuracy_under_channel frontier dlg_defences convergence_stage seeds"
