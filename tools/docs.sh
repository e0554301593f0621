#!/usr/bin/env bash
# Builds the site into _site/: scripts from npm, pages from the notebooks (README.md must be what index.ipynb gives), then mkdocs, which forgives no broken link.
set -euo pipefail
cd "$(dirname "$0")/.."
export NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1
tools/vendor.sh
python tools/site.py --force --check
mkdocs build --strict
