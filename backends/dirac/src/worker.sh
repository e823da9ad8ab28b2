#!/bin/sh
# Runs one job on a worker of the grid, tells of it while it runs, and brings home what it leaves.
#
# Starts in the directory into which DIRAC unpacked the input sandboxes. Needs a shell, tar, the usual
# small programs, and curl or python3. Ends with 0 when the job was good, 1 when it was not, 3 when the
# job could not be run; other numbers mean something to DIRAC's wrapper.
set +eu
# From the very start: whoever is ended must still be able to say so.
term=''
trap 'term=1' TERM INT HUP
home=$PWD
mask=$(umask)
umask 077
. ./bridge-job.conf || exit 3
job=${JOBID:-${DIRACJOBID:-}}
case $job in
'' | *[!0-9]*) echo "bridge: there is no job id"; exit 3 ;;
esac

# A path that needs no quoting: it is written into the job's script and variables.
case $home in
*[!A-Za-z0-9/._+-]*) root=$(mktemp -d "${TMPDIR:-/tmp}/bridge.XXXXXX") || exit 3 ;;
*) root=$home/bridge && mkdir -p "$root" || exit 3 ;;
esac
t=$root/t dir=$root/job log=$root/log
mkdir -p "$t" "$dir" || exit 3
: >"$log"
mark=BRIDGE_GRID_JOB=$job.$name
access='' refresh='' expires=0 code=0 seq=1 sent=0 pending='' pieces=0 outs=0
told='' why='' shown=0

if command -v curl >/dev/null 2>&1; then client=curl
elif command -v python3 >/dev/null 2>&1; then client=python3
else echo "bridge: there is neither curl nor python3 on this worker"; exit 3
fi
[ "$client" = curl ] || cat >"$t/bridge-call.py" <<'PYTHON'
import sys, uuid, urllib.request, urllib.error
method, url, kind, auth, body, form, answer, limit = sys.argv[1:9]
request = urllib.request.Request(url, method=method)
if auth:
    request.add_header("Authorization", "Bearer " + open(auth).read().strip())
if form:
    edge = uuid.uuid4().hex
    parts = []
    for line in open(form, encoding="utf-8"):
        name, _, value = line.rstrip("\n").partition("=")
        parts.append('--%s\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (edge, name, value))
    parts.append('--%s\r\nContent-Disposition: form-data; name="file"; filename="file"\r\n\r\n' % edge)
    request.data = "".join(parts).encode() + open(body, "rb").read() + ("\r\n--%s--\r\n" % edge).encode()
    kind = "multipart/form-data; boundary=" + edge
elif body:
    request.data = open(body, "rb").read()
if kind:
    request.add_header("Content-Type", kind)
code, text = 0, b""
try:
    with urllib.request.urlopen(request, timeout=float(limit)) as reply:
        code, text = reply.status, reply.read()
except urllib.error.HTTPError as error:
    code, text = error.code, error.read()
except OSError as error:
    sys.stderr.write("%s\n" % error)
open(answer, "wb").write(text)
print("%03d" % code)
PYTHON

# method, url, content type, "yes" to say who we are, body file, seconds: the status comes in $code.
http() {
  : >"$t/answer"
  if [ "$client" = python3 ]; then
    code=$(python3 -I "$t/bridge-call.py" "$1" "$2" "$3" "${4:+$t/access}" "$5" '' "$t/answer" "$6" 2>>"$t/noise")
  else
    _method=$1 _url=$2 _kind=$3 _auth=$4 _body=$5 _limit=$6
    set -- -q -sS --globoff --connect-timeout 10 --max-time "$_limit" -X "$_method" -o "$t/answer" -w '%{http_code}'
    [ -z "$_kind" ] || set -- "$@" -H "Content-Type: $_kind"
    [ -z "$_auth" ] || set -- "$@" -K "$t/curl"
    [ -z "$_body" ] || set -- "$@" --data-binary "@$_body"
    code=$(curl "$@" "$_url" 2>>"$t/noise")
  fi
  case $code in
  2??) return 0 ;;
  '') code=000 ;;
  esac
  return 1
}

# Puts a file into the store, with the fields that the server signed, one per line.
http_form() {
  : >"$t/answer"
  if [ "$client" = python3 ]; then
    code=$(python3 -I "$t/bridge-call.py" POST "$1" '' '' "$3" "$2" "$t/answer" 600 2>>"$t/noise")
  else
    _url=$1 _fields=$2 _file=$3
    set --
    # The last line has no end.
    while IFS= read -r _line || [ -n "$_line" ]; do set -- "$@" --form-string "$_line"; done <"$_fields"
    code=$(curl -q -sS --globoff --connect-timeout 10 --max-time 1800 --speed-limit 100 --speed-time 60 -X POST \
      -o "$t/answer" -w '%{http_code}' "$@" -F "file=@$_file;type=application/octet-stream" "$_url" 2>>"$t/noise")
  fi
  case $code in 2??) return 0 ;; esac
  return 1
}

# A string, or a number, of a one-line JSON text on standard input.
json_text() { sed -n "s/.*\"$1\" *: *\"\([^\"]*\)\".*/\1/p" | head -n 1; }
json_number() { sed -n "s/.*\"$1\" *: *\([0-9][0-9]*\).*/\1/p" | head -n 1; }

keep_access() {
  access=$1
  printf '%s\n' "$access" >"$t/access"
  printf 'header = "Authorization: Bearer %s"\n' "$access" >"$t/curl"
}

# The token lies in the proxy file, which the pilot may renew.
read_tokens() {
  [ -r "${X509_USER_PROXY:-}" ] || return 1
  sed -n '/BEGIN DIRACX/,/END DIRACX/p' "$X509_USER_PROXY" | sed '1d;$d' | tr -d '\r\n ' | base64 -d >"$t/tokens" 2>>"$t/noise" || return 1
  _access=$(json_text access_token <"$t/tokens")
  [ -n "$_access" ] || return 1
  refresh=$(json_text refresh_token <"$t/tokens")
  expires=$(json_number expires_on <"$t/tokens")
  expires=${expires:-0}
  keep_access "$_access"
}

renew() {
  _before=$access
  read_tokens
  # Somebody else renewed the file, and well in time.
  [ "$access" = "$_before" ] || [ $((expires - $(date +%s))) -lt 60 ] || return 0
  [ -n "$refresh" ] || return 1
  printf 'grant_type=refresh_token&client_id=myDIRACClientID&refresh_token=%s' "$refresh" >"$t/grant"
  http POST "$url/api/auth/token" application/x-www-form-urlencoded '' "$t/grant" 30 || return 1
  _access=$(json_text access_token <"$t/answer")
  [ -n "$_access" ] || return 1
  _refresh=$(json_text refresh_token <"$t/answer")
  refresh=${_refresh:-$refresh}
  _lives=$(json_number expires_in <"$t/answer")
  expires=$(($(date +%s) + ${_lives:-60} - 15))
  keep_access "$_access"
}

# method, path, body file: asks DiracX.
api() {
  [ -n "$access" ] || read_tokens || return 1
  [ $((expires - $(date +%s))) -gt 60 ] || renew
  http "$1" "$url$2" "${3:+application/json}" yes "$3" "${patience:-60}" && return 0
  [ "$code" = 401 ] || return 1
  renew && http "$1" "$url$2" "${3:+application/json}" yes "$3" "${patience:-60}"
}

# seconds, command …: again and again, unless the answer is that it will never be.
insist() {
  _until=$(($(date +%s) + $1)) _pause=1
  shift
  until "$@"; do
    case $code in 400 | 403 | 404 | 422) return 1 ;; esac
    [ "$(date +%s)" -lt "$_until" ] || return 1
    sleep "$_pause"
    [ "$_pause" -ge 15 ] || _pause=$((_pause * 2))
  done
}

# Hands in a file as one more output sandbox of the job.
hand_in() {
  _sum=$(sha256sum <"$1") || return 1
  _sum=${_sum%% *}
  printf '{"checksum_algorithm":"sha256","checksum":"%s","size":%s,"format":"tar.bz2"}' \
    "$_sum" "$(wc -c <"$1" | tr -d ' ')" >"$t/ask"
  api POST /api/jobs/sandbox "$t/ask" || return 1
  _pfn=$(json_text pfn <"$t/answer")
  _store=$(json_text url <"$t/answer")
  [ -n "$_pfn" ] || return 1
  if [ -n "$_store" ]; then
    sed -n 's/.*"fields" *: *{\([^}]*\)}.*/\1/p' "$t/answer" | sed 's/" *, *"/"\
"/g' | sed 's/^ *"\([^"]*\)" *: *"\(.*\)" *$/\1=\2/' >"$t/fields"
    http_form "$_store" "$t/fields" "$1" || { code=000; return 1; }
  fi
  printf '"%s"' "$_pfn" >"$t/ask"
  api PATCH "/api/jobs/$job/sandbox/output" "$t/ask" && return 0
  # A repetition of what arrived although its answer did not.
  grep -q 'already assigned' "$t/answer"
}

# Wraps one file of $t; the name says what it is, and keeps equal texts of different jobs apart.
wrap() {
  (cd "$t" && tar -cf "$1.tar" "$1") || return 1
  if command -v gzip >/dev/null 2>&1; then gzip -nc "$t/$1.tar" >"$t/$1.pack" && rm -f "$t/$1.tar"
  else mv "$t/$1.tar" "$t/$1.pack"
  fi
}

# Hands in a piece of the log. What was once begun is repeated as it was, so that no byte comes twice.
piece() {
  if [ -z "$pending" ]; then
    size=$(wc -c <"$log" | tr -d ' ')
    length=$((size - sent))
    [ "$length" -gt 0 ] || return 0
    [ "$length" -le "$largest" ] || length=$largest
    pending=bridge-log.$job.$seq.$sent
    tail -c "+$((sent + 1))" "$log" | head -c "$length" >"$t/$pending"
    wrap "$pending" || { pending=''; code=000; return 1; }
  fi
  hand_in "$t/$pending.pack" || return 1
  rm -f "$t/$pending" "$t/$pending.pack"
  pending=''
  sent=$((sent + length)) seq=$((seq + 1)) pieces=$((pieces + 1))
}

# Asks for all that was ever said of the job.
history() {
  printf '{"parameters":["JobID","LoggingInfo"],"search":[{"parameter":"JobID","operator":"eq","value":"%s"}]}' "$job" >"$t/ask"
  api POST '/api/jobs/search?page=1&per_page=10' "$t/ask"
}

# Sets the application status, which the next look at all jobs sees. Its time must come after the last
# one in the history, whatever the clocks say.
tell() {
  history || return 1
  last=$(tr ',' '\n' <"$t/answer" | sed -n 's/.*"StatusTime" *: *"\([^"]*\)".*/\1/p' | sed 's/Z$//; s/+00:00$//; s/ /T/' | sort | tail -n 1)
  stamp=$(date -u +%Y-%m-%dT%H:%M:%S)
  stamp=$stamp.000000
  if [ -n "$last" ]; then
    case $last in *.*) ;; *) last=$last.000000 ;; esac
    newest=$(printf '%s\n%s\n' "$stamp" "$last" | sort | tail -n 1)
    if [ "$newest" = "$last" ]; then
      _micro=$(printf '%s000000' "${last##*.}" | cut -c1-6 | sed 's/^0*//')
      _micro=$((${_micro:-0} + 1000))
      [ "$_micro" -lt 1000000 ] || _micro=999999
      stamp=${last%.*}.$(printf '%06d' "$_micro")
    fi
  fi
  printf '{"%s":{"%s+00:00":{"ApplicationStatus":"%s","Source":"bridge"}}}' "$job" "$stamp" "$1" >"$t/ask"
  api PATCH /api/jobs/status "$t/ask" || return 1
  # Ignored, because something newer came in between.
  ! grep -q '"Status" *: *null' "$t/answer" || { code=000; return 1; }
}

# Looks at all jobs of our name: this one's status comes in $status, the oldest one's id in $first.
look() {
  printf '{"parameters":["JobID","Status"],"search":[{"parameter":"JobName","operator":"eq","value":"%s"},{"parameter":"Owner","operator":"eq","value":"%s"}]}' "$name" "$owner" >"$t/ask"
  api POST '/api/jobs/search?page=1&per_page=100' "$t/ask" || return 1
  tr '}' '\n' <"$t/answer" >"$t/rows"
  first='' status=''
  while IFS= read -r _row; do
    _id=$(printf '%s\n' "$_row" | json_number JobID)
    [ -n "$_id" ] || continue
    { [ -n "$first" ] && [ "$first" -le "$_id" ]; } || first=$_id
    [ "$_id" != "$job" ] || status=$(printf '%s\n' "$_row" | json_text Status)
  done <"$t/rows"
}

give_up() { # what to say
  echo "bridge: $1"
  insist 60 tell "bridge: refused $1"
  [ "$root" = "$home/bridge" ] || rm -rf "$root"
  exit 3
}

# Ends every process that carries our mark, and those it started meanwhile.
sweep() {
  _round=0
  while [ "$_round" -lt 20 ]; do
    _round=$((_round + 1)) _found=''
    for _p in $(grep -ls -- "$mark" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3); do
      [ "$_p" != "$$" ] || continue
      kill -KILL "$_p" 2>/dev/null && _found=1
    done
    [ -n "$_found" ] || return 0
    sleep 0.1 2>/dev/null || sleep 1
  done
}

# Before anything runs: are we still wanted, are we the only one, were we here before?
insist "$waits" look || give_up "DiracX does not answer this worker (status $code)"
case $status in Killed | Deleted) give_up "it was killed before it started" ;; esac
[ "${first:-$job}" = "$job" ] || give_up "job $first has the same name and came first"
insist "$waits" api GET "/api/jobs/$job/sandbox/output" || give_up "DiracX does not answer this worker (status $code)"
! grep -q '/' "$t/answer" || give_up "it was started before, and a job is run only once"
# The list is dropped once the job's outputs are home; its history is not.
insist "$waits" history || give_up "DiracX does not answer this worker (status $code)"
! grep -q 'bridge: running\|bridge: ended' "$t/answer" || give_up "it was started before, and a job is run only once"
begin=bridge-begin.$job
printf 'host=%s\nsite=%s\nat=%s\n' "$(uname -n)" "${DIRACSITE:-}" "$(date +%s)" >"$t/$begin"
wrap "$begin" && insist "$waits" hand_in "$t/$begin.pack" || give_up "the start could not be written down (status $code)"
[ -z "$term" ] || give_up "it was told to end before it started"
running="bridge: running on $(uname -n | tr -cd 'A-Za-z0-9._-')"
tell "$running"

finish() { # exit code, step: writes the result unless the job did, and hands in all there is
  if ! [ -f "$dir/result" ]; then
    printf 'exit_code=%s\nstep=%s\n' "$1" "$2" >"$dir/result"
    [ -z "$why" ] || printf 'signalled=TERM\n' >>"$dir/result"
  fi
  _for=$waits
  [ -z "$term" ] || _for=10
  _end=$(($(date +%s) + _for))
  while [ -n "$pending" ] || [ "$(wc -c <"$log" | tr -d ' ')" -gt "$sent" ]; do
    insist "$((_end - $(date +%s) + 1))" piece || break
  done
  [ -n "$why" ] || bring
  lines=$(head -c 500 "$dir/result" | head -n 8 | tr '\n' ' ' | tr -cd 'A-Za-z0-9=_. -')
  whole=$(wc -c <"$log" | tr -d ' ')
  end=bridge-end.$job
  { head -c 4096 "$dir/result"; printf '\nlog=%s\npieces=%s\nouts=%s\nwhy=%s\n' "$sent" "$pieces" "$outs" "$why"; } >"$t/$end"
  [ "$whole" -eq "$sent" ] || printf 'lost=%s\n' "$((whole - sent))" >>"$t/$end"
  wrap "$end" && insist "$((_end - $(date +%s) + 1))" hand_in "$t/$end.pack" && told=1
  lost=''
  [ "$whole" -eq "$sent" ] || lost=" lost=$((whole - sent))"
  report=$(printf 'bridge: ended %s%s pieces=%s outs=%s log=%s%s' "$lines" "${why:+ why=$why}" "$pieces" "$outs" "$sent" "$lost" | cut -c1-250)
  insist "$((_end - $(date +%s) + 1))" tell "$report"
  printf '%s\n' "$report" >"$home/bridge-result.txt"
  # What did not get through may still come home with DIRAC's own output sandbox.
  [ -n "$told" ] || tail -c 1000000 "$log"
  _good=1
  ! grep -q '^exit_code=0$' "$dir/result" || [ -n "$why" ] || _good=0
  cd / && rm -rf "$root"
  exit "$_good"
}

# Brings home the files that are asked for, in parts that the store takes.
bring() {
  [ -s "$home/bridge-job.outputs" ] && [ -d "$root/w" ] || return 0
  (cd "$root/w" && find . \( -type f -o -type l \) | sed 's|^\./||') | while IFS= read -r _file; do
    while IFS= read -r _pattern; do
      # shellcheck disable=SC2254
      case $_file in $_pattern | $_pattern/*) printf '%s\n' "$_file"; break ;; esac
    done <"$home/bridge-job.outputs"
  done >"$t/list"
  [ -s "$t/list" ] || return 0
  (cd "$root/w" && tar -cf - -T "$t/list" | { ! command -v gzip >/dev/null 2>&1 && cat || gzip -nc; }) |
    (cd "$t" && split -b "$part" -a 3 - part.)
  for _part in "$t"/part.*; do
    [ -f "$_part" ] || continue
    _name=bridge-out.$job.$outs
    mv "$_part" "$t/$_name" && (cd "$t" && tar -cf "$_name.pack" "$_name") || return 1
    rm -f "$t/$_name"
    insist "$waits" hand_in "$t/$_name.pack" || return 1
    rm -f "$t/$_name.pack"
    outs=$((outs + 1))
  done
}

broken() {
  echo "bridge: $1" >>"$log"
  finish 1 setup
}

# The workspace came in pieces of one tar.
if [ -f "$home/bridge-ws.000" ]; then
  cat "$home"/bridge-ws.[0-9][0-9][0-9] | tar -xpf - -C "$root" 2>>"$log" || broken "the workspace cannot be unpacked"
  rm -f "$home"/bridge-ws.[0-9][0-9][0-9]
fi
mkdir -p "$root/w" || broken "there is no room for the workspace"
for _file in script env; do
  LC_ALL=C sed "s|@bridge-workspace@|$root/w|g" <"$home/bridge-job.$_file" >"$root/$_file" || broken "the script cannot be written"
  rm -f "$home/bridge-job.$_file"
done

cat >"$root/start" <<'START'
umask "$2"
_bridge_root=$1
cd "$1/w" || exit 1
set --
. "$_bridge_root/env"
eval 'unset _bridge_root; BRIDGE_JOB_DIR='"'$_bridge_root/job'"'; export BRIDGE_JOB_DIR; exec /bin/sh '"'$_bridge_root/script'"' </dev/null'
START

(
  # Caught, not ignored: what is started from here must be able to hear it.
  trap : TERM INT HUP
  (
    BRIDGE_GRID_JOB=$job.$name
    export BRIDGE_GRID_JOB
    exec 9>"$root/pid"
    exec sh -c 'echo "$$" >&9; exec 9>&-; exec sh "$@"' sh "$root/start" "$root" "$mask"
  )
  echo "$?" >"$root/rc.new" && mv "$root/rc.new" "$root/rc"
) >"$log" 2>&1 &
runner=$!

began=$(date +%s) looked=$began handed=$began stop_at=0 ticks=0
while ! [ -f "$root/rc" ]; do
  # Bash and dash reap children while they wait for others.
  kill -0 "$runner" 2>/dev/null || [ -f "$root/rc" ] || break
  # Short jobs are noticed soon, long ones are not asked all the time.
  if [ "$ticks" -lt 100 ]; then sleep 0.1 2>/dev/null || sleep 1; else sleep 1; fi
  ticks=$((ticks + 1))
  now=$(date +%s)
  if [ -z "$why" ]; then
    if [ -n "$term" ]; then
      # The site ends us, for a kill or for reasons of its own; there are some seconds left.
      patience=3
      look
      case $status in Killed | Deleted) why=cancelled ;; *) why=term ;; esac
    elif [ $((now - looked)) -ge "$looks" ]; then
      looked=$now patience=20
      look && case $status in Killed | Deleted) why=cancelled ;; esac
      patience=60
    fi
    [ -n "$why" ] || [ "$wall" -eq 0 ] || [ $((now - began)) -lt "$wall" ] || why=timeout
    if [ -n "$why" ]; then
      [ "$why" != cancelled ] || : >"$dir/cancelled"
      kill -TERM "$(cat "$root/pid" 2>/dev/null)" 2>/dev/null
      stop_at=$((now + grace))
      [ -z "$term" ] || stop_at=$((now + 2))
    fi
  else
    [ -z "$term" ] || [ "$stop_at" -le $((now + 2)) ] || stop_at=$((now + 2))
    if [ "$now" -ge "$stop_at" ]; then
      sweep
      break
    fi
  fi
  # The more pieces there are, the less often comes another.
  if [ $((now - handed)) -ge $((every * (1 + pieces / 60))) ]; then
    patience=20
    piece
    # Whoever reads the log asks for it only when there is news of it.
    [ "$shown" = "$pieces" ] || { tell "$running pieces=$pieces" && shown=$pieces; }
    patience=60 handed=$(date +%s)
  fi
done
[ -f "$root/rc" ] || [ -n "$why" ] || wait "$runner"
[ -z "$why" ] || sweep
rc=$(cat "$root/rc" 2>/dev/null)
finish "${rc:-143}" script
