#!/usr/bin/env bash
# Starts a one-node Ray head on this machine for `minitron submit`.
#
#   clusters/local/start-head.sh                        in the background; end it with stop-head.sh
#   clusters/local/start-head.sh --block                in this terminal, until Ctrl-C
#   clusters/local/start-head.sh --dashboard-port 8266  further options go to `ray start`
#   clusters/local/start-head.sh --address 10.0.0.5     on this address of the machine; must be the first option
#
# All ports are on the loopback interface, so no other machine can reach them, or join. With --address, Ray's own ports are open
# to the network, not encrypted, so that nodes can join; the dashboard and the Jobs API stay on 127.0.0.1.
# The token is the one of RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token, created if missing.
# Every port asks for it. Ray lets every user of the machine into its session folder, which has the logs and the code that jobs
# run, so it is put inside a folder that only you can enter: /tmp/minitron-ray-UID, or $MINITRON_RAY_FOLDER (at most 42 bytes).
set -euo pipefail

# The checkout's own environment first, where `make run` made one: jobs start `python` from the head's PATH.
venv="$(cd "$(dirname "$0")/../.." && pwd)/.venv/bin"
[ -x "$venv/ray" ] && PATH="$venv:$PATH"
export PATH

export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
export MLFLOW_DISABLE_TELEMETRY=true
umask 077

if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ -n "${RAY_AUTH_TOKEN_PATH:-}" ] && [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
  echo "error: RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH: no such file, or an empty one" >&2
  echo "  fix: write the cluster's token to it, or unset the variable: then a token is made in ~/.ray/auth_token" >&2
  exit 2
fi
ray get-auth-token --generate >/dev/null

folder="${MINITRON_RAY_FOLDER:-/tmp/minitron-ray-$(id -u)}"
mkdir -p "$folder"
if [ ! -O "$folder" ] || [[ "$(ls -ld "$folder")" != drwx------* ]]; then
  echo "error: $folder is a link, or is not yours alone" >&2
  echo "  fix: chmod 700 it if it is yours; otherwise set MINITRON_RAY_FOLDER to a folder of your own" >&2
  exit 2
fi

if [[ " $* " != *" --block "* ]]; then
  export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0  # stop-head.sh does not wait for jobs
  setsid "$0" "$@" --block >"$folder/head.log" 2>&1 </dev/null &
  echo $! >"$folder/head.pid"
  until grep -q "Ray runtime started" "$folder/head.log"; do
    if ! kill -0 $! 2>/dev/null; then
      cat "$folder/head.log" >&2
      exit 1
    fi
    sleep 0.2
  done
  echo "Ray's head runs; its output is in $folder/head.log. To end it: $(dirname "$0")/stop-head.sh"
  exit
fi

# Ray calls a machine's own network a cluster. Without one its processes listen on 127.0.0.1 alone, as on macOS and Windows.
network=()
if [ "${1:-}" = --address ]; then
  network=(--node-ip-address "${2:?--address needs an address of this machine}")
  shift 2
else
  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
fi

exec ray start --head --temp-dir "$folder/r" ${network[@]+"${network[@]}"} --port 6379 --dashboard-host 127.0.0.1 \
  --dashboard-port 8265 "$@"
