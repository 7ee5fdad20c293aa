//! Runs kubectl, and reads objects without it.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::machine::{text_of, wait_for};
use crate::reader::Reader;

/// A kubectl that talks to one cluster.
#[derive(Clone)]
pub struct Kubectl {
    /// nsenter(1) and its arguments, up to and including kubectl and its kubeconfig.
    pub(crate) prefix: Vec<String>,
    /// Waits read objects again and again, and each kubectl takes a tenth of a second of CPU time.
    pub(crate) reader: Reader,
}

impl Kubectl {
    /// The kubectl command without arguments, for what this type has no method for.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.prefix[0]);
        command.args(&self.prefix[1..]);
        command
    }

    /// Runs `kubectl <args>`. Returns its output.
    ///
    /// # Errors
    /// kubectl fails; the error includes its output.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        let output = self
            .command()
            .args(args)
            .stdin(Stdio::null())
            .output()
            .context("run kubectl")?;
        text_of(&output).with_context(|| format!("kubectl {}", args.join(" ")))
    }

    /// Applies manifests in YAML or JSON.
    ///
    /// # Errors
    /// The API server refuses them.
    pub fn apply(&self, manifests: &str) -> Result<()> {
        self.feed(&["apply", "--server-side", "--force-conflicts", "-f", "-"], manifests)
            .map(drop)
    }

    /// Runs `kubectl <args>` with `input` on its standard input. Returns its output.
    ///
    /// # Errors
    /// kubectl fails; the error includes its output.
    pub fn feed(&self, args: &[&str], input: &str) -> Result<String> {
        let mut child = self
            .command()
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("run kubectl")?;
        let mut stdin = child.stdin.take().context("kubectl has no standard input")?;
        let input = input.to_owned();
        let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output().context("wait for kubectl")?;
        let text = text_of(&output).with_context(|| format!("kubectl {}", args.join(" ")))?;
        writer
            .join()
            .map_err(|_| anyhow::anyhow!("the writer panicked"))?
            .context("write to kubectl")?;
        Ok(text)
    }

    /// Gets an object or a list as JSON.
    ///
    /// # Errors
    /// The object does not exist, or the API server does not answer.
    pub fn get(&self, what: &[&str]) -> Result<Value> {
        if let Some(read) = self.reader.get(what) {
            return read.with_context(|| format!("get {}", what.join(" ")));
        }
        let args = [&["get", "-o", "json"], what].concat();
        Ok(serde_json::from_str(&self.run(&args)?)?)
    }

    /// Whether the object does not exist.
    ///
    /// # Errors
    /// The API server does not answer.
    pub fn is_gone(&self, what: &[&str]) -> Result<bool> {
        if let Some(read) = self.reader.get(what) {
            return match read {
                Ok(_) => Ok(false),
                Err(error) if Reader::is_not_found(&error) => Ok(true),
                Err(error) => Err(error.context(format!("get {}", what.join(" ")))),
            };
        }
        let args = [&["get", "--ignore-not-found", "-o", "name"], what].concat();
        Ok(self.run(&args)?.trim().is_empty())
    }

    /// The answer to a GET request of a path.
    ///
    /// # Errors
    /// The API server does not answer, or not with a success.
    pub fn get_raw(&self, path: &str) -> Result<String> {
        self.reader.text(path).with_context(|| format!("get {path}"))
    }

    /// The objects of a list.
    ///
    /// # Errors
    /// The API server does not answer.
    pub fn list(&self, what: &[&str]) -> Result<Vec<Value>> {
        Ok(self.get(what)?["items"].as_array().cloned().unwrap_or_default())
    }

    /// Waits until `condition` holds.
    ///
    /// # Errors
    /// `condition` did not hold within `limit`; the error includes its last error, if any.
    pub fn wait(&self, limit: Duration, what: &str, condition: impl FnMut() -> Result<bool>) -> Result<()> {
        wait_for(limit, what, condition)
    }
}
