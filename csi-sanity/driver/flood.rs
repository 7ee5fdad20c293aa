//! Who floods the HTTP port, or stops reading the log, stops nothing.

use std::io::{PipeReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use hostdir_lab::scene::start;
use hostdir_lab::{Client, Driver, Process, Scratch, SetOnDrop, needs, wait_until};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};

/// Connections of a flood: more than the soft limit of open files that processes usually start with.
const FLOOD: usize = 1_100;

/// What the driver may take in a flood, in MiB.
const MEMORY_MAX: f64 = 32.0;

/// After how many probes without success in a row the kubelet acts. One may be late on a busy machine.
const PROBE_FAILURES: usize = 3;

/// A driver with an HTTP port.
fn with_http(scratch: &Scratch) -> (Process, Client, SocketAddr) {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let driver = Driver::new(scratch).pool("default", &scratch.path("pool"));
    let (process, client) = start(&driver.arg(format!("--http-endpoint={address}")));
    wait_until("the port is served", || {
        get(address, "/healthz").is_some_and(|answer| answer.contains("200 OK"))
    });
    (process, client, address)
}

/// The answer to a request; `None` if there is none.
fn get(address: SocketAddr, path: &str) -> Option<String> {
    let mut connection = TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok()?;
    // As long as the kubelet waits.
    connection.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: node\r\n\r\n");
    connection.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// The answer to a request if it is not a success.
fn failure(address: SocketAddr, path: &str) -> Option<String> {
    let answer = get(address, path).unwrap_or_default();
    (!answer.contains("200 OK")).then_some(answer)
}

/// Where the machine has no IPv6, the same address means IPv4 alone.
#[needs(Root)]
fn one_port_serves_all_addresses_of_the_machine() {
    let scratch = Scratch::new();
    let all = TcpListener::bind("[::]:0");
    let mut addresses: Vec<IpAddr> = vec![Ipv4Addr::LOCALHOST.into()];
    addresses.extend(all.as_ref().ok().map(|_| IpAddr::from(Ipv6Addr::LOCALHOST)));
    let free = all.or_else(|_| TcpListener::bind("0.0.0.0:0")).unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let driver = Driver::new(&scratch).pool("default", &scratch.path("pool"));
    let (_process, _client) = start(&driver.arg(format!("--http-endpoint=[::]:{port}")));
    for address in addresses {
        wait_until("the port is served", || {
            get((address, port).into(), "/healthz").is_some_and(|answer| answer.contains("200 OK"))
        });
    }
}

fn volume_works(client: &Client, name: &str, target: &Path) {
    client.create(name).unwrap();
    client.publish(name, target).unwrap();
    client.unpublish(name, target).unwrap();
    client.delete(name).unwrap();
}

fn raise_descriptor_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

/// Keeps connections open and replaces those that the driver closes, until `stop`. Counts those that were made.
fn flood(address: SocketAddr, connections: usize, sent: &[u8], made: &AtomicUsize, stop: &AtomicBool) {
    let mut open: Vec<TcpStream> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        open.retain(is_open);
        let new = connections.saturating_sub(open.len()).min(50);
        for mut connection in (0..new).filter_map(|_| connect_as_another(address).ok()) {
            let _ = connection.set_nonblocking(true);
            let _ = connection.write(sent);
            open.push(connection);
            made.fetch_add(1, Ordering::Relaxed);
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Connects from another address than that of [`get`].
fn connect_as_another(address: SocketAddr) -> nix::Result<TcpStream> {
    let SocketAddr::V4(address) = address else {
        return Err(Errno::EAFNOSUPPORT);
    };
    let flags = SockFlag::SOCK_CLOEXEC;
    let flooder = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    bind(flooder.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 2, 0))?;
    connect(flooder.as_raw_fd(), &SockaddrIn::from(address))?;
    Ok(flooder.into())
}

fn is_open(connection: &TcpStream) -> bool {
    let read = connection.peek(&mut [0]);
    read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
}

/// Runs a flood, during which everything must work.
fn survives(connections: usize, sent: &[u8]) {
    raise_descriptor_limit();
    let scratch = Scratch::new();
    let (process, client, address) = with_http(&scratch);
    let (made, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| flood(address, connections, sent, &made, &stop));
        let _end = SetOnDrop(&stop);
        wait_until("all connections were made once", || {
            made.load(Ordering::Relaxed) >= connections
        });
        for round in 0..20 {
            for path in ["/healthz", "/readyz", "/metrics"] {
                let answers: Vec<_> = (0..PROBE_FAILURES).map_while(|_| failure(address, path)).collect();
                assert!(
                    answers.len() < PROBE_FAILURES,
                    "round {round}: {path} answers {answers:?}"
                );
            }
            volume_works(&client, &format!("pvc-{round}"), &scratch.path("target"));
            assert!(process.descriptors() < 200, "{} descriptors", process.descriptors());
        }
    });
    let (_, peak) = process.memory();
    assert!(peak < MEMORY_MAX, "the driver took {peak:.1} MiB");
}

#[needs(Root)]
fn half_sent_headers_exhaust_nothing() {
    survives(FLOOD, b"GET /readyz HTTP/1.1\r\nHost: node\r\nX-");
}

#[needs(Root)]
fn large_headers_take_no_memory() {
    let header = format!(
        "GET /readyz HTTP/1.1\r\nHost: node\r\nX-Large: {}",
        "x".repeat(400 << 10)
    );
    survives(320, header.as_bytes());
}

#[needs(Root)]
fn a_log_that_nobody_reads_stops_no_call_and_no_shutdown() {
    let scratch = Scratch::new();
    let (reader, writer) = std::io::pipe().unwrap();
    let driver = Driver::new(&scratch).pool("default", &scratch.path("pool"));
    let (mut process, client) = start(&driver.log_to(OwnedFd::from(writer)));
    // A line each: more than the pipe and the driver keep.
    for number in 0..6_000 {
        client
            .publish(&format!("missing-{number}"), &scratch.path("target"))
            .unwrap_err();
    }
    volume_works(&client, "pvc-1", &scratch.path("target"));
    // As soon as somebody reads again, it says what is missing.
    read_until(&reader, "lines of this log were dropped");
    // The pipe is full again.
    process.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(process.ended().success());
    drop(reader);
}

/// Reads until `text` has come.
fn read_until(mut reader: &PipeReader, text: &str) {
    let mut read = String::new();
    while !read.contains(text) {
        let ready = poll(
            &mut [PollFd::new(reader.as_fd(), PollFlags::POLLIN)],
            PollTimeout::from(10_000_u16),
        );
        assert_eq!(
            ready,
            Ok(1),
            "{text:?} is not in the log, which ends with {:?}",
            read.lines().last()
        );
        let mut buffer = [0; 4096];
        let length = reader.read(&mut buffer).unwrap();
        read.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
}
