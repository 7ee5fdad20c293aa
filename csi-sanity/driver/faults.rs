//! Makes each system call of the driver fail in turn.

use hostdir_lab::faults::Fault;
use hostdir_lab::needs;
use hostdir_lab::scene::{Call, Scene};
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
