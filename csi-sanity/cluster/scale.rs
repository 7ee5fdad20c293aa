//! Many claims and pods at once, while the driver works or is killed every second.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hostdir_lab::SetOnDrop;
use serde_json::Value;

use crate::lab::{Lab, lab_alone, report};
use crate::mode::{Mode, in_both_modes};
use crate::objects::{on_node, pod};

in_both_modes![
    many_claims_and_pods_on_one_node,
    many_claims_while_the_driver_is_killed_every_second,
];

/// How long the driver is killed every second, at least. The kubelet retries unmounts with back-off, up to two minutes, so under
/// constant kills it reaches a running driver only by luck.
const KILLING: Duration = Duration::from_secs(45);
/// How often it must have died.
const DEATHS: u64 = 15;

/// Makes `count` claims with pods, on `node` or anywhere, and runs `meanwhile` every second. Checks that all claims are
/// bound and all pods run, with one volume each, and that nothing is left after the deletes.
pub(crate) fn many(lab: &Lab, count: usize, node: Option<&str>, meanwhile: impl Fn() + Sync) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                meanwhile();
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        let _done = SetOnDrop(&done);
        let objects: Vec<Value> = (0..count)
            .flat_map(|number| {
                let name = format!("many-{number}");
                let pod = pod(&name, &name);
                let pod = node.map_or(pod.clone(), |node| on_node(pod, node));
                [lab.claim(&name, "1Mi"), pod]
            })
            .collect();
        let start = Instant::now();
        lab.apply(&objects);
        let in_phase = |kind: &str, phase: &str| {
            let objects = lab.kubectl().list(&[kind, "-n", &lab.namespace])?;
            anyhow::Ok(
                objects
                    .iter()
                    .filter(|object| object["status"]["phase"] == phase)
                    .count(),
            )
        };
        let patience = Duration::from_mins(8);
        let kubectl = lab.kubectl();
        kubectl
            .wait(patience, "all claims are bound", || {
                Ok(in_phase("pvc", "Bound")? == count)
            })
            .unwrap();
        let bound = start.elapsed();
        kubectl
            .wait(patience, "all pods run", || Ok(in_phase("pod", "Running")? == count))
            .unwrap();
        let running = start.elapsed();
        let rate = f64::from(u32::try_from(count).unwrap()) / bound.as_secs_f64();
        report(&format!(
            "{count} claims bound in {bound:.1?} ({rate:.1} per second), {count} pods running in {running:.1?}"
        ));
        check_one_to_one(lab, count);

        let start = Instant::now();
        lab.delete_all(patience);
        lab.nothing_is_left();
        report(&format!("all gone in {:.1?}", start.elapsed()));
    });
}

/// Checks that there are `count` PersistentVolumes, directories and mounts.
fn check_one_to_one(lab: &Lab, count: usize) {
    let names = |kind: &str| -> BTreeSet<String> {
        let objects = lab.kubectl().list(&[kind]).unwrap();
        objects
            .iter()
            .map(|object| object["metadata"]["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let volumes = names("pv");
    assert_eq!(volumes.len(), count);
    assert_eq!(lab.in_pools("volumes").into_iter().collect::<BTreeSet<_>>(), volumes);
    assert_eq!(lab.mounts(), count);
}

fn many_claims_and_pods_on_one_node(mode: Mode) {
    let lab = lab_alone(mode, "many", "40 claims and pods on one node");
    many(&lab, 40, Some("node-1"), || {});
}

fn many_claims_while_the_driver_is_killed_every_second(mode: Mode) {
    let lab = lab_alone(mode, "many-kills", "60 claims while the driver is killed every second");
    let (before, start) = (lab.restarts_of_driver("node-1"), Instant::now());
    let deaths = || lab.restarts_of_driver("node-1") - before;
    many(&lab, 60, Some("node-1"), || {
        // A slow machine starts it less often in that time.
        if start.elapsed() < KILLING || deaths() < DEATHS {
            lab.kill_driver(0);
        }
    });
    let deaths = deaths();
    report(&format!("the driver died {deaths} times"));
    assert!(deaths >= DEATHS, "the driver died only {deaths} times");
}
