//! A disk that hangs, before or after its pool was opened, blocks nothing but its own pool.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hostdir_lab::disk::{mount_image, mount_new, run};
use hostdir_lab::scene::start;
use hostdir_lab::{Client, Csi, Driver, Process, Scratch, needs, wait_until};
use nix::sys::signal::Signal;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::{Code, Status};

/// How long a call may take that does not need the hanging disk: far below the time for which it hangs.
const SOON: Duration = Duration::from_secs(5);

/// A call that takes longer hangs.
const HANGING: Duration = Duration::from_secs(20);

/// Two pools: `default`, and `slow` on a disk that can be frozen.
struct TwoPools {
    scratch: Scratch,
    disk: PathBuf,
}

/// A frozen filesystem. It thaws when this is dropped: frozen, it could not even be unmounted.
struct Frozen(PathBuf);

impl TwoPools {
    fn new() -> Self {
        let scratch = Scratch::new();
        let disk = scratch.mkdir("disk");
        mount_new(&disk, 16, &["mkfs.ext4", "-q"]);
        Self { scratch, disk }
    }

    fn driver(&self) -> Driver {
        let (default, slow) = (self.scratch.path("pool"), self.disk.join("pool"));
        let config = format!(
            "pools:\n- {{name: default, path: {}}}\n- {{name: slow, path: {}, overcommit: 1000}}\n",
            default.display(),
            slow.display()
        );
        let path = self.scratch.path("config.yaml");
        std::fs::write(&path, config).unwrap();
        Driver::new(&self.scratch)
            .arg("--config")
            .arg(path.display().to_string())
    }

    fn start(&self) -> (Process, Client) {
        start(&self.driver())
    }

    fn freeze(&self) -> Frozen {
        run(Command::new("fsfreeze").arg("-f").arg(&self.disk));
        Frozen(self.disk.clone())
    }

    fn target(&self, name: &str) -> PathBuf {
        self.scratch.path(name)
    }

    /// The life of a volume on the pool that does not hang.
    fn default_pool_works(&self, client: &Client, name: &str) {
        let since = Instant::now();
        client.create(name).unwrap();
        client.publish(name, &self.target(name)).unwrap();
        client.stats(name, &self.target(name).to_string_lossy()).unwrap();
        client.unpublish(name, &self.target(name)).unwrap();
        client.delete(name).unwrap();
        assert!(since.elapsed() < SOON, "the life of {name} took {:?}", since.elapsed());
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(&self.0).status();
    }
}

fn on_slow(name: &str) -> hostdir::csi::proto::CreateVolumeRequest {
    hostdir::csi::proto::CreateVolumeRequest {
        parameters: hostdir_lab::client::map(&[("pool", "slow")]),
        ..hostdir_lab::client::create_request(name)
    }
}

/// Begins to expand a volume, on a disk that hangs.
fn expand_in_background(client: &Client, name: &'static str) -> JoinHandle<Result<(), Status>> {
    let csi = client.csi().clone();
    client.begin(async move { csi.expand(name, 2 << 20).await.map(drop) })
}

/// Whether a thread of the process waits in the kernel and cannot be killed (state D, see proc_pid_stat(5)).
fn has_stuck_thread(process: &Process) -> bool {
    let mut stats = process
        .tasks()
        .filter_map(|task| std::fs::read_to_string(task.join("stat")).ok());
    stats.any(|stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('D')))
}

/// Whether `hostdir probe --ready` succeeds, which asks for every pool.
fn is_ready(socket: &Path) -> bool {
    let endpoint = format!("--endpoint=unix://{}", socket.display());
    let mut probe = Command::new(hostdir_lab::harness::hostdir());
    probe
        .args(["probe", "--ready", &endpoint])
        .output()
        .unwrap()
        .status
        .success()
}

#[needs(Root, LoopDevices)]
fn a_disk_that_hangs_from_the_start_does_not_block_other_pools() {
    let pools = TwoPools::new();
    let frozen = pools.freeze();
    let (_process, client) = pools.start();
    pools.default_pool_works(&client, "pvc-1");
    client.probe().unwrap();
    let status = client.delete("never-made").unwrap_err();
    assert!(
        status.message().contains("pool slow") && status.message().contains("still being opened"),
        "{status}"
    );
    drop(frozen);
    wait_until("the disk answers", || client.delete("never-made").is_ok());
}

#[needs(Root, LoopDevices)]
fn a_disk_that_hangs_later_is_noticed_and_named_and_recovers() {
    let pools = TwoPools::new();
    let driver = pools.driver();
    let (_process, client) = start(&driver);
    client.create_as(on_slow("on-slow")).unwrap();
    client.publish("on-slow", &pools.target("on-slow")).unwrap();
    wait_until("all pools are ready", || is_ready(&driver.socket));
    let frozen = pools.freeze();
    let hanging = expand_in_background(&client, "on-slow");
    wait_until("the pool has no room", || client.capacity("slow") == 0);
    let status = client.create_as(on_slow("more")).unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        status.message().contains("pool slow") && status.message().contains("its disk hangs"),
        "{status}"
    );
    // Nothing but the pool itself is affected.
    client.probe().unwrap();
    assert!(!is_ready(&driver.socket));
    assert_eq!(client.capacity("slow"), 0);
    assert!(client.capacity("default") > 0);
    pools.default_pool_works(&client, "pvc-1");
    // A pod on the hanging disk can end, also while another call for its volume hangs.
    let since = Instant::now();
    client.unpublish("on-slow", &pools.target("on-slow")).unwrap();
    assert!(since.elapsed() < SOON, "unpublishing took {:?}", since.elapsed());
    assert!(!hanging.is_finished(), "the call for the volume does not hang");
    drop(frozen);
    drop(client.block_on(hanging));
    wait_until("all pools are ready again", || is_ready(&driver.socket));
    wait_until("the volume can be deleted", || client.delete("on-slow").is_ok());
}

/// More callers than the driver has threads for calls that block.
#[needs(Root, LoopDevices)]
fn callers_of_a_hanging_disk_leave_room_for_the_others() {
    let pools = TwoPools::new();
    let (_process, client) = pools.start();
    let frozen = pools.freeze();
    client.block_on(async {
        let csi = client.csi();
        let calls = (0..700).map(|number| {
            let (csi, request): (Csi, _) = (csi.clone(), on_slow(&format!("flood-{number}")));
            tokio::spawn(timeout(HANGING, async move { csi.create(request).await }))
        });
        let calls: Vec<_> = calls.collect();
        // Some hang in the disk; all others must be answered.
        let (mut hang, mut refused) = (0, 0);
        for call in calls {
            let Ok(answer) = call.await.expect("no panic") else {
                hang += 1;
                continue;
            };
            let refusal = answer.expect_err("the disk hangs");
            assert_eq!(refusal.code(), Code::Unavailable, "{refusal}");
            refused += 1;
        }
        assert!(hang <= 64 && refused >= 636, "{hang} calls hang, {refused} are refused");
    });
    pools.default_pool_works(&client, "pvc-1");
    client.probe().unwrap();
    drop(frozen);
}

#[needs(Root, LoopDevices)]
fn a_disk_that_is_unmounted_lazily_and_mounted_again_works_again() {
    let pools = TwoPools::new();
    let driver = pools.driver();
    let (_process, client) = start(&driver);
    client.create_as(on_slow("before")).unwrap();
    client.publish("before", &pools.target("before")).unwrap();
    client.unpublish("before", &pools.target("before")).unwrap();
    run(Command::new("umount").arg("-l").arg(&pools.disk));
    mount_image(&pools.disk.with_extension("img"), &pools.disk);
    wait_until("the pool is opened again", || {
        client.publish("before", &pools.target("before")).is_ok()
    });
    client.unpublish("before", &pools.target("before")).unwrap();
    client.delete("before").unwrap();
}

/// SIGKILL does not end a thread that hangs in a system call, nor close its descriptors.
#[needs(Root, LoopDevices)]
fn a_killed_driver_that_hangs_keeps_no_pool_but_the_one_it_hangs_in() {
    let pools = TwoPools::new();
    let driver = pools.driver();
    // The disk thaws before a driver is waited for.
    let mut next;
    let (process, client) = start(&driver);
    client.create_as(on_slow("on-slow")).unwrap();
    client.publish("on-slow", &pools.target("on-slow")).unwrap();
    pools.default_pool_works(&client, "pvc-1");
    let frozen = pools.freeze();
    drop(expand_in_background(&client, "on-slow"));
    wait_until("the call hangs", || has_stuck_thread(&process));
    process.signal(Signal::SIGKILL);
    next = driver.spawn();
    let client = next.connect();
    wait_until("the good pool is served", || client.capacity("default") > 0);
    pools.default_pool_works(&client, "pvc-2");
    assert!(has_stuck_thread(&process), "the killed driver is gone");
    client.unpublish("on-slow", &pools.target("on-slow")).unwrap();
    drop(frozen);
    wait_until("the other pool is served", || client.capacity("slow") > 0);
    client.delete("on-slow").unwrap();
}

#[needs(Root, LoopDevices)]
fn a_driver_that_stops_gives_up_its_socket_and_good_pools_before_it_waits() {
    let pools = TwoPools::new();
    let driver = pools.driver();
    // The disk thaws before a driver is waited for.
    let mut next;
    let (mut process, client) = start(&driver);
    client.create_as(on_slow("on-slow")).unwrap();
    client.publish("on-slow", &pools.target("on-slow")).unwrap();
    let frozen = pools.freeze();
    let expand = expand_in_background(&client, "on-slow");
    wait_until("the call hangs", || has_stuck_thread(&process));
    process.signal(Signal::SIGTERM);
    wait_until("the socket is given up", || !driver.socket.exists());
    next = driver.spawn();
    let other = next.connect();
    wait_until("the good pool is served", || other.capacity("default") > 0);
    pools.default_pool_works(&other, "pvc-1");
    assert!(!process.is_dead() && !expand.is_finished(), "nothing hangs");
    drop(frozen);
    let _ = client.block_on(expand);
    assert!(process.ended().success(), "{}", process.log());
    assert!(driver.socket.exists(), "the socket of the next driver was removed");
    wait_until("the other pool is served", || other.capacity("slow") > 0);
}
