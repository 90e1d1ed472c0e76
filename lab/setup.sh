#!/bin/sh
# Makes .venv with the project and its tools; installs the Debian packages of lab/host-packages.txt that are missing.
# None of them starts a daemon or changes what the machine boots.
set -eu
cd "$(dirname "$0")/.."
missing=$(while read -r package; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || echo "$package"
done < lab/host-packages.txt)
if [ -n "$missing" ]; then
    [ "$(id -u)" = 0 ] || { echo "missing packages, install them as root: apt-get install" $missing >&2; exit 1; }
    apt-get update -qq
    # shellcheck disable=SC2086 (a list of words)
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
[ -x .venv/bin/python ] || /usr/bin/python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
mkdir -p .cache
