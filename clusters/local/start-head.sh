#!/usr/bin/env bash
# Starts a one-node Ray head on this machine for `minitron submit`.
#
#   clusters/local/start-head.sh                        in the background; end it with stop-head.sh
#   clusters/local/start-head.sh --block                in this terminal, until Ctrl-C
#   clusters/local/start-head.sh --dashboard-port 8266  further options go to `ray start`
#
# The token is the one of RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token, created if missing.
# Dashboard and Jobs API listen on 127.0.0.1 alone. Ray's own ports are on the machine's address, even if told 127.0.0.1;
# they ask for the token. Ray lets every user of the machine into its session folder, which has the logs and the code that jobs
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

exec ray start --head --temp-dir "$folder/r" --port 6379 --dashboard-host 127.0.0.1 --dashboard-port 8265 "$@"
