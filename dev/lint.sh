#!/usr/bin/env bash
# Style checks; --fix repairs what can be repaired.
set -euo pipefail
dev=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$("$dev/setup.sh")
cd "$dev/.."
if [[ "${1:-}" == "--fix" ]]; then
    "$python" -m ruff format . && exec "$python" -m ruff check --fix .
fi
"$python" -m ruff format --check . && exec "$python" -m ruff check .
