//! Connects the edges to the core, and serves until SIGTERM.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use crate::config::{
    Cli, Command, ControllerArgs, LeaderArgs, LocalPools, NodeArgs, ProbeArgs, SelftestArgs, ServeArgs, SidecarArg,
    host_name,
};
use crate::csi::{self, Endpoint, Listener, Question, Serving};
use crate::http::{self, Check};
use crate::k8s::{self, Agent, Agents, ApiStore, Backlog, Gc, GcConfig, Get, Guard, GuardConfig};
use crate::linux::{self, Linux};
use crate::log::{self, LogGuard};
use crate::metrics::Metrics;
use crate::volume::controller::cache::ClusterCache;
use crate::volume::host_volume::NoAssignments;
use crate::volume::{Control, Controller, Fence, Health, Node, SelfTest};
use crate::{background, unused};

/// Threads for blocking calls; further calls wait for a free thread. There are enough that calls stuck on one bad disk do
/// not block the others; a waiting thread costs about 10 KiB.
const BLOCKING_THREADS: usize = 512;

/// How long running calls may take to end after SIGTERM. Together with the rest of the shutdown it stays below the 30 s that
/// the kubelet waits before SIGKILL. To a call, SIGKILL is like a power failure: its effect is all or nothing.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// Runs a command until it ends, and says on standard error why it failed.
#[must_use]
pub fn run(cli: Cli) -> ExitCode {
    match command(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::last_line(format!("hostdir: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn command(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Local(args) => local(args),
        Command::Node(args) => node(args),
        Command::Controller(args) => controller(args),
        Command::Crds => crds(),
        Command::Probe(args) => probe(&args),
        Command::Selftest(args) => selftest(&args),
        Command::Leader(args) => leader(&args),
    }
}

/// Probes another hostdir process. This process's exit code is the answer; the reason for a failure goes to standard error.
fn probe(args: &ProbeArgs) -> anyhow::Result<()> {
    let question = if args.ready {
        Question::AllPools
    } else {
        Question::Alive
    };
    small_runtime()?.block_on(csi::probe(&args.endpoint, question))
}

/// Takes a volume of each pool through its life; fails if any step fails.
fn selftest(args: &SelftestArgs) -> anyhow::Result<()> {
    let runtime = small_runtime()?;
    let mut failed = Vec::new();
    for pool in &args.pools {
        let (table, passed) = runtime.block_on(csi::selftest(&args.endpoint, pool))?;
        print!("{table}");
        if !passed {
            failed.push(pool.as_str());
        }
    }
    // Do not wait for a thread that hangs on a disk.
    runtime.shutdown_background();
    anyhow::ensure!(failed.is_empty(), "the self-test failed: pool {}", failed.join(", "));
    Ok(())
}

/// Prints who leads; fails unless every election has a leader that may lead.
fn leader(args: &LeaderArgs) -> anyhow::Result<()> {
    let (report, well) = small_runtime()?.block_on(async {
        let client = k8s::client().await.context("cannot reach the API server")?;
        k8s::report(client, &args.namespace, &args.leases()).await
    })?;
    print!("{report}");
    anyhow::ensure!(
        well,
        "not every Lease is held by a controller that may lead; see the verdicts above"
    );
    Ok(())
}

fn small_runtime() -> anyhow::Result<Runtime> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().context("cannot start the runtime")
}

fn crds() -> anyhow::Result<()> {
    for definition in k8s::api::definitions() {
        println!("---\n{}", serde_saphyr::to_string(&definition)?.trim_end());
    }
    Ok(())
}

fn local(args: NodeArgs) -> anyhow::Result<()> {
    let (process, LocalPools { node, pools }) = on_node(args)?;
    let node = Arc::new(Node::new(node, linux()?, Arc::new(NoAssignments), pools));
    let roles = Roles {
        health: Arc::clone(&node) as _,
        control: Some(Arc::clone(&node) as _),
        node: Some(Arc::clone(&node)),
    };
    let unused = unused::watch(node, Arc::clone(&process.metrics));
    process.serve(roles, async { match unused.await {} })
}

fn node(args: NodeArgs) -> anyhow::Result<()> {
    let (process, LocalPools { node, pools }) = on_node(args)?;
    let (runtime, metrics) = (process.runtime.handle().clone(), Arc::clone(&process.metrics));
    let client = runtime.block_on(k8s::client()).context("cannot reach the API server")?;
    let agent = Agent::new(node.clone(), client, runtime, metrics);
    let node = Arc::new(Node::new(node, linux()?, agent.assignments(), pools));
    let roles = Roles {
        health: Arc::clone(&node) as _,
        control: Some(Arc::new(SelfTest(Arc::clone(&node)))),
        node: Some(Arc::clone(&node)),
    };
    process.serve(roles, agent.run(node))
}

fn controller(args: ControllerArgs) -> anyhow::Result<()> {
    let ControllerArgs {
        serve,
        pod_name,
        sidecars,
        namespace,
        node_pods,
        node_grace,
        unused_age,
    } = args;
    let log = log::to_stderr(serve.log_format, serve.log_level);
    let process = Process::new(serve, log)?;
    let (runtime, metrics) = (process.runtime.handle().clone(), Arc::clone(&process.metrics));
    let client = runtime.block_on(k8s::client()).context("cannot reach the API server")?;
    let cache = Arc::new(ClusterCache::default());
    let store = Arc::new(ApiStore::new(client.clone(), runtime.clone()));
    let config = GcConfig {
        node_grace: Duration::from_secs(node_grace),
        unused_age: Duration::from_secs(unused_age),
    };
    let pod_name = pod_name.map_or_else(host_name, Ok)?;
    let fence = Arc::<Fence>::default();
    let agents = namespace.clone().zip(node_pods);
    let agents = agents.map(|(namespace, selector)| Agents { namespace, selector });
    let backlog = Arc::new(Backlog::new(process.serve.driver_name.clone()));
    let guard = namespace.filter(|_| !sidecars.is_empty()).map(|namespace| {
        let config = GuardConfig {
            namespace,
            pod: pod_name.clone(),
            alive: check(process.serve.endpoint.clone(), Question::Alive),
            ready: check(process.serve.endpoint.clone(), Question::Ready),
            sidecars: sidecars.into_iter().map(get_from_sidecar).collect(),
        };
        let (client, backlog) = (client.clone(), Arc::clone(&backlog));
        Guard::new(config, client, backlog, Arc::clone(&fence), Arc::clone(&metrics))
    });
    let mut gc = Gc::new(config, &cache, &store, client.clone(), pod_name, runtime, &metrics);
    background::spawn("gc".into(), move || gc.run()).context("cannot start the garbage collection")?;
    let controller = Arc::new(Controller::new(store, Arc::clone(&cache), fence));
    let roles = Roles {
        health: Arc::clone(&controller) as _,
        control: Some(controller),
        node: None,
    };
    process.serve(roles, async {
        let watch = async {
            match guard {
                Some(guard) => Box::pin(guard.run()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = Box::pin(k8s::feed(client, cache, backlog, agents, metrics)) => anyhow::anyhow!("the API watches have ended"),
            ghost = watch => ghost,
        }
    })
}

/// Asks this process a question through its own socket.
fn check(endpoint: Endpoint, question: Question) -> Check {
    Arc::new(move || {
        let endpoint = endpoint.clone();
        Box::pin(async move { csi::probe(&endpoint, question).await })
    })
}

fn get_from_sidecar(SidecarArg { lease, address }: SidecarArg) -> (String, Get) {
    (lease, Arc::new(move |path| Box::pin(http::fetch(address, path))))
}

fn linux() -> anyhow::Result<Arc<Linux>> {
    Ok(Arc::new(Linux::new().context("cannot start the threads that mount")?))
}

/// Sets up a process that works on this machine's pools. Drops privileges before any thread starts, also that of the log: threads
/// would keep theirs.
fn on_node(args: NodeArgs) -> anyhow::Result<(Process, LocalPools)> {
    let serve = args.serve.clone();
    let local = args.resolve()?;
    linux::drop_privileges().context("cannot drop privileges")?;
    let log = log::to_stderr(serve.log_format, serve.log_level);
    if !nix::unistd::geteuid().is_root() {
        warn!("not running as root: volumes can be created and deleted, but not mounted");
    }
    Ok((Process::new(serve, log)?, local))
}

/// The parts of the core that answer calls on the socket.
struct Roles {
    health: Arc<dyn Health>,
    control: Option<Arc<dyn Control>>,
    node: Option<Arc<Node>>,
}

/// What every serving process has.
struct Process {
    serve: ServeArgs,
    // Bound before anything else is touched: a second hostdir on the socket must not touch what belongs to the first.
    listener: Listener,
    runtime: Runtime,
    metrics: Arc<Metrics>,
    // Dropped last: writes what is left of the log.
    log: LogGuard,
}

impl Process {
    fn new(serve: ServeArgs, log: LogGuard) -> anyhow::Result<Self> {
        linux::raise_descriptor_limit();
        let listener = Listener::bind(&serve.endpoint)?;
        // The runtime only parses messages, which two threads would pass back and forth; blocking calls have threads of
        // their own.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .max_blocking_threads(BLOCKING_THREADS)
            .build()
            .context("cannot start the runtime")?;
        Ok(Self {
            serve,
            listener,
            runtime,
            metrics: Arc::default(),
            log,
        })
    }

    /// Serves until SIGTERM. Fails if `work` ends, which it must not.
    fn serve(self, roles: Roles, work: impl Future<Output = anyhow::Error> + Send + 'static) -> anyhow::Result<()> {
        let Self {
            serve,
            listener,
            runtime,
            metrics,
            log: _log,
        } = self;
        let Roles { health, control, node } = roles;
        if let Some(address) = serve.http_endpoint {
            let alive = check(serve.endpoint.clone(), Question::Alive);
            let (health, metrics) = (Arc::clone(&health), Arc::clone(&metrics));
            runtime.spawn(async move {
                if let Err(error) = http::serve(address, alive, health, metrics).await {
                    tracing::error!(error = format!("{error:#}"), "cannot serve HTTP");
                }
            });
        }
        let serving = Serving {
            driver_name: serve.driver_name,
            health,
            control,
            node,
            metrics,
        };
        info!(endpoint = %serve.endpoint.path().display(), version = env!("CARGO_PKG_VERSION"), "serving");
        let stop = stop_signal(&runtime)?;
        let work = runtime.spawn(work);
        let ended = runtime.block_on(async {
            tokio::select! {
                served = csi::serve(listener, serving, stop, STOP_TIMEOUT) => served,
                error = work => Err(error.unwrap_or_else(|panic| anyhow::anyhow!("a background task panicked (bug): {panic}"))),
            }
        });
        runtime.shutdown_background();
        ended?;
        info!("stopped");
        Ok(())
    }
}

/// Completes at the first SIGTERM or SIGINT.
fn stop_signal(runtime: &Runtime) -> anyhow::Result<impl Future<Output = ()> + use<>> {
    let _inside = runtime.enter();
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("stopping: waiting for the calls that run, accepting no new ones");
    })
}
