//! What the tests need beside the toolchains: Debian packages ([`packages`]) and upstream's programs, built from the Go modules
//! in `csi-sanity/upstream` ([`upstream`]). The program of this crate, `cargo prove`, gets both and runs all tests.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};

pub mod packages;
pub mod upstream;

/// The repository.
#[must_use]
pub fn root() -> PathBuf {
    // This crate lies two levels below it.
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(Path::new("/")).to_owned()
}

/// Where cargo builds to.
#[must_use]
pub fn target_dir() -> PathBuf {
    root().join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// Cargo, in the repository, as if it were called by a person.
///
/// What cargo tells the programs it runs is taken out of the environment: build scripts watch it, and would build everything
/// again with each call.
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

/// Runs a command to its end, with nothing on its standard input.
///
/// # Errors
/// It cannot be started.
pub fn output(command: &mut Command) -> Result<Output> {
    let name = command.get_program().display().to_string();
    command.stdin(std::process::Stdio::null());
    command.output().with_context(|| format!("cannot run {name}"))
}

/// What a program wrote to its standard output.
///
/// # Errors
/// It failed: all that it wrote.
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
