//! Guards that break something, and repair it on drop.

use super::{Election, POLICY};
use crate::lab::{Lab, PATIENCE};
use crate::rights::token;
use anyhow::{Result, ensure};
use hostdir_lab::cluster::{ControllerManager, NAMESPACE};
use hostdir_lab::prove::target_dir;
use serde_json::{Value, json};
use std::cell::Cell;
use std::time::Instant;

/// A node on which things are broken, until this is dropped.
pub(super) struct BrokenNode<'a> {
    pub(super) election: &'a Election,
    pub(super) node: usize,
    pub(super) kubelet: Cell<bool>,
}

impl<'a> BrokenNode<'a> {
    pub(super) fn new(election: &'a Election, node: usize) -> Self {
        let kubelet = true.into();
        Self {
            election,
            node,
            kubelet,
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.election.lab.nodes[self.node].name
    }

    pub(super) fn stop_kubelet(&self) {
        self.election.lab.nodes[self.node].kill_kubelet().unwrap();
        self.kubelet.set(false);
        self.election.note(&format!("the kubelet of {} is killed", self.name()));
    }

    pub(super) fn delete_node(&self) -> Instant {
        self.election
            .lab
            .kubectl()
            .run(&["delete", "node", self.name()])
            .unwrap();
        self.election.note(&format!("Node {} is deleted", self.name()));
        Instant::now()
    }

    pub(super) fn recover(&self) -> Result<()> {
        let lab = &self.election.lab;
        let node = &lab.nodes[self.node];
        node.sh("for p in /proc/[0-9]*; do kill -CONT ${p#/proc/} 2>/dev/null || :; done")?;
        if !self.kubelet.get() {
            node.start_kubelet()?;
        }
        lab.wait_ready(3)?;
        lab.kubectl().wait(PATIENCE, "both drivers are registered", || {
            let drivers = lab.kubectl().get(&["csinode", self.name()])?["spec"]["drivers"].clone();
            Ok(drivers.as_array().is_some_and(|drivers| drivers.len() == 2))
        })
    }
}

impl Drop for BrokenNode<'_> {
    fn drop(&mut self) {
        let recovered = self.recover();
        if !std::thread::panicking() {
            recovered.expect("the node recovers");
        }
    }
}

/// A ghost: a controller that runs on a node outside of Kubernetes, with a pod's name and a token, until this is dropped.
/// Its driver has no watchdog, as in drivers before hostdir. Its sidecar is restarted whenever it ends.
pub(super) struct GhostController<'a> {
    pub(super) election: &'a Election,
    pub(super) node: usize,
}

impl<'a> GhostController<'a> {
    pub(super) const DIR: &'static str = "/run/ghost";

    /// Kills a pod's sidecar, and starts the ghost's sidecar, which goes on under the same name.
    pub(super) fn start(election: &'a Election, node: usize, pod: &str, token: &str) -> Self {
        let ghost = Self { election, node };
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": "https://10.42.0.1:443", "insecure-skip-tls-verify": true}}],
            "users": [{"name": "c", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        });
        let provisioner = target_dir().join("lab/bin/csi-provisioner");
        let hostdir = hostdir_lab::harness::hostdir();
        let script = format!(
            "mkdir {dir}; echo '{config}' > {dir}/kubeconfig; : > {dir}/starts
             exec 0<&- >{dir}/log 2>&1
             setsid unshare --uts sh -c 'hostname {pod}; echo $$ > {dir}/pid
                export KUBECONFIG={dir}/kubeconfig
                {hostdir} controller --endpoint unix://{dir}/csi.sock & echo $! > {dir}/driver
                while :; do
                    echo start >> {dir}/starts
                    {provisioner} --kubeconfig=$KUBECONFIG --csi-address={dir}/csi.sock \\
                        --leader-election --leader-election-namespace={NAMESPACE} --leader-election-lease-duration=10s \\
                        --leader-election-renew-deadline=9s --leader-election-retry-period=2s --strict-topology \\
                        --immediate-topology=false --extra-create-metadata --timeout=10s
                    sleep 1
                done' &",
            dir = Self::DIR,
            provisioner = provisioner.display(),
            hostdir = hostdir.display(),
        );
        election.signal(node, pod, "csi-provisioner", "KILL");
        let renewed = election.renewed();
        ghost.sh(&script);
        election.lab.wait("the ghost renews the Lease", || {
            ensure!(
                election.holder() == pod && election.renewed() != renewed,
                "{}",
                ghost.log()
            );
            Ok(true)
        });
        ghost
    }

    pub(super) fn hang_driver(&self) {
        let hung = self.election.lab.nodes[self.node].sh(&format!("kill -STOP $(cat {}/driver)", Self::DIR));
        hung.unwrap_or_else(|error| panic!("the ghost's driver does not run: {error:#}\n{}", self.log()));
    }

    pub(super) fn sh(&self, script: &str) -> String {
        self.election.lab.nodes[self.node].sh(script).unwrap()
    }

    /// How often its sidecar was started.
    pub(super) fn starts(&self) -> usize {
        self.sh(&format!("cat {}/starts", Self::DIR)).lines().count()
    }

    pub(super) fn log(&self) -> String {
        self.sh(&format!("tail -n 20 {}/log", Self::DIR))
    }
}

impl Drop for GhostController<'_> {
    fn drop(&mut self) {
        // Kills the process group of the shell, with everything in it. (dash does not know `kill -9 --`.)
        let script = format!("kill -s KILL -- -$(cat {0}/pid) && rm -rf {0}", Self::DIR);
        let killed = self.election.lab.nodes[self.node].sh(&script);
        if !std::thread::panicking() {
            killed.expect("the ghost is killed");
        }
    }
}

/// Real sidecars in the place of a controller's own, with its name and its driver, whose account may write Leases and nothing else:
/// each wins its election, and then waits for lists that are refused. They end when this is dropped.
pub(super) struct UselessSidecars<'a> {
    election: &'a Election,
    node: usize,
}

impl<'a> UselessSidecars<'a> {
    const DIR: &'static str = "/run/useless";

    /// The node must have no kubelet, and the cluster no policy for Leases.
    pub(super) fn start(election: &'a Election, node: usize, pod: &str) -> Self {
        let lab = &election.lab;
        let kubectl = lab.kubectl();
        let account = ["create", "serviceaccount", "useless", "-n", NAMESPACE];
        let role = "--resource=leases.coordination.k8s.io";
        let role = [
            "create",
            "role",
            "useless",
            "--verb=get,create,update",
            role,
            "-n",
            NAMESPACE,
        ];
        let subject = format!("--serviceaccount={NAMESPACE}:useless");
        let binding = [
            "create",
            "rolebinding",
            "useless",
            "--role=useless",
            &subject,
            "-n",
            NAMESPACE,
        ];
        for args in [&account[..], &role, &binding] {
            kubectl.run(args).unwrap();
        }
        let useless = Self { election, node };
        let token = token(lab, "useless", None);
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": "https://10.42.0.1:443", "insecure-skip-tls-verify": true}}],
            "users": [{"name": "c", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        });
        let object = kubectl.get(&["pod", pod, "-n", NAMESPACE]).unwrap();
        let uid = object["metadata"]["uid"].as_str().unwrap().to_owned();
        let driver = election.for_processes(node, pod, "hostdir", "echo ${p#/proc/}");
        for program in ["csi-provisioner", "csi-resizer"] {
            election.signal(node, pod, program, "KILL");
        }
        let bin = target_dir().join("lab/bin");
        let flags = format!(
            "--kubeconfig={dir}/kubeconfig --timeout=10s \
             --csi-address=/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/socket/csi.sock \
             --leader-election --leader-election-namespace={NAMESPACE} --leader-election-lease-duration=10s \
             --leader-election-renew-deadline=9s --leader-election-retry-period=2s",
            dir = Self::DIR,
        );
        let script = format!(
            "mkdir {dir}; echo '{config}' > {dir}/kubeconfig
             exec 0<&- >{dir}/log 2>&1
             setsid nsenter -t {driver} --net unshare --uts sh -c 'hostname {pod}; echo $$ > {dir}/pid
                {bin}/csi-provisioner {flags} --http-endpoint=:9809 --strict-topology --immediate-topology=false &
                {bin}/csi-resizer {flags} --http-endpoint=:9810 --handle-volume-inuse-error=false &
                wait' &",
            dir = Self::DIR,
            driver = driver.trim(),
            bin = bin.display(),
        );
        useless.sh(&script);
        useless
    }

    fn sh(&self, script: &str) -> String {
        self.election.lab.nodes[self.node].sh(script).unwrap()
    }

    pub(super) fn log(&self) -> String {
        self.sh(&format!("tail -n 20 {}/log", Self::DIR))
    }
}

impl Drop for UselessSidecars<'_> {
    fn drop(&mut self) {
        // Those that have lost their Leases have ended by themselves.
        let script = format!(
            "pid=$(cat {0}/pid)
             kill -s KILL -- -$pid 2>/dev/null || test ! -d /proc/$pid
             rm -rf {0}",
            Self::DIR
        );
        let killed = self.election.lab.nodes[self.node].sh(&script);
        let args = ["delete", "serviceaccount,role,rolebinding", "useless", "-n", NAMESPACE];
        let deleted = self.election.lab.kubectl().run(&args);
        if !std::thread::panicking() {
            killed.expect("the sidecars are killed");
            deleted.expect("their account is deleted");
        }
    }
}

/// A cluster without the binding of the admission policy for Leases, until this is dropped.
pub(super) struct WithoutPolicy<'a> {
    pub(super) election: &'a Election,
    pub(super) binding: Value,
}

impl<'a> WithoutPolicy<'a> {
    pub(super) const KIND: &'static str = "validatingadmissionpolicybinding";

    pub(super) fn begin(election: &'a Election) -> Self {
        let kubectl = election.lab.kubectl();
        let mut binding = kubectl.get(&[Self::KIND, POLICY]).unwrap();
        binding["metadata"]
            .as_object_mut()
            .unwrap()
            .retain(|key, _| ["name", "labels", "annotations"].contains(&key.as_str()));
        kubectl.run(&["delete", Self::KIND, POLICY]).unwrap();
        Self { election, binding }
    }
}

impl Drop for WithoutPolicy<'_> {
    fn drop(&mut self) {
        let _ = self.election.lab.kubectl().apply(&self.binding.to_string());
    }
}

/// A controller manager that marks a Node not Ready after 20 s of a silent kubelet instead of 50 s, until this is dropped.
pub(super) struct SoonerNotReady<'a>(pub(super) &'a Lab);

impl<'a> SoonerNotReady<'a> {
    pub(super) fn begin(lab: &'a Lab) -> Self {
        let sooner = ControllerManager {
            node_grace: 20,
            ..ControllerManager::default()
        };
        lab.restart_controller_manager(sooner).unwrap();
        Self(lab)
    }
}

impl Drop for SoonerNotReady<'_> {
    fn drop(&mut self) {
        let _ = self.0.restart_controller_manager(ControllerManager::default());
    }
}

/// A node without network, until this is dropped.
pub(super) struct CutOff<'a> {
    pub(super) election: &'a Election,
    pub(super) node: usize,
}

impl Drop for CutOff<'_> {
    fn drop(&mut self) {
        let _ = self.election.lab.cut_network(self.node, false);
    }
}
