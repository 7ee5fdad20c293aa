//! What is left when the process that made a cluster is gone: a directory, and cgroups. A shell waits for that.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Below every hierarchy of `/sys/fs/cgroup`, the cgroups of all clusters.
const CGROUPS: &str = "hostdir-lab";

/// Waits for its standard input to end, which happens when the maker of the cluster is gone, by whatever cause; then
/// removes the cgroups (once their processes are gone) and the directory (once nothing is mounted there any more).
const SCRIPT: &str = r#"
trap '' INT TERM HUP
read -r _ || :
for attempt in $(seq 600); do
    for hierarchy in /sys/fs/cgroup/*/; do
        [ -d "$hierarchy$2" ] && find "$hierarchy$2" -depth -type d -exec rmdir {} + 2>/dev/null
    done
    left=$(for hierarchy in /sys/fs/cgroup/*/; do [ -d "$hierarchy$2" ] && echo x; done)
    [ -z "$left" ] && break
    sleep 0.1
done
# The parent of all clusters' cgroups, if this was the last one.
rmdir /sys/fs/cgroup/*/"${2%/*}" 2>/dev/null
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

    /// Makes a cgroup of this cluster in every hierarchy, ready for processes. Its name, as the kubelet takes it.
    pub(crate) fn make_cgroup(&self, name: &str) -> Result<String> {
        let cgroup = format!("{}/{name}", self.cgroup);
        let mut made = 0;
        for hierarchy in fs::read_dir("/sys/fs/cgroup").context("list the cgroup hierarchies")? {
            let hierarchy = hierarchy?.path();
            // A link such as cpu -> cpu,cpuacct is a second name of one hierarchy.
            if !hierarchy.is_dir() || hierarchy.is_symlink() {
                continue;
            }
            let path = hierarchy.join(&cgroup);
            fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
            fill_cpuset(&hierarchy, &cgroup)?;
            made += 1;
        }
        ensure!(made > 0, "no cgroup hierarchy is mounted in /sys/fs/cgroup");
        Ok(format!("/{cgroup}"))
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.shell.wait();
    }
}

/// A new cpuset has no processors and no memory, and takes no process until it has (cpuset(7)); top down.
fn fill_cpuset(hierarchy: &Path, cgroup: &str) -> Result<()> {
    if !hierarchy.ends_with("cpuset") {
        return Ok(());
    }
    let mut path: PathBuf = hierarchy.to_owned();
    for part in cgroup.split('/') {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let from = fs::read_to_string(path.join(file)).with_context(|| format!("read {file}"))?;
            fs::write(path.join(part).join(file), from).with_context(|| format!("fill {file}"))?;
        }
        path.push(part);
    }
    Ok(())
}
