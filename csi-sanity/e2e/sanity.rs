//! The real csi-sanity against the driver.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use hostdir_cluster::tools;

use crate::support::{Driver, Scratch, skipped};

/// The specs that are skipped, each under the reason why.
const SKIPPED: &str = include_str!("../skipped-specs.txt");

/// Runs csi-sanity, and checks that just the specs of the list were skipped and all others passed.
fn run_sanity(scratch: &Scratch, csi_sanity: &Path, driver: &Driver, run: &str, args: &[String]) {
    let report = scratch.path(&format!("{run}.json"));
    let output = Command::new(csi_sanity)
        .arg(format!("-csi.endpoint=unix://{}", driver.socket.display()))
        .arg(format!(
            "-csi.mountdir={}",
            scratch.path(&format!("{run}-mount")).display()
        ))
        .arg(format!(
            "-csi.stagingdir={}",
            scratch.path(&format!("{run}-staging")).display()
        ))
        .arg(format!("-ginkgo.json-report={}", report.display()))
        .arg("-ginkgo.no-color")
        .args(args)
        .output()
        .expect("run csi-sanity");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "csi-sanity failed:\n{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );

    let (passed, left_out) = read_report(&report);
    let allowed: BTreeSet<String> = SKIPPED
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect();
    let unexpected: Vec<_> = left_out.difference(&allowed).collect();
    let stale: Vec<_> = allowed.difference(&left_out).collect();
    assert!(
        unexpected.is_empty(),
        "skipped, but not in skipped-specs.txt: {unexpected:#?}"
    );
    assert!(stale.is_empty(), "in skipped-specs.txt, but not skipped: {stale:#?}");
    assert!(passed > 30, "only {passed} specs ran");
}

/// How many specs passed, and the names of those that did not run.
fn read_report(report: &Path) -> (usize, BTreeSet<String>) {
    let report: serde_json::Value =
        serde_json::from_slice(&fs::read(report).expect("a report is written")).expect("a report is JSON");
    let (mut passed, mut left_out) = (0, BTreeSet::new());
    for spec in report[0]["SpecReports"].as_array().expect("a report has specs") {
        if spec["LeafNodeType"] != "It" {
            continue;
        }
        let containers = spec["ContainerHierarchyTexts"].as_array().expect("a spec has a place");
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
            state => panic!("{name}: {state:?}"),
        }
    }
    (passed, left_out)
}

/// A pool that promises more than it has: csi-sanity asks for 10 GiB at a time, whatever disk the test runs on.
fn config(scratch: &Scratch) -> String {
    let path = scratch.path("config.yaml");
    let pool = |name: &str| {
        format!(
            "- {{name: {name}, path: {}, overcommit: 1000}}\n",
            scratch.path(name).display()
        )
    };
    fs::write(&path, format!("pools:\n{}{}", pool("default"), pool("second"))).expect("write the configuration");
    path.display().to_string()
}

#[test]
fn csi_sanity_passes_again_after_a_kill_and_with_another_pool() {
    let test = "csi_sanity_passes";
    let Some(scratch) = Scratch::new(test) else { return };
    let csi_sanity = match tools::csi_sanity() {
        Ok(path) => path,
        Err(why) => return skipped(test, &format!("{why:#}")),
    };
    let driver = Driver::new(&scratch).arg("--config").arg(config(&scratch));
    let process = driver.start();
    run_sanity(&scratch, &csi_sanity, &driver, "first", &[]);
    process.kill();

    let _process = driver.start();
    run_sanity(&scratch, &csi_sanity, &driver, "after-kill", &[]);

    let parameters = scratch.path("parameters.yaml");
    fs::write(&parameters, "pool: second\nmode: \"2770\"\ngid: \"1000\"\n").expect("write parameters");
    let args = [
        "-csi.testvolumesize=67108864".to_owned(),
        format!("-csi.testvolumeparameters={}", parameters.display()),
    ];
    run_sanity(&scratch, &csi_sanity, &driver, "second-pool", &args);
    let identity = fs::read_to_string(scratch.path("log")).expect("read the log");
    assert!(identity.contains("pool=second"), "the second pool was never used");
}
