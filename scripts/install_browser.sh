#!/bin/sh
# A Chromium for the proofs of the server's page. Installs Debian's where we may; says what to do elsewhere.
set -eu
if [ -n "${DOUGONG_CHROMIUM:-}" ] || command -v chromium >/dev/null || command -v chromium-browser >/dev/null; then
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing Chromium for the proofs of the server's page"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
    exit 0
fi
echo "The proofs of the server's page need Chromium: install it (Debian: sudo apt-get install chromium)," >&2
echo "or name one in DOUGONG_CHROMIUM, then run again." >&2
exit 1
