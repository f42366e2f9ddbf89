#!/usr/bin/env bash
# How fast the command line answers: five times each, interleaved. Needs the demo's data set.
set -euo pipefail
cd "$(dirname "$0")/.."
export KNET_HOME="${KNET_HOME:-$PWD/.knet}"
export KNET_DATA="${KNET_DATA:-$KNET_HOME/data}"
TIMEFORMAT=%R
for _ in 1 2 3 4 5; do
  echo "knet --help  $({ time .venv/bin/knet --help >/dev/null; } 2>&1) s"
  echo "knet plan    $({ time .venv/bin/knet plan sweeps/stages.yaml --scale laptop >/dev/null; } 2>&1) s"
done | sort
