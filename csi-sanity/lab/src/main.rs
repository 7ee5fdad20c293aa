//! A cluster to play in, with hostdir installed: `up [NODES]` and, from anywhere, `down`.

use std::path::Path;

use anyhow::{Context, Result, bail};
use hostdir_lab::Cluster;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

/// Who runs the cluster.
const PID_FILE: &str = "/run/hostdir-lab.pid";

fn main() -> Result<()> {
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
    // Blocked before any thread starts, so that every thread has them blocked, and taken below.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("block signals")?;
    let cluster = Cluster::up(nodes)?;
    cluster.install("hostdir", &[])?;
    cluster.connect_this_machine()?;
    std::fs::write(PID_FILE, std::process::id().to_string()).context("write the process id")?;
    println!("\nhostdir is installed; a claim needs storageClassName: hostdir\n");
    println!(
        "    export KUBECONFIG={} PATH=$PATH:{}",
        cluster.kubeconfig,
        cluster.bin.display()
    );
    println!("    kubectl get pods -A -o wide\n");
    println!("Ctrl-C here, or `cargo run -p hostdir-lab -- down` anywhere, takes it down with all its data.");
    signals.wait().context("wait for a signal")?;
    std::fs::remove_file(PID_FILE).context("remove the file with the process id")
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
