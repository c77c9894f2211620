#!/usr/bin/env bash
# Ends the head that start-head.sh has started in the background, with all its processes and jobs, and no other Ray.
set -euo pipefail

folder="${MINITRON_RAY_FOLDER:-/tmp/minitron-ray-$(id -u)}"
if [ $# -gt 0 ]; then
  echo "stop-head.sh takes no options; it ends the head with its files in \$MINITRON_RAY_FOLDER, now $folder" >&2
  exit 2
fi
if [ ! -O "$folder" ] || ! pid="$(cat "$folder/head.pid" 2>/dev/null)"; then
  echo "start-head.sh has started no head in the background with its files in $folder" >&2
  exit 1
fi

# another process may have the number by now
if [[ "$(ps -ww -o command= -p "$pid" || true)" == *" --temp-dir $folder/r "* ]]; then
  kill "$pid"
  while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
  echo "Ray's head has ended"
else
  echo "Ray's head had ended before"
fi
rm "$folder/head.pid"
