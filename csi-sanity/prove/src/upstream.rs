//! Upstream's programs, built from the Go modules in `csi-sanity/upstream` and kept below the target directory.
//!
//! A module is built again when its files or the Go toolchain have changed, by one process at a time: others wait for it.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::{output, root, target_dir, text_of};

/// Programs that a Go module pins.
pub struct Module {
    /// The name of this build.
    name: &'static str,
    /// The directory of the module, below `csi-sanity/upstream`.
    dir: &'static str,
    /// What the programs are called, and their main packages.
    programs: &'static [(&'static str, &'static str)],
    /// Whether C code is part of it.
    cgo: bool,
    tags: &'static str,
    ldflags: &'static str,
}

/// The version is linked in, as upstream's own builds do: programs compare versions.
const KUBERNETES_VERSION: &str = "-s -w \
    -X k8s.io/component-base/version.gitVersion=v1.37.2 \
    -X k8s.io/component-base/version.gitMajor=1 \
    -X k8s.io/component-base/version.gitMinor=37 \
    -X k8s.io/client-go/pkg/version.gitVersion=v1.37.2 \
    -X k8s.io/client-go/pkg/version.gitMajor=1 \
    -X k8s.io/client-go/pkg/version.gitMinor=37";

const SANITY: Module = Module {
    name: "csi-sanity",
    dir: "csi-sanity",
    programs: &[("csi-sanity", "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity")],
    cgo: false,
    tags: "",
    ldflags: "-s -w",
};

/// Of the module of Kubernetes: Helm is made of the same libraries, which are then built once.
const HELM: Module = Module {
    name: "helm",
    dir: "kubernetes",
    programs: &[("helm", "helm.sh/helm/v4/cmd/helm")],
    cgo: false,
    tags: "",
    ldflags: "-s -w",
};

const KUBERNETES: Module = Module {
    name: "kubernetes",
    dir: "kubernetes",
    programs: &[
        ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
        (
            "kube-controller-manager",
            "k8s.io/kubernetes/cmd/kube-controller-manager",
        ),
        ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
        ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
        ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
        (
            "csi-provisioner",
            "github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner",
        ),
        (
            "csi-resizer",
            "github.com/kubernetes-csi/external-resizer/v2/cmd/csi-resizer",
        ),
        ("etcd", "go.etcd.io/etcd/server/v3"),
        // A stand-in of ours: upstream's node-driver-registrar is not to be had as a Go module.
        (
            "csi-node-driver-registrar",
            "hostdir.csi/csi-sanity/kubernetes/registrar",
        ),
    ],
    cgo: false,
    tags: "",
    ldflags: KUBERNETES_VERSION,
};

const CONTAINERD: Module = Module {
    name: "containerd",
    dir: "containerd",
    programs: &[
        ("containerd", "github.com/containerd/containerd/v2/cmd/containerd"),
        (
            "containerd-shim-runc-v2",
            "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
        ),
        ("ctr", "github.com/containerd/containerd/v2/cmd/ctr"),
        ("bridge", "github.com/containernetworking/plugins/plugins/main/bridge"),
        (
            "loopback",
            "github.com/containernetworking/plugins/plugins/main/loopback",
        ),
        (
            "host-local",
            "github.com/containernetworking/plugins/plugins/ipam/host-local",
        ),
    ],
    cgo: false,
    tags: "",
    ldflags: "-s -w",
};

/// With C: runc needs libseccomp, or no pod with a seccomp profile starts.
const RUNC: Module = Module {
    name: "runc",
    dir: "containerd",
    programs: &[("runc", "github.com/opencontainers/runc")],
    cgo: true,
    tags: "seccomp",
    ldflags: "-s -w",
};

/// Whether this machine has a Go toolchain.
#[must_use]
pub fn has_go() -> bool {
    Command::new("go")
        .arg("version")
        .output()
        .is_ok_and(|output| output.status.success())
}

/// The csi-sanity that its module pins.
///
/// # Errors
/// It cannot be built.
pub fn csi_sanity() -> Result<PathBuf> {
    Ok(build(&SANITY)?.join("csi-sanity"))
}

/// The Helm that its module pins.
///
/// # Errors
/// It cannot be built.
pub fn helm() -> Result<PathBuf> {
    Ok(build(&HELM)?.join("helm"))
}

/// The directory with all programs of a cluster.
///
/// # Errors
/// They cannot be built.
pub fn cluster() -> Result<PathBuf> {
    for module in [&RUNC, &CONTAINERD, &HELM] {
        build(module)?;
    }
    build(&KUBERNETES)
}

/// Builds everything, what the first tests need first.
///
/// # Errors
/// Something cannot be built.
pub fn all() -> Result<()> {
    for module in [&SANITY, &HELM, &KUBERNETES, &CONTAINERD, &RUNC] {
        build(module)?;
    }
    Ok(())
}

/// Builds a module unless it is there; the directory of its programs.
fn build(module: &Module) -> Result<PathBuf> {
    let bin = target_dir().join("lab/bin");
    fs::create_dir_all(&bin).with_context(|| format!("cannot make {}", bin.display()))?;
    let file = |suffix: &str| bin.join(format!(".{}.{suffix}", module.name));
    let lock = File::create(file("lock")).context("cannot make a lock")?;
    lock.lock().context("cannot lock a build")?;
    let source = root().join("csi-sanity/upstream").join(module.dir);
    let wanted = fingerprint(module, &source)?;
    let stamp = file("stamp");
    let are_there = module.programs.iter().all(|(name, _)| bin.join(name).exists());
    if are_there && fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return Ok(bin);
    }
    let start = Instant::now();
    say(&format!(
        "building {} (Go, csi-sanity/upstream/{})",
        module.name, module.dir
    ));
    let new = file("new");
    // An interrupted build may have left something.
    if new.exists() {
        #[expect(
            clippy::disallowed_methods,
            reason = "a directory of programs, below the target directory"
        )]
        fs::remove_dir_all(&new).context("cannot remove a directory")?;
    }
    fs::create_dir_all(&new).context("cannot make a directory")?;
    // All at once: the linker of one works while another is compiled.
    let mut command = Command::new("nice");
    command
        // Beside the tests and the compiler of Rust, which come first.
        .args([
            "-n",
            "19",
            "go",
            "build",
            "-buildvcs=false",
            "-trimpath",
            "-mod=readonly",
            "-tags",
            module.tags,
        ])
        .args(["-ldflags", module.ldflags, "-o"])
        .arg(&new)
        .args(module.programs.iter().map(|(_, package)| package))
        .current_dir(&source)
        .env("CGO_ENABLED", if module.cgo { "1" } else { "0" })
        // The compiler looks for garbage less often, and is done sooner.
        .env("GOGC", "400");
    text_of(&output(&mut command)?).with_context(|| format!("cannot build {}", module.name))?;
    for (name, package) in module.programs {
        fs::rename(new.join(built_name(package)), bin.join(name)).with_context(|| format!("cannot place {name}"))?;
    }
    fs::remove_dir(&new).context("cannot remove a directory")?;
    fs::write(stamp, wanted).context("cannot write a stamp")?;
    say(&format!("built {} in {:.0?}", module.name, start.elapsed()));
    Ok(bin)
}

/// What `go build` calls the program of a package: the last part of its path that is no version (`go help build`).
fn built_name(package: &str) -> &str {
    let is_version = |part: &str| {
        part.strip_prefix('v')
            .is_some_and(|digits| digits.parse::<u32>().is_ok())
    };
    package.rsplit('/').find(|part| !is_version(part)).unwrap_or(package)
}

/// Everything that a build depends on.
fn fingerprint(module: &Module, source: &Path) -> Result<String> {
    let Module {
        name,
        dir,
        programs,
        cgo,
        tags,
        ldflags,
    } = module;
    let version = output(Command::new("go").arg("version")).context("it needs the Go toolchain (https://go.dev)")?;
    let mut text = format!(
        "{name} {dir} {programs:?} {cgo} {tags} {ldflags}\n{}",
        text_of(&version)?
    );
    for file in ["go.mod", "go.sum", "registrar/main.go"] {
        text += &fs::read_to_string(source.join(file)).unwrap_or_default();
    }
    Ok(text)
}

/// Says something to whoever waits, past a test harness that would keep it to itself.
fn say(what: &str) {
    // Nobody is there to be told that nobody listens.
    let _ = std::io::stderr().write_all(format!("{what}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_called_as_go_calls_them() {
        for (package, name) in [
            ("k8s.io/kubernetes/cmd/kubelet", "kubelet"),
            ("go.etcd.io/etcd/server/v3", "server"),
            (
                "github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner",
                "csi-provisioner",
            ),
        ] {
            assert_eq!(built_name(package), name);
        }
    }
}
