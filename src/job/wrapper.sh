#!/bin/sh
# One CI job: runs its steps, each in a shell of its own, and ends by leaving a result file.
# Bash can give each step a process group; without it setsid does.
case ${BASH_VERSION-}:$0 in
:*/*) if [ -r "$0" ] && command -v bash >/dev/null 2>&1; then exec bash -p "$0"; fi ;;
esac
set +eu
_b_dir=${BRIDGE_JOB_DIR-}
unset BRIDGE_JOB_DIR
if [ ! -d "$_b_dir" ]; then
  printf '\033[31;1mERROR: the job directory is missing\033[0;m\n'
  exit 1
fi
# What the shell says of its children's ends is not the job's output.
exec 8>&2 2>/dev/null
_b_status=0 _b_result=script _b_detail='' _b_signalled='' _b_stopped='' _b_pid='' _b_watch='' _b_setsid=''
if [ -n "${BASH_VERSION-}" ]; then
  set -m
elif command -v setsid >/dev/null 2>&1; then
  _b_setsid=setsid
fi

_b_warn() { printf '\033[0;33mWARNING: %s\033[0;m\n' "$1"; }

# Two shells can tell the time by themselves; the others ask.
_b_mark() {
  case ${BASH_VERSION-} in
  '' | [123].* | 4.[01].*) printf '%s:%s:%s\r\033[0K' "$1" "$(date +%s)" "$2" ;;
  *) printf '%s:%(%s)T:%s\r\033[0K' "$1" -1 "$2" ;;
  esac
}

_b_finish() {
  # From here on nothing may come in between: not even a second signal, and mv inherits this.
  trap '' TERM INT HUP QUIT ALRM USR1 USR2 XCPU
  _b_disarm
  _b_len=
  if [ -f /proc/self/fd/1 ]; then
    { _b_len=$(stat -Lc %s /proc/self/fd/9 || wc -c </proc/self/fd/9); } 9>&1
  fi
  {
    printf 'exit_code=%s\nstep=%s\n' "$_b_status" "$_b_result"
    [ -z "$_b_len" ] || printf 'log_len=%s\n' "${_b_len##* }"
    [ -z "$_b_signalled" ] || printf 'signalled=%s\n' "$_b_signalled"
    [ -z "$_b_detail" ] || printf 'detail=%s\n' "$_b_detail"
  } >"$_b_dir/@RESULT@.new" && mv -f "$_b_dir/@RESULT@.new" "$_b_dir/@RESULT@"
  exit "$_b_status"
}

_b_broken() {
  printf '\033[31;1mERROR: %s\033[0;m\n' "$1"
  _b_status=1 _b_result=setup
  _b_finish
}

# After $1 seconds, ALRM to this shell.
_b_arm() {
  if [ -n "$_b_setsid" ]; then
    setsid sh -c 'sleep "$1" && kill -s ALRM "$2"' sh "$1" "$$" </dev/null >/dev/null 2>&1 8>&- &
  else
    (sleep "$1" && kill -s ALRM "$$") </dev/null >/dev/null 2>&1 8>&- &
  fi
  _b_watch="$_b_watch $!"
  [ -z "${BASH_VERSION-}" ] || disown "$!"
}

_b_disarm() {
  for _b_w in $_b_watch; do kill -s KILL -- "-$_b_w" || kill -s KILL "$_b_w"; done
  _b_watch=
}

_b_signal() { kill -s "$1" -- "-$_b_pid" || kill -s "$1" "$_b_pid"; }

_b_stop() {
  [ -n "$_b_pid" ] || return 0
  _b_disarm
  _b_signal TERM
  # The clock for the grace must outlive a second signal to the whole job, from its very start.
  trap '' TERM INT HUP QUIT XCPU
  _b_arm @GRACE@
  _b_listen
}

# The handlers act at once, since a signal between two commands does not wake a later wait.
_b_on_signal() {
  _b_poked=1
  _b_signalled=$1
  if [ -z "$_b_stopped" ]; then
    _b_stopped=signal
    _b_stop
  fi
}

_b_on_alarm() {
  _b_poked=1
  if [ -z "$_b_stopped" ]; then
    _b_stopped=time
    _b_stop
  elif [ -n "$_b_pid" ]; then
    _b_signal KILL
  fi
}

_b_listen() {
  trap '_b_on_signal TERM' TERM
  trap '_b_on_signal INT' INT
  trap '_b_on_signal HUP' HUP
  trap '_b_on_signal QUIT' QUIT
  trap '_b_on_signal XCPU' XCPU
}

_b_listen
trap '_b_on_alarm' ALRM
# These are for the user's program alone, but reach every process of the job.
trap '_b_poked=1' USR1 USR2

# Runs what lies in the step file; its status comes in _b_code.
_b_run() {
  $_b_setsid "$_b_shell" @LOGIN@ <"$_b_dir/step" 2>&8 8>&- &
  _b_pid=$!
  # A signal that came before the line above found nobody to stop.
  [ -z "$_b_stopped" ] || _b_stop
  _b_told=
  while :; do
    _b_poked=
    wait "$_b_pid"
    _b_code=$?
    if [ "$_b_code" -eq 127 ] && [ -n "$_b_told" ]; then
      _b_code=$_b_told
      break
    fi
    [ "$_b_code" -gt 128 ] || _b_told=$_b_code
    if [ -n "$_b_poked" ]; then
      # Bash can lose a child's end to a signal that comes with it, and would wait for ever. Of a step
      # that was stopped the code does not matter.
      if [ -z "$_b_stopped" ] || kill -0 "$_b_pid"; then
        continue
      fi
      _b_code=${_b_told:-143}
      break
    fi
    # Stopped, as batch systems do to make room; or ended with a code that looks like it.
    case $_b_code in
    147 | 148 | 149 | 150)
      if kill -0 "$_b_pid"; then
        sleep 1
        continue
      fi
      wait "$_b_pid"
      _b_again=$?
      [ "$_b_again" -eq 127 ] || _b_code=$_b_again
      ;;
    esac
    break
  done
  _b_pid=
}

# The job's variables come under a prefix, so that neither this shell nor a login profile meets them.
_b_prologue='@PROLOGUE@'

# Runs a step: section, title, script.
_b_step() {
  printf '%s\n%s\n' "$_b_prologue" "$3" >"$_b_dir/step" || _b_broken "cannot write the step's script"
  [ -z "@SECTIONS@" ] || _b_mark section_start "$1"
  printf '\033[0K\033[36;1m%s\033[0;m\033[0;m\n' "$2"
  _b_run
  [ -z "@SECTIONS@" ] || _b_mark section_end "$1"
}

_b_shell=sh
[ -z "@BASH@" ] || ! command -v bash >/dev/null || _b_shell=bash
cd @PROJECT@ || _b_broken "the project directory cannot be entered from this machine"
