//! Kills the driver before each of its system calls in turn, and starts it again.

use hostdir_lab::faults::Fault;
use hostdir_lab::needs;
use hostdir_lab::scene::{Call, Scene};
use hostdir_lab::steps::{dies_at_every_step, opening_is_broken_at_every_step};

#[needs(Root)]
fn create_survives_death_at_every_step() {
    dies_at_every_step(&Scene::new(), Call::Create);
}

#[needs(Root)]
fn first_publish_survives_death_at_every_step() {
    dies_at_every_step(&Scene::new(), Call::FirstPublish);
}

#[needs(Root)]
fn later_publish_survives_death_at_every_step() {
    dies_at_every_step(&Scene::new(), Call::LaterPublish);
}

#[needs(Root)]
fn expand_survives_death_at_every_step() {
    dies_at_every_step(&Scene::new(), Call::Expand);
}

#[needs(Root)]
fn unpublish_survives_death_at_every_step() {
    dies_at_every_step(&Scene::new(), Call::Unpublish);
}

#[needs(Root)]
fn delete_survives_death_at_every_step() {
    dies_at_every_step(&Scene::new(), Call::DeleteUnused);
}

#[needs(Root)]
fn opening_survives_death_at_every_step() {
    opening_is_broken_at_every_step(&Scene::new(), Fault::Die);
}

#[needs(Root)]
fn delete_and_erase_survive_death_at_every_step() {
    dies_at_every_step(&Scene::new(), Call::DeleteAndErase);
}
