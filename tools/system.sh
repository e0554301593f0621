#!/usr/bin/env bash
# Installs Chromium on Debian and Ubuntu, unless there is a browser that the site's tests can drive.
set -euo pipefail
for b in chromium chromium-browser google-chrome; do
    if command -v $b >/dev/null; then exit; fi
done
sudo=(); if [ "$(id -u)" != 0 ]; then sudo=(sudo); fi
${sudo[@]+"${sudo[@]}"} apt-get update -q
${sudo[@]+"${sudo[@]}"} apt-get install -y -q --no-install-recommends chromium
