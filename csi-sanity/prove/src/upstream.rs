//! Upstream's programs, built from the Go modules in `csi-sanity/upstream` and kept below the target directory.
//!
//! A module is rebuilt when its files or the Go toolchain have changed. One process builds, others wait for it.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::{output, root, target_dir, text_of};

/// Programs whose versions a Go module pins.
pub struct Module {
    /// The name of this build.
    name: &'static str,
    /// The directory of the module, below `csi-sanity/upstream`.
    dir: &'static str,
    /// The names of the programs, and their main packages.
    programs: &'static [(&'static str, &'static str)],
    /// Whether the build needs C code.
    cgo: bool,
    tags: &'static str,
    ldflags: &'static str,
}

/// Links the version in, as upstream's own builds do, because programs compare versions.
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

/// In the Go module of Kubernetes, because Helm uses the same libraries, which are then built once.
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
        // Our own stand-in: upstream's node-driver-registrar is not available as a Go module.
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

/// Needs C: without libseccomp, runc starts no pod with a seccomp profile.
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

/// The path of csi-sanity, built if necessary.
///
/// # Errors
/// csi-sanity cannot be built.
pub fn csi_sanity() -> Result<PathBuf> {
    Ok(build(&SANITY)?.join("csi-sanity"))
}

/// The path of Helm, built if necessary.
///
/// # Errors
/// Helm cannot be built.
pub fn helm() -> Result<PathBuf> {
    Ok(build(&HELM)?.join("helm"))
}

/// The directory with all programs of a cluster, built if necessary.
///
/// # Errors
/// A program cannot be built.
pub fn cluster() -> Result<PathBuf> {
    for module in [&RUNC, &CONTAINERD, &HELM] {
        build(module)?;
    }
    build(&KUBERNETES)
}

/// Builds all programs, starting with those that tests need first.
///
/// # Errors
/// A program cannot be built.
pub fn all() -> Result<()> {
    for module in [&SANITY, &HELM, &KUBERNETES, &CONTAINERD, &RUNC] {
        build(module)?;
    }
    Ok(())
}

/// Builds a module unless it is up to date. Returns the directory of its programs.
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
    // One call for all programs: one is linked while another is compiled.
    let mut command = Command::new("nice");
    command
        // Tests and the Rust compiler run at the same time, and come first.
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
        // Less frequent garbage collection makes the Go compiler faster.
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

/// The name that `go build` gives to a package's program: the last part of its path that is not a version (`go help build`).
fn built_name(package: &str) -> &str {
    let is_version = |part: &str| {
        part.strip_prefix('v')
            .is_some_and(|digits| digits.parse::<u32>().is_ok())
    };
    package.rsplit('/').find(|part| !is_version(part)).unwrap_or(package)
}

/// The inputs of a build, as text: a change of it means that the module must be rebuilt.
fn fingerprint(module: &Module, source: &Path) -> Result<String> {
    let Module {
        name,
        dir,
        programs,
        cgo,
        tags,
        ldflags,
    } = module;
    let version =
        output(Command::new("go").arg("version")).context("the build needs the Go toolchain (https://go.dev)")?;
    let mut text = format!(
        "{name} {dir} {programs:?} {cgo} {tags} {ldflags}\n{}",
        text_of(&version)?
    );
    for file in ["go.mod", "go.sum", "registrar/main.go"] {
        text += &fs::read_to_string(source.join(file)).unwrap_or_default();
    }
    Ok(text)
}

/// Prints a line to standard error directly: a test harness captures `eprintln!`.
fn say(what: &str) {
    // If standard error is closed, there is nowhere to report the failure.
    let _ = std::io::stderr().write_all(format!("{what}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_names_are_those_that_go_build_uses() {
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
