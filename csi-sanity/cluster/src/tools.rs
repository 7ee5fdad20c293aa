//! Upstream's programs, built on demand from the Go modules beside this crate and kept below the target directory.
//!
//! A module is built again when its files or the Go toolchain have changed. Each build says what it does and how long it took: the
//! first one of Kubernetes takes a quarter of an hour.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::machine::text_of;

/// Upstream programs that a Go module pins.
struct Module {
    /// Its directory, below `csi-sanity`.
    dir: &'static str,
    /// Its main packages, and what their programs are called.
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
    dir: ".",
    programs: &[("csi-sanity", "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity")],
    cgo: false,
    tags: "",
    ldflags: "-s -w",
};

const KUBERNETES: Module = Module {
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

/// The same module, with C: runc needs libseccomp, or no pod with a seccomp profile starts.
const RUNC: Module = Module {
    dir: "containerd",
    programs: &[("runc", "github.com/opencontainers/runc")],
    cgo: true,
    tags: "seccomp",
    ldflags: "-s -w",
};

/// The same module again: Helm is made of the same libraries, which are then built once.
const HELM: Module = Module {
    dir: "kubernetes",
    programs: &[("helm", "helm.sh/helm/v4/cmd/helm")],
    cgo: false,
    tags: "",
    ldflags: "-s -w",
};

/// One build at a time: two tests that need the same program wait for one build of it.
static BUILDING: Mutex<()> = Mutex::new(());

/// The csi-sanity that its module pins.
///
/// # Errors
/// It cannot be built here, and why.
pub fn csi_sanity() -> Result<PathBuf> {
    Ok(build(&SANITY)?.join("csi-sanity"))
}

/// The Helm that its module pins.
///
/// # Errors
/// It cannot be built here, and why.
pub fn helm() -> Result<PathBuf> {
    Ok(build(&HELM)?.join("helm"))
}

/// The directory with all programs of a cluster.
///
/// # Errors
/// They cannot be built here, and why.
pub fn cluster() -> Result<PathBuf> {
    ensure_package("/usr/include/seccomp.h", "libseccomp-dev")?;
    ensure_package("/usr/bin/busybox", "busybox-static")?;
    build(&RUNC)?;
    build(&CONTAINERD)?;
    build(&KUBERNETES)
}

/// The kernel of User-Mode Linux, with what its tests need.
///
/// # Errors
/// It cannot be installed here, and why.
pub fn user_mode_linux() -> Result<PathBuf> {
    for (file, package) in [
        ("/usr/bin/linux.uml", "user-mode-linux"),
        ("/usr/sbin/insmod", "kmod"),
        ("/usr/sbin/mkfs.xfs", "xfsprogs"),
        ("/usr/sbin/mkfs.ext4", "e2fsprogs"),
        ("/usr/sbin/repquota", "quota"),
    ] {
        ensure_package(file, package)?;
    }
    mkfs_btrfs()?;
    Ok("/usr/bin/linux.uml".into())
}

/// What makes filesystems of btrfs.
///
/// # Errors
/// It cannot be installed here, and why.
pub fn mkfs_btrfs() -> Result<()> {
    ensure_package("/usr/sbin/mkfs.btrfs", "btrfs-progs")
}

/// hostdir as one static binary, as its image has it, but not optimized: built sooner.
///
/// # Errors
/// Cargo fails.
pub fn static_hostdir() -> Result<PathBuf> {
    const TARGET: &str = env!("HOSTDIR_TARGET");
    let _building = BUILDING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let start = Instant::now();
    say("building hostdir as a static binary");
    let output = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()))
        .args([
            "build",
            "--locked",
            "--profile",
            "lab",
            "--bin",
            "hostdir",
            "--target",
            TARGET,
        ])
        .current_dir(root())
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .output()
        .context("run cargo")?;
    text_of(&output).context("build hostdir")?;
    say(&format!("built hostdir in {:.0?}", start.elapsed()));
    Ok(target_dir().join(TARGET).join("lab/hostdir"))
}

/// Says something to whoever waits, past the test harness, which would keep it to itself.
pub(crate) fn say(what: &str) {
    // Nobody is there to be told that nobody listens.
    let _ = std::io::stderr().write_all(format!("{what}\n").as_bytes());
}

/// The repository.
#[must_use]
pub fn root() -> PathBuf {
    // This crate lies two levels below it.
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .unwrap_or(Path::new("/"))
        .to_owned()
}

/// Where cargo builds to.
#[must_use]
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Builds what is not built yet; where it is.
fn build(module: &Module) -> Result<PathBuf> {
    let _building = BUILDING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let bin = target_dir().join("lab/bin");
    let source = root().join("csi-sanity").join(module.dir);
    let stamp = bin.join(format!(".{}", module.programs[0].0));
    let wanted = fingerprint(module, &source)?;
    let there = module.programs.iter().all(|(name, _)| bin.join(name).exists());
    if there && fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return Ok(bin);
    }
    fs::create_dir_all(&bin)?;
    for (name, package) in module.programs {
        let start = Instant::now();
        say(&format!("building {name} (from {package})"));
        let output = Command::new("go")
            .args([
                "build",
                "-buildvcs=false",
                "-trimpath",
                "-mod=readonly",
                "-tags",
                module.tags,
            ])
            .args(["-ldflags", module.ldflags, "-o"])
            .arg(bin.join(name))
            .arg(package)
            .current_dir(&source)
            .env("CGO_ENABLED", if module.cgo { "1" } else { "0" })
            // The compiler looks for garbage less often, and is done sooner.
            .env("GOGC", "400")
            .stdin(Stdio::null())
            .output()
            .context("it needs the Go toolchain (https://go.dev)")?;
        text_of(&output).with_context(|| format!("build {name}"))?;
        say(&format!("built {name} in {:.0?}", start.elapsed()));
    }
    fs::write(stamp, wanted)?;
    Ok(bin)
}

/// Everything that a build depends on.
fn fingerprint(module: &Module, source: &Path) -> Result<String> {
    let version = Command::new("go")
        .arg("version")
        .output()
        .context("it needs the Go toolchain (https://go.dev)")?;
    let mut digest = Sha256::new();
    digest.update(&version.stdout);
    digest.update(format!(
        "{:?} {} {} {}",
        module.programs, module.cgo, module.tags, module.ldflags
    ));
    for file in ["go.mod", "go.sum", "registrar/main.go"] {
        if let Ok(bytes) = fs::read(source.join(file)) {
            digest.update(bytes);
        }
    }
    let digest: [u8; 32] = digest.finalize().into();
    Ok(digest.map(|byte| format!("{byte:02x}")).concat())
}

/// Installs a Debian package if a file of it is missing.
fn ensure_package(file: &str, package: &str) -> Result<()> {
    // apt-get does not wait for another one.
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _installing = INSTALLING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if Path::new(file).exists() {
        return Ok(());
    }
    say(&format!("installing the Debian package {package}, which has {file}"));
    for args in [&["update", "-q"][..], &["install", "-y", "-q", package]] {
        let output = Command::new("apt-get")
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .output();
        let output =
            output.with_context(|| format!("{file} is missing, and there is no apt-get to install {package}"))?;
        if let Err(error) = text_of(&output) {
            bail!("{file} is missing, and {package} cannot be installed: {error}");
        }
    }
    ensure!(Path::new(file).exists(), "{package} is installed, but has no {file}");
    Ok(())
}
