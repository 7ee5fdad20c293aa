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
fn a_probe_says_whether_it_answers_and_whether_it_is_ready() {
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
    probe(&[]).expect("it answers");
    assert!(probe(&["--ready"]).unwrap_err().contains("pool default"));
    scratch.mkdir("absent");
    probe(&["--ready"]).expect("it is ready");
    process.signal(Signal::SIGSTOP);
    assert!(probe(&[]).is_err(), "a hung driver passed for alive");
    process.signal(Signal::SIGCONT);
}

#[needs(Root)]
fn a_self_test_takes_a_volume_through_its_life_as_the_readme_shows() {
    let scratch = Scratch::new();
    let (_process, client) = start(&Driver::new(&scratch).pool("default", &scratch.path("pool")));
    let (table, _, passed) = selftest(&scratch, "default");
    assert!(passed, "{table}");
    // What the README shows, step by step.
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
fn a_self_test_of_a_node_needs_no_api_server_and_makes_good_for_one_that_was_killed() {
    let scratch = Scratch::new();
    let pool = scratch.path("pool");
    let (_process, client) = start(&Driver::without_api_server(&scratch).pool("default", &pool));
    // What a self-test leaves that dies after its first publish.
    client.create_as(of_self_test()).unwrap();
    let mount = hostdir_lab::Mount {
        mode: Mode::SingleNodeWriter,
        ..hostdir_lab::Mount::default()
    };
    let target = scratch.path("csi.selftest-default").display().to_string();
    client.publish_as("selftest-default", &target, mount).unwrap();
    let (table, errors, passed) = selftest(&scratch, "default");
    assert!(passed, "{table}{errors}");
    assert_eq!(names(pool.join("volumes")), [""; 0]);
    // For nothing else does a node take the place of a controller.
    for answer in [
        client.create("pvc-1").map(drop),
        client.delete("pvc-1"),
        client.expand("selftest-default", 1 << 30).map(drop),
    ] {
        assert_eq!(answer.unwrap_err().code(), Code::Unimplemented);
    }
}

fn of_self_test() -> CreateVolumeRequest {
    let range = CapacityRange {
        required_bytes: 64 << 20,
        limit_bytes: 0,
    };
    CreateVolumeRequest {
        capacity_range: Some(range),
        ..create_request("selftest-default")
    }
}

/// Runs `hostdir selftest`: what it prints, what it says of errors, and whether it passed.
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
fn probes_at_once_do_not_disturb_each_other() {
    let scratch = Scratch::new();
    let (mut process, _client) = start(&Driver::new(&scratch).pool("default", &scratch.path("pool")));
    let clients: Vec<_> = (0..4).map(|_| process.connect()).collect();
    std::thread::scope(|scope| {
        for client in &clients {
            scope.spawn(|| (0..200).for_each(|_| client.probe().expect("the pool is fine")));
        }
    });
}
