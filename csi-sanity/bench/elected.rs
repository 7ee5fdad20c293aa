//! `cargo bench --bench elected`: a controller and a node agent on a real API server, with simulated nodes.
//!
//! An idle node agent with 1,000 volumes; 500 claims through the real external-provisioner and controller manager; and a
//! controller with 1,000 HostNodes and 100,000 HostVolumes: its start, memory and response times. Needs root and the
//! programs of the cluster tests. Prints a table.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures::StreamExt;
use hostdir::csi::proto::{CreateVolumeRequest, GetCapacityRequest, Topology, TopologyRequirement};
use hostdir::k8s::api::{DirectorySpec, HostNode, HostNodeSpec, HostVolume, HostVolumeSpec};
use hostdir_lab::client::create_request as request_for;
use hostdir_lab::cluster::ControllerManager;
use hostdir_lab::{Cluster, Csi, Driver};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::json;

const NODES: usize = 1_000;
const VOLUMES: usize = 100_000;
const CALLS: usize = 1_000;
const CAPACITY_CALLS: usize = 20_000;
const CLAIMS: u32 = 500;
const AGENT_VOLUMES: usize = 1_000;
/// How long the idle node agent is measured.
const IDLE: Duration = Duration::from_mins(2);

fn main() -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: the benchmark needs root to make a cluster");
        return Ok(());
    }
    hostdir_lab::harness::set_hostdir(env!("CARGO_BIN_EXE_hostdir"));
    let cluster = Cluster::up(0)?;
    cluster.join_network()?;
    let scratch = tempfile::tempdir()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run(&cluster, scratch.path()))
}

async fn run(cluster: &Cluster, scratch: &Path) -> anyhow::Result<()> {
    let kubeconfig = Kubeconfig::read_from(&cluster.kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    for definition in hostdir::k8s::api::definitions() {
        cluster.kubectl.apply(&definition.to_string())?;
    }
    let wait = ["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"];
    cluster.kubectl.run(&wait)?;

    agent(cluster, &client, scratch).await?;
    claims(cluster, &client, scratch).await?;
    crowd(cluster, &client, scratch).await
}

fn volume(name: &str, node: usize) -> HostVolume {
    let spec = HostVolumeSpec {
        node: format!("node-{node}"),
        pool: "default".into(),
        name: name.into(),
        capacity: "1Mi".into(),
        claim: None,
        directory: DirectorySpec {
            mode: "0770".into(),
            uid: 0,
            gid: 0,
        },
    };
    let mut volume = HostVolume::new(name, spec);
    volume.metadata.finalizers = Some(vec![hostdir::k8s::api::FINALIZER.into()]);
    volume
}

/// Makes `count` objects, 64 at a time.
async fn make<F: Future<Output = anyhow::Result<()>>>(count: usize, one: impl Fn(usize) -> F) -> anyhow::Result<()> {
    let mut made = futures::stream::iter((0..count).map(one)).buffer_unordered(64);
    while let Some(result) = made.next().await {
        result?;
    }
    Ok(())
}

/// Makes simulated nodes: a Node, and a HostNode with one pool of 1 TiB.
async fn nodes(client: &Client, count: usize) -> anyhow::Result<()> {
    let (nodes, host_nodes): (Api<Node>, Api<HostNode>) = (Api::all(client.clone()), Api::all(client.clone()));
    make(count, |number| {
        let (nodes, host_nodes) = (&nodes, &host_nodes);
        async move {
            let name = format!("node-{number}");
            let node: Node = serde_json::from_value(json!({
                "metadata": {"name": name, "labels": {"topology.hostdir.csi/node": name}}
            }))?;
            nodes.create(&PostParams::default(), &node).await?;
            host_nodes
                .create(&PostParams::default(), &HostNode::new(&name, HostNodeSpec {}))
                .await?;
            let pool = json!({
                "name": "default", "id": "00000000-0000-4000-8000-000000000000", "filesystem": "ext4",
                "total": "1Ti", "free": "1Ti", "foreign": "0", "reserve": "0", "overcommit": 1.0,
            });
            let status = json!({"status": {"version": "0.1.0", "pools": [pool], "orphans": [], "orphanCount": 0}});
            host_nodes
                .patch_status(&name, &PatchParams::default(), &Patch::Merge(status))
                .await?;
            Ok(())
        }
    })
    .await
}

/// A process that is killed on drop.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn start(program: impl AsRef<std::ffi::OsStr>, kubeconfig: &str, args: &[String]) -> anyhow::Result<Self> {
        let child = Command::new(program)
            .args(args)
            .env("KUBECONFIG", kubeconfig)
            .env("POD_NAME", "bench")
            .env("NAMESPACE", "default")
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self(child))
    }
}

/// Makes a directory for the socket of a driver.
fn directory(scratch: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let dir = scratch.join(name);
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// A hostdir with its socket in a directory, and the API server of the cluster.
fn hostdir(cluster: &Cluster, dir: &Path, args: &[&str]) -> Driver {
    Driver::with_args(dir, args).kubeconfig(&cluster.kubeconfig)
}

/// Connects to a driver, and waits until it is ready.
async fn connect(socket: &Path) -> Csi {
    loop {
        if let Ok(csi) = Csi::connect(socket).await
            && csi.probe().await.unwrap_or(false)
        {
            return csi;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn percentiles(mut times: Vec<Duration>) -> (f64, f64) {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)].as_secs_f64() * 1e3;
    (at(50), at(99))
}

fn topology(node: usize) -> Topology {
    Topology {
        segments: [("topology.hostdir.csi/node".to_owned(), format!("node-{node}"))].into(),
    }
}

fn create_request(name: &str, node: usize) -> CreateVolumeRequest {
    CreateVolumeRequest {
        accessibility_requirements: Some(TopologyRequirement {
            requisite: vec![topology(node)],
            preferred: vec![topology(node)],
        }),
        ..request_for(name)
    }
}

/// Measures a controller with many nodes and volumes.
async fn crowd(cluster: &Cluster, client: &Client, scratch: &Path) -> anyhow::Result<()> {
    let volumes: Api<HostVolume> = Api::all(client.clone());
    let start = Instant::now();
    nodes(client, NODES).await?;
    make(VOLUMES, |number| {
        let volumes = &volumes;
        async move {
            let volume = volume(&format!("pvc-{number}"), number % NODES);
            volumes.create(&PostParams::default(), &volume).await?;
            Ok(())
        }
    })
    .await?;
    println!(
        "made {NODES} HostNodes and {VOLUMES} HostVolumes in {:.0?}",
        start.elapsed()
    );
    let driver = hostdir(cluster, &directory(scratch, "controller")?, &["controller"]);
    let start = Instant::now();
    let controller = driver.spawn();
    let csi = connect(&driver.socket).await;
    println!("controller ready            {:>10.1} s", start.elapsed().as_secs_f64());
    let (now, most) = controller.memory();
    println!("resident memory             {now:>10.1} MiB (peak {most:.1})");

    let mut times = Vec::new();
    for number in 0..CAPACITY_CALLS {
        let request = GetCapacityRequest {
            accessible_topology: Some(topology(number % NODES)),
            ..GetCapacityRequest::default()
        };
        let start = Instant::now();
        let room = csi.capacity(request).await?.available_capacity;
        times.push(start.elapsed());
        anyhow::ensure!(room > 0, "no capacity");
    }
    let (p50, p99) = percentiles(times);
    println!("GetCapacity                 {p50:>10.3} ms p50, {p99:.3} ms p99");

    let (mut bare, mut served) = (Vec::new(), Vec::new());
    for number in 0..CALLS {
        let start = Instant::now();
        let object = volume(&format!("bare-{number}"), number % NODES);
        volumes.create(&PostParams::default(), &object).await?;
        bare.push(start.elapsed());
        let start = Instant::now();
        let request = create_request(&format!("served-{number}"), number % NODES);
        csi.create(request).await?;
        served.push(start.elapsed());
    }
    let ((bare, bare_most), (served, served_most)) = (percentiles(bare), percentiles(served));
    println!(
        "CreateVolume                {served:>10.2} ms p50, {served_most:.2} ms p99; bare create {bare:.2} and {bare_most:.2}: ratio {:.2}",
        served / bare
    );
    let mut times = Vec::new();
    for number in 0..CALLS {
        let start = Instant::now();
        csi.delete(&format!("served-{number}")).await?;
        times.push(start.elapsed());
    }
    let (p50, p99) = percentiles(times);
    println!("DeleteVolume, never used    {p50:>10.2} ms p50, {p99:.2} ms p99");
    let (now, most) = controller.memory();
    println!("resident memory at the end  {now:>10.1} MiB (peak {most:.1})");
    Ok(())
}

/// Measures how fast claims with immediate binding are bound, through the real provisioner and controller manager.
async fn claims(cluster: &Cluster, client: &Client, scratch: &Path) -> anyhow::Result<()> {
    nodes(client, 3).await?;
    for number in 0..3 {
        let name = format!("node-{number}");
        let object = json!({
            "apiVersion": "storage.k8s.io/v1", "kind": "CSINode", "metadata": {"name": name},
            "spec": {"drivers": [
                {"name": "hostdir.csi", "nodeID": name, "topologyKeys": ["topology.hostdir.csi/node"]}
            ]},
        });
        cluster.kubectl.apply(&object.to_string())?;
    }
    let class = json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "at-once"},
        "provisioner": "hostdir.csi", "volumeBindingMode": "Immediate",
    });
    cluster.kubectl.apply(&class.to_string())?;
    let driver = hostdir(cluster, &directory(scratch, "claims")?, &["controller"]);
    let _controller = driver.spawn();
    drop(connect(&driver.socket).await);
    for (what, sidecar, manager) in [
        ("stock (5/10, 20/30)", (5, 10), (20, 30)),
        ("sidecar 100/200, manager 20/30", (100, 200), (20, 30)),
        ("all raised (100/200, 500/1000)", (100, 200), (500, 1000)),
    ] {
        cluster.restart_controller_manager(ControllerManager {
            qps: manager.0,
            burst: manager.1,
            ..ControllerManager::default()
        })?;
        let args = [
            format!("--csi-address={}", driver.socket.display()),
            format!("--kubeconfig={}", cluster.kubeconfig),
            "--strict-topology".into(),
            "--immediate-topology=false".into(),
            "--extra-create-metadata".into(),
            format!("--kube-api-qps={}", sidecar.0),
            format!("--kube-api-burst={}", sidecar.1),
            "--timeout=30s".into(),
        ];
        let program: PathBuf = cluster.bin.join("csi-provisioner");
        let provisioner = Process::start(program, &cluster.kubeconfig, &args)?;
        bind(cluster, what)?;
        drop(provisioner);
    }
    let names: Vec<String> = (0..3).map(|number| format!("node-{number}")).collect();
    for kind in ["node", "hostnode"] {
        let mut args = vec!["delete", kind];
        args.extend(names.iter().map(String::as_str));
        cluster.kubectl.run(&args)?;
    }
    Ok(())
}

fn bind(cluster: &Cluster, what: &str) -> anyhow::Result<()> {
    let claims: String = (0..CLAIMS)
        .map(|number| {
            let claim = json!({
                "apiVersion": "v1", "kind": "PersistentVolumeClaim",
                "metadata": {"name": format!("claim-{number}"), "namespace": "default"},
                "spec": {
                    "storageClassName": "at-once", "accessModes": ["ReadWriteOnce"],
                    "resources": {"requests": {"storage": "1Mi"}},
                },
            });
            format!("---\n{claim}")
        })
        .collect::<Vec<_>>()
        .join("\n");
    let start = Instant::now();
    cluster.kubectl.apply(&claims)?;
    let applied = start.elapsed();
    let (mut recorded, mut made) = (None, None);
    let count = |kind: &str| -> anyhow::Result<usize> {
        let out = cluster.kubectl.run(&["get", kind, "-o", "name"])?;
        Ok(out.lines().count())
    };
    let bound = loop {
        if recorded.is_none() && count("hostvolumes")? == CLAIMS as usize {
            recorded = Some(start.elapsed());
        }
        if made.is_none() && count("pv")? == CLAIMS as usize {
            made = Some(start.elapsed());
        }
        let path = "jsonpath={range .items[*]}{.status.phase}{'\\n'}{end}";
        let phases = cluster.kubectl.run(&["get", "pvc", "-o", path])?;
        if phases.lines().filter(|phase| *phase == "Bound").count() == CLAIMS as usize {
            break start.elapsed();
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    let seconds = |time: Option<Duration>| time.unwrap_or(bound).as_secs_f64();
    println!(
        "{CLAIMS} claims, {what}: applied {:.1} s, all HostVolumes {:.1} s, all PersistentVolumes {:.1} s, all bound {:.1} s = {:.1}/s",
        applied.as_secs_f64(),
        seconds(recorded),
        seconds(made),
        bound.as_secs_f64(),
        f64::from(CLAIMS) / bound.as_secs_f64()
    );
    cluster
        .kubectl
        .run(&["delete", "pvc", "--all", "--wait", "--timeout=600s"])?;
    while count("hostvolumes")? + count("pv")? > 0 {
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// Measures an idle node agent with many volumes.
async fn agent(cluster: &Cluster, client: &Client, scratch: &Path) -> anyhow::Result<()> {
    let volumes: Api<HostVolume> = Api::all(client.clone());
    make(AGENT_VOLUMES, |number| {
        let volumes = &volumes;
        async move {
            let mut volume = volume(&format!("mine-{number}"), 0);
            volume.spec.node = "bench-node".into();
            volume.metadata.finalizers = None;
            volumes.create(&PostParams::default(), &volume).await?;
            Ok(())
        }
    })
    .await?;
    let pool = format!("--pool=default={}", scratch.join("pool").display());
    let args = ["node", "--node-name=bench-node", pool.as_str()];
    let driver = hostdir(cluster, &directory(scratch, "node")?, &args);
    let agent = driver.spawn();
    drop(connect(&driver.socket).await);
    tokio::time::sleep(Duration::from_secs(15)).await;
    let before = requests(cluster)?;
    tokio::time::sleep(IDLE).await;
    let asked = requests(cluster)? - before;
    let (now, most) = agent.memory();
    println!(
        "node agent, {AGENT_VOLUMES} HostVolumes: {now:.1} MiB resident (peak {most:.1}), {:.1} requests to the API server per minute",
        asked / IDLE.as_secs_f64() * 60.0
    );
    drop(agent);
    volumes
        .delete_collection(&DeleteParams::default(), &kube::api::ListParams::default())
        .await?;
    cluster.kubectl.run(&["delete", "hostnode", "bench-node"])?;
    Ok(())
}

/// The number of requests about HostNodes and HostVolumes that the API server has answered.
fn requests(cluster: &Cluster) -> anyhow::Result<f64> {
    let metrics = cluster.kubectl.run(&["get", "--raw", "/metrics"])?;
    let ours = metrics
        .lines()
        .filter(|line| line.starts_with("apiserver_request_total{") && line.contains("group=\"hostdir.csi\""))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    Ok(ours.sum())
}
