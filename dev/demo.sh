#!/usr/bin/env bash
# From images to evaluated pseudo-masks and a detector trained on them, in minutes on a CPU; writes
# output/demo/index.html. Arguments go to dev/demo.py. Sets everything up first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(dev/setup.sh)
exec "$python" dev/demo.py "$@"
