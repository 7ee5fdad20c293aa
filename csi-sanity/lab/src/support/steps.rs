//! Each system call of a call to the driver is broken in turn: the process dies before it, or it fails.

use nix::errno::Errno;
use tonic::{Code, Status};

use super::faults::{Fault, Step};
use super::scene::{Call, Scene, start};
use super::wait_until;

/// A call must have at least so many steps, and these among them, or some are not seen any more.
fn check_count(call: Call, steps: &[&str]) {
    let (least, names): (usize, &[&str]) = match call {
        Call::Create => (10, &["mkdirat", "write", "fsync", "renameat2"]),
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

/// Dies before every step of `call`. Afterwards the volume is wholly there or wholly not, what was answered holds, the same
/// call succeeds, and in the end nothing is left.
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
            answer.expect("a driver that lives answers well");
            scene.check_integrity(call);
            scene.clear(&client);
            println!("{call:?}: died before each of {step} steps");
            return;
        }
        process.ended();

        scene.check_integrity(call);
        let (restarted, client) = start(&scene.healthy());
        client.probe().expect("it is ready after a restart");
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

/// Fails every step of `call` with `errno`. The answer is a success that holds or an error that says where; nothing is lost,
/// the same call succeeds as soon as the disk works again, and in the end nothing is left.
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

fn check_refusal(scene: &Scene, call: Call, status: &Status, at: &str) {
    let message = status.message();
    assert!(
        message.contains("volume victim on node node-a"),
        "{at}: does not say where: {message}"
    );
    let in_background = match status.code() {
        Code::Unavailable => true,
        Code::Internal | Code::ResourceExhausted | Code::FailedPrecondition => false,
        code => panic!("{at}: unexpected code {code:?}: {message}"),
    };
    // A final code is proof that nothing made for the request remains, and that nothing was taken away.
    if !in_background {
        match call {
            Call::Create => assert!(!scene.exists(), "{at}: refused for good, but there: {message}"),
            Call::FirstPublish | Call::LaterPublish => {
                assert!(!scene.is_mounted(), "{at}: refused, but mounted: {message}");
            }
            Call::Expand => assert!(scene.is_as_it_was(), "{at}: refused, but grown: {message}"),
            Call::DeleteUnused | Call::DeleteAndErase => assert!(scene.exists(), "{at}: refused, but gone: {message}"),
            Call::Unpublish => {}
        }
    }
}
