#!/usr/bin/env bash
# The Flower example in an environment of its own, which borrows what this one has installed and is removed at the end.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
python -m venv "$room/env"
borrowed=$("$room/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth
echo "import site; site.addsitedir('$packages')" > "$borrowed"
"$room/env/bin/pip" install --quiet 'flwr[simulation]>=1.41,<2'
export FLWR_TELEMETRY_ENABLED=0 OMP_NUM_THREADS=1
"$room/env/bin/python" "$here/app.py" "${1:-$room/captured}"
