//! Joins the edges to the core, and serves until told to stop.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::{
    Cli, Command, ControllerArgs, LeaderArgs, LocalPools, LogFormat, NodeArgs, ProbeArgs, SelftestArgs, ServeArgs,
    SidecarArg, host_name,
};
use crate::csi::{self, Endpoint, Listener, Question, Serving};
use crate::http;
use crate::k8s::{self, Agent, ApiStore, Check, Gc, GcConfig, Guard, GuardConfig};
use crate::linux::{self, Linux};
use crate::metrics::Metrics;
use crate::volume::controller::cache::ClusterCache;
use crate::volume::host_volume::NoAssignments;
use crate::volume::{Control, Controller, Fence, Health, Node, SelfTest};

/// Threads for calls that block; more calls than that wait their turn. So many that calls stuck on one bad disk leave room
/// for the others; a thread that waits costs some 10 KiB.
const BLOCKING_THREADS: usize = 512;

/// How long running calls may take to end after SIGTERM: with what comes after it, below the 30 s that the kubelet waits
/// before SIGKILL. A call cut off by that is as one cut off by a power failure: whole or not at all.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// Runs what the command line asks for, to its end.
///
/// # Errors
/// It could not be started, or failed.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Local(args) => local(args),
        Command::Node(args) => node(args),
        Command::Controller(args) => controller(args),
        Command::Crds => crds(),
        Command::Probe(args) => probe(&args),
        Command::Selftest(args) => selftest(&args),
        Command::Leader(args) => leader(&args),
    }
}

/// Asks another process. Its exit code is the answer, and what is wrong goes to standard error.
fn probe(args: &ProbeArgs) -> anyhow::Result<()> {
    let question = if args.ready {
        Question::AllPools
    } else {
        Question::Alive
    };
    small_runtime()?.block_on(csi::probe(&args.endpoint, question))
}

/// Takes a volume of each pool through its life; fails if a step does.
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
    // A thread that hangs on a disk is not waited for.
    runtime.shutdown_background();
    anyhow::ensure!(failed.is_empty(), "the self-test failed: pool {}", failed.join(", "));
    Ok(())
}

/// Says who leads; fails if nobody does who may.
fn leader(args: &LeaderArgs) -> anyhow::Result<()> {
    let (report, well) = small_runtime()?.block_on(async {
        let client = k8s::client().await.context("reach the API server")?;
        k8s::report(client, &args.namespace, &args.leases(), &args.controllers).await
    })?;
    print!("{report}");
    anyhow::ensure!(well, "no controller leads that may lead");
    Ok(())
}

fn small_runtime() -> anyhow::Result<Runtime> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().context("start the runtime")
}

fn crds() -> anyhow::Result<()> {
    for definition in k8s::api::definitions() {
        println!("---\n{}", serde_saphyr::to_string(&definition)?.trim_end());
    }
    Ok(())
}

fn local(args: NodeArgs) -> anyhow::Result<()> {
    let (process, LocalPools { node, pools }) = on_node(args)?;
    let node = Arc::new(Node::new(node, Arc::new(Linux), Arc::new(NoAssignments), pools));
    let roles = Roles {
        health: Arc::clone(&node) as _,
        control: Some(Arc::clone(&node) as _),
        node: Some(node),
    };
    process.serve(roles, std::future::pending())
}

fn node(args: NodeArgs) -> anyhow::Result<()> {
    let (process, LocalPools { node, pools }) = on_node(args)?;
    let (runtime, metrics) = (process.runtime.handle().clone(), Arc::clone(&process.metrics));
    let client = runtime.block_on(k8s::client()).context("reach the API server")?;
    let agent = Agent::new(node.clone(), client, runtime, metrics);
    let node = Arc::new(Node::new(node, Arc::new(Linux), agent.assignments(), pools));
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
        controllers,
        node_grace,
        unused_age,
    } = args;
    log_to_stderr(serve.log_format, serve.log_level);
    let process = Process::new(serve)?;
    let (runtime, metrics) = (process.runtime.handle().clone(), Arc::clone(&process.metrics));
    let client = runtime.block_on(k8s::client()).context("reach the API server")?;
    let cache = Arc::new(ClusterCache::default());
    let store = Arc::new(ApiStore::new(client.clone(), runtime.clone()));
    let config = GcConfig {
        node_grace: Duration::from_secs(node_grace),
        unused_age: Duration::from_secs(unused_age),
    };
    let pod_name = pod_name.map_or_else(host_name, Ok)?;
    let fence = Arc::<Fence>::default();
    let guard = namespace.zip(controllers).filter(|_| !sidecars.is_empty());
    let guard = guard.map(|(namespace, controllers)| {
        let config = GuardConfig {
            namespace,
            pod: pod_name.clone(),
            controllers,
            driver: check_driver(process.serve.endpoint.clone()),
            sidecars: sidecars.into_iter().map(check_sidecar).collect(),
        };
        Guard::new(config, client.clone(), Arc::clone(&fence), Arc::clone(&metrics))
    });
    let gc = Gc::new(config, &cache, &store, client.clone(), pod_name, runtime, &metrics);
    std::thread::Builder::new()
        .name("gc".into())
        .spawn(|| gc.run())
        .context("start the garbage collection")?;
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
            () = Box::pin(k8s::feed(client, cache, metrics)) => anyhow::anyhow!("the watches have ended"),
            ghost = watch => ghost,
        }
    })
}

fn check_driver(endpoint: Endpoint) -> Check {
    Arc::new(move || {
        let endpoint = endpoint.clone();
        Box::pin(async move { csi::probe(&endpoint, Question::Ready).await })
    })
}

/// A sidecar serves this before it takes part in the election, and after it has found its driver.
fn check_sidecar(SidecarArg { lease, address }: SidecarArg) -> (String, Check) {
    (
        lease,
        Arc::new(move || Box::pin(http::ask(address, "/healthz/leader-election"))),
    )
}

/// Begins what needs the machine: with few privileges, and before there are threads that would keep more.
fn on_node(args: NodeArgs) -> anyhow::Result<(Process, LocalPools)> {
    let serve = args.serve.clone();
    log_to_stderr(serve.log_format, serve.log_level);
    let local = args.resolve()?;
    if !nix::unistd::geteuid().is_root() {
        warn!("not running as root: volumes can be created and deleted, but not mounted");
    }
    linux::drop_privileges().context("drop privileges")?;
    Ok((Process::new(serve)?, local))
}

/// Who does what is asked for over the socket.
struct Roles {
    health: Arc<dyn Health>,
    control: Option<Arc<dyn Control>>,
    node: Option<Arc<Node>>,
}

/// What every process that serves has.
struct Process {
    serve: ServeArgs,
    // Before anything else is touched: a second hostdir on the socket must not touch what belongs to the first.
    listener: Listener,
    runtime: Runtime,
    metrics: Arc<Metrics>,
}

impl Process {
    fn new(serve: ServeArgs) -> anyhow::Result<Self> {
        let listener = Listener::bind(&serve.endpoint)?;
        // It only takes messages apart, which two would hand to and fro; what may block has threads of its own.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .max_blocking_threads(BLOCKING_THREADS)
            .build()
            .context("start the runtime")?;
        Ok(Self {
            serve,
            listener,
            runtime,
            metrics: Arc::default(),
        })
    }

    /// Serves until SIGTERM, or until `work` ends: it must not.
    fn serve(self, roles: Roles, work: impl Future<Output = anyhow::Error> + Send + 'static) -> anyhow::Result<()> {
        let Self {
            serve,
            listener,
            runtime,
            metrics,
        } = self;
        let Roles { health, control, node } = roles;
        if let Some(address) = serve.http_endpoint {
            let (health, metrics) = (Arc::clone(&health), Arc::clone(&metrics));
            runtime.spawn(async move {
                if let Err(error) = http::serve(address, health, metrics).await {
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
                served = csi::serve(&listener, serving, stop, STOP_TIMEOUT) => served,
                error = work => Err(error.unwrap_or_else(|panic| anyhow::anyhow!("a bug: {panic}"))),
            }
        });
        runtime.shutdown_background();
        drop(listener);
        ended?;
        info!("stopped");
        Ok(())
    }
}

/// Ready at the first SIGTERM or SIGINT.
fn stop_signal(runtime: &Runtime) -> anyhow::Result<impl Future<Output = ()> + use<>> {
    let _inside = runtime.enter();
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("stopping: running calls end, no new ones are taken");
    })
}

fn log_to_stderr(format: LogFormat, level: tracing::Level) {
    // What the libraries below say at these levels is for their authors; warnings are not.
    let quiet = level.min(tracing::Level::WARN);
    let levels = Targets::new().with_target("hostdir", level).with_default(quiet);
    let log = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false);
    let registry = tracing_subscriber::registry();
    match format {
        LogFormat::Text => registry.with(log.with_filter(levels)).init(),
        LogFormat::Json => registry.with(log.json().with_filter(levels)).init(),
    }
}
