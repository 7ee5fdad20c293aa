//! Upstream programs, built on demand from the Go modules beside these tests, and kept in the target directory.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Instant;

/// The csi-sanity that `go.mod` pins; where it cannot be built, why.
pub(crate) fn csi_sanity() -> Result<PathBuf, String> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    BUILT
        .get_or_init(|| build("csi-sanity", "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity"))
        .clone()
}

fn build(name: &str, package: &str) -> Result<PathBuf, String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("csi-sanity");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tools").join(name);
    let start = Instant::now();
    eprintln!("building {name} (about a minute the first time)");
    // Go keeps what it built and looks at nothing else when nothing has changed.
    let built = Command::new("go")
        .args(["build", "-buildvcs=false", "-mod=readonly", "-o"])
        .args([program.as_os_str(), package.as_ref()])
        .current_dir(source)
        .env("CGO_ENABLED", "0")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("it needs the Go toolchain: {error}"))?;
    if !built.status.success() {
        return Err(format!(
            "{name} cannot be built: {}",
            String::from_utf8_lossy(&built.stderr)
        ));
    }
    eprintln!("built {name} in {:.0?}", start.elapsed());
    Ok(program)
}
