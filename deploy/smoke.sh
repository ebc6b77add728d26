#!/usr/bin/env bash
# Wait until the server is ready, stream one answer; exit 0 if it came whole, else 1 with the reason on stderr.
#
#   deploy/smoke.sh                          what compose started: address and key from deploy/.env
#   deploy/smoke.sh http://host:8000         another server; the key still comes from the environment or .env
#
# What the environment says wins over .env. SMOKE_TIMEOUT_S (of the environment alone, default 300, as a first start
# compiles): whole seconds to wait for /ready, and then for each answer. Needs bash and curl.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
env_file=${SMOKE_ENV_FILE:-$here/.env}
timeout_s=${SMOKE_TIMEOUT_S:-300}

fail() {
  echo "smoke: $*" >&2
  exit 1
}

# The value of $1: from the environment, else from .env, read as compose reads it (quotes, comments after a value), never run.
setting() {
  if [ -n "${!1:-}" ]; then
    printf '%s' "${!1}"
  elif [ -r "$env_file" ]; then
    sed -n "s/^ *\(export  *\)\{0,1\}$1 *= *//p" "$env_file" | tail -n 1 |
      sed -e "s/^'\([^']*\)'.*/\1/" -e t -e 's/^"\([^"]*\)".*/\1/' -e t -e 's/ #.*//' -e 's/[[:space:]]*$//'
  fi
}

command -v curl >/dev/null || fail "needs curl"
case "$timeout_s" in "" | *[!0-9]*) fail "SMOKE_TIMEOUT_S must be whole seconds, not $timeout_s" ;; esac

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

# A server that starts refuses (7), hangs up (52, 56: a container's port without its program), is slow (28) or answers 503.
reason=
until ready=$(ask --max-time 5 --output /dev/null --write-out '%{http_code}' "$base/ready" 2>&1) && [ "$ready" = 200 ]; do
  before=$reason
  case "$ready" in
    503) reason="$base/ready answers 503: loading or draining" ;;
    "curl: (7)"* | "curl: (52)"* | "curl: (56)"* | "curl: (28)"*) reason="no server at $base: ${ready%[[:space:]]000}" ;;
    [0-9][0-9][0-9]) fail "$base/ready answers $ready" ;;
    *) fail "no server at $base: ${ready%[[:space:]]000}" ;;
  esac
  [ "$SECONDS" -lt "$timeout_s" ] || fail "$reason"
  [ -n "$before" ] || echo "smoke: $reason; waiting up to $timeout_s s" >&2
  sleep 0.5
done

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
