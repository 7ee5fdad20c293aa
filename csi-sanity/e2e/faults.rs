//! Each system call of the driver fails in turn.

use nix::errno::Errno;
use tonic::{Code, Status};

use crate::support::faults::{Fault, Step};
use crate::support::scene::{Call, Scene, start};
use crate::support::wait_until;

/// Fails every step of `call` with `errno`. The answer is a success that holds or an error that says where; nothing is lost,
/// the same call succeeds as soon as the disk works again, and in the end nothing is left.
fn fails_at_every_step(scene: &Scene, call: Call, errno: Errno) {
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
            assert!(answer.is_ok() && step > 2, "{at}: {answer:?}");
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

/// All calls, one error.
fn every_call_fails_with(errno: Errno) {
    let Some(scene) = Scene::new(&format!("every_step_fails_with_{errno:?}")) else {
        return;
    };
    for call in Call::ALL {
        fails_at_every_step(&scene, call, errno);
    }
}

#[test]
fn every_step_may_fail_with_eio() {
    every_call_fails_with(Errno::EIO);
}

#[test]
fn every_step_may_fail_with_enospc() {
    every_call_fails_with(Errno::ENOSPC);
}

#[test]
fn every_step_may_fail_with_erofs() {
    every_call_fails_with(Errno::EROFS);
}

#[test]
fn every_step_may_fail_with_eacces() {
    every_call_fails_with(Errno::EACCES);
}

/// What quotas are part of, on a disk that has them: see `quota`.
#[test]
#[ignore = "runs inside a machine of the test's"]
fn publish_and_expand_may_fail_with_eio() {
    let scene = Scene::new("publish_and_expand_may_fail_with_eio").expect("root, and CI is set");
    for call in [Call::FirstPublish, Call::Expand] {
        fails_at_every_step(&scene, call, Errno::EIO);
    }
}
