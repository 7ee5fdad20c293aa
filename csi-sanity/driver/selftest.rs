//! `hostdir probe` and `hostdir selftest`.

use hostdir::csi::proto::volume_capability::access_mode::Mode;
use hostdir::csi::proto::{CapacityRange, CreateVolumeRequest};
use hostdir_lab::client::create_request;
use hostdir_lab::scene::start;
use hostdir_lab::scratch::{mounts_below, names};
use hostdir_lab::{Driver, Scratch, needs};
use nix::sys::signal::Signal;
use std::fs;
use tonic::Code;

#[needs(Root)]
fn probe_reports_whether_the_driver_answers_and_is_ready() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch).pool("default", &scratch.path("absent/pool"));
    let probe = |ready: &[&str]| {
        let output = std::process::Command::new(hostdir_lab::harness::hostdir())
            .args(["probe", "--endpoint"])
            .arg(format!("unix://{}", driver.socket.display()))
            .args(ready)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        output.status.success().then_some(()).ok_or(text)
    };
    assert!(probe(&[]).unwrap_err().contains("csi.sock"));
    let (process, _client) = start(&driver);
    probe(&[]).expect("the driver answers");
    assert!(probe(&["--ready"]).unwrap_err().contains("pool default"));
    scratch.mkdir("absent");
    probe(&["--ready"]).expect("the driver is ready");
    process.signal(Signal::SIGSTOP);
    assert!(probe(&[]).is_err(), "the probe of a hung driver succeeded");
    process.signal(Signal::SIGCONT);
}

#[needs(Root)]
fn a_self_test_prints_the_steps_that_the_readme_shows() {
    let scratch = Scratch::new();
    let (_process, client) = start(&Driver::new(&scratch).pool("default", &scratch.path("pool")));
    let (table, _, passed) = selftest(&scratch, "default");
    assert!(passed, "{table}");
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let steps = |text: &str| -> Vec<String> { text.lines().map(|line| line[..28].trim_end().to_owned()).collect() };
    let shown = readme
        .split("$ cargo run -- selftest")
        .nth(1)
        .expect("the README shows a self-test");
    let shown: Vec<&str> = shown.lines().skip(1).take(11).map(str::trim_start).collect();
    assert_eq!(steps(&table), steps(&shown.join("\n")));
    assert!(client.list(0).is_empty());
    assert!(mounts_below(&scratch.path("")).is_empty());

    let (table, errors, passed) = selftest(&scratch, "fast");
    assert!(
        !passed && table.contains("there is no pool fast") && errors.contains("the self-test failed: pool fast"),
        "{table}{errors}"
    );
}

#[needs(Root)]
fn a_self_test_on_a_node_needs_no_api_server_and_cleans_up_after_a_killed_one() {
    let scratch = Scratch::new();
    let pool = scratch.path("pool");
    let (_process, client) = start(&Driver::without_api_server(&scratch).pool("default", &pool));
    // The state after a self-test that was killed after its first publish.
    client.create_as(self_test_request()).unwrap();
    let mount = hostdir_lab::Mount {
        mode: Mode::SingleNodeWriter,
        ..hostdir_lab::Mount::default()
    };
    let target = scratch.path("csi.selftest-default").display().to_string();
    client.publish_as("selftest-default", &target, mount).unwrap();
    let (table, errors, passed) = selftest(&scratch, "default");
    assert!(passed, "{table}{errors}");
    assert_eq!(names(pool.join("volumes")), [""; 0]);
    // A node serves controller calls for self-tests only.
    for answer in [
        client.create("pvc-1").map(drop),
        client.delete("pvc-1"),
        client.expand("selftest-default", 1 << 30).map(drop),
    ] {
        assert_eq!(answer.unwrap_err().code(), Code::Unimplemented);
    }
}

fn self_test_request() -> CreateVolumeRequest {
    let range = CapacityRange {
        required_bytes: 64 << 20,
        limit_bytes: 0,
    };
    CreateVolumeRequest {
        capacity_range: Some(range),
        ..create_request("selftest-default")
    }
}

/// Runs `hostdir selftest`. Returns its standard output, its standard error, and whether it passed.
fn selftest(scratch: &Scratch, pool: &str) -> (String, String, bool) {
    let output = std::process::Command::new(hostdir_lab::harness::hostdir())
        .args(["selftest", "--pool", pool, "--endpoint"])
        .arg(format!("unix://{}", scratch.path("csi.sock").display()))
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr), output.status.success())
}

#[needs(Root)]
fn concurrent_probes_do_not_disturb_each_other() {
    let scratch = Scratch::new();
    let (mut process, _client) = start(&Driver::new(&scratch).pool("default", &scratch.path("pool")));
    let clients: Vec<_> = (0..4).map(|_| process.connect()).collect();
    std::thread::scope(|scope| {
        for client in &clients {
            scope.spawn(|| (0..200).for_each(|_| client.probe().expect("the pool is usable")));
        }
    });
}
