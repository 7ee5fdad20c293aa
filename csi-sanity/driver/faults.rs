//! Makes each system call of the driver fail in turn.

use std::collections::BTreeSet;

use hostdir_lab::faults::Fault;
use hostdir_lab::needs;
use hostdir_lab::scene::{Call, Scene, start};
use hostdir_lab::steps::{fails_at_every_step, opening_is_broken_at_every_step};
use nix::errno::Errno;

/// Makes every step of all CSI calls fail with one error.
fn every_call_fails_with(errno: Errno) {
    let scene = Scene::new();
    for call in Call::ALL {
        fails_at_every_step(&scene, call, errno);
    }
}

#[needs(Root)]
fn every_step_may_fail_with_eio() {
    every_call_fails_with(Errno::EIO);
}

#[needs(Root)]
fn every_step_may_fail_with_enospc() {
    every_call_fails_with(Errno::ENOSPC);
}

/// What the driver does to a disk or a mount is a step, so that each of them is broken by the tests.
#[needs(Root)]
fn no_call_that_changes_a_disk_escapes_the_tests() {
    // Of the socket, when the driver starts and stops.
    let expected = BTreeSet::from([libc::SYS_unlink]);
    let scene = Scene::new();
    for call in Call::ALL {
        let (process, client) = start(&scene.driver);
        scene.set(&client, call);
        scene.act(&client, call).unwrap();
        scene.clear(&client);
        let others = &process.faults().others() - &expected;
        assert!(others.is_empty(), "{call:?} makes calls of unknown effect: {others:?}");
    }
}

#[needs(Root)]
fn every_step_of_opening_may_fail() {
    opening_is_broken_at_every_step(&Scene::new(), Fault::Fail(Errno::EIO));
}

#[needs(Root)]
fn every_step_may_fail_with_erofs() {
    every_call_fails_with(Errno::EROFS);
}

#[needs(Root)]
fn every_step_may_fail_with_eacces() {
    every_call_fails_with(Errno::EACCES);
}
