#!/usr/bin/env bash
# The main job on one machine: a local Ray head with token authentication, `sweeps/stages.yaml` at
# laptop scale submitted to it as a Ray job, the ablation table at the end. Run it through `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."

export PATH="$PWD/.venv/bin:$PATH"
export KNET_HOME="${KNET_HOME:-$PWD/.knet}"
export KNET_DATA="${KNET_DATA:-$KNET_HOME/data}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# The head listens on loopback alone, and only whoever holds this run's token may talk to it.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_AUTH_TOKEN
export RAY_USAGE_STATS_ENABLED=0
# Nobody preempts this machine: one process less for every trial.
export RAY_TRAIN_ENABLE_PREEMPTION_WATCHER=0
# Sweeps' processes are forked (docs/adr/0020-fork-server.md): those that Ray would start ahead serve nobody.
export RAY_prestart_worker_first_driver=0

read -r dashboard agent client < <(python - <<'PY'
import socket
sockets = [socket.socket() for _ in range(3)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
# Ray refuses a client port inside its workers' range, so ports below 20000 are not taken.
print(*(s.getsockname()[1] for s in sockets))
PY
)
# Unix sockets allow few characters, so Ray's own files go below a short path of their own.
session="$(mktemp -d "${TMPDIR:-/tmp}/knet-XXXXXX")"

stop_head() {
  status=$?
  # A job lives in a session of its own: left alone, it would outlive its head.
  if [ "$status" -ne 0 ]; then ray job stop "$job" >/dev/null 2>&1 || true; fi
  kill -KILL -- "-$head" 2>/dev/null || true
  wait "$head" 2>/dev/null || true
  if [ "$status" -eq 0 ]; then rm -rf "$session"; else echo "Ray's logs: $session" >&2; fi
}
setsid ray start --head --block --num-cpus "${KNET_DEMO_CPUS:-2}" --node-ip-address 127.0.0.1 --port 0 \
  --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" --dashboard-agent-listen-port "$agent" \
  --ray-client-server-port "$client" --temp-dir "$session" >"$session/head.log" 2>&1 &
head=$!
job="demo-$$"
trap stop_head EXIT
trap 'exit 130' INT TERM

echo "Starting a Ray head on this machine (loopback, token authentication) ..."
if [ ! -d "$KNET_DATA/shapes" ]; then  # while the head starts
  knet data make-shapes "$KNET_DATA/shapes" --train 2000 --val 64 --size 96 --seed 0
fi
export RAY_API_SERVER_ADDRESS="http://127.0.0.1:$dashboard"
# The same question as `ray job list`, which would load Ray each time.
until python - 2>/dev/null <<'PY'
import os, urllib.request
token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
urllib.request.urlopen(urllib.request.Request(os.environ["RAY_API_SERVER_ADDRESS"] + "/api/jobs/", headers=token))
PY
do
  kill -0 "$head" 2>/dev/null || { cat "$session/head.log" >&2; exit 1; }
  sleep 0.2
done

ray job submit --log-style record --submission-id "$job" --working-dir . -- sweeps/stages.yaml --scale laptop "$@"
