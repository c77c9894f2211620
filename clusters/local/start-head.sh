#!/usr/bin/env bash
# Starts a one-node Ray head on this machine for `minitron submit`.
#
#   clusters/local/start-head.sh                        in the background; end it with `ray stop`
#   clusters/local/start-head.sh --block                in this terminal, until Ctrl-C
#   clusters/local/start-head.sh --dashboard-port 8266  further options go to `ray start`
#
# The token is the one of RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token, created if missing.
# Dashboard and Jobs API listen on 127.0.0.1 alone. Ray's own ports are on the machine's address, even if told 127.0.0.1;
# they ask for the token.
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

exec ray start --head --port 6379 --dashboard-host 127.0.0.1 --dashboard-port 8265 "$@"
