#!/usr/bin/env bash
# Serve MLflow from PostgreSQL on this machine, with a password, until Ctrl-C. No root, no Docker: PostgreSQL is started here, for this
# server alone, and listens on a socket in the folder, not on the network.
#
#   clusters/mlflow/serve.sh [FOLDER]          default: ~/minitron-mlflow; HOST (127.0.0.1) and PORT (5000) from the environment
#
# Needs PostgreSQL's programs (apt-get install postgresql) and: pip install 'minitron[postgres]'
set -euo pipefail
umask 077

fail() {
  echo "serve.sh: $*" >&2
  exit 2
}

if [[ " $* " =~ \ (-h|--help)\  ]]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit
fi
case ${1:-} in -*) fail "$1: there is no such option: give a folder alone, and HOST= and PORT= before the command" ;; esac
[ $# -le 1 ] || fail "$*: more than one folder: give one"
folder=$(realpath -m -- "${1:-$HOME/minitron-mlflow}")
host=${HOST:-127.0.0.1}
port=${PORT:-5000}
python=${PYTHON:-python3}

[[ $port =~ ^[0-9]{1,5}$ ]] && [ "$((10#$port))" -ge 1 ] && [ "$((10#$port))" -le 65535 ] \
  || fail "PORT=$port: not a port: give a number from 1 to 65535"
[ ${#folder} -le 80 ] || fail "$folder is too long for the name of a socket: give a shorter folder"
case $folder in *[[:space:]?\&%#]*) fail "$folder: give a folder without spaces and ? & % #" ;; esac
bin=$(dirname -- "$(readlink -f "$(command -v initdb || ls -1 /usr/lib/postgresql/*/bin/initdb 2>/dev/null | sort -V | tail -n 1)")")
[ -x "$bin/initdb" ] || fail "initdb is missing: install PostgreSQL"
# without importing MLflow, which takes seconds
"$python" -c 'import psycopg, flask_wtf; from importlib.util import find_spec; assert find_spec("mlflow")' 2>/dev/null \
  || fail "$python lacks psycopg or mlflow[auth]: pip install 'minitron[postgres]'"
why=$("$python" - "$host" "$port" 2>&1 <<'CHECK'
import socket, sys

try:
    socket.create_server((sys.argv[1], int(sys.argv[2])), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET).close()
except (OSError, UnicodeError) as error:
    sys.exit(getattr(error, "strerror", None) or str(error))
CHECK
) || fail "HOST=$host PORT=$port: ${why%% (*}: give an address of this machine and a port that no other program has"
[ "$(id -u)" -ne 0 ] || fail "PostgreSQL does not run as root: call this as another user"

why=$(mkdir -p "$folder/artifacts" 2>&1) || fail "${why#mkdir: }: give a folder of your own"
[ -w "$folder" ] && [ -O "$folder" ] || fail "$folder: not yours, or not writable: give a folder of your own"
if "$bin/pg_ctl" --pgdata="$folder/database" status > /dev/null 2>&1; then
  fail "PostgreSQL runs in $folder already: end the serve.sh that started it, or $bin/pg_ctl --pgdata=$folder/database stop"
fi
if [ ! -e "$folder/password" ]; then
  "$python" -c 'import secrets; print(secrets.token_urlsafe(24))' > "$folder/password"
  "$python" -c 'import secrets; print(secrets.token_hex(32))' > "$folder/key"
fi
# Only this user of this machine reaches the database: its socket is in this folder, and `peer` compares the user.
if [ ! -e "$folder/database/PG_VERSION" ]; then
  "$bin/initdb" --pgdata="$folder/database" --auth-local=peer --auth-host=reject --encoding=UTF8 --no-locale > "$folder/initdb.log" \
    || fail "initdb failed, see $folder/initdb.log"
fi
"$bin/pg_ctl" --pgdata="$folder/database" --log="$folder/database.log" --wait \
  --options="-k '$folder' -c listen_addresses=''" start > /dev/null || fail "PostgreSQL does not start, see $folder/database.log"
server=
stop() {
  trap - EXIT INT TERM
  if [ -n "$server" ]; then
    kill -TERM -- "-$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
  fi
  "$bin/pg_ctl" --pgdata="$folder/database" --wait --mode=fast stop > /dev/null
}
trap stop EXIT
trap 'exit 0' INT TERM
for name in mlflow mlflow_users; do
  "$bin/psql" --host="$folder" --dbname=postgres --no-psqlrc --tuples-only --quiet \
    --command="SELECT 1 FROM pg_database WHERE datname = '$name'" | grep -q 1 || "$bin/createdb" --host="$folder" "$name"
done

# MLflow hashes the password at every request, which takes longer than most requests, unless it remembers for a while that it was right.
cat > "$folder/auth.ini" <<CONFIG
[mlflow]
default_permission = READ
database_uri = postgresql+psycopg:///mlflow_users?host=$folder
admin_username = admin
admin_password = $(cat "$folder/password")
auth_cache_ttl_seconds = 60
CONFIG
export MLFLOW_AUTH_CONFIG_PATH=$folder/auth.ini
export MLFLOW_BACKEND_STORE_URI="postgresql+psycopg:///mlflow?host=$folder"
MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$folder/key")
export MLFLOW_FLASK_SERVER_SECRET_KEY MLFLOW_BASIC_AUTH_FAIL_CLOSED=true MLFLOW_DISABLE_TELEMETRY=true
# the seven processes of MLflow's own jobs, which nothing here uses, would keep it from stopping
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
echo "MLflow on http://$host:$port, user admin, password in $folder/password; log in $folder/server.log; Ctrl-C stops it"
# in a process group of its own, so that one signal ends the server and its workers
setsid "$python" -m mlflow server --host "$host" --port "$port" --app-name basic-auth \
  --artifacts-destination "$folder/artifacts" > "$folder/server.log" 2>&1 &
server=$!
wait "$server" || fail "MLflow has ended: see the end of $folder/server.log"
