#!/usr/bin/env bash
# Runs the tests; arguments go to pytest: dev/test.sh tests/layers -x. Sets everything up first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(dev/setup.sh)
exec "$python" -m pytest "$@"
