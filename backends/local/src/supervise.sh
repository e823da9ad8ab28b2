# Runs one job of bridge's local backend and outlives bridge.
#
# Arguments: job directory, workspace, time limit in seconds or '', grace in seconds, setsid, sleep,
# cgroup or '', and a label for people who read process listings.
#
# Standard input is the job's life line: a FIFO whose reading end nobody but this process keeps, so
# that whoever opens it for writing learns whether this process lives. No child may inherit it.
#
# The job's environment is this shell's own. A plain variable here would be one that the job may
# have set, and would reach it changed; hence the names.
_br_dir=$1 _br_workspace=$2 _br_limit=$3 _br_grace=$4 _br_setsid=$5 _br_sleep=$6 _br_cgroup=$7

# Caught, not ignored: what is ignored here would stay ignored in the job.
trap : HUP INT QUIT TERM USR1 USR2
# The shell's own remarks ("Killed") are not the job's output.
exec 3>&2 2>/dev/null

# Splits a line of /proc/PID/stat into $1, the pid, and from $2 on the fields after the name, which
# may hold anything: $2 state, $3 parent, $4 group, $5 session, $21 start time.
_br_fields() {
    read -r _br_stat <"$1" || return
    _br_words="${_br_stat%% *} ${_br_stat##*) }"
}

# Run once: the file is created here and nowhere else, and only one can create it.
_br_fields /proc/self/stat || exit 1
set -- $_br_words
_br_boot=
read -r _br_boot </proc/sys/kernel/random/boot_id
set -C
echo "$1 ${21} $_br_boot" >"$_br_dir/started" || exit 1
set +C

if [ -e "$_br_dir/cancelled" ]; then
    echo "never_ran=the job was cancelled before its script ran
end=1" >"$_br_dir/exited"
    exit 0
fi
if ! cd -- "$_br_workspace"; then
    echo "bridge: the workspace $_br_workspace cannot be entered"
    echo "never_ran=the workspace $_br_workspace cannot be entered
end=1" >"$_br_dir/exited"
    exit 1
fi

# Whether the script still runs: its pid and its start time are those noted.
_br_runs() {
    read -r _br_pid _br_start <"$_br_dir/session" || return
    _br_fields "/proc/$_br_pid/stat" || return
    set -- $_br_words
    [ "${21}" = "$_br_start" ]
}

# Sends a signal to all processes of the script's session.
_br_send() {
    _br_runs || return
    _br_signal=$1
    for _br_process in /proc/[0-9]*/stat; do
        _br_fields "$_br_process" || continue
        set -- $_br_words
        [ "$5" != "$_br_pid" ] || kill -s "$_br_signal" "$1"
    done
}

if [ -n "$_br_limit" ]; then
    (
        # Not one of the job's processes.
        unset BRIDGE_JOB_DIR
        "$_br_sleep" "$_br_limit" >/dev/null 3>&- || exit
        _br_runs || exit
        echo 1 >"$_br_dir/timed_out"
        echo "bridge: the time limit of $_br_limit s is over, the job is told to end"
        _br_send TERM
        "$_br_sleep" "$_br_grace" >/dev/null 3>&- || exit
        echo "bridge: the job did not end, it is killed"
        [ -z "$_br_cgroup" ] || echo 1 >"$_br_cgroup/cgroup.kill"
        _br_send KILL
    ) </dev/null &
fi

# In the foreground: a background child would start with INT and QUIT ignored.
(
    [ -z "$_br_cgroup" ] || echo 0 >"$_br_cgroup/cgroup.procs"
    _br_fields /proc/self/stat
    set -- $_br_words
    echo "$1 ${21}" >"$_br_dir/session"
    exec 2>&3 3>&-
    exec "$_br_setsid" /bin/sh "$_br_dir/script"
) </dev/null
_br_status=$?

# A job is over with its script: nothing of it may write to the log from here on.
if read -r _br_pid _br_start <"$_br_dir/session"; then
    kill -s KILL -- "-$_br_pid"
fi
[ -z "$_br_cgroup" ] || echo 1 >"$_br_cgroup/cgroup.kill"
{
    echo "status=$_br_status"
    [ -e "$_br_dir/result" ] || echo "log_len=$(command -p wc -c <"$_br_dir/log")"
    times
    echo "end=1"
} >"$_br_dir/exited"
# Our own group: the watch, its sleep, and ourselves. Nothing gentler is safe: a shell that has just
# been forked loses a TERM, and would sleep to the limit of a job long over.
kill -s KILL -- "-$$"
exit 0
