# Fetches a job's sources where the job runs, in the order in which the submit node would.
#
# Needs a POSIX shell and git; 1.8.3 will do. What is particular to the job stands above this text: the
# variables s_… and the functions s_run_….
set +efu
s_home=$s_own/home s_code=0

s_note() { printf '\033[32;1m%s\033[0;m\n' "$1"; }
s_warn() { printf '\033[0;33mWARNING: %s\033[0;m\n' "$1"; }

# Nothing of this stage outlives it: neither git's settings nor certificates.
s_end() {
  cd /
  rm -rf "$s_own"
  exit "$1"
}

# The machine could not do it, whoever's job it is.
s_broken() {
  printf '\033[31;1mERROR: %s\033[0;m\n' "$1"
  printf '%s\n' "$1" >"$s_broken_file"
  s_end 1
}

# Git with settings of its own: the account's do not count, the machine's do, for its proxies.
s_git() (
  unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_CONFIG GIT_CONFIG_COUNT \
    GIT_CONFIG_PARAMETERS GIT_CONFIG_GLOBAL XDG_CONFIG_HOME GIT_ASKPASS SSH_ASKPASS
  HOME=$s_home LC_ALL=C GIT_TERMINAL_PROMPT=0 GCM_INTERACTIVE=Never GIT_SSH_COMMAND=$s_ssh
  GIT_ALLOW_PROTOCOL=$s_protocols GIT_NO_REPLACE_OBJECTS=1 GIT_LFS_SKIP_SMUDGE=1
  GIT_CEILING_DIRECTORIES=${s_project%/*}
  export HOME LC_ALL GIT_TERMINAL_PROMPT GCM_INTERACTIVE GIT_SSH_COMMAND GIT_ALLOW_PROTOCOL \
    GIT_NO_REPLACE_OBJECTS GIT_LFS_SKIP_SMUDGE GIT_CEILING_DIRECTORIES
  if [ -n "$s_only_ca" ]; then
    GIT_SSL_CAINFO=$s_only_ca
    export GIT_SSL_CAINFO
  fi
  for s_n in $s_names; do
    eval "$s_n=\${$s_carrier$s_n}; export $s_n"
    unset "$s_carrier$s_n"
  done
  exec git "$@"
)

# The author's and the operator's commands, in a directory: with the job's variables, in git's home.
s_hook() {
  [ -n "$1" ] || return 0
  s_shell=sh
  [ -z "$s_bash" ] || ! command -v bash >/dev/null 2>&1 || s_shell=bash
  printf '%s\n' "$1" | (
    for s_n in $s_names; do unset "$s_carrier$s_n"; done
    HOME=$s_home GIT_TERMINAL_PROMPT=0 GITLAB_ENV=$s_env
    export HOME GIT_TERMINAL_PROMPT GITLAB_ENV
    cd "$2" && exec "$s_shell"
  )
}

s_remove_all() { rm -rf -- ./* ./.[!.]* ./..?*; }

# Empties the checkout and leaves the directory, in which shells already are.
s_wipe() {
  # Build tools like to leave directories that nobody may write to.
  s_remove_all 2>/dev/null || {
    chmod -R u+rwX . 2>/dev/null
    s_remove_all
  }
}

s_is_repository() { [ -d .git/objects ] && [ -d .git/refs ] && [ -f .git/HEAD ]; }

s_repository() {
  s_note "$s_fetching"
  if ! s_is_repository; then
    rm -rf .git
    s_run_init || return
    s_note 'Created fresh repository.'
  fi
  # A git that was killed leaves these.
  rm -f .git/index.lock .git/shallow.lock .git/HEAD.lock .git/config.lock .git/packed-refs.lock
  find .git/refs -name '*.lock' -exec rm -f {} + 2>/dev/null
  printf '%s' "$s_config" >.git/config || return
  if [ "$s_depth" -gt 0 ]; then
    s_run_fetch --depth "$s_depth"
  elif [ -f .git/shallow ]; then
    s_run_fetch --unshallow
  else
    s_run_fetch
  fi || return
  if [ -z "$s_checking" ]; then
    s_note 'Skipping Git checkout'
    return 0
  fi
  s_note "$s_checking"
  s_run_checkout && s_run_clean
}

# Files of Git LFS have come as pointers; they are fetched all at once.
s_large() {
  if [ -z "$s_lfs" ] || ! s_git grep -q filter=lfs -- .gitattributes '*/.gitattributes' 2>/dev/null; then
    return 0
  fi
  if ! s_git lfs version >/dev/null 2>&1; then
    s_warn "the repository has files in Git LFS, and git-lfs is not installed on $(uname -n), where the job runs: these files stay pointers"
    s_lfs=''
    return 0
  fi
  s_note 'Fetching files in Git LFS...'
  s_run_lfs
}

s_each() { s_git submodule --quiet foreach $s_recursive "$1"; }

s_update() {
  if [ "$s_module_depth" -gt 0 ]; then
    s_run_update --depth "$s_module_depth"
  else
    s_run_update
  fi
}

s_submodules() {
  if [ -z "$s_updating" ]; then
    s_note 'Skipping Git submodules setup'
    return 0
  fi
  s_note "$s_updating"
  [ -f .gitmodules ] || return 0
  s_run_submodule_init && s_run_sync && s_each "$s_clean_each" && s_each 'git reset --hard -q' || return
  if ! s_update; then
    s_warn 'updating the submodules failed; trying once more'
    # A branch named in .gitmodules is not among what a shallow or single-branch clone has.
    [ -z "$s_remote" ] || s_each 'git fetch origin +refs/heads/*:refs/remotes/origin/*' || return
    s_run_sync && s_update && s_each 'git reset --hard -q' || return
  fi
  s_each "$s_clean_each" || return
  [ -z "$s_lfs" ] || s_each "$s_lfs_each"
}

# Leaves nothing of the submodules but their places.
s_wipe_submodules() {
  rm -rf .git/modules || return
  s_git ls-files -s | while IFS= read -r s_line; do
    case $s_line in
    160000*) rm -rf "./${s_line#*	}" && mkdir -p "./${s_line#*	}" || exit ;;
    esac
  done
}

s_server_answers() { s_git ls-remote --quiet origin HEAD >/dev/null 2>&1; }

s_attempt() {
  s_hook "$s_before" "$s_temp" || return
  if [ -n "$s_clone" ]; then
    s_wipe || return
  fi
  s_inherited=''
  if s_is_repository; then s_inherited=1; fi
  s_repository
  s_code=$?
  # What an earlier job left may be beyond repair. Where the server answers, it is to blame; where not,
  # it is kept, since a full clone would fail as well.
  if [ "$s_code" -ne 0 ] && [ -n "$s_inherited" ] && s_server_answers; then
    s_warn 'the checkout of an earlier job cannot be brought up to date; starting afresh'
    s_wipe && s_repository
    s_code=$?
  fi
  [ "$s_code" -eq 0 ] || return "$s_code"
  s_large || return
  s_inherited=''
  if [ -d .git/modules ]; then s_inherited=1; fi
  s_submodules
  s_code=$?
  if [ "$s_code" -ne 0 ] && [ -n "$s_inherited" ] && s_server_answers; then
    s_warn 'the submodules of an earlier job cannot be brought up to date; starting them afresh'
    s_wipe_submodules && s_submodules
    s_code=$?
  fi
  [ "$s_code" -eq 0 ] || return "$s_code"
  s_hook "$s_after" "$s_project"
}

# Empties the checkout as far as git can: what a plain clean does not reach.
s_clear() {
  s_is_repository || return 0
  s_note 'Deleting tracked and untracked files...'
  s_git rm -rf --ignore-unmatch --quiet .
  s_git clean -ffdx -q
}

# Puts caches and artifacts of earlier jobs into the checkout, where they win over what is there.
s_restore() {
  [ -d "$s_restored" ] || return 0
  cd "$s_restored" || return
  for s_entry in ./* ./.[!.]* ./..?*; do
    if [ ! -e "$s_entry" ] && [ ! -L "$s_entry" ]; then
      continue
    elif [ -e "$s_project/$s_entry" ] || [ -L "$s_project/$s_entry" ]; then
      tar -cf - "$s_entry" | tar -xpf - -C "$s_project" || return
    else
      mv "$s_entry" "$s_project/" || return
    fi
  done
}

rm -f "$s_broken_file"
cd "$s_project" || s_broken "$s_project cannot be entered on $(uname -n)"
command -v git >/dev/null 2>&1 ||
  s_broken "git is not installed on $(uname -n), where the job runs and is to fetch its sources"
s_only_ca=''
case $(git version 2>/dev/null) in
'git version 1.'* | 'git version 2.'[0-8].*) ;;
# Whatever helpers the machine has, they must neither answer nor remember.
*) s_settings="$s_reset$s_settings" ;;
esac
case $(git version 2>/dev/null) in
# These know no settings for one server, and no depth of submodules.
'git version 1.'[0-7].* | 'git version 1.8.'[0-4] | 'git version 1.8.'[0-4].*)
  s_only_ca=$s_ca s_module_depth=0
  ;;
esac
(umask 077 && mkdir -p "$s_home" && printf '%s' "$s_settings" >"$s_home/.gitconfig") ||
  s_broken "$s_own cannot be written on $(uname -n)"

s_attempt
s_code=$?
s_number=1
for s_pause in $s_pauses; do
  [ "$s_code" -ne 0 ] || break
  s_number=$((s_number + 1))
  s_warn "get_sources: exit status $s_code; attempt $s_number of $s_most follows in $s_pause s"
  sleep "$s_pause"
  [ "$s_number" -ne 2 ] || s_clear
  s_attempt
  s_code=$?
done
[ "$s_code" -eq 0 ] || s_end "$s_code"
s_restore || s_broken "caches and artifacts of earlier jobs cannot be put into the checkout on $(uname -n)"
s_end 0
