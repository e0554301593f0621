#!/usr/bin/env bash
# Installs on Debian and Ubuntu what the tests drive and is not there yet: a browser, and PostgreSQL's server.
set -euo pipefail
have() { for c in "$@"; do if command -v "$c" >/dev/null; then return; fi; done; return 1; }
lack=()
have chromium chromium-browser google-chrome || lack+=(chromium)
have initdb || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || lack+=(postgresql)
if [ ${#lack[@]} = 0 ]; then exit; fi
sudo=(); if [ "$(id -u)" != 0 ]; then sudo=(sudo); fi
${sudo[@]+"${sudo[@]}"} apt-get update -q
${sudo[@]+"${sudo[@]}"} apt-get install -y -q --no-install-recommends "${lack[@]}"
