//! The real csi-sanity, run against a driver.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use hostdir_prove::{text_of, upstream};

/// The specs that may be skipped, each below its reason.
const SKIPPED: &str = include_str!("../skipped-specs.txt");

/// Runs csi-sanity against a socket, and checks that exactly the specs in `skipped-specs.txt` were skipped and all others
/// passed. Its files are in `dir`, with names that begin with `run`.
///
/// # Errors
/// A spec failed, was skipped without being listed, or is listed and was not skipped.
pub fn run(dir: &Path, run: &str, socket: &Path, args: &[String]) -> Result<()> {
    let path = |what: &str| dir.join(format!("{run}{what}"));
    let report = path(".json");
    let output = Command::new(upstream::csi_sanity()?)
        .arg(format!("-csi.endpoint=unix://{}", socket.display()))
        .arg(format!("-csi.mountdir={}", path("-mount").display()))
        .arg(format!("-csi.stagingdir={}", path("-staging").display()))
        .arg(format!("-ginkgo.json-report={}", report.display()))
        .arg("-ginkgo.no-color")
        .args(args)
        .output()
        .context("run csi-sanity")?;
    text_of(&output).context("csi-sanity")?;

    let (passed, left_out) = read_report(&report)?;
    let listed: BTreeSet<String> = SKIPPED
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect();
    let unexpected: Vec<_> = left_out.difference(&listed).collect();
    let stale: Vec<_> = listed.difference(&left_out).collect();
    ensure!(
        unexpected.is_empty(),
        "skipped, but not in skipped-specs.txt: {unexpected:#?}"
    );
    ensure!(stale.is_empty(), "in skipped-specs.txt, but not skipped: {stale:#?}");
    ensure!(passed > 30, "only {passed} specs ran");
    Ok(())
}

/// How many specs passed, and the names of those that did not run.
fn read_report(report: &Path) -> Result<(usize, BTreeSet<String>)> {
    let report: serde_json::Value = serde_json::from_slice(&fs::read(report)?).context("the report is not JSON")?;
    let (mut passed, mut left_out) = (0, BTreeSet::new());
    for spec in report[0]["SpecReports"].as_array().context("the report has no specs")? {
        if spec["LeafNodeType"] != "It" {
            continue;
        }
        let containers = spec["ContainerHierarchyTexts"]
            .as_array()
            .context("a spec has no ContainerHierarchyTexts")?;
        let texts = containers
            .iter()
            .chain([&spec["LeafNodeText"]])
            .filter_map(serde_json::Value::as_str);
        let name = texts.collect::<Vec<_>>().join(" > ");
        match spec["State"].as_str() {
            Some("passed") => passed += 1,
            Some("skipped" | "pending") => {
                left_out.insert(name);
            }
            state => bail!("{name}: {state:?}"),
        }
    }
    Ok((passed, left_out))
}
