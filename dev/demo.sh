#!/usr/bin/env bash
# From images to evaluated pseudo-masks and a detector trained on them, in minutes on a CPU; writes
# output/demo/index.html. Arguments go to dev/demo.py. Sets everything up first.
set -euo pipefail
# No cd: a relative --output or UNSEG_PYTHON is one of the caller's folder.
dev=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$("$dev/setup.sh")
exec "$python" "$dev/demo.py" "$@"
