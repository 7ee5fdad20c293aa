//! Control groups (cgroups(7), version 1): a node's containers live in groups of its own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::machine::wait_until;

/// Makes a group in every hierarchy, ready for processes. Its name, as the kubelet takes it.
pub(crate) fn make(group: &str) -> Result<String> {
    let hierarchies = hierarchies()?;
    ensure!(
        !hierarchies.is_empty(),
        "no cgroup hierarchy is mounted in /sys/fs/cgroup"
    );
    for hierarchy in hierarchies {
        let path = hierarchy.join(group);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        fill_cpuset(&hierarchy, group)?;
    }
    Ok(format!("/{group}"))
}

/// Removes all groups below one whose processes are gone, as a machine forgets them that loses its power. A kubelet that
/// finds groups of containers that do not exist asks three seconds for each before it does anything else.
pub(crate) fn clear(group: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let path = hierarchy.join(group.trim_start_matches('/'));
        wait_until("the groups of a machine without power are gone", || {
            clear_below(&path).map(|()| true)
        })?;
    }
    Ok(())
}

fn clear_below(path: &Path) -> Result<()> {
    for entry in fs::read_dir(path).with_context(|| format!("list {}", path.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            clear_below(&entry.path())?;
            fs::remove_dir(entry.path()).with_context(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

fn hierarchies() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for hierarchy in fs::read_dir("/sys/fs/cgroup").context("list the cgroup hierarchies")? {
        let hierarchy = hierarchy?.path();
        // A link such as cpu -> cpu,cpuacct is a second name of one hierarchy.
        if hierarchy.is_dir() && !hierarchy.is_symlink() {
            found.push(hierarchy);
        }
    }
    Ok(found)
}

/// A new cpuset has no processors and no memory, and takes no process until it has (cpuset(7)); top down.
fn fill_cpuset(hierarchy: &Path, group: &str) -> Result<()> {
    if !hierarchy.ends_with("cpuset") {
        return Ok(());
    }
    let mut path: PathBuf = hierarchy.to_owned();
    for part in group.split('/') {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let from = fs::read_to_string(path.join(file)).with_context(|| format!("read {file}"))?;
            fs::write(path.join(part).join(file), from).with_context(|| format!("fill {file}"))?;
        }
        path.push(part);
    }
    Ok(())
}
