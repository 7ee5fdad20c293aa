//! The real csi-sanity against the driver.

use std::fs;

use hostdir_lab::{Driver, Scratch, needs, sanity};

/// Two pools with overcommit: csi-sanity asks for 10 GiB at a time, however small the disk is.
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

#[needs(Root, Go)]
fn csi_sanity_passes_again_after_a_kill_and_with_another_pool() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch).arg("--config").arg(config(&scratch));
    let run = |name: &str, args: &[String]| sanity::run(&scratch.path(""), name, &driver.socket, args).unwrap();
    let process = driver.start();
    run("first", &[]);
    process.kill();

    let _process = driver.start();
    run("after-kill", &[]);

    let parameters = scratch.path("parameters.yaml");
    fs::write(&parameters, "pool: second\nmode: \"2770\"\ngid: \"1000\"\n").expect("write parameters");
    let args = [
        "-csi.testvolumesize=67108864".to_owned(),
        format!("-csi.testvolumeparameters={}", parameters.display()),
    ];
    run("second-pool", &args);
    let log = fs::read_to_string(scratch.path("log")).expect("read the log");
    let on_second = |line: &str| line.contains("volume made") && line.contains("pool=second");
    assert!(log.lines().any(on_second), "the second pool was never used");
}
