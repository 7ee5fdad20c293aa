//! What is left when the process that made a cluster is gone: a directory, and cgroups. A shell waits for that.

use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result};

use crate::cgroup;

/// Below every hierarchy of cgroups, those of all clusters.
const CGROUPS: &str = "hostdir-lab";

/// Waits for its standard input to end, which happens when the maker of the cluster is gone, by whatever cause; then
/// removes the cgroups (once their processes are gone) and the directory (once nothing is mounted there any more).
const SCRIPT: &str = r#"
trap '' INT TERM HUP
read -r _ || :
# Version 2 has one hierarchy, version 1 several.
for attempt in $(seq 600); do
    left=
    for hierarchy in /sys/fs/cgroup/ /sys/fs/cgroup/*/; do
        [ -d "$hierarchy$2" ] || continue
        find "$hierarchy$2" -depth -type d -exec rmdir {} + 2>/dev/null
        [ -d "$hierarchy$2" ] && left=x
    done
    [ -z "$left" ] && break
    sleep 0.1
done
# The parent of all clusters' cgroups, if this was the last one.
rmdir /sys/fs/cgroup/"${2%/*}" /sys/fs/cgroup/*/"${2%/*}" 2>/dev/null
rm -rf --one-file-system "$1"
"#;

/// The janitor of one cluster.
pub(crate) struct Janitor {
    stdin: Option<ChildStdin>,
    shell: Child,
    cgroup: String,
}

impl Janitor {
    /// A janitor for a directory.
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        let cgroup = format!("{CGROUPS}/{}", std::process::id());
        let mut shell = Command::new("bash")
            .args(["-c", SCRIPT, "janitor"])
            .arg(dir)
            .arg(&cgroup)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start the janitor")?;
        Ok(Self {
            stdin: shell.stdin.take(),
            shell,
            cgroup,
        })
    }

    /// Makes a cgroup of this cluster. Its name, as the kubelet takes it.
    pub(crate) fn make_cgroup(&self, name: &str) -> Result<String> {
        cgroup::make(&format!("{}/{name}", self.cgroup))
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.shell.wait();
    }
}
