#!/bin/sh
# Finds or installs a Chromium for the browser tests.
# Usage: install_browser.sh PYTHON   (the Python that has playwright)
set -u
python=${1:-python3}

on_path() {
    for name in chromium chromium-browser google-chrome; do
        # Ubuntu has a stub of this name that only asks to install a snap, so it is run to find out.
        if "$name" --version >/dev/null 2>&1; then
            echo "Browser for the tests: $(command -v "$name")"
            return 0
        fi
    done
    return 1
}

with_apt() {
    [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1 || return 1
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium && on_path
}

on_path && exit 0
with_apt && exit 0
"$python" -m playwright install chromium && exit 0

echo "No browser for the tests: install Chromium or Chrome, or run '$python -m playwright install chromium'." >&2
if [ -n "${CI:-}" ]; then
    exit 1
fi
echo "Going on without it: the browser tests will be skipped." >&2
