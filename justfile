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

# all tests that CI runs, slow ones included
[group('dev')]
test-all:
    pytest -n auto --dist loadfile --slow

# the same with branch coverage of qleak/
[group('dev')]
coverage:
    pytest -n auto --dist loadfile --slow --cov --cov-report=term:skip-covered

# tests at full size, for the figures they print (some minutes; CI runs small versions of them)
[group('dev')]
evidence *args:
    pytest --evidence -m evidence -s {{args}}

# lint and types
[group('dev')]
lint:
    ruff check . && ruff format --check . && pyright

# the pages and the reference, into site/ (extra: docs)
[group('dev')]
docs:
    mkdocs build --strict

# the tutorial's notebook and figure, from its page
[group('dev')]
tutorial:
    python scripts/make_tutorial.py

# what CI runs, in a fresh environment
[group('dev')]
ci:
    bash .ci/run

# the shipped weights (needs MNIST: qleak data fetch mnist), assets/demo.gif and assets/method.svg
[group('assets')]
assets:
    python scripts/make_assets.py
    python scripts/make_demo.py
    python scripts/make_method.py

# the shipped example run
[group('assets')]
example:
    python scripts/make_example.py

# the README's picture, from a stored run
[group('assets')]
picture:
    python scripts/make_picture.py

# speed against the sequential twin, interleaved
[group('speed')]
bench *args:
    python benchmarks/bench.py {{args}}

# every recipe as its claims have it, resumable: `--list` (times, data), `--shard 2/8`, `--full` (the papers' size), names
[group('reproduce')]
reproduce *args:
    python -m scripts.reproduce {{args}}

# every recipe in its smallest setting, embedded data only
[group('reproduce')]
smoke *args:
    python -m scripts.smoke {{args}}

# every docstring's claims against stored runs (results/, then runs/), nothing is run; `--rerun` makes the runs afresh
[group('reproduce')]
verify *args:
    python -m scripts.verify {{args}}

# finished runs' numbers into results/, small enough to commit
[group('reproduce')]
keep +runs:
    python -m scripts.keep {{runs}}

# the tables of docs/results.md, from results/
[group('reproduce')]
results *args:
    python -m scripts.results {{args}}

# every stored run's page again, from its files alone
[group('reproduce')]
report out="runs":
    for run in {{out}}/*/run.json; do qleak report "$(dirname "$run")" > /dev/null && echo "$(dirname "$run")/report.html"; done

# closures a second against the sequential closure, one core and two
[group('speed')]
bench-closures *args:
    python benchmarks/closures.py {{args}}

# a step of an attack with compiled kernels and with torch's operations
[group('speed')]
bench-steps *args:
    python benchmarks/steps.py {{args}}

# correctness and rates on one CUDA device; without one it says so
[group('speed')]
gpu *args:
    python benchmarks/gpu.py {{args}}

# together against one after another: many trainings as lanes of one
[group('speed')]
bench-lanes:
    python benchmarks/lanes.py

# two Flower clients whose updates are recorded, in an environment of its own (fetches Flower)
[group('other systems')]
flower out="":
    bash examples/flower/run.sh {{out}}
