#!/usr/bin/env bash
# Starts a one-node Ray head on this machine for `minitron submit`.
#
#   clusters/local/start-head.sh                        in the background; end it with stop-head.sh
#   clusters/local/start-head.sh --block                in this terminal, until Ctrl-C
#   clusters/local/start-head.sh --dashboard-port 8266  further options go to `ray start`
#   clusters/local/start-head.sh --address 10.0.0.5     on this address of the machine
#
# All ports are on the loopback interface, so no other machine can reach them, or join. With --address, Ray's own ports are open
# to the network, not encrypted, so that nodes can join; the dashboard and the Jobs API stay on 127.0.0.1.
# The token is the one of RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token, created if missing.
# Every port asks for it. Ray lets every user of the machine into its session folder, which has the logs and the code that jobs
# run, so it is put inside a folder that only you can enter: /tmp/minitron-ray-UID, or $MINITRON_RAY_FOLDER (at most 42 bytes).
set -euo pipefail

fail() {
  printf 'error: %s\n  fix: %s\n' "$1" "$2" >&2
  exit 2
}

if [[ " $* " =~ \ (-h|--help)\  ]]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit
fi

# The checkout's own environment first, where `make run` made one: jobs start `python` from the head's PATH.
venv="$(cd "$(dirname "$0")/../.." && pwd)/.venv/bin"
[ -x "$venv/ray" ] && PATH="$venv:$PATH"
export PATH
command -v ray >/dev/null || fail "ray is not on the PATH" "activate the environment that has Minitron"

export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
export MLFLOW_DISABLE_TELEMETRY=true
umask 077

if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ -n "${RAY_AUTH_TOKEN_PATH:-}" ] && [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
  fail "RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH: no such file, or an empty one" \
    "write the cluster's token to it, or unset the variable: then a token is made in ~/.ray/auth_token"
fi

folder="${MINITRON_RAY_FOLDER:-/tmp/minitron-ray-$(id -u)}"
[[ $folder = /* ]] || fail "MINITRON_RAY_FOLDER=$folder: not an absolute path" "give one that begins with /"
if [ "$(printf %s "$folder" | wc -c)" -gt 42 ]; then
  fail "$folder: longer than 42 bytes, with which the names of Ray's sockets are too long" \
    "set MINITRON_RAY_FOLDER to a shorter path, such as /tmp/ray-$(id -u)"
fi
mkdir -p "$folder" || fail "$folder cannot be created" "set MINITRON_RAY_FOLDER to a folder of your own"
if [ ! -O "$folder" ] || [[ "$(ls -ld "$folder")" != drwx------* ]]; then
  fail "$folder is a link, or is not yours alone" \
    "chmod 700 it if it is yours; otherwise set MINITRON_RAY_FOLDER to a folder of your own"
fi

if [[ " $* " != *" --block "* ]]; then
  pid="$(cat "$folder/head.pid" 2>/dev/null || true)"
  # another process may have the number by now
  if [ -n "$pid" ] && [[ "$(ps -ww -o command= -p "$pid" || true)" == *" --temp-dir $folder/r "* ]]; then
    fail "a head runs already, with its files in $folder" \
      "end it with $(dirname "$0")/stop-head.sh, or set MINITRON_RAY_FOLDER to another folder for a second one"
  fi
  export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0  # stop-head.sh does not wait for jobs
  setsid "$0" "$@" --block >"$folder/head.log" 2>&1 </dev/null &
  echo $! >"$folder/head.pid"
  until grep -q "Ray runtime started" "$folder/head.log"; do
    if ! kill -0 $! 2>/dev/null; then
      rm "$folder/head.pid"
      if grep '^error: ' -A 1 "$folder/head.log" >&2; then exit 2; fi
      reason="$(grep -E '^[A-Za-z_.]*(Error|Exception): ' "$folder/head.log" | tail -n 1)" \
        || reason="$(grep . "$folder/head.log" | tail -n 1)"
      fail "Ray did not start: $reason" "see the end of $folder/head.log"
    fi
    sleep 0.2
  done
  echo "Ray's head runs; its output is in $folder/head.log. To end it: $(dirname "$0")/stop-head.sh"
  exit
fi

address=
options=()
while [ $# -gt 0 ]; do
  case $1 in
    --address) address="${2:?--address needs an address of this machine}"; shift ;;
    --address=*) address="${1#*=}" ;;
    *) options+=("$1") ;;
  esac
  shift
done

# Ray would say with a stack what is wrong with these, after half a minute, or take another port without a word. The port that is
# printed is free: Ray's default for its agent, without which no job starts, is one for all Rays of a machine.
agent="$(python3 - "$address" ${options[@]+"${options[@]}"} <<'CHECK'
import socket, sys

address, *words = sys.argv[1:]
usual = {"--port": "6379", "--dashboard-port": "8265"}
others = ["--ray-client-server-port", "--dashboard-agent-listen-port", "--object-manager-port", "--node-manager-port"]
others += ["--metrics-export-port", "--dashboard-agent-grpc-port", "--runtime-env-agent-port"]
others += ["--min-worker-port", "--max-worker-port"]
given = {}
for word, after in zip(words, [*words[1:], ""]):
    option, equals, value = word.partition("=")
    given[option] = value if equals else after


def fail(problem, remedy):
    sys.exit(f"error: {problem}\n  fix: {remedy}")


def listen(host, port):
    """Why nothing can listen there; empty if something can."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        return (error.strerror or str(error)).partition(" (")[0]
    return ""


if address and (why := listen(address, 0)):
    fail(f"--address {address}: not an address of this machine ({why})", "give one that `hostname -I` shows, or leave it out")
ports = {}
for option in [*usual, *others]:
    text = given.get(option, usual.get(option, "0"))
    try:
        port = int(text)
    except ValueError:
        fail(f"{option} {text}: not a port", "give a number from 1 to 65535")
    if not 0 <= port <= 65535 or (port == 0 and option in usual):
        fail(f"{option} {text}: not a port", "give a number from 1 to 65535")
    if port:
        ports[option] = port
low, high = ports.pop("--min-worker-port", 0), ports.pop("--max-worker-port", 0)
for option, port in ports.items():
    if same := [other for other in ports if other < option and ports[other] == port]:
        fail(f"{same[0]} {port} and {option} {port}: the same port", f"give another one with {option} PORT")
    if 0 < low <= port <= high:
        fail(f"--min-worker-port {low} to --max-worker-port {high}: contain {port}, which is the port of {option}",
             f"leave both out, or give another port with {option} PORT")
    host = address if option != "--dashboard-port" else ""
    if why := listen(host or "127.0.0.1", port):
        fail(f"{option} {port}: {why}, by another program or another Ray",
             f"end that one, or give another port with {option} PORT")
with socket.create_server((address or "127.0.0.1", 0)) as server:
    print(server.getsockname()[1])
CHECK
)" || exit 2

ray get-auth-token --generate >/dev/null

# Ray calls a machine's own network a cluster. Without one its processes listen on 127.0.0.1 alone, as on macOS and Windows.
network=()
if [ -n "$address" ]; then
  network=(--node-ip-address "$address")
else
  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
fi

# With Ray's own choice, 10002 to 19999, no other port could be in that range, and two heads would share it.
exec ray start --head --temp-dir "$folder/r" ${network[@]+"${network[@]}"} --port 6379 --dashboard-host 127.0.0.1 \
  --dashboard-port 8265 --dashboard-agent-listen-port "$agent" --min-worker-port 0 --max-worker-port 0 ${options[@]+"${options[@]}"}
