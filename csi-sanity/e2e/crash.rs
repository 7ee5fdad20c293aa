//! The process dies before each of its system calls in turn, and is started again.

use crate::support::faults::{Fault, Step};
use crate::support::scene::{Call, Scene, start};
use crate::support::wait_until;

/// Dies before every step of `call`. Afterwards the volume is wholly there or wholly not, what was answered holds, the same
/// call succeeds, and in the end nothing is left.
fn dies_at_every_step(call: Call) {
    let Some(scene) = Scene::new(&format!("{call:?}_survives_death_at_every_step")) else {
        return;
    };
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
            assert!(step > 2, "{call:?} has too few steps to be true: {steps:?}");
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

#[test]
fn create_survives_death_at_every_step() {
    dies_at_every_step(Call::Create);
}

#[test]
fn first_publish_survives_death_at_every_step() {
    dies_at_every_step(Call::FirstPublish);
}

#[test]
fn later_publish_survives_death_at_every_step() {
    dies_at_every_step(Call::LaterPublish);
}

#[test]
fn expand_survives_death_at_every_step() {
    dies_at_every_step(Call::Expand);
}

#[test]
fn unpublish_survives_death_at_every_step() {
    dies_at_every_step(Call::Unpublish);
}

#[test]
fn delete_survives_death_at_every_step() {
    dies_at_every_step(Call::DeleteUnused);
}

#[test]
fn delete_and_erase_survive_death_at_every_step() {
    dies_at_every_step(Call::DeleteAndErase);
}
