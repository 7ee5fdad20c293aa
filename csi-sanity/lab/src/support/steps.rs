//! Breaks each system call of a CSI call in turn: the driver dies before it, or the system call fails.

use nix::errno::Errno;
use tonic::{Code, Status};

use super::faults::{Fault, Step};
use super::scene::{Call, Scene, start};
use super::{Client, wait_until};

/// Checks that a call has at least the usual number of steps, including the essential ones: otherwise faults were not
/// injected everywhere.
fn check_count(call: Call, steps: &[&str]) {
    let (least, names): (usize, &[&str]) = match call {
        Call::Create => (9, &["mkdirat", "write", "fsync", "renameat2"]),
        Call::FirstPublish => (
            20,
            &[
                "mkdirat",
                "fchmod",
                "write",
                "fsync",
                "renameat",
                "open_tree",
                "mount_setattr",
                "move_mount",
            ],
        ),
        Call::LaterPublish => (12, &["mkdirat", "open_tree", "mount_setattr", "move_mount"]),
        Call::Expand => (8, &["write", "fsync", "renameat"]),
        Call::Unpublish => (7, &["umount2", "unlinkat"]),
        Call::DeleteUnused => (15, &["renameat2", "fsync", "getdents64", "unlinkat"]),
        Call::DeleteAndErase => (30, &["renameat2", "fsync", "getdents64", "unlinkat"]),
    };
    assert!(
        steps.len() >= least,
        "{call:?} has only {} steps: {steps:?}",
        steps.len()
    );
    for name in names {
        assert!(steps.contains(name), "{call:?} has no {name}: {steps:?}");
    }
}

/// Kills the driver before every step of `call`. Afterwards the volume must exist whole or not at all, the answer must
/// hold, the same call must succeed, and in the end nothing must be left.
pub fn dies_at_every_step(scene: &Scene, call: Call) {
    let mut step = 0;
    loop {
        let (mut process, client) = start(&scene.driver);
        scene.set(&client, call);
        process.faults().arm(Step::Number(step), Fault::Die);
        let answer = scene.act(&client, call);
        if answer.is_ok() && call.deletes() {
            wait_until("the volume is erased or the driver dies", || {
                scene.trash_is_empty() || process.is_dead()
            });
        }
        let steps = process.faults().disarm();
        if steps.len() <= step {
            check_count(call, &steps);
            answer.expect("a driver without faults succeeds");
            scene.check_integrity(call);
            scene.clear(&client);
            println!("{call:?}: died before each of {step} steps");
            return;
        }
        process.ended();

        scene.check_integrity(call);
        let (restarted, client) = start(&scene.healthy());
        client.probe().expect("the driver is ready after a restart");
        scene.check_integrity(call);
        if answer.is_ok() {
            scene.check_effect(&client, call);
        }
        scene.act(&client, call).unwrap_or_else(|status| {
            panic!(
                "{call:?}, died at step {step} after {steps:?}, then: {status}\n{}",
                restarted.log()
            );
        });
        scene.check_effect(&client, call);
        scene.check_integrity(call);
        scene.clear(&client);
        drop(restarted);
        step += 1;
    }
}

/// Fails every step of `call` with `errno`. The answer must be a success that holds, or an error that names the volume and
/// node. Nothing must be lost, the same call must succeed once the disk works again, and in the end nothing must be left.
pub fn fails_at_every_step(scene: &Scene, call: Call, errno: Errno) {
    let mut step = 0;
    loop {
        let (process, client) = start(&scene.driver);
        scene.set(&client, call);
        process.faults().arm(Step::Number(step), Fault::Fail(errno));
        let answer = scene.act(&client, call);
        if answer.is_ok() && call.deletes() {
            wait_until("the step is reached or all is erased", || {
                scene.trash_is_empty() || process.faults().steps().len() > step
            });
        }
        let steps = process.faults().disarm();
        let at = format!("{call:?}, step {step} of {steps:?} failed with {errno}");
        scene.check_integrity(call);
        match &answer {
            Ok(()) => scene.check_effect(&client, call),
            Err(status) => {
                check_refusal(scene, call, status, &at);
                scene.check_unmade(call);
            }
        }
        scene
            .act(&client, call)
            .unwrap_or_else(|status| panic!("{at}; the same call again: {status}"));
        scene.check_effect(&client, call);
        drop(process);

        let (restarted, client) = start(&scene.healthy());
        scene.check_integrity(call);
        scene.check_effect(&client, call);
        scene.clear(&client);
        drop(restarted);
        if steps.len() <= step {
            assert!(answer.is_ok(), "{at}: {answer:?}");
            check_count(call, &steps);
            return;
        }
        step += 1;
    }
}

/// Breaks every step of opening a pool, which finishes what an earlier process has left. Then the driver opens it by itself, or dies
/// and the next one opens it. Nothing must be lost, and the next one leaves nothing unfinished.
pub fn opening_is_broken_at_every_step(scene: &Scene, fault: Fault) {
    let (process, client) = start(&scene.healthy());
    scene.set(&client, Call::Expand);
    process.kill();
    let mut step = 0;
    loop {
        scene.leave_unfinished();
        let mut process = scene.driver.spawn_broken(Step::Number(step), fault);
        let mut client = None;
        wait_until("the driver dies or its pool can be used", || {
            client = client.take().or_else(|| Client::connect(&scene.driver.socket).ok());
            process.is_dead() || client.as_ref().is_some_and(|client: &Client| client.probe().is_ok())
        });
        let steps = process.faults().disarm();
        let all_done = steps.len() <= step;
        scene.check_integrity(Call::Expand);
        if fault == Fault::Die && !all_done {
            process.ended();
        }
        // It may also refuse to start.
        if process.is_dead() {
            assert!(!all_done, "the driver ended without a fault:\n{}", process.log());
            let (next, connected) = start(&scene.healthy());
            (process, client) = (next, Some(connected));
        }
        let client = client.expect("the wait has set it");
        scene.check_integrity(Call::Expand);
        assert!(
            scene.is_mounted() && scene.is_as_it_was(),
            "step {step}: the volume has changed"
        );
        // A record that could not be read is read again.
        wait_until("both volumes are there", || client.list(0).len() == 2);
        // After a failure the eraser waits for a minute.
        drop(process);
        let (process, client) = start(&scene.healthy());
        wait_until("nothing unfinished is left", || scene.is_tidy());
        if all_done {
            let known = [
                "openat2",
                "mkdirat",
                "flock",
                "fsync",
                "syncfs",
                "getdents64",
                "renameat2",
                "statx",
            ];
            for name in known {
                assert!(steps.contains(&name), "opening has no {name}: {steps:?}");
            }
            scene.clear(&client);
            println!("opening: {fault:?} at each of {step} steps");
            return;
        }
        process.kill();
        step += 1;
    }
}

fn check_refusal(scene: &Scene, call: Call, status: &Status, at: &str) {
    let message = status.message();
    assert!(
        message.contains("volume victim on node node-a"),
        "{at}: the message names no volume and node: {message}"
    );
    let in_background = match status.code() {
        Code::Unavailable => true,
        Code::Internal | Code::ResourceExhausted | Code::FailedPrecondition => false,
        code => panic!("{at}: unexpected code {code:?}: {message}"),
    };
    // A final error proves that nothing made for the request remains, and that nothing was removed.
    if !in_background {
        match call {
            Call::Create => assert!(!scene.exists(), "{at}: refused, but the volume exists: {message}"),
            Call::FirstPublish | Call::LaterPublish => {
                assert!(
                    !scene.is_mounted(),
                    "{at}: refused, but the volume is mounted: {message}"
                );
            }
            Call::Expand => assert!(
                scene.is_as_it_was(),
                "{at}: refused, but the volume has grown: {message}"
            ),
            Call::DeleteUnused | Call::DeleteAndErase => {
                assert!(scene.exists(), "{at}: refused, but the volume is gone: {message}");
            }
            Call::Unpublish => {}
        }
    }
}
