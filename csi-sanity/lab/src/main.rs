//! A cluster to try hostdir in: `up [NODES]` runs it, `down` in any terminal stops it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use hostdir_lab::cluster::BUSYBOX_IMAGE;
use hostdir_lab::harness::{self, Need};
use hostdir_lab::{Cluster, prove};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

/// The file with the process id of the running `up`, which holds a lock on it.
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
    let mut pid_file = pid_file()?;
    if pid_file.try_lock().is_err() {
        bail!("a cluster is already up or starting; take it down first: hostdir-lab down");
    }
    for need in [Need::Root, Need::Go, Need::Cluster] {
        need.check().context("a cluster cannot run here")?;
    }
    // Blocked before any thread starts, so that all threads inherit this; the main thread waits for the signals below.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("block signals")?;
    pid_file
        .set_len(0)
        .and_then(|()| write!(pid_file, "{}", std::process::id()))
        .context("write the process id")?;
    harness::set_hostdir(build_hostdir()?);
    let cluster = Cluster::up(nodes)?;
    cluster.install("hostdir", &[])?;
    cluster.connect_this_machine()?;
    print!("{}", welcome(&cluster));
    signals.wait().context("wait for a signal")?;
    Ok(())
}

/// Opens [`PID_FILE`].
fn pid_file() -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(PID_FILE).with_context(|| format!("open {PID_FILE}"))
}

/// Builds hostdir beside this program, unless `HOSTDIR_BINARY` names a binary. Returns its path.
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

There is no registry: {BUSYBOX_IMAGE} is the only image for pods.
Ctrl-C here, or `cargo run -p hostdir-lab -- down` anywhere, takes the cluster down with all its data.
"#
    )
}

fn down() -> Result<()> {
    let mut pid_file = pid_file()?;
    if pid_file.try_lock().is_ok() {
        bail!("no cluster is up");
    }
    let mut pid = String::new();
    pid_file.read_to_string(&mut pid).context("read the process id")?;
    let pid = pid
        .trim()
        .parse()
        .with_context(|| format!("{PID_FILE} has no process id yet: the cluster is still starting; try again"))?;
    kill(Pid::from_raw(pid), Signal::SIGTERM).context("signal the cluster's process")?;
    pid_file.lock().context("wait for the cluster's process")?;
    println!("the cluster is down");
    Ok(())
}
