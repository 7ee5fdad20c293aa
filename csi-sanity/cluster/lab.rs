//! The clusters that tests take turns with, and helpers for them.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::{Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use anyhow::Result;
use hostdir_lab::cluster::NAMESPACE;
use hostdir_lab::prove::target_dir;
use hostdir_lab::{Client, Cluster, Kubectl};
use serde_json::Value;

use crate::mode::Mode;

/// The limit of all waits: pods start in seconds, but test machines are shared.
pub(crate) const PATIENCE: Duration = Duration::from_mins(3);

/// How many clusters there are, and so how many tests run at the same time.
pub(crate) const CLUSTERS: usize = 2;

/// Shared by all tests, but those that would make others miss their time limits.
static MACHINE: RwLock<()> = RwLock::new(());

/// A test's part of [`MACHINE`].
#[expect(dead_code, reason = "held until it is dropped")]
enum Turn {
    Shared(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

/// The clusters that no test has.
static FREE: Mutex<Vec<Cluster>> = Mutex::new(Vec::new());

/// A cluster that one test has to itself, with a namespace for that test.
pub(crate) struct Lab {
    /// Always there, until it is given back.
    cluster: Option<Cluster>,
    /// The test's namespace.
    pub(crate) namespace: String,
    pub(crate) mode: Mode,
    title: String,
    start: Instant,
    // The last field: the next test begins when this one has cleaned up.
    _turn: Turn,
}

const HAS: &str = "a test has its cluster";

impl std::ops::Deref for Lab {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        self.cluster.as_ref().expect(HAS)
    }
}

impl std::ops::DerefMut for Lab {
    fn deref_mut(&mut self) -> &mut Cluster {
        self.cluster.as_mut().expect(HAS)
    }
}

/// Takes a cluster for a test, or starts one if none is free.
pub(crate) fn lab(mode: Mode, name: &str, title: &str) -> Lab {
    let turn = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
    begin(Turn::Shared(turn), mode, name, title)
}

/// As [`lab`], for a test that keeps all processors busy: no other test runs at the same time.
pub(crate) fn lab_alone(mode: Mode, name: &str, title: &str) -> Lab {
    let turn = MACHINE.write().unwrap_or_else(PoisonError::into_inner);
    begin(Turn::Alone(turn), mode, name, title)
}

fn begin(turn: Turn, mode: Mode, name: &str, title: &str) -> Lab {
    let (namespace, title) = (format!("{}-{name}", mode.name()), format!("{}: {title}", mode.name()));
    let free = FREE.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let cluster = free.unwrap_or_else(another);
    cluster
        .kubectl
        .run(&["create", "namespace", &namespace])
        .expect("make a namespace");
    Lab {
        cluster: Some(cluster),
        namespace,
        mode,
        title,
        start: Instant::now(),
        _turn: turn,
    }
}

/// Starts a cluster. If one did not start, others will not.
fn another() -> Cluster {
    static FAILED: OnceLock<String> = OnceLock::new();
    let started = match FAILED.get() {
        Some(why) => Err(why.clone()),
        None => up().map_err(|error| FAILED.get_or_init(|| format!("{error:#}")).clone()),
    };
    match started {
        Ok(cluster) => cluster,
        Err(why) => panic!("the cluster did not start: {why}"),
    }
}

/// Starts three nodes with hostdir in both modes. The pools of the first are on the machine's disk, those of the others on
/// filesystems of 1 GiB.
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

/// Prints a line to standard error directly, so that the test harness does not capture it.
pub(crate) fn report(what: &str) {
    std::io::stderr().write_all(format!("    {what}\n").as_bytes()).unwrap();
}

impl Lab {
    /// Upgrades hostdir, with settings besides those of all tests.
    pub(crate) fn install(&self, settings: &[&str]) {
        let settings = [self.mode.settings(), settings].concat();
        Cluster::install(self, self.mode.release(), &settings).unwrap();
    }

    pub(crate) fn kubectl(&self) -> &Kubectl {
        let cluster: &Cluster = self;
        &cluster.kubectl
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

    /// Waits until `condition` holds.
    pub(crate) fn wait(&self, what: &str, condition: impl FnMut() -> Result<bool>) {
        if let Err(error) = self.kubectl().wait(PATIENCE, what, condition) {
            panic!("{error:#}\n{}", self.diagnosis());
        }
    }

    /// What Kubernetes shows about the test's pods and claims: often only the message of a failure is kept.
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

    /// Gets an object in the test's namespace.
    pub(crate) fn get(&self, kind: &str, name: &str) -> Result<Value> {
        self.kubectl().get(&[kind, name, "-n", &self.namespace])
    }

    /// Deletes an object in the test's namespace, and waits until it is gone.
    pub(crate) fn delete(&self, kind: &str, name: &str) {
        let args = ["delete", kind, name, "-n", &self.namespace, "--wait", "--timeout=180s"];
        self.kubectl().run(&args).unwrap();
    }

    /// Deletes all pods and claims in the test's namespace, and waits until they are gone.
    pub(crate) fn delete_all(&self, patience: Duration) {
        let namespace = self.namespace.as_str();
        let args = ["delete", "pods,pvc", "--all", "-n", namespace, "--wait=false"];
        self.kubectl().run(&args).unwrap();
        // kubectl would wait for one object after the other, five per second.
        self.kubectl()
            .wait(patience, "all pods and claims are gone", || {
                Ok(self.kubectl().list(&["pods,pvc", "-n", namespace])?.is_empty())
            })
            .unwrap();
    }

    /// Waits until a pod is ready. Returns its node.
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

    /// The output of `kubectl describe`.
    pub(crate) fn describe(&self, kind: &str, name: &str) -> Result<String> {
        self.kubectl().run(&["describe", kind, name, "-n", &self.namespace])
    }

    /// Waits until the output of `kubectl describe` contains `text`.
    pub(crate) fn described(&self, kind: &str, name: &str, text: &str) {
        self.wait(&format!("kubectl describe {kind} {name} shows {text:?}"), || {
            Ok(self.describe(kind, name)?.contains(text))
        });
    }

    /// The volume id of a claim, which is the name of its PersistentVolume.
    pub(crate) fn volume_of(&self, claim: &str) -> String {
        let claim = self.get("pvc", claim).unwrap();
        claim["spec"]["volumeName"].as_str().unwrap().to_owned()
    }

    /// The names in a directory of the pools on all nodes.
    pub(crate) fn in_pools(&self, dir: &str) -> Vec<String> {
        let list = |node: &hostdir_lab::Node| node.sh(&format!("ls {}/{dir}", self.mode.pool())).unwrap();
        let names: Vec<String> = self.nodes.iter().map(list).collect();
        names
            .iter()
            .flat_map(|names| names.lines())
            .map(str::to_owned)
            .collect()
    }

    /// The number of CSI mounts of the kubelets on all nodes.
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

    /// The capacity that is published for a StorageClass on a node, in bytes.
    pub(crate) fn capacity(&self, class: &str, node: &str) -> Result<u64> {
        let objects = self.kubectl().list(&["csistoragecapacities", "-n", NAMESPACE])?;
        let here = |object: &&Value| {
            object["storageClassName"] == class
                && object["nodeTopology"]["matchLabels"]["topology.hostdir.csi/node"] == node
        };
        let object = objects
            .iter()
            .find(here)
            .ok_or_else(|| anyhow::anyhow!("no CSIStorageCapacity for StorageClass {class} on node {node}"))?;
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

    /// Waits until no volume, mount or trash is left on any node.
    pub(crate) fn nothing_is_left(&self) {
        self.wait("no PersistentVolume is left", || {
            Ok(self.kubectl().list(&["pv"])?.is_empty())
        });
        self.wait("no HostVolume is left", || {
            Ok(self.kubectl().list(&["hostvolumes"])?.is_empty())
        });
        for dir in ["volumes", "trash"] {
            self.wait(&format!("the directory {dir} of every pool is empty"), || {
                Ok(self.in_pools(dir).is_empty())
            });
        }
        self.wait("no mount is left", || Ok(self.mounts() == 0));
    }

    /// A claim of hostdir's StorageClass.
    pub(crate) fn claim(&self, name: &str, size: &str) -> Value {
        crate::objects::claim_of(name, size, self.mode.release(), "ReadWriteOnce")
    }

    /// The pod of hostdir's driver on a node.
    pub(crate) fn driver_on(&self, node: &str) -> Value {
        let labels = format!(
            "app.kubernetes.io/instance={},app.kubernetes.io/component=node",
            self.mode.release()
        );
        let node = format!("spec.nodeName={node}");
        let args = ["pods", "-n", NAMESPACE, "-l", &labels, "--field-selector", &node];
        self.kubectl().list(&args).unwrap().swap_remove(0)
    }

    /// How often the driver on a node was restarted.
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

    /// The controllers' pods that are ready and not about to end: the rollout of another test may still go on.
    pub(crate) fn live_controllers(&self) -> Vec<Value> {
        let mut pods = self.controllers();
        pods.retain(|pod| is_ready(pod) && pod["metadata"]["deletionTimestamp"].is_null());
        pods
    }

    /// Waits until the metrics of a pod of hostdir contain all these lines.
    pub(crate) fn metrics_have(&self, pod: &Value, lines: &[&str]) {
        let mut metrics = String::new();
        let waited = self.kubectl().wait(PATIENCE, "metrics", || {
            metrics = self.http(pod, "metrics")?;
            Ok(lines.iter().all(|line| metrics.contains(line)))
        });
        if let Err(error) = waited {
            panic!("{error:#}: not all of {lines:#?} are in\n{metrics}");
        }
    }

    /// The name of the leader's pod, and its node; `None` if no pod leads.
    pub(crate) fn leader(&self) -> Option<(String, String)> {
        let lease = self.kubectl().get(&["lease", "hostdir-csi", "-n", NAMESPACE]).ok()?;
        let holder = lease["spec"]["holderIdentity"].as_str()?.to_owned();
        let pods = self.controllers();
        let pod = pods.iter().find(|pod| pod["metadata"]["name"] == holder.as_str())?;
        let node = pod["spec"]["nodeName"].as_str()?.to_owned();
        Some((holder, node))
    }

    /// Gets a path from a pod of hostdir over HTTP.
    pub(crate) fn http(&self, pod: &Value, path: &str) -> Result<String> {
        let name = pod["metadata"]["name"].as_str().unwrap();
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{name}:9808/proxy/{path}");
        self.kubectl().get_raw(&path)
    }

    /// Deletes all pods in the test's namespace without waiting for their nodes.
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

    /// Whether the directory of a volume exists on a node.
    pub(crate) fn is_on_node(&self, node: usize, volume: &str) -> bool {
        let script = format!("if test -d {}/volumes/{volume}; then echo yes; fi", self.mode.pool());
        !self.nodes[node].sh(&script).unwrap().is_empty()
    }

    /// The path of a volume's file on its node.
    pub(crate) fn on_disk(&self, volume: &str, file: &str) -> String {
        format!("{}/volumes/{volume}/data/{file}", self.mode.pool())
    }

    /// Kills the driver on a node by SIGKILL.
    pub(crate) fn kill_driver(&self, node: usize) {
        self.signal_drivers(node, self.mode.command(), "KILL");
    }

    /// Waits until the driver on a node answers on its socket. Returns a client.
    pub(crate) fn driver_client(&self, node: usize) -> Client {
        let socket = format!("var/lib/kubelet/plugins/{}/csi.sock", self.mode.driver());
        let socket = self.nodes[node].root().unwrap().join(socket);
        let mut client = None;
        self.wait("the driver answers", || {
            client = Client::connect(&socket).ok();
            Ok(client.is_some())
        });
        client.expect("the wait has set it")
    }

    /// Sends a signal to the `hostdir <command>` processes on a node.
    pub(crate) fn signal_drivers(&self, node: usize, command: &str, signal: &str) {
        self.for_drivers(node, command, &format!("kill -{signal} ${{p#/proc/}} || :"));
    }

    /// The directories in /proc of the driver's processes on a node.
    pub(crate) fn driver_processes(&self, node: usize) -> String {
        self.for_drivers(node, self.mode.command(), "echo $p")
    }

    /// Runs a shell command for each `hostdir <command>` process on a node; `$p` is its directory in /proc.
    fn for_drivers(&self, node: usize, command: &str, action: &str) -> String {
        // The command line distinguishes them from the kubelet's probes.
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
            let _ = self.keep_logs(&logs);
            // Resets hostdir's settings for the next test.
            if let Err(error) = Cluster::install(self, self.mode.release(), self.mode.settings()) {
                report(&format!("{error:#}"));
            }
        } else {
            report(&format!("{:<75} {:>5.1} s", self.title, time.as_secs_f64()));
        }
        // After a success the namespace is empty, so there is no need to wait.
        let wait = format!("--wait={}", std::thread::panicking());
        let args = ["delete", "namespace", &self.namespace, &wait, "--timeout=120s"];
        if let Err(error) = self.kubectl().run(&args) {
            report(&format!("{error:#}"));
        }
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        free.extend(self.cluster.take());
    }
}

/// Unfreezes the API server on drop.
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
