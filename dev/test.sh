#!/usr/bin/env bash
# Runs the tests; arguments go to pytest: dev/test.sh tests/layers -x. Sets everything up first.
# Files are dealt to two processes of one thread each; -n 0 runs them in this one (for --pdb).
set -euo pipefail
dev=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$("$dev/setup.sh")
cd "$dev/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m pytest -n 2 --dist loadfile "$@"
