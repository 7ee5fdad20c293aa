//! The driver process: its socket, arguments, log, capabilities and shutdown.

use hostdir::csi::proto::volume_capability::access_mode::Mode;
use hostdir::csi::proto::{CreateVolumeRequest, DeleteVolumeRequest, NodeGetInfoRequest, NodePublishVolumeRequest};
use hostdir_lab::client::{capability, create_request, map};
use hostdir_lab::faults::{Fault, Step};
use hostdir_lab::scene::start;
use hostdir_lab::scratch::names;
use hostdir_lab::{Driver, Scratch, needs, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::time::{Duration, SystemTime};
use tonic::Code;

#[needs(Root)]
fn calls_for_one_volume_exclude_each_other_and_others_run_in_parallel() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch)
        .pool("default", &scratch.path("pool"))
        .with_faults();
    let (mut process, client) = start(&driver);
    let other = process.connect();
    client.create("pvc-2").unwrap();
    std::thread::scope(|scope| {
        process.faults().arm(Step::Named("mkdirat", 0), Fault::Hold);
        let first = scope.spawn(|| client.create("pvc-1"));
        wait_until("the first call is under way", || process.faults().holds());
        for answer in [
            other.create("pvc-1").map(drop),
            other.delete("pvc-1"),
            other.publish("pvc-1", &scratch.path("t")),
        ] {
            let status = answer.unwrap_err();
            assert_eq!(status.code(), Code::Aborted);
            assert!(status.message().contains("pvc-1"), "{status}");
        }
        other
            .publish("pvc-2", &scratch.path("t"))
            .expect("another volume is not blocked");
        other.probe().expect("the driver answers");
        process.faults().release();
        first.join().expect("no panic").expect("the first call succeeds");
    });
    client.create("pvc-1").expect("the same call succeeds again");
}

#[needs(Root)]
fn sigterm_lets_running_calls_end_and_leaves_no_socket() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch)
        .pool("default", &scratch.path("pool"))
        .with_faults();
    let (mut process, client) = start(&driver);
    std::thread::scope(|scope| {
        process.faults().arm(Step::Named("mkdirat", 0), Fault::Hold);
        let call = scope.spawn(|| client.create("pvc-1"));
        wait_until("the call is under way", || process.faults().holds());
        process.signal(Signal::SIGTERM);
        process.wait_for_log("stopping");
        process.faults().release();
        call.join().expect("no panic").expect("the running call succeeds");
    });
    assert!(process.ended().success(), "{}", process.log());
    assert!(!driver.socket.exists(), "the socket was left behind");
    let (restarted, client) = start(&driver);
    assert_eq!(client.list(0), ["pvc-1"]);
    assert!(restarted.stop().success());
}

#[needs(Root)]
fn volumes_that_no_pod_has_used_for_long_are_named() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch).pool("default", &scratch.path("pool"));
    let (process, client) = start(&driver);
    for name in ["pvc-old", "pvc-new", "pvc-mounted"] {
        client.create(name).unwrap();
    }
    client.publish("pvc-mounted", &scratch.path("target")).unwrap();
    assert!(process.stop().success());
    let long_ago = SystemTime::now() - Duration::from_hours(31 * 24);
    for name in ["pvc-old", "pvc-mounted"] {
        let dir = File::open(scratch.path(&format!("pool/volumes/{name}"))).unwrap();
        dir.set_modified(long_ago).unwrap();
    }
    let (process, client) = start(&driver);
    process.wait_for_log("no pod has used these volumes for 30 days");
    let log = process.log();
    assert!(log.contains("volumes=1") && log.contains("pvc-old"), "{log}");
    client.publish("pvc-old", &scratch.path("other")).unwrap();
    let used = fs::metadata(scratch.path("pool/volumes/pvc-old"))
        .unwrap()
        .modified()
        .unwrap();
    assert!(
        used.elapsed().unwrap() < Duration::from_hours(1),
        "its use is not noted"
    );
    client.unpublish("pvc-old", &scratch.path("other")).unwrap();
    client.unpublish("pvc-mounted", &scratch.path("target")).unwrap();
}

/// kill(2) of a thread's id signals the process, and the kernel prefers that thread to handle it. Some threads do not have the
/// descriptors that a handler writes to.
#[needs(Root)]
fn whichever_thread_sigterm_reaches_the_driver_stops() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch).pool("default", &scratch.path("pool"));
    let mut number = 0;
    loop {
        let (mut process, client) = start(&driver);
        client.create(&format!("pvc-{number}")).unwrap();
        let Some(thread) = process.tasks().nth(number) else {
            break;
        };
        let name = fs::read_to_string(thread.join("comm")).unwrap();
        let id: i32 = thread.file_name().unwrap().to_str().unwrap().parse().unwrap();
        drop(client);
        kill(Pid::from_raw(id), Signal::SIGTERM).unwrap();
        wait_until(&format!("it stops, by its thread {}", name.trim()), || {
            process.is_dead()
        });
        assert!(process.ended().success(), "{name}: {}", process.log());
        number += 1;
    }
    assert!(number > 4, "it has only {number} threads");
}

#[needs(Root)]
fn a_call_whose_caller_has_left_does_not_delay_the_end() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch)
        .pool("default", &scratch.path("pool"))
        .with_faults();
    let (mut process, client) = start(&driver);
    process.faults().arm(Step::Named("mkdirat", 0), Fault::Hold);
    let csi = client.csi().clone();
    let call = client.begin(async move { csi.create(create_request("pvc-1")).await });
    wait_until("the call is under way", || process.faults().holds());
    call.abort();
    drop(client);
    process.signal(Signal::SIGTERM);
    assert!(process.ended().success(), "{}", process.log());
    assert!(!process.log().contains("still running"), "{}", process.log());
}

#[needs(Root)]
fn a_stale_socket_is_replaced_and_a_socket_in_use_is_refused() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch).pool("default", &scratch.path("pool"));
    driver.start().kill();
    assert!(driver.socket.exists());
    let (_process, client) = start(&driver);
    let refusal = driver.refuses();
    assert!(refusal.contains("another process is listening"), "{refusal}");
    client.probe().expect("the first one still answers");
    fs::remove_file(&driver.socket).unwrap();
    fs::write(&driver.socket, "a file").unwrap();
    let refusal = driver.refuses();
    assert!(refusal.contains("is not a socket"), "{refusal}");
}

#[needs(Root)]
fn a_second_process_on_a_pool_says_so_and_takes_over_when_the_first_ends() {
    let scratch = Scratch::new();
    let pool = scratch.path("pool");
    let (first, client) = start(&Driver::new(&scratch).pool("default", &pool));
    client.create("pvc-1").unwrap();
    let mut second = Driver::new(&scratch).pool("default", &pool);
    second.socket = scratch.path("second.sock");
    let (_second, other) = start(&second);
    for status in [other.probe().unwrap_err(), other.create("pvc-2").unwrap_err()] {
        assert!(
            status.message().contains("a hostdir process still serves it"),
            "{status}"
        );
    }
    first.kill();
    wait_until("the second process serves the pool", || other.probe().is_ok());
    assert_eq!(other.list(0), ["pvc-1"]);
}

#[needs(Root)]
fn wrong_arguments_are_refused_with_the_reason() {
    let scratch = Scratch::new();
    let pool = scratch.path("pool");
    for (driver, word) in [
        (Driver::new(&scratch), "no pool is configured"),
        (Driver::new(&scratch).arg("--pool").arg("default"), "NAME=PATH"),
        (Driver::new(&scratch).pool("Default", &pool), "pool name"),
        (
            Driver::new(&scratch).pool("default", "relative".as_ref()),
            "must be absolute",
        ),
        (
            Driver::new(&scratch)
                .pool("default", &pool)
                .pool("default", &scratch.path("b")),
            "configured twice",
        ),
        (
            Driver::new(&scratch).arg("--config").arg("/no/such/file"),
            "/no/such/file",
        ),
    ] {
        let refusal = driver.refuses();
        assert!(refusal.contains(word), "{word:?} is not in {refusal}");
    }
    assert!(!pool.exists());
}

#[needs(Root)]
fn the_log_is_json_and_has_no_secrets() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch).pool("default", &scratch.path("pool"));
    let driver = driver.arg("--log-format").arg("json").arg("--log-level=trace");
    let (process, client) = start(&driver);
    let secrets = || map(&[("password", "s3cr3t-value")]);
    let create = || CreateVolumeRequest {
        secrets: secrets(),
        ..create_request("pvc-1")
    };
    client.create_as(create()).unwrap();
    client
        .create_as(CreateVolumeRequest {
            parameters: map(&[("x", "1")]),
            ..create()
        })
        .unwrap_err();
    let publish = |target: &str, volume_id: &str| NodePublishVolumeRequest {
        volume_id: volume_id.into(),
        target_path: target.into(),
        volume_capability: Some(capability(Mode::SingleNodeWriter, &[])),
        secrets: secrets(),
        volume_context: map(&[("csi.storage.k8s.io/serviceAccount.tokens", "t0k3n-value")]),
        publish_context: map(&[("device", "publ1sh-value")]),
        ..NodePublishVolumeRequest::default()
    };
    let target = scratch.path("t").display().to_string();
    client
        .wait(client.node().node_publish_volume(publish(&target, "pvc-1")))
        .unwrap();
    client
        .wait(client.node().node_publish_volume(publish("relative", "pvc-1")))
        .unwrap_err();
    client
        .wait(client.node().node_publish_volume(publish(&target, "pvc-2")))
        .unwrap_err();
    let delete = DeleteVolumeRequest {
        volume_id: "pvc-1".into(),
        secrets: secrets(),
    };
    client.wait(client.controller().delete_volume(delete)).unwrap_err();
    let log = process.log_to_its_end();
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("each line is JSON");
        assert!(line["level"].is_string() && line["timestamp"].is_string(), "{line}");
    }
    assert!(
        log.contains("volume created") && log.contains("\"volume.id\":\"pvc-1\""),
        "{log}"
    );
    for secret in ["s3cr3t", "t0k3n", "publ1sh"] {
        assert!(!log.contains(secret), "{secret} was logged");
    }
}

#[needs(Root)]
fn a_node_of_elected_mode_logs_no_secrets_either() {
    let scratch = Scratch::new();
    let driver = Driver::without_api_server(&scratch).pool("default", &scratch.path("pool"));
    let (process, client) = start(&driver.arg("--log-level=trace"));
    let publish = NodePublishVolumeRequest {
        volume_id: "pvc-1".into(),
        target_path: scratch.path("t").display().to_string(),
        volume_capability: Some(capability(Mode::SingleNodeWriter, &[])),
        secrets: map(&[("password", "s3cr3t-value")]),
        volume_context: map(&[("csi.storage.k8s.io/serviceAccount.tokens", "t0k3n-value")]),
        ..NodePublishVolumeRequest::default()
    };
    client.wait(client.node().node_publish_volume(publish)).unwrap_err();
    let log = process.log_to_its_end();
    assert!(log.contains("pvc-1"), "{log}");
    for secret in ["s3cr3t", "t0k3n"] {
        assert!(!log.contains(secret), "{secret} was logged");
    }
}

#[needs(Root)]
fn a_node_name_longer_than_a_label_still_has_a_topology() {
    let scratch = Scratch::new();
    let name = format!("{}.example.com", "n".repeat(100));
    let driver = Driver::on_node(&scratch, &name).pool("default", &scratch.path("pool"));
    let (_process, client) = start(&driver);
    let info = client.wait(client.node().node_get_info(NodeGetInfoRequest {})).unwrap();
    assert_eq!(info.node_id, name);
    let segment = info.accessible_topology.unwrap().segments["topology.hostdir.csi/node"].clone();
    assert!(segment.len() <= 63 && segment.starts_with("hash-"), "{segment}");
}

#[needs(Root)]
fn the_driver_keeps_only_the_capabilities_it_needs() {
    let scratch = Scratch::new();
    let (process, _client) = start(&Driver::new(&scratch).pool("default", &scratch.path("pool")));
    // CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, FSETID 4, LINUX_IMMUTABLE 9, SYS_ADMIN 21: linux/capability.h
    let kept = format!("{:016x}", 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 9 | 1 << 21);
    // Every thread, including those of the eraser and of the calls.
    for task in names(format!("/proc/{}/task", process.pid())) {
        let status = fs::read_to_string(format!("/proc/{}/task/{task}/status", process.pid())).unwrap();
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .unwrap()
                .trim()
                .to_owned()
        };
        for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
            assert_eq!(field(set), kept, "{set} of thread {task}");
        }
        assert_eq!(field("CapInh:"), "0".repeat(16));
        assert_eq!(field("NoNewPrivs:"), "1");
    }
}

#[needs(Root)]
fn listing_fails_while_a_pool_is_unusable() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch)
        .pool("default", &scratch.path("pool"))
        .pool("bad", &scratch.path("no/disk"));
    let (_process, client) = start(&driver);
    let request = hostdir::csi::proto::ListVolumesRequest::default();
    let status = client.wait(client.controller().list_volumes(request)).unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("pool bad"), "{status}");
}

#[needs(Root)]
fn a_node_without_api_server_mounts_only_volumes_that_are_ready() {
    let scratch = Scratch::new();
    let (pool, target) = (scratch.path("pool"), scratch.path("t"));
    let (process, client) = start(&Driver::new(&scratch).pool("default", &pool));
    for id in ["used", "unused"] {
        client.create(id).unwrap();
    }
    client.publish("used", &target).unwrap();
    fs::write(target.join("file"), "data").unwrap();
    client.unpublish("used", &target).unwrap();
    process.kill();
    let (_process, client) = start(&Driver::without_api_server(&scratch).pool("default", &pool));
    client.publish("used", &target).unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "data");
    client.unpublish("used", &target).unwrap();
    for id in ["unused", "unknown"] {
        let status = client.publish(id, &target).unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert!(status.message().contains("cannot read its HostVolume"), "{status}");
    }
    assert!(
        !pool.join("volumes/unused/data").exists(),
        "data/ of an unused volume was made"
    );
    assert_eq!(names(pool.join("volumes")), ["unused", "used"]);
    // A node does not serve CreateVolume.
    assert_eq!(client.create("new").unwrap_err().code(), Code::Unimplemented);
}
