//! The unix socket that the services are served on.

use std::future::Future;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener as StdListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use thiserror::Error;
use tokio::net::UnixListener;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tracing::{info, warn};

use super::proto::controller_server::ControllerServer;
use super::proto::identity_server::IdentityServer;
use super::proto::node_server::NodeServer;
use super::{About, Service};
use crate::background::ACCEPT_PAUSE;
use crate::metrics::Metrics;
use crate::volume::{Control, Health, Node};

/// Where to listen: `unix:///path/to.sock`, as in CSI's `CSI_ENDPOINT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint(PathBuf);

/// A text that is not an [`Endpoint`].
#[derive(Debug, Error)]
#[error("endpoint {0:?} {1}")]
pub(crate) struct InvalidEndpoint(String, &'static str);

impl Endpoint {
    /// Longest path of a unix socket: `sun_path` holds 108 bytes with the final NUL, see unix(7).
    const PATH_MAX: usize = 107;

    /// The path of the socket.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl FromStr for Endpoint {
    type Err = InvalidEndpoint;

    fn from_str(text: &str) -> Result<Self, InvalidEndpoint> {
        let path = text
            .strip_prefix("unix://")
            .or_else(|| text.strip_prefix("unix:"))
            .unwrap_or(text);
        let why = if !path.starts_with('/') {
            "must be unix:// and an absolute path, such as unix:///csi/csi.sock"
        } else if path.len() > Self::PATH_MAX {
            "is too long: the path of a socket has at most 107 bytes (unix(7))"
        } else {
            return Ok(Self(path.into()));
        };
        Err(InvalidEndpoint(text.to_owned(), why))
    }
}

/// Why a socket could not be bound.
#[derive(Debug, Error)]
pub(crate) enum ListenError {
    /// Another process answers on the socket.
    #[error("another process is listening on {}; stop it, or choose another --endpoint", .0.display())]
    Taken(PathBuf),
    /// The path is a file that is not a socket.
    #[error("{} already exists and is not a socket; move it away, or choose another --endpoint", .0.display())]
    NoSocket(PathBuf),
    #[error("cannot {verb} {}", .path.display())]
    Io {
        verb: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// A bound socket; its file is removed when this is dropped.
pub(crate) struct Listener {
    socket: StdListener,
    file: SocketFile,
}

/// The file of a bound socket, removed when this is dropped.
struct SocketFile(PathBuf);

impl Listener {
    /// Binds the socket. Replaces one that a dead process left behind, but not one that answers.
    ///
    /// # Errors
    /// Another process listens on the path, a file there is not a socket, or a system call failed.
    pub(crate) fn bind(endpoint: &Endpoint) -> Result<Self, ListenError> {
        let path = endpoint.path();
        make_room(path)?;
        let socket = StdListener::bind(path).map_err(io(path, "listen on"))?;
        let file = SocketFile(path.to_owned());
        socket.set_nonblocking(true).map_err(io(path, "set up"))?;
        Ok(Self { socket, file })
    }
}

/// Removes the socket of a process that is gone.
fn make_room(path: &Path) -> Result<(), ListenError> {
    let metadata = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        metadata => metadata.map_err(io(path, "stat"))?,
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NoSocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            info!(path = %path.display(), "replacing the socket of a process that is gone");
            std::fs::remove_file(path).map_err(io(path, "remove the stale socket"))
        }
        Err(error) => Err(io(path, "connect to")(error)),
        Ok(_) => Err(ListenError::Taken(path.to_owned())),
    }
}

fn io(path: &Path, verb: &'static str) -> impl FnOnce(std::io::Error) -> ListenError {
    let path = path.to_owned();
    move |source| ListenError::Io { verb, path, source }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            warn!(path = %self.0.display(), %error, "cannot remove the socket");
        }
    }
}

pub(crate) struct Serving {
    /// The name the driver is registered under.
    pub(crate) driver_name: String,
    pub(crate) health: Arc<dyn Health>,
    /// Creates and deletes volumes, if this process does that.
    pub(crate) control: Option<Arc<dyn Control>>,
    /// Mounts volumes, if this process does that.
    pub(crate) node: Option<Arc<Node>>,
    pub(crate) metrics: Arc<Metrics>,
}

/// Serves Identity, and Controller and Node if they are given, until `stop` completes. Then gives up the socket and the pools at
/// once, so that another process can take over, and waits at most `patience` for the calls whose callers still wait.
///
/// # Errors
/// The socket fails.
pub(crate) async fn serve(
    listener: Listener,
    serving: Serving,
    stop: impl Future<Output = ()>,
    patience: Duration,
) -> anyhow::Result<()> {
    let Listener { socket, file } = listener;
    let incoming = connections(UnixListener::from_std(socket)?);
    let calls = TaskTracker::new();
    let Serving {
        driver_name,
        health,
        control,
        node,
        metrics,
    } = serving;
    let about = About {
        driver_name: driver_name.into(),
        node: node.as_ref().map(|node| node.name().clone()),
        calls: calls.clone(),
        metrics,
    };
    let identity = Service {
        subject: health,
        about: about.clone(),
    };
    let control = control.map(|subject| {
        let about = about.clone();
        ControllerServer::new(Service { subject, about })
    });
    let pools = node.clone();
    let node = node.map(|subject| NodeServer::new(Service { subject, about }));
    let stopping = Notify::new();
    let serving = Server::builder()
        .add_service(IdentityServer::new(identity))
        .add_optional_service(control)
        .add_optional_service(node)
        .serve_with_incoming_shutdown(incoming, stopping.notified());
    let stopped = async {
        stop.await;
        drop(file);
        stopping.notify_one();
        pools.inspect(|node| node.close());
        calls.close();
        if timeout(patience, calls.wait()).await.is_err() {
            warn!(calls = calls.len(), "calls are still running; not waiting any longer");
        }
        sleep(GOODBYE).await;
    };
    tokio::select! {
        served = serving => served?,
        () = stopped => info!("a client does not close its connection; not waiting for it"),
    }
    Ok(())
}

/// The connections to a socket. tonic would end on most errors of accept(2), and try again at once after the others.
fn connections(socket: UnixListener) -> impl Stream<Item = std::io::Result<tokio::net::UnixStream>> {
    UnixListenerStream::new(socket).filter_map(async |accepted| match accepted {
        Ok(connection) => Some(Ok(connection)),
        Err(error) => {
            warn!(%error, "cannot accept a connection");
            sleep(ACCEPT_PAUSE).await;
            None
        }
    })
}

/// How long clients have to read the last answers and disconnect. A client that hangs must not keep this process running.
const GOODBYE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_absolute_paths_of_sockets() {
        for text in ["unix:///csi/csi.sock", "unix:/csi/csi.sock", "/csi/csi.sock"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().path(), Path::new("/csi/csi.sock"));
        }
        let long = format!("unix:///{}", "x".repeat(107));
        for text in ["", "unix://", "csi.sock", "tcp://127.0.0.1:1", &long] {
            assert!(text.parse::<Endpoint>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint: Endpoint = dir.path().join("s").to_str().unwrap().parse().unwrap();
        drop(StdListener::bind(endpoint.path()).unwrap());
        let live = Listener::bind(&endpoint).unwrap();
        assert!(matches!(Listener::bind(&endpoint), Err(ListenError::Taken(_))));
        drop(live);
        assert!(!endpoint.path().exists(), "the socket was left behind");
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        std::fs::write(&path, "precious").unwrap();
        let endpoint: Endpoint = path.to_str().unwrap().parse().unwrap();
        assert!(matches!(Listener::bind(&endpoint), Err(ListenError::NoSocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
