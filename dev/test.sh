#!/usr/bin/env bash
# Runs the tests; arguments go to pytest: dev/test.sh tests/layers -x. Sets everything up first.
set -euo pipefail
dev=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$("$dev/setup.sh")
cd "$dev/.."
exec "$python" -m pytest "$@"
