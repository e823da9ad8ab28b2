//! Control groups (version 2): one per job where the service may make them.
//!
//! Nothing leaves a control group by changing its session, parent or environment, so with one the
//! whole of a job can be seen and killed. No controller is switched on; it is a net, not a limit.

use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;

use bridge_backend::BackendError;
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::Access;

use crate::dir::{JobDir, failed};

/// Finds the group under which jobs' groups can be made: our own, if it may be written.
pub(crate) fn parent() -> Option<Utf8PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let parent = locate(&mounts, &groups)?;
    let writable = Access::WRITE_OK | Access::EXEC_OK;
    rustix::fs::access(parent.as_std_path(), writable).ok()?;
    rustix::fs::access(parent.join("cgroup.procs").as_std_path(), Access::WRITE_OK).ok()?;
    Some(parent)
}

/// Joins the mount point of the hierarchy with our place in it.
fn locate(mounts: &str, groups: &str) -> Option<Utf8PathBuf> {
    let mount = mounts.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let mut fields = place.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (kind.starts_with("cgroup2 ") && root == "/").then_some(point)
    })?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    (!own.starts_with("..")).then(|| Utf8Path::new(mount).join(own))
}

/// Makes a job's group; `None` when it cannot be had, which is no reason not to run the job.
pub(crate) fn make(parent: &Utf8Path, dir: &JobDir) -> Option<Utf8PathBuf> {
    // Several bridges may share one parent, so the whole path is in the name.
    let mut hasher = DefaultHasher::new();
    dir.path().hash(&mut hasher);
    let name = dir.path().file_name().unwrap_or_default();
    let group = parent.join(format!("bridge-{name}-{:016x}", hasher.finish()));
    match fs::create_dir(&group) {
        Ok(()) => Some(group),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Some(group),
        Err(error) => {
            tracing::debug!(%error, %group, "a job goes without a control group");
            None
        }
    }
}

/// Lists the processes in a group; nobody, when there is no such group.
fn members(group: &Utf8Path) -> Vec<i32> {
    let procs = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    procs.lines().filter_map(|line| line.parse().ok()).collect()
}

/// Says whether anybody is left in the group.
pub(crate) fn is_populated(group: &Utf8Path) -> bool {
    let events = fs::read_to_string(group.join("cgroup.events")).unwrap_or_default();
    events.lines().any(|line| line == "populated 1")
}

/// Kills everybody in the group and its children, at once where the kernel can (5.14).
pub(crate) fn kill(group: &Utf8Path) {
    if fs::write(group.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    for pid in members(group) {
        if let Some(pid) = rustix::process::Pid::from_raw(pid)
            && let Err(error) = rustix::process::kill_process(pid, rustix::process::Signal::KILL)
        {
            tracing::debug!(%error, "a process of a job had ended before it was killed");
        }
    }
}

/// Removes a job's empty group.
pub(crate) fn remove(group: &Utf8Path) -> Result<(), BackendError> {
    match remove_tree(group) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("remove the control group", group, error)),
    }
}

/// Removes groups from the leaves up: a job may have made groups of its own.
fn remove_tree(group: &Utf8Path) -> io::Result<()> {
    for entry in group.read_dir_utf8()? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(entry.path())?;
        }
    }
    fs::remove_dir(group)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_group_is_found_in_either_layout() {
        let hybrid = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n\
                      40 31 0:37 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n";
        let found = locate(hybrid, "8:pids:/\n0::/a/b.service\n").unwrap();
        assert_eq!(found, "/sys/fs/cgroup/unified/a/b.service");
        let unified = "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(locate(unified, "0::/\n").unwrap(), "/sys/fs/cgroup/");
        assert_eq!(locate(unified, "0::/../x\n"), None);
        assert_eq!(locate("", "0::/\n"), None);
    }
}
