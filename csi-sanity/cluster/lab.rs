//! The one cluster that all tests share, and what they ask of it.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use hostdir_lab::cluster::NAMESPACE;
use hostdir_lab::prove::target_dir;
use hostdir_lab::{Client, Cluster, Kubectl};
use serde_json::Value;

use crate::mode::Mode;

/// How long anything may take that is waited for: pods start in seconds, but these machines are shared.
pub(crate) const PATIENCE: Duration = Duration::from_mins(3);

/// The cluster, while a test has it, with a namespace for that test.
pub(crate) struct Lab {
    cluster: MutexGuard<'static, Cluster>,
    /// The namespace, named as the test.
    pub(crate) namespace: String,
    pub(crate) mode: Mode,
    title: String,
    start: Instant,
}

impl std::ops::Deref for Lab {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

impl std::ops::DerefMut for Lab {
    fn deref_mut(&mut self) -> &mut Cluster {
        &mut self.cluster
    }
}

/// The cluster, for a test of this name.
pub(crate) fn lab(mode: Mode, name: &str, title: &str) -> Lab {
    static CLUSTER: OnceLock<Result<Mutex<Cluster>, String>> = OnceLock::new();
    let (namespace, title) = (format!("{}-{name}", mode.name()), format!("{}: {title}", mode.name()));
    let cluster = CLUSTER.get_or_init(|| up().map(Mutex::new).map_err(|error| format!("{error:#}")));
    let cluster = match cluster {
        Ok(cluster) => cluster.lock().unwrap_or_else(PoisonError::into_inner),
        Err(why) => panic!("there is no cluster: {why}"),
    };
    cluster
        .kubectl
        .run(&["create", "namespace", &namespace])
        .expect("make a namespace");
    Lab {
        cluster,
        namespace,
        mode,
        title,
        start: Instant::now(),
    }
}

/// Three nodes. The first has the machine's disk, the others little room: filesystems of 1 GiB.
fn up() -> Result<Cluster> {
    let cluster = Cluster::up(3)?;
    for mode in [Mode::Local, Mode::Elected] {
        let pool = mode.pool();
        for node in &cluster.nodes[1..] {
            node.sh(&format!(
                "mkdir -p {pool} && mount -t tmpfs -o size=1G,mode=0700 tmpfs {pool}"
            ))?;
        }
        cluster.install(mode.release(), mode.settings())?;
    }
    Ok(cluster)
}

/// Says how long something took, past the test harness.
pub(crate) fn report(what: &str) {
    std::io::stderr().write_all(format!("    {what}\n").as_bytes()).unwrap();
}

impl Lab {
    /// Installs hostdir anew, with settings beside those that all tests have.
    pub(crate) fn install(&self, settings: &[&str]) {
        let settings = [self.mode.settings(), settings].concat();
        self.cluster.install(self.mode.release(), &settings).unwrap();
    }

    pub(crate) fn kubectl(&self) -> &Kubectl {
        &self.cluster.kubectl
    }

    /// Applies objects in the test's namespace.
    pub(crate) fn apply(&self, objects: &[Value]) {
        let mut text = String::new();
        for object in objects {
            let mut object = object.clone();
            object["metadata"]["namespace"] = self.namespace.clone().into();
            writeln!(text, "---\n{object}").unwrap();
        }
        self.kubectl().apply(&text).unwrap();
    }

    /// Waits until something is so.
    pub(crate) fn wait(&self, what: &str, condition: impl FnMut() -> Result<bool>) {
        if let Err(error) = self.kubectl().wait(PATIENCE, what, condition) {
            panic!("{error:#}\n{}", self.diagnosis());
        }
    }

    /// What Kubernetes says of the test's pods and claims: of a failure often nothing but the message is kept.
    fn diagnosis(&self) -> String {
        let namespace = self.namespace.as_str();
        let questions: [&[&str]; 3] = [
            &["get", "pods,pvc", "-n", namespace, "-o", "wide"],
            &["get", "nodes,pods", "-n", NAMESPACE, "-o", "wide"],
            &[
                "get",
                "events",
                "-n",
                namespace,
                "--sort-by=.lastTimestamp",
                "--no-headers",
            ],
        ];
        let answer = |question: &&[&str]| {
            self.kubectl()
                .run(question)
                .unwrap_or_else(|error| format!("{error:#}"))
        };
        let answers: Vec<String> = questions.iter().map(answer).collect();
        let lines: Vec<&str> = answers.iter().flat_map(|answer| answer.lines()).collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// An object of the test's namespace.
    pub(crate) fn get(&self, kind: &str, name: &str) -> Result<Value> {
        self.kubectl().get(&[kind, name, "-n", &self.namespace])
    }

    /// Deletes an object of the test's namespace, and waits until it is gone.
    pub(crate) fn delete(&self, kind: &str, name: &str) {
        let args = ["delete", kind, name, "-n", &self.namespace, "--wait", "--timeout=180s"];
        self.kubectl().run(&args).unwrap();
    }

    /// Deletes all pods and claims of the test's namespace, and waits until they are gone.
    pub(crate) fn delete_all(&self, patience: Duration) {
        let namespace = self.namespace.as_str();
        let args = ["delete", "pods,pvc", "--all", "-n", namespace, "--wait=false"];
        self.kubectl().run(&args).unwrap();
        // kubectl would wait for one after the other, five in a second.
        self.kubectl()
            .wait(patience, "all pods and claims are gone", || {
                Ok(self.kubectl().list(&["pods,pvc", "-n", namespace])?.is_empty())
            })
            .unwrap();
    }

    /// Waits until a pod runs and is ready; the node it is on.
    pub(crate) fn running(&self, pod: &str) -> String {
        let mut node = String::new();
        self.wait(&format!("pod {pod} is ready"), || {
            let pod = self.get("pod", pod)?;
            pod["spec"]["nodeName"]
                .as_str()
                .unwrap_or_default()
                .clone_into(&mut node);
            Ok(is_ready(&pod))
        });
        node
    }

    /// Runs a shell script in a pod.
    pub(crate) fn exec(&self, pod: &str, script: &str) -> Result<String> {
        self.kubectl()
            .run(&["exec", "-n", &self.namespace, pod, "--", "sh", "-ec", script])
    }

    /// What `kubectl describe` shows.
    pub(crate) fn describe(&self, kind: &str, name: &str) -> Result<String> {
        self.kubectl().run(&["describe", kind, name, "-n", &self.namespace])
    }

    /// Waits until `kubectl describe` shows something.
    pub(crate) fn described(&self, kind: &str, name: &str, text: &str) {
        self.wait(&format!("kubectl describe {kind} {name} shows {text:?}"), || {
            Ok(self.describe(kind, name)?.contains(text))
        });
    }

    /// The volume of a claim: its id is the name of its PersistentVolume.
    pub(crate) fn volume_of(&self, claim: &str) -> String {
        let claim = self.get("pvc", claim).unwrap();
        claim["spec"]["volumeName"].as_str().unwrap().to_owned()
    }

    /// The names in a directory of a pool, node by node.
    pub(crate) fn in_pools(&self, dir: &str) -> Vec<String> {
        let list = |node: &hostdir_lab::Node| node.sh(&format!("ls {}/{dir}", self.mode.pool())).unwrap();
        let names: Vec<String> = self.nodes.iter().map(list).collect();
        names
            .iter()
            .flat_map(|names| names.lines())
            .map(str::to_owned)
            .collect()
    }

    /// Mounts of hostdir's volumes below the kubelets, on all nodes.
    pub(crate) fn mounts(&self) -> usize {
        let count = |node: &hostdir_lab::Node| {
            node.sh("grep -c ' /var/lib/kubelet/pods/.*kubernetes.io~csi' /proc/self/mountinfo || :")
                .unwrap()
        };
        self.nodes
            .iter()
            .map(|node| count(node).trim().parse::<usize>().unwrap())
            .sum()
    }

    /// What a node publishes that it can promise of a StorageClass, in bytes.
    pub(crate) fn capacity(&self, class: &str, node: &str) -> Result<u64> {
        let objects = self.kubectl().list(&["csistoragecapacities", "-n", NAMESPACE])?;
        let here = |object: &&Value| {
            object["storageClassName"] == class
                && object["nodeTopology"]["matchLabels"]["topology.hostdir.csi/node"] == node
        };
        let object = objects
            .iter()
            .find(here)
            .ok_or_else(|| anyhow::anyhow!("nothing published by {node} for {class}"))?;
        let quantity = object["capacity"].as_str().unwrap_or("0");
        let digits = quantity.trim_end_matches(|c: char| !c.is_ascii_digit());
        let unit = match &quantity[digits.len()..] {
            "Ki" => 1 << 10,
            "Mi" => 1 << 20,
            "Gi" => 1 << 30,
            "Ti" => 1_u64 << 40,
            _ => 1,
        };
        Ok(digits.parse::<u64>()? * unit)
    }

    /// Waits until no volume, mount or trash is left anywhere.
    pub(crate) fn nothing_is_left(&self) {
        self.wait("no PersistentVolume is left", || {
            Ok(self.kubectl().list(&["pv"])?.is_empty())
        });
        self.wait("no HostVolume is left", || {
            Ok(self.kubectl().list(&["hostvolumes"])?.is_empty())
        });
        for dir in ["volumes", "trash"] {
            self.wait(&format!("no {dir} are left"), || Ok(self.in_pools(dir).is_empty()));
        }
        self.wait("no mount is left", || Ok(self.mounts() == 0));
    }

    /// A claim of hostdir's StorageClass.
    pub(crate) fn claim(&self, name: &str, size: &str) -> Value {
        crate::objects::claim_of(name, size, self.mode.release(), "ReadWriteOnce")
    }

    /// The pod of hostdir on a node.
    pub(crate) fn driver_on(&self, node: &str) -> Value {
        let labels = format!(
            "app.kubernetes.io/instance={},app.kubernetes.io/component=node",
            self.mode.release()
        );
        let node = format!("spec.nodeName={node}");
        let args = ["pods", "-n", NAMESPACE, "-l", &labels, "--field-selector", &node];
        self.kubectl().list(&args).unwrap().swap_remove(0)
    }

    /// How often the driver on a node has been started again.
    pub(crate) fn restarts_of_driver(&self, node: &str) -> u64 {
        let pod = self.driver_on(node);
        let statuses = pod["status"]["containerStatuses"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let driver = statuses.iter().find(|status| status["name"] == "hostdir");
        driver
            .and_then(|status| status["restartCount"].as_u64())
            .expect("the driver has a status")
    }

    /// The labels of the controllers' pods.
    pub(crate) fn controller_labels(&self) -> String {
        format!(
            "app.kubernetes.io/instance={},app.kubernetes.io/component=controller",
            self.mode.release()
        )
    }

    /// The controllers' pods.
    pub(crate) fn controllers(&self) -> Vec<Value> {
        let labels = self.controller_labels();
        self.kubectl().list(&["pods", "-n", NAMESPACE, "-l", &labels]).unwrap()
    }

    /// The name of the pod that leads, and its node; nothing if nobody does.
    pub(crate) fn leader(&self) -> Option<(String, String)> {
        let lease = self.kubectl().get(&["lease", "hostdir-csi", "-n", NAMESPACE]).ok()?;
        let holder = lease["spec"]["holderIdentity"].as_str()?.to_owned();
        let pods = self.controllers();
        let pod = pods.iter().find(|pod| pod["metadata"]["name"] == holder.as_str())?;
        let node = pod["spec"]["nodeName"].as_str()?.to_owned();
        Some((holder, node))
    }

    /// What a pod of hostdir answers over HTTP.
    pub(crate) fn http(&self, pod: &Value, path: &str) -> Result<String> {
        let name = pod["metadata"]["name"].as_str().unwrap();
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{name}:9808/proxy/{path}");
        self.kubectl().run(&["get", "--raw", &path])
    }

    /// Deletes pods whose node may not answer.
    pub(crate) fn force_delete_pods(&self) {
        let args = [
            "delete",
            "pods",
            "--all",
            "-n",
            &self.namespace,
            "--force",
            "--grace-period=0",
        ];
        self.kubectl().run(&args).unwrap();
    }

    /// The directory of a volume, on a node.
    pub(crate) fn is_on_node(&self, node: usize, volume: &str) -> bool {
        let script = format!("if test -d {}/volumes/{volume}; then echo yes; fi", self.mode.pool());
        !self.nodes[node].sh(&script).unwrap().is_empty()
    }

    /// A file of a volume, from its node's root.
    pub(crate) fn on_disk(&self, volume: &str, file: &str) -> String {
        format!("{}/volumes/{volume}/data/{file}", self.mode.pool())
    }

    /// Kills the driver of a node with -9, as the kubelet's host sees it.
    pub(crate) fn kill_driver(&self, node: usize) {
        self.signal_drivers(node, self.mode.command(), "KILL");
    }

    /// A client of the driver on a node, over its socket there, as soon as that answers.
    pub(crate) fn driver_client(&self, node: usize) -> Client {
        let socket = format!("var/lib/kubelet/plugins/{}/csi.sock", self.mode.driver());
        let socket = self.nodes[node].root().unwrap().join(socket);
        let mut client = None;
        self.wait("the driver answers", || {
            client = Client::connect(&socket).ok();
            Ok(client.is_some())
        });
        client.expect("waited for")
    }

    /// Sends a signal to the processes of hostdir on a node that run this command.
    pub(crate) fn signal_drivers(&self, node: usize, command: &str, signal: &str) {
        self.for_drivers(node, command, &format!("kill -{signal} ${{p#/proc/}} || :"));
    }

    /// The processes of the driver on a node, by their directories in /proc.
    pub(crate) fn driver_processes(&self, node: usize) -> String {
        self.for_drivers(node, self.mode.command(), "echo $p")
    }

    /// Runs a shell command for each process of hostdir on a node that runs this command (`$p` is its directory in /proc).
    fn for_drivers(&self, node: usize, command: &str, action: &str) -> String {
        // The command line tells them from the probes of the kubelet.
        let script = format!(
            "for p in /proc/[0-9]*; do
                case \"$(tr '\\0' ' ' < $p/cmdline 2>/dev/null)\" in
                '/hostdir {command} '*) {action} ;;
                esac
            done"
        );
        self.nodes[node].sh(&script).unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let time = self.start.elapsed();
        if std::thread::panicking() {
            let logs = target_dir().join("lab/logs").join(&self.namespace);
            let state = self.kubectl().run(&[
                "get",
                "pods,pvc,pv,events,csistoragecapacities,hostvolumes,hostnodes",
                "-A",
                "-o",
                "wide",
            ]);
            report(&format!("{} failed; logs are in {}", self.title, logs.display()));
            let _ = std::fs::create_dir_all(&logs);
            let _ = std::fs::write(logs.join("state"), state.unwrap_or_else(|error| format!("{error:#}")));
            let _ = self.cluster.keep_logs(&logs);
            // What the test has changed of hostdir's settings is not the next one's.
            if let Err(error) = self.cluster.install(self.mode.release(), self.mode.settings()) {
                report(&format!("{error:#}"));
            }
        } else {
            report(&format!("{:<75} {:>5.1} s", self.title, time.as_secs_f64()));
        }
        // Nobody has to wait for what a test has left empty.
        let wait = format!("--wait={}", std::thread::panicking());
        let args = ["delete", "namespace", &self.namespace, &wait, "--timeout=120s"];
        if let Err(error) = self.kubectl().run(&args) {
            report(&format!("{error:#}"));
        }
    }
}

/// Lets a frozen API server go on.
pub(crate) struct Thaw<'a>(pub(crate) &'a Cluster);

impl Drop for Thaw<'_> {
    fn drop(&mut self) {
        let _ = self.0.freeze_api_server(false);
    }
}

/// Whether a pod or a node is ready.
pub(crate) fn is_ready(object: &Value) -> bool {
    let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions
        .iter()
        .any(|one| one["type"] == "Ready" && one["status"] == "True")
}
