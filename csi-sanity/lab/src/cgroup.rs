//! Control groups (cgroups(7)), version 1 or 2: each node's containers run in their own groups.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::machine::wait_until;

const ROOT: &str = "/sys/fs/cgroup";

/// The cgroup hierarchies of this machine.
enum Hierarchies {
    /// Version 1: one hierarchy per controller.
    V1(Vec<PathBuf>),
    /// Version 2: one hierarchy, in which each group enables controllers for its children.
    V2,
}

/// Whether this machine has cgroups that a cluster can use.
pub(crate) fn are_here() -> bool {
    hierarchies().is_ok()
}

/// Makes a group that can hold processes. Returns its name as the kubelet expects it.
pub(crate) fn make(group: &str) -> Result<String> {
    match hierarchies()? {
        Hierarchies::V1(hierarchies) => {
            for hierarchy in hierarchies {
                make_dir(&hierarchy.join(group))?;
                fill_cpuset(&hierarchy, group)?;
            }
        }
        Hierarchies::V2 => {
            make_dir(&Path::new(ROOT).join(group))?;
            pass_controllers_on(group)?;
        }
    }
    Ok(format!("/{group}"))
}

/// Removes all groups below `group`, as a power cut does. Otherwise the next kubelet spends three seconds on each leftover
/// group before it does anything else.
pub(crate) fn clear(group: &str) -> Result<()> {
    let roots = match hierarchies()? {
        Hierarchies::V1(hierarchies) => hierarchies,
        Hierarchies::V2 => vec![ROOT.into()],
    };
    for root in roots {
        let path = root.join(group.trim_start_matches('/'));
        wait_until("the cgroups of the switched-off machine are removed", || {
            clear_below(&path).map(|()| true)
        })?;
    }
    Ok(())
}

fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("make {}", path.display()))
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

fn hierarchies() -> Result<Hierarchies> {
    if Path::new(ROOT).join("cgroup.controllers").exists() {
        return Ok(Hierarchies::V2);
    }
    let mut found = Vec::new();
    for hierarchy in fs::read_dir(ROOT).with_context(|| format!("list {ROOT}"))? {
        let hierarchy = hierarchy?.path();
        // A link such as cpu -> cpu,cpuacct is a second name for one hierarchy.
        if hierarchy.is_dir() && !hierarchy.is_symlink() {
            found.push(hierarchy);
        }
    }
    ensure!(!found.is_empty(), "no cgroup hierarchy is mounted in {ROOT}");
    Ok(Hierarchies::V1(found))
}

/// Version 2: enables all controllers for the children of each group, top down, including the last group, because the
/// kubelet makes groups in it.
fn pass_controllers_on(group: &str) -> Result<()> {
    let mut path = PathBuf::from(ROOT);
    let parts = [""].into_iter().chain(group.split('/'));
    for part in parts {
        path.push(part);
        let read = fs::read_to_string(path.join("cgroup.controllers")).context("read the controllers")?;
        let all: Vec<String> = read
            .split_whitespace()
            .map(|controller| format!("+{controller}"))
            .collect();
        fs::write(path.join("cgroup.subtree_control"), all.join(" ")).with_context(|| {
            format!(
                "enable controllers in {}; the group must have no processes of its own",
                path.display()
            )
        })?;
    }
    Ok(())
}

/// Version 1: a new cpuset has no CPUs and no memory nodes, and cannot hold processes until it has (cpuset(7)). Copies them
/// top down.
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
