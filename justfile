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
    pytest {{args}}

# all tests, slow ones included
[group('dev')]
test-all:
    pytest --slow

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
    qleak recipe run pretrained_int8 && qleak recipe run untrained_int8

# every recipe at the papers' size, resumable
[group('reproduce')]
full:
    qleak recipe run pretrained_int8 --full && qleak recipe run untrained_int8 --full
