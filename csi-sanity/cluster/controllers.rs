//! Several controllers that act at once, and controllers that are killed.

use crate::lab::{Lab, lab_alone, report};
use crate::mode::Mode;
use crate::objects::{claim_of, class, pod};
use crate::scale::many;
use hostdir_lab::cluster::NAMESPACE;
use hostdir_lab::{SetOnDrop, needs};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[needs(Root, Go, Cluster)]
fn many_claims_while_controllers_are_killed() {
    let title = "100 claims while controllers are killed one by one";
    let lab = lab_alone(Mode::Elected, "killed", title);
    // 80 s of kills cover both creates and deletes. Then everything must succeed.
    let (killed, start) = (Mutex::new(BTreeSet::new()), Instant::now());
    many(&lab, 100, None, || {
        let controllers = lab.controllers();
        if start.elapsed() > Duration::from_secs(80) || controllers.is_empty() {
            return;
        }
        let kill = killed.lock().unwrap().len();
        let pod = &controllers[kill % controllers.len()];
        let name = pod["metadata"]["name"].as_str().unwrap();
        let args = [
            "delete",
            "pod",
            name,
            "-n",
            NAMESPACE,
            "--wait=false",
            "--grace-period=0",
            "--force",
        ];
        // A pod that is already gone does not count as killed.
        if lab.kubectl().run(&args).is_ok() {
            killed
                .lock()
                .unwrap()
                .insert(pod["metadata"]["uid"].as_str().unwrap().to_owned());
        }
        std::thread::sleep(Duration::from_secs(2));
    });
    let killed = killed.into_inner().unwrap().len();
    report(&format!("{killed} controllers were killed"));
    assert!(killed >= 10, "only {killed} controllers were killed");
    lab.install(&[]);
}

/// Three controllers without leader election, so that all act at once, until this is dropped.
struct UncoordinatedControllers<'a> {
    lab: &'a Lab,
    container: Value,
}

impl<'a> UncoordinatedControllers<'a> {
    fn begin(lab: &'a Lab) -> Self {
        let get = ["deployment", "hostdir-controller", "-n", NAMESPACE];
        let deployment = lab.kubectl().get(&get).unwrap();
        let containers = deployment["spec"]["template"]["spec"]["containers"].as_array().unwrap();
        let provisioner = containers
            .iter()
            .position(|one| one["name"] == "csi-provisioner")
            .unwrap();
        assert_eq!(provisioner, 1);
        let container = containers[provisioner].clone();
        let mut without = container.clone();
        let args = without["args"].as_array_mut().unwrap();
        args.retain(|arg| !arg.as_str().unwrap().starts_with("--leader-election"));
        // They ask for the health of the election.
        for probe in ["startupProbe", "livenessProbe"] {
            assert!(without.as_object_mut().unwrap().remove(probe).is_some());
        }
        let uncoordinated = Self { lab, container };
        uncoordinated.patch(3, &without);
        uncoordinated
    }

    fn patch(&self, replicas: usize, container: &Value) {
        let patch = json!([
            {"op": "replace", "path": "/spec/replicas", "value": replicas},
            {"op": "replace", "path": "/spec/template/spec/containers/1", "value": container},
        ]);
        let patch = patch.to_string();
        let kubectl = self.lab.kubectl();
        let name = "deployment/hostdir-controller";
        kubectl
            .run(&["patch", name, "-n", NAMESPACE, "--type=json", "-p", &patch])
            .unwrap();
        kubectl
            .run(&["rollout", "status", name, "-n", NAMESPACE, "--timeout=180s"])
            .unwrap();
    }
}

impl Drop for UncoordinatedControllers<'_> {
    fn drop(&mut self) {
        for node in 0..3 {
            self.lab.signal_drivers(node, "controller", "CONT");
        }
        if !std::thread::panicking() {
            self.patch(2, &self.container);
        }
    }
}

#[needs(Root, Go, Cluster)]
fn three_leaders_at_once_lose_and_double_no_volume() {
    let lab = lab_alone(
        Mode::Elected,
        "uncoordinated",
        "3. three provisioners at once, slow drivers, early deletes",
    );
    let mut now = class(Mode::Elected.driver(), "at-once", &json!({}), "Delete", &[]);
    now["volumeBindingMode"] = "Immediate".into();
    lab.apply(&[now, lab.claim("live", "10Mi"), pod("live", "live")]);
    lab.running("live");
    lab.exec("live", "echo alive > /data/file").unwrap();
    let live = lab.volume_of("live");

    let uncoordinated = UncoordinatedControllers::begin(&lab);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut turn = 0;
            while !done.load(Ordering::Relaxed) {
                let node = turn % 3;
                turn += 1;
                lab.signal_drivers(node, "controller", "STOP");
                std::thread::sleep(Duration::from_millis(1500));
                lab.signal_drivers(node, "controller", "CONT");
            }
        });
        let _done = SetOnDrop(&done);
        let names: Vec<String> = (0..60).map(|number| format!("short-{number}")).collect();
        for some in names.chunks(20) {
            let claims: Vec<Value> = some
                .iter()
                .map(|name| claim_of(name, "1Mi", "at-once", "ReadWriteOnce"))
                .collect();
            lab.apply(&claims);
            // By then some are bound, some are being created, and some are not started.
            std::thread::sleep(Duration::from_secs(2));
            let mut args = vec!["delete", "pvc", "-n", &lab.namespace, "--wait=false"];
            args.extend(some.iter().map(String::as_str));
            lab.kubectl().run(&args).unwrap();
        }
        lab.wait("the short-lived claims are gone", || {
            Ok(lab.kubectl().list(&["pvc", "-n", &lab.namespace])?.len() == 1)
        });
    });
    let made = |controller: &Value| {
        let metrics = lab.http(controller, "metrics").unwrap_or_default();
        metrics.contains(r#"hostdir_csi_call_duration_seconds_count{method="CreateVolume",code="Ok"}"#)
    };
    let acted = lab.controllers().iter().filter(|controller| made(controller)).count();
    assert!(acted > 1, "only {acted} of three controllers created volumes");
    drop(uncoordinated);
    lab.wait("only the HostVolume of the claim live is left", || {
        let left = lab.kubectl().list(&["hostvolumes"])?;
        Ok(left.len() == 1 && left[0]["metadata"]["name"] == live.as_str())
    });
    lab.wait("only the PersistentVolume of the claim live is left", || {
        Ok(lab.kubectl().list(&["pv"])?.len() == 1)
    });
    assert_eq!(lab.exec("live", "cat /data/file").unwrap(), "alive\n");
    lab.delete("pod", "live");
    lab.delete("pvc", "live");
    lab.kubectl().run(&["delete", "storageclass", "at-once"]).unwrap();
    lab.nothing_is_left();
}
