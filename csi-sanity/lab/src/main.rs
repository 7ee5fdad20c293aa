//! A cluster to play in, with hostdir installed: `up [NODES]` and, from anywhere, `down`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use hostdir_lab::cluster::BUSYBOX_IMAGE;
use hostdir_lab::harness::{self, Need};
use hostdir_lab::{Cluster, prove};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

/// Who runs the cluster.
const PID_FILE: &str = "/run/hostdir-lab.pid";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hostdir-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["up"] => up(3),
        ["up", nodes] => up(nodes.parse().context("the number of nodes")?),
        ["down"] => down(),
        _ => bail!("usage: hostdir-lab up [NODES] | down"),
    }
}

/// Runs until SIGINT, SIGTERM or `down`.
fn up(nodes: usize) -> Result<()> {
    if let Ok(pid) = running() {
        bail!("a cluster is up already (process {pid}); take it down first: hostdir-lab down");
    }
    for need in [Need::Root, Need::Go, Need::Cluster] {
        need.check().context("a cluster cannot run here")?;
    }
    // Blocked before any thread starts, so that every thread has them blocked, and taken below.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("block signals")?;
    harness::set_hostdir(build_hostdir()?);
    let cluster = Cluster::up(nodes)?;
    cluster.install("hostdir", &[])?;
    cluster.connect_this_machine()?;
    std::fs::write(PID_FILE, std::process::id().to_string()).context("write the process id")?;
    print!("{}", welcome(&cluster));
    signals.wait().context("wait for a signal")?;
    std::fs::remove_file(PID_FILE).context("remove the file with the process id")
}

/// hostdir is built where this program is, unless `HOSTDIR_BINARY` names another.
fn build_hostdir() -> Result<PathBuf> {
    if let Some(binary) = std::env::var_os("HOSTDIR_BINARY") {
        return Ok(binary.into());
    }
    let status = prove::cargo()
        .args(["build", "--locked", "--bin", "hostdir"])
        .status()
        .context("run cargo")?;
    ensure!(status.success(), "hostdir cannot be built");
    Ok(std::env::current_exe()
        .context("find this program")?
        .with_file_name("hostdir"))
}

fn welcome(cluster: &Cluster) -> String {
    let (kubeconfig, bin) = (&cluster.kubeconfig, cluster.bin.display());
    format!(
        r#"
hostdir is installed. In another terminal:

    export KUBECONFIG={kubeconfig} PATH=$PATH:{bin}
    kubectl get pods -A -o wide
    kubectl apply -f - <<'EOF'
    apiVersion: v1
    kind: PersistentVolumeClaim
    metadata: {{name: data}}
    spec:
      storageClassName: hostdir
      accessModes: [ReadWriteOnce]
      resources: {{requests: {{storage: 1Gi}}}}
    ---
    apiVersion: v1
    kind: Pod
    metadata: {{name: pod}}
    spec:
      containers:
        - name: main
          image: {BUSYBOX_IMAGE}
          args: ["-c", "while :; do date >> /data/log; sleep 1; done"]
          volumeMounts: [{{name: data, mountPath: /data}}]
      volumes: [{{name: data, persistentVolumeClaim: {{claimName: data}}}}]
    EOF
    kubectl exec pod -- cat /data/log

There are no registries: {BUSYBOX_IMAGE} is the one image for pods.
Ctrl-C here, or `cargo run -p hostdir-lab -- down` anywhere, takes the cluster down with all its data.
"#
    )
}

fn down() -> Result<()> {
    let pid = running()?;
    kill(pid, Signal::SIGTERM).context("signal the cluster's process")?;
    while Path::new("/proc").join(pid.to_string()).exists() {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    println!("the cluster is down");
    Ok(())
}

fn running() -> Result<Pid> {
    let text = std::fs::read_to_string(PID_FILE).context("no cluster is up")?;
    let pid = Pid::from_raw(text.trim().parse()?);
    kill(pid, None).context("no cluster is up any more")?;
    Ok(pid)
}
