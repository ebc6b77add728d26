#!/usr/bin/env bash
# Stream one answer from the running server; exit 0 if it came whole, else 1 with the reason on stderr.
#
#   deploy/smoke.sh                          what compose started: address and key from deploy/.env
#   deploy/smoke.sh http://host:8000         another server; the key still comes from the environment or .env
#
# FORETOKEN_API_KEY and SMOKE_TIMEOUT_S (default 60) in the environment win over .env. Needs bash and curl.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
env_file=${SMOKE_ENV_FILE:-$here/.env}
timeout_s=${SMOKE_TIMEOUT_S:-60}

fail() {
  echo "smoke: $*" >&2
  exit 1
}

# The value of $1: from the environment, else from .env, read as text and never run.
setting() {
  if [ -n "${!1:-}" ]; then
    printf '%s' "${!1}"
  elif [ -r "$env_file" ]; then
    sed -n "s/^$1=//p" "$env_file" | tail -n 1 | sed -e 's/[[:space:]]*$//' -e "s/^'\(.*\)'\$/\1/" -e 's/^"\(.*\)"$/\1/'
  fi
}

command -v curl >/dev/null || fail "needs curl"

address=$(setting BIND_ADDRESS)
case "$address" in "" | 0.0.0.0) address=127.0.0.1 ;; esac
port=$(setting FORETOKEN_PORT)
base=${1:-http://$address:${port:-8000}}
base=${base%/}
base=${base%/v1}
keys=$(setting FORETOKEN_API_KEY)
key=${keys%%,*}

# The key goes in by standard input: arguments can be read in the process list.
ask() {
  printf 'header = "Authorization: Bearer %s"\n' "$key" | curl --config - --silent --show-error --max-time "$timeout_s" "$@"
}

ready=$(ask --output /dev/null --write-out '%{http_code}' "$base/ready" 2>&1) || fail "no server at $base: ${ready//000/}"
[ "$ready" = 200 ] || fail "$base/ready answers $ready: loading, draining or given up"

models=$(ask "$base/v1/models" 2>&1) || fail "$base/v1/models: $models"
model=$(printf '%s' "$models" | sed -n 's/.*"data" *: *\[ *{[^]]*"id" *: *"\([^"]*\)".*/\1/p' | head -n 1)
[ -n "$model" ] || fail "$base/v1/models names no model: $models"

body='{"model": "'$model'", "stream": true, "max_tokens": 16,
  "messages": [{"role": "user", "content": "Find me a table for two tonight."}]}'
answer=$(ask --no-buffer --header 'Content-Type: application/json' --data "$body" "$base/v1/chat/completions" 2>&1) ||
  fail "the stream broke off: $answer"

num_pieces=$(printf '%s\n' "$answer" | grep -c '^data: .*"content" *: *"[^"]')
printf '%s\n' "$answer" | grep -q '^data: \[DONE\]' || fail "the answer has no end: $answer"
printf '%s\n' "$answer" | grep -q '"finish_reason" *: *"[a-z_]' || fail "the answer has no finish reason: $answer"
[ "$num_pieces" -gt 0 ] || fail "the answer has no text: $answer"
echo "smoke: $model streamed $num_pieces pieces of text from $base"
