#!/usr/bin/env sh
# Makes .venv with everything in it, and says how to enter it. The Makefile knows how.
set -eu
cd "$(dirname "$0")"
make install
echo "Done. Enter it with:  . .venv/bin/activate"
