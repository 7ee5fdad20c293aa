//! Gets what the tests need besides the toolchains: Debian packages ([`packages`]) and upstream's programs, built from the
//! Go modules in `csi-sanity/upstream` ([`upstream`]). The program of this crate, `cargo prove`, gets both and runs all
//! tests.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};

pub mod packages;
pub mod upstream;

/// The repository's root.
#[must_use]
pub fn root() -> PathBuf {
    // This crate is two levels below the root.
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(Path::new("/")).to_owned()
}

/// The target directory of cargo.
#[must_use]
pub fn target_dir() -> PathBuf {
    root().join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// Cargo, run in the repository's root as if from a shell.
///
/// Removes the variables that cargo sets for the programs it runs: build scripts watch them, so cargo would rebuild
/// everything with each call.
#[must_use]
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"]
            .iter()
            .any(|prefix| text.starts_with(prefix))
            || text == "CARGO_CRATE_NAME"
            || text == "CARGO_PRIMARY_PACKAGE"
        {
            command.env_remove(name);
        }
    }
    command.current_dir(root());
    command
}

/// Runs a command to its end, with an empty standard input.
///
/// # Errors
/// The command cannot be started.
pub fn output(command: &mut Command) -> Result<Output> {
    let name = command.get_program().display().to_string();
    command.stdin(std::process::Stdio::null());
    command.output().with_context(|| format!("cannot run {name}"))
}

/// The standard output of a program that succeeded.
///
/// # Errors
/// The program failed; the error includes all its output.
pub fn text_of(output: &Output) -> Result<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let status = output.status;
    ensure!(
        status.success(),
        "{status}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(text)
}
