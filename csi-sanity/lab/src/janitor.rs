//! Cleans up when the process that made a cluster is gone: a shell removes its directory and cgroups.

use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result};

use crate::cgroup;

/// The cgroup of all clusters, in every hierarchy.
const CGROUPS: &str = "hostdir-lab";

/// Waits for the end of its standard input, which comes when the process that made the cluster ends for any reason. Then
/// removes the cgroups, once their processes are gone, and the directory, except what is still mounted there.
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
    /// Starts a janitor for a cluster's directory.
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        // As unique as the directory.
        let name = dir.file_name().context("the directory of a cluster has no name")?;
        let cgroup = format!("{CGROUPS}/{}", name.display());
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

    /// Makes a cgroup of this cluster. Returns its name as the kubelet expects it.
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
