#!/usr/bin/env bash
# Everything a change must pass, in `make test`; pytest comes last, so that its summary is the last line.
set -euo pipefail
cd "$(dirname "$0")/.."
set -a; . tools/same.env; set +a
step() { echo "== $*"; SECONDS=0; "$@"; echo "   $SECONDS s"; }
limit=(); if command -v timeout >/dev/null; then limit=(timeout 600); fi
step tools/check.sh
step ${limit[@]+"${limit[@]}"} nbdev_test --n_workers 2 --skip_folder_re '^(tutorials|[_.].*)$'
step tools/docs.sh
echo '== pytest'
exec python -m pytest --numprocesses 2 --dist loadscope --durations 8 --cov=stateset_nb --nbval-lax --nbval-current-env --nbval-cell-timeout 300 tests nbs/tutorials
