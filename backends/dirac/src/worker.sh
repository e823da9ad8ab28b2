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

# What DIRAC brings home by itself: the last word, for when nothing else gets through.
leave() { printf '%s\n' "$1" >"$home/bridge-result.txt"; }

useless() { # what to say
  echo "bridge: $1"
  leave "bridge: refused $1"
  exit 3
}

[ -r ./bridge-job.conf ] || useless "the job's files did not come with it"
. ./bridge-job.conf
job=${JOBID:-${DIRACJOBID:-}}
case $job in
'' | *[!0-9]*) useless "there is no job id" ;;
esac

size_of() { wc -c <"$1" 2>/dev/null | tr -d ' '; }

# Says whether a file of so many bytes can be written, which stays.
has_room() { # file, bytes
  head -c "$2" /dev/zero 2>/dev/null >"$1" && [ "$(size_of "$1")" = "$2" ]
}

# A path that needs no quoting: it is written into the job's script and variables. What is in the way of
# room is given back at the end, so that there is some to tell of it where the job has filled the disk.
# Memory is the last resort, to say that there is no room anywhere.
root='' cramped='' ballast=6000000
for _place in "$home" "${TMPDIR:-}" /tmp /var/tmp /dev/shm; do
  case $_place in '' | *[!A-Za-z0-9/._+-]*) continue ;; esac
  if [ "$_place" = "$home" ]; then root=$home/bridge; mkdir -p "$root" 2>/dev/null || root=''
  else root=$(mktemp -d "$_place/bridge.XXXXXX" 2>/dev/null)
  fi
  [ -n "$root" ] || continue
  [ "$_place" != /dev/shm ] || { cramped=1 ballast=100000; }
  ! mkdir -p "$root/t" "$root/job" 2>/dev/null || ! has_room "$root/ballast" "$ballast" || break
  rm -rf "$root"
  root=''
done
[ -n "$root" ] || useless "there is no room to work in: the disk of this worker is full"
t=$root/t dir=$root/job log=$root/log
: >"$log"
mark=BRIDGE_GRID_JOB=$job.$name
access='' refresh='' expires=0 from_file='' code=0 seq=1 sent=0 pending='' pieces=0 outs=0
memory='' tight='' why='' ahead='' asked=0 hurry='' now=0 shown=0 told='' killed=''

if command -v curl >/dev/null 2>&1; then client=curl
elif command -v python3 >/dev/null 2>&1; then client=python3
else
  [ "$root" = "$home/bridge" ] || rm -rf "$root"
  useless "there is neither curl nor python3 on this worker"
fi

# Seconds that pass whatever is done to the clock.
tick() {
  now=''
  [ ! -r /proc/uptime ] || read -r now _ </proc/uptime
  now=${now%%.*}
  [ -n "$now" ] || now=$(date +%s)
}

# Reads a date as HTTP has it, "Sat, 21 Nov 2026 11:03:34 GMT", as seconds.
epoch() {
  # shellcheck disable=SC2086
  set -- $1
  case ${3:-} in
  Jan) _m=13 ;; Feb) _m=14 ;; Mar) _m=3 ;; Apr) _m=4 ;; May) _m=5 ;; Jun) _m=6 ;;
  Jul) _m=7 ;; Aug) _m=8 ;; Sep) _m=9 ;; Oct) _m=10 ;; Nov) _m=11 ;; Dec) _m=12 ;;
  *) return 1 ;;
  esac
  case $2$4$5 in *[!0-9:]*) return 1 ;; *:*:*) ;; *) return 1 ;; esac
  _year=$4 _hms=${5#*:}
  [ "$_m" -lt 13 ] || _year=$((_year - 1))
  _days=$((365 * _year + _year / 4 - _year / 100 + _year / 400 + (153 * (_m - 3) + 2) / 5 + ${2#0} - 719469))
  _hour=${5%%:*} _minute=${_hms%:*} _second=${_hms#*:}
  echo $((_days * 86400 + ${_hour#0} * 3600 + ${_minute#0} * 60 + ${_second#0}))
}
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
code, date, text = 0, None, b""
try:
    with urllib.request.urlopen(request, timeout=float(limit)) as reply:
        code, date, text = reply.status, reply.headers.get("Date"), reply.read()
except urllib.error.HTTPError as error:
    code, date, text = error.code, error.headers.get("Date"), error.read()
except OSError as error:
    sys.stderr.write("%s\n" % error)
with open(answer, "wb") as file:
    file.write(text)
with open(answer + ".head", "w") as file:
    file.write("Date: %s\n" % (date or ""))
print("%03d" % code)
PYTHON

# Who may say that he is the server: those whom this worker knows, and those that came with the job.
if [ -f "$home/bridge-job.ca" ]; then
  for _file in "${CURL_CA_BUNDLE:-}" "${SSL_CERT_FILE:-}" /etc/ssl/certs/ca-certificates.crt \
    /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/ca-bundle.pem; do
    [ -n "$_file" ] && [ -r "$_file" ] || continue
    cat "$_file" >"$t/ca"
    break
  done
  cat "$home/bridge-job.ca" >>"$t/ca"
fi
trusting() { # command …
  if [ -s "$t/ca" ]; then CURL_CA_BUNDLE=$t/ca SSL_CERT_FILE=$t/ca "$@"; else "$@"; fi
}

# What the last call said that was not answered; a line for people.
noise() {
  { grep '^curl: ' "$t/noise" || cat "$t/noise"; } 2>/dev/null | tail -n 1 | tr -cd 'A-Za-z0-9 ,.:()_-' | cut -c1-100
}

# method, url, content type, "yes" to say who we are, body file, seconds: the status comes in $code.
http() {
  tick
  asked=$now
  : >"$t/answer"
  : >"$t/answer.head"
  if [ "$client" = python3 ]; then
    code=$(trusting python3 -I "$t/bridge-call.py" "$1" "$2" "$3" "${4:+$t/access}" "$5" '' "$t/answer" "$6" 2>>"$t/noise")
  else
    _method=$1 _url=$2 _kind=$3 _auth=$4 _body=$5 _limit=$6
    set -- -q -sS --globoff --connect-timeout 10 --max-time "$_limit" -X "$_method" -o "$t/answer" -D "$t/answer.head" -w '%{http_code}'
    [ -z "$_kind" ] || set -- "$@" -H "Content-Type: $_kind"
    [ -z "$_auth" ] || set -- "$@" -K "$t/curl"
    [ -z "$_body" ] || set -- "$@" --data-binary "@$_body"
    # An answer that breaks off is none.
    code=$(trusting curl "$@" "$_url" 2>>"$t/noise") || code=000
  fi
  case $code in
  2??)
    # Who stands between us and the server speaks HTML.
    case $(head -c 1 "$t/answer") in '<') code=000 ;; *) return 0 ;; esac
    ;;
  '') code=000 ;;
  esac
  return 1
}

# How far the server's clock is ahead of our seconds, reckoned from the question: an answer that took
# its time must not put off a deadline.
hear_time() {
  _date=$(tr -d '\r' <"$t/answer.head" | sed -n 's/^[Dd][Aa][Tt][Ee]: *//p' | tail -n 1)
  _date=$(epoch "$_date") && ahead=$((_date - asked))
}

# Puts a file into the store, with the fields that the server signed, one per line.
http_form() {
  : >"$t/answer"
  if [ "$client" = python3 ]; then
    code=$(trusting python3 -I "$t/bridge-call.py" POST "$1" '' '' "$3" "$2" "$t/answer" 600 2>>"$t/noise")
  else
    _url=$1 _fields=$2 _file=$3
    set --
    # The last line has no end.
    while IFS= read -r _line || [ -n "$_line" ]; do set -- "$@" --form-string "$_line"; done <"$_fields"
    code=$(trusting curl -q -sS --globoff --connect-timeout 10 --max-time 1800 --speed-limit 100 --speed-time 60 -X POST \
      -o "$t/answer" -w '%{http_code}' "$@" -F "file=@$_file;type=application/octet-stream" "$_url" 2>>"$t/noise") || code=000
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

# A part of a token, which is JSON.
part_of() { # token
  _body=$(printf '%s' "$1" | cut -d. -f2 | tr '_-' '/+')
  case $((${#_body} % 4)) in 2) _body=$_body== ;; 3) _body=$_body= ;; esac
  printf '%s' "$_body" | base64 -d 2>>"$t/noise"
}

# The token lies in the proxy file, which the pilot may renew. What was read once is no news.
read_tokens() {
  [ -r "${X509_USER_PROXY:-}" ] || return 1
  sed -n '/BEGIN DIRACX/,/END DIRACX/p' "$X509_USER_PROXY" | sed '1d;$d' | tr -d '\r\n ' | base64 -d >"$t/tokens" 2>>"$t/noise" || return 1
  _access=$(json_text access_token <"$t/tokens")
  [ -n "$_access" ] && [ "$_access" != "$from_file" ] || return 1
  from_file=$_access
  refresh=$(json_text refresh_token <"$t/tokens")
  # By the server's clock, which wrote it.
  expires=$(part_of "$_access" | json_number exp)
  expires=${expires:-0}
  keep_access "$_access"
}

# Says whether the token should be renewed, by the server's clock; ours may be off.
tired() {
  [ -n "$ahead" ] && [ "$expires" -gt 0 ] || return 1
  tick
  [ $((expires - now - ahead)) -le 60 ]
}

renew() {
  # The pilot renewed the file, and well in time.
  ! read_tokens || tired || return 0
  [ -n "$refresh" ] || return 1
  # One that rotates is the pilot's to use: used twice, it costs all tokens of its user.
  case $(part_of "$refresh" | tr -d ' ') in *'"legacy_exchange":true'*) ;; *) return 1 ;; esac
  printf 'grant_type=refresh_token&client_id=myDIRACClientID&refresh_token=%s' "$refresh" >"$t/grant"
  http POST "$url/api/auth/token" application/x-www-form-urlencoded '' "$t/grant" 30 || return 1
  _access=$(json_text access_token <"$t/answer")
  [ -n "$_access" ] || return 1
  _refresh=$(json_text refresh_token <"$t/answer")
  refresh=${_refresh:-$refresh}
  expires=$(part_of "$_access" | json_number exp)
  expires=${expires:-0}
  hear_time
  keep_access "$_access"
}

# method, path, body file: asks DiracX.
api() {
  # Without a token there is none yet, or none any more; the pilot may bring one.
  code=401
  [ -n "$access" ] || read_tokens || return 1
  if tired; then renew; fi
  if http "$1" "$url$2" "${3:+application/json}" yes "$3" "${patience:-60}"; then
    [ -n "$ahead" ] || hear_time
    return 0
  fi
  [ "$code" = 401 ] || return 1
  hear_time
  renew || { code=401; return 1; }
  http "$1" "$url$2" "${3:+application/json}" yes "$3" "${patience:-60}"
}

# seconds, command …: again and again, unless the answer is that it will never be.
insist() {
  tick
  _until=$((now + $1)) _pause=1
  shift
  until "$@"; do
    # Only the server itself says so; who stands between may say anything for a while.
    case $code in 400 | 403 | 404 | 413 | 422) ! grep -q '"detail"' "$t/answer" || return 1 ;; esac
    _slept=0
    while :; do
      tick
      # Whoever is told to end has some seconds left.
      [ -z "$term" ] || [ -n "$hurry" ] || hurry=$((now + 8))
      [ "$now" -lt "$_until" ] || return 1
      [ -z "$hurry" ] || [ "$now" -lt "$hurry" ] || return 1
      [ "$_slept" -lt "$_pause" ] || break
      sleep 1
      _slept=$((_slept + 1))
    done
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
  [ -n "$_pfn" ] || { code=000; return 1; }
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
    # On a full disk it is cut short, and what was read of it would be wrong.
    [ "$(size_of "$t/$pending")" = "$length" ] && wrap "$pending" ||
      { rm -f "$t/$pending" "$t/$pending.tar" "$t/$pending.pack"; pending=''; code=000; return 1; }
  fi
  hand_in "$t/$pending.pack" || return 1
  rm -f "$t/$pending" "$t/$pending.pack"
  pending=''
  sent=$((sent + length)) seq=$((seq + 1)) pieces=$((pieces + 1))
}

# Asks for all that was ever said of the job.
history() {
  printf '{"parameters":["JobID","LoggingInfo"],"search":[{"parameter":"JobID","operator":"eq","value":"%s"}]}' "$job" >"$t/ask"
  api POST '/api/jobs/search?page=1&per_page=10' "$t/ask" || return 1
  grep -q '"LoggingInfo"' "$t/answer" || { code=000; return 1; }
}

# Sets the application status, which the next look at all jobs sees.
tell() { history && say "$1"; }

# The same, right after the history came. The time must come after the last one in it, whatever the
# clocks say.
say() {
  last=$(tr ',' '\n' <"$t/answer" | sed -n 's/.*"StatusTime" *: *"\([^"]*\)".*/\1/p' | sed 's/Z$//; s/+00:00$//; s/ /T/' | sort | tail -n 1)
  stamp=$(date -u +%Y-%m-%dT%H:%M:%S)
  stamp=$stamp.000000
  if [ -n "$last" ]; then
    case $last in *.*) ;; *) last=$last.000000 ;; esac
    newest=$(printf '%s\n%s\n' "$stamp" "$last" | sort | tail -n 1)
    if [ "$newest" = "$last" ]; then
      _micro=$(printf '%s000000' "${last##*.}" | cut -c1-6 | sed 's/^0*//')
      _micro=$((${_micro:-0} + 1000)) _whole=${last%.*}
      if [ "$_micro" -ge 1000000 ]; then
        # Into the next second; at the end of a day there is only the rest of this one.
        _hms=${_whole#*T} _micro=$((_micro - 1000000))
        _hour=${_hms%%:*} _second=${_hms##*:} _minute=${_hms#*:}
        _minute=${_minute%:*}
        _sum=$((${_hour#0} * 3600 + ${_minute#0} * 60 + ${_second#0} + 1))
        if [ "$_sum" -lt 86400 ]; then
          _whole=${_whole%T*}T$(printf '%02d:%02d:%02d' $((_sum / 3600)) $((_sum / 60 % 60)) $((_sum % 60)))
        else _micro=999999
        fi
      fi
      stamp=$_whole.$(printf '%06d' "$_micro")
    fi
  fi
  printf '{"%s":{"%s+00:00":{"ApplicationStatus":"%s","Source":"bridge"}}}' "$job" "$stamp" "$1" >"$t/ask"
  api PATCH /api/jobs/status "$t/ask" || return 1
  # Ignored, because something newer came in between; or no answer of the server's at all.
  ! grep -q '"Status" *: *null' "$t/answer" && grep -q '"success"' "$t/answer" || { code=000; return 1; }
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
  # We are one of them, or it is no answer.
  [ -n "$status" ] || { code=000; return 1; }
}

give_up() { # what to say
  echo "bridge: $1"
  leave "bridge: refused $1"
  rm -f "$root/ballast"
  insist 60 tell "bridge: refused $1"
  [ "$root" = "$home/bridge" ] || rm -rf "$root"
  exit 3
}

# When the script is told to end and killed at the latest, by the clock of `tick`. The server's clock
# counts, which was heard with its first answer; without it there is the wall time alone.
latest() {
  told='' killed=''
  [ "$told_by" -gt 0 ] && [ -n "$ahead" ] || return 0
  told=$((told_by - ahead)) killed=$((killed_by - ahead))
}

# Says whether the job waited for so long that nobody wants it any more.
too_late() {
  latest
  tick
  [ -n "$told" ] && [ "$now" -ge "$told" ]
}

# Ends every process of the job: what carries our mark, works below our directory or belongs to the
# session in which the script began. Who sheds all three cannot be found without rights.
cat >"$t/sweep" <<'SWEEP'
sweep() { # mark, directory, session
  _round=0 _clean=0
  while [ "$_round" -lt 20 ]; do
    _round=$((_round + 1)) _found=''
    for _p in $({
      grep -ls -- "$1" /proc/[0-9]*/environ | cut -d/ -f3
      ls -ld /proc/[0-9]*/cwd | sed -n "s|.* /proc/\([0-9]*\)/cwd -> $2/.*|\1|p"
      cat /proc/[0-9]*/stat | sed -n "s/^\([0-9]*\) .*) [^Z] [0-9]* [0-9]* $3 .*/\1/p"
    } 2>/dev/null | sort -u); do
      [ "$_p" != "$$" ] || continue
      kill -KILL "$_p" 2>/dev/null && _found=1
    done
    # Once more: who becomes another program in this moment shows no mark.
    if [ -n "$_found" ]; then _clean=0; else _clean=$((_clean + 1)); fi
    [ "$_clean" -lt 2 ] || return 0
    sleep 0.1 2>/dev/null || sleep 1
  done
}
# A process that has ended and waits to be noticed is gone.
lives() {
  _stat=''
  [ ! -r "/proc/$1/stat" ] || read -r _stat <"/proc/$1/stat"
  case $_stat in '' | *') Z '* | *') X '*) return 1 ;; esac
}
SWEEP
. "$t/sweep"

[ -z "$cramped" ] || give_up "there is no room to work in: the disk of this worker is full"
# Before anything runs: are we still wanted, are we the only one, were we here before?
insist "$waits" look || give_up "DiracX does not answer this worker (status $code) $(noise)"
unwanted() {
  case $status in
  Killed | Deleted) give_up "it was killed before it started" ;;
  # Who asked for it has been told, and may have asked anew.
  Failed | Done) give_up "DIRAC gave it up before it started" ;;
  esac
}
unwanted
[ "${first:-$job}" = "$job" ] || give_up "job $first has the same name and came first"
# The history outlives everything else that is known of a job, so the start is written down there.
insist "$waits" history || give_up "DiracX does not answer this worker (status $code) $(noise)"
! grep -q 'bridge: running\|bridge: ended' "$t/answer" || give_up "it was started before, and a job is run only once"
# Its refusal may have been reported, and the job be asked for anew.
! grep -q 'bridge: refused' "$t/answer" || give_up "a worker refused it before, and nobody waits for it any more"
if too_late; then
  report='bridge: ended exit_code=143 step=setup why=late pieces=0 outs=0 log=0'
  echo "bridge: the time that the job had is over; it did not begin"
  leave "$report"
  rm -f "$root/ballast"
  insist "$waits" tell "$report"
  [ "$root" = "$home/bridge" ] || rm -rf "$root"
  exit 3
fi
running="bridge: running on $(uname -n | tr -cd 'A-Za-z0-9._-')"
say "$running" || insist "$waits" tell "$running" || give_up "the start could not be written down (status $code)"
# The answer says what DIRAC makes of it, which may have changed since we looked.
status=$(json_text Status <"$t/answer")
unwanted
[ -z "$term" ] || give_up "it was told to end before it started"

# The last word, and the log from where its pieces end, into files that DIRAC brings home.
leave_all() {
  lines=$(head -c 500 "$dir/result" | head -n 8 | tr '\n' ' ' | tr -cd 'A-Za-z0-9=_. -' | cut -c1-150)
  whole=$(size_of "$log")
  _left=$((${whole:-0} - sent))
  _lost=''
  [ "$_left" -eq 0 ] || _lost=" lost=$_left"
  report=$(printf 'bridge: ended %s%s pieces=%s outs=%s log=%s%s' "$lines" "${why:+ why=$why}" "$pieces" "$outs" "$sent" "$_lost" | cut -c1-250)
  if [ "$_left" -gt 4000000 ]; then
    {
      printf '\nbridge: %s bytes of the log could not be brought home\n' "$((_left - 4000000))"
      tail -c 4000000 "$log"
    } >"$home/bridge-log.txt"
  elif [ "$_left" -gt 0 ]; then tail -c "$_left" "$log" >"$home/bridge-log.txt"
  else rm -f "$home/bridge-log.txt"
  fi
  leave "$report"
}

finish() { # exit code, step: writes the result unless the job did, and hands in all there is
  sweep "$mark" "$root" "${session:-none}"
  # The job may have removed them.
  mkdir -p "$t" "$dir"
  # What a script could not write, it may not have noticed: its end says nothing then.
  _full=''
  has_room "$root/room" 65536 || { _full=1; why=${why:-full}; }
  rm -f "$root/room" "$root/ballast"
  [ -z "$_full" ] || make_room
  [ -z "$access" ] || keep_access "$access"
  if ! [ -f "$dir/result" ]; then
    printf 'exit_code=%s\nstep=%s\n' "$1" "$2" >"$dir/result"
    [ -z "$why" ] || printf 'signalled=TERM\n' >>"$dir/result"
  fi
  [ "$why" != timeout ] || [ -z "$told" ] ||
    echo 'bridge: the time that the job had is over, its waiting included, and it was ended' >>"$log"
  # First of all, in case we are ended before the rest is done; what was asked for is not home then.
  [ ! -s "$home/bridge-job.outputs" ] || outs=lost
  leave_all
  outs=0
  # Who ran out of time may have written what explains it.
  case $why in '' | timeout | full) pack ;; esac
  _for=$waits
  # Where not even a piece can be packed, waiting does not help.
  [ -z "$tight" ] || _for=60
  [ -z "$term" ] || _for=10
  tick
  _end=$((now + _for))
  while [ -n "$pending" ] || [ "$(size_of "$log")" -gt "$sent" ]; do
    insist "$(rest)" piece || break
  done
  # That something is missing must be known at home.
  case $why in '' | timeout | full) bring || outs=lost ;; esac
  leave_all
  # Where nothing is brought home, the history alone can hold the end.
  if [ -z "$why$_lost" ] && [ "$outs" = 0 ] && [ "${#report}" -lt 250 ]; then
    insist "$(rest)" tell "$report" && over
  fi
  end=bridge-end.$job
  { head -c 4096 "$dir/result"; printf '\nlog=%s\npieces=%s\nouts=%s\nwhy=%s\n' "$sent" "$pieces" "$outs" "$why"; } >"$t/$end"
  [ "${whole:-0}" -eq "$sent" ] || printf 'lost=%s\n' "$((whole - sent))" >>"$t/$end"
  wrap "$end" && insist "$(rest)" hand_in "$t/$end.pack"
  insist "$(rest)" tell "$report"
  over
}

# Ends with what DIRAC calls success only if the job was one.
over() {
  _good=1
  ! grep -q '^exit_code=0$' "$dir/result" || [ -n "$why" ] || _good=0
  [ -z "${guard:-}" ] || kill "$guard" 2>/dev/null
  cd / && rm -rf "$root"
  [ -z "$memory" ] || rm -rf "$memory"
  exit "$_good"
}

# Others may have taken what was given back; then memory must do for what there is to tell.
make_room() {
  # Half of a line may stand there, or half of a result.
  echo "bridge: the disk of this worker is full" >>"$log"
  rm -f "$dir/result"
  ! has_room "$root/room" 3000000 || { rm -f "$root/room"; return; }
  rm -f "$root/room"
  [ -n "$memory" ] || { tight=1; return; }
  cp "$t/bridge-call.py" "$t/ca" "$memory/" 2>/dev/null
  t=$memory dir=$memory pending=''
}

# Seconds until we give up, but one try there is in any case.
rest() {
  tick
  echo $((_end - now))
}

# Packs the files that are asked for: at least those, the exact choice is made at home.
pack() {
  _patterns=$(cat "$home/bridge-job.outputs" 2>/dev/null)
  [ -n "$_patterns" ] && [ -d "$root/w" ] || return 0
  # The repository is at home already, and large.
  _own='./.git | ./.git/*'
  [ -z "$repository" ] || _own='./'
  _flat=''
  ! (cd "$t" && tar --no-recursion -cf /dev/null ./sweep) 2>>"$t/noise" || _flat=--no-recursion
  # GNU tar takes a backslash in a name for the beginning of something else.
  _verbatim=''
  ! (cd "$t" && tar --no-unquote -cf /dev/null ./sweep) 2>>"$t/noise" || _verbatim=--no-unquote
  # Names are words of a command and never lines, so they may be anything. Without that option of
  # tar a directory would bring all it holds.
  cat >"$t/pick" <<PICK
_n=\$#
for _f do
  case \$_f in
  $_own) ;;
  $_patterns) [ -z "$_flat" ] && [ -d "\$_f" ] && ! [ -h "\$_f" ] || set -- "\$@" "\$_f" ;;
  esac
done
shift "\$_n"
[ "\$#" -eq 0 ] || { : >"$t/some"; tar $_flat $_verbatim -cf - "\$@"; [ "\$?" -le 1 ] || : >"$t/torn"; }
PICK
  (cd "$root/w" && LC_ALL=C find . \( -type f -o -type l -o -type d \) -exec sh "$t/pick" {} + 2>"$t/pick.said" |
    if command -v gzip >/dev/null 2>&1; then gzip -nc; else cat; fi >"$root/packed") || {
    rm -f "$root/packed"
    outs=lost
    echo "bridge: what the job wrote cannot be packed: $(grep -v "Exiting with" "$t/pick.said" | head -n 1)" >>"$log"
    return 0
  }
  [ -f "$t/some" ] || rm -f "$root/packed"
  [ ! -f "$t/torn" ] || echo "bridge: not all of what the job wrote could be packed: $(grep -v "Exiting with" "$t/pick.said" | head -n 1)" >>"$log"
}

# Brings home what was packed, in parts that the store takes.
bring() {
  _size=$(size_of "$root/packed")
  _at=0
  while [ "$_at" -lt "${_size:-0}" ]; do
    _name=bridge-out.$job.$outs
    tail -c "+$((_at + 1))" "$root/packed" | head -c "$part" >"$t/$_name"
    _length=$(size_of "$t/$_name")
    [ "$_length" -gt 0 ] && (cd "$t" && tar -cf "$_name.pack" "$_name") || return 1
    rm -f "$t/$_name"
    insist "$waits" hand_in "$t/$_name.pack" || return 1
    rm -f "$t/$_name.pack"
    outs=$((outs + 1)) _at=$((_at + _length))
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

# In a session of its own, so that what it does to its process group does not reach us.
own='' session=''
if command -v setsid >/dev/null 2>&1; then own=setsid
elif command -v python3 >/dev/null 2>&1; then
  own="python3 -I $t/own.py"
  printf 'import os, sys\nos.setsid()\nos.execvp(sys.argv[1], sys.argv[1:])\n' >"$t/own.py"
fi
[ -d "${TMPDIR:-/tmp}" ] || { mkdir -p "$root/tmp" && TMPDIR=$root/tmp && export TMPDIR; }

if too_late; then
  why=late
  echo 'bridge: the time that the job had was over before it could begin' >>"$log"
  finish 143 setup
fi
(
  # Caught, not ignored: what is started from here must be able to hear it.
  trap : TERM INT HUP
  (
    BRIDGE_GRID_JOB=$job.$name
    export BRIDGE_GRID_JOB
    exec 9>"$root/pid.new"
    # shellcheck disable=SC2086
    exec $own sh -c 'echo "$$" >&9; exec 9>&-; mv "$1/pid.new" "$1/pid"; exec sh "$1/start" "$@"' sh "$root" "$mask"
  )
  echo "$?" >"$root/rc.new" && mv "$root/rc.new" "$root/rc"
) >"$log" 2>&1 &
runner=$!

# Taken up only when the disk is full; whoever removes what we leave must know of it.
memory=$(mktemp -d /dev/shm/bridge.XXXXXX 2>/dev/null) || memory=''

# Ends the job's processes should we be killed, and removes its files; in a session of its own for the same reason.
# shellcheck disable=SC2086
$own sh -c '
  trap "" HUP INT
  cd /
  . "$1"
  while lives "$2"; do sleep 2; done
  _pid=$(cat "$4/pid" 2>/dev/null)
  [ -n "$5" ] || _pid=none
  sweep "$3" "$4" "${_pid:-none}"
  rm -rf "$4"
  [ -z "$6" ] || rm -rf "$6"
' guard "$t/sweep" "$$" "$mark" "$root" "$own" "$memory" >/dev/null 2>&1 </dev/null &
guard=$!

# Its process, which is also its session's number.
find_script() {
  [ -n "$pid" ] || { [ ! -f "$root/pid" ] || read -r pid <"$root/pid"; }
  [ -z "$own" ] || session=$pid
}

tick
began=$now looked=$now handed=$now stop_at=0 ticks=0 pid=''
while ! [ -f "$root/rc" ]; do
  find_script
  # Who waits for the script may be ended by it; then we look after it ourselves.
  lives "$runner" || { [ -n "$pid" ] && lives "$pid"; } || break
  # Short jobs are noticed soon, long ones are not asked all the time.
  if [ "$ticks" -lt 100 ]; then sleep 0.1 2>/dev/null || sleep 1; else sleep 1; fi
  ticks=$((ticks + 1))
  tick
  if [ -z "$why" ]; then
    if [ -n "$term" ]; then
      # The site ends us, for a kill or for reasons of its own; there are some seconds left.
      [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null
      patience=3
      look
      case $status in Killed | Deleted) why=cancelled ;; *) why=term ;; esac
    elif [ $((now - looked)) -ge "$looks" ]; then
      looked=$now patience=20
      # What DIRAC has given up is nobody's any more.
      look && case $status in Killed | Deleted) why=cancelled ;; Failed | Done) why=over ;; esac
      patience=60
    fi
    [ -n "$why" ] || [ "$wall" -eq 0 ] || [ $((now - began)) -lt "$wall" ] || why=timeout
    [ -n "$why" ] || [ -z "$told" ] || [ "$now" -lt "$told" ] || why=timeout
    if [ -n "$why" ]; then
      [ "$why" != cancelled ] || : >"$dir/cancelled"
      [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null
      tick
      stop_at=$((now + grace))
      [ "$why" != timeout ] || [ -z "$killed" ] || [ "$stop_at" -le "$killed" ] || stop_at=$killed
      [ -z "$term" ] || stop_at=$((now + 2))
    fi
  else
    [ -z "$term" ] || [ "$stop_at" -le $((now + 2)) ] || stop_at=$((now + 2))
    if [ "$now" -ge "$stop_at" ]; then
      sweep "$mark" "$root" "${session:-none}"
      break
    fi
  fi
  # The more pieces there are, the less often comes another.
  if [ $((now - handed)) -ge $((every * (1 + pieces / 60))) ]; then
    patience=20
    piece
    # Whoever reads the log asks for it only when there is news of it.
    [ "$shown" = "$pieces" ] || { tell "$running pieces=$pieces" && shown=$pieces; }
    patience=60
    tick
    handed=$now
  fi
done
[ -f "$root/rc" ] || [ -n "$why" ] || ! lives "$runner" || wait "$runner"
rc=$(cat "$root/rc" 2>/dev/null)
find_script
# Without its exit status and without its own word nobody knows how it ended.
[ -n "$rc" ] || [ -n "$why" ] || [ -f "$dir/result" ] || broken "the job ended the process that waits for it"
finish "${rc:-143}" script
